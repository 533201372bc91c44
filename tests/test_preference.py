"""Each loss against its formula in float64, written down again with Python's own math; and what may not be asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import KTO
from stages.training.preference import LOSS_TYPES, REFERENCE_FREE, PairLoss, bradley_terry, kto_loss, pair_loss

BETA, SMOOTH, GAMMA = 0.3, 0.1, 0.4


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float) -> float:
    return -(1 - SMOOTH) * math.log(s(x)) - SMOOTH * math.log(s(-x))


def by_hand(name: str, pw: float, pl: float, rw: float, rl: float, nw: int, nl: int) -> float:
    """The loss of a pair from log pi and log pi_0 of both answers and their lengths."""
    w, l, b, e = pw - rw, pl - rl, BETA, SMOOTH  # noqa: E741
    odds = [p / n - math.log(1 - math.exp(p / n)) for p, n in ((pw, nw), (pl, nl))]
    q = s(b * (w - l))
    mix = s(b * (w - l) / 0.05)
    return {
        "sigmoid": lambda: smoothed(b * (w - l)),
        "hinge": lambda: max(0.0, 1 - b * (w - l)),
        "ipo": lambda: (w / nw - l / nl - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * math.log(q) + e * math.log(1 - q)) / (1 - 2 * e),
        "exo_pair": lambda: q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e),
        "nca_pair": lambda: -math.log(s(b * w)) - 0.5 * math.log(s(-b * w)) - 0.5 * math.log(s(-b * l)),
        "bco_pair": lambda: -math.log(s(b * w)) - math.log(s(-b * l)),
        "sppo_hard": lambda: (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2,
        "aot": lambda: smoothed(b * ((pw - pl) - (rw - rl))),  # of one pair there is nothing to sort
        "aot_unpaired": lambda: smoothed(b * (w - l)),
        "apo_zero": lambda: 1 - s(b * w) + s(b * l),
        "apo_down": lambda: s(b * w) + 1 - s(b * (w - l)),
        "discopop": lambda: -math.log(q) * (1 - mix) + math.exp(-b * (w - l)) * mix,
        "sigmoid_norm": lambda: -math.log(s(b * (w / nw - l / nl))),
        "sft": lambda: -pw / nw,
        "simpo": lambda: smoothed(b * (pw / nw - pl / nl) - GAMMA),
        "orpo": lambda: -math.log(s(odds[0] - odds[1])),
        "cpo": lambda: smoothed(b * (pw - pl)),
    }[name]()


def ours(loss: PairLoss, pairs: list[tuple[float, float, float, float, int, int]]) -> tuple[Any, Any]:
    pw, pl, rw, rl, nw, nl = torch.tensor(pairs, dtype=torch.float64).T
    logps, lengths = torch.stack([pw, pl]), torch.stack([nw, nl])
    reference = torch.stack([rw, rl]) if loss.needs_reference else None
    return pair_loss(loss, logps, reference, lengths, logps / lengths, torch.full_like(logps, -0.3))


PAIRS = [(-7.5, -6.25, -8.0, -6.0, 5, 3), (-2.0, -9.0, -3.5, -7.0, 1, 6), (-30.0, -28.0, -30.0, -28.0, 12, 20)]


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_loss_is_its_formula(name: str) -> None:
    wanted_type = [name, "sigmoid"] if name == "sft" else [name]
    loss = PairLoss(wanted_type, beta=BETA, label_smoothing=SMOOTH, gamma=GAMMA)
    for pair in PAIRS:
        each, tokens = ours(loss, [pair])
        expected = by_hand(name, *pair)
        got = float(tokens) / pair[4] if name == "sft" else float(each)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", sorted({*LOSS_TYPES} - {"sft", "aot", "aot_unpaired"}))
def test_pairs_do_not_know_of_each_other(name: str) -> None:
    loss = PairLoss([name], beta=BETA, label_smoothing=SMOOTH, gamma=GAMMA)
    together, _ = ours(loss, PAIRS)
    alone = [float(ours(loss, [pair])[0]) for pair in PAIRS]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_aot_compares_distributions() -> None:
    """Which rejected answer stands beside which chosen one does not matter to the unpaired loss."""
    loss = PairLoss(["aot_unpaired"], beta=BETA)
    swapped = [(a[0], b[1], a[2], b[3], a[4], b[5]) for a, b in zip(PAIRS, [*PAIRS[1:], PAIRS[0]], strict=True)]
    assert float(ours(loss, PAIRS)[0].sum()) == pytest.approx(float(ours(loss, swapped)[0].sum()), rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "bco_pair", "nca_pair", "sigmoid_norm", "aot"])
def test_where_policy_is_reference_the_loss_is_a_multiple_of_ln_2(name: str) -> None:
    same = [(-7.5, -6.25, -7.5, -6.25, 5, 3)]
    times = 2 if name in ("bco_pair", "nca_pair") else 1
    assert float(ours(PairLoss([name], beta=BETA), same)[0]) == pytest.approx(times * math.log(2), rel=1e-12)


def test_losses_are_combined_by_their_weights() -> None:
    loss = PairLoss(["sigmoid", "orpo", "sft"], [1.0, 0.25, 0.5], beta=BETA)
    each, tokens = ours(loss, PAIRS)
    parts = [ours(PairLoss([name], beta=BETA), PAIRS)[0] for name in ("sigmoid", "orpo")]
    assert each.tolist() == pytest.approx((parts[0] + 0.25 * parts[1]).tolist(), rel=1e-12)
    assert tokens.tolist() == pytest.approx([-0.5 * pair[0] for pair in PAIRS], rel=1e-12)


def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_write_it() -> None:
    plain, weighed = (ours(PairLoss(["sigmoid"], beta=BETA, use_weighting=on), PAIRS)[0] for on in (False, True))
    assert weighed.tolist() == pytest.approx((plain * math.exp(-0.6)).tolist(), rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_of_a_divergence_are_the_slope_of_f(divergence: str) -> None:
    """f'(u) of u = pi/pi_0, by a finite difference of f itself (Wang et al. 2023, table 1)."""
    alpha = 0.5
    f = {
        "forward_kl": lambda u: -math.log(u) + u - 1,
        "js_divergence": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha_divergence": lambda u: (u**alpha - alpha * u + alpha - 1) / (alpha * (alpha - 1)),
    }[divergence]
    loss = PairLoss(["hinge"], beta=1e-3, f_divergence_type=divergence, f_alpha_divergence_coef=alpha)
    for pw, pl, rw, rl, nw, nl in PAIRS[:2]:
        slopes = [(f(u + 1e-6) - f(u - 1e-6)) / 2e-6 for u in (math.exp(pw - rw), math.exp(pl - rl))]
        got = (1 - float(ours(loss, [(pw, pl, rw, rl, nw, nl)])[0])) / 1e-3
        assert got == pytest.approx(slopes[0] - slopes[1], rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted({*LOSS_TYPES} - {"sft"})),
    st.lists(st.floats(-80, -0.5), min_size=4, max_size=4),
    st.floats(0.01, 2),
)
def test_losses_and_gradients_stay_finite(name: str, logps: list[float], beta: float) -> None:
    policy = torch.tensor(logps[:2], dtype=torch.float32)[:, None].requires_grad_()
    reference, lengths = torch.tensor(logps[2:])[:, None], torch.tensor([[3.0], [7.0]])
    loss = PairLoss([name], beta=beta, label_smoothing=0.05)
    each, _ = pair_loss(
        loss, policy, reference if loss.needs_reference else None, lengths, policy / lengths, torch.zeros(2, 1)
    )
    if name == "discopop":  # exp(-b d): its authors' loss itself is unbounded
        return
    each.sum().backward()
    assert torch.isfinite(each).all() and policy.grad is not None and torch.isfinite(policy.grad).all()


