"""What is told of a policy that goes astray, and of a reward that is not what it seems."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.reward import other_answers, reward_facts, reward_warnings
from stages.training.drift import drift_warnings, first_prompts, share

HEALTHY = {"chosen_ratio": 0.1, "samples/length_ratio": 1.2, "samples/tokens": 40.0, "samples/stopped": 0.9}


def test_a_healthy_training_is_not_warned_of() -> None:
    assert drift_warnings(HEALTHY, 1.0) == [] and drift_warnings({}, 0.0) == []


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"chosen_ratio": -0.8}, "less likely by 0.80 nats a token"),
        ({"samples/length_ratio": 2.5}, "2.5 times as long"),
        ({"samples/length_ratio": 0.3}, "0.3 times as long"),
        ({"samples/stopped": 0.5}, "50% of sampled answers end by themselves, 100% of the reference's did"),
    ],
)
def test_what_goes_wrong_is_told(told: dict[str, float], says: str) -> None:
    (warning,) = drift_warnings(HEALTHY | told, 1.0)
    assert says in warning


def test_shares_are_next_to_each_other_and_whole() -> None:
    for count in (0, 1, 7, 32):
        for workers in (1, 2, 3, 40):
            everything = [i for rank in range(workers) for i in range(count)[share(count, rank, workers)]]
            assert everything == list(range(count))


def test_prompts_are_taken_once_over_row_groups(tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt_ids": [[1], [1], [2], [3], [2], [4]]}), file, row_group_size=2)
    groups = [(file, group, 2) for group in range(3)]
    assert first_prompts(groups, 3) == [[1], [2], [3]] and first_prompts(groups, 9) == [[1], [2], [3], [4]]


def row(chosen: int, rejected: int, prompt: int = 0) -> dict[str, list[int]]:
    return {"prompt_ids": [prompt], "chosen_ids": [1] * chosen, "rejected_ids": [1] * rejected}


def test_a_reward_that_is_length_is_told_from_one_that_is_not() -> None:
    rows = [row(3, 9, 1), row(9, 2, 2), row(5, 6, 3), row(8, 1, 4)]
    length = [[len(r["chosen_ids"]), len(r["rejected_ids"]), 0.0] for r in rows]
    facts = reward_facts(length, rows, held_out=True)
    assert facts["length_correlation"] == pytest.approx(1.0) and facts["accuracy"] == 0.5
    assert facts["judged_pairs"] == 4 and facts["judged_held_out"] == 1
    (warning,) = reward_warnings(facts)
    assert "goes with the length of answers (correlation 1.00" in warning
    good = reward_facts([[1.0, -1.0, -2.0], [1.1, -1.0, 0.0], [0.9, -1.2, 0.1], [1.0, -0.9, 0.2]], rows, held_out=False)
    assert good["accuracy"] == good["other_prompt_accuracy"] == 1.0 and reward_warnings(good) == []


def test_a_reward_that_does_not_read_the_prompt_is_told() -> None:
    rows = [row(3, 3, prompt) for prompt in range(4)]
    facts = reward_facts([[1.0, 0.0, 1.5], [1.0, 0.0, 0.5], [1.0, 0.2, 1.5], [1.0, 0.1, 2.0]], rows, held_out=True)
    assert facts["other_prompt_accuracy"] == 0.25
    (warning,) = reward_warnings(facts)
    assert "only 25% of chosen answers are scored above one to another prompt" in warning


def test_answers_to_other_prompts_are_that() -> None:
    rows = [row(1, 9, 1), row(2, 9, 1), row(3, 9, 2), row(4, 9, 2)]
    assert [len(answer) for answer in other_answers(rows)] == [3, 3, 1, 1]
    facts = reward_facts(
        [[1.0, 0.0, 1.0]] * 2, [row(1, 2, 7)] * 2, held_out=False
    )  # one prompt: nothing to compare with
    assert "other_prompt_accuracy" not in facts and not any("prompt" in said for said in reward_warnings(facts))
