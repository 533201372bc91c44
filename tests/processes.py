"""The processes that a process is behind."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def family(process: psutil.Process) -> list[psutil.Process]:
    """What it has started, and what was forked for that (stages/forkserver.py): servers are nobody's children."""
    found = {p.pid: p for p in process.children(recursive=True)}
    owners = {str(pid) for pid in (process.pid, *found)}
    for server in psutil.process_iter(["cmdline"]):
        line = server.info["cmdline"] or []
        if "--serve" in line and Path(line[-1]).name.partition("-")[0] in owners:
            with suppress(psutil.NoSuchProcess):
                found |= {p.pid: p for p in (server, *server.children(recursive=True))}
    return list(found.values())
