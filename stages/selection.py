"""Which of a prompt's answers become rows, by their rewards: pure functions.

`pairs`  the best answer against the worst
`kto`    each answer with a label: whether it is wanted
`best`   the best answer as a conversation: rejection sampling

A prompt that gives nothing is told with its reason: `not_stopped` and `empty_answer` (these left too few answers),
`same_text`, `no_difference`, `below_threshold`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.data.messages import Message
from stages.data.spans import Refused

Make = Literal["pairs", "kto", "best"]
FORMAT: dict[Make, str] = {"pairs": "preference", "kto": "kto", "best": "messages"}  # of the rows, see data/records.py


@dataclass(frozen=True)
class Answer:
    """A sampled answer. `reward` is None where it cannot be used (`unusable`), and so was not scored."""

    text: str
    tokens: int  # its stop token included
    stopped: bool
    reward: float | None = None


def unusable(text: str, stopped: bool) -> str | None:
    """Why an answer is left out whatever it is worth, or None."""
    if not stopped:
        return "not_stopped"
    return None if text.strip() else "empty_answer"


@dataclass(frozen=True)
class Choice:
    """Index of an answer -> what it is used as: chosen, rejected; wanted, unwanted; best."""

    uses: dict[int, str]

    def of(self, use: str) -> list[int]:
        return [i for i, used in self.uses.items() if used == use]


def choose(
    make: Make, answers: Sequence[Answer], margin: float = 0.0, threshold: float | None = None
) -> Choice | Refused:
    """What the answers of one prompt are used as, or why none of them is.

    Args:
        margin: of pairs, the least difference in reward.
        threshold: of kto, the least reward of a wanted answer (by default one over the mean of the prompt's answers is
            wanted, one under it is not, and one that equals it is left out); of best, the least reward of one that is kept.
    """
    usable = {i: answer.reward for i, answer in enumerate(answers) if answer.reward is not None}
    needed = 1 if make == "best" or (make == "kto" and threshold is not None) else 2
    if len(usable) < needed:
        lost = Counter(filter(None, (unusable(answer.text, answer.stopped) for answer in answers)))
        (reason, _), *_ = lost.most_common() or [("not_stopped", 0)]
        return Refused(reason, f"{_count(lost)}; {len(usable)} of {len(answers)} answers left")
    best = max(usable, key=usable.__getitem__)  # of equal ones the first
    if make == "best":
        if threshold is not None and usable[best] < threshold:
            return Refused("below_threshold", f"the best of {len(usable)} answers has {usable[best]:.6g}")
        return Choice({best: "best"})
    if make == "kto" and threshold is not None:
        return Choice({i: "wanted" if reward >= threshold else "unwanted" for i, reward in usable.items()})
    others = [i for i in usable if answers[i].text != answers[best].text]
    if not others:
        return Refused("same_text", f"{len(usable)} times {answers[best].text[:80]!r}")
    if make == "kto":
        mean = sum(usable.values()) / len(usable)
        apart = {
            i: reward for i, reward in usable.items() if not math.isclose(reward, mean, rel_tol=1e-9, abs_tol=1e-12)
        }
        if not apart:
            return Refused("no_difference", f"{len(usable)} answers have {mean:.6g}")
        return Choice({i: "wanted" if reward > mean else "unwanted" for i, reward in apart.items()})
    worst = min(others, key=usable.__getitem__)
    difference = usable[best] - usable[worst]
    if difference <= 0 or difference < margin:
        return Refused("no_difference", f"best {usable[best]:.6g}, worst {usable[worst]:.6g}")
    return Choice({best: "chosen", worst: "rejected"})


def _count(lost: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in lost.most_common())


def rows(
    make: Make, prompt: Sequence[Message], tools: Any, answers: Sequence[Answer], choice: Choice
) -> list[dict[str, Any]]:
    """The rows of a prompt's choice, in the format that `FORMAT` names."""
    offered = {"tools": tools} if tools else {}
    said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
    before = list(prompt)
    if make == "pairs":
        (chosen,), (rejected,) = choice.of("chosen"), choice.of("rejected")
        margin = (answers[chosen].reward or 0.0) - (answers[rejected].reward or 0.0)
        return [{"prompt": before, "chosen": said[chosen], "rejected": said[rejected], "margin": margin} | offered]
    if make == "kto":
        return [
            {"prompt": before, "completion": said[i], "label": use == "wanted"} | offered
            for i, use in choice.uses.items()
        ]
    (best,) = choice.of("best")
    return [{"messages": [*map(_untrained, before), *said[best]]} | offered]


def _untrained(message: Message) -> Message:
    """An answer of the prompt's: the sampled one alone is trained."""
    if message["role"] != "assistant":
        return message
    return {k: v for k, v in message.items() if k != "weight"} | {"train": False}
