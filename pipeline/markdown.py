"""Markdown from facts: cells, code and tables that hold whatever text they are given, and nothing of where it lies."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable
from typing import Any

from pipeline.progress import number
from stages.data.hub import SCHEME


def public(value: Any) -> Any:
    """A value of a config without where it lies: of a path or address its last part; of the hub's names all."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    bare = value.removeprefix(SCHEME)
    if os.path.isabs(bare) or ("://" in value and not value.startswith(SCHEME)):
        return bare.split("?")[0].rstrip("/").rpartition("/")[2]
    return value


def cell(value: Any) -> str:
    """A value as a cell of a table, and as no Markdown or HTML of its own."""
    text = value if isinstance(value, str) else number(value) if value is not None else ""
    text = re.sub(r"(?<![\w:/])/(?:[\w.+-]+/)+([\w.+-]+)", r"\1", " ".join(text.split()))
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", html.escape(text, quote=False))


def code(value: Any) -> str:
    """A value in backticks, in a table too."""
    text = value if isinstance(value, str) else repr(value)
    return "`" + " ".join(text.replace("`", "'").split()).replace("|", "\\|") + "`"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Headings that begin with `#` are of numbers."""
    said = list(headings)
    lines = [[h.removeprefix("#") for h in said], ["---:" if h.startswith("#") else "---" for h in said], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
