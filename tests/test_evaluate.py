"""What an evaluation makes of scores and samples: against definitions, exact expectations, and what must not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.base import Artifact
from stages.errors import StageError
from stages.evaluate import Gate, check_gate, drift_warnings, has_implicit_reward, metrics_from, reference_of
from stages.scoring import answer_logprobs, rewards, sample_answers, sample_greedily

SFT = Artifact("sft", "model", "/runs/sft/model", {"kind": "sft"})
DPO = Artifact("dpo", "model", "/runs/dpo/model", {"kind": "dpo", "inputs": {"model": [{"model": SFT.model}]}})
KTO = Artifact("kto", "model", "/runs/kto/model", {"kind": "kto", "inputs": {"model": [{"model": DPO.model}]}})
REWARD = Artifact("reward", "reward model", "/runs/reward/model", {"kind": "reward"})


def pairs(n: int = 50) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    values = {"chosen": random.normal(1, 2, n), "rejected": random.normal(0, 2, n)}
    return values | {f"{side}_tokens": random.integers(1, 20, n) for side in ("chosen", "rejected")}


# ------------------------------------------------------------------------------------------------ metrics


def test_the_reference_is_the_model_that_was_given() -> None:
    assert [reference_of(a) for a in (SFT, DPO, KTO, REWARD)] == [None, SFT.model, DPO.model, None]
    assert reference_of(Artifact("/some/folder", "model", "/some/folder")) is None


@pytest.mark.parametrize(
    ("loss_type", "by_ratio"), [(None, True), (["sigmoid", "sft"], True), ("simpo", False), (["sft", "orpo"], False)]
)
def test_a_policy_trained_without_a_reference_is_judged_without(loss_type: Any, by_ratio: bool) -> None:
    tuned = Artifact("dpo", "model", DPO.model, DPO.manifest | {"config": {"train": {"loss_type": loss_type}}})
    assert has_implicit_reward(tuned) == by_ratio
    assert metrics_from({}, pairs(), tuned)["preference_by"] == ("implicit reward" if by_ratio else "likelihood")


def test_metrics_of_pairs() -> None:
    values = pairs()
    margins = values["chosen"] - values["rejected"]
    of_policy = metrics_from({}, values, DPO)
    assert of_policy == {
        "preference_accuracy": (margins > 0).mean(),
        "margin": pytest.approx(margins.mean()),
        "pairs": 50,
        "preference_by": "implicit reward",
    }
    assert metrics_from({}, values, SFT)["preference_by"] == "likelihood"
    of_reward = metrics_from({}, values, REWARD)
    assert of_reward["preference_by"] == "reward" and of_reward["margin"] == of_policy["margin"]
    assert {"calibration_error", "length_accuracy", "length_correlation"} <= of_reward.keys()


def test_metrics_of_answers() -> None:
    sums = {"sampled": 4, "stopped": 3, "answer_tokens": 10, "expected": 2, "matched": 1}
    assert metrics_from(sums, {}, SFT) == {"exact_match": 0.5, "answers": 2, "stopped": 0.75, "answer_tokens": 2.5}
    assert metrics_from({"sampled": 2, "stopped": 2, "answer_tokens": 9, "expected": 0, "matched": 0}, {}, SFT) == {
        "stopped": 1.0,
        "answer_tokens": 4.5,
    }


def test_kl_and_its_standard_error() -> None:
    ratios = np.array([1.0, 2.0, 3.0, 6.0])
    found = metrics_from({}, {"kl": ratios}, DPO)
    assert found == {"kl": 3.0, "kl_answers": 4, "kl_stderr": pytest.approx(ratios.std(ddof=1) / 2)}
    assert metrics_from({}, {"kl": ratios[:1]}, DPO) == {"kl": 1.0, "kl_answers": 1}
    assert metrics_from({}, {"kl": ratios[:0]}, DPO) == {}


def test_scores_that_are_not_numbers_are_refused_by_name() -> None:
    values = pairs()
    values["rejected"][:3] = np.nan
    with pytest.raises(StageError, match=r"reward: 3 of 50 scores \(rejected\) are not finite numbers"):
        metrics_from({}, values, REWARD)


def test_gates_know_the_metrics_of_preference_tuning() -> None:
    metrics = {
        "dpo": {"kl": 3.0, "answer_tokens": 12.0},
        "sft": {"answer_tokens": 10.0},
        "reward": {"calibration_error": 0.1},
    }
    for gate, holds in (
        ({"metric": "kl", "of": "stages.dpo", "at_most": 4.0}, True),
        ({"metric": "kl", "of": "stages.dpo", "at_most": 2.0}, False),
        ({"metric": "kl", "of": "stages.sft", "at_most": 2.0}, False),  # it has none
        ({"metric": "answer_tokens", "of": "stages.dpo", "over": "stages.sft", "at_most": 1.0}, False),
        ({"metric": "calibration_error", "of": "stages.reward", "at_most": 0.2}, True),
        ({"metric": "length_correlation", "of": "stages.reward", "at_most": 0.2}, False),
    ):
        assert check_gate(Gate.model_validate(gate), metrics, [])["holds"] is holds


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        ({"answer_tokens": 19.0, "stopped": 0.96}, []),
        (
            {"answer_tokens": 25.0, "stopped": 1.0},
            ["answers of dpo are 2.5 times as long as those of sft, its reference"],
        ),
        ({"answer_tokens": 4.0, "stopped": 1.0}, ["answers of dpo are 0.4 times as long"]),
        ({"answer_tokens": 10.0, "stopped": 0.9}, ["90% of the answers of dpo end by themselves, of those of sft"]),
        ({"loss": 1.0}, []),
    ],
)
def test_answers_that_run_away(tuned: dict[str, float], says: list[str]) -> None:
    metrics = {"sft": {"answer_tokens": 10.0, "stopped": 1.0}, "dpo": tuned}
    found = drift_warnings(metrics, [SFT, DPO])
    assert len(found) == len(says) and all(want in told for want, told in zip(says, found, strict=True))
    assert drift_warnings(metrics, [DPO]) == []  # its reference is not compared


# ------------------------------------------------------------------------------------------------ scores


@pytest.fixture(scope="module")
def policy(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture(scope="module")
def other(model: str) -> Any:
    """The same with other weights."""
    made = AutoModelForCausalLM.from_pretrained(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in made.parameters():
            weights += 0.02 * torch.randn(weights.shape, generator=generator)
    return made


def rows(n: int = 13, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    ids = lambda most: random.integers(5, 300, random.integers(1, most)).tolist()  # noqa: E731
    return [{"prompt_ids": ids(20), "answer_ids": ids(15)} for _ in range(n)]


def test_log_probabilities_are_those_of_each_row_alone_and_in_order(policy: Any) -> None:
    def alone(row: dict[str, Any]) -> float:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            logps = policy(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"])
        return sum(float(logps[at - 1, int(ids[0, at])]) for at in range(start, ids.shape[1]))

    given = rows()
    want = [alone(row) for row in given]
    for size in (1, 4, 100):
        assert answer_logprobs(policy, given, "answer_ids", 0, size) == pytest.approx(want, abs=2e-4)
    assert answer_logprobs(policy, [], "answer_ids", 0, 4).shape == (0,)


def test_rewards_are_those_of_each_row_alone_and_in_order(model: str) -> None:
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0).eval()
    given = rows()
    want = []
    for row in given:
        with torch.no_grad():
            want.append(float(scorer(input_ids=torch.tensor([row["prompt_ids"] + row["answer_ids"]])).logits))
    for size in (1, 4, 100):
        assert rewards(scorer, given, "answer_ids", 0, size) == pytest.approx(want, abs=1e-5)


def kl_of(policy: Any, reference: Any, tokenizer: Any, prompts: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    drawn = sample_answers(policy, prompts, tokenizer, 64, tokens, seed=1, first=0)
    ratios = answer_logprobs(policy, drawn, "answer_ids", 0, 64) - answer_logprobs(
        reference, drawn, "answer_ids", 0, 64
    )
    return metrics_from({}, {"kl": ratios}, DPO)


def test_kl_of_one_token_is_the_sum_over_the_vocabulary(policy: Any, other: Any, tokenizer: Any) -> None:
    (prompt,) = rows(1)
    with torch.no_grad():
        p, q = (
            m(input_ids=torch.tensor([prompt["prompt_ids"]])).logits[0, -1].double().log_softmax(-1)
            for m in (policy, other)
        )
    exact = float((p.exp() * (p - q)).sum())
    found = kl_of(policy, other, tokenizer, [prompt] * 2000, 1)
    assert exact > 0.05 and found["kl"] == pytest.approx(exact, abs=4 * found["kl_stderr"])
    assert found["kl_stderr"] < exact / 4


def test_kl_of_a_model_to_itself_is_nothing(policy: Any, tokenizer: Any) -> None:
    found = kl_of(policy, policy, tokenizer, rows(20), 8)
    assert (found["kl"], found["kl_stderr"], found["kl_answers"]) == (0.0, 0.0, 20)


def test_a_rows_number_decides_its_answer(policy: Any, tokenizer: Any) -> None:
    given = rows(11)
    whole = sample_answers(policy, given, tokenizer, 4, 8, seed=3, first=0)
    parts = [sample_answers(policy, given[at:to], tokenizer, 3, 8, seed=3, first=at) for at, to in ((0, 5), (5, 11))]
    assert whole == [row for part in parts for row in part]
    assert whole != sample_answers(policy, given, tokenizer, 4, 8, seed=4, first=0)


def test_greedy_answers_are_counted_to_the_end_of_their_stop_token(policy: Any, tokenizer: Any) -> None:
    given = [row | {"prompt": "", "expected": None, "source": "a", "row": i} for i, row in enumerate(rows())]
    samples, counts = sample_greedily(policy, given, tokenizer, 4, 6)
    stop = tokenizer.eos_token_id
    tokens = 0
    for row, told in zip(given, samples, strict=True):
        out = policy.generate(torch.tensor([row["prompt_ids"]]), do_sample=False, max_new_tokens=6, pad_token_id=0)
        new = out[0, len(row["prompt_ids"]) :].tolist()
        assert told["stopped"] == (stop in new)
        tokens += len(new)
    assert counts["answer_tokens"] == tokens and counts["sampled"] == len(given)


def test_a_policy_has_the_model_it_was_given_as_reference_and_is_compared_by_likelihood() -> None:
    given = {"model": [{"model": "/sft"}], "rewards": [{"model": "/reward"}]}
    for kind, implicit in (("ppo", False), ("grpo", False), ("rloo", False), ("dpo", True)):
        made = Artifact(kind, "model", "/m", {"kind": kind, "inputs": given})
        assert (reference_of(made), has_implicit_reward(made)) == ("/sft", implicit)
    assert reference_of(Artifact("sft", "model", "/m", {"kind": "sft", "inputs": given})) is None
