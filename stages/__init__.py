"""The stages of a pipeline: their configs are what a spec is made of, and what `pipeline.Pipeline` takes from Python."""

from __future__ import annotations

from stages.base import Artifact, Stage, StageContext, StageResult
from stages.dpo import DPO
from stages.evaluate import Evaluate
from stages.init import Init
from stages.reward import Reward
from stages.sft import SFT

KINDS: dict[str, type[Stage]] = {"init": Init, "sft": SFT, "reward": Reward, "dpo": DPO, "evaluate": Evaluate}

__all__ = [
    "DPO",
    "KINDS",
    "SFT",
    "Artifact",
    "Evaluate",
    "Init",
    "Reward",
    "Stage",
    "StageContext",
    "StageResult",
]
