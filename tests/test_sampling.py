"""Samples: drawn from the model's own distribution, and the same whatever stands beside them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import sampling
from stages.errors import StageError
from stages.sampling import Sample, ended, sample, stop_ids_of

from .conftest import LLAMA

OPTIONS: dict[str, Any] = {
    "per_prompt": 3, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5, "pad_id": 0,
    "stop_ids": [2], "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**LLAMA, vocab_size=40, eos_token_id=2, pad_token_id=0, bos_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, 40) for _ in range(rng.randrange(2, 20))] for _ in range(11)]


def test_the_same_samples_whatever_the_batches_and_chunks(policy: Any, prompts: list[list[int]]) -> None:
    whole = sample(policy, prompts, **OPTIONS)
    assert [len(each) for each in whole] == [3] * 11
    assert len({tuple(s.ids) for each in whole for s in each}) > 20
    assert {s.stopped for each in whole for s in each} == {True, False}
    assert sample(policy, prompts, **OPTIONS | {"batch_size": 5}) == whole
    parts = [sample(policy, prompts[at : at + 4], first=at, **OPTIONS) for at in (0, 4, 8)]
    assert [each for part in parts for each in part] == whole
    assert [each[:2] for each in whole] == sample(policy, prompts, **OPTIONS | {"per_prompt": 2})


def test_another_seed_gives_other_samples(policy: Any, prompts: list[list[int]]) -> None:
    assert sample(policy, prompts, **OPTIONS) != sample(policy, prompts, **OPTIONS | {"seed": -5})


def test_a_sample_ends_with_its_stop_token_or_is_cut(policy: Any, prompts: list[list[int]]) -> None:
    for each in sample(policy, prompts, **OPTIONS | {"stop_ids": [2, 7, 9, 11, 13]}):
        for one in each:
            stops = [token in (2, 7, 9, 11, 13) for token in one.ids]
            assert not any(stops[:-1]) and stops[-1] == one.stopped
            assert one.stopped or len(one.ids) == 12


def frequencies(policy: Any, prompt: list[int], **options: Any) -> list[float]:
    count = 8000
    drawn = sample(
        policy, [prompt], **OPTIONS | {"per_prompt": count, "max_new_tokens": 1, "batch_size": count} | options
    )
    found = Counter(one.ids[0] for one in drawn[0])
    return [found[token] / count for token in range(40)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}])
def test_frequencies_are_the_probabilities(policy: Any, options: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = policy(torch.tensor([[5, 6, 7]])).logits[0, -1] / options.get("temperature", 1.0)
    wanted = logits.softmax(-1)
    ordered, tokens = wanted.sort(descending=True)
    if "top_k" in options:
        wanted[tokens[options["top_k"] :]] = 0
    if "top_p" in options:  # the fewest tokens that hold that much
        wanted[tokens[(ordered.cumsum(-1) - ordered) >= options["top_p"]]] = 0
    wanted /= wanted.sum()
    for got, p in zip(frequencies(policy, [5, 6, 7], **options), wanted.tolist(), strict=True):
        assert abs(got - p) <= 5 * (p * (1 - p) / 8000) ** 0.5 + 1e-9


def test_the_models_own_generation_config_has_no_say(policy: Any, prompts: list[list[int]]) -> None:
    """Qwen's hold top_p, top_k and a repetition penalty, which `generate` would use wherever nothing is said."""
    plain = sample(policy, prompts, **OPTIONS)
    own = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0, eos_token_id=7, max_length=3
    )
    kept, policy.generation_config = policy.generation_config, own
    try:
        assert sample(policy, prompts, **OPTIONS) == plain and policy.generation_config is own
    finally:
        policy.generation_config = kept


