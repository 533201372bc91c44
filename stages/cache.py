"""What is the same for every run on this machine and takes seconds to find out: kept in the user's cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder. A user without a home has no such place: nothing can be made below the null device."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("RAYLIGN_CACHE") or (Path(home) / "raylign" if os.path.isabs(home) else os.devnull))


def kept(name: str, find: Callable[[], Any]) -> Any:
    """What `find` gives, as JSON has it: from the file of that name where it is there, else found and kept.

    Args:
        name: has the versions of all that decides it.
    """
    file = cache_folder() / f"{name}.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        found = find()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            json.dump(found, out)
        os.replace(out.name, file)
    except OSError:
        pass  # a home that cannot be written to: it is found again the next time
    return found
