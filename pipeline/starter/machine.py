"""Where a spec is going to run: this machine, or the cluster of RAY_ADDRESS."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.capacity import machine
from pipeline.estimate import GIB, gpu_memory
from stages.errors import RaylignError

ASSUMED_GPU = 24 * GIB  # of GPUs whose memory is not known: the least of those in data centres that are common
OF_A_GPU = 0.92  # of its memory that a worker may use, for what fragments
OF_A_MACHINE = 0.8


@dataclass(frozen=True)
class Machine:
    name: str
    cpus: int
    memory: int  # bytes
    gpus: int
    gpu_memory: int | None  # bytes of one; None where it is not known
    note: str = ""

    @property
    def workers(self) -> int:
        return max(1, self.gpus)

    @property
    def room(self) -> int:
        """Bytes that a worker may use."""
        if self.gpus:
            return int(OF_A_GPU * (self.gpu_memory or ASSUMED_GPU))
        return int(OF_A_MACHINE * self.memory)

    def __str__(self) -> str:
        gpus = "no GPU"
        if self.gpus:
            each = f" of {self.gpu_memory / GIB:.0f} GiB" if self.gpu_memory else ", whose memory is not known"
            gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}{each}"
        return f"{self.name}: {gpus}, {self.cpus} CPUs, {self.memory / GIB:.0f} GiB of memory"


def look_round() -> Machine:
    """What there is; of a cluster that does not answer, this machine, and a note."""
    address = os.environ.get("RAY_ADDRESS")
    note = ""
    if address:
        from pipeline.cluster import RayCluster

        try:
            has = RayCluster().capacity()
            return Machine(
                f"the cluster at {address}",
                int(min(has.most("CPU"), 1e6)),
                int(min(has.most("memory"), 1e15)),
                int(min(has.most("GPU"), 8)),  # of one that may grow without end: a machine's
                None,
            )
        except RaylignError as error:
            note = str(error).splitlines()[0]
    has = machine()
    gpus = int(has.total("GPU"))
    return Machine(
        "this machine", int(has.total("CPU")), int(has.total("memory")), gpus, gpu_memory() if gpus else None, note
    )
