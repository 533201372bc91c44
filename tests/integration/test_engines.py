"""Sampling between the steps of a training under ZeRO-3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def losses_of(folder: Path, model: str, *, samples: bool) -> list[list[float]]:
    """Of each of two workers."""
    folder.mkdir()
    script = str(Path(__file__).with_name("zero3_sampling.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", str(folder / "rendezvous"), model, "samples" if samples else "none"],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    told = [json.loads(text.splitlines()[-1]) for text in said]
    assert not samples or (max(told[0]["tokens"]) == 12 and max(told[1]["tokens"]) < 12)
    return [one["losses"] for one in told]


@pytest.mark.slow
def test_sampling_gathers_the_weights_and_training_goes_on_as_if_nothing_had_been(model: str, tmp_path: Path) -> None:
    with_samples = losses_of(tmp_path / "with", model, samples=True)
    assert with_samples == losses_of(tmp_path / "without", model, samples=False)
    assert with_samples[0] != pytest.approx(with_samples[1])
