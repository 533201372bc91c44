"""`raylign inspect`: real rows of every stage as the model will see them, what is trained of them, and what is left out.

Reads through the same functions that prepare the data, so what is shown is what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from pipeline.inspection.examples import Example
from pipeline.inspection.looking import Look, Part, Stats, look
from pipeline.plan import Plan, PlannedStage, with_made_data
from stages import Generate
from stages.data.chat import CHATML
from stages.data.source import resolve_formats
from stages.data.tokenizer import load_tokenizer
from stages.errors import Problem, SpecError
from stages.evaluate import Evaluate
from stages.init import train_tokenizer
from stages.training.stage import TrainStage

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What was seen of one stage's data, or of the pairs or the conversations of an evaluation."""

    stage: str
    kind: str
    look: Look

    @property
    def rows(self) -> list[list[Example]]:
        return self.look.rows

    @property
    def stats(self) -> Stats:
        return self.look.stats

    @property
    def verb(self) -> str:
        """What happens to the tokens that are marked."""
        return "trained" if self.kind != "evaluate" else "scored"

    def as_json(self) -> dict[str, Any]:
        """The contract of `inspect --json`, and what is known beside it."""
        rows = [example.as_json() for row in self.rows for example in row]
        return {"stage": self.stage, "rows": rows, "ledger": self.stats.ledger["reasons"], "stats": asdict(self.stats)}


def as_json(inspections: list[Inspection]) -> dict[str, Any]:
    """The first as the contract has it; where there are more, they are its `others`."""
    first, *others = [inspection.as_json() for inspection in inspections]
    return first | ({"others": others} if others else {})


def inspect(plan: Plan, stage: str | None, n: int) -> list[Inspection]:
    """A look at the data of a stage, or of every stage whose data is there where none is named: stages that train first, in
    the plan's order.

    Args:
        n: rows to show of each.

    Raises:
        SpecError: no such stage, or its data is yet to be made by another.
    """
    load = cache(lambda origin: _tokenizer(plan, origin))
    seen: dict[str, Look] = {}  # stages that make the same of the same data are looked at once
    out: list[Inspection] = []
    chosen = _chosen(plan, stage)
    ready = [replace(s, stage=made) for s in chosen if (made := with_made_data(plan, s.stage)) is not None]
    if not ready:
        makers = ", ".join(ref for s in chosen for ref in s.inputs.get("data", []))
        raise SpecError([Problem(f"stages.{chosen[0].name}", f"its data is made by {makers}, which has not run yet")])
    for planned in ready:
        (model, *_), *_ = planned.inputs.values()
        for part in _parts(planned, load(origin(plan, model)), plan.spec.seed):
            key = repr((part.recipe, part.sources, part.max_dropped))
            if key not in seen:
                seen[key] = look(part, n)
            out.append(Inspection(planned.name, planned.stage.kind, seen[key]))
    return out


def _chosen(plan: Plan, stage: str | None) -> list[PlannedStage]:
    reads = [s for s in plan.stages if isinstance(s.stage, TrainStage | Evaluate | Generate)]
    if not reads:
        raise SpecError([Problem("stages", "no stage of this spec reads data, so there is nothing to inspect")])
    if stage is None:
        return sorted(reads, key=lambda s: not isinstance(s.stage, TrainStage))
    found = [s for s in reads if s.name == stage]
    if not found:
        names = ", ".join(s.name for s in reads)
        raise SpecError([Problem(f"--stage {stage}", f"no such stage with data; there are: {names}")])
    return found


def _parts(planned: PlannedStage, tokenizer: Any, seed: int) -> Iterator[Part]:
    """The data that a stage prepares: all of it at once, or what an evaluation prepares for each of its measures."""
    stage: Any = planned.stage
    formats = resolve_formats(stage.data)
    if isinstance(stage, TrainStage):
        recipe = stage.recipe(tokenizer, seed)
        yield Part(recipe, stage.data, formats, stage.max_dropped, refuse_long=stage.truncation == "refuse")
        return
    if isinstance(stage, Generate):
        yield Part(stage.recipe(tokenizer), stage.data, formats, stage.max_dropped)
        return
    by_format = list(zip(stage.data, formats, strict=True))
    for task in ("evaluation", "preference"):
        mine = [(s, f) for s, f in by_format if (f == "preference") == (task == "preference")]
        if mine:
            recipe = stage.recipe(task, tokenizer)
            yield Part(recipe, [s for s, _ in mine], [f for _, f in mine], stage.max_dropped)


def origin(plan: Plan, model: str) -> str:
    """Where a model's tokenizer comes from, whether or not the stages before have run: they all hand on that of the base."""
    while model.startswith("stages."):
        made = plan[model.removeprefix("stages.")]
        if published := plan.folder.find(made.name, made.fingerprint):
            return str(published / "model")
        if made.stage.kind == "init":
            break
        model = made.inputs["model"][0]
    return model


def _tokenizer(plan: Plan, origin: str) -> Any:
    if not origin.startswith("stages."):
        return load_tokenizer(origin, plan.spec.template)
    config: Any = plan[origin.removeprefix("stages.")].stage
    return train_tokenizer(config.data, config.tokenizer.vocab_size, plan.spec.template or CHATML)
