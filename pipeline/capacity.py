"""What the stages of a plan need, against what this machine or a cluster has and can grow to (stages/capacity.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.plan import PlannedStage, machine_resources
from stages.capacity import Capacity, Need
from stages.rl.stage import RLStage


def machine() -> Capacity:
    """This machine, which does not grow."""
    return Capacity.of(machine_resources())


def needs_of(planned: PlannedStage) -> list[Need]:
    """The processes a stage cannot do without: its workers, and those that judge beside them.

    Judges ask for CPUs on a cluster only; there the time they may take to start bounds it.
    """
    stage, resources = planned.stage, planned.resources
    each = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    judges = stage.beside(resources.workers, planned.inputs).processes if isinstance(stage, RLStage) else 0
    return [Need(resources.fewest, each), *([Need(judges, {"GPU": each["GPU"]})] if judges else [])]


def lacking(planned: PlannedStage, has: Capacity) -> list[str]:
    """What there will never be enough of for a stage, in words."""
    return has.lacks(needs_of(planned))


def fit_together(stages: Sequence[PlannedStage], has: Capacity) -> bool:
    """Whether stages may run side by side: on what there is or will come, or, where that is not known, on what there is."""
    if has.growth is not None and has.growth.unknown:
        has = replace(has, growth=None)
    return not has.lacks([need for planned in stages for need in needs_of(planned)])
