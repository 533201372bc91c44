"""PPO side by side: ours, and the last PPOTrainer that TRL had (1.12), which takes an environment of its own:

    python3.11 -m venv OTHER && OTHER/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 accelerate datasets
    python tests/bench/ppo.py gsm8k_train.jsonl --trl OTHER/bin/python [--rounds 3] [--episodes 512]
    python tests/bench/ppo.py examples/data/quickstart/prompts.jsonl --learning runs/quickstart --trl OTHER/bin/python

Prompts are the beginnings of questions. Policy, reference, reward and value model have 1.25 million parameters each; an
iteration is 64 answers of at most 48 tokens, trained on four times as one mini-batch of four micro-batches of 16;
float32, two threads: of one process, and of ours besides as two workers of one each. Every way is a process of its own and they take turns; what counts is the median of the ratios of one turn. Counted is
training from its beginning to its end, without imports and export. Told besides: processor time after imports.

`--learning RUN`: is what is learned no worse? From the SFT and the reward model of a run of the quickstart (`make demo`), and with
its settings where both have them: the mean score that the reward model gives the answers of each quarter of the iterations,
plus or minus its standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPT = 120  # characters of a question
PROMPTS, ITERATION, MICRO, TOKENS, EPOCHS = 512, 64, 16, 48, 4
SHAPE = {
    "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
# As TRL's own defaults are, but for what is said above.
SETTINGS = {
    "kl_coef": 0.05, "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    "missing_eos_penalty": 1.0, "num_ppo_epochs": EPOCHS, "num_mini_batches": 1,
}  # fmt: skip
# Of the quickstart, which has two mini-batches: TRL's step is not made after each of them (it accumulates over both).
LEARNED = {"tokens": 32, "iteration": 64, "micro": 64, "learning_rate": 5e-4, "episodes": 3072} | {
    "settings": SETTINGS | {"kl_coef": 0.2, "vf_coef": 0.5}
}
TIMED = {"tokens": TOKENS, "iteration": ITERATION, "micro": MICRO, "learning_rate": 1e-5, "settings": SETTINGS}
Figures = dict[str, Any]


def take(rows: Path, run: Path, folder: Path) -> None:
    """The models and prompts of a run of the quickstart."""
    for name, stage in (("policy", "sft"), ("reward", "reward")):
        (folder / name).symlink_to((run / stage / "model").absolute())
    (folder / "prompts.jsonl").write_text("".join(_prompts(rows)))
    (folder / "train.json").write_text(json.dumps(LEARNED))


def _prompts(rows: Path) -> Iterator[str]:
    for line in rows.open():
        yield json.dumps({"prompt": json.loads(line)["messages"][:-1]}) + "\n"


def make(rows: Path, folder: Path, episodes: int) -> None:
    """The models, their tokenizer, the prompts, and the arguments of both."""
    import torch
    from training import CHATML  # of this folder
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from stages.data.source import DataSource
    from stages.init import train_tokenizer

    lines = [json.loads(line) for line in rows.open()][:PROMPTS]
    columns = {"prompt": "question", "completion": "answer"}
    tokenizer = train_tokenizer([DataSource(path=str(rows.absolute()), columns=columns)], 4096, CHATML)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE, **ids))
    policy.save_pretrained(str(folder / "policy"))
    score = LlamaForSequenceClassification(LlamaConfig(**SHAPE, **ids, num_labels=1))
    torch.nn.init.normal_(score.score.weight, std=1.0)  # so that answers are worth something different
    score.save_pretrained(str(folder / "reward"))
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(str(folder / name))
    with (folder / "prompts.jsonl").open("w") as out:
        for line in lines:
            out.write(json.dumps({"prompt": [{"role": "user", "content": line["question"][:PROMPT]}]}) + "\n")
    (folder / "train.json").write_text(json.dumps(TIMED | {"episodes": episodes}))


def told(folder: Path, seconds: float, processor: float, scores: list[float]) -> Figures:
    episodes = json.loads((folder / "train.json").read_text())["episodes"]
    quarter = max(2, len(scores) // 4)
    quarters = [scores[i : i + quarter] for i in range(0, len(scores) - quarter + 1, quarter)]
    return {
        "episodes_per_second": round(episodes / seconds, 2),
        "processor": round(processor, 1),
        "scores": [f"{statistics.mean(q):.2f} +- {statistics.stdev(q) / len(q) ** 0.5:.2f}" for q in quarters],
    }


def trl(folder: Path) -> Figures:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    train = json.loads((folder / "train.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1) for _ in range(2)
    )
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for p in prompts
    ]
    rows = datasets.Dataset.from_dict({"input_ids": ids})
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=train["micro"],
        gradient_accumulation_steps=train["iteration"] // train["micro"], total_episodes=train["episodes"],
        response_length=train["tokens"], local_rollout_forward_batch_size=train["micro"], report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        num_sample_generations=0, learning_rate=train["learning_rate"], disable_tqdm=True, stop_token="eos",
        temperature=1.0, logging_steps=1, **train["settings"],
    )  # fmt: skip
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=rows, eval_dataset=rows.select(range(4)),
    )  # fmt: skip
    begun, before = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, processor = time.perf_counter() - begun, time.process_time() - before
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    return told(folder, seconds, processor, scores)


def ours(folder: Path, workers: int = 1) -> Figures:
    import ray
    import torch

    from stages import PPO, StageContext
    from stages.base import Artifact, Resources
    from stages.training.trainer import import_trainers

    import_trainers()
    torch.ones(4, 4, requires_grad=True).sum().backward()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    train = json.loads((folder / "train.json").read_text())
    work = Path(tempfile.mkdtemp(dir=folder))
    arguments = {
        "learning_rate": train["learning_rate"], "total_episodes": train["episodes"], "save_strategy": "no",
        "per_device_train_batch_size": train["micro"],
        "gradient_accumulation_steps": train["iteration"] // train["micro"] // workers,
    }  # fmt: skip
    config = {
        "data": [{"path": str(folder / "prompts.jsonl")}], "rewards": [{"reward": "stages.reward"}],
        "max_new_tokens": train["tokens"], "samples": {"prompts": 0}, "train": arguments | train["settings"],
        "limits": {"kl_per_token": None, "length_ratio": None, "entropy": None},
    }  # fmt: skip
    inputs = {
        "model": [Artifact("policy", "model", str(folder / "policy"))],
        "rewards": [Artifact("reward", "reward model", str(folder / "reward"))],
    }
    before = time.process_time()
    context = StageContext("ppo", work, work / "prepared", inputs, resources=Resources(workers=workers))
    result = PPO.model_validate(config).run(context)
    processor = time.process_time() - before
    lines = [json.loads(line) for line in (work / "metrics.jsonl").open()]
    # TRL's scores have lost the penalty of answers that do not end.
    penalty = train["settings"]["missing_eos_penalty"]
    scores = [line["reward"] - penalty * (1 - line["stopped"]) for line in lines if "reward" in line]
    parts = {
        k: sum(line.get(k, 0.0) for line in lines)
        for k in sorted({k for line in lines for k in line})
        if "seconds/" in k
    }
    print({k: round(v, 2) for k, v in parts.items()}, round(result.metrics["train_seconds"], 2), file=sys.stderr)
    return told(folder, result.metrics["train_seconds"], processor, scores)


WAYS: dict[str, Callable[[Path], Figures]] = {"ours": ours, "two": lambda folder: ours(folder, 2), "trl": trl}


def run(way: str, folder: str, python: str, verbose: bool) -> Figures:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1" if way == "two" else "2",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    done = subprocess.run([python, __file__, folder, "--way", way], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way}:\n{done.stderr[-3000:]}")
    if verbose and way != "trl":
        print(done.stderr.strip().splitlines()[-1])
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{way:5}{found}, machine's load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--trl", help="the Python that has TRL 1.12; without it ours alone is run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--learning", type=Path, metavar="RUN", help="the folder of a run of the quickstart")
    parser.add_argument("--verbose", action="store_true", help="the seconds of each part of ours")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.rows)), flush=True)
        return
    ways = dict.fromkeys(("ours", "two"), sys.executable) | ({"trl": options.trl} if options.trl else {})
    with tempfile.TemporaryDirectory() as folder:
        if options.learning:
            take(options.rows, options.learning, Path(folder))
            del ways["two"]
        else:
            make(options.rows, Path(folder), options.episodes)
        rounds = 1 if options.learning else options.rounds
        seen = [{way: run(way, folder, python, options.verbose) for way, python in ways.items()} for _ in range(rounds)]
    if options.trl and not options.learning:
        speed = "episodes_per_second"
        for what, ratios in (
            ("ours / trl, episodes/s", [r["ours"][speed] / r["trl"][speed] for r in seen]),
            ("ours / trl, episodes a processor second", [r["trl"]["processor"] / r["ours"]["processor"] for r in seen]),
            ("ours by two workers / trl, episodes/s", [r["two"][speed] / r["trl"][speed] for r in seen]),
        ):
            print(f"{what}: median {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]}")


if __name__ == "__main__":
    main()
