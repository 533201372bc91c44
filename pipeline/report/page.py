"""The page: what was read and drawn, put into the template."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.artifacts import RunFolder
from pipeline.report import graph, results
from pipeline.report.charts import Figure, Library, line_chart
from pipeline.report.curves import points_each, swept
from pipeline.report.reading import Run, StageRead, finite, mapping, read_run
from pipeline.report.results import Evaluation
from pipeline.report.stages import StageView, view, worker_hours
from pipeline.report.words import duration, moment, number
from pipeline.tables import SweepTable, sweeps_of

EVERY_S = 15  # a page that is being made is read again
OPEN_AT_MOST = 12  # stages that are unfolded at first
T = TypeVar("T")


@dataclass
class Sweep:
    table: SweepTable | None
    name: str
    count: int
    figures: list[Figure] = field(default_factory=list)


@dataclass
class Page:
    run: Run
    live: bool = False
    written: str = ""
    now: float = 0.0
    took: str = ""
    begun: str = ""
    counts: str = ""
    wide: graph.Picture | None = None
    tall: graph.Picture | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    totals: list[tuple[str, str]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    stages: list[StageView] = field(default_factory=list)
    versions: list[tuple[str, str]] = field(default_factory=list)
    lineage: list[list[str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what could not be read or made
    missing_charts: str = ""


def make_page(run: Run, now: float | None = None) -> Page:
    """All that the template shows of a run. No part of it can stop the others: what fails is told on the page."""
    now = time.time() if now is None else now
    page = Page(run, run.state == "running", moment(now), now, missing=list(run.problems))

    def attempt(what: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except Exception as error:
            page.missing.append(f"{what}: cannot be shown ({type(error).__name__}: {error})")
            return None

    end = run.finished or (now if page.live else None)
    page.took = duration(max(0.0, end - run.started)) if end is not None and run.started is not None else ""
    page.begun = moment(run.started)
    page.counts = _counts([stage.state for stage in run.stages.values()])
    drawn = attempt("the chain", lambda: graph.nodes(run)) or []
    page.wide = attempt("the chain", lambda: graph.wide(drawn))
    page.tall = attempt("the chain", lambda: graph.tall(drawn))
    page.evaluations = attempt("the evaluations", lambda: results.evaluations(run)) or []
    lines = sum(len(stage.metrics[-1]) for stage in run.stages.values() if stage.metrics)
    points = points_each(lines)
    page.sweeps = attempt("the sweeps", lambda: _sweeps(run, points, attempt)) or []
    page.stages = [view(stage, points, page.missing.append, attempt) for stage in run.stages.values()]
    page.rows = attempt("the stages' times", lambda: _rows(run, page.stages, end)) or []
    page.totals = attempt("what it cost", lambda: _totals(run)) or []
    page.versions = attempt("versions", lambda: _versions(run)) or []
    page.lineage = attempt("lineage", lambda: _lineage(run)) or []
    return page


def _counts(states: list[str]) -> str:
    """`7 done, 1 failed`."""
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _sweeps(run: Run, points: int, attempt: Callable[..., Any]) -> list[Sweep]:
    own = {name: mapping(stage.manifest.get("metrics")) for name, stage in run.stages.items()}
    own |= {v: {} for variants in run.sweeps.values() for v in variants if v not in own}
    compared = {s.name: m for s in run.stages.values() if s.kind == "evaluate" and (m := results.compared(s))}
    tables = attempt("tables of sweeps", lambda: sweeps_of(run.sweeps, own, compared)) or []
    by_name = {table.name: table for table in tables}
    out = []
    for name, variants in run.sweeps.items():
        metrics = {v: run.stages[v].metrics for v in variants if v in run.stages}
        charts = attempt(f"curves of the sweep {name}", lambda v=variants, m=metrics: swept(v, m, points)) or []
        out.append(Sweep(by_name.get(name), name, len(variants), [line_chart(chart) for chart in charts]))
    return out


def _rows(run: Run, views: list[StageView], end: float | None) -> list[dict[str, Any]]:
    """The stages as a table, with when each ran as a share of the whole."""
    begin = run.started
    whole = (end - begin) if end is not None and begin is not None and end > begin else None
    out = []
    for shown in views:
        stage = run.stages[shown.name]
        started = finite(stage.record.get("started"))
        seconds = stage.seconds if stage.state != "running" else None
        earlier = finite(stage.record.get("earlier")) or 0.0  # of attempts before this run
        if stage.state == "running" and started is not None and end is not None:
            seconds = earlier + end - started
        bar = None
        if whole and begin is not None and started is not None and seconds is not None:
            left = min(1.0, max(0.0, (started - begin) / whole))
            bar = (left, min(1.0 - left, max(0.004, (seconds - earlier) / whole)))
        ledger = shown.ledger
        left_out = sum(c for c in map(finite, _reasons(stage)) if c is not None) if ledger else None
        out.append(
            {
                "view": shown,
                "bar": bar,
                "rows": number(stage.manifest.get("rows")),
                "left_out": number(left_out),
                "tokens": number(stage.manifest.get("tokens")),
                "steps": number(stage.manifest.get("steps")),
                "hours": number(worker_hours(stage)),
                "time": duration(seconds),
            }
        )
    return out


def _reasons(stage: StageRead) -> list[Any]:
    return list(mapping((mapping(stage.details.get("ledger")) or stage.ledger).get("reasons")).values())


def _totals(run: Run) -> list[tuple[str, str]]:
    hours = [h for stage in run.stages.values() if (h := worker_hours(stage)) is not None]
    tokens = [t for stage in run.stages.values() if (t := finite(stage.manifest.get("tokens"))) is not None]
    out = [
        ("worker-hours", number(float(f"{sum(hours):.3g}")) if hours else ""),
        ("tokens of data", number(sum(tokens))),
    ]
    return [(name, said) for name, said in out if said and said != "0"]


def _versions(run: Run) -> list[tuple[str, str]]:
    """Of each library, its version; where stages were made by different ones, which."""
    seen: dict[str, dict[str, list[str]]] = {}
    for stage in run.stages.values():
        for library, version in mapping(stage.manifest.get("versions")).items():
            seen.setdefault(str(library), {}).setdefault(str(version), []).append(stage.name)
    return [
        (library, next(iter(by)) if len(by) == 1 else "; ".join(f"{v} ({', '.join(names)})" for v, names in by.items()))
        for library, by in seen.items()
    ]


def _lineage(run: Run) -> list[list[str]]:
    return [
        [
            stage.name,
            ", ".join(stage.inputs),
            str(stage.manifest.get("produces") or ""),
            str(stage.record.get("fingerprint") or stage.manifest.get("fingerprint") or "")[:16],
            number(stage.manifest.get("seed")) if isinstance(stage.manifest.get("seed"), int) else "",
        ]
        for stage in run.stages.values()
    ]


# ------------------------------------------------------------------------------------------------ writing


def render(page: Page, library: Library, wait: bool) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    figures: list[dict[str, Any]] = []

    def figure(made: Figure, group: str) -> int:
        """Its number in the page, where its data is found."""
        figures.append({"spec": made.spec, "data": made.data, "unit": made.unit, "group": group})
        return len(figures) - 1

    body = (
        _templates()
        .get_template("body.html")
        .render(page=page, run=page.run, figure=figure, drawn=graph.drawn, open_at_most=OPEN_AT_MOST, number=number)
    )
    script = library.text(wait) if figures else None
    if figures and script is None:
        page.missing_charts = (
            library.problem or "charts are missing: what draws them is being made, once; they are here soon"
        )
    text = _templates().get_template("page.html").render(
        page=page, body=Markup(body), figures=Markup(as_script(figures)) if script else None,
        library=script, every=EVERY_S,
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode()  # JSON can name half of a surrogate pair, UTF-8 cannot


@lru_cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # a twentieth of a second

    return Environment(
        loader=PackageLoader("pipeline", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def as_script(value: Any) -> str:
    """JSON for within <script>: nothing in it can end the element, or be taken for markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_of(folder: RunFolder, library: Library, wait: bool, gone: bool = False) -> str:
    """The page of a run folder as it is now.

    Args:
        wait: for what draws the charts, where it has to be made first.
        gone: the record says it is running, but nobody carries it out.
    """
    run = read_run(folder)
    if gone and run.state == "running":
        run.state = "interrupted"
        run.problems.append("its process is gone; run the spec again to go on")
        for stage in run.stages.values():
            stage.state = "interrupted" if stage.state == "running" else stage.state
    return render(make_page(run), library, wait)
