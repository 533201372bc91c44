"""Who is told of a run's metrics besides its own files: the names that `report_to` takes, transformers' own.

Stages write metrics.jsonl (stages/base.py Reporter) and know of no tracker; the process that carries the run out tells the
trackers what is written there (pipeline/tracking.py), so there is one source of numbers for all of them.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from stages.errors import nearest

TRACKERS = ("tensorboard", "mlflow", "wandb")


def trackers(report_to: str | list[str]) -> list[str]:
    """The trackers that are named, each once.

    Raises:
        ValueError: there is none of a name.
    """
    named = [] if report_to == "none" else [report_to] if isinstance(report_to, str) else report_to
    for name in named:
        if name not in TRACKERS:
            raise ValueError(
                f"{name!r} is no tracker; there are {', '.join(TRACKERS)}, and none{nearest(name, TRACKERS)}"
            )
    return list(dict.fromkeys(named))


def _checked(report_to: str | list[str]) -> str | list[str]:
    trackers(report_to)
    return report_to


_SCHEMA = {"anyOf": [{"enum": [*TRACKERS, "none"]}, {"type": "array", "items": {"enum": list(TRACKERS)}}]}
ReportTo = Annotated[str | list[str], AfterValidator(_checked), WithJsonSchema(_SCHEMA)]


def missing_tracker(tracker: str) -> str | None:
    """What to install for a tracker; None where it is there. TensorBoard's files need no library."""
    if tracker == "tensorboard" or importlib.util.find_spec(tracker) is not None:
        return None
    return f"{tracker} is not installed: `pip install 'raylign[{tracker}]'`"
