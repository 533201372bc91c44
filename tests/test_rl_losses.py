"""PPO's losses and their gradients against plain numbers, and policy and value model as one module against each alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.rl.actor_critic import Acted, ActorCritic
from stages.rl.losses import approximate_kl, policy_loss, value_loss
from stages.rl.rollout import rollout_collator
from stages.training import documents
from stages.training.answers import answer_collator
from stages.training.losses import token_logps

CLIP = 0.2


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def slope(f: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    return (f(at + step) - f(at - step)) / (2 * step)


# ------------------------------------------------------------------------------------------------ of the policy


def objective(logp: float, old: float, advantage: float, clip: float = CLIP) -> float:
    """Schulman et al. 2017, eq. 7: min(r A, clip(r, 1 - e, 1 + e) A), which is maximised."""
    r = math.exp(logp - old)
    return min(r * advantage, min(max(r, 1 - clip), 1 + clip) * advantage)


# Ratio and advantage, and whether clipping leaves the token out: only where the ratio has already gone the way it should go.
CASES = [
    (1.0, 2.0, False), (1.1, 2.0, False), (1.5, 2.0, True), (0.5, 2.0, False),
    (1.0, -3.0, False), (0.9, -3.0, False), (0.5, -3.0, True), (1.5, -3.0, False), (1.7, 0.0, False),
]  # fmt: skip


@pytest.mark.parametrize("clip", [0.1, CLIP, 0.3])
def test_the_policys_loss_is_the_clipped_objective(clip: float) -> None:
    rng = np.random.default_rng(0)
    old, moved, advantages = rng.normal(size=200) - 5, rng.normal(size=200) * 0.4, rng.normal(size=200)
    loss, ratio, _ = policy_loss(torch.tensor(old + moved), torch.tensor(old), torch.tensor(advantages), clip)
    wanted = [
        -objective(float(o + m), float(o), float(a), clip) for o, m, a in zip(old, moved, advantages, strict=True)
    ]
    np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(ratio.numpy(), np.exp(moved), rtol=1e-12)


def test_clipping_takes_away_the_gradient_of_tokens_that_have_gone_far_enough_and_of_no_other() -> None:
    old = -4.0
    logps = column(*(old + math.log(ratio) for ratio, _, _ in CASES)).requires_grad_()
    advantages = column(*(advantage for _, advantage, _ in CASES))
    loss, _, clipped = policy_loss(logps, torch.full_like(advantages, old), advantages, CLIP)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert clipped.tolist() == [float(left_out) for *_, left_out in CASES]
    for got, (r, a, left_out), logp in zip(gradient.tolist(), CASES, logps.tolist(), strict=True):
        assert got == pytest.approx(0.0 if left_out else -r * a, rel=1e-12)  # d r / d log p = r
        assert got == pytest.approx(slope(lambda x, a=a: -objective(x, old, a), logp), abs=1e-6)  # type: ignore[misc]


def test_before_the_first_step_the_gradient_is_that_of_the_policy_gradient() -> None:
    """- A d log p, and no token is clipped."""
    logps = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(50, dtype=torch.float64)
    loss, ratio, clipped = policy_loss(logps, logps.detach(), advantages, CLIP)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert torch.equal(gradient, -advantages) and not clipped.any() and (ratio == 1).all()


def test_gradients_are_those_of_the_functions() -> None:
    torch.manual_seed(0)
    old = torch.randn(40, dtype=torch.float64)
    new, other = (old + 0.5 * torch.randn(40, dtype=torch.float64) for _ in range(2))
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, other, CLIP)[0], (new,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, other, CLIP)[0], (new,))
    assert torch.autograd.gradcheck(lambda x: approximate_kl(x, old), (new,))


# ------------------------------------------------------------------------------------------------ of the values


def squared_error(value: float, old: float, target: float, clip: float = CLIP) -> float:
    """Huang et al. 2022, detail 9: 1/2 max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2)."""
    return 0.5 * max((value - target) ** 2, (min(max(value, old - clip), old + clip) - target) ** 2)


@pytest.mark.parametrize("clip", [0.1, CLIP, 1.0])
def test_the_values_loss_is_the_larger_of_two_squares(clip: float) -> None:
    rng = np.random.default_rng(1)
    old, moved, returns = rng.normal(size=200), rng.normal(size=200) * 0.5, rng.normal(size=200)
    loss, _ = value_loss(torch.tensor(old + moved), torch.tensor(old), torch.tensor(returns), clip)
    wanted = [
        squared_error(float(o + m), float(o), float(g), clip) for o, m, g in zip(old, moved, returns, strict=True)
    ]
    np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-9)


def test_a_value_that_has_moved_far_enough_towards_its_return_gets_no_gradient() -> None:
    cases = [  # value, value before, return, whether clipping leaves it out
        (1.0, 1.0, 5.0, False), (1.1, 1.0, 5.0, False), (1.5, 1.0, 5.0, True), (0.5, 1.0, 5.0, False),
        (0.5, 1.0, -5.0, True), (1.5, 1.0, -5.0, False), (1.0, 1.0, 1.0, False), (3.0, 1.0, 1.1, False),
    ]  # fmt: skip
    values, old, returns = (column(*(case[i] for case in cases)) for i in range(3))
    loss, clipped = value_loss(values.requires_grad_(), old, returns, CLIP)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert clipped.tolist() == [float(case[3]) for case in cases]
    for got, (v, o, g, left_out) in zip(gradient.tolist(), cases, strict=True):
        assert got == pytest.approx(0.0 if left_out else v - g, abs=1e-12)
        if v != g:  # at a minimum the slope of differences is rounding alone
            assert got == pytest.approx(slope(lambda x, o=o, g=g: squared_error(x, o, g), v), abs=1e-6)  # type: ignore[misc]


def test_values_that_stay_near_are_not_counted_as_clipped() -> None:
    """In float32, as they are trained, where V_old + (V - V_old) is not always V."""
    torch.manual_seed(0)
    old = torch.randn(100_000) * 0.1
    values, returns = old + 0.39 * (torch.rand(100_000) - 0.5), torch.randn(100_000)
    _, clipped = value_loss(values, old, returns, CLIP)
    assert not clipped.any()


def test_the_kl_to_the_policy_that_answered() -> None:
    """Over all actions, each as often as that policy takes it, the mean is KL(pi_old || pi)."""
    rng = np.random.default_rng(2)
    old, new = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(9))
    each = approximate_kl(torch.tensor(np.log(new)), torch.tensor(np.log(old)))
    wanted = [(n / o - 1) - math.log(n / o) for o, n in zip(old, new, strict=True)]
    np.testing.assert_allclose(each.numpy(), wanted, rtol=1e-9)
    assert float(old @ each.numpy()) == pytest.approx(
        math.fsum(o * math.log(o / n) for o, n in zip(old, new, strict=True))
    )
    assert (each >= 0).all()


# ------------------------------------------------------------------------------------------------ log-probabilities and entropy


def by_autograd(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("block", [1, 131 * 10, 1 << 22])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])  # whether logp, entropy are in the loss
def test_entropy_and_its_gradient(monkeypatch: pytest.MonkeyPatch, block: int, parts: tuple[bool, bool]) -> None:
    monkeypatch.setattr("stages.training.losses.BLOCK", block)
    torch.manual_seed(0)
    logits = (3 * torch.randn(57, 131)).requires_grad_()
    targets, of_logps, of_entropy = torch.randint(131, (57,)), torch.randn(57), torch.randn(57)

    def gradient(pair: tuple[Tensor, Tensor]) -> Tensor:
        terms = [(pair[0] * of_logps).sum(), (pair[1] * of_entropy).sum()]
        loss: Any = sum(term for term, wanted in zip(terms, parts, strict=True) if wanted)
        return torch.autograd.grad(loss, logits)[0]

    got, wanted = token_logps(logits * 1.0, targets, entropy=True), by_autograd(logits, targets)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(gradient(got), gradient(wanted), atol=1e-5)


def test_entropy_of_distributions_that_are_known() -> None:
    logits = torch.zeros(3, 100)
    logits[1, 7] = 1e4
    logits[2, 50:] = -1e4
    _, entropy = token_logps(logits, torch.tensor([0, 7, 3]), entropy=True)
    assert torch.allclose(entropy, torch.tensor([100.0, 1.0, 50.0]).log(), atol=1e-5)


def test_entropy_of_bfloat16_logits_loses_only_their_own_precision() -> None:
    torch.manual_seed(1)
    half = (3 * torch.randn(20, 300)).bfloat16()
    logits, targets = half.clone().requires_grad_(), torch.randint(300, (20,))
    exact = half.float().requires_grad_()
    got, wanted = token_logps(logits * 1.0, targets, entropy=True), by_autograd(exact, targets)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    mine = torch.autograd.grad(got[0].sum() - got[1].sum(), logits)[0]
    right = torch.autograd.grad(wanted[0].sum() - wanted[1].sum(), exact)[0]
    assert mine.dtype == torch.bfloat16 and torch.allclose(mine.float(), right, rtol=1e-2, atol=1e-5)


def test_entropy_is_exact_under_autocast() -> None:
    """Where a GPU trains in bfloat16: torch would compute a product of vectors in it."""
    torch.manual_seed(2)
    logits, targets = 3 * torch.randn(20, 300), torch.randint(300, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logps(logits, targets, entropy=True)
    for one, other in zip(got, by_autograd(logits, targets), strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, other, atol=1e-5)


# ------------------------------------------------------------------------------------------------ policy and value model

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 1,
    "attn_implementation": "sdpa",
}  # fmt: skip


def tiny(family: Any, seed: int) -> Any:
    from transformers import LlamaConfig

    torch.manual_seed(seed)
    return family(LlamaConfig(**SMALL))


@pytest.fixture
def models() -> tuple[Any, Any]:
    """Policy and value model, with weights of their own."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    return tiny(LlamaForCausalLM, 0), tiny(LlamaForSequenceClassification, 1)


