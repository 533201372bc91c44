"""The quickstart over several seeds: what DPO gains over SFT on held-out exact match, beside the spread over seeds.

    python examples/quickstart_data.py examples/data/quickstart
    python tests/bench/quickstart_seeds.py 1 2 3 [stages.sft.train.learning_rate=2e-3 ...]

The data stay the same; the seed decides the fresh model, the order of the rows and the new score head.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from pipeline import Pipeline

SPEC = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    seeds = [int(argument) for argument in sys.argv[1:] if "=" not in argument] or [1, 2, 3]
    rows = []
    for seed in seeds:
        run = Pipeline.from_file(
            SPEC, [f"seed={seed}", f"name=quickstart-seed-{seed}", "stages.eval.gates=[]", *overrides]
        ).run(quiet=True)
        metrics = run["eval"].metrics
        seconds = {name: outcome.manifest["seconds"] for name, outcome in run.items()}
        rows.append(
            (metrics["sft"]["exact_match"], metrics["dpo"]["exact_match"], metrics["reward"]["preference_accuracy"])
        )
        sft, dpo, reward = (100 * value for value in rows[-1])
        print(
            f"seed {seed}: SFT {sft:.1f}%  DPO {dpo:.1f}%  gain {dpo - sft:+.1f}  reward pairs {reward:.1f}%  {seconds}",
            flush=True,
        )
    for name, values in zip(("SFT", "DPO", "reward pairs"), zip(*rows, strict=True), strict=True):
        percents = [100 * v for v in values]
        spread = max(percents) - min(percents)
        print(f"{name}: mean {statistics.mean(percents):.1f}%, spread {spread:.1f} (max - min)")
    gains = [100 * (dpo - sft) for sft, dpo, _ in rows]
    print(f"gain of DPO over SFT: mean {statistics.mean(gains):+.1f}, worst {min(gains):+.1f}")


if __name__ == "__main__":
    main()
