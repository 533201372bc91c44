"""The loss of SFT: each formula against an independent computation, and the same however a step is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.data.chat import IGNORE
from stages.training.collate import conversation_collator
from stages.training.head import TrainedHead
from stages.training.losses import cross_entropy, loss_weights

from .test_collate import documents, packed

Rows = list[dict[str, Any]]


def formula(model: Any, rows: Rows, normalization: str, smoothing: float) -> float:
    """The docstring of losses.py, word by word, one example at a time, in float64."""
    above, below = 0.0, 0.0
    for row in rows:
        log_p = F.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double(), -1)
        weights = row["weights"] or [1.0] * len(row["labels"])
        terms = [
            (w, (1 - smoothing) * -log_p[t - 1, label] + smoothing * -log_p[t - 1].mean())
            for t, (label, w) in enumerate(zip(row["labels"], weights, strict=True))
            if label != IGNORE and t > 0
        ]
        total, size = float(sum(w * loss for w, loss in terms)), sum(w for w, _ in terms)
        if normalization == "token":
            above, below = above + total, below + size
        elif size > 0:
            above, below = above + total / size, below + 1
    return above / below


def step(
    model: Any, micro_batches: list[Rows], normalization: str, smoothing: float = 0.0, layout: str = "right"
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one optimiser step, as the trainer computes it."""
    model.zero_grad()
    head = TrainedHead(model)
    collate = conversation_collator(0, weighted=True, normalization=normalization, flat=layout == "flat")  # type: ignore[arg-type]
    batches = [collate(rows) for rows in micro_batches]
    share, loss = sum(batch["loss_share"] for batch in batches), 0.0
    for batch in batches:
        if layout == "left":
            batch = padded_left(batch)
        weights, trained = batch["loss_weights"][:, 1:], batch["loss_weights"][:, 1:] > 0
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        index = F.pad(trained, (0, 1)).flatten().nonzero().squeeze(1)
        logits, _ = head.logits(model, inputs, index)
        assert logits.shape[0] == trained.sum()
        part, _, _ = cross_entropy(logits, batch["labels"][:, 1:][trained], weights[trained], label_smoothing=smoothing)
        (part / share).backward()
        loss += float(part.detach()) / share
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    out, sizes = dict(batch), batch["attention_mask"].sum(1)
    for name in ("input_ids", "labels", "loss_weights", "attention_mask"):
        out[name] = torch.stack([row.roll(-int(n)) for row, n in zip(batch[name], sizes, strict=True)])
    out["position_ids"] = (out["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return out


@pytest.fixture(scope="module")
def llm(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_is_its_formula_however_it_is_cut(
    llm: Any, normalization: str, smoothing: float, weighted: bool
) -> None:
    rows = documents(17, weighted)
    with torch.no_grad():
        expected = formula(llm, rows, normalization, smoothing)
    loss, gradient = step(llm, [rows], normalization, smoothing)
    assert loss == pytest.approx(expected, rel=1e-5)
    ways = {
        "micro-batches": [rows[:3], rows[3:11], rows[11:]],
        "one by one": [[row] for row in rows],
        "another order": [rows[::-1]],
        "packed": [packed(rows, 96)],
        "packed, in micro-batches": [[pack] for pack in packed(rows, 64)],
    }
    for name, micro_batches in ways.items():
        other, same = step(llm, micro_batches, normalization, smoothing)
        assert other == pytest.approx(loss, rel=1e-5), name
        assert float((same - gradient).norm() / gradient.norm()) < 1e-5, name
    for layout, batches in (("left", [rows]), ("flat", [rows]), ("flat", [packed(rows, 96)[:3], packed(rows, 96)[3:]])):
        other, same = step(llm, batches, normalization, smoothing, layout)
        assert other == pytest.approx(loss, rel=1e-5), layout
        assert float((same - gradient).norm() / gradient.norm()) < 1e-5, layout


@pytest.mark.parametrize(("smoothing", "dft"), [(0.0, False), (0.2, False), (0.0, True)])
def test_the_gradient_is_that_of_the_formula(smoothing: float, dft: bool) -> None:
    """Against torch's own cross_entropy and autograd, over several blocks, with an upstream gradient."""
    torch.manual_seed(0)
    logits = torch.randn(57, 131, requires_grad=True)
    targets, weights = torch.randint(131, (57,)), torch.rand(57)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.training.losses.BLOCK", 131 * 10)
        got, nll, right = cross_entropy(logits * 1.0, targets, weights, label_smoothing=smoothing, dft=dft)
        (3 * got).backward()
    mine, logits.grad = logits.grad, None
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if dft:
        each = each * (-each).exp().detach()
    (3 * (weights * each).sum()).backward()
    assert got.item() == pytest.approx(float((weights * each).sum().detach()), rel=1e-5)
    assert torch.allclose(mine, logits.grad, atol=1e-6)
    assert float(nll) == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")), rel=1e-5)
    assert int(right) == int((logits.argmax(-1) == targets).sum())


def test_logits_that_autograd_still_needs_are_not_written_over_in_silence() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    kept = torch.exp(logits)  # exp saves its own result for its gradient
    loss, _, _ = cross_entropy(kept, torch.zeros(4, dtype=torch.long), torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bfloat16_logits_lose_only_their_own_precision() -> None:
    logits, targets = torch.randn(8, 50), torch.randint(50, (8,))
    exact = F.cross_entropy(logits.bfloat16().float(), targets, reduction="sum")
    got, _, _ = cross_entropy(logits.bfloat16(), targets, torch.ones(8))
    assert float(got) == pytest.approx(float(exact), rel=1e-5)


def test_a_batch_with_nothing_to_train_is_zero_with_a_zero_gradient(llm: Any) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [IGNORE] * 3, "weights": None}
    rows = [row, {"input_ids": [5, 6, 8], "labels": [IGNORE, 6, 8], "weights": None}]
    _, gradient = step(llm, [rows[1:]], "sequence")
    _, same = step(llm, [rows[:1], rows[1:]], "sequence")
    assert torch.allclose(gradient, same)
    llm.zero_grad()
    weights, share = loss_weights(torch.tensor([row["labels"]]), None, None, "sequence")
    assert share == 0 and not weights.any()


def test_soft_caps_and_scales_of_the_model_are_kept() -> None:
    """What a model does to its logits is its own business: Gemma caps them, Cohere and Granite scale them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for more in (
        {"model_type": "gemma2", "final_logit_softcapping": 2.0}, {"model_type": "cohere", "logit_scale": 0.25},
        {"model_type": "granite", "logits_scaling": 4.0}, {"model_type": "gpt2", "n_positions": 64},
    ):  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(small | more))).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        ids, mask = torch.randint(3, 64, (3, 9)), torch.rand(3, 9) < 0.5
        whole = model(input_ids=ids).logits
        picked, _ = TrainedHead(model).logits(model, {"input_ids": ids}, mask.flatten().nonzero().squeeze(1))
        assert torch.allclose(picked, whole[mask], atol=1e-5), more
        assert torch.allclose(model(input_ids=ids).logits, whole, atol=1e-6)  # and generation is as it was


@given(st.data())
def test_weights_of_a_step_sum_to_what_they_are_divided_by(data: Any) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    draw = lambda values: torch.tensor([[data.draw(values) for _ in range(shape[1])] for _ in range(shape[0])])  # noqa: E731
    labels = draw(st.sampled_from([IGNORE, 3, 4]))
    weights = draw(st.sampled_from([0.0, 0.3, 1.0, 2.5]))
    starts = draw(st.booleans()).long()
    starts[:, 0] = 1
    for normalization, use in itertools.product(("token", "sequence"), (None, weights)):
        for documents_of in (None, starts.cumsum(1) - 1):
            c, share = loss_weights(labels, use, documents_of, normalization)  # type: ignore[arg-type]
            assert float(c.sum()) == pytest.approx(share, rel=1e-5, abs=1e-6)
            assert not c[labels == IGNORE].any() and not c[:, 0].any()
