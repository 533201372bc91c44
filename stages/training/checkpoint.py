"""Where an interrupted training goes on."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """(path, optimiser steps done) of the newest complete checkpoint; (None, 0) where there is none."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if not found:
        return None, 0
    newest = max(found, key=lambda p: int(p.name.split("-")[1]))
    return str(newest), int(newest.name.split("-")[1])
