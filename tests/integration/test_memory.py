"""A worker's memory, as predicted from the config alone, against what a real training in a process of its own took."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..bench.memory import make_model, measure


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.slow
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(tmp_path: Path) -> None:
    """34 million parameters, AdamW; tests/bench/memory.py has the other cases (LoRA, checkpointing, pairs, ZeRO)."""
    measured, parts = measure("full 1 x 512", make_model(tmp_path))
    predicted = sum(parts[name] for name in ("weights", "gradients", "optimizer", "activations", "logits", "buffers"))
    assert predicted == pytest.approx(measured, rel=0.15)
