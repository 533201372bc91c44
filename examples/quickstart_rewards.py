"""What an answer of the quickstart's task is worth, as functions that a spec names: ``rewards: [quickstart_rewards:exact]``."""

from typing import Any


def exact(completions: list[list[dict[str, str]]], expected: list[str | None], **_: Any) -> list[float]:
    """1 for the right answer, else 0: what a person who compares answers goes by, and what can be verified by a program."""
    return [float(answer[0]["content"].strip() == right) for answer, right in zip(completions, expected, strict=True)]
