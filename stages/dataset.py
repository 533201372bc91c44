"""The dataset that answers and their rewards make: its rows as files, the ledger, and what is counted on the way."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.answering import Chunk
from stages.base import StageResult
from stages.data.ledger import LedgerEntry, read_entries, summary, write_entries
from stages.data.prepare import Prepared
from stages.data.spans import Refused
from stages.errors import StageError
from stages.rewards import Scorer
from stages.selection import Answer, Choice, Make, choose, rows, unusable
from stages.storage import pull

ROWS_IN_FILE = 50_000
SHOWN = 8  # prompts kept for the report, with all their answers


@dataclass
class _Spread:
    """Mean and standard deviation of numbers that come one after another."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def std(self) -> float | None:
        return max(0.0, self.squares / self.count - (self.total / self.count) ** 2) ** 0.5 if self.count else None


class _Writer:
    """Rows to `part-*.jsonl`."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was interrupted
        folder.mkdir()
        self.folder, self.rows = folder, 0

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            with (self.folder / f"part-{self.rows // ROWS_IN_FILE:05}.jsonl").open("a") as part:
                part.writelines(json.dumps(row) + "\n" for row in rows)
            self.rows += len(rows)


@dataclass
class Dataset:
    """The rows as they are written to `folder`, and what is counted on the way. `margin`, `threshold`: see `choose`."""

    folder: Path
    terms: list[Scorer]
    make: Make
    margin: float
    threshold: float | None
    prompts: int = 0
    samples: int = 0
    stopped: int = 0
    tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # answers, by reason
    reward: _Spread = field(default_factory=_Spread)
    shown: list[dict[str, Any]] = field(default_factory=list)
    entries: list[LedgerEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = _Writer(self.folder)
        self.each = [_Spread() for _ in self.terms]
        self.used: dict[str, _Spread] = {}  # use of an answer -> its tokens
        self.apart = _Spread()  # the margins of pairs

    def add(self, chunk: Chunk, sampled: list[Any], scored: list[Any]) -> None:
        for prompt, answers, scores in zip(chunk.prompts(), sampled, scored, strict=True):
            self._prompt(prompt, [self._answer(a, s) for a, s in zip(answers, scores, strict=True)])

    def _answer(self, answer: dict[str, Any], scores: list[float] | None) -> Answer:
        self.samples += 1
        self.stopped += answer["stopped"]
        self.tokens += len(answer["ids"])
        made = Answer(answer["text"], len(answer["ids"]), answer["stopped"])
        if scores is None:
            self.left_out[str(unusable(made.text, made.stopped))] += 1
            return made
        for spread, score in zip(self.each, scores, strict=True):
            spread.add(score)
        reward = sum(term.weight * score for term, score in zip(self.terms, scores, strict=True))
        self.reward.add(reward)
        return replace(made, reward=reward)

    def _prompt(self, prompt: dict[str, Any], answers: list[Answer]) -> None:
        self.prompts += 1
        choice = choose(self.make, answers, self.margin, self.threshold)
        if len(self.shown) < SHOWN:
            self.shown.append(_shown(prompt, answers, choice))
        if isinstance(choice, Refused):
            self.entries.append(LedgerEntry(prompt["source"], prompt["row"], choice.reason, choice.detail))
            return
        tools = json.loads(prompt["tools"]) if prompt["tools"] else None
        made = rows(self.make, json.loads(prompt["messages"]), tools, answers, choice)
        self.writer.add(made)
        for i, use in choice.uses.items():
            self.used.setdefault(use, _Spread()).add(answers[i].tokens)
        if self.make == "pairs":
            self.apart.add(made[0]["margin"])

    def result(self, data: Prepared, work: Path, speed: dict[str, Any]) -> StageResult:
        """The ledger written, and what goes into the manifest.

        Raises:
            StageError: not one prompt gave a row.
        """
        entries = [*read_entries(data.path), *self.entries, *_beyond(data, self.prompts)]
        ledger = summary(data.manifest["ledger"]["read"], self.prompts - len(self.entries), entries)
        (work / "ledger.json").write_text(json.dumps(ledger, indent=1))
        write_entries(work / "ledger.jsonl", entries)
        if not self.writer.rows:
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(e.reason for e in self.entries).most_common())
            raise StageError(
                f"none of {self.prompts} prompts gave a row: {reasons}; {work / 'ledger.jsonl'} has them all"
            )
        metrics = {
            "prompts": self.prompts,
            "samples": self.samples,
            "rows": self.writer.rows,
            "reward_mean": self.reward.mean,
            "reward_std": self.reward.std,
            "stopped": self.stopped / self.samples,
            "answer_tokens": self.tokens / self.samples,
            **({"margin": self.apart.mean} if self.apart.count else {}),
            **{f"{use}_tokens": spread.mean for use, spread in self.used.items()},
            **speed,
        }
        details = {
            "ledger": ledger,
            "answers_left_out": dict(self.left_out),
            "uses": {use: spread.count for use, spread in self.used.items()},
            "rewards": [
                {"name": term.name, "weight": term.weight, "mean": spread.mean, "std": spread.std}
                for term, spread in zip(self.terms, self.each, strict=True)
            ],
            "samples": self.shown,
        }
        return StageResult(metrics, rows=self.writer.rows, tokens=self.tokens, details=details)


def _shown(prompt: dict[str, Any], answers: Sequence[Answer], choice: Choice | Refused) -> dict[str, Any]:
    uses = {} if isinstance(choice, Refused) else choice.uses
    return {
        "prompt": prompt["prompt"],
        "expected": prompt["expected"],
        "reason": choice.reason if isinstance(choice, Refused) else None,
        "answers": [
            {"text": a.text, "reward": a.reward, "tokens": a.tokens, "stopped": a.stopped, "use": uses.get(i)}
            for i, a in enumerate(answers)
        ],
    }


def _beyond(data: Prepared, asked: int) -> Iterator[LedgerEntry]:
    """The rows beyond `max_prompts`."""
    for shard in data.manifest["shards"]:
        if asked < shard["rows"]:
            rows = pq.read_table(pull(data.path / shard["file"]), columns=["source", "row"]).slice(asked).to_pylist()
            yield from (LedgerEntry(r["source"], r["row"], "max_prompts", "beyond the first asked for") for r in rows)
        asked = max(0, asked - shard["rows"])
