"""Forward passes over held-out rows: losses, log-probabilities, rewards and greedy samples. Plain transformers models.

Imported only inside a stage's process: it needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stages.data.chat import IGNORE

Row = dict[str, Any]


def load_for_scoring(model: str, reward: bool = False) -> Any:
    """The model in evaluation mode, on this worker's GPU where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cls.from_pretrained(model, **({"num_labels": 1} if reward else {})).eval().to(device)


def _batches(rows: Sequence[Row], size: int, length: Any) -> Iterator[list[Row]]:
    """Rows of like length together: less padding, the same sums."""
    ordered = sorted(rows, key=length)
    for at in range(0, len(ordered), size):
        yield ordered[at : at + size]


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
    for batch in _batches(rows, batch_size, lambda row: len(row["input_ids"])):
        ids, mask = _pad([row["input_ids"] for row in batch], pad_id, model.device)
        labels, _ = _pad([row["labels"] for row in batch], IGNORE, model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        nll += F.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        tokens += int((labels[:, 1:] != IGNORE).sum())
    return {"nll": nll, "tokens": tokens}


@torch.no_grad()
def answer_logprobs(model: Any, rows: Sequence[Row], side: str, pad_id: int) -> torch.Tensor:
    """Sum of log p(token | before) over each row's answer `side`: (rows,)."""
    ids, mask = _pad([row["prompt_ids"] + row[side] for row in rows], pad_id, model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logps = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
    starts = torch.tensor([len(row["prompt_ids"]) - 1 for row in rows], device=ids.device)
    answer = (torch.arange(logps.shape[1], device=ids.device) >= starts[:, None]) & (mask[:, 1:] == 1)
    return (logps * answer).sum(1)


@torch.no_grad()
def rewards(model: Any, rows: Sequence[Row], side: str, pad_id: int) -> torch.Tensor:
    """The reward model's score of each row's prompt and answer: (rows,)."""
    ids, mask = _pad([row["prompt_ids"] + row[side] for row in rows], pad_id, model.device)
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()


def preference_metrics(
    model: Any, reference: Any | None, rows: Sequence[Row], pad_id: int, batch_size: int
) -> dict[str, float]:
    """Sums over pairs: how many are ranked right, and the margin chosen - rejected (log-probabilities, or rewards)."""
    right, margin = 0.0, 0.0
    for batch in _batches(rows, batch_size, lambda row: len(row["prompt_ids"]) + len(row["chosen_ids"])):
        if getattr(model.config, "num_labels", 2) == 1 and hasattr(model, "score"):
            difference = rewards(model, batch, "chosen_ids", pad_id) - rewards(model, batch, "rejected_ids", pad_id)
        else:
            difference = _logprob_margin(model, batch, pad_id)
            if reference is not None:
                difference = difference - _logprob_margin(reference, batch, pad_id)
        right += float((difference > 0).sum())
        margin += float(difference.sum())
    return {"right": right, "margin": margin, "pairs": len(rows)}


def _logprob_margin(model: Any, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    return answer_logprobs(model, rows, "chosen_ids", pad_id) - answer_logprobs(model, rows, "rejected_ids", pad_id)


@torch.no_grad()
def sample_greedily(
    model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int, max_new_tokens: int
) -> tuple[list[Row], dict[str, float]]:
    """Greedy answers, and counts: an answer matches when it stops and its text is the expected one."""
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    samples = []
    for batch in _batches(rows, batch_size, lambda row: len(row["prompt_ids"])):
        ids, mask = _pad([row["prompt_ids"] for row in batch], tokenizer.pad_token_id, model.device, left=True)
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for row, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in stops), None)
            answer = tokenizer.decode(new[:end] if end is not None else new, skip_special_tokens=True)
            samples.append(
                {k: row[k] for k in ("prompt", "expected", "source", "row")}
                | {"answer": answer, "stopped": end is not None}
            )
    samples.sort(key=lambda s: (s["source"], s["row"]))
    judged = [s for s in samples if s["expected"] is not None]
    matched = sum(s["stopped"] and s["answer"].strip() == s["expected"].strip() for s in judged)
    return samples, {
        "sampled": len(samples),
        "stopped": sum(s["stopped"] for s in samples),
        "expected": len(judged),
        "matched": matched,
    }
