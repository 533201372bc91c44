"""Values and texts as the page shows them: numbers in few characters, long texts cut, differences between answers."""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass
from typing import Any

from pipeline.report.reading import finite

WORDS = re.compile(r"\s+|\w+|[^\w\s]")
# What templates write between turns; shown smaller than what is said.
CONTROL = re.compile(r"(<\|[^<>|\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<(?:bos|eos|pad)>)")
COMPARED = 600  # words of an answer that are compared with another's: more would be quadratic in time


@dataclass(frozen=True)
class Piece:
    """A part of a text. `kind`: `same`, `new` (the other has it not), `gone` (only the other has it), `control`."""

    text: str
    kind: str = "same"


def differences(other: str, text: str) -> list[Piece]:
    """A text as pieces, with the words that are not in `other` and those of it that are missing.

    >>> [(p.text, p.kind) for p in differences("a b c", "a x c")]
    [('a ', 'same'), ('b', 'gone'), ('x', 'new'), (' c', 'same')]
    """
    a, b = WORDS.findall(other), WORDS.findall(text)
    if len(a) > COMPARED or len(b) > COMPARED:
        return [Piece(text)]
    out = []
    for tag, i, j, k, end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            out.append(Piece("".join(b[k:end])))
            continue
        if gone := "".join(a[i:j]):
            out.append(Piece(gone, "gone"))
        if new := "".join(b[k:end]):
            out.append(Piece(new, "new"))
    return out


def prompt(text: str, at_most: int = 1500) -> list[Piece]:
    """A prompt with its control tokens told apart; of a long one the end, which is what was asked last."""
    cut = [Piece(f"… {len(text) - at_most:,} characters before …\n", "control")] if len(text) > at_most else []
    return cut + [Piece(p, "control" if i % 2 else "same") for i, p in enumerate(CONTROL.split(text[-at_most:])) if p]


def clip(text: Any, at_most: int = 1200) -> str:
    text = str(text)
    return text if len(text) <= at_most else f"{text[:at_most]}… ({len(text):,} characters)"


def number(value: Any) -> str:
    """4 digits that say something: 0.1352, 2.000e-05, 5,618; texts as they are.

    >>> [number(v) for v in (0.13516, 2e-05, 5617.7, 12, 0.0, 1.0, "NaN", None, True)]
    ['0.1352', '2e-05', '5,618', '12', '0', '1', 'NaN', '', 'yes']
    """
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if finite(value) is None:
        return clip(value, 80)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def share(value: Any) -> str:
    known = finite(value)
    return number(value) if known is None else f"{100 * known:.1f}%"


def duration(seconds: float | None) -> str:
    """
    >>> [duration(s) for s in (0.42, 8.3, 75, 3725, 200000)]
    ['0.4 s', '8.3 s', '1 min 15 s', '1 h 02 min', '2 d 7 h']
    """
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float | None) -> str:
    """A time of day with its zone, as the machine that ran it had it."""
    if seconds is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)).strip()
    except (OverflowError, ValueError, OSError):
        return ""


def short(name: str, at_most: int) -> str:
    """
    >>> short("support-assistant", 9)
    'support-…'
    """
    return name if len(name) <= at_most else name[: at_most - 1] + "…"
