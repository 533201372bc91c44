"""What sampling answers holds besides the weights, by a dry run (dry_run.py) of its two widest moments: the pass over the
prompts, and the last token, when the cache of keys and values is longest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from stages.training import dry_run as dry
from stages.training.dry_run import Shape

DRAW = 24  # bytes of a logit in stages/sampling.py: as it comes, in float32, and twice in float64


@dataclass(frozen=True)
class Sampling:
    """Answers that are sampled together."""

    rows: int
    prompt: int  # tokens of the longest
    answer: int  # tokens at most


@lru_cache(maxsize=64)
def dry_answers(shape: Shape, sampling: Sampling) -> tuple[int, int]:
    """Bytes at the peak: (cache and activations, what is drawn from). `shape`: of the policy as it is trained.

    A model whose own code cannot be run is taken to keep keys and values as wide as its layers.

    Raises:
        Unpredictable: the model cannot be built from its config.
    """
    anatomy = dry.dry_run(shape).anatomy
    logits = sampling.rows * anatomy.vocabulary * DRAW
    try:
        return _peak(replace(shape, checkpointing=False), sampling), logits
    except dry.FAILURES:
        wide = 2 if shape.half or shape.autocast else 4
        tokens = sampling.rows * (sampling.prompt + sampling.answer)
        return 2 * anatomy.layers * anatomy.hidden * tokens * wide, logits


def _peak(shape: Shape, sampling: Sampling) -> int:
    import torch

    with dry.fake():
        model = dry.build(shape).eval()
        base = model.get_base_model() if shape.lora is not None else model
        backbone = base.base_model if base.base_model is not base else base.model
        meter = dry.meter_class()([*model.parameters(), *model.buffers()])
        longest = sampling.prompt + sampling.answer - 1

        def see(tokens: int, cache: object = None) -> object:
            ids = torch.zeros(sampling.rows, tokens, dtype=torch.long)
            mask = torch.ones(sampling.rows, tokens if cache is None else longest + 1, dtype=torch.long)
            return backbone(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=cache).past_key_values

        with meter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=shape.autocast):
            see(sampling.prompt)
            prompts = meter.time
            cache = see(longest) if sampling.answer > 1 else None
            last = meter.time
            if cache is not None:
                see(1, cache)
        held = meter.table(set()).sum(1)
    return int(max(held[:prompts].max(), held[last:].max(initial=0)))
