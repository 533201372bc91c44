"""Answers laid out in three ways have the same log-probabilities and gradients, and those that TRL's trainers give them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from stages.training import documents
from stages.training.answers import Layout, answer_collator, model_inputs, score_answers
from stages.training.fed import Fed
from stages.training.head import TrainedHead
from stages.training.job import TrainJob
from stages.training.losses import token_logps
from stages.training.preference import LOSS_TYPES, PairLoss, kto_loss, pair_loss
from stages.training.reference import References, ReferenceWorker, answers_to_others, weights_hash

SIDES = ("chosen_ids", "rejected_ids")


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3, 250) for _ in range(n)]  # noqa: E731
    return [
        {
            "prompt_ids": ids(rng.randint(1, 12)),
            "chosen_ids": ids(rng.randint(1, 9)),
            "rejected_ids": ids(rng.randint(1, 9)),
        }
        for _ in range(count)
    ]


def loaded(model: str, layout: Layout) -> Any:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").train()
    if layout == "shared" or layout == "flat":
        assert documents.use(policy)
    return policy


def by_hand(policy: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    ids = torch.tensor([row["prompt_ids"] + row[side]])
    logps = torch.log_softmax(policy(input_ids=ids).logits[0, :-1].double(), -1)
    return logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(row["prompt_ids"]) - 1 :]


@pytest.mark.parametrize("layout", ["shared", "flat", "padded"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_log_probabilities_are_those_of_each_answer_alone(model: str, layout: Layout, multiple: int | None) -> None:
    rows = pairs(5)
    plain = loaded(model, "padded")
    wanted = [[by_hand(plain, row, side) for row in rows] for side in SIDES]
    sum(((i + 1) * each.sum() for i, each in enumerate(wanted[0] + wanted[1])), torch.tensor(0.0)).backward()
    policy = loaded(model, layout)
    batch = answer_collator(0, SIDES, layout=layout, pad_to_multiple_of=multiple)(rows)
    found = score_answers(TrainedHead(policy), policy, batch, sides=2)
    expected = torch.tensor([[float(each.sum()) for each in side] for side in wanted])
    assert torch.allclose(found.logps, expected, atol=2e-5)
    assert torch.allclose(found.means, expected / found.lengths, atol=2e-5)
    assert found.lengths.tolist() == [[len(row[side]) for row in rows] for side in SIDES]
    (found.logps.flatten() * torch.arange(1, 11)).sum().backward()
    for (name, ours), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=2e-4), name


def test_a_batch_may_be_cut_anywhere(model: str) -> None:
    rows, policy = pairs(6), loaded(model, "shared")
    head, collate = TrainedHead(policy), answer_collator(0, SIDES, layout="shared")
    whole = score_answers(head, policy, collate(rows), sides=2).logps
    cut = torch.cat(
        [score_answers(head, policy, collate(part), sides=2).logps for part in (rows[:1], rows[1:4], rows[4:])], 1
    )
    assert torch.allclose(whole, cut, atol=1e-5)


def test_placeholders_and_shares_and_columns() -> None:
    rows = [*pairs(2), {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0], "placeholder": True}]
    rows[0] |= {"margin": 0.5, "label": True}
    rows[1] |= {"margin": None, "label": False}
    batch = answer_collator(0, SIDES, layout="padded", extra=("margin", "label"), token_share=True)(rows)
    assert batch["real"].tolist() == [1.0, 1.0, 0.0]
    assert batch["loss_share"] == (2.0, float(len(rows[0]["chosen_ids"]) + len(rows[1]["chosen_ids"])))
    assert batch["extra"]["margin"].tolist() == [0.5, 0.0, 0.0] and batch["extra"]["label"].tolist() == [1.0, 0.0, 0.0]


def test_tokens_beyond_the_shorter_answer_weigh_alpha(model: str) -> None:
    rows, policy = pairs(3), loaded(model, "shared")
    batch = answer_collator(0, SIDES, layout="shared", ld_alpha=0.25)(rows)
    found = score_answers(TrainedHead(policy), policy, batch, sides=2).logps
    plain = loaded(model, "padded")
    for i, row in enumerate(rows):
        shorter = min(len(row[side]) for side in SIDES)
        for s, side in enumerate(SIDES):
            each = by_hand(plain, row, side)
            assert float(found[s, i]) == pytest.approx(
                float(each[:shorter].sum() + 0.25 * each[shorter:].sum()), abs=2e-5
            )


def test_token_log_probabilities_have_the_gradient_of_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.training.losses.BLOCK", 40)  # blocks of 4 tokens, the last one smaller
    torch.manual_seed(0)
    logits, targets, upstream = torch.randn(11, 10), torch.randint(10, (11,)), torch.randn(11)
    plain = logits.clone().requires_grad_()
    expected = torch.log_softmax(plain, -1).gather(1, targets[:, None]).squeeze(1)
    expected.backward(upstream)
    own = logits.clone().requires_grad_()
    logps, squares = token_logps(own * 1.0, targets, squares=True)
    logps.backward(upstream)
    assert torch.allclose(logps, expected, atol=1e-6) and torch.allclose(own.grad, plain.grad, atol=1e-6)
    assert torch.allclose(squares, torch.softmax(logits, -1).square().sum(-1).log(), atol=1e-6)
    with pytest.raises(RuntimeError):
        logps.backward(upstream)


# ------------------------------------------------------------------------------------------------ against TRL


def moved(model: str, folder: Path) -> str:
    """A copy of the model with other weights: a policy that is not its reference any more."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    for p in policy.parameters():
        p.data += 0.02 * torch.randn_like(p)
    policy.save_pretrained(folder)
    return str(folder)


