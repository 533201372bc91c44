"""Stops a training that has gone wrong, and keeps the batch it went wrong on."""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.errors import StageError

WINDOW = 10  # steps whose losses are averaged
TIMES = 2.0


class Guard:
    """Watches the loss and the gradient of every step.

    A value that is not a number stops the run at once. The loss has exploded where its mean over ten steps is above twice
    the first step's, and above `hopeless`: a loss that no data explains. Of a language model that is ln(vocabulary), what
    guessing gives; rows that become harder, or an easy first batch, are not an explosion.

    All workers see the same numbers, and stop together.

    Raises:
        StageError: the rows of the step are in `bad_batch.jsonl`, of several workers in `bad_batch-RANK.jsonl`: of those
            whose loss is no number, or else of all.
    """

    def __init__(self, work: Path, hopeless: float, rank: int = 0, workers: int = 1) -> None:
        self.work, self.hopeless, self.rank, self.workers = work, hopeless, rank, workers
        self.start: float | None = None  # loss of the first step
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def file(self, rank: int) -> Path:
        return self.work / (f"bad_batch-{rank}.jsonl" if self.workers > 1 else "bad_batch.jsonl")

    def step(self, losses: list[float], step: int, inputs: list[dict[str, Any]]) -> None:
        """`losses`: of each worker, over its micro-batches; `inputs`: this worker's micro-batches."""
        guilty = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if guilty:
            self._stop(f"the loss of step {step} is {losses[guilty[0]]}", guilty, inputs)
        loss = abs(sum(losses) / len(losses))
        self.recent.append(loss)
        self.start = loss if self.start is None else self.start
        now = sum(self.recent) / len(self.recent)
        if len(self.recent) == WINDOW and now > max(TIMES * self.start, self.hopeless):
            what = f"the loss has exploded: {now:.4g} over the {WINDOW} steps to {step}, {self.start:.4g} at the start"
            self._stop(what, range(self.workers), inputs)

    def gradient(self, norm: float, step: int, inputs: list[dict[str, Any]]) -> None:
        if not math.isfinite(norm):
            what = f"the gradient of step {step} is {norm}, its loss is still a number"
            self._stop(what, range(self.workers), inputs)

    def _stop(self, what: str, guilty: Sequence[int], inputs: list[dict[str, Any]]) -> None:
        if self.rank in guilty:
            rows = [row for batch in inputs for row in rows_of(batch)]
            self.file(self.rank).write_text("".join(json.dumps(row) + "\n" for row in rows))
        look = ""
        if "labels" in inputs[-1]:  # pairs are not rows of the kind that their stage takes
            look = (
                f": look at it with\n  raylign inspect SPEC --set 'stages.NAME.data=[{{path: {self.file(guilty[0])}}}]'"
            )
        raise StageError(
            f"{what}\n  what was trained in it is in {', '.join(str(self.file(rank)) for rank in guilty)}{look}\n"
            "  often the cure is a lower learning_rate, warmup_steps, or a smaller max_grad_norm"
        )


def rows_of(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """A collated batch as rows of tokens, padding left out: one for each document; of answers one for each line, or for each
    prompt with all that share it, whose `labels` are the answers."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = inputs["labels"] if "labels" in inputs else labels_of(inputs)
    rows = []
    for i in range(len(ids)):
        if "position_ids" in inputs:
            starts = [*inputs["position_ids"][i].eq(0).nonzero().flatten().tolist(), ids.shape[1]]
            parts = [slice(a, b) for a, b in itertools.pairwise(starts) if (labels[i][a:b] != -100).any()]
        else:
            parts = [slice(None) if mask is None else mask[i].bool()]
        rows += [{"input_ids": ids[i][part].tolist(), "labels": labels[i][part].tolist()} for part in parts]
    return rows


def labels_of(inputs: dict[str, Any]) -> Any:
    """Of a batch of answers (answers.py), as of conversations: the tokens of the answers, and -100."""
    ids = inputs["input_ids"].flatten()
    labels = ids.new_full(ids.shape, -100)
    for end, size in zip(inputs["ends"].tolist(), inputs["answer_of"].bincount().tolist(), strict=True):
        labels[end - size + 1 : end + 1] = ids[end - size + 1 : end + 1]
    return labels.view_as(inputs["input_ids"])
