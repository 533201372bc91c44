"""Stops a training that has gone wrong, and keeps the batch it went wrong on."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

from stages.errors import StageError

WINDOW = 10  # steps whose losses are averaged
TIMES = 2.0


class Guard:
    """Watches the loss and the gradient of every step.

    A value that is not a number stops the run at once. The loss has exploded where its mean over ten steps is above twice
    that of the first ten, and above `hopeless`: a loss that no data explains. Of a language model that is ln(vocabulary), what
    guessing gives; rows that become harder, or an easy first batch, are not an explosion.

    Raises:
        StageError: the batch is in `bad_batch.jsonl`, as rows of `input_ids` and `labels`, which `raylign inspect` reads.
    """

    def __init__(self, work: Path, hopeless: float) -> None:
        self.file, self.hopeless = work / "bad_batch.jsonl", hopeless
        self.start: float | None = None  # mean loss of the first steps, once they are made
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def micro_batch(self, loss: float, step: int, inputs: dict[str, Any]) -> None:
        if not math.isfinite(loss):
            self._stop(f"the loss of step {step} is {loss}", inputs)

    def gradient(self, norm: float, step: int, inputs: dict[str, Any]) -> None:
        if not math.isfinite(norm):
            self._stop(f"the gradient of step {step} is {norm}, its loss is still a number", inputs)

    def step(self, loss: float, step: int, inputs: dict[str, Any]) -> None:
        """`loss`: of a whole step, after all its micro-batches."""
        self.recent.append(abs(loss))
        if len(self.recent) < WINDOW:
            return
        now = sum(self.recent) / WINDOW
        if self.start is None:
            self.start = now
        if now > max(TIMES * self.start, self.hopeless):
            self._stop(
                f"the loss has exploded: {now:.4g} over the {WINDOW} steps to {step}, {self.start:.4g} at the start",
                inputs,
            )

    def _stop(self, what: str, inputs: dict[str, Any]) -> None:
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(inputs)))
        raise StageError(
            f"{what}\n  the batch is in {self.file}: look at it with\n"
            f"  raylign inspect SPEC --set 'stages.NAME.data=[{{path: {self.file}}}]'\n"
            "  often the cure is a lower learning_rate, warmup_steps, or max_grad_norm"
        )


def rows_of(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """A collated batch as rows of tokens, padding left out; of pairs each answer is a row with its prompt."""
    ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
    if labels is None:
        completion = inputs.get("completion_mask", mask)
        labels = ids if completion is None else ids.masked_fill(completion == 0, -100)
    rows = []
    for i in range(len(ids)):
        kept = slice(None) if mask is None else mask[i].bool()
        rows.append({"input_ids": ids[i][kept].tolist(), "labels": labels[i][kept].tolist()})
    return rows
