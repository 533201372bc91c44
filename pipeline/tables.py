"""The tables of a run: what is planned, and at its end its stages, its sweeps and the models an evaluation compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.progress import Line, brief, number, read_events
from pipeline.report.reading import Run, StageRead, finite, mapping, mappings, texts
from pipeline.sweep import labels, text
from stages.data.encode import WARNINGS
from stages.training.memory import PARTS

COLUMNS = {
    "loss": "held-out loss",
    "exact_match": "exact match",
    "stopped": "stopped",
    "answer_tokens": "answer tokens",
    "kl": "KL to reference",
    "preference_accuracy": "preference accuracy",
    "margin": "margin",
    "preference_by": "preference by",
    "calibration_error": "calibration error",
    "length_correlation": "length correlation",
}
SHARES = ("exact_match", "stopped", "preference_accuracy")
# What a sweep's table shows of the variants' own metrics; as `eval_...` where they have that.
OWN = (
    "loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins", "samples/kl", "calibration_error",
    "length_correlation", "reward", "kl", "kl_per_token",
)  # fmt: skip
# Of these more, or less, is better whatever was swept over. Of the others (margins, KL, lengths) neither is.
HIGHER = ("exact_match", "stopped", "preference_accuracy", "accuracy", "rewards/accuracies", "reward")
LOWER = ("loss", "calibration_error")


def cell(metrics: Mapping[str, Any], name: str) -> str:
    """A metric as a table shows it; nothing where it is not there."""
    value, error = metrics.get(name), metrics.get(f"{name}_stderr")
    if value is None or isinstance(value, str):
        return value or ""
    if name == "answer_tokens":
        return f"{value:.1f}"
    return (f"{100 * value:.1f}%" if name in SHARES else number(value)) + (f" ±{number(error)}" if error else "")


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """One row per stage of the run, from its record and its manifests."""
    rows = []
    for stage in run.stages.values():
        ledger = mapping(stage.details.get("ledger"))
        left_out = [count for count in map(finite, mapping(ledger.get("reasons")).values()) if count is not None]
        rows.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "state": stage.state,
                "seconds": finite(stage.record.get("seconds")),
                "rows": finite(stage.manifest.get("rows")),
                "left_out": sum(left_out) if ledger else None,
                "steps": finite(stage.manifest.get("steps")),
                "metrics": str(stage.record.get("error") or stage.record.get("waiting") or "").split("\n")[0]
                or brief(mapping(stage.manifest.get("metrics")))
                or _at(stage),
            }
        )
    return rows


def _at(stage: StageRead) -> str:
    """How far a running stage is."""
    if stage.state != "running" or stage.folder is None:
        return ""
    line = Line(stage.kind, [], 0)
    for event in read_events(stage.folder / "events.jsonl"):
        line.event(event)
    return line.progress()


def warnings(run: Run) -> list[str]:
    """What is worth knowing of the data that was trained on, and of the models that were handed over."""
    out = []
    for name, stage in run.stages.items():
        found = mapping(stage.details.get("warnings"))
        out += [f"{name}: {count} rows, {code}: {WARNINGS.get(code, code)}" for code, count in found.items()]
        out += [f"{name}: {said}" for said in said_of(stage.manifest)]
    return out


def said_of(manifest: dict[str, Any]) -> list[str]:
    """Warnings of a stage itself and of its handoff."""
    details = mapping(manifest.get("details"))
    own = [said for key in ("training_warnings", "evaluation_warnings") for said in texts(details.get(key))]
    return own + texts(mapping(manifest.get("handoff")).get("warnings"))


def evaluations(run: Run) -> list[tuple[StageRead, dict[str, dict[str, Any]]]]:
    """Every evaluation that is published in the run's present state, with its metrics by model."""
    out = []
    for stage in run.stages.values():
        if stage.kind == "evaluate" and stage.manifest:
            metrics = mapping(stage.manifest.get("metrics"))
            out.append((stage, {model: of for model, of in metrics.items() if isinstance(of, dict)}))
    return out


