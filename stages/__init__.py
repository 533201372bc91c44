"""The stages of a pipeline: their configs are what a spec is made of, and what `pipeline.Pipeline` takes from Python."""

from __future__ import annotations

from stages import telemetry  # noqa: F401 - turned off before a library is imported
from stages.base import Artifact, Stage, StageContext, StageResult
from stages.dpo import DPO
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
]
