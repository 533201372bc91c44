"""The tables of a run: what is planned, and at its end its stages and the models an evaluation compared."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.artifacts import RunFolder
from pipeline.progress import brief, number
from stages.data.encode import WARNINGS
from stages.training.memory import PARTS

COLUMNS = {
    "loss": "held-out loss",
    "exact_match": "exact match",
    "stopped": "stopped",
    "preference_accuracy": "preference accuracy",
    "margin": "margin",
    "preference_by": "preference by",
}


def percent(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if name in ("exact_match", "stopped", "preference_accuracy") else number(value)


def published(folder: RunFolder, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of what the run's present spec made; None where an older artifact stands there."""
    manifest = folder.manifest(name)
    return manifest if manifest and manifest["fingerprint"] == record["fingerprint"] else None


def stage_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """One row per stage of the run, from its record and its manifests."""
    rows = []
    for name, record in folder.state().get("stages", {}).items():
        manifest = published(folder, name, record)
        ledger = ((manifest or {}).get("details") or {}).get("ledger") or {}
        rows.append(
            {
                "name": name,
                "kind": record["kind"],
                "state": record["state"],
                "seconds": record.get("seconds"),
                "rows": (manifest or {}).get("rows"),
                "left_out": sum(ledger.get("reasons", {}).values()) if ledger else None,
                "steps": (manifest or {}).get("steps"),
                "metrics": record.get("error", "").split("\n")[0] or brief((manifest or {}).get("metrics", {})),
            }
        )
    return rows


def warnings(folder: RunFolder) -> list[str]:
    """What is worth knowing of the data that was trained on, and of the models that were handed over."""
    out = []
    for name, record in folder.state().get("stages", {}).items():
        manifest = published(folder, name, record) or {}
        found = (manifest.get("details") or {}).get("warnings") or {}
        out += [f"{name}: {count} rows, {code}: {WARNINGS.get(code, code)}" for code, count in found.items()]
        out += [f"{name}: {said}" for said in (manifest.get("handoff") or {}).get("warnings") or []]
    return out


def evaluations(folder: RunFolder) -> list[tuple[str, dict[str, Any]]]:
    """(stage, manifest) of every evaluation that is published in the run's present state."""
    out = []
    for name, record in folder.state().get("stages", {}).items():
        manifest = published(folder, name, record) if record["kind"] == "evaluate" else None
        if manifest:
            out.append((name, manifest))
    return out


def render_run(folder: RunFolder) -> Group:
    """The tables, for the terminal."""
    stages = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "kind", "state", "seconds", "rows", "left out", "steps", "metrics"):
        stages.add_column(column, justify="right" if column in ("seconds", "rows", "left out", "steps") else "left")
    colours = {"done": "green", "cached": "cyan", "failed": "red", "interrupted": "yellow"}
    for row in stage_rows(folder):
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
    parts: list[Any] = [stages, *(Text(said, style="yellow") for said in warnings(folder))]
    for name, manifest in evaluations(folder):
        table = Table(
            title=f"\n{name}: models side by side", title_justify="left", box=None, pad_edge=False, header_style="bold"
        )
        table.add_column("model")
        columns = [c for c in COLUMNS if any(c in metrics for metrics in manifest["metrics"].values())]
        for column in columns:
            table.add_column(COLUMNS[column], justify="left" if column == "preference_by" else "right")
        for model, metrics in manifest["metrics"].items():
            table.add_row(model, *[percent(c, metrics.get(c)) for c in columns])
        parts.append(table)
        for gate in folder.state()["stages"][name].get("gates", []):
            parts.append(Text(f"gate: {gate['says']}", style="green" if gate["holds"] else "red"))
    return Group(*parts)


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
