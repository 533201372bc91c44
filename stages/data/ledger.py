"""The ledger: every row that was read and did not reach training, with the reason, the file and the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.errors import DataError
from stages.storage import pull

EXAMPLES = 5  # rows shown per reason
WORST = 3  # reasons named when too much is lost
# Reasons that the spec asks for: such rows are in the ledger, but do not count as lost.
ASKED_FOR = ("filtered", "weight", "duplicate", "held_out")
LONG = ("too_long", "prompt_too_long")


@dataclass(frozen=True)
class LedgerEntry:
    source: str  # the file
    row: int  # 1-based
    reason: str  # short and stable, see docs of the functions that reject
    detail: str


def as_line(entry: LedgerEntry) -> str:
    return json.dumps(asdict(entry)) + "\n"


def write_entries(path: Path, entries: Iterable[LedgerEntry]) -> None:
    with path.open("w") as lines:
        lines.writelines(map(as_line, entries))


def read_entries(folder: Path) -> Iterator[LedgerEntry]:
    """All entries of a prepared dataset, in the order of its input."""
    for path in sorted(pull(folder, only="ledger-*").glob("ledger-*.jsonl")):
        with path.open() as lines:
            for line in lines:
                yield LedgerEntry(**json.loads(line))


def summary(read: int, kept: int, entries: Iterable[LedgerEntry]) -> dict[str, Any]:
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


def lost(ledger: dict[str, Any]) -> dict[str, int]:
    """The reasons that nobody asked for, worst first."""
    return {reason: count for reason, count in ledger["reasons"].items() if reason not in ASKED_FOR}


def check_lost(ledger: dict[str, Any], max_dropped: float, *, refuse_long: bool = False) -> None:
    """Stop where more is lost than is allowed.

    Args:
        ledger: a summary.
        max_dropped: the share of rows that may be lost, of those that were to be used.
        refuse_long: not one row may be too long.

    Raises:
        DataError: with the worst reasons, an example of each, and what can be done.
    """
    reasons = lost(ledger)
    total = sum(reasons.values())
    wanted = ledger["kept"] + total + ledger["reasons"].get("held_out", 0)
    if not ledger["kept"]:
        raise DataError(f"none of the {ledger['read']} rows can be used{_worst(ledger, ledger['reasons'])}")
    if refuse_long and (long := {reason: reasons[reason] for reason in LONG if reason in reasons}):
        what = f"{sum(long.values())} of {wanted} rows are longer than `max_length`, and `truncation` is refuse"
        raise DataError(f"{what}{_worst(ledger, long)}\nRaise `max_length`, or set `truncation`.")
    if total > max_dropped * wanted:
        what = f"{total} of {wanted} rows ({total / wanted:.1%}) cannot be trained on; `max_dropped` allows {max_dropped:.1%}"
        raise DataError(f"{what}{_worst(ledger, reasons)}\nMend the data or its options, or raise `max_dropped`.")


def _worst(ledger: dict[str, Any], reasons: dict[str, int]) -> str:
    lines = []
    for reason, count in list(reasons.items())[:WORST]:
        example = next((e for e in ledger["examples"] if e["reason"] == reason), None)
        where = f", for example {example['source']}, row {example['row']}: {example['detail']}" if example else ""
        lines.append(f"\n  {reason} {count}{where}")
    more = len(reasons) - WORST
    return ":" + "".join(lines) + (f"\n  and {more} more reasons" if more > 0 else "") if lines else ""
