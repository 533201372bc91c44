"""`Pipeline`: the same chain from Python. A spec file and a `Pipeline` make the same objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plan import Plan, make_plan
from pipeline.spec import Spec
from pipeline.spec_checks import build_spec
from pipeline.spec_reader import load_spec
from stages import Stage
from stages.storage import pull


@dataclass(frozen=True)
class StageOutcome:
    """What a stage of a finished run made: `model` is a plain Hugging Face folder, `data` a folder of JSON Lines."""

    name: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def model(self) -> Path | None:
        path = pull(self.folder / "model")
        return path if path.is_dir() else None

    @property
    def data(self) -> Path | None:
        path = pull(self.folder / "data")
        return path if path.is_dir() else None


class Pipeline:
    """A chain of stages.

    Args:
        model: a hub id, a folder, or `{"init": {...}}` for a fresh small model.
        stages: name -> stage, or the same as plain data.
        settings: `name`, `storage`, `seed`, `cluster`, `chat_template`, as in a spec.

    Raises:
        SpecError: with every mistake.
    """

    def __init__(
        self, *, model: str | dict[str, Any], stages: Mapping[str, Stage | dict[str, Any]], **settings: Any
    ) -> None:
        plain = {
            name: stage.model_dump(exclude_unset=True) | {"kind": stage.kind}
            if isinstance(stage, Stage)
            else dict(stage)
            for name, stage in stages.items()
        }
        self.spec: Spec = build_spec({"model": model, "stages": plain, **settings}, folder=Path.cwd())

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
        """The pipeline of a spec file; `overrides` are those of `--set`."""
        pipeline = cls.__new__(cls)
        pipeline.spec = load_spec(path, overrides)
        return pipeline

    def plan(self) -> Plan:
        return make_plan(self.spec)

    def run(self, quiet: bool = False) -> dict[str, StageOutcome]:
        """Carry the pipeline out, going on where an earlier run of it stopped.

        Raises:
            StageError: a stage or a gate failed; what was done stays in place.
        """
        from pipeline.runner import run_plan

        plan = self.plan()
        run_plan(plan, quiet=quiet)
        return {
            s.name: StageOutcome(s.name, plan.folder.stage(s.name), plan.folder.manifest(s.name) or {})
            for s in plan.stages
        }
