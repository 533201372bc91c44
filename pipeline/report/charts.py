"""Charts as Vega-Lite specs, and the library that draws them, as text to put into the page.

Vega-Lite is drawn in the browser, so that charts fit any width and either theme. The page must need no network, so the library
is in it: the PyPI package vl-convert-python carries Vega's own releases and makes one script of them. That takes two seconds,
so it is done once for each version, in a process of its own, and kept, compressed: 0.4 MB, which the browser takes apart.
(Bokeh's script is 1 MB and Plotly's 4 MB, both with a Python object model to be imported; matplotlib's pictures have one width
and one theme.)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.curves import Chart, summary, value
from pipeline.report.words import number
from stages.cache import cache_folder

PACKAGE = "vl-convert-python"
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the script is to leave behind
MAKE = """
import base64, gzip, sys, vl_convert
code = vl_convert.javascript_bundle(sys.argv[1])
sys.stdout.buffer.write(base64.b64encode(gzip.compress(code.encode(), mtime=0)))
"""
PATIENCE_S = 120
FORMATS = {"number": "~g", "share": ".0%", "tokens": "~s", "rate": "~e"}
HEIGHT, TALL = 140, 260  # pixels


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend, which also shows values: the last ones, or those under the pointer."""

    label: str  # of the line
    shown: str
    value: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Figure:
    title: str
    says: str  # the chart in words
    spec: dict[str, Any]  # Vega-Lite, without its data
    data: dict[str, Any]  # by column, which is shorter; the page makes rows of it
    keys: list[Key]
    unit: str = "number"
    main: bool = True


def line_chart(chart: Chart) -> Figure:
    """Lines over steps, with a rule and dots where the parameter `at` says."""
    names = [s.label for s in chart.series]
    # Told here, since layers without rows (nothing is pointed at) have no extent of their own.
    steps, values = (_extent(p[i] for s in chart.series for p in s.points) for i in (0, 1))
    at = {"filter": "at != null && datum.x == at"}
    y_axis = {"title": None, "tickCount": 4, "format": FORMATS[chart.unit]}
    spec = {
        "width": "container",
        "height": HEIGHT,
        "params": [{"name": "at", "value": None}],
        "encoding": {
            "x": {
                "field": "x", "type": "quantitative", "scale": {"domain": steps, "nice": False, "zero": False},
                "axis": {"title": None, "tickCount": 5, "grid": False, "labelFlush": True,
                         "format": ",d" if steps[1] < 10_000 else "~s"},
            },
            "y": {"field": "y", "type": "quantitative", "scale": {"domain": values, "zero": False}, "axis": y_axis},
            "color": {"field": "k", "type": "nominal", "scale": {"domain": names}, "legend": None},
        },
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.75, "strokeCap": "round", "strokeJoin": "round"},
                "encoding": {
                    "strokeDash": {
                        "field": "held_out", "type": "nominal", "legend": None,
                        "scale": {"domain": [False, True], "range": [[1, 0], [4, 3]]},
                    },
                },
            },
            {"transform": [{"filter": "datum.few"}], "mark": {"type": "point", "filled": True, "size": 22}},
            {"transform": [at], "mark": {"type": "rule", "strokeWidth": 1}, "encoding": {"y": None, "color": None}},
            {"transform": [at], "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1}},
        ],
    }  # fmt: skip
    data = {
        "lines": [
            {
                "k": s.label,
                "held_out": s.held_out,
                "few": len(s.points) <= 12,
                "x": [x for x, _ in s.points],
                "y": [float(f"{y:.5g}") for _, y in s.points],
            }
            for s in chart.series
        ]
    }
    alone = len(chart.series) == 1 and not chart.vague and "," not in chart.series[0].label  # then the title says it
    last = [value(chart, s.points[-1][1]) for s in chart.series]
    keys = [Key(s.label, s.label * (not alone), v, s.held_out) for s, v in zip(chart.series, last, strict=True)]
    return Figure(chart.title, summary(chart), spec, data, keys, chart.unit, chart.main)


def _extent(values: Iterable[float]) -> list[float]:
    """Least and greatest, apart."""
    known = list(values)
    low, high = min(known), max(known)
    return [low, high] if low < high else [low - 0.5, high + 0.5]


@dataclass(frozen=True)
class Point:
    """A model of a frontier."""

    model: str
    group: str
    label: str  # beside it: what was swept over
    kl: float
    error: float  # of the KL
    value: float


