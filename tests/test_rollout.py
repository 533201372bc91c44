"""What is learned from an iteration's answers, the batches they are trained in, and steps counted in iterations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.iterations import Iterations
from stages.rl.rollout import (
    TOKENS,
    Episode,
    Rollout,
    Rollouts,
    make_rollout,
    micro_batches,
    mini_batches,
    rollout_collator,
)
from stages.rl.settings import PPOSettings
from stages.training.answers import answer_collator
from stages.training.feed import Feed, Position, Shares
from stages.training.job import PLACEHOLDERS
from stages.training.meter import Meter

PLACEHOLDER = PLACEHOLDERS["prompt"]


def single(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


# ------------------------------------------------------------------------------------------------ of answers to a rollout

# Halves and quarters, which float32 has exactly.
FIRST = Episode(
    [1, 2], [10, 11, 2], True, "ten eleven", logps=single(-1.0, -0.5, -0.25), ref_logps=single(-1.5, -0.25, -0.75),
    values=single(0.5, 0.25, 1.0), entropy=1.5, scores=[2.0, 1.0],
)  # fmt: skip
SECOND = Episode(
    [3], [12], False, "twelve", logps=single(-2.0), ref_logps=single(-3.0), values=single(-0.5), entropy=0.5,
    scores=[-1.0, 3.0],
)  # fmt: skip
NAMES, WEIGHTS = ("helpful", "short"), (1.0, -0.5)  # rewards 2 - 0.5 = 1.5 and -1 - 1.5 = -2.5


def settings(**changed: Any) -> PPOSettings:
    plain = {"gamma": 1.0, "lam": 0.5, "whiten_advantages": False}
    return PPOSettings(**(plain | changed))


def rolled(*episodes: Episode, beta: float = 0.5, **changed: Any) -> Rollout:
    return make_rollout(episodes, settings(**changed), names=NAMES, weights=WEIGHTS, beta=beta)


def test_a_rollout_by_hand() -> None:
    """k of the first answer: 0.5, -0.25, 0.5; its rewards -0.25, 0.125, 1.5 - 0.25 = 1.25;
    deltas 1.25 - 1 = 0.25, 0.125 + 1 - 0.25 = 0.875, -0.25 + 0.25 - 0.5 = -0.5; with lambda 1/2 from the end
    0.25, 0.875 + 0.125 = 1, -0.5 + 0.5 = 0. Of the second: k 1, reward -2.5 - 0.5 = -3, delta -3 + 0.5 = -2.5."""
    got = rolled(FIRST, SECOND)
    one, two = got.rows
    assert one["prompt_ids"] == [1, 2] and one["completion_ids"] == [10, 11, 2] and two["completion_ids"] == [12]
    assert one["advantages"].tolist() == [0.0, 1.0, 0.25] and two["advantages"].tolist() == [-2.5]
    assert one["returns"].tolist() == [0.5, 1.25, 1.25] and two["returns"].tolist() == [-3.0]
    assert one["old_logps"].tolist() == [-1.0, -0.5, -0.25] and two["old_values"].tolist() == [-0.5]
    assert all(row[name].dtype == np.float32 for row in got.rows for name in TOKENS)
    assert got.rewards.tolist() == [1.5, -2.5]
    g, v = [0.5, 1.25, 1.25, -3.0], [0.5, 0.25, 1.0, -0.5]
    assert got.metrics == pytest.approx(
        {
            "reward": -0.5, "reward_std": 2.0, "rewards/helpful": 0.5, "rewards/short": 2.0, "answer_tokens": 2.0,
            "entropy": (3 * 1.5 + 0.5) / 4, "stopped": 0.5, "advantage_std": float(np.std([0, 1, 0.25, -2.5])),
            "value": sum(v) / 4, "return": sum(g) / 4, "explained_variance": 1 - float(np.var(np.subtract(g, v)) / np.var(g)),
            "kl": (0.75 + 1.0) / 2, "kl_per_token": 1.75 / 4, "rlhf_reward": (1.5 - 0.375 - 2.5 - 0.5) / 2,
        }
    )  # fmt: skip
    assert all(type(value) is float for value in got.metrics.values())  # they go into JSON


def test_an_answer_that_does_not_end_loses_what_was_said() -> None:
    got, plain = rolled(FIRST, SECOND, missing_eos_penalty=1.0), rolled(FIRST, SECOND)
    assert got.rows[0]["returns"].tolist() == plain.rows[0]["returns"].tolist()
    assert got.rows[1]["returns"].tolist() == [-4.0] and got.rows[1]["advantages"].tolist() == [-3.5]
    # What the rewards say is told without it.
    assert got.rewards.tolist() == [1.5, -2.5] and got.metrics["reward"] == -0.5
    assert got.metrics["rlhf_reward"] == plain.metrics["rlhf_reward"] - 0.5


def test_the_other_estimator_of_the_kl_changes_the_rewards_and_not_what_is_told_of_it() -> None:
    got = rolled(SECOND, kl_estimator="k3")
    assert got.rows[0]["returns"][0] == pytest.approx(-2.5 - 0.5 * (math.exp(-1) - 1 + 1))
    assert got.metrics["kl"] == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_without_a_reference_there_is_no_penalty_and_nothing_is_told_of_one(beta: float) -> None:
    alone = [Episode(**{**vars(e), "ref_logps": None}) for e in (FIRST, SECOND)]
    got = rolled(*alone, beta=beta)
    free = rolled(FIRST, SECOND, beta=0.0)
    for one, other in zip(got.rows, free.rows, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in TOKENS)
    assert not got.metrics.keys() & {"kl", "kl_per_token", "rlhf_reward"}


def test_advantages_are_whitened_over_all_answers_and_returns_are_not() -> None:
    plain, got = rolled(FIRST, SECOND), rolled(FIRST, SECOND, whiten_advantages=True)
    before, after = (np.concatenate([row["advantages"] for row in x.rows]) for x in (plain, got))
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), rtol=1e-6)
    assert [row["returns"].tolist() for row in got.rows] == [row["returns"].tolist() for row in plain.rows]
    assert got.metrics == plain.metrics


def test_rewards_are_whitened_before_anything_is_made_of_them() -> None:
    """With lambda 1 the returns are the sums of what is to come (Huang et al. 2024, detail 23: the mean stays)."""
    got = rolled(FIRST, SECOND, whiten_rewards=True, lam=1.0)
    each = np.array([-0.25, 0.125, 1.25, -3.0])
    white = (each - each.mean()) / each.std() + each.mean()
    np.testing.assert_allclose(got.rows[0]["returns"], [white[:3].sum(), white[1:3].sum(), white[2]], rtol=1e-5)
    np.testing.assert_allclose(got.rows[1]["returns"], white[3:], rtol=1e-5)


def test_an_iteration_of_one_token_is_one_too() -> None:
    got = rolled(SECOND, whiten_advantages=True, whiten_rewards=True)
    assert got.rows[0]["advantages"].tolist() == [-2.5]
    assert all(math.isfinite(value) for value in got.metrics.values())


# ------------------------------------------------------------------------------------------------ batches


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_an_epochs_mini_batches_have_every_answer_once(count: int, parts: int, seed: int) -> None:
    got = mini_batches(count, parts, (seed, 1, 2))
    assert len(got) == parts and sorted(np.concatenate(got).tolist()) == list(range(count))
    sizes = [len(part) for part in got]
    assert max(sizes) - min(sizes) <= 1
    again = mini_batches(count, parts, (seed, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))


def test_every_epoch_over_an_iterations_answers_cuts_them_in_another_way() -> None:
    orders = {tuple(np.concatenate(mini_batches(16, 4, key)).tolist()) for key in itertools.product(range(3), repeat=3)}
    assert len(orders) == 27


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_a_mini_batch_is_the_same_however_it_is_shared(lengths: list[int], workers: int, accumulation: int) -> None:
    rows = [{"prompt_ids": [1] * (i % 5), "completion_ids": [2] * n, "number": i} for i, n in enumerate(lengths)]
    shared = [micro_batches(rows, rank, workers, accumulation) for rank in range(workers)]
    assert all(len(each) == accumulation for each in shared)  # as many backward passes on every worker
    found = [row["number"] for each in shared for part in each for row in part]
    assert sorted(found) == list(range(len(rows)))
    most = -(-len(rows) // workers)
    assert all(len(part) <= -(-most // accumulation) for each in shared for part in each)
    for each in shared:  # rows of like length together
        sizes = [len(row["prompt_ids"]) + len(row["completion_ids"]) for part in each for row in part]
        assert sizes == sorted(sizes)


def tagged(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows whose numbers say which token they belong to: 100 row + place, plus a quarter for each column."""
    rows = []
    for i, (prompt, answer) in enumerate(sizes):
        row: dict[str, Any] = {
            "prompt_ids": [1 + i] * prompt,
            "completion_ids": [20 + 10 * i + t for t in range(answer)],
        }
        row |= {name: single(*(100 * i + t + c / 4 for t in range(answer))) for c, name in enumerate(TOKENS)}
        rows.append(row)
    return rows


