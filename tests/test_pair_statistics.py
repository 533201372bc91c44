"""Statistics of preference pairs against their definitions, and against what they must not depend on."""

import numpy as np
import pytest

from stages.training.pair_statistics import calibration_error, pair_statistics


def pairs(n: int = 4000, scale: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Pairs whose better answer is drawn with the very probabilities sigmoid(margin / scale) of their rewards."""
    random = np.random.default_rng(seed)
    margins = random.normal(0, 2, n)
    better = random.random(n) < 1 / (1 + np.exp(-margins))
    signed = np.where(better, margins, -margins) * scale
    base = random.normal(3, 1, n)
    tokens = random.integers(1, 50, (2, n))
    return {"chosen": base + signed, "rejected": base, "chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}


def test_by_hand() -> None:
    found = pair_statistics(
        np.array([1.0, 0.0, 2.0, 5.0]), np.array([0.0, 1.0, 2.0, 1.0]), np.array([4, 9, 1, 7]), np.array([2, 9, 3, 5])
    )
    assert found["accuracy"] == 0.5  # the tie is not right
    assert found["margin"] == 1.0
    assert found["length_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["length_correlation"] == pytest.approx(np.corrcoef([1, -1, 0, 4], [2, 0, -2, 2])[0, 1])
    rewards = np.array([1, 0, 2, 5, 0, 1, 2, 1])
    assert found["reward_mean"] == rewards.mean() and found["reward_std"] == pytest.approx(rewards.std())


def test_rewards_that_mean_their_probabilities_are_calibrated_and_others_are_not() -> None:
    assert pair_statistics(**pairs())["calibration_error"] < 0.02
    assert pair_statistics(**pairs(scale=5))["calibration_error"] > 0.1  # too sure
    assert pair_statistics(**pairs(scale=0.2))["calibration_error"] > 0.1  # not sure enough


def test_calibration_at_the_ends() -> None:
    sure = np.full(10, 1000.0)
    assert calibration_error(sure) == 0  # certain and right
    assert calibration_error(-sure) == 1  # certain and wrong
    assert calibration_error(np.zeros(10)) == 0  # a tie claims nothing
    assert calibration_error(np.array([1000.0, -1000.0])) == 0.5


def test_bins_are_told_apart() -> None:
    """Errors of opposite sign cancel within a bin, not between bins."""
    low, high = np.log(0.62 / 0.38), np.log(0.97 / 0.03)
    margins = np.array([low] * 9 + [-low] + [high, -high] * 5)
    assert calibration_error(margins) == pytest.approx((abs(0.9 - 0.62) + abs(0.5 - 0.97)) / 2)


def test_a_reward_that_is_length_is_told() -> None:
    given = pairs()
    given |= {"chosen": 0.1 * given["chosen_tokens"] + 7, "rejected": 0.1 * given["rejected_tokens"] + 7}
    found = pair_statistics(**given)
    assert found["length_correlation"] == pytest.approx(1)
    assert found["accuracy"] == pytest.approx(found["length_accuracy"], abs=0.02)  # but for ties
    assert abs(pair_statistics(**pairs())["length_correlation"]) < 0.05


def test_what_does_not_matter() -> None:
    given = pairs(500)
    found = pair_statistics(**given)
    order = np.random.default_rng(1).permutation(500)
    assert pair_statistics(**{k: v[order] for k, v in given.items()}) == pytest.approx(found)
    moved = pair_statistics(**given | {"chosen": given["chosen"] + 9, "rejected": given["rejected"] + 9})
    assert moved.pop("reward_mean") == pytest.approx(found.pop("reward_mean") + 9)
    assert moved == pytest.approx(found)


def test_undefined_correlations_are_zero() -> None:
    one = np.array([1.0]), np.array([0.0]), np.array([3]), np.array([2])
    assert pair_statistics(*one)["length_correlation"] == 0
    same = pairs(100) | {"chosen_tokens": np.full(100, 5), "rejected_tokens": np.full(100, 5)}
    assert pair_statistics(**same)["length_correlation"] == 0
    assert pair_statistics(**same)["length_accuracy"] == 0.5


def test_bad_input() -> None:
    none = np.array([])
    with pytest.raises(ValueError, match="at least one pair"):
        pair_statistics(none, none, none, none)
    with pytest.raises(ValueError, match="one length"):
        pair_statistics(np.ones(3), np.ones(2), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        pair_statistics(np.array([np.nan]), np.ones(1), np.ones(1), np.ones(1))