def rows() -> list[dict[str, Any]]:
    """Prompts and answers of many lengths, one token among them, and a placeholder."""
    rng = np.random.default_rng(0)
    sizes = [(4, 6), (1, 1), (9, 2), (3, 12), (1, 5), (7, 1)]
    made: list[dict[str, Any]] = [
        {"prompt_ids": rng.integers(1, 60, p).tolist(), "completion_ids": rng.integers(1, 60, a).tolist()}
        for p, a in sizes
    ]
    return [*made[:3], {"prompt_ids": [0], "completion_ids": [0], "placeholder": True}, *made[3:]]


def each_alone(policy: Any, value: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every row by itself, without padding, each token by the index that it has in the sequence."""
    logps, entropies, values = [], [], []
    for row in rows():
        ids = row["prompt_ids"] + row["completion_ids"]
        logits = policy(torch.tensor([ids])).logits[0] / temperature
        states = value.score(value.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
        for place in range(len(row["prompt_ids"]), len(ids)):
            p = logits[place - 1].softmax(-1)
            logps.append(p[ids[place]].log())
            entropies.append(-(p * p.log()).sum())
            values.append(states[place - 1])  # V(s_t): what stands before token t has been read, and no more
    return torch.stack(logps), torch.stack(entropies), torch.stack(values)


def gradient_of(model: Any) -> Tensor:
    """Of all parameters, end to end."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("layout", "multiple"), [("shared", None), ("shared", 16), ("flat", None), ("padded", None), ("padded", 8)]
)
def test_policy_and_value_say_of_a_batch_what_they_say_of_each_row_alone(
    models: tuple[Any, Any], temperature: float, layout: Any, multiple: int | None
) -> None:
    policy, value = models
    alone = each_alone(policy, value, temperature)
    upstream = [torch.randn(len(x), generator=torch.Generator().manual_seed(i)) for i, x in enumerate(alone)]
    sum((x * u).sum() for x, u in zip(alone, upstream, strict=True)).backward()  # type: ignore[union-attr]
    wanted = [gradient_of(policy), gradient_of(value)]
    if layout != "padded":
        assert documents.use(policy) and documents.use(value)
    module = ActorCritic(policy, value, temperature)
    batch = rollout_collator(answer_collator(0, ("completion_ids",), layout=layout, token_share=True, pad_to_multiple_of=multiple))(rows())  # fmt: skip
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}

    def acted(**more: Any) -> Acted:
        return Acted(*module(inputs, batch["answer_at"], batch["answer_ids"], **more))

    got = acted(entropy=True)
    for one, other in zip(got, alone, strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, other, atol=1e-5)
    module.zero_grad()
    sum((x * u).sum() for x, u in zip(got, upstream, strict=True)).backward()  # type: ignore[union-attr]
    for model, right in zip((policy, value), wanted, strict=True):
        assert float((gradient_of(model) - right).norm() / right.norm()) < 1e-5
    with torch.no_grad():
        plain = acted()
        reference = acted(value=False)
    assert torch.allclose(plain.logps, got.logps, atol=1e-6) and torch.equal(reference.logps, plain.logps)
    assert plain.entropy.shape == reference.entropy.shape == reference.values.shape == (0,)
    assert torch.allclose(plain.values, got.values, atol=1e-6)


