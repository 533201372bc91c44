"""What the meter counts, against figures taken by hand."""

from __future__ import annotations

import pytest
import torch

from stages.training.collate import conversation_collator
from stages.training.meter import Meter, Work


def test_flops_of_a_llama_are_palms_formula() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 200,
    }
    with torch.device("meta"):
        tied = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
        untied = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert Work.of(tied) == Work.of(untied) == Work(6 * (3 * layer + 64), 6 * 200 * 64, 3 * 64)
    tied.requires_grad_(False)
    assert Work.of(tied).body == 4 * (3 * layer + 64)
    assert Work(10, 100, 2).flops(tokens=50, scored=5, length=20) == 10 * 50 + 100 * 5 + 12 * 2 * 50 * 10


def test_rates_are_over_all_workers_and_count_no_padding() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "weights": None},
        {"input_ids": [5, 6], "labels": [-100, 6], "weights": None},
    ]
    meter = Meter(Work(10, 100, 0), peak=1e6)
    batch = conversation_collator(0)(rows)
    meter.batch(batch | {"rows": 2})
    meter.batch(batch | {"rows": 0})  # a placeholder is no work
    meter.wait(0.5)
    meter.since -= 2.0  # two seconds ago
    rates = meter.read(lambda counts: [3 * count for count in counts], workers=3)
    assert rates["tokens_per_second"] == pytest.approx(9, rel=0.02)
    assert rates["trained_tokens_per_second"] == pytest.approx(4.5, rel=0.02)
    assert rates["padding_share"] == 0.25
    assert rates["data_wait_share"] == pytest.approx(0.25, rel=0.02)
    assert rates["mfu"] == pytest.approx((6 * 10 + 3 * 100) / 2 / 1e6, abs=1e-4)
    assert meter.read(lambda counts: counts, workers=1) == {}, "nothing since"
