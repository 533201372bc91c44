"""A spec as text: YAML with a comment on everything that was chosen."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 120
COLUMN = 40  # where comments begin, where there is room
SCHEMA = ".raylign-schema.json"


def scalar(value: Any) -> str:
    """A value as YAML: text as it is where it can be read as nothing else, else as JSON, which is YAML too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    return json.dumps(value)


def _number(value: float) -> str:
    """With a point and an exponent's sign, as YAML's numbers have them (2e-05 is text to some readers)."""
    text = f"{value:g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.6e}"
    if "e" not in text:
        return text if "." in text else f"{text}.0"
    mantissa, exponent = text.split("e")
    mantissa = mantissa.rstrip("0")
    return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent):+d}"


_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def _is_plain(text: str) -> bool:
    body = text.removesuffix("%")
    return (
        bool(body)
        and set(body) <= _PLAIN
        and (body[0].isalpha() or body[0] in "./" or (text.endswith("%") and body.isdigit()))
        and text.lower() not in _WORDS
        and not text.endswith(":")
        and text not in (".", "..")
    )


class Page:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, indent: int, text: str, comment: str = "") -> None:
        """A line; its comment behind it, or above it where it is long."""
        line = " " * indent + text
        behind = f"{line:<{COLUMN - 2}}  # {comment}"
        if comment and len(behind) > WIDTH:
            self.comment(indent, comment)
            comment = ""
        self.lines.append(behind if comment else line)

    def key(self, indent: int, name: str, value: Any, comment: str = "") -> None:
        self.add(indent, f"{scalar(name)}: {scalar(value)}", comment)

    def comment(self, indent: int, text: str) -> None:
        for part in text.splitlines() or [""]:
            wrapped = textwrap.wrap(part, WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False) or [""]
            self.lines += [f"{' ' * indent}# {line}".rstrip() for line in wrapped]

    def source(self, indent: int, options: Mapping[str, Any], comments: Mapping[str, str]) -> None:
        """An entry of `data:`."""
        start = "- "
        for name, value in options.items():
            if name == "messages":
                self.add(indent, f"{start}messages:", comments.get(name, ""))
                for turn in value:
                    self.add(indent + 4, f"- {scalar(turn)}")
            else:
                self.add(indent, f"{start}{name}: {scalar(value)}", comments.get(name, ""))
            start = "  "

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def head(page: Page, command: str, found: Iterable[str]) -> None:
    """What stands above every spec that is written here."""
    page.add(0, f"# yaml-language-server: $schema={SCHEMA}")
    page.comment(0, f"Written by `{command}`. Paths are relative to this file. Before you pay for it:")
    page.comment(0, "`raylign inspect` shows what of each row is trained, `raylign plan` what it takes.")
    lines = list(found)
    if lines:
        page.comment(0, "")
        for line in lines:
            page.comment(0, line)