def test_a_sample_is_as_likely_with_padding_beside_it(policy: Any) -> None:
    """Greedily: a prompt alone says what it says next to a longer one."""
    options = OPTIONS | {"top_k": 1, "per_prompt": 1}
    short, long = [5, 6], list(range(3, 33))
    assert sample(policy, [short, long], **options)[0] == sample(policy, [short], **options)[0]
    ids = torch.tensor([short])
    plain = policy.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert sample(policy, [short], **options)[0][0] == ended(plain[0, 2:].tolist(), [2])


WINDOW = {"sliding_window": 6, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral": WINDOW,
    "gemma2": WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def made(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    special = {"vocab_size": 40, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(**LLAMA | {"model_type": kind} | options | special)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_our_loop_gives_what_transformers_gives(
    prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With padding, windows that the answers outgrow, and answers that are taken out of the batch."""
    model = made(kind, **MODELS[kind])
    assert sampling._common(model)
    options = OPTIONS | {"stop_ids": [2, 7, 9, 11, 13], "batch_size": 33}
    ours = sample(model, prompts, **options)
    assert len({len(one.ids) for each in ours for one in each}) > 5
    monkeypatch.setattr(sampling, "_common", lambda model: False)
    assert ours == sample(model, prompts, **options)


def test_a_model_with_inputs_of_its_own_is_left_to_transformers(prompts: list[list[int]]) -> None:
    model = made("phi3", num_key_value_heads=4)
    assert not sampling._common(model)
    assert sample(model, prompts, **OPTIONS | {"batch_size": 5}) == sample(model, prompts, **OPTIONS)


def test_with_an_adapter(prompts: list[list[int]]) -> None:
    from peft import LoraConfig, get_peft_model

    plain = sample(made("llama"), prompts, **OPTIONS)
    model = get_peft_model(made("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "o_proj"]))
    model.eval()
    assert sampling._common(model) and sample(model, prompts, **OPTIONS) != plain
    with model.disable_adapter():
        assert sample(model, prompts, **OPTIONS) == plain


def test_no_answer_is_computed_long_after_its_end(policy: Any, prompts: list[list[int]]) -> None:
    rows: list[int] = []
    hook = policy.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    options = OPTIONS | {"stop_ids": list(range(2, 22)), "batch_size": 33, "max_new_tokens": 60}
    answers = [one for each in sample(policy, prompts, **options) for one in each]
    hook.remove()
    longest, tokens = (f(len(one.ids) for one in answers) for f in (max, sum))
    assert all(one.stopped for one in answers) and len(rows) == longest < 60
    assert tokens <= sum(rows) < tokens * 1.15 < 33 * longest


def test_the_token_drawn_is_the_first_whose_cumulative_probability_is_above_the_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(500, 1000, generator=generator)
    scores[:, ::3] = -torch.inf
    draws = torch.rand(500, generator=generator, dtype=torch.float64)
    draws[:40], draws[40:80] = 0.0, 1 - 2**-53
    scores[20:60, 100:] = -torch.inf  # the last blocks have no probability at all
    cumulative = scores.double().softmax(-1).cumsum(-1)
    wanted = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    got = sampling._drawn(scores, draws, [])
    assert torch.isfinite(scores.gather(1, got[:, None])).all()
    assert torch.equal(got[:40], wanted[:40]) and torch.equal(got[80:], wanted[80:])
    above = cumulative.gather(1, got[:, None]).squeeze(1) / cumulative[:, -1]
    assert (above >= draws - 1e-6).all()  # at the very end rounding decides between the last tokens


def test_ended() -> None:
    assert ended([4, 2, 0, 0], [2]) == Sample([4, 2], True)
    assert ended([4, 5], [2]) == Sample([4, 5], False)
    assert ended([2, 2], [2]) == Sample([2], True)


def test_stop_tokens(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert stop_ids_of(GenerationConfig(eos_token_id=7), tokenizer) == [7]
    assert stop_ids_of(GenerationConfig(eos_token_id=[7, 9]), tokenizer) == [7, 9]
    assert stop_ids_of(GenerationConfig(), tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(StageError, match="no stop token"):
        stop_ids_of(GenerationConfig(), tokenizer)
