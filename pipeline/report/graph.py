"""The chain as a picture: where each stage lies, and the lines from what it is made of. Pure: data in, coordinates out.

Two layouts: `wide`, in columns from left to right (the layered drawing of Sugiyama, Tagawa and Toda 1981: layers by the longest
way, order by barycentres, lines over several layers bent round what lies between), and `tall`, one stage to a row with lines
beside it, which a phone shows and which any number of stages fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from pipeline.report.reading import Run, StageRead
from pipeline.report.words import duration, short

ACROSS, DOWN = 152, 56  # a box
GAP_ACROSS, GAP_DOWN = 40, 16
LANE = 12  # between two lines of the tall layout
WIDE_AT_MOST = 7  # columns that fit a screen at a size that can be read
SEVERAL = 3  # variants of a sweep that are drawn one by one; more are one box
PASSES = 12
MARGIN = 4


@dataclass(frozen=True)
class Node:
    """A stage, or a sweep's variants as one (`count`), or a model from elsewhere (no `href`)."""

    name: str
    kind: str
    state: str
    said: str = ""  # its time, or how far it is
    inputs: tuple[str, ...] = ()
    count: int = 1
    done: float | None = None
    href: str = ""

    @property
    def tells(self) -> str:
        """What a pointer over it shows, and a screen reader reads."""
        source = f", from {', '.join(self.inputs)}" if self.inputs else ""
        return f"{self.name}: {self.kind}, {self.state}{', ' * bool(self.said)}{self.said}{source}"


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    node: Node


@dataclass(frozen=True)
class Line:
    path: str  # of SVG
    source: str
    target: str


@dataclass(frozen=True)
class Picture:
    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    @property
    def tells(self) -> str:
        return "; ".join(box.node.tells for box in self.boxes)


# ------------------------------------------------------------------------------------------------ what is drawn


def nodes(run: Run) -> list[Node]:
    """The stages of a run, sweeps of many variants taken together, after the models that come from elsewhere."""
    together = {
        v: sweep
        for sweep, variants in run.sweeps.items()
        for v in variants
        if v in run.stages and (len(variants) > SEVERAL or len(run.stages) > 12)
    }
    out: dict[str, Node] = {}
    for name, stage in run.stages.items():
        shown = together.get(name, name)
        if shown in out:
            continue
        members = [run.stages[v] for v, sweep in together.items() if sweep == shown] or [stage]
        out[shown] = _node(shown, members, together, run)
    elsewhere = {ref for node in out.values() for ref in node.inputs if ref not in out}
    outside = [Node(ref, "given model", "given") for ref in sorted(elsewhere) if ref not in run.stages]
    return [*outside, *out.values()]


def _node(name: str, members: Sequence[StageRead], together: Mapping[str, str], run: Run) -> Node:
    inputs = tuple(dict.fromkeys(together.get(ref, ref) for m in members for ref in m.inputs))
    first = members[0]
    if len(members) == 1:
        said = duration(first.seconds) or (first.doing if first.state == "running" else "")
        return Node(name, first.kind, first.state, said, inputs, 1, first.done, f"#stage-{name}")
    times = [m.seconds for m in members if m.seconds is not None]
    told = duration(sum(times)) if times else ""
    href = f"#sweep-{name}" if name in run.sweeps else f"#stage-{first.name}"
    return Node(name, first.kind, state_of([m.state for m in members]), told, inputs, len(members), None, href)


def state_of(states: Sequence[str]) -> str:
    """The state of several stages as one: what is worth knowing first."""
    strange = [state for state in states if state not in ICONS]
    for state in ("failed", "running", "interrupted", "waiting", "not run", *strange):
        if state in states:
            return state
    return "cached" if all(s == "cached" for s in states) else "done"


def layers(given: Sequence[Node]) -> list[list[str]]:
    """Names by the longest way from a node without inputs. Inputs that are not there, or lead round, count for nothing."""
    known = {node.name: [ref for ref in node.inputs if ref != node.name] for node in given}
    depth: dict[str, int] = {}

    def deep(name: str, above: tuple[str, ...]) -> int:
        if name not in depth:
            before = [ref for ref in known[name] if ref in known and ref not in above]
            found = 1 + max((deep(ref, (*above, name)) for ref in before), default=-1)
            depth.setdefault(name, found)
        return depth[name]

    out: list[list[str]] = []
    for node in given:
        at = deep(node.name, ())
        out += [[] for _ in range(at + 1 - len(out))]
    for node in given:
        out[depth[node.name]].append(node.name)
    return out