def trl_arguments(tmp_path: Path, config: Any, **more: Any) -> Any:
    return config(
        output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, max_length=None, **more,
    )  # fmt: skip


THEIRS = [name for name in LOSS_TYPES if name not in ("simpo", "orpo", "cpo")]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((name if name != "sft" else ["sigmoid", "sft"], {}) for name in THEIRS),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    ("hinge", {"f_divergence_type": "js_divergence"}),
    ("hinge", {"f_divergence_type": "forward_kl"}),
    ("ipo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    ("sigmoid", {"ld_alpha": 0.4}),
    ("apo_zero", {"use_weighting": True}),
]


@pytest.mark.parametrize(("loss_type", "more"), CASES, ids=lambda x: str(x)[:60])
def test_dpo_losses_are_trls(model: str, tokenizer: Any, tmp_path: Path, loss_type: Any, more: dict[str, Any]) -> None:
    """Loss and gradient of one batch of four pairs. (TRL's `sigmoid` has no label smoothing; ours with 0 is the same.)"""
    import datasets
    from trl import DPOConfig, DPOTrainer

    class Bare(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    smooth = 0.2 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    policy, rows = moved(model, tmp_path / "moved"), pairs(4)
    args = trl_arguments(
        tmp_path, DPOConfig, loss_type=[loss_type] if isinstance(loss_type, str) else loss_type, beta=0.3,
        label_smoothing=smooth, **more,
    )  # fmt: skip
    trainer = Bare(
        model=policy, ref_model=AutoModelForCausalLM.from_pretrained(model), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    theirs.backward()

    ld_alpha = more.get("ld_alpha")
    batch = answer_collator(0, SIDES, layout="shared", ld_alpha=ld_alpha, token_share=True)(rows)
    own, reference = loaded(policy, "shared"), loaded(model, "shared")
    with torch.no_grad():
        before = score_answers(TrainedHead(reference), reference, batch, sides=2).logps
    given = {k: v for k, v in more.items() if k != "ld_alpha"}
    loss = PairLoss.of({"loss_type": loss_type, "beta": 0.3, "label_smoothing": smooth, **given}, 0.5)
    answers = score_answers(TrainedHead(own), own, batch, sides=2, agreement=loss.use_weighting)
    each, tokens = pair_loss(loss, answers.logps, before, answers.lengths, answers.means, answers.agreement)
    ours = each.sum() / batch["loss_share"][0] + tokens.sum() / batch["loss_share"][1]
    ours.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=2e-5, abs=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for name, p in own.named_parameters():
        assert torch.allclose(p.grad, gradients[name].grad, rtol=1e-3, atol=2e-4 * max(1.0, abs(float(ours)))), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_losses_are_trls(model: str, tokenizer: Any, tmp_path: Path, loss_type: str) -> None:
    import datasets
    from trl import KTOConfig, KTOTrainer

    class Bare(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    policy = moved(model, tmp_path / "moved")
    rows = [
        {"prompt_ids": r["prompt_ids"], "completion_ids": r["chosen_ids"], "label": i % 2 == 0}
        for i, r in enumerate(pairs(4))
    ]
    others = answers_to_others(rows, lambda: rows, None)
    assert others == [rows[(i + 1) % 4]["completion_ids"] for i in range(4)]
    rows = [
        row | {"kl_completion_ids": other, "KL_completion_ids": other} for row, other in zip(rows, others, strict=True)
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    args = trl_arguments(tmp_path, KTOConfig, loss_type=loss_type, beta=0.3, **weights)
    trainer = Bare(
        model=policy, ref_model=AutoModelForCausalLM.from_pretrained(model), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))

    own, reference = loaded(policy, "shared"), loaded(model, "shared")
    ratios = {}
    for side in ("completion_ids", "kl_completion_ids"):
        batch = answer_collator(0, (side,), layout="shared")(rows)
        with torch.no_grad():
            before = score_answers(TrainedHead(reference), reference, batch, sides=1).logps[0]
        ratios[side] = score_answers(TrainedHead(own), own, batch, sides=1).logps[0] - before
    kl = ratios["kl_completion_ids"].detach().mean().clamp(min=0)
    wanted = torch.tensor([float(row["label"]) for row in rows])
    ours = kto_loss(ratios["completion_ids"], wanted, kl, beta=0.3, loss_type=loss_type, **weights).mean()
    assert float(ours) == pytest.approx(float(theirs), rel=2e-5)


def test_answers_to_others_are_of_other_prompts() -> None:
    row = lambda prompt, answer: {"prompt_ids": [prompt] * 3, "completion_ids": [answer] * 5}  # noqa: E731
    rows = [row(1, 10), row(1, 11), row(2, 20), row(2, 21)]
    far = [row(2, 22), row(3, 30)]
    assert answers_to_others(rows, lambda: far, None) == [[20] * 5, [21] * 5, [30] * 5, [10] * 5]
    assert answers_to_others(rows, lambda: far, 6)[0] == [20] * 3  # cut: prompt and answer are not longer than 6


def test_numbers_of_a_batch_are_not_rounded_to_what_deepspeed_computes_in() -> None:
    class Given(Fed, transformers.Trainer):
        pass

    trainer = object.__new__(Given)
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device="cpu"), True
    batch = {"input_ids": torch.tensor([1, 2]), "extra": {"ref_logps": torch.tensor([-523.4])}, "rows": 1}
    prepared = trainer._prepare_input(batch)
    assert prepared["extra"]["ref_logps"].dtype == torch.float32
    assert prepared.keys() == batch.keys() and prepared["input_ids"].dtype == torch.int64


def test_the_model_is_given_nothing_but_its_inputs() -> None:
    row = {"prompt_ids": [1, 2], "completion_ids": [3], "kl_completion_ids": [4]}
    answers, others = (answer_collator(0, (side,), layout="padded") for side in ("completion_ids", "kl_completion_ids"))
    assert set(model_inputs(answers([row]) | {"kl": others([row])})) == {"input_ids"}


@pytest.mark.parametrize(
    ("deepspeed", "weights", "autocast"), [(None, "float32", "bfloat16"), ({}, "bfloat16", "None")]
)
def test_the_reference_computes_as_its_policy_will(
    tmp_path: Path, model: str, deepspeed: dict[str, Any] | None, weights: str, autocast: str
) -> None:
    job = TrainJob("preference", model, tmp_path, [], {"bf16": True}, deepspeed=deepspeed)
    worker = ReferenceWorker(job, References(SIDES), 64, gpu=False)
    assert {str(parameter.dtype) for parameter in worker.model.parameters()} == {f"torch.{weights}"}
    assert str(worker.autocast).removeprefix("torch.") == autocast
    exact = ReferenceWorker(TrainJob("preference", model, tmp_path, [], {}), References(SIDES), 64, gpu=False)
    near, far = (torch.tensor(each._logps(pairs(4), each.collate, 2)) for each in (worker, exact))
    assert not torch.equal(near, far) and torch.allclose(near, far, rtol=0.05)


def test_models_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, str]) -> str:
        (tmp_path / name).mkdir()
        for file, content in ({"config.json": "{}"} | files).items():
            (tmp_path / name / file).write_text(content)
        return weights_hash(tmp_path / name)

    assert made("a", {"model.safetensors": "1"}) == made("b", {"model.safetensors": "1", "README.md": "x"})
    assert made("c", {"model.safetensors": "2"}) != made("d", {"model.safetensors": "1"})
    assert made("e", {}) != made("f", {})  # their weights are elsewhere
