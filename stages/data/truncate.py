"""Rows that are longer than `max_length`: left out, or cut so that something of them is still trained, and never unseen."""

from __future__ import annotations

from typing import Any, Literal

from stages.data.chat import IGNORE
from stages.data.spans import Refused

Truncation = Literal["refuse", "drop", "left", "right"]
CUT, STOP_CUT = "truncated", "stop_token_cut"
WARNINGS = {
    CUT: "the row is longer than max_length and was cut",
    STOP_CUT: "the row was cut in an answer, which is trained without its stop token",
}
Row = dict[str, Any]


def too_long(tokens: int, max_length: int) -> Refused:
    return Refused("too_long", f"{tokens} tokens, max_length is {max_length}")


def cut_to(row: Row, max_length: int, how: Truncation, bos: int | None) -> tuple[Row, str] | Refused:
    """A row of `input_ids`, `labels` and `weights` cut to `max_length`, and what is to be said of it.

    `left` drops the beginning but for the token that begins every text; `right` drops the end. Where that leaves
    nothing to train the row is refused, and where an answer loses its stop token that is said.
    """
    ids, labels = row["input_ids"], row["labels"]
    if how in ("refuse", "drop"):
        return too_long(len(ids), max_length)
    if how == "left":
        keep_first = bos is not None and ids[0] == bos and max_length > 1
        start = len(ids) - max_length + keep_first
        kept = {k: v and (v[:1] if keep_first else []) + v[start:] for k, v in row.items()}
        note = CUT
    else:
        kept = {k: v and v[:max_length] for k, v in row.items()}
        note = STOP_CUT if labels[max_length - 1] != IGNORE and labels[max_length] != IGNORE else CUT
    if all(label == IGNORE for label in kept["labels"][1:]):
        return Refused("nothing_trained_when_cut", f"{len(ids)} tokens cut to {max_length} from the {how}")
    return kept, note


def cut_both_answers(row: Row, max_length: int, how: Truncation, bos: int | None) -> tuple[Row, str] | Refused:
    """A prompt with one answer or two, no longer than `max_length` each way: `left` cuts the prompt, `right` the answers.

    A prompt that leaves no room for an answer is told as that, unless it is what is cut.
    """
    sides = [k for k in ("chosen_ids", "rejected_ids", "completion_ids") if k in row]
    prompt, longest = row["prompt_ids"], max(len(row[side]) for side in sides)
    if len(prompt) + longest <= max_length:
        return row, ""
    if how == "left" and (room := max_length - longest) > 0:
        keep_first = bos is not None and prompt[0] == bos and room > 1
        return row | {"prompt_ids": (prompt[:1] if keep_first else []) + prompt[len(prompt) - room + keep_first :]}, CUT
    if how != "left" and len(prompt) >= max_length:
        return Refused("prompt_too_long", f"{len(prompt)} tokens before the answers, max_length is {max_length}")
    if how != "right":
        return too_long(len(prompt) + longest, max_length)
    cut = {side: row[side][: max_length - len(prompt)] for side in sides}
    if len(sides) == 2 and cut[sides[0]] == cut[sides[1]]:
        return Refused("equal_answers", f"once cut: they differ only after {max_length} tokens")
    return row | cut, STOP_CUT
