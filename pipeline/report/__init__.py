"""`report.html`: the run as one self-contained page."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.artifacts import RunFolder, write_text
from pipeline.plan import read_metrics
from pipeline.tables import COLUMNS, cell, evaluations, said_of, stage_rows, sweep_tables
from stages.data.encode import WARNINGS
from stages.storage import push

WIDTH, HEIGHT = 560, 120


def write_report(folder: RunFolder) -> None:
    """Write the page from what the run folder holds now."""
    environment = Environment(loader=PackageLoader("pipeline", "report"), autoescape=True, undefined=StrictUndefined)
    spec = folder.path / "spec.yaml"
    page = environment.get_template("template.html").render(
        state=folder.state(),
        folder=folder.path.name,
        stages=stage_rows(folder),
        details=[_details(folder, row["name"]) for row in stage_rows(folder)],
        evaluations=[
            {"name": n, "gates": folder.state()["stages"][n].get("gates", []), **_evaluation(m)}
            for n, m in evaluations(folder)
        ],
        sweeps=sweep_tables(folder),
        spec=spec.read_text() if spec.is_file() else "",
    )
    write_text(folder.path / "report.html", page)
    push(folder.path / "report.html")


def _details(folder: RunFolder, name: str) -> dict[str, Any]:
    manifest = folder.manifest(name) or {}
    points = [
        (m["step"], m["loss"])
        for m in read_metrics(folder.stage(name))
        if isinstance(m.get("loss"), float) and "model" not in m
    ]
    details = manifest.get("details", {})
    return {
        "name": name,
        "manifest": manifest,
        "curve": polyline(points) if len(points) > 1 else None,
        "first": points[0][1] if points else None,
        "last": points[-1][1] if points else None,
        "steps": points[-1][0] if points else None,
        "ledger": details.get("ledger"),
        "warnings": {WARNINGS.get(code, code): count for code, count in (details.get("warnings") or {}).items()},
        "said": said_of(manifest),
        "kernels": details.get("kernels") or {},
        "mixture": details.get("mixture") or [],
        "model": str(folder.stage(name) / "model") if (folder.stage(name) / "model").is_dir() else None,
    }


def polyline(points: list[tuple[int, float]]) -> str:
    """The points of an SVG polyline that fills WIDTH x HEIGHT."""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    across, up = max(steps[-1] - steps[0], 1), max(high - low, 1e-9)
    return " ".join(f"{WIDTH * (s - steps[0]) / across:.1f},{HEIGHT - HEIGHT * (v - low) / up:.1f}" for s, v in points)


def _evaluation(manifest: dict[str, Any]) -> dict[str, Any]:
    columns = [c for c in COLUMNS if any(c in metrics for metrics in manifest["metrics"].values())]
    rows = [[model, *[cell(metrics, c) for c in columns]] for model, metrics in manifest["metrics"].items()]
    return {
        "columns": [COLUMNS[c] for c in columns],
        "rows": rows,
        "samples": manifest["details"]["samples"],
        "models": list(manifest["metrics"]),
    }
