"""Attention document by document gives each document what it gets alone, or is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.training import documents

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (7, 1, 9)


def made(model_type: str, more: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**(SMALL | {"model_type": model_type} | more))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4}), ("gemma", {}), ("olmo2", {}),
        ("gemma3_text", {"sliding_window": 4}), ("cohere", {}), ("granite", {}), ("smollm3", {}), ("mixtral", {"num_local_experts": 2}),
    ],
)  # fmt: skip
def test_each_document_is_as_if_alone(model_type: str, more: dict[str, Any]) -> None:
    model = made(model_type, more)
    texts = [torch.randint(3, 64, (1, n)) for n in LENGTHS]
    alone = torch.cat([model(input_ids=text).logits for text in texts], 1)
    alone.square().sum().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert documents.use(model)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    together = model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
    together.square().sum().backward()
    assert torch.allclose(together, alone, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradient[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(("model_type", "more"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})])
def test_two_answers_share_a_prompt_as_if_each_had_its_own(model_type: str, more: dict[str, Any]) -> None:
    model = made(model_type, more)
    rows = [[torch.randint(3, 64, (1, n)) for n in sizes] for sizes in ((6, 3, 5), (1, 2, 1), (4, 1, 7))]
    apart = [torch.cat([prompt, answer], 1) for prompt, *answers in rows for answer in answers]
    logits = [model(input_ids=ids).logits[0] for ids in apart]
    assert documents.use(model)
    ids, positions = [], []
    for prompt, first, second in rows:
        ids += [prompt, first, second]
        size = prompt.shape[1]
        positions += [torch.arange(size + first.shape[1]), torch.arange(size, size + second.shape[1])]
    together = model(input_ids=torch.cat(ids, 1), position_ids=torch.cat(positions)[None], use_cache=False).logits[0]
    at = 0
    for (prompt, first, second), chosen, rejected in zip(rows, logits[::2], logits[1::2], strict=True):
        whole = prompt.shape[1] + first.shape[1]
        assert torch.allclose(together[at : at + whole], chosen, atol=1e-5)
        at += whole
        assert torch.allclose(together[at : at + second.shape[1]], rejected[prompt.shape[1] :], atol=1e-5)
        at += second.shape[1]


@pytest.mark.parametrize(
    ("model_type", "more"), [("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2}), ("phi3", {}), ("llama4_text", {})]
)
def test_models_of_other_kinds_are_left_alone(model_type: str, more: dict[str, Any]) -> None:
    model = made(model_type, more)
    assert not documents.use(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_not_one_row_of_documents_is_refused() -> None:
    model = made("llama", {})
    assert documents.use(model)
    with pytest.raises(ValueError, match="one row of documents"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), use_cache=False)


ALTERED = [{"softcap": 50.0}, {"position_bias": torch.zeros(1)}, {"s_aux": torch.zeros(2)}]


@pytest.mark.parametrize("altered", ALTERED, ids=lambda given: next(iter(given)))
def test_scores_that_a_layer_alters_are_refused(altered: dict[str, Any]) -> None:
    heads, position_ids = torch.ones(1, 2, 3, 4), torch.arange(3)[None]
    attended, _ = documents.attend(torch.nn.Module(), *[heads] * 3, None, position_ids=position_ids, softcap=None)
    assert attended.shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=next(iter(altered))):
        documents.attend(torch.nn.Module(), *[heads] * 3, None, position_ids=position_ids, **altered)


def test_attention_in_both_directions_is_left_alone() -> None:
    model = made("llama", {})
    model.model.layers[1].self_attn.is_causal = False
    assert not documents.use(model)
