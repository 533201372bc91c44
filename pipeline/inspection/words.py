"""What the terminal and the page both say, and how long texts are cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.inspection import Inspection
from pipeline.inspection.examples import Example, Piece, visible


@dataclass(frozen=True)
class Gap:
    """Text that is not shown."""

    characters: int
    role: str
    trained: bool = False

    @property
    def says(self) -> str:
        return f"... {self.characters:,} characters not shown ..."


def abridged(pieces: Sequence[Piece], each: int, whole: int) -> list[Piece | Gap]:
    """The pieces, those longer than `each` without their middle; of more than `whole` characters the middle pieces go."""
    cut: list[Piece | Gap] = []
    for piece in pieces:
        size = len(piece.text)
        if size <= each:
            cut.append(piece)
            continue
        half = each // 2
        tail = size - half
        cut.append(Piece(piece.text[:half], piece.role, piece.trained, piece.special, piece.at))
        cut.append(Gap(size - 2 * half, piece.role, piece.trained))
        cut.append(Piece(piece.text[tail:], piece.role, piece.trained, piece.special, piece.at + tail))
    sizes = [len(part.text) if isinstance(part, Piece) else 0 for part in cut]
    first, last, room = 0, len(cut), whole - sum(sizes)
    if room >= 0:
        return cut
    left = whole
    while first < last:  # from both ends, as far as there is room
        at = first if first <= len(cut) - last else last - 1
        if sizes[at] > left:
            break
        left -= sizes[at]
        first, last = (first + 1, last) if at == first else (first, at)
    gone = sum(len(part.text) if isinstance(part, Piece) else part.characters for part in cut[first:last])
    return [*cut[:first], *([Gap(gone, "template")] if gone else []), *cut[last:]]


def rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def where(source: str, row: int) -> str:
    """`file:row`, the file as it is seen from here."""
    inside = source.startswith(os.getcwd() + os.sep)
    return visible(f"{os.path.relpath(source) if inside else source}:{row}")


def about(example: Example, verb: str) -> str:
    """What is to be known of an example."""
    said = [f"{len(example.tokens):,} tokens, {example.trained_tokens:,} {verb}"]
    beginning, end = example.cut
    if beginning:
        said.append(f"{beginning:,} tokens cut off at the beginning")
    if end:
        said.append(f"{end:,} tokens cut off at the end")
    if example.weights:
        said.append("loss weight " + ", ".join(f"{weight:g}" for weight in example.weights))
    if example.copies != 1:
        said.append(f"taken {example.copies} times")
    if example.expected is not None:
        said.append(f"expected: {visible(example.expected)[:80]}")
    return "; ".join([*said, *(f"warning: {code}" for code in example.warnings)])


def margin(example: Example) -> str:
    """Of a pair that says how much better its chosen answer is."""
    return "" if example.margin is None else f"margin {example.margin:g}"


def title(inspection: Inspection) -> str:
    what = {"preference": "pairs", "labelled": "labelled answers", "prompt": "prompts"}
    of = what.get(inspection.stats.task, "conversations")
    return f"{inspection.stage}: {of}" if inspection.kind == "evaluate" else inspection.stage


def looked_at(inspection: Inspection) -> str:
    """How many rows, of how many, came to how many tokens."""
    stats, verb = inspection.stats, inspection.verb
    read = f"all {rows(stats.read)}" if stats.complete else f"{rows(stats.read)}, the first of each source,"
    kept = f"{stats.kept:,} kept" + (f" as {stats.examples:,} examples" if stats.examples != stats.kept else "")
    if stats.task == "labelled":
        kept += f" ({stats.wanted:,} wanted, {stats.examples - stats.wanted:,} unwanted)"
    return f"{read} looked at, {kept}: {stats.tokens:,} tokens, {stats.trained_tokens:,} of them {verb} ({stats.share:.1%})"


def lengths(inspection: Inspection) -> str:
    """Percentiles, what is too long, and what packing would make of it."""
    stats = inspection.stats
    said = [", ".join(f"{name} {value:,}" for name, value in stats.lengths.items())]
    if stats.max_length is not None:
        said.append(f"max_length is {stats.max_length:,}, {rows(stats.over)} longer")
    if stats.packing:
        said.append(f"packing makes {stats.packing['packs']:,} rows of them, {stats.packing['fill']:.1%} full")
    return "; ".join(said)


def sampled(inspection: Inspection) -> str:
    stats = inspection.stats
    return "" if stats.roles_of == stats.kept else f"of {stats.roles_of:,} rows drawn from the {stats.kept:,}"


@dataclass(frozen=True)
class Left:
    """A reason of the ledger."""

    reason: str
    count: int
    asked_for: bool
    examples: list[str]


def left_out(inspection: Inspection) -> list[Left]:
    ledger = inspection.stats.ledger
    return [
        Left(
            reason,
            count,
            reason in inspection.stats.asked_for,
            [
                visible(f"{os.path.basename(entry['source'])}:{entry['row']}: {entry['detail']}")
                for entry in ledger["examples"]
                if entry["reason"] == reason
            ],
        )
        for reason, count in ledger["reasons"].items()
    ]


def verdict(inspection: Inspection) -> str:
    """Whether a run would be stopped for what is lost."""
    stats = inspection.stats
    if stats.stops:
        said = [line.removesuffix(":") for line in stats.stops.splitlines() if not line.startswith(" ")]
        return visible(f"A run would stop: {'. '.join(said)}")
    if not stats.lost:
        return "Nothing is lost."
    lost = sum(stats.lost.values())
    return f"{rows(lost)} lost; max_dropped allows {stats.max_dropped:.1%}."
