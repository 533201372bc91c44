"""What is kept of a training's answers, and when it has gone wrong: limits that stop it with a reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.base import Config

SAMPLES = "samples.jsonl"


class KeptSamples:
    """Answers of some iterations, in `samples.jsonl`: {iteration, step, prompt, answer, reward, scores, stopped}."""

    def __init__(self, work: Path, every: int, prompts: int) -> None:
        self.file, self.every, self.prompts = work / SAMPLES, every, prompts

    def keep(self, iteration: int, step: int, last: bool, rows: list[dict[str, Any]]) -> None:
        """The first answers of an iteration (counted from 0) that began after `step` optimiser steps, if it is one of those
        that are kept. What a run that was interrupted had kept of it, or of later ones, is replaced."""
        if self.prompts == 0 or not (last or iteration % self.every == 0):
            return
        before = []
        if self.file.is_file():
            lines = self.file.read_text().splitlines()
            before = [line for line in lines if json.loads(line)["iteration"] < iteration]
        new = [json.dumps({"iteration": iteration, "step": step} | row) for row in rows[: self.prompts]]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in [*before, *new]))
        temporary.replace(self.file)


class Limits(Config):
    """Beyond these a training is stopped. null: never."""

    kl_per_token: float | None = Field(
        default=2.0,
        gt=0,
        description="Nats a token to the reference: beyond, answers have nothing to do with it any more.",
    )
    length_ratio: float | None = Field(
        default=3.0,
        gt=1,
        description="Answers so many times as long as in the first iteration, while fewer of them end: the "
        "reward is got by length.",
    )
    entropy: float | None = Field(
        default=1e-3, gt=0, description="Nats a token: below, the policy always says the same, and learns nothing more."
    )


LESS_STOPPED = 0.1


@dataclass
class LimitGuard:
    """Compares every iteration with the first one. Its state is kept with checkpoints.

    `kl_coef` and `ends`: what the stage calls the weight of the KL, and what it has against answers that do not end.
    """

    limits: Limits
    first: dict[str, float] = field(default_factory=dict)
    kl_coef: str = "kl_coef"
    ends: str = "missing_eos_penalty"

    def stop(self, now: dict[str, float]) -> tuple[str, bool] | None:
        """Why the training is to be stopped, and whether what it has made is of use; None while all is well.

        Args:
            now: metrics of an iteration's answers.
        """
        if not self.first:
            self.first = {k: now[k] for k in ("reward", "answer_tokens", "stopped")}
        limits, first = self.limits, self.first
        kl = now.get("kl_per_token")
        if limits.kl_per_token is not None and kl is not None and kl > limits.kl_per_token:
            return (
                f"the policy has run away from its reference: {kl:.2f} nats a token (limits.kl_per_token "
                f"{limits.kl_per_token:g}); a lower learning_rate or a higher {self.kl_coef} holds it",
                False,
            )
        longer = now["answer_tokens"] / max(first["answer_tokens"], 1e-6)
        if (
            limits.length_ratio is not None
            and longer > limits.length_ratio
            and now["stopped"] < first["stopped"] - LESS_STOPPED
        ):
            return (
                f"answers are {longer:.1f} times as long as at first ({now['answer_tokens']:.0f} tokens) and "
                f"{now['stopped']:.0%} of them end, {first['stopped']:.0%} did: the reward is got by length "
                f"(limits.length_ratio); {self.ends}, or a reward model that was trained on the policy's own answers, "
                "holds it",
                False,
            )
        entropy = now.get("entropy")
        if limits.entropy is not None and entropy is not None and entropy < limits.entropy:
            better = now["reward"] >= first["reward"]
            return (
                f"the policy always says the same: {entropy:.2g} nats of entropy a token (limits.entropy {limits.entropy:g}), "
                f"at a reward of {now['reward']:.3g} after {first['reward']:.3g} at first; entropy_coef, a lower learning_rate "
                f"or a higher {self.kl_coef} keeps it open",
                better,
            )
        return None
