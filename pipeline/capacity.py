"""What the stages of a plan need, against what this machine or a cluster has and can grow to (stages/capacity.py)."""

from __future__ import annotations

from collections.abc import Sequence

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


def lacking(planned: PlannedStage, has: Capacity, others: Sequence[PlannedStage] = ()) -> list[str]:
    """What there will never be enough of for a stage, with others beside it, in words."""
    return has.lacks([need for each in (planned, *others) for need in needs_of(each)])