@dataclass(frozen=True)
class SweepTable:
    """The variants of a sweep side by side; `best` are (row, column) of the best value of a column."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    settings: int  # how many columns after the name are what was swept over
    best: set[tuple[int, int]]


def sweep_tables(run: Run) -> list[SweepTable]:
    """A table for each sweep of which a variant is published."""
    own = {name: mapping(stage.manifest.get("metrics")) for name, stage in run.stages.items()}
    return sweeps_of(run.sweeps, own, {stage.name: metrics for stage, metrics in evaluations(run)})


def sweeps_of(
    sweeps: Mapping[str, dict[str, dict[str, Any]]],
    own: Mapping[str, Mapping[str, Any]],
    compared: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[SweepTable]:
    """The same from metrics: `own` by stage, `compared` by evaluation and model."""
    tables = []
    for name, variants in sweeps.items():
        columns = _own_columns([own.get(v, {}) for v in variants])
        for evaluation, metrics in compared.items():
            where = f"{evaluation}: " if len(compared) > 1 else ""
            seen = [metrics.get(v, {}) for v in variants]
            columns += [(key, f"{where}{said}", seen) for key, said in COLUMNS.items()]
        columns = [(k, said, seen) for k, said, seen in columns if any(isinstance(m.get(k), int | float) for m in seen)]
        if columns:
            tables.append(_sweep_table(name, variants, columns))
    return tables


Column = tuple[str, str, list[Mapping[str, Any]]]  # name of the metric, heading, metrics of each variant


def _own_columns(metrics: list[Mapping[str, Any]]) -> list[Column]:
    out = []
    reinforced = any("reward" in m for m in metrics)
    for name in OWN:
        if name == "loss" and reinforced:
            continue  # it says nothing there
        heading = name.removeprefix("rewards/").replace("_", " ")
        held_out = any(f"eval_{name}" in m for m in metrics)
        if not held_out or name == "loss":
            out.append((name, heading, metrics))
        if held_out:
            out.append((f"eval_{name}", f"eval {heading}", metrics))
    return out


def _sweep_table(name: str, variants: dict[str, dict[str, Any]], columns: list[Column]) -> SweepTable:
    paths = list(next(iter(variants.values())))
    said = labels(paths)
    rows = [
        [variant, *(text(chosen[path]) for path in paths), *(cell(metrics[i], key) for key, _, metrics in columns)]
        for i, (variant, chosen) in enumerate(variants.items())
    ]
    best = {
        (row, 1 + len(paths) + at)
        for at, (key, _, metrics) in enumerate(columns)
        for row in _best(key.removeprefix("eval_"), [m.get(key) for m in metrics])
    }
    headings = ["variant", *(said[path] for path in paths), *(heading for _, heading, _ in columns)]
    return SweepTable(name, headings, rows, len(paths), best)


def _best(metric: str, values: list[Any]) -> list[int]:
    """Which values are the best, where they differ."""
    known = [value for value in values if isinstance(value, int | float)]
    if metric not in HIGHER + LOWER or len(set(known)) < 2:
        return []
    best = max(known) if metric in HIGHER else min(known)
    return [i for i, value in enumerate(values) if value == best]


def render_run(run: Run) -> Group:
    """The tables, for the terminal, and what of the run could not be read."""
    stages = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "kind", "state", "seconds", "rows", "left out", "steps", "metrics"):
        stages.add_column(column, justify="right" if column in ("seconds", "rows", "left out", "steps") else "left")
    colours = {"done": "green", "cached": "cyan", "failed": "red", "interrupted": "yellow"}
    for row in stage_rows(run):
        cells = [number(row[k]) if row[k] is not None else "" for k in ("rows", "left_out", "steps")]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        stages.add_row(
            row["name"],
            row["kind"],
            Text(row["state"], style=colours.get(row["state"], "")),
            seconds,
            *cells,
            Text(row["metrics"]),
        )
    parts: list[Any] = [stages, *(Text(said, style="yellow") for said in [*run.problems, *warnings(run)])]
    for stage, compared in evaluations(run):
        table = Table(
            title=f"\n{stage.name}: models side by side",
            title_justify="left",
            box=None,
            pad_edge=False,
            header_style="bold",
        )
        # A column for each model: there are fewer of them than metrics, and a narrow terminal shows them whole.
        for heading in ("", *compared):
            table.add_column(heading, justify="right" if heading else "left", overflow="fold")
        for column, heading in COLUMNS.items():
            cells = [cell(metrics, column) for metrics in compared.values()]
            if any(cells):
                table.add_row(heading, *cells)
        parts.append(table)
        for gate in mappings(stage.record.get("gates")):
            parts.append(Text(f"gate: {gate.get('says')}", style="green" if gate.get("holds") else "red"))
    return Group(*parts, *map(_render_sweep, sweep_tables(run)))


def _render_sweep(sweep: SweepTable) -> Table:
    title = f"\n{sweep.name}: {len(sweep.rows)} variants" + ", * the best of a column" * bool(sweep.best)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(sweep.columns):
        # folded where the terminal is narrow: nothing is cut
        table.add_column(column, justify="right" if i > sweep.settings else "left", overflow="fold")
    marked = {column for _, column in sweep.best}
    for r, row in enumerate(sweep.rows):
        cells = [cell + ("*" if (r, c) in sweep.best else " " * (c in marked)) for c, cell in enumerate(row)]
        table.add_row(*(Text(cell, style="bold green" * ((r, c) in sweep.best)) for c, cell in enumerate(cells)))
    return table


# ------------------------------------------------------------------------------------------------ `raylign plan`


def size(count: float | None) -> str:
    """Bytes, as 0.4 MiB, 12 MiB, 1.5 GiB, 112 GiB."""
    if count is None:
        return ""
    value, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def render_plan(rows: list[dict[str, Any]]) -> Group:
    """The stages of `raylign plan`, what their memory is made of, and for those that do not fit what makes them."""
    numbers = ("rows", "tokens", "steps", "epochs", "workers")
    columns = ("stage", "kind", "state", *numbers, "memory/worker", "disk", "fits")
    cells = [
        [
            *(row[k] for k in ("name", "kind", "state")),
            *("" if row[k] is None else f"{row[k]:,}" for k in numbers),
            size(row["memory_per_worker_bytes"]),
            size(row["disk_bytes"]),
            "yes" if row["fits"] else "NO",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    # As wide as it has to be: in a narrow terminal lines wrap, but no figure is cut.
    stages = Table(box=None, pad_edge=False, header_style="bold", width=sum(widths) + 2 * (len(widths) - 1))
    for column, width in zip(columns, widths, strict=True):
        left = column in ("stage", "kind", "state")
        stages.add_column(column, no_wrap=True, width=width, justify="left" if left else "right")
    for line in cells:
        stages.add_row(*line[:-1], Text(line[-1], style="bold red" if line[-1] == "NO" else ""))
    parts: list[Any] = [stages]
    for row in rows:
        source = f" from {', '.join(row['inputs'])}" if row["inputs"] else ""
        parts.append(Text(f"{row['name']}{source}: {row['why']}", style="dim" if row["fits"] else "red"))
        if row["memory"]:
            said = [f"{name} {size(value)}" for name, value in row["memory"].items() if name in PARTS and value]
            parts.append(Text(f"  memory ({row['memory']['moment']}): {', '.join(said)}", style="dim"))
        parts += [Text(f"  {'or' if i else 'fits with'} {a['text']}") for i, a in enumerate(row["advice"])]
    note = "rows of a stage that has not run are those of its files; memory is that of full micro-batches of the longest row"
    return Group(*parts, Text(note, style="dim"))
