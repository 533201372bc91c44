"""The consumption ledger: which rows each optimiser step trained, and the proof that none was lost or repeated.

`consumed.jsonl` has a line for each step: {"step": 1, "epoch": 0, "from": 0, "to": 16, "workers": 2}. The positions
`from .. to` are those of the order of that epoch (stages/training/feed.py); each worker checks that it was fed exactly its
share of them, so a line stands for the rows of all workers. It is rewound with the metrics where training goes on.

Where several optimiser steps are made of the same rows (`updates`; stages/rl/iterations.py) the last of them has the line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

FILE = "consumed.jsonl"


@dataclass(frozen=True)
class Consumption:
    """What a ledger proves. `problems` is empty where every row of every finished epoch was trained exactly once."""

    steps: int = 0
    epochs: int = 0  # finished
    rows_after: int = 0  # rows of the epoch that was begun after them
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_consumption(lines: Iterable[dict[str, Any]], rows: int, updates: int = 1) -> Consumption:
    """Read a ledger over data of `rows` rows an epoch: steps one after the other, each beginning where the last one ended."""
    epoch = end = steps = 0
    problems: list[str] = []
    for line in lines:
        step, where = line["step"], f"step {line['step']}"
        if step != steps + updates:
            problems.append(f"{where} follows step {steps}")
        if line["epoch"] != epoch:
            if line["epoch"] < epoch:
                problems.append(f"{where}: epoch {line['epoch'] + 1} again after epoch {epoch + 1}")
            elif end < rows or line["epoch"] > epoch + 1:
                problems.append(f"{where}: rows {end} to {rows} of epoch {epoch + 1} were not trained")
            epoch, end = line["epoch"], 0
        if line["from"] > end:
            problems.append(f"{where}: rows {end} to {line['from']} of epoch {epoch + 1} were not trained")
        elif line["from"] < end:
            again = min(end, line["to"])
            problems.append(f"{where}: rows {line['from']} to {again} of epoch {epoch + 1} were trained again")
        if not line["from"] < line["to"] <= rows:
            problems.append(f"{where}: rows {line['from']} to {line['to']} are not rows of {rows}")
        end, steps = max(end, line["to"]), step
    finished = end >= rows
    return Consumption(steps, epoch + finished, 0 if finished else end, problems)