def test_kto_is_its_formula() -> None:
    ratios, wanted = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0])
    for loss_type, z in (("kto", 0.4), ("apo_zero_unpaired", 0.0)):
        got = kto_loss(
            ratios, wanted, torch.tensor(0.4, dtype=torch.float64), beta=BETA, desirable_weight=1.5, undesirable_weight=0.5,
            loss_type=loss_type,
        )  # fmt: skip
        expected = [1.5 * (1 - s(BETA * (0.7 - z))), *(0.5 * (1 - s(BETA * (z - r))) for r in (-1.2, 2.0))]
        assert got.tolist() == pytest.approx(expected, rel=1e-7)


def test_bradley_terry_is_its_formula() -> None:
    rewards = torch.tensor([[1.5, -0.2], [0.5, 0.3]], dtype=torch.float64)
    margins = torch.tensor([0.5, 0.0], dtype=torch.float64)
    got = bradley_terry(rewards, margins, 0.01)
    expected = [-math.log(s(0.5)) + 0.01 * 4.0, -math.log(s(-0.5)) + 0.01 * 0.01]
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert bradley_terry(rewards, None, None).tolist() == pytest.approx([-math.log(s(1)), -math.log(s(-0.5))], rel=1e-9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss_type": "sigmoyd"}, "sigmoyd is not one of .*; did you mean sigmoid"),
        ({"loss_type": []}, "at least one"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2"),
        ({"loss_type": ["sft"]}, "sft alone"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"loss_type": "exo_pair"}, "label_smoothing above 0"),
        ({"label_smoothing": 0.5}, "under 0.5"),
        ({"loss_type": "aot", "use_weighting": True}, "not with aot"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "only with"),
        ({"f_divergence_type": "kl"}, "is not one of"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PairLoss.of(given, 0.5)


def test_a_reference_is_wanted_only_where_a_loss_has_one() -> None:
    assert not PairLoss.of({"loss_type": ["sft", "orpo"]}, 0.5).needs_reference
    assert PairLoss.of({"loss_type": ["sigmoid", "sft"]}, 0.5).needs_reference
    assert all(not PairLoss([name]).needs_reference for name in REFERENCE_FREE)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"loss_type": "apo_zero"}, "apo_zero is not one of kto, apo_zero_unpaired; did you mean apo_zero_unpaired"),
        ({"beta": 0.0}, "beta must be above 0, not 0"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be above 0, not -1"),
    ],
)
def test_kto_settings_are_checked(train: dict[str, Any], says: str) -> None:
    KTO.model_validate({"data": [{"path": "p"}], "train": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.3}})
    with pytest.raises(ValueError, match=says):
        KTO.model_validate({"data": [{"path": "p"}], "train": train})
