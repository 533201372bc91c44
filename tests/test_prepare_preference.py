"""Pairs, labelled answers and prompts as tokens: what a pair becomes for each stage, and why a row is left out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from stages.data.chat import CHATML, HERMES, tokenizer_spec
from stages.data.encode import Examples, Recipe, Refused, encode, encoder_for
from stages.data.ledger import LedgerEntry, check_lost, summary
from stages.data.records import Record, normalise
from stages.errors import DataError

from .conftest import chat

DIALOG = chat(random.Random(3), 2)
QUESTION, GOOD, BAD = DIALOG[:-1], DIALOG[-1]["content"], "h h h h"
PAIR = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def encoded(
    tokenizer: Any, task: Any, records: list[Record], template: str | None = None, **options: Any
) -> list[Examples | Refused]:
    recipe = Recipe(task, tokenizer_spec(tokenizer, template), **options)
    return encode(records, encoder_for(recipe), recipe)


def pair(**row: Any) -> Record:
    return normalise(PAIR | row, "preference")


def refused(result: Examples | Refused) -> str:
    assert isinstance(result, Refused), result
    return result.reason


@pytest.mark.parametrize(
    ("length", "how"), [(None, "drop"), (30, "left"), (24, "left"), (57, "right"), (56, "right"), (56, "drop")]
)
def test_a_pair_is_split_into_what_it_is_as_a_pair(tokenizer: Any, length: int | None, how: Any) -> None:
    options = {"max_length": length, "truncation": how}
    (as_pair,) = encoded(tokenizer, "preference", [pair()], **options)
    (split,) = encoded(tokenizer, "labelled", [pair()], **options)
    if isinstance(as_pair, Refused):
        assert split == as_pair and how == "drop"
        return
    (row,) = as_pair.rows
    assert isinstance(split, Examples) and (split.warnings, split.stops) == (as_pair.warnings, as_pair.stops)
    assert split.rows == [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": True},
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["rejected_ids"], "label": False},
    ]


def test_pairs_and_labelled_answers_stand_side_by_side(tokenizer: Any) -> None:
    good, bad = (
        normalise({"prompt": QUESTION, "completion": answer, "label": label}, "kto")
        for answer, label in ((GOOD, True), (BAD, False))
    )
    equal = pair(rejected=[{"role": "assistant", "content": GOOD, "name": "x"}])
    results = encoded(tokenizer, "labelled", [good, pair(), bad, equal, pair()])
    alone, split, other, same, again = results
    assert isinstance(alone, Examples) and isinstance(split, Examples) and isinstance(other, Examples)
    assert split.rows == [*alone.rows, *other.rows] and again == split
    assert refused(same) == "equal_answers"


def test_margins_stay_with_their_pairs(tokenizer: Any) -> None:
    results = encoded(tokenizer, "preference", [pair(), pair(margin=0), pair(margin=1.5)])
    assert [row["margin"] for made in results if isinstance(made, Examples) for row in made.rows] == [None, 0.0, 1.5]


# ------------------------------------------------------------------------------------------------ left out


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_without_a_token_of_its_own(tokenizer: Any, side: str) -> None:
    """`assistan` and `t` are one token, which begins in the prompt."""
    template = CHATML.replace("{{ message['role'] }}\n", "{{ message['role'][:-1] }}").replace(
        "assistant\n", "assistan"
    )
    for task in ("preference", "labelled"):
        (result,) = encoded(tokenizer, task, [pair(prompt="Hi", **{side: "t"})], template)
        assert isinstance(result, Refused) and result.reason == "empty_answer" and side in result.detail
    labelled = normalise({"prompt": "Hi", "completion": "t", "label": True}, "kto")
    assert refused(encoded(tokenizer, "labelled", [labelled], template)[0]) == "empty_answer"


def test_a_call_without_words_is_an_answer(tokenizer: Any) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    (result,) = encoded(tokenizer, "preference", [pair(chosen=[calling], tools=TOOLS)], HERMES)
    assert isinstance(result, Examples) and len(result.rows[0]["chosen_ids"]) > 2


def test_answers_that_are_equal_once_rendered_or_once_cut(tokenizer: Any) -> None:
    trimmed = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
    (rendered,) = encoded(tokenizer, "preference", [pair(rejected=GOOD + " ")], trimmed)
    assert isinstance(rendered, Refused) and rendered == Refused("equal_answers", "the same tokens once rendered")
    same_start = pair(rejected=GOOD + " and more")
    (whole,) = encoded(tokenizer, "preference", [same_start])
    assert isinstance(whole, Examples)
    length = len(whole.rows[0]["prompt_ids"]) + 2
    for task in ("preference", "labelled"):
        (cut,) = encoded(tokenizer, task, [same_start], max_length=length, truncation="right")
        assert isinstance(cut, Refused) and cut.reason == "equal_answers" and cut.detail.startswith("once cut")


def test_a_prompt_without_room_for_an_answer(tokenizer: Any) -> None:
    (whole,) = encoded(tokenizer, "preference", [pair()])
    assert isinstance(whole, Examples)
    prompt = len(whole.rows[0]["prompt_ids"])
    for how, length, reason in (("drop", prompt, "prompt_too_long"), ("drop", prompt + 1, "too_long")):
        for task in ("preference", "labelled"):
            (result,) = encoded(tokenizer, task, [pair()], max_length=length, truncation=how)
            assert refused(result) == reason
            assert str(length) in result.detail  # type: ignore[union-attr]
    (result,) = encoded(tokenizer, "preference", [pair()], max_length=prompt, truncation="right")
    assert result == Refused("prompt_too_long", f"{prompt} tokens before the answers, max_length is {prompt}")


def test_a_long_prompt_is_a_long_row_where_none_may_be() -> None:
    entries = [LedgerEntry("f", 1, "prompt_too_long", "9 tokens"), LedgerEntry("f", 2, "too_long", "8 tokens")]
    check_lost(summary(100, 98, entries), 0.5)
    with pytest.raises(
        DataError, match=r"2 of 100 rows are longer than `max_length`(.|\n)* too_long 1(.|\n)*prompt_too_long 1"
    ):
        check_lost(summary(100, 98, entries), 0.5, refuse_long=True)


def test_rows_of_another_kind_are_told_what_is_wanted(tokenizer: Any) -> None:
    (result,) = encoded(tokenizer, "labelled", [normalise({"text": "a"}, "text")])
    assert result == Refused("wrong_format", "a text where a labelled or preference is wanted")


# ------------------------------------------------------------------------------------------------ prompts

ASKING: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": QUESTION},
    "preference": PAIR,
    "kto": {"prompt": QUESTION, "completion": GOOD, "label": True},
    "messages": {"messages": DIALOG},
    "prompt_completion": {"prompt": QUESTION, "completion": GOOD},
}


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_every_record_gives_the_same_prompt(tokenizer: Any, tools: Any) -> None:
    records = [normalise(row | {"tools": tools}, format) for format, row in ASKING.items()]
    results = encoded(tokenizer, "prompt", records, HERMES)
    rows = [row for made in results if isinstance(made, Examples) for row in made.rows]
    assert len(rows) == len(ASKING) and all(row == rows[0] for row in rows)
    (row,) = [dict(rows[0])]
    assert json.loads(row["messages"]) == QUESTION
    assert (None if row["tools"] is None else json.loads(row["tools"])) == tools
    # a conversation that is made of it begins with the prompt that was sampled from
    made = {"messages": [*json.loads(row["messages"]), DIALOG[-1]], "tools": row["tools"]}
    (conversation,) = encoded(tokenizer, "conversation", [normalise(made, "messages")], HERMES)
    assert isinstance(conversation, Examples)
    assert conversation.rows[0]["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]


def test_what_stands_beside_a_prompt_is_kept(tokenizer: Any) -> None:
    asked = normalise({"prompt": "2+2?", "expected": "4", "level": 2}, "prompt")
    weighted = [{**QUESTION[0]}, {**QUESTION[1]}, {**QUESTION[2], "weight": 0.5, "train": False}, QUESTION[3]]
    one, other = encoded(tokenizer, "prompt", [asked, normalise({"messages": weighted, "expected": "x"}, "messages")])
    assert isinstance(one, Examples) and isinstance(other, Examples)
    assert json.loads(one.rows[0]["columns"]) == {"level": 2} and one.rows[0]["expected"] == "4"
    assert json.loads(other.rows[0]["messages"]) == QUESTION and other.rows[0]["expected"] == "x"


def test_what_is_no_question(tokenizer: Any) -> None:
    continued = pair(prompt=DIALOG)
    alone = normalise({"messages": DIALOG[2:3]}, "messages")
    assert list(map(refused, encoded(tokenizer, "prompt", [continued, alone]))) == ["ends_with_answer", "no_prompt"]