def test_a_value_is_its_models_score_less_what_it_is_shifted_by(models: tuple[Any, Any]) -> None:
    batch = rollout_collator(answer_collator(0, ("completion_ids",), layout="padded", token_share=True))(rows())
    given = ({"input_ids": batch["input_ids"]}, batch["answer_at"], batch["answer_ids"])
    with torch.no_grad():
        plain, shifted = (Acted(*ActorCritic(*models, 1.0, shift)(*given)) for shift in (0.0, 2.5))
    assert torch.allclose(shifted.values, plain.values - 2.5) and torch.equal(shifted.logps, plain.logps)


def test_the_policy_that_is_trained_is_the_one_that_answered_whatever_drops_out() -> None:
    """In layers, in attention and in an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    small = {"vocab_size": 60, "pad_token_id": 0, "num_labels": 1}
    half = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **(SMALL | {"attention_dropout": 0.5, "attn_implementation": "sdpa"}))
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    value = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", **small, **half))
    module = ActorCritic(get_peft_model(policy, adapter), value, 1.0)
    batch = rollout_collator(answer_collator(0, ("completion_ids",), layout="padded", token_share=True))(rows())
    given = ({"input_ids": batch["input_ids"]}, batch["answer_at"], batch["answer_ids"])
    with torch.no_grad():
        answered, trained = (Acted(*module.train(mode)(*given)) for mode in (False, True))
    assert torch.equal(answered.logps, trained.logps) and torch.equal(answered.values, trained.values)


# ------------------------------------------------------------------------------------------------ how they are loaded


def test_a_value_model_begins_by_foreseeing_the_reward_that_its_own_scores_give() -> None:
    from stages.base import Artifact
    from stages.rewards import Scorer
    from stages.rl.ppo import value_scale

    terms = [Scorer("exact", 2.0, function="m:exact"), Scorer("reward", -0.5, model="folder", mean=3.0, std=4.0)]
    a, b = value_scale(Artifact("reward", "reward model", "folder"), terms)
    for score in (-1.0, 0.0, 7.0):
        assert a * score - b == pytest.approx(-0.5 * (score - 3.0) / 4.0)
    assert value_scale(Artifact("base", "model", "another"), terms) == (1.0, 0.0)


def test_a_policy_whose_value_model_attends_in_another_way_can_be_called_with_padded_batches(
    models: tuple[Any, Any],
) -> None:
    policy, value = models
    wanted = each_alone(policy, value, 1.0)
    assert documents.use(policy)
    documents.leave(policy)
    batch = rollout_collator(answer_collator(0, ("completion_ids",), layout="padded", token_share=True))(rows())
    with torch.no_grad():
        got = Acted(
            *ActorCritic(policy, value, 1.0)({"input_ids": batch["input_ids"]}, batch["answer_at"], batch["answer_ids"])
        )
    assert torch.allclose(got.logps, wanted[0], atol=1e-5) and torch.allclose(got.values, wanted[2], atol=1e-5)


def test_what_is_trained_beside_a_frozen_model_in_half_precision_is_in_float32(
    models: tuple[Any, Any], tmp_path: Path
) -> None:
    """An update smaller than 1/256 of a weight would be lost: of a score head too, which peft leaves in half precision."""
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    from stages.rl.ppo import _loaded
    from stages.training.tuning import train_in_float32

    models[1].save_pretrained(tmp_path)
    kernels = SimpleNamespace(load_options=lambda: {"dtype": "bfloat16"})
    parts: Any = SimpleNamespace(kernels=kernels, quantization=dict, job=SimpleNamespace(quantization=None))
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    args = SimpleNamespace(gradient_checkpointing=False)
    value = _loaded(parts, AutoModelForSequenceClassification, str(tmp_path), adapter, args, num_labels=1)
    train_in_float32(value)  # as every trainer's model is (stages/training/trainer.py)
    kinds = {name: p.dtype for name, p in value.named_parameters() if p.requires_grad}
    assert any(".score." in name for name in kinds) and set(kinds.values()) == {torch.float32}
    assert {p.dtype for p in value.parameters() if not p.requires_grad} == {torch.bfloat16}
