"""Rewards: functions with TRL's signature, what they may not give, and what reward models are normalised by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages import Generate
from stages.base import Artifact
from stages.errors import StageError
from stages.own import load_for, use
from stages.rewards import Answered, RewardTerm, call_function, is_function, scorers


def answered(row: int, answer: str, **columns: Any) -> Answered:
    prompt = [{"role": "user", "content": f"question {row}"}]
    return Answered([1, 2], prompt, [3, 4], answer, "data/prompts.jsonl", row, columns.pop("expected", None), columns)


ROWS = [answered(3, "a", expected="a", level=1), answered(7, "b")]


def test_a_function_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def f(prompts: Any, completions: Any, **rest: Any) -> list[float]:
        seen.update(rest, prompts=prompts, completions=completions)
        return [1.0, 0.0]

    assert call_function(f, "m:f", ROWS) == [1.0, 0.0]
    assert seen == {
        "prompts": [[{"role": "user", "content": "question 3"}], [{"role": "user", "content": "question 7"}]],
        "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
        "completion_ids": [[3, 4], [3, 4]],
        "expected": ["a", None],
        "level": [1, None],
    }


@pytest.mark.parametrize(
    "given", [[1, True], (1.0, 1.0), np.array([1, 1]), torch.tensor([1.0, 1.0]), [np.float32(1), 1]]
)
def test_numbers_of_any_kind_are_taken(given: Any) -> None:
    assert call_function(lambda **_: given, "m:f", ROWS) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1.0], "m:f returned 1 rewards for 2 answers"),
        ([1.0, float("nan")], "m:f gave nan for prompts.jsonl, row 7 (the answer 'b'); wanted is a number"),
        (torch.tensor([1.0, torch.inf]), "m:f gave inf for prompts.jsonl, row 7"),
        ([None, 1.0], "m:f gave None for prompts.jsonl, row 3"),
        ([1.0, "good"], "m:f gave 'good' for prompts.jsonl, row 7"),
        ([[1.0], 1.0], "m:f gave a list for prompts.jsonl, row 3"),
        (1.0, "m:f returned 1.0; wanted is a list of numbers"),
        (None, "m:f returned None; wanted is a list"),
    ],
)
def test_anything_else_is_refused_with_function_row_and_value(given: Any, says: str) -> None:
    with pytest.raises(StageError) as error:
        call_function(lambda **_: given, "m:f", ROWS)
    assert says in str(error.value)


def test_a_function_that_raises_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def f(completions: Any, level: Any, **_: Any) -> list[float]:
        return [1.0 / one for one in level]

    with pytest.raises(StageError, match=r"m:f raised TypeError: .*, for 2 answers, prompts.jsonl, row 3 to prompts"):
        call_function(f, "m:f", ROWS)
    assert "1.0 / one" in capsys.readouterr().err  # where it was is in the stage's log


def test_functions_are_found_beside_the_spec(tmp_path: Path) -> None:
    use(str(tmp_path))
    (tmp_path / "rewards_of_a_test.py").write_text("def f(**_): return [1.0]\nx = 3\n")
    (tmp_path / "broken_in_a_test.py").write_text("1 / 0\n")
    assert load_for("rewards", "rewards_of_a_test:f")() == [1.0]
    for path, says in (
        ("rewards_of_a_test:g", "has no 'g'"),
        ("rewards_of_a_test:x", "wanted is a class or function"),
        ("nowhere_to_be_found:f", "No module named"),
        ("broken_in_a_test:f", "cannot be imported: ZeroDivisionError"),
    ):
        with pytest.raises(StageError, match=says):
            load_for("rewards", path)


def test_what_is_a_function_and_what_a_model() -> None:
    assert all(map(is_function, ("my_rewards:exact", "a.b.c:f")))
    assert not any(map(is_function, ("stages.reward", "org/model", "./folder", "s3://bucket/model", "model")))


def test_a_reward_stage_is_normalised_by_what_it_found() -> None:
    known = Artifact("reward", "reward model", "/r", {"metrics": {"reward_mean": 2.0, "reward_std": 4.0}})
    own = Artifact("/own", "model", "/own")
    terms = [RewardTerm(reward=r, normalize=n) for r, n in (("stages.reward", None), ("m:f", None), ("/own", None))]
    first, function, last = scorers(terms, [known, own])
    assert (first.mean, first.std, first.model) == (2.0, 4.0, "/r")
    assert function.function == "m:f" and (last.mean, last.std, last.model) == (0.0, 1.0, "/own")
    (raw,) = scorers([RewardTerm(reward="stages.reward", normalize=False)], [known])
    assert (raw.mean, raw.std) == (0.0, 1.0)
    with pytest.raises(StageError, match="/own has no reward_mean"):
        scorers([RewardTerm(reward="/own", normalize=True)], [own])


def test_terms_as_they_are_written() -> None:
    data = [{"path": "x.jsonl"}]
    stage = Generate.model_validate(
        {"data": data, "rewards": ["stages.reward", "m:f", {"reward": "org/rm", "weight": -0.5}]}
    )
    assert stage.references()["rewards"] == ["stages.reward", "org/rm"] and stage.functions() == ["m:f"]
    assert [term.weight for term in stage.rewards] == [1.0, 1.0, -0.5]
    again = Generate.model_validate(stage.model_dump(exclude_unset=True) | {"kind": "generate"})
    assert again == stage
    for wrong, says in (
        ({"reward": "m:f", "normalize": True}, "a function's rewards are taken as they are"),
        ({"reward": "m:f", "wieght": 2}, "Extra inputs"),
        (3, "valid dictionary"),
    ):
        with pytest.raises(ValidationError, match=says):
            Generate.model_validate({"data": data, "rewards": [wrong]})