@pytest.mark.parametrize("layout", ["shared", "flat", "padded"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_numbers_stand_beside_the_token_they_belong_to(layout: Any, multiple: int | None) -> None:
    rows = tagged([(2, 3), (4, 1), (1, 6), (3, 2)])
    rows.insert(2, dict(PLACEHOLDER))
    collate = rollout_collator(
        answer_collator(0, ("completion_ids",), layout=layout, token_share=True, pad_to_multiple_of=multiple)
    )
    batch = collate(rows)
    line = batch["input_ids"].flatten()
    at = 0
    for number, row in enumerate(rows):
        answer = row["completion_ids"]
        for place, token in enumerate(answer):
            assert int(batch["answer_ids"][at]) == token and int(batch["answer_of"][at]) == number
            # The state is that of the token before: the last of its own prompt, or the answer's own.
            before = answer[place - 1] if place else row["prompt_ids"][-1]
            assert int(line[batch["answer_at"][at]]) == before and int(line[batch["answer_at"][at] + 1]) == token
            for name in TOKENS:
                assert float(batch[name][at]) == (0.0 if row.get("placeholder") else float(row[name][place]))
            at += 1
    assert all(batch[name].shape == (at,) and batch[name].dtype == torch.float32 for name in TOKENS)
    assert batch["real"].tolist() == [1, 1, 0, 1, 1]
    assert batch["loss_share"] == (3 + 1 + 6 + 2,)  # tokens, without the placeholder's


def test_answers_that_are_only_scored_have_no_numbers_yet() -> None:
    collate = rollout_collator(answer_collator(0, ("completion_ids",), layout="padded", token_share=True))
    batch = collate([{"prompt_ids": [5], "completion_ids": [6, 7]}])
    assert all(batch[name].tolist() == [0, 0] for name in TOKENS)
    assert collate([PLACEHOLDER])["loss_share"] == (0.0,)


# ------------------------------------------------------------------------------------------------ steps in iterations


BEGINNING = Position()


class Prompts(Feed):
    """A feed whose rows are made up here, not streamed by Ray: each is its own number."""

    def _rows(self) -> Iterator[dict[str, Any]]:
        for epoch in range(self.start.epoch, self.epochs):
            for position in range(self.first_row(epoch), self.rows):
                yield {"epoch": epoch, "position": position}


def iterations(
    rows: int, prompts: int, updates: int, epochs: float = 2, start: Position = BEGINNING, **more: Any
) -> Iterations:
    """Of `prompts` prompts each; all of them on every worker."""
    shares = Shares(1, prompts)
    whole = -(-rows // prompts)
    feed = Prompts([("data", 0, rows)], rank=0, shares=shares, steps=math.ceil(epochs * whole), seed=None, start=start)
    return Iterations(feed, updates, **({"accumulation": 1} | more))


def test_steps_of_iterations_over_epochs_with_an_uneven_end() -> None:
    """11 prompts in iterations of 4, 4 and 3; each is trained on for 6 steps."""
    its = iterations(11, 4, 6)
    assert (its.steps, its.epochs, its.rows, its.step, its.start) == (36, 2, 11, 0, Position())
    assert [its.steps_in(epoch) for epoch in range(3)] == [18, 18, 0]
    spans = [(0, 0, 4), (0, 4, 8), (0, 8, 11), (1, 0, 4), (1, 4, 8), (1, 8, 11)]
    for step in range(36):
        assert its.iteration(step) == step // 6 and its.span(step) == spans[step // 6]
        assert its.ends(step) == (step in (0, 6, 12, 18, 24, 30))
    assert its.ends(36)
    after = [Position(0, 4), Position(0, 8), Position(1, 0), Position(1, 4), Position(1, 8), Position(2, 0)]
    assert its.position(0) == Position()
    for step in range(1, 37):
        done = after[(step - 1) // 6]
        assert its.position(step) == Position(done.epoch, done.row, step)


def test_part_of_an_epoch() -> None:
    its = iterations(11, 4, 6, epochs=1.5)
    assert its.steps == 5 * 6 and its.epochs == 2 and [its.steps_in(epoch) for epoch in range(2)] == [18, 12]


@pytest.mark.parametrize(("at", "left"), [(1, {0: 12, 1: 18}), (2, {0: 6, 1: 18}), (3, {1: 18}), (4, {1: 12})])
def test_a_run_goes_on_where_it_was_interrupted(at: int, left: dict[int, int]) -> None:
    """As trainer.py starts it: the checkpoint's step is of the optimiser, the feed's of iterations."""
    whole = iterations(11, 4, 6)
    kept = whole.position(6 * at)
    its = iterations(11, 4, 6, start=Position(kept.epoch, kept.row, at))
    assert its.start == kept and its.step == 6 * at and its.steps == 36
    assert {epoch: its.steps_in(epoch) for epoch in range(its.start.epoch, its.epochs)} == left
    for step in range(6 * at, 36):
        assert its.span(step) == whole.span(step) and its.position(step + 1) == whole.position(step + 1)


def test_micro_batches_of_an_epoch_are_those_of_every_worker() -> None:
    its = iterations(11, 4, 6, accumulation=3, workers=2)
    assert its.micro_batches == 3 * 6 * 3 and its.shares == Shares(2, 1, 3)
    assert iterations(11, 4, 6).workers == 1


class Collected:
    """Stands in for the trainer: keeps what it was asked for, and gives each prompt an answer of its own length."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, list[int]]] = []

    def __call__(self, iteration: int, first: int, prompts: list[dict[str, Any]]) -> Rollout:
        numbers = [row["position"] for row in prompts]
        self.asked.append((iteration, first, numbers))
        rows = [
            {"prompt_ids": [5] * (1 + n % 3), "completion_ids": [1000 * iteration + n] * (1 + n % 4)} for n in numbers
        ]
        return Rollout(rows, {}, np.zeros(len(rows)))


def loader(
    its: Iterations, collect: Any, rank: int = 0, skipped: Callable[[], bool] = lambda: False, **more: Any
) -> Rollouts:
    collate = rollout_collator(answer_collator(0, ("completion_ids",), layout="padded", token_share=True))
    made = PPOSettings(num_ppo_epochs=3, num_mini_batches=2, **more)
    return Rollouts(its, collate, PLACEHOLDER, made, rank=rank, collect=collect, skipped=skipped, seed=4)


def answers_in(batch: dict[str, Any]) -> set[int]:
    """Which answers a batch has, by the token they are made of."""
    return set(batch["answer_ids"].tolist()) - {0}


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_loader_answers_when_it_is_asked_and_counts_every_step(start: int) -> None:
    its = iterations(11, 4, 6, start=Position(start // 3, start % 3 * 4, start), accumulation=2)
    collect = Collected()
    batches, steps = loader(its, collect), []
    batches.meter = Meter(None, None)
    assert len(batches) == 3 * 6 * 2
    for epoch in range(start // 3, 2):
        wanted = its.steps_in(epoch) * 2
        for number, batch in enumerate(itertools.islice(iter(batches), wanted)):
            # An iteration's prompts are answered when its first batch is wanted, not before.
            assert len(collect.asked) == its.iteration(its.step - 1) - start + 1
            steps.append(its.step)
            assert batch["rows"] == len(batch["real"]) or batch["rows"] == 0
            assert number < wanted
    assert steps == [step for step in range(6 * start + 1, 37) for _ in range(2)]
    firsts = [(0, 0, 4), (0, 4, 8), (0, 8, 11), (1, 0, 4), (1, 4, 8), (1, 8, 11)]
    # A prompt's number goes on from epoch to epoch, so it is answered anew.
    assert collect.asked == [
        (i, 11 * epoch + a, list(range(a, b))) for i, (epoch, a, b) in enumerate(firsts) if i >= start
    ]
    assert batches.meter.counts["tokens"] > 0


@pytest.mark.parametrize(("workers", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_step_has_the_same_answers_however_it_is_shared(workers: int, accumulation: int) -> None:
    """Every answer once an epoch over them; and a step's shares sum up to its tokens."""

    def steps(workers: int, accumulation: int) -> list[tuple[set[int], float]]:
        out: list[tuple[set[int], float]] = [(set(), 0.0)] * 36
        for rank in range(workers):
            its = iterations(11, 4, 6, accumulation=accumulation, workers=workers)
            batches = loader(its, Collected(), rank)
            for epoch in range(2):
                for batch in itertools.islice(iter(batches), its.steps_in(epoch) * accumulation):
                    held, tokens = out[its.step - 1]
                    assert not held & answers_in(batch)
                    out[its.step - 1] = (held | answers_in(batch), tokens + batch["loss_share"][0])
        return out

    got = steps(workers, accumulation)
    assert got == steps(1, 1)
    for i in range(6):
        prompts = range(0, 4) if i % 3 == 0 else range(4, 8) if i % 3 == 1 else range(8, 11)
        for again in range(3):
            first, second = (got[6 * i + 2 * again + half] for half in range(2))
            assert first[0] | second[0] == {1000 * i + n for n in prompts} - {0}
            assert first[1] + second[1] == sum(1 + n % 4 for n in prompts)


def test_what_is_left_out_of_an_iteration_are_placeholders_that_weigh_nothing() -> None:
    """From the step after it is said, to the end of the iteration; the next one begins anew."""
    its, leaving = iterations(8, 4, 6, epochs=1, accumulation=2), [False]
    collect = Collected()

    def fresh(iteration: int, first: int, prompts: list[dict[str, Any]]) -> Rollout:
        leaving[0] = False
        return collect(iteration, first, prompts)

    left_out = []
    for batch in itertools.islice(iter(loader(its, fresh, skipped=lambda: leaving[0])), 24):
        if batch["left_out"]:
            assert batch["rows"] == 0 and batch["loss_share"] == (0.0,) and not batch["real"].any()
            left_out.append(its.step)
        leaving[0] |= its.step == 4
    assert left_out == [5, 5, 6, 6] and its.step == 12


def test_a_mini_batch_without_answers_is_left_out_by_every_worker() -> None:
    """One prompt for two mini-batches and two workers: one of the workers has nothing to do in either."""
    found = []
    for rank in range(2):
        batches = loader(iterations(1, 4, 6, epochs=1, workers=2), Collected(), rank)
        found.append([(batch["left_out"], batch["rows"]) for batch in itertools.islice(iter(batches), 6)])
    assert found == [[(False, 1), (True, 0)] * 3, [(False, 0), (True, 0)] * 3]


def test_a_target_of_the_kl_wants_a_coefficient_to_adapt() -> None:
    with pytest.raises(ValueError, match="from 0 it never moves"):
        PPOSettings(kl_coef=0.0, kl_target=6.0)
    assert PPOSettings(kl_coef=0.0).kl_coef == 0
