"""The quickstart over several seeds: what DPO, KTO and PPO gain over SFT on held-out exact match, beside the spread over seeds.

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
TUNED = ("sft", "dpo", "kto", "ppo")


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    seeds = [int(argument) for argument in sys.argv[1:] if "=" not in argument] or [1, 2, 3]
    measured: dict[str, list[float]] = {}
    for seed in seeds:
        run = Pipeline.from_file(
            SPEC, [f"seed={seed}", f"name=quickstart-seed-{seed}", "stages.eval.gates=[]", *overrides]
        ).run(quiet=True)
        metrics = run["eval"].metrics
        found = {name.upper(): 100 * metrics[name]["exact_match"] for name in TUNED}
        found |= {f"gain of {name.upper()}": found[name.upper()] - found["SFT"] for name in TUNED[1:]}
        found["reward: pairs right"] = 100 * metrics["reward"]["preference_accuracy"]
        seconds = {name: outcome.manifest["seconds"] for name, outcome in run.items()}
        print(
            f"seed {seed}: {', '.join(f'{name} {value:.1f}' for name, value in found.items())}; {seconds}", flush=True
        )
        for name, value in found.items():
            measured.setdefault(name, []).append(value)
    for name, values in measured.items():
        spread = max(values) - min(values)
        print(f"{name}: mean {statistics.mean(values):.1f}%, spread {spread:.1f} (max - min), worst {min(values):.1f}")


if __name__ == "__main__":
    main()
