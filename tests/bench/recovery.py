"""Seconds from the death of a worker, or of its node, to the next optimiser step.

    python -m tests.bench.recovery [--rounds 3]

An SFT of two workers under ZeRO-2 with a checkpoint every three steps (tests/chaos/chaos.py), killed at its 8th step. Asked:
under 15 s on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.chaos import FAULTS, STALL_MINUTES, Scene, scene_of, start


def recovered(fault: str, seed: int) -> float:
    with scene_of(fault, random.Random(seed)) as scene:
        spec = scene.folder / "spec.yaml"
        text = spec.read_text().replace("num_train_epochs: 2", "num_train_epochs: 20")
        spec.write_text(text.replace(f"stall_minutes: {STALL_MINUTES}", "stall_minutes: 5"))  # a slow start is no hang
        start(scene)
        assert scene.command is not None
        wait_for(scene, lambda: last(scene) >= 8)
        before = last(scene)
        FAULTS[fault](scene)
        died = time.time()
        wait_for(scene, lambda: stepped(scene))
        seconds = time.time() - died
        wait_for(scene, lambda: last(scene) > before)
        scene.command.kill()
        scene.command.communicate()
        return seconds


def ledger(scene: Scene) -> Path | None:
    return next(iter(scene.folder.glob("runs/chaos/.work/sft-*/consumed.jsonl")), None)


def last(scene: Scene) -> int:
    path = ledger(scene)
    lines = path.read_text().splitlines() if path else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def stepped(scene: Scene) -> bool:
    """Whether new workers have made a step: it is told at once, being their first."""
    lines = [
        json.loads(line)
        for f in scene.folder.glob("runs/chaos/.work/sft-*/events.jsonl")
        for line in f.read_text().splitlines()
    ]
    recovering = [i for i, event in enumerate(lines) if event.get("phase") == "recover"]
    return bool(recovering) and any(event.get("unit") == "step" for event in lines[recovering[-1] :])


def wait_for(scene: Scene, what: Callable[[], bool]) -> None:
    end = time.time() + 300
    while not what():
        assert scene.command is not None and scene.command.poll() is None and time.time() < end
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for fault in ("worker", "node"):
        seconds = [recovered(fault, seed) for seed in range(options.rounds)]
        print(
            f"{fault:7} {' '.join(f'{s:5.1f}' for s in seconds)}  median {statistics.median(seconds):.1f} s", flush=True
        )


if __name__ == "__main__":
    main()
