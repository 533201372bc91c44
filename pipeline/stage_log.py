"""The lines of a stage's log that say why it failed, among all that libraries write there."""

from __future__ import annotations

import re
from pathlib import Path

LOOKED_AT = 1 << 18  # bytes at the end of a log
TELLING = re.compile(
    r"(\b\w*(Error|Exception)\b(:|$)|out of memory|\bOOM\b|\bkilled\b|No space left|Segmentation fault|core dumped|FATAL)",
    re.IGNORECASE,
)
# Of a traceback: where the error was, which --debug and the log show; and echoes that other workers make.
NOT_TELLING = re.compile(
    r"^\s*File \"|^\s*(raise|except|import|from|def|return)\b|Connection (reset|closed) by peer|Warning:"
)
PREFIX = re.compile(
    r"^(\x1b\[[0-9;]*m)*\((\w|[ :.=-])*pid=\d+[^)]*\)\s*(\x1b\[[0-9;]*m)*"
)  # Ray's, of what a worker printed


def telling_lines(log: Path, since: int = 0, most: int = 4) -> list[str]:
    """The last lines of a log that name an error, each once, in their order.

    Args:
        since: byte of the log from which on it is of this attempt.
        most: how many at most.
    """
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - LOOKED_AT))
        text = file.read().decode(errors="replace")
    lines = (PREFIX.sub("", line).strip() for line in text.splitlines())
    found = [line[:300] for line in lines if TELLING.search(line) and not NOT_TELLING.search(line)]
    return list(dict.fromkeys(reversed(found)))[:most][::-1]