# ------------------------------------------------------------------------------------------------ left to right


def wide(given: Sequence[Node]) -> Picture | None:
    """Columns from left to right; None where there are too many to be read."""
    columns = layers(given)
    if not columns:
        return Picture(0, 0)
    if len(columns) > WIDE_AT_MOST:
        return None
    named = {node.name: node for node in given}
    chains = _chains(given, columns)
    columns = _ordered(columns, [pair for chain in chains for pair in pairwise(chain)], named)
    heights = {name: DOWN if name in named else 6 for column in columns for name in column}
    places = _places(columns, chains, heights)
    column_of = {name: i for i, column in enumerate(columns) for name in column}
    top = min(places[name] - heights[name] / 2 for name in places)
    boxes = [
        Box(
            MARGIN + column_of[n.name] * (ACROSS + GAP_ACROSS),
            MARGIN + places[n.name] - DOWN / 2 - top,
            ACROSS,
            DOWN,
            n,
        )
        for n in given
    ]
    lines = [
        Line(_bent([(column_of[name], MARGIN + places[name] - top) for name in chain]), chain[0], chain[-1])
        for chain in chains
    ]
    height = max(places[name] + heights[name] / 2 for name in places) - top
    return Picture(len(columns) * (ACROSS + GAP_ACROSS) - GAP_ACROSS + 2 * MARGIN, height + 2 * MARGIN, boxes, lines)


def _chains(given: Sequence[Node], columns: list[list[str]]) -> list[list[str]]:
    """For each line the names it goes through: its source, a place in each column between (added to `columns`), its target."""
    depth = {name: i for i, column in enumerate(columns) for name in column}
    out = []
    for node in given:
        for ref in node.inputs:
            if ref not in depth or depth[ref] >= depth[node.name]:
                continue
            chain = [ref]
            for at in range(depth[ref] + 1, depth[node.name]):
                chain.append(f"{ref}\n{node.name}\n{at}")  # no stage has a name with a line break
                columns[at].append(chain[-1])
            out.append([*chain, node.name])
    return out


def _ordered(columns: list[list[str]], pairs: list[tuple[str, str]], named: Mapping[str, Node]) -> list[list[str]]:
    """Columns in an order in which few lines cross."""
    neighbours: dict[str, list[str]] = {}
    for a, b in pairs:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    best, least = columns, _crossings(columns, pairs)
    columns = [list(column) for column in columns]
    for turn in range(PASSES):
        order = range(1, len(columns)) if turn % 2 == 0 else range(len(columns) - 2, -1, -1)
        for at in order:
            beside = {name: i for i, name in enumerate(columns[at - 1 if turn % 2 == 0 else at + 1])}
            own = {name: i for i, name in enumerate(columns[at])}

            def weight(name: str, beside: dict[str, int] = beside, own: dict[str, int] = own) -> tuple[float, int]:
                seen = [beside[other] for other in neighbours.get(name, []) if other in beside]
                return (fmean(seen) if seen else own[name], own[name])

            columns[at].sort(key=weight)
        if (now := _crossings(columns, pairs)) < least:
            best, least = [list(column) for column in columns], now
    return best


def _crossings(columns: list[list[str]], pairs: list[tuple[str, str]]) -> int:
    place = {name: (i, j) for i, column in enumerate(columns) for j, name in enumerate(column)}
    ends = [(place[a][0], place[a][1], place[b][1]) for a, b in pairs]
    return sum(
        1
        for i, (column, a, b) in enumerate(ends)
        for other, c, d in ends[i + 1 :]
        if column == other and (a - c) * (b - d) < 0
    )


def _places(columns: list[list[str]], chains: list[list[str]], heights: Mapping[str, float]) -> dict[str, float]:
    """The middle of each box: near those it is joined to, none over another."""
    neighbours: dict[str, list[str]] = {}
    for chain in chains:
        for a, b in pairwise(chain):
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
    places: dict[str, float] = {}
    for column in columns:
        places |= _apart(column, dict.fromkeys(column, 0.0), heights)
    for _ in range(PASSES):
        for column in columns:
            wanted = {n: fmean([places[o] for o in neighbours[n]]) if n in neighbours else places[n] for n in column}
            places |= _apart(column, wanted, heights)
    return places