def _told_apart(points: Sequence[Point]) -> list[str]:
    """Their labels, without those that would lie over one another: what is pointed at is told anyway."""
    across = max(p.kl for p in points) - min(p.kl for p in points) or 1.0
    up = max(p.value for p in points) - min(p.value for p in points) or 1.0
    shown: list[Point] = []
    for p in points:
        if p.label and all(abs(p.kl - o.kl) > 0.07 * across or abs(p.value - o.value) > 0.06 * up for o in shown):
            shown.append(p)
    return [p.label if p in shown else "" for p in points]


def frontier_chart(points: Sequence[Point], metric: str, is_share: bool) -> Figure:
    """How good models are against how far they went for it."""
    groups = list(dict.fromkeys(p.group for p in points))
    said = "; ".join(
        f"{p.model} {100 * p.value:.1f}% at {p.kl:.2f}" if is_share else f"{p.model} {number(p.value)} at {p.kl:.2f}"
        for p in points
    )
    x = {"field": "x", "type": "quantitative", "axis": {"title": "KL to the reference, nats an answer", "tickCount": 6}}
    y = {
        "field": "y", "type": "quantitative", "scale": {"zero": False, "padding": 12},
        "axis": {"title": metric, "tickCount": 5, "format": FORMATS["share" if is_share else "number"]},
    }  # fmt: skip
    spec = {
        "width": "container",
        "height": TALL,
        "encoding": {
            "x": x,
            "y": y,
            "color": {"field": "k", "type": "nominal", "scale": {"domain": groups}, "legend": None},
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.25, "opacity": 0.7}},
            {
                "mark": {"type": "rule", "opacity": 0.45},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1, "tooltip": True},
                "encoding": {"tooltip": {"field": "says", "type": "nominal"}},
            },
            {
                "mark": {"type": "text", "dx": 9, "dy": -9, "align": "left", "fontSize": 11},
                "encoding": {"text": {"field": "label", "type": "nominal"}},
            },
        ],
    }
    rows = [
        {
            "k": p.group,
            "x": float(f"{p.kl:.5g}"),
            "y": float(f"{p.value:.5g}"),
            "low": float(f"{max(0.0, p.kl - p.error):.5g}"),
            "high": float(f"{p.kl + p.error:.5g}"),
            "label": label,
            "says": f"{p.model}: {100 * p.value:.1f}%" * is_share
            + f"{p.model}: {number(p.value)}" * (not is_share)
            + f", KL {p.kl:.2f}"
            + (f" ± {p.error:.2f}" if p.error else ""),
        }
        for p, label in zip(points, _told_apart(points), strict=True)
    ]
    return Figure(
        f"{metric} against KL", f"{metric} against KL: {said}", spec, {"rows": rows}, [Key(g, g) for g in groups]
    )


# ------------------------------------------------------------------------------------------------ the library


class Library:
    """The script that draws, gzip in base64; made in the background where this version of it was not made before."""

    def __init__(self, folder: Path | None = None) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = ""
        self.temporary: Path | None = None
        try:
            version = importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            self.problem = f"charts are missing: pip install {PACKAGE}, then `raylign report` once more"
            return
        self.folder = folder or cache_folder()
        mark = hashlib.sha256(f"{version} {SNIPPET}".encode()).hexdigest()[:12]
        self.file = self.folder / f"vega-{mark}.js.gz.b64"
        if not self.file.is_file():
            self._start()

    def _start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".vega-", suffix=".b64")
        except OSError:  # a home that cannot be written to: it is made for this page alone
            handle, name = tempfile.mkstemp(prefix="raylign-vega-", suffix=".b64")
        self.temporary = Path(name)
        with os.fdopen(handle, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", MAKE, SNIPPET],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    def text(self, wait: bool) -> str | None:
        """The script; None while it is being made, or where that failed (`problem` says why)."""
        if self.problem:
            return None
        if self.process is not None and not self._made(wait):
            return None
        return self.file.read_text()

    def _made(self, wait: bool) -> bool:
        assert self.process is not None and self.temporary is not None
        try:
            _, told = self.process.communicate(timeout=PATIENCE_S if wait else 0.001)
        except subprocess.TimeoutExpired:
            if wait:
                self.problem = f"charts are missing: {PACKAGE} was not done in {PATIENCE_S} s"
                self.close()
            return False
        if self.process.returncode != 0:
            last = (told.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            self.problem = f"charts are missing: {PACKAGE} failed: {last}"
            self.close()
            return False
        if self.temporary.parent == self.folder:
            os.replace(self.temporary, self.file)
        else:
            self.file = self.temporary
        self.process = None
        return True

    def close(self) -> None:
        """End what still makes it, and leave nothing behind that is of no use to the next."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        if self.temporary is not None and (self.temporary.parent != self.folder or not self.file.is_file()):
            self.temporary.unlink(missing_ok=True)
