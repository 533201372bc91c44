"""What the rows of a stage come to: lengths, tokens by role, what is left out and why, and a few rows to show."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any

from pipeline.inspection.examples import ROLES, Example, Watched, examples_of
from stages.data import ledger
from stages.data.chat import ChatEncoder
from stages.data.encode import WARNINGS, Outcome, Recipe, encode_rows, encoder_for, record_hashes
from stages.data.ledger import LedgerEntry
from stages.data.packing import best_fit
from stages.data.shards import length_of, trained_of
from stages.data.source import BadRow, DataSource, find_files, read_file
from stages.errors import DataError

LOOKED_AT = 10_000  # rows of a stage that are looked at
SAMPLED = 500  # of these the rows whose tokens are counted by who speaks them, which costs more
BATCH = 1024  # rows that are encoded together
BARS = 20  # of the histogram, about


@dataclass(frozen=True)
class Part:
    """Data that is prepared together, and how."""

    recipe: Recipe
    sources: list[DataSource]
    formats: list[str]
    max_dropped: float
    refuse_long: bool = False


@dataclass(frozen=True)
class Bar:
    start: int
    end: int | None  # exclusive; the last bar may be open
    count: int


@dataclass(frozen=True)
class Stats:
    task: str
    read: int  # rows looked at
    complete: bool  # whether these are all
    kept: int
    examples: int  # of the kept rows, as often as they are drawn
    wanted: int  # of these the labelled answers that are
    tokens: int
    trained_tokens: int
    roles: dict[str, dict[str, int]]  # role -> tokens, trained
    roles_of: int  # kept rows that the tokens by role are those of
    lengths: dict[str, int]  # percentiles, in tokens, before anything is cut
    histogram: list[Bar]
    max_length: int | None
    over: int  # rows that are longer
    packing: dict[str, Any] | None  # packs, and how full they are
    ledger: dict[str, Any]  # a summary, see stages/data/ledger.py
    asked_for: dict[str, int]  # reasons that the spec asks for
    lost: dict[str, int]  # the other reasons
    max_dropped: float
    stops: str | None  # why a run would be stopped, if these were all rows
    warnings: list[dict[str, Any]]  # code, count, says

    @property
    def share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Look:
    rows: list[list[Example]]  # what each row that is shown became
    stats: Stats


@dataclass(frozen=True)
class Raw:
    """A row that reached training, as it was read."""

    source: int
    file: str
    number: int
    row: dict[str, Any] | BadRow


@dataclass
class _Tally:
    """What is counted on the way through the rows."""

    first: list[list[Raw]]  # of each source the first rows that are kept
    sample: list[Raw] = field(default_factory=list)
    complete: bool = True
    read: int = 0
    kept: int = 0
    examples: int = 0
    wanted: int = 0
    tokens: int = 0
    trained: int = 0
    over: int = 0
    lengths: list[int] = field(default_factory=list)  # of every example, before a cut
    packable: list[int] = field(default_factory=list)  # of every example that is kept
    entries: list[LedgerEntry] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, raw: Raw, before: list[int], outcome: Outcome, part: Part, drawn: random.Random, n: int) -> None:
        recipe, source = part.recipe, part.sources[raw.source]
        self.read += 1
        self.lengths += before
        self.over += recipe.max_length is not None and max(before, default=0) > recipe.max_length
        self.warnings.update(outcome.warnings)
        if outcome.entry is not None or outcome.held_out:
            self.entries.append(
                outcome.entry or LedgerEntry(raw.file, raw.number, "held_out", f"of eval: {source.eval}")
            )
            return
        self.kept += 1
        self.examples += outcome.copies * len(outcome.examples)
        for row in outcome.examples:
            self.tokens += outcome.copies * length_of(row)
            self.trained += outcome.copies * trained_of(row)
            self.wanted += outcome.copies * row.get("label", False)
            if recipe.packing:
                self.packable += [len(row["input_ids"])] * outcome.copies
        if len(self.first[raw.source]) < n:
            self.first[raw.source].append(raw)
        if len(self.sample) < SAMPLED:
            self.sample.append(raw)
        elif (place := drawn.randrange(self.kept)) < SAMPLED:  # each kept row is as likely to be in the sample
            self.sample[place] = raw


def look(part: Part, n: int) -> Look:
    """Read rows of every source, and say what they come to.

    Args:
        n: rows to show.
    """
    encoder = encoder_for(part.recipe)
    tally = _tally(part, encoder, n)
    watched = Watched(encoder)
    shown = [raw for each in zip_longest(*tally.first) for raw in each if raw is not None][:n]
    shown.sort(key=lambda raw: raw.source)
    rows = [_examples(raw, part, watched) for raw in shown]
    roles = _by_role(example for raw in tally.sample for example in _examples(raw, part, watched))
    return Look(rows, _stats(part, tally, roles))


def _tally(part: Part, encoder: ChatEncoder, n: int) -> _Tally:
    recipe, drawn = part.recipe, random.Random(0)
    tally = _Tally(first=[[] for _ in part.sources])
    known: set[int] = set()  # hashes of rows
    turn = deque((i, _batches(source)) for i, source in enumerate(part.sources))  # a batch of each source in turn
    while turn:
        i, batches = turn.popleft()
        file, batch = next(batches, ("", []))
        if not batch:
            continue
        if tally.read + len(batch) > LOOKED_AT:
            tally.complete = False
        batch = batch[: LOOKED_AT - tally.read]
        source, format = part.sources[i], part.formats[i]
        again = _duplicates(batch, source, format, recipe.seed, known) if recipe.deduplicate else frozenset()
        how = {"file": file, "format": format, "source": source, "encoder": encoder, "duplicates": again}
        for (number, row), (before, outcome) in zip(batch, _outcomes(batch, recipe, how), strict=True):
            tally.add(Raw(i, file, number, row), before, outcome, part, drawn, n)
        if not tally.complete:
            break
        turn.append((i, batches))
    return tally


def _batches(source: DataSource) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    for file in find_files(source):
        rows = read_file(file)
        while batch := list(islice(rows, BATCH)):
            yield file.path, batch


def _duplicates(
    batch: list[tuple[int, Any]], source: DataSource, format: str, seed: int, known: set[int]
) -> frozenset[int]:
    again = set()
    for number, value in record_hashes(iter(batch), source, format, seed):
        if value in known:
            again.add(number)
        known.add(value)
    return frozenset(again)


def _outcomes(batch: list[tuple[int, Any]], recipe: Recipe, how: dict[str, Any]) -> Iterator[tuple[list[int], Outcome]]:
    """What became of each row, and how long it was: encoded without a bound, and again with it where it is longer."""
    free = list(encode_rows(iter(batch), recipe=replace(recipe, max_length=None), **how))
    lengths = [list(map(_length, outcome.examples)) for outcome in free]
    bound = recipe.max_length or math.inf
    long = [at for at, each in enumerate(lengths) if max(each, default=0) > bound]
    bounded = encode_rows((batch[at] for at in long), recipe=recipe, **how)
    outcomes = dict(zip(long, bounded, strict=True))
    for at, outcome in enumerate(free):
        yield lengths[at], outcomes.get(at, outcome)


def _examples(raw: Raw, part: Part, encoder: Watched) -> list[Example]:
    return examples_of(
        raw.row, raw.number, file=raw.file, format=part.formats[raw.source], source=part.sources[raw.source],
        recipe=part.recipe, encoder=encoder,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ counting


def _sides(row: dict[str, Any]) -> list[int]:
    return [len(row[side]) for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row]


def _length(row: dict[str, Any]) -> int:
    """What `max_length` bounds."""
    return len(row["input_ids"]) if "input_ids" in row else len(row["prompt_ids"]) + max(_sides(row), default=0)


def _by_role(examples: Iterator[Example]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for example in examples:
        for token in example.tokens:
            if 0 <= token.start < len(example.who):
                counts = found.setdefault(example.who[token.start], {"tokens": 0, "trained": 0})
                counts["tokens"] += 1
                counts["trained"] += token.trained
    return {role: found[role] for role in [*ROLES, *sorted(found.keys() - set(ROLES))] if role in found}


def _stats(part: Part, tally: _Tally, roles: dict[str, dict[str, int]]) -> Stats:
    recipe = part.recipe
    summary = ledger.summary(tally.read, tally.kept, tally.entries)
    lost = ledger.lost(summary)
    stops = None
    try:
        ledger.check_lost(summary, part.max_dropped, refuse_long=part.refuse_long)
    except DataError as error:
        stops = str(error)
    return Stats(
        task=recipe.task,
        read=tally.read,
        complete=tally.complete,
        kept=tally.kept,
        examples=tally.examples,
        wanted=tally.wanted,
        tokens=tally.tokens,
        trained_tokens=tally.trained,
        roles=roles,
        roles_of=len(tally.sample),
        lengths=percentiles(tally.lengths),
        histogram=histogram(tally.lengths, recipe.max_length),
        max_length=recipe.max_length,
        over=tally.over,
        packing=_packing(tally.packable, recipe.max_length) if recipe.packing and recipe.max_length else None,
        ledger=summary,
        asked_for={reason: count for reason, count in summary["reasons"].items() if reason not in lost},
        lost=lost,
        max_dropped=part.max_dropped,
        stops=stops,
        warnings=[{"code": code, "count": n, "says": WARNINGS[code]} for code, n in tally.warnings.most_common()],
    )


def _packing(lengths: list[int], capacity: int) -> dict[str, Any] | None:
    packs = best_fit(lengths, capacity)
    return {"packs": len(packs), "fill": sum(lengths) / (len(packs) * capacity)} if packs else None


def percentiles(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    at = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in at.items()}


def histogram(lengths: list[int], mark: int | None = None) -> list[Bar]:
    """About `BARS` bars of a round width. A long tail is one open bar at the end; `mark` is a border where it can be seen."""
    if not lengths:
        return []
    found = percentiles(lengths)
    top = found["longest"] if found["longest"] <= 3 * found["99%"] else found["99%"] * 3 // 2
    if mark and mark < found["longest"]:
        top = max(top, mark)
    width = _round_width(top / BARS)
    last = top // width  # the bar that the longest of those shown one by one falls in
    counts = Counter(min(length // width, last + 1) for length in lengths)
    bars = [Bar(i * width, (i + 1) * width, counts[i]) for i in range(min(counts), last + 1)]
    return bars + ([Bar((last + 1) * width, None, counts[last + 1])] if counts[last + 1] else [])


def _round_width(width: float) -> int:
    """1, 2 or 5 times a power of ten, not below `width`."""
    power = 10 ** max(math.floor(math.log10(max(width, 1))), 0)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