def _apart(column: Sequence[str], wanted: Mapping[str, float], heights: Mapping[str, float]) -> dict[str, float]:
    """The places nearest to those wanted (least squares) at which the boxes of a column, in this order, do not touch."""
    offsets, total = [], 0.0
    for i, name in enumerate(column):
        total += (heights[column[i - 1]] + heights[name]) / 2 + GAP_DOWN if i else 0
        offsets.append(total)
    blocks: list[tuple[float, int]] = []  # (place of the block less offset, how many)
    for i, name in enumerate(column):
        block = (wanted[name] - offsets[i], 1)
        while blocks and blocks[-1][0] > block[0]:
            place, count = blocks.pop()
            block = ((place * count + block[0] * block[1]) / (count + block[1]), count + block[1])
        blocks.append(block)
    spread = [place for place, count in blocks for _ in range(count)]
    return {name: spread[i] + offsets[i] for i, name in enumerate(column)}


def _bent(points: Sequence[tuple[int, float]]) -> str:
    """A smooth line through (column, height), straight within a column."""
    path = ""
    for (i, y), (j, to) in pairwise(points):
        start = MARGIN + i * (ACROSS + GAP_ACROSS) + ACROSS
        end = MARGIN + j * (ACROSS + GAP_ACROSS)
        last = j == points[-1][0]
        middle = (start + end) / 2
        path += f"{'L' if path else 'M'}{start:g} {y:.1f}"
        path += f"C{middle:g} {y:.1f} {middle:g} {to:.1f} {end - 5 * last:g} {to:.1f}"
    return path


# ------------------------------------------------------------------------------------------------ top to bottom


def tall(given: Sequence[Node], width: float = 340) -> Picture:
    """A row for each node, lines in lanes beside them: one lane for all that is made of the same."""
    named = {node.name: node for node in given}
    order = [name for layer in layers(given) for name in layer]
    row = {name: i for i, name in enumerate(order)}
    targets: dict[str, list[str]] = {}
    for name in order:
        for ref in named[name].inputs:
            if ref in row and row[ref] < row[name]:
                targets.setdefault(ref, []).append(name)
    lanes: list[int] = []  # the row at which each is free again
    lane_of = {}
    for name in (n for n in order if n in targets):
        end = max(row[t] for t in targets[name])
        free = next((i for i, until in enumerate(lanes) if until <= row[name]), len(lanes))
        lanes[free:] = [end, *lanes[free + 1 :]]
        lane_of[name] = free
    left = MARGIN + len(lanes) * LANE + 10 * bool(lanes)
    pitch = DOWN + 10
    boxes = [Box(left, MARGIN + i * pitch, width - left - MARGIN, DOWN, named[name]) for i, name in enumerate(order)]
    lines = []
    for source, made in targets.items():
        x = left - 10 - LANE * lane_of[source]
        y = MARGIN + row[source] * pitch + DOWN * 0.68
        for target in made:
            to = MARGIN + row[target] * pitch + DOWN * 0.32
            lines.append(
                Line(f"M{left:g} {y:.1f}H{x + 5:g}q-5 0 -5 5V{to - 5:.1f}q0 5 5 5H{left - 5:g}", source, target)
            )
    return Picture(width, max(1, len(order)) * pitch - 10 + 2 * MARGIN, boxes, lines)


# ------------------------------------------------------------------------------------------------ as it is written


ICONS = {
    "done": "M4.2 8.4l2.6 2.6 5-5.6",
    "cached": "M4.2 8.4l2.6 2.6 5-5.6",
    "failed": "M5 5l6 6M11 5l-6 6",
    "running": "M6.2 4.6l5 3.4-5 3.4z",
    "interrupted": "M6.2 5v6M9.8 5v6",
    "waiting": "M8 4.6V8l2.4 1.6",
    "not run": "M5 8h6",
}
OTHER = "M8 7.9v.2"


def drawn(picture: Picture, letters: int = 17) -> list[dict[str, Any]]:
    """The boxes as the template wants them: what is written fits, `tells` has it whole."""
    out = []
    for box in picture.boxes:
        wide_enough = box.width > 1.3 * ACROSS
        kind = f"{box.node.kind} × {box.node.count}" if box.node.count > 1 else box.node.kind
        kind = "" if kind == box.node.name else kind
        said = " · ".join(filter(None, (kind, box.node.said or box.node.state)))
        out.append(
            {
                "box": box,
                "node": box.node,
                "name": short(box.node.name, 2 * letters if wide_enough else letters),
                "said": short(said, 42 if wide_enough else 23),
                "icon": ICONS.get(box.node.state, OTHER),
                "behind": [4.0, 8.0][: box.node.count - 1],  # more of them, as sheets behind
                "bar": None if box.node.done is None else box.width * box.node.done,
            }
        )
    return out
