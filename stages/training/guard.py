"""Stops a training that has gone wrong, and keeps the batch it went wrong on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stages.errors import StageError

PATIENCE = 5  # steps in a row
TIMES = 2.0  # the loss of the first step


class Guard:
    """Watches the loss and the gradient of every step.

    A value that is not a number stops the run at once. A loss that stays above twice that of the first step for five steps
    has exploded: the model has unlearned more than it knew when training began.

    Raises:
        StageError: the batch is in `bad_batch.jsonl`, as rows of `input_ids` and `labels`, which `raylign inspect` reads.
    """

    def __init__(self, work: Path) -> None:
        self.file = work / "bad_batch.jsonl"
        self.first: float | None = None
        self.above = 0

    def micro_batch(self, loss: float, step: int, inputs: dict[str, Any]) -> None:
        if not math.isfinite(loss):
            self._stop(f"the loss of step {step} is {loss}", inputs)

    def gradient(self, norm: float, step: int, inputs: dict[str, Any]) -> None:
        if not math.isfinite(norm):
            self._stop(f"the gradient of step {step} is {norm}, its loss is still a number", inputs)

    def step(self, loss: float, step: int, inputs: dict[str, Any]) -> None:
        """`loss`: of a whole step, after all its micro-batches."""
        if self.first is None:
            self.first = abs(loss)
            return
        self.above = self.above + 1 if abs(loss) > TIMES * max(self.first, 1e-3) else 0
        if self.above >= PATIENCE:
            what = f"the loss has exploded: {loss:.4g} at step {step}, more than twice the {self.first:.4g} of the first step"
            self._stop(f"{what}, for {PATIENCE} steps", inputs)

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
