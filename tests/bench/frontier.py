"""What reinforcement learning and preference tuning gain, over several seeds, and how far they go for it.

    python examples/quickstart_data.py examples/data/quickstart
    python tests/bench/frontier.py 1 2 3 [--all 1] [--picture frontier.svg]

Runs examples/frontier.yaml: held-out exact match against the KL of policy and SFT model, in nats an answer (as in Gao et al. 2023,
arXiv:2210.10760, figure 1). Of the seeds after `--all` all strengths are run, of the others the middle one of each sweep; the
table has the middle ones. `--picture` wants matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipeline import Pipeline

SPEC = Path(__file__).parents[2] / "examples" / "frontier.yaml"
SWEEPS = {
    "dpo": ("train.beta", [0.1, 0.3, 1.0]),
    "ppo": ("train.kl_coef", [0.05, 0.2, 0.8]),
    "verified": ("train.kl_coef", [0.01, 0.05, 0.2]),
    "grpo": ("train.beta", [0.01, 0.05, 0.2]),
}
TOLD = {
    "dpo": "DPO, compared answers",
    "ppo": "PPO, learned reward",
    "verified": "PPO, verified reward",
    "grpo": "GRPO, verified reward",
}
Point = dict[str, Any]


def run(seed: int, whole: bool) -> list[Point]:
    """A point for each model: method, strength, exact match in percent, KL."""
    overrides = [f"seed={seed}", f"name=frontier-seed-{seed}"]
    if not whole:
        overrides += [f"stages.{name}.sweep={{{path}: [{values[1]}]}}" for name, (path, values) in SWEEPS.items()]
    metrics = Pipeline.from_file(SPEC, overrides).run(quiet=True)["eval"].metrics
    found = [{"seed": seed, "method": "sft", "strength": None, "exact": 100 * metrics["sft"]["exact_match"], "kl": 0.0}]
    for name, (_, values) in SWEEPS.items():
        for model, told in metrics.items():
            if model == name or model.startswith(f"{name}-"):
                strength = float(model.rpartition("-")[2]) if model != name else values[1]
                found.append(
                    {
                        "seed": seed,
                        "method": name,
                        "strength": strength,
                        "exact": 100 * told["exact_match"],
                        "kl": told["kl"],
                    }
                )
    print(
        f"seed {seed}: reward model {100 * metrics['reward']['preference_accuracy']:.1f}% of held-out pairs", flush=True
    )
    return found


def table(points: list[Point]) -> None:
    seeds = sorted({p["seed"] for p in points})
    sft = {p["seed"]: p["exact"] for p in points if p["method"] == "sft"}
    for method in ("sft", *SWEEPS):
        middle = None if method == "sft" else SWEEPS[method][1][1]
        own = {p["seed"]: p for p in points if p["method"] == method and p["strength"] == middle}
        exact = [own[seed]["exact"] for seed in seeds]
        gains = [own[seed]["exact"] - sft[seed] for seed in seeds]
        print(
            f"{TOLD.get(method, 'SFT'):24}{' '.join(f'{e:6.1f}' for e in exact)}  mean {statistics.mean(exact):.1f}, "
            f"spread {max(exact) - min(exact):.1f}, gain {statistics.mean(gains):+.1f} (worst {min(gains):+.1f}), "
            f"KL {' '.join(format(own[seed]['kl'], '.2f') for seed in seeds)}"
        )


def draw(points: list[Point], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for method, label in TOLD.items():
        own = sorted((p for p in points if p["method"] == method), key=lambda p: p["kl"])
        axes.plot([p["kl"] for p in own], [p["exact"] for p in own], marker="o", linewidth=1, label=label)
        for p in own:
            axes.annotate(
                f"{p['strength']:g}", (p["kl"], p["exact"]), xytext=(4, -10), textcoords="offset points", size=7
            )
    axes.plot([0], [next(p["exact"] for p in points if p["method"] == "sft")], "k*", label="SFT")
    axes.set(xlabel="KL to the SFT model, nats an answer", ylabel="held-out exact match, %", xlim=(-0.1, None))
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--all", type=int, nargs="*", default=[])
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    points = [point for seed in options.seeds for point in run(seed, seed in options.all)]
    print(json.dumps(points))
    table(points)
    if options.picture:
        draw([p for p in points if p["seed"] == options.all[0]], options.picture)


if __name__ == "__main__":
    main()
