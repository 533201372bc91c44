"""Answers sampled from a model. Plain transformers models, on this process's GPU where it has one.

A sample is drawn with numbers that belong to its prompt and its place among the prompt's samples, so it is the same whatever
prompts stand beside it in a batch and however many workers share them (to rounding: where a draw falls within 1e-7 of the
border between two tokens).

Imported only inside a stage's process: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.errors import StageError


@dataclass(frozen=True, slots=True)
class Sample:
    ids: list[int]  # to the end of the stop token
    stopped: bool  # whether it came to one


def stop_ids_of(config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of a model's generation config, else the tokenizer's.

    Raises:
        StageError: there are none, so no answer would ever end.
    """
    named = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if named is None:
        raise StageError("the model has no stop token (eos_token_id), so none of its answers would end")
    return list(named) if isinstance(named, list) else [named]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    pad_id: int,
    stop_ids: Sequence[int],
    batch_size: int,
    first: int = 0,
) -> list[list[Sample]]:
    """`per_prompt` answers to each prompt, in order.

    Args:
        model: in evaluation mode. Its own generation config (top_p, repetition_penalty, ...) is not used.
        prompts: tokens, without padding.
        temperature, top_p, top_k: as transformers has them; 1.0, 1.0 and 0 sample from the model itself.
        batch_size: answers that are sampled together.
        first: number of the first prompt, where these are some of many: a prompt's number and `seed` decide its samples.
    """
    warpers = _warpers(temperature, top_p, top_k)
    each = [(i, n) for i in range(len(prompts)) for n in range(per_prompt)]
    each.sort(key=lambda one: len(prompts[one[0]]))  # prompts of like length together: less padding
    drawn: dict[tuple[int, int], Sample] = {}
    with _generation_config(model, GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)), torch.no_grad():
        for start in range(0, len(each), batch_size):
            batch = each[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i, _ in batch], pad_id, model.device)
            draws = _draws([(seed % 2**64, first + i, n) for i, n in batch], max_new_tokens, model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,  # _Draw leaves one token to choose from
                use_cache=True,
                logits_processor=LogitsProcessorList([_Draw(warpers, draws, ids.shape[1])]),
            )
            for one, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                drawn[one] = ended(new, stop_ids)
    return [[drawn[i, n] for n in range(per_prompt)] for i in range(len(prompts))]


def ended(ids: Sequence[int], stop_ids: Sequence[int]) -> Sample:
    """An answer up to its first stop token; what stands after it is padding."""
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return Sample(list(ids) if end is None else list(ids[: end + 1]), end is not None)


class _Draw(LogitsProcessor):
    """Leaves the token that is drawn: the first whose cumulative probability is above the draw."""

    def __init__(self, warpers: Sequence[Callable[..., Any]], draws: torch.Tensor, prompt_length: int) -> None:
        self.warpers, self.draws, self.prompt_length = warpers, draws, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (batch, vocabulary)
        draw = self.draws[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _draws(keys: Sequence[tuple[int, int, int]], count: int, device: Any) -> torch.Tensor:
    """Numbers from [0, 1), (keys, count): those of a key are always the same."""
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(count) for key in keys])).to(device)


def _warpers(temperature: float, top_p: float, top_k: int) -> list[Callable[..., Any]]:
    out: list[Callable[..., Any]] = []
    if temperature != 1.0:
        out.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        out.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        out.append(TopPLogitsWarper(float(top_p)))
    return out


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (batch, longest)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """With a generation config in place of the model's, which `generate` would fill everything from that is not said."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
