"""An inspection as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.inspection import Inspection, words
from pipeline.inspection.examples import Example, Piece, is_pair, visible
from pipeline.inspection.looking import Stats
from pipeline.inspection.words import Gap

EACH, WHOLE = 6000, 40_000  # characters that are shown of a piece, and of a row
WIDTH, HEIGHT = 600, 120  # of the histogram


@dataclass(frozen=True)
class Bit:
    """The text of a token, or of tokens that share a character; without ids where tokens are not known."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Run:
    """A piece, as tokens."""

    bits: list[Bit]
    trained: bool = False
    special: bool = False
    gap: str = ""


def render(inspections: list[Inspection], name: str) -> str:
    """The page; whatever the data holds is text in it."""
    environment = Environment(
        loader=PackageLoader("pipeline", "inspection"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["visible"] = visible
    page = environment.get_template("page.html")
    return page.render(
        name=name,
        inspections=inspections,
        words=words,
        turns=turns,
        bars=bars,
        is_pair=is_pair,
        width=WIDTH,
        height=HEIGHT,
    )


def turns(example: Example, start: int = 0, end: int | None = None) -> list[tuple[str, list[Run]]]:
    """(role, what it says) of each speaker in turn."""
    borders = example.borders()
    parts = words.abridged(example.pieces(start, end), EACH, WHOLE)
    return [
        (role, [Run([], gap=part.says) if isinstance(part, Gap) else _run(part, borders) for part in run])
        for role, run in groupby(parts, lambda part: part.role)
    ]


def _run(piece: Piece, borders: dict[int, list[int]]) -> Run:
    end = piece.at + len(piece.text)
    starts = [at for at in range(piece.at, end) if at in borders]
    edges = [*([] if starts[:1] == [piece.at] else [piece.at]), *starts, end]
    bits = [
        Bit(_spelled(piece.text[a - piece.at : b - piece.at], piece.special), borders.get(a, []))
        for a, b in pairwise(edges)
    ]
    return Run(bits, piece.trained, piece.special)


def _spelled(text: str, special: bool) -> str:
    return visible(text.replace("\n", "↵").replace(" ", "·") if special else text)


@dataclass(frozen=True)
class Drawn:
    """A bar of the histogram, in the units of the drawing."""

    x: float
    width: float
    y: float
    height: float
    over: bool
    says: str


def bars(stats: Stats) -> tuple[list[Drawn], float | None]:
    """The bars, and where `max_length` stands, if it is in the picture."""
    found = stats.histogram
    highest, width = max(bar.count for bar in found), WIDTH / len(found)
    out, mark = [], None
    for i, bar in enumerate(found):
        height = HEIGHT * bar.count / highest
        height = max(height, 2) if bar.count else 0
        span = f"{bar.start:,} tokens and more" if bar.end is None else f"{bar.start:,} to {bar.end - 1:,} tokens"
        over = stats.max_length is not None and bar.start > stats.max_length
        out.append(Drawn(i * width, width * 0.9, HEIGHT - height, height, over, f"{span}: {bar.count:,}"))
        if stats.max_length is not None and bar.end is not None and bar.start <= stats.max_length < bar.end:
            mark = (i + (stats.max_length - bar.start) / (bar.end - bar.start)) * width
    return out, mark
