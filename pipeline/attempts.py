"""How long a stage has been worked on: what it cost is the time of all attempts, also of those that were cut off.

`attempts.json` in its work folder, which outlives them: seconds of those that have ended, and when the present one began.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.artifacts import read_json, write_json
from stages.storage import pull, push

FILE = "attempts.json"


def begin(work: Path) -> float:
    """Begin an attempt; to be called while the events of the one before are there.

    Returns:
        Seconds of the attempts before it. One whose runner was killed has ended when it last said something.
    """
    known = read_json(pull(work / FILE)) or {"seconds": 0.0, "started": None}
    events, seconds = work / "events.jsonl", known["seconds"]
    if known["started"] is not None and events.is_file():
        seconds += max(0.0, events.stat().st_mtime - known["started"])
    _write(work, seconds, time.time())
    return seconds


def end(work: Path, seconds: float) -> None:
    """An attempt has ended and the stage is not done: `seconds` of all of them."""
    _write(work, seconds, None)


def _write(work: Path, seconds: float, started: float | None) -> None:
    write_json(work / FILE, {"seconds": round(seconds, 2), "started": started})
    push(work / FILE)
