"""An inspection in the terminal: speakers in colours, trained text on their colour, or in ⟦ ⟧ where there are no colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pipeline.inspection import Inspection, words
from pipeline.inspection.examples import Example, Piece, is_pair, visible
from pipeline.inspection.looking import Bar, Stats
from pipeline.inspection.words import Gap

COLOURS = {
    "system": "magenta", "developer": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "text": "green",
    "template": "white",
}  # fmt: skip
EACH, WHOLE = 600, 6000  # characters that are shown of a piece, and of a row
SIDE_BY_SIDE = 100  # columns that two answers beside each other need
BAR = 40  # columns of the longest bar
EDGES = re.compile(r"^[ \t\n]+|[ \t\n]+$")


def show(inspections: list[Inspection], console: Console) -> None:
    colours = console.is_terminal and not console.no_color and console.color_system is not None
    for inspection in inspections:
        console.print(_stage(inspection, colours, console.width), highlight=False)
    console.print(_legend(inspections, colours), highlight=False)


def _stage(inspection: Inspection, colours: bool, width: int) -> Group:
    kind = f" ({inspection.kind})" if inspection.kind != inspection.stage else ""
    parts: list[RenderableType] = [
        Rule(Text(words.title(inspection) + kind, style="bold"), align="left"),
        Text(words.looked_at(inspection)),
        Text(),
    ]
    for examples in inspection.rows:
        parts += [*_row(examples, inspection.verb, colours, width), Text()]
    return Group(*parts, *_stats(inspection, colours))


# ------------------------------------------------------------------------------------------------ rows


def _row(examples: list[Example], verb: str, colours: bool, width: int) -> list[RenderableType]:
    if is_pair(examples):
        return _pair(examples, verb, colours, width)
    out: list[RenderableType] = []
    for example in examples:
        mark = f" ({example.answer})" if example.answer else ""
        out += [_title(f"{words.where(example.source, example.row)}{mark}", words.about(example, verb))]
        out += [_turns(example.pieces(), colours)]
    return out


def _pair(examples: list[Example], verb: str, colours: bool, width: int) -> list[RenderableType]:
    """The prompt once, and the two answers beside each other where there is room."""
    first = examples[0]
    prompt = f"{words.where(first.source, first.row)}, prompt"
    out = [_title(prompt, words.margin(first)), _turns(first.pieces(0, first.answer_at), colours)]
    answers = [_turns(example.pieces(example.answer_at or 0), colours, names=False) for example in examples]
    names = [
        Text.assemble((f"{e.answer}  ", f"bold {colour}"), (words.about(e, verb), "dim"))
        for e, colour in zip(examples, ("green", "red"), strict=True)  # the better one stands first
    ]
    if width < SIDE_BY_SIDE:
        return out + [part for pair in zip(names, answers, strict=True) for part in pair]
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in examples:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*names)
    table.add_row(*answers)
    return [*out, table]


def _title(what: str, said: str) -> Text:
    return Text.assemble((what, "bold"), f"  {said}" if said else "")


def _turns(pieces: Sequence[Piece], colours: bool, names: bool = True) -> RenderableType:
    """What each speaker says, beside its name."""
    table = Table.grid(padding=(0, 1))
    if names:
        table.add_column(no_wrap=True, justify="right", min_width=9)
    table.add_column(overflow="fold")
    for role, run in groupby(words.abridged(pieces, EACH, WHOLE), lambda part: part.role):
        text = Text()
        parts = list(run)
        for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
            opens, closes = _trained(part) and not _trained(before), _trained(part) and not _trained(after)
            piece = _piece(part, colours, last=after is None)
            text.append_text(piece if colours else Text.assemble("⟦" * opens, piece, "⟧" * closes))
        cells = [Text(role, style=_colour(role)), text] if names else [text]
        table.add_row(*cells)
    return table


def _piece(part: Piece | Gap, colours: bool, last: bool) -> Text:
    if isinstance(part, Gap):
        return Text(f"[{part.says}]", style="dim italic")
    text = EDGES.sub(lambda match: match.group().replace(" ", "·").replace("\t", "⇥").replace("\n", "↵\n"), part.text)
    text = visible(text)
    if last:
        text = text.removesuffix("\n")  # its sign is there; the next speaker begins on a new line anyway
    if not colours:
        return Text(text)
    colour = _colour(part.role)
    if part.trained:
        return Text(text, style=f"bold black on {colour}" if part.special else f"black on {colour}")
    return Text(text, style=f"dim {colour}" if part.special else colour)


def _trained(part: Piece | Gap | None) -> bool:
    return part is not None and part.trained


def _colour(role: str) -> str:
    return COLOURS.get(role, "blue")


# ------------------------------------------------------------------------------------------------ numbers


def _stats(inspection: Inspection, colours: bool) -> list[RenderableType]:
    stats = inspection.stats
    out: list[RenderableType] = []
    if stats.lengths:
        out += [_title("lengths", words.lengths(inspection)), _bars(stats), Text()]
    if stats.roles:
        out += [_title("tokens by role", words.sampled(inspection)), _roles(stats, inspection.verb), Text()]
    out += _left_out(inspection)
    for warning in stats.warnings:
        said = f" {words.rows(warning['count'])}: {warning['says']}"
        out.append(Text.assemble((f"warning {warning['code']}", "yellow"), said))
    return [*out, Text()]


def _bars(stats: Stats) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    highest = max(bar.count for bar in stats.histogram)
    for bar in stats.histogram:
        over = stats.max_length is not None and bar.start > stats.max_length
        size = round(BAR * bar.count / highest)
        drawn = Text("█" * size if size else "▏" * (bar.count > 0), style="red" if over else "blue")
        drawn.append(f" {bar.count:,}" if bar.count else "", style="default")
        if _holds(bar, stats.max_length):
            drawn.append(f"  <- max_length {stats.max_length:,}", style="bold")
        table.add_row(f"{bar.start:,} and more" if bar.end is None else f"{bar.start:,} - {bar.end - 1:,}", drawn)
    return table


def _holds(bar: Bar, length: int | None) -> bool:
    return length is not None and bar.start <= length and (bar.end is None or length < bar.end)


def _roles(stats: Stats, verb: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("role")
    for column in ("tokens", "share", verb):
        table.add_column(column, justify="right")
    total = sum(counts["tokens"] for counts in stats.roles.values())
    for role, counts in stats.roles.items():
        numbers = [f"{counts['tokens']:,}", f"{counts['tokens'] / total:.1%}", f"{counts['trained']:,}"]
        table.add_row(Text(role, style=_colour(role)), *numbers)
    return table


def _left_out(inspection: Inspection) -> list[RenderableType]:
    out: list[RenderableType] = []
    left = words.left_out(inspection)
    if left:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("left out", "rows", "", "for example"):
            table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
        for one in left:
            why = Text("asked for", style="dim") if one.asked_for else Text("lost", style="red")
            table.add_row(Text(one.reason), f"{one.count:,}", why, Text(one.examples[0] if one.examples else ""))
        out.append(table)
    stops = inspection.stats.stops
    out.append(
        Text(words.verdict(inspection), style="bold red" if stops else "yellow" if inspection.stats.lost else "dim")
    )
    return out


def _legend(inspections: list[Inspection], colours: bool) -> Text:
    found = {role for inspection in inspections for row in inspection.rows for example in row for role in example.who}
    legend = Text("legend: ", style="dim")
    if colours:
        for role in [role for role in COLOURS if role in found]:
            legend.append(f"{role} ", style=_colour(role))
        legend.append("trained", style="black on green")
    else:
        legend.append("⟦trained⟧")
    return legend.append("  ↵ newline, · space at a border", style="dim")
