"""What every stage is: a strict config, the artifacts it takes and makes, and a `run` that reads like a recipe."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ArtifactKind = Literal["model", "reward model", "dataset", "metrics"]


class Config(BaseModel):
    """Base of everything in a spec: unknown keys and wrong types are errors, nothing is changed after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Resources(Config):
    """Workers that train one stage and what each of them gets."""

    workers: int = Field(default=1, ge=1, description="Training workers (processes) of a stage.")
    at_least: int | None = Field(default=None, ge=1, description="With how many it may run where there is not more.")
    stall_minutes: float = Field(default=10, gt=0, description="Workers that do not move for so long are ended.")
    gpus_per_worker: int = Field(default=0, ge=0, description="GPUs each worker gets; 0 trains on the CPU.")
    cpus_per_worker: int = Field(default=1, ge=1, description="CPUs each worker gets.")

    @property
    def fewest(self) -> int:
        """Workers without which it cannot run."""
        return self.at_least or self.workers


def workers_range(value: int | str | None) -> tuple[int, int] | None:
    """(fewest, most) of `workers: 4` or `workers: 2..8`.

    Raises:
        ValueError: it is neither.
    """
    if value is None or isinstance(value, int):
        return None if value is None else (value, value)
    parts = value.split("..")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"write a number, or a range as 2..8 (got {value!r})")
    low, high = map(int, parts)
    if not 1 <= low <= high:
        raise ValueError(f"{value}: a range goes from a smaller number to a larger one")
    return low, high


def _workers(value: int | str) -> int | str:
    workers_range(value)
    return value


Workers = Annotated[Annotated[int, Field(ge=1)] | str, AfterValidator(_workers)]


def _share(value: Any) -> Any:
    """`1%` as 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return float(value) if type(value) is int else value


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


@dataclass(frozen=True)
class Artifact:
    """Something a stage published, or a model the user named.

    `model` is what `from_pretrained` takes: a folder, or a hub id; of a dataset, the folder of its files. `manifest` is
    empty for a user's own model.
    """

    name: str
    kind: ArtifactKind
    model: str
    manifest: dict[str, Any] = field(default_factory=dict)


class Reporter:
    """How a running stage says what it does: lines of JSON in its work folder, which the runner follows.

    `metrics.jsonl` is kept with the artifact; `events.jsonl` (phase, progress) is what the terminal shows.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def _append(self, file: str, record: dict[str, Any]) -> None:
        with (self.work / file).open("a") as out:
            out.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")

    def phase(self, name: str, **facts: Any) -> None:
        """The stage has come to `name` (prepare, train, export, ...)."""
        self._append("events.jsonl", {"phase": name, **facts})

    def progress(self, done: int, total: int | None, unit: str, **values: Any) -> None:
        self._append("events.jsonl", {"done": done, "total": total, "unit": unit, **values})

    def waiting(self, what: str | None, seconds: float = 0, limit: float = 0) -> None:
        """The stage has waited for `what` (`4 GPU: have 0 free of 2, can grow to 4`) of the seconds it may; None: no more."""
        facts = {"seconds": round(seconds), "limit": round(limit)} if what is not None else {}
        self._append("events.jsonl", {"waiting": what, **facts})

    def rewind(self, step: int) -> None:
        """Forget metrics and consumption after `step`: training goes on from there."""
        for file in ("metrics.jsonl", "consumed.jsonl"):
            self._keep(file, lambda entry: entry["step"] <= step)

    def _keep(self, file: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        path = self.work / file
        if path.is_file():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # torn when the power went; nothing stands after it
                if wanted(entry):
                    kept.append(line + "\n")
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(path)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        self._append("metrics.jsonl", {"step": step, **values})

    def final(self, step: int, values: dict[str, Any]) -> None:
        """Metrics after training, in place of those that an earlier attempt left when it had come as far."""
        names = {"time", "step", *values}
        self._keep("metrics.jsonl", lambda entry: entry["step"] != step or entry.keys() != names)
        self.metrics(step, values)

    def consumed(self, step: int, epoch: int, start: int, end: int, workers: int) -> None:
        """A step has trained these rows (stages/training/consumption.py)."""
        line = {"step": step, "epoch": epoch, "from": start, "to": end, "workers": workers}
        with (self.work / "consumed.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")


@dataclass
class StageContext:
    """Where a stage runs and what it was given. Made by the runner; everything in it can be pickled."""

    name: str
    work: Path  # private to this stage; becomes the published folder
    prepared: Path  # content-addressed prepared data, shared by all runs of a storage
    inputs: dict[str, list[Artifact]]  # config field -> what it refers to
    seed: int = 0
    resources: Resources = field(default_factory=Resources)
    chat_template: str | None = None  # the spec's own, where it overrides the model's
    local: bool = True  # this machine only: one CPU worker trains in the stage's own process

    @property
    def report(self) -> Reporter:
        return Reporter(self.work)

    def input(self, name: str = "model") -> Artifact:
        return self.inputs[name][0]

    @property
    def model_dir(self) -> Path:
        return self.work / "model"

    @property
    def data_dir(self) -> Path:
        return self.work / "data"


@dataclass
class StageResult:
    """What `run` returns; becomes part of the manifest."""

    metrics: dict[str, Any]
    rows: int | None = None  # rows that reached training (or evaluation)
    tokens: int | None = None  # of which trained tokens are in metrics
    steps: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stage(Config, ABC):
    """One step of the chain. Subclasses set `kind`, what they take and make, and implement `run`."""

    kind: str
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(
        default=None,
        description="Dotted paths within the stage, each with a list of values: a stage for each of their combinations.",
    )

    produces: ClassVar[ArtifactKind]
    # config field -> kinds of artifact it accepts there; a field may hold one reference or a list of them
    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {}
    uses_ray: ClassVar[bool] = True
    # keys that other tools have, in the stage or in its `train` -> what to write here
    instead: ClassVar[Mapping[str, str]] = {}
    # raised when a change of code changes what the same config makes: part of the fingerprint
    version: ClassVar[int] = 1

    @model_validator(mode="before")
    @classmethod
    def _kind_of_own(cls, data: Any) -> Any:
        """A user's own class is found by its module and name."""
        if isinstance(data, dict) and "kind" not in data and cls.model_fields["kind"].is_required():
            return data | {"kind": f"{cls.__module__}:{cls.__name__}"}
        return data

    def references(self) -> dict[str, list[str]]:
        """Field -> the models it names, as written (`stages.NAME`, a folder or a hub id)."""
        out: dict[str, list[str]] = {}
        for name in self.accepts:
            value = getattr(self, name)
            out[name] = [] if value is None else [value] if isinstance(value, str) else list(value)
        return out

    def sources(self) -> list[Any]:
        """Every data source the stage reads."""
        return list(getattr(self, "data", None) or [])

    @property
    def makes(self) -> str | None:
        """The format (stages/data/records.py) of the rows of the dataset it makes; None where it makes none."""
        return None

    def functions(self) -> list[str]:
        """Functions of the user's that decide what it makes, as `module:name`: their code is part of the fingerprint."""
        return []

    @abstractmethod
    def run(self, ctx: StageContext) -> StageResult:
        """Do the work in `ctx.work`. Raise `RaylignError` for what the user can mend."""
