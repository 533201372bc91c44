"""The stages of a pipeline: their configs are what a spec is made of, and what `pipeline.Pipeline` takes from Python."""

from __future__ import annotations

from typing import Any

from stages import (
    own,
    telemetry,  # noqa: F401 - turned off before a library is imported
)
from stages.base import Artifact, Stage, StageContext, StageResult
from stages.dpo import DPO
from stages.errors import StageError, nearest
from stages.evaluate import Evaluate
from stages.generate import Generate
from stages.grpo import GRPO
from stages.init import Init
from stages.kto import KTO
from stages.ppo import PPO
from stages.reward import Reward
from stages.rloo import RLOO
from stages.sft import SFT

KINDS: dict[str, type[Stage]] = {
    "init": Init,
    "sft": SFT,
    "reward": Reward,
    "dpo": DPO,
    "kto": KTO,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "generate": Generate,
    "evaluate": Evaluate,
}


def stage_class(kind: Any) -> type[Stage] | None:
    """The class of a kind of stage, or of a user's own stage as `module:Class`; None where there is none."""
    if own.is_named(kind):
        return None if kind_problem(kind) else own.load(kind)  # type: ignore[return-value]
    return KINDS.get(kind) if isinstance(kind, str) else None


def kind_problem(kind: Any) -> str | None:
    """What is wrong with a `kind`."""
    kinds = f"kinds: {', '.join(KINDS)}, or a class of yours as module:Class"
    if kind is None:
        return f"kind is missing; {kinds}"
    if not own.is_named(kind):
        return (
            None
            if kind in list(KINDS)
            else f"kind {kind!r} is not a kind of stage{nearest(str(kind), list(KINDS))}; {kinds}"
        )
    try:
        found = own.load_for("kind", kind)
    except StageError as error:
        return str(error)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        return f"kind: {kind} is no class that inherits from stages.Stage"
    lacking = [
        name
        for name in ("produces", "run")
        if name in getattr(found, "__abstractmethods__", ()) or not hasattr(found, name)
    ]
    return f"kind: {kind} lacks {' and '.join(lacking)}" if lacking else None


__all__ = [
    "DPO",
    "GRPO",
    "KINDS",
    "KTO",
    "PPO",
    "RLOO",
    "SFT",
    "Artifact",
    "Evaluate",
    "Generate",
    "Init",
    "Reward",
    "Stage",
    "StageContext",
    "StageResult",
    "kind_problem",
    "stage_class",
]
