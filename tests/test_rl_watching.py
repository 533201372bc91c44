"""Samples that are kept of a training, and limits that stop it with a reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.rl.watching import SAMPLES, KeptSamples, LimitGuard, Limits

FIRST = {"reward": 1.0, "answer_tokens": 10.0, "stopped": 0.9, "kl_per_token": 0.0, "entropy": 2.0}


def rows(iteration: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt\u2028{i}", "answer": f"answer\n{iteration}.{i}", "reward": i / 2} for i in range(5)]


def kept_in(folder: Path) -> list[tuple[int, int, str]]:
    with (folder / SAMPLES).open() as lines:
        return [(row["iteration"], row["step"], row["answer"]) for row in map(json.loads, lines)]


def keep_all(kept: KeptSamples, first: int, last: int) -> None:
    """Iterations of 4 steps, of which `last` is the training's last one."""
    for iteration in range(first, last + 1):
        kept.keep(iteration, 4 * iteration, iteration == last, rows(iteration))


# ------------------------------------------------------------------------------------------------ samples


def test_the_first_answers_of_every_so_many_iterations_and_of_the_last_are_kept(tmp_path: Path) -> None:
    keep_all(KeptSamples(tmp_path, every=3, prompts=2), 0, 7)
    assert kept_in(tmp_path) == [(i, 4 * i, f"answer\n{i}.{n}") for i in (0, 3, 6, 7) for n in range(2)]
    with (tmp_path / SAMPLES).open() as lines:
        assert json.loads(next(lines)) == {"iteration": 0, "step": 0} | rows(0)[0]


def test_more_prompts_than_an_iteration_has_are_all_of_them_and_none_are_no_file(tmp_path: Path) -> None:
    keep_all(KeptSamples(tmp_path, every=1, prompts=8), 0, 0)
    assert len(kept_in(tmp_path)) == 5
    keep_all(KeptSamples(tmp_path / "none", every=1, prompts=0), 0, 3)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("goes_on_at", [2, 3, 4, 6])
def test_a_run_that_goes_on_keeps_what_an_uninterrupted_one_does(tmp_path: Path, goes_on_at: int) -> None:
    """Interrupted in iteration 6, whose samples it had written; its checkpoint is of an earlier one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    keep_all(KeptSamples(whole, every=3, prompts=2), 0, 8)
    interrupted = KeptSamples(cut, every=3, prompts=2)
    for iteration in range(7):
        interrupted.keep(iteration, 4 * iteration, False, rows(iteration))
    keep_all(KeptSamples(cut, every=3, prompts=2), goes_on_at, 8)
    assert kept_in(cut) == kept_in(whole)


# ------------------------------------------------------------------------------------------------ limits


def stopped(limits: Limits, *later: dict[str, float]) -> tuple[str, bool] | None:
    """What the guard says of the last of these iterations; of the others it has to say nothing."""
    guard = LimitGuard(limits)
    *before, now = [FIRST, *(FIRST | each for each in later)]
    assert [guard.stop(each) for each in before] == [None] * len(before)
    return guard.stop(now)


RUNAWAY = {"kl_per_token": 2.5}
LENGTH = {"answer_tokens": 31.0, "stopped": 0.7}
SAME = {"entropy": 1e-4}


@pytest.mark.parametrize(
    ("name", "now", "says"),
    [
        ("kl_per_token", RUNAWAY, "run away from its reference: 2.50 nats a token (limits.kl_per_token 2)"),
        ("length_ratio", LENGTH, "3.1 times as long as at first (31 tokens) and 70% of them end, 90% did"),
        ("entropy", SAME, "0.0001 nats of entropy a token (limits.entropy 0.001), at a reward of 1 after 1 at first"),
    ],
)
def test_each_limit_stops_with_its_reason_and_null_turns_it_off(name: str, now: dict[str, float], says: str) -> None:
    found = stopped(Limits(), {}, now)
    assert found is not None and says in found[0] and f"limits.{name}" in found[0]
    assert stopped(Limits(**{name: None}), {}, now) is None
    others = {other: None for other in ("kl_per_token", "length_ratio", "entropy") if other != name}
    assert stopped(Limits(**others), {}, now) == found


def test_what_was_made_is_of_use_only_where_the_reward_is_no_lower_for_it() -> None:
    for now in (RUNAWAY, LENGTH):
        found = stopped(Limits(), now | {"reward": 99.0})
        assert found is not None and not found[1]
    for reward, useful in ((0.9, False), (1.0, True), (3.0, True)):
        found = stopped(Limits(), SAME | {"reward": reward})
        assert found is not None and found[1] == useful


@pytest.mark.parametrize(
    "now",
    [
        {"kl_per_token": 1.99},
        {"kl_per_token": -3.0},  # of few answers k1 may be negative
        {"answer_tokens": 29.0, "stopped": 0.1},  # they do not end, but are no longer
        {"answer_tokens": 90.0, "stopped": 0.85},  # longer, and they end
        {"answer_tokens": 1.0, "stopped": 0.0},
        {"entropy": 2e-3},
    ],
)
def test_what_is_within_the_limits_goes_on(now: dict[str, float]) -> None:
    assert stopped(Limits(), now) is None


def test_limits_that_are_set_are_those_that_hold() -> None:
    assert stopped(Limits(kl_per_token=0.1), {"kl_per_token": 0.11}) is not None
    assert stopped(Limits(length_ratio=1.5), {"answer_tokens": 16.0, "stopped": 0.7}) is not None
    assert stopped(Limits(entropy=1.0), {"entropy": 0.9}) is not None
    for wrong in ({"kl_per_token": 0}, {"length_ratio": 1}, {"entropy": -1}, {"kl": 1.0}):
        with pytest.raises(ValidationError):
            Limits.model_validate(wrong)


def test_without_a_reference_or_an_entropy_their_limits_say_nothing() -> None:
    guard = LimitGuard(Limits())
    bare = {k: v for k, v in FIRST.items() if k not in ("kl_per_token", "entropy")}
    assert guard.stop(bare) is None and guard.stop(bare) is None
    assert guard.stop(bare | LENGTH) is not None


def test_the_first_iteration_is_judged_too_and_remembered_as_a_checkpoint_has_it() -> None:
    assert LimitGuard(Limits()).stop(FIRST | SAME) is not None
    guard = LimitGuard(Limits())
    guard.stop(FIRST)
    assert guard.first == {"reward": 1.0, "answer_tokens": 10.0, "stopped": 0.9}
    again = LimitGuard(Limits())
    again.first = json.loads(json.dumps(asdict(guard)["first"]))
    assert again.stop(FIRST | LENGTH) == guard.stop(FIRST | LENGTH) is not None
