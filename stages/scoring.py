"""Forward passes over held-out rows: losses, log-probabilities, rewards and samples. Plain transformers models.

Imported only inside a stage's process: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stages.data.chat import IGNORE
from stages.sampling import ended, sample, stop_ids_of
from stages.storage import pull_model
from stages.training.head import TrainedHead
from stages.training.losses import token_logps

Row = dict[str, Any]


def load_for_scoring(model: str, reward: bool = False) -> Any:
    """The model in evaluation mode, on this worker's GPU where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"num_labels": 1} if reward else {}
    return cls.from_pretrained(pull_model(model), trust_remote_code=False, **options).eval().to(device)


def _batches(rows: Sequence[Row], size: int, length: Callable[[Row], int]) -> Iterator[list[int]]:
    """Indices of rows of like length together: less padding, the same sums."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    for at in range(0, len(order), size):
        yield order[at : at + size]


def _pad(
    ids: Sequence[Sequence[int]], value: int, device: Any, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (batch, longest)."""
    longest = max(map(len, ids))
    out = torch.full((len(ids), longest), value, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row in enumerate(ids):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        out[i, at], mask[i, at] = torch.tensor(row), 1
    return out.to(device), mask.to(device)


@torch.no_grad()
def trained_token_loss(model: Any, rows: Sequence[Row], pad_id: int, batch_size: int) -> dict[str, float]:
    """Sums of negative log-likelihood and count over the trained tokens of all rows."""
    nll, tokens = 0.0, 0
    for chosen in _batches(rows, batch_size, lambda row: len(row["input_ids"])):
        batch = [rows[i] for i in chosen]
        ids, mask = _pad([row["input_ids"] for row in batch], pad_id, model.device)
        labels, _ = _pad([row["labels"] for row in batch], IGNORE, model.device)
        trained = labels[:, 1:] != IGNORE
        nll -= float(_logps(model, ids, mask, F.pad(trained, (0, 1)), labels[:, 1:][trained]).sum())
        tokens += int(trained.sum())
    return {"nll": nll, "tokens": tokens}


def _logps(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """log p of the `targets`, float64, (n,): the tokens that follow those where `before` (rows, tokens) is true.

    Only these meet the head, and few of them at a time are in float32 (stages/training/head.py, losses.py).
    """
    head: TrainedHead | None = getattr(model, "_raylign_head", None)
    if head is None:
        head = model._raylign_head = TrainedHead(model)
    logits, _ = head.logits(model, {"input_ids": ids, "attention_mask": mask}, before.flatten().nonzero().squeeze(1))
    return token_logps(logits, targets)[0].double()


def answer_logprobs(model: Any, rows: Sequence[Row], side: str, pad_id: int, batch_size: int) -> np.ndarray:
    """Sum of log p(token | before) over each row's answer `side`, in nats: float64, (rows,)."""

    def score(ids: torch.Tensor, mask: torch.Tensor, batch: Sequence[Row]) -> torch.Tensor:
        starts = torch.tensor([len(row["prompt_ids"]) - 1 for row in batch], device=ids.device)
        answer = (torch.arange(ids.shape[1] - 1, device=ids.device) >= starts[:, None]) & (mask[:, 1:] == 1)
        logps = _logps(model, ids, mask, F.pad(answer, (0, 1)), ids[:, 1:][answer])
        return logps.new_zeros(len(ids)).index_add(0, answer.nonzero()[:, 0], logps)

    return _of_answers(score, model, rows, side, pad_id, batch_size)


def rewards(model: Any, rows: Sequence[Row], side: str, pad_id: int, batch_size: int) -> np.ndarray:
    """The reward model's score of each row's prompt and answer `side`: float64, (rows,)."""

    def score(ids: torch.Tensor, mask: torch.Tensor, batch: Sequence[Row]) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).double()

    return _of_answers(score, model, rows, side, pad_id, batch_size)


@torch.no_grad()
def _of_answers(
    score: Callable[[torch.Tensor, torch.Tensor, Sequence[Row]], torch.Tensor],
    model: Any,
    rows: Sequence[Row],
    side: str,
    pad_id: int,
    batch_size: int,
) -> np.ndarray:
    """`score` of batches of prompts with their answers, in the order of the rows."""
    out = np.empty(len(rows))
    for chosen in _batches(rows, batch_size, lambda row: len(row["prompt_ids"]) + len(row[side])):
        batch = [rows[i] for i in chosen]
        ids, mask = _pad([row["prompt_ids"] + row[side] for row in batch], pad_id, model.device)
        out[chosen] = score(ids, mask, batch).cpu().numpy()
    return out


@torch.no_grad()
def sample_greedily(
    model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int, max_new_tokens: int
) -> tuple[list[Row], dict[str, float]]:
    """Greedy answers, and counts: an answer matches when it stops and its text is the expected one."""
    stops = stop_ids_of(model.generation_config, tokenizer)
    samples, tokens = [], 0
    for chosen in _batches(rows, batch_size, lambda row: len(row["prompt_ids"])):
        batch = [rows[i] for i in chosen]
        ids, mask = _pad([row["prompt_ids"] for row in batch], tokenizer.pad_token_id, model.device, left=True)
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=stops,
        )  # fmt: skip
        for row, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            answer = ended(new, stops)
            tokens += len(answer.ids)
            text = tokenizer.decode(answer.ids[:-1] if answer.stopped else answer.ids, skip_special_tokens=True)
            samples.append(
                {k: row[k] for k in ("prompt", "expected", "source", "row")}
                | {"answer": text, "stopped": answer.stopped}
            )
    samples.sort(key=lambda s: (s["source"], s["row"]))
    judged = [s for s in samples if s["expected"] is not None]
    matched = sum(s["stopped"] and s["answer"].strip() == s["expected"].strip() for s in judged)
    return samples, {
        "sampled": len(samples),
        "stopped": sum(s["stopped"] for s in samples),
        "answer_tokens": tokens,
        "expected": len(judged),
        "matched": matched,
    }


def sample_answers(
    model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int, max_new_tokens: int, *, seed: int, first: int
) -> list[Row]:
    """An answer to each row's prompt, drawn from the model itself (temperature 1): `prompt_ids`, `answer_ids`.

    `first` is the number of the first row among all: a row's number and `seed` decide its answer.
    """
    prompts = [row["prompt_ids"] for row in rows]
    drawn = sample(
        model, prompts, per_prompt=1, max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=seed,
        pad_id=tokenizer.pad_token_id, stop_ids=stop_ids_of(model.generation_config, tokenizer), batch_size=batch_size,
        first=first,
    )  # fmt: skip
    return [{"prompt_ids": p, "answer_ids": answer.ids} for p, (answer,) in zip(prompts, drawn, strict=True)]
