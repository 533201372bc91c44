"""The ledger: every row that was read and did not reach training, with the reason, the file and the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

EXAMPLES = 5  # rows shown per reason


@dataclass(frozen=True)
class LedgerEntry:
    source: str  # the file
    row: int  # 1-based
    reason: str  # short and stable, see docs of the functions that reject
    detail: str


def write_entries(path: Path, entries: Iterable[LedgerEntry]) -> None:
    path.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries))


def read_entries(folder: Path) -> Iterator[LedgerEntry]:
    """All entries of a prepared dataset, in the order of its input."""
    for path in sorted(folder.glob("ledger-*.jsonl")):
        for line in path.open():
            yield LedgerEntry(**json.loads(line))


def summary(read: int, kept: int, entries: Iterable[LedgerEntry]) -> dict[str, object]:
    """`ledger.json`: counts by reason that add up (read = kept + all reasons), and a few examples of each."""
    counts: Counter[str] = Counter()
    examples: list[LedgerEntry] = []
    for entry in entries:
        counts[entry.reason] += 1
        if counts[entry.reason] <= EXAMPLES:
            examples.append(entry)
    if read != kept + sum(counts.values()):
        raise AssertionError(f"the ledger does not balance: read {read}, kept {kept}, ledger {sum(counts.values())}")
    return {
        "read": read,
        "kept": kept,
        "reasons": dict(counts.most_common()),
        "examples": [asdict(entry) for entry in examples],
    }
