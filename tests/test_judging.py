"""Judging answers in this process: the reference's log-probabilities token by token, and the scores beside them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from stages.errors import StageError
from stages.rewards import Answered, Scorer
from stages.rl.engines import TransformersEngine, gathered
from stages.rl.judging import Judge, JudgeOptions, fits
from stages.sampling import sample

from .conftest import CODE

FUNCTIONS = """
def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]

def not_nine(completion_ids, **_):
    return [float("nan") if len(ids) == 9 else 0.0 for ids in completion_ids]

def level(level, **_):
    return [one / 2 for one in level]
"""


def answered(count: int, vocabulary: int = 300) -> list[Answered]:
    """Prompts and answers of many lengths; answer 7 has 9 tokens, no other has."""
    rng = random.Random(2)
    out = []
    for i in range(count):
        prompt, answer = (
            [rng.randrange(5, vocabulary) for _ in range(rng.choice(lengths))]
            for lengths in (range(1, 30), range(1, 9))
        )
        if i == 7:
            answer = (answer * 9)[:9]
        message = {"role": "user", "content": f"question {i}"}
        out.append(Answered(prompt, [message], answer, f"answer {i}", "data/prompts.jsonl", i, None, {"level": i}))
    return out


def write_functions() -> None:
    (CODE / "judging_in_a_test.py").write_text(FUNCTIONS)


@pytest.fixture(scope="module", autouse=True)
def _rewards() -> None:
    write_functions()


def options(model: str, **changed: Any) -> JudgeOptions:
    terms = [
        Scorer(f"judging_in_a_test:{name}", 1.0, function=f"judging_in_a_test:{name}") for name in ("length", "level")
    ]
    plain = JudgeOptions(terms, model, 1.0, 4, {"dtype": "float32", "attn_implementation": "sdpa"})
    return replace(plain, **changed)


def by_hand(model: str, answer: Answered, temperature: float) -> np.ndarray:
    """From the plain logits of the one row, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = plain(torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])).logits[0].double()
    before = len(answer.prompt_ids) - 1
    logps = (logits[before:-1] / temperature).log_softmax(-1)
    return logps[range(len(answer.answer_ids)), list(answer.answer_ids)].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # the first is switched to attention by documents
def test_log_probabilities_of_the_reference_are_those_of_its_tokens(
    model: str, temperature: float, attention: str
) -> None:
    rows = answered(11)
    wanted = [by_hand(model, row, temperature) for row in rows]
    for size in (1, 4, 64):
        load = {"dtype": "float32", "attn_implementation": attention}
        judge = Judge(options(model, temperature=temperature, batch_size=size, load_options=load), "cpu")
        assert judge.reference is not None
        assert judge.reference.layout == ("shared" if attention == "sdpa" else "padded")
        judged = judge.submit(rows)()
        assert [one.scores for one in judged] == [[float(len(r.answer_ids)), r.row / 2] for r in rows]
        for one, right in zip(judged, wanted, strict=True):
            assert one.ref_logps is not None and one.ref_logps.dtype == np.float32
            np.testing.assert_allclose(one.ref_logps, right, atol=1e-5)


def test_no_reference_is_loaded_where_none_is_named(model: str) -> None:
    judge = Judge(options(model, reference=None))
    assert judge.reference is None and [one.ref_logps for one in judge.submit(answered(3))()] == [None] * 3
    assert judge.submit([])() == []


def test_a_reward_that_is_no_number_is_told_with_its_row(model: str) -> None:
    terms = [Scorer("it", 1.0, function="judging_in_a_test:not_nine")]
    judge = Judge(options(model, scorers=terms))
    with pytest.raises(StageError, match=r"not_nine gave nan for prompts.jsonl, row 7 \(the answer 'answer 7'\)"):
        judge.submit(answered(11))()


def test_models_are_loaded_whole_in_a_worker_that_trains_under_zero_3(model: str) -> None:
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    judge = Judge(options(model), "cpu")
    assert is_deepspeed_zero3_enabled() and config.is_zero3()
    assert judge.reference is not None and not hasattr(next(judge.reference.model.parameters()), "ds_id")


def test_what_has_room() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 3.0, "GPU": 2.0}]
    for actors, cpus, gpus, room in (
        (3, 2, 0, True), (4, 2, 0, False), (1, 5, 0, False), (2, 0, 1, True), (3, 0, 1, False), (6, 0, 1 / 3, True),
        (7, 0, 1 / 3, False), (2, 2, 1, False), (99, 0, 0, True),
    ):  # fmt: skip
        assert fits(nodes, actors, cpus, gpus) == room
    assert not fits([], 1, 1, 0)


# ------------------------------------------------------------------------------------------------ who samples


def test_the_engine_samples_as_sampling_does_whatever_the_batch(model: str) -> None:
    """And leaves the policy as it was: in training mode, with its attention by documents."""
    from stages.training import documents

    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    prompts = [list(row.prompt_ids) for row in answered(9)]
    shared: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.9, "pad_id": 0, "stop_ids": [2, 50, 60]}
    wanted = sample(policy.eval(), prompts, per_prompt=1, top_p=1.0, top_k=0, seed=3, first=5, batch_size=2, **shared)
    assert documents.use(policy.train())
    opened = []

    @contextmanager
    def opening() -> Iterator[Any]:
        opened.append(True)
        with gathered(policy, policy):
            yield policy
        opened.append(False)

    for size in (1, 4, 64):
        found = TransformersEngine(opening, batch_size=size, **shared).sample(prompts, seed=3, first=5)
        assert found == [each[0] for each in wanted]
    assert opened == [True, False] * 3
    assert policy.training and policy.config._attn_implementation == documents.NAME
