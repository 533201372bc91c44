"""Answers sampled from a model. Plain transformers models, on this process's GPU where it has one.

A sample is drawn with numbers that belong to its prompt and its place among the prompt's samples, so it is the same whatever
prompts stand beside it in a batch and however many workers share them (to rounding: where a draw falls within 1e-7 of the
border between two tokens).

Imported only inside a stage's process: it needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stages.errors import StageError

BLOCK = 64  # tokens of the vocabulary that are summed up together
IDLE = 1 / 8  # share of a batch's answers that have ended at which they are taken out of it


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
    decode = _decode if _common(model) else _generate
    drawn: dict[tuple[int, int], Sample] = {}
    for start in range(0, len(each), batch_size):
        batch = each[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i, _ in batch], pad_id, model.device)
        draws = _draws([(seed % 2**64, first + i, n) for i, n in batch], max_new_tokens, model.device)
        with torch.no_grad():
            out = decode(model, ids, mask, draws, warpers, pad_id, list(stop_ids))
        for one, new in zip(batch, out.tolist(), strict=True):
            drawn[one] = ended(new, stop_ids)
    return [[drawn[i, n] for n in range(per_prompt)] for i in range(len(prompts))]


def ended(ids: Sequence[int], stop_ids: Sequence[int]) -> Sample:
    """An answer up to its first stop token; what stands after it is padding."""
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return Sample(list(ids) if end is None else list(ids[: end + 1]), end is not None)


# ------------------------------------------------------------------------------------------------ token by token


def _decode(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    draws: torch.Tensor,
    warpers: Sequence[Callable[..., Any]],
    pad_id: int,
    stop_ids: list[int],
) -> torch.Tensor:
    """(batch, tokens): each answer up to its stop token, and anything after it. For the models that `_common` names.

    What `generate` does for them, without what it does besides in each step, and without computing answers that have ended.

    Args:
        ids, mask: (batch, longest prompt), padded on the left.
        draws: (batch, most tokens of an answer).
    """
    base = _base(model)
    prompt, most = ids.shape[1], draws.shape[1]
    seen = torch.cat([mask, mask.new_ones(len(mask), most)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    placed = "position_ids" in inspect.signature(base.forward).parameters
    stops = torch.tensor(stop_ids, device=ids.device)
    cache = _cache(base, prompt + most)
    out = torch.full((len(ids), most), pad_id, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)  # which answers the batch still holds
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(most):
        logits = base(
            input_ids=ids, attention_mask=seen[:, : prompt + step], past_key_values=cache, use_cache=True,
            logits_to_keep=1, **({"position_ids": positions} if placed else {}),
        ).logits[:, -1]  # fmt: skip
        token = _drawn(logits, draws[:, step], warpers)
        out[rows, step] = token
        going &= ~torch.isin(token, stops)
        left = int(going.sum())
        if not left:
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        if left <= len(rows) * (1 - IDLE):
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            ids, positions, seen, draws, rows, going = (x[kept] for x in (ids, positions, seen, draws, rows, going))
    return out


def _generate(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    draws: torch.Tensor,
    warpers: Sequence[Callable[..., Any]],
    pad_id: int,
    stop_ids: list[int],
) -> torch.Tensor:
    """`_decode` by transformers' own loop."""
    with _generation_config(model, GenerationConfig(eos_token_id=stop_ids, pad_token_id=pad_id)):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=draws.shape[1],
            do_sample=False,  # _Draw leaves one token to choose from
            use_cache=True,
            logits_processor=LogitsProcessorList([_Draw(warpers, draws, ids.shape[1])]),
        )
    return out[:, ids.shape[1] :]


def _base(model: Any) -> Any:
    """The model itself; the layers of an adapter are in it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _common(model: Any) -> bool:
    """Whether `generate` would call the model as most language models are called: tokens, mask, positions, and a cache of
    keys and values."""
    base = _base(model)
    own = (
        "prepare_inputs_for_generation",
        "_prepare_position_ids_for_generation",
        "_update_model_kwargs_for_generation",
    )
    if any(getattr(type(base), name) is not getattr(GenerationMixin, name) for name in own):
        return False
    named = inspect.signature(base.forward).parameters
    if base.config.is_encoder_decoder or not {"past_key_values", "logits_to_keep"} <= set(named):
        return False
    return {type(layer) for layer in _cache(base, 0).layers} <= {_Layer, DynamicSlidingWindowLayer}


def _cache(base: Any, room: int) -> DynamicCache:
    """As `generate` makes it, with room for so many tokens."""
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    cache.layers = [_Layer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Layer(DynamicLayer):
    """Keys and values of a layer, with room for all tokens from the start: transformers' own copies all of them for each one
    that is added."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        there = self.get_seq_length()
        if not there:
            self.lazy_initialization(key_states, value_states)
            self.held = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]
        end = there + key_states.shape[2]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, there:end] = new
        self.keys, self.values = (held[:, :, :end] for held in self.held)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end = self.get_seq_length()
        self.held = [held[indices] for held in self.held]
        self.keys, self.values = (held[:, :, :end] for held in self.held)


# ------------------------------------------------------------------------------------------------ draws


def _drawn(scores: torch.Tensor, draws: torch.Tensor, warpers: Sequence[Callable[..., Any]]) -> torch.Tensor:
    """(batch,): the first token whose cumulative probability is above the draw.

    Summed up by blocks of the vocabulary, then within the block that the draw falls in: a sum over all tokens one after
    another, in double precision, takes longer than a small model.

    Args:
        scores: logits (batch, vocabulary).
        draws: (batch,) from [0, 1).
    """
    scores = scores.float()
    for warp in warpers:
        scores = warp(None, scores)
    p = scores.softmax(-1)
    p = torch.nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK)
    blocks = p.sum(-1).double().cumsum(-1)  # (batch, blocks)
    draw = draws[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, draw, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.nn.functional.pad(blocks, (1, 0)).gather(1, block)
    within = p[torch.arange(len(p), device=p.device), block[:, 0]].double().cumsum(-1)  # (batch, BLOCK)
    # Both sums are rounded; the token is never one that has no probability.
    rest = torch.minimum((draw - before).clamp(min=0), within[:, -1:] * (1 - 1e-15))
    token = block * BLOCK + torch.searchsorted(within, rest, right=True)
    return token.squeeze(1).clamp(max=scores.shape[1] - 1)  # of scores that are not numbers


class _Draw(LogitsProcessor):
    """Leaves the token that is drawn."""

    def __init__(self, warpers: Sequence[Callable[..., Any]], draws: torch.Tensor, prompt_length: int) -> None:
        self.warpers, self.draws, self.prompt_length = warpers, draws, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = _drawn(scores, self.draws[:, input_ids.shape[1] - self.prompt_length], self.warpers)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


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
