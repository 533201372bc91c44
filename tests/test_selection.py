"""Which answers become rows: the best against the worst, labels, the best alone, and why a prompt gives nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.records import normalise
from stages.data.spans import Refused
from stages.selection import FORMAT, Answer, Choice, Make, choose, rows, unusable

PROMPT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "5", "weight": 0.5},
    {"role": "user", "content": "Really?"},
]


def answers(*rewards: float | None, texts: str | None = None) -> list[Answer]:
    """Answers a, b, c, ...; one without a reward did not stop."""
    texts = texts or "abcdefgh"
    return [Answer(texts[i], 2, reward is not None, reward) for i, reward in enumerate(rewards)]


def uses(result: Choice | Refused) -> dict[int, str]:
    assert isinstance(result, Choice), result
    return result.uses


def reason(result: Choice | Refused) -> str:
    assert isinstance(result, Refused), result
    return result.reason


def test_pairs_are_the_best_against_the_worst() -> None:
    assert uses(choose("pairs", answers(0.5, 2.0, -1.0, None))) == {1: "chosen", 2: "rejected"}
    assert uses(choose("pairs", answers(1.0, 3.0, 3.0, 1.0))) == {1: "chosen", 0: "rejected"}  # of equal ones the first


def test_a_pair_has_at_least_the_margin() -> None:
    assert uses(choose("pairs", answers(1.0, 1.5), margin=0.5)) == {1: "chosen", 0: "rejected"}
    found = choose("pairs", answers(1.0, 1.25), margin=0.5)
    assert reason(found) == "no_difference" and isinstance(found, Refused) and found.detail == "best 1.25, worst 1"
    assert reason(choose("pairs", answers(1.0, 1.0))) == "no_difference"


def test_the_same_text_is_never_both_sides_whatever_its_rewards() -> None:
    assert reason(choose("pairs", answers(1.0, 2.0, texts="aa"))) == "same_text"
    assert uses(choose("pairs", answers(1.0, 3.0, 2.0, texts="aab"))) == {1: "chosen", 2: "rejected"}


def test_too_few_answers_are_told_with_what_took_most_of_them() -> None:
    left = [*answers(1.0), Answer("", 1, True), Answer("x", 9, False), Answer("y", 9, False)]
    found = choose("pairs", left)
    assert isinstance(found, Refused)
    assert (found.reason, found.detail) == ("not_stopped", "not_stopped 2, empty_answer 1; 1 of 4 answers left")
    assert reason(choose("best", [Answer(" \n", 1, True)])) == "empty_answer"
    assert uses(choose("best", left)) == {0: "best"} and uses(choose("kto", left, threshold=2.0)) == {0: "unwanted"}


def test_labels_are_over_and_under_the_mean_and_equal_ones_are_left_out() -> None:
    assert uses(choose("kto", answers(0.0, 1.0, 2.0))) == {0: "unwanted", 2: "wanted"}
    assert reason(choose("kto", answers(0.1, 0.1, 0.1))) == "no_difference"  # their mean is not 0.1 to the last bit
    assert reason(choose("kto", answers(0.1, 0.1, texts="aa"))) == "same_text"


def test_a_threshold_labels_by_itself() -> None:
    assert uses(choose("kto", answers(0.5, 0.4, None), threshold=0.5)) == {0: "wanted", 1: "unwanted"}


def test_the_best_is_kept_where_it_is_good_enough() -> None:
    assert uses(choose("best", answers(0.5, 0.7, 0.7))) == {1: "best"}
    assert reason(choose("best", answers(0.5, 0.7), threshold=0.8)) == "below_threshold"
    assert uses(choose("best", answers(0.5, 0.8), threshold=0.8)) == {1: "best"}


def test_what_can_never_be_used() -> None:
    assert [unusable(*of) for of in (("a", True), ("a", False), ("", False), (" \n", True))] == [
        None, "not_stopped", "not_stopped", "empty_answer",
    ]  # fmt: skip


@given(st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), min_size=1, max_size=6), st.integers(0, 9))
def test_the_order_of_the_answers_does_not_change_what_their_rewards_are(given: list[float | None], seed: int) -> None:
    order = list(range(len(given)))
    random.Random(seed).shuffle(order)
    make: Make
    for make in ("pairs", "kto", "best"):
        one = choose(make, answers(*given))
        other = choose(make, [answers(*given)[i] for i in order])
        if isinstance(one, Refused) or isinstance(other, Refused):
            assert isinstance(one, Refused) and isinstance(other, Refused) and one.reason == other.reason
        else:
            assert sorted((use, given[i]) for i, use in one.uses.items()) == sorted(
                (use, given[order[i]]) for i, use in other.uses.items()
            )


@pytest.mark.parametrize("make", ["pairs", "kto", "best"])
def test_rows_are_read_as_the_format_they_are_told_to_have(make: Make) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    given = answers(0.25, 1.0)
    made = rows(make, PROMPT, tools, given, choose(make, given))  # type: ignore[arg-type]
    records: list[Any] = [normalise(row, FORMAT[make]) for row in made]
    assert all(record.tools == tools for record in records)
    if make == "pairs":
        assert (records[0].chosen["content"], records[0].rejected["content"]) == ("b", "a")
        assert records[0].margin == 0.75 and len(records[0].prompt) == 3
    elif make == "kto":
        assert [(record.completion["content"], record.label) for record in records] == [("a", False), ("b", True)]
    else:
        assert [m.get("train", True) for m in records[0].messages] == [True, False, True, True]
        assert records[0].messages[-1]["content"] == "b" and "weight" not in records[0].messages[1]
    assert rows(make, PROMPT, None, given, choose(make, given))[0].keys() == made[0].keys() - {"tools"}  # type: ignore[arg-type]
