"""The memory of a worker, measured against predicted: real stages, trained by the real trainer, each in a process of its own.

    python tests/bench/memory.py [NAME ...]

Measured is the highest resident memory of the worker (VmHWM, reset through /proc/self/clear_refs) over what its process had
after the imports; predicted is that of `raylign plan` without its `fixed` part. Linux, CPU. Allocations of 64 KiB and more go
to the system and back (MALLOC_MMAP_THRESHOLD_): else what malloc keeps is counted too. One case takes about half a minute
on two quiet cores.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
ENVIRONMENT = MALLOC | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}  # fmt: skip
MIB = 1 << 20
# 34 million parameters: what Python and the libraries need is small beside them.
MODEL = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
LORA = {"tuning": {"method": "lora", "r": 8}}


def train(batch: int, **more: Any) -> dict[str, Any]:
    return {"per_device_train_batch_size": batch, "max_steps": 3, "save_strategy": "no", "max_length": 1024} | more


# name -> (kind, tokens of a row, config, workers)
CASES: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "full 4 x 512": ("sft", 512, {"train": train(4)}, 1),
    "full 1 x 512": ("sft", 512, {"train": train(1)}, 1),
    "full 2 x 512, accumulated": ("sft", 512, {"train": train(2, gradient_accumulation_steps=2)}, 1),
    "checkpointing 4 x 512": ("sft", 512, {"train": train(4, gradient_checkpointing=True)}, 1),
    "eager attention 4 x 512": ("sft", 512, {"train": train(4), "attention": "eager"}, 1),
    "lora 4 x 512": ("sft", 512, {"train": train(4), **LORA}, 1),
    "lora, checkpointing 4 x 512": ("sft", 512, {"train": train(4, gradient_checkpointing=True), **LORA}, 1),
    "dora 4 x 512": ("sft", 512, {"train": train(4), "tuning": LORA["tuning"] | {"use_dora": True}}, 1),
    "sgd 2 x 512": ("sft", 512, {"train": train(2, optim="sgd")}, 1),
    "dpo 4 x 300": ("dpo", 300, {"train": train(4)}, 1),
    "dpo, lora 4 x 300": ("dpo", 300, {"train": train(4), **LORA}, 1),
    "reward 4 x 300": ("reward", 300, {"train": train(4)}, 1),
    "two workers 1 x 64": ("sft", 64, {"train": train(1)}, 2),
    "zero1, two workers 1 x 64": ("sft", 64, {"train": train(1), "deepspeed": "zero1"}, 2),
    "zero2, two workers 1 x 64": ("sft", 64, {"train": train(1), "deepspeed": "zero2"}, 2),
    "zero2+offload, two workers 1 x 64": ("sft", 64, {"train": train(1), "deepspeed": "zero2+offload"}, 2),
    "zero3, two workers 1 x 64": ("sft", 64, {"train": train(1), "deepspeed": "zero3"}, 2),
}


def write_data(folder: Path, kind: str, tokens: int) -> Path:
    """Rows of nearly `tokens` tokens, so that batches are padded; the longest have them all."""
    random_ = random.Random(0)
    path = folder / f"{kind}-{tokens}.jsonl"
    rows: list[dict[str, Any]] = []
    for i in range(48):
        length = tokens - (i % 2)
        if kind == "sft":
            ids = [random_.randrange(5, 250) for _ in range(length)]
            rows.append({"input_ids": ids, "labels": ids})
        else:
            chosen, rejected = ("".join(random_.choices("qwrtpsdf", k=length)) for _ in range(2))
            rows.append({"prompt": "a?", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder: Path, config: dict[str, Any] = MODEL) -> str:
    from stages import Init, StageContext

    chats = folder / "chats.jsonl"
    chats.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]}) + "\n"
    )
    work = folder / "base"
    work.mkdir()
    stage = Init.model_validate({"config": config, "tokenizer": {"vocab_size": 320}, "data": [{"path": str(chats)}]})
    stage.run(StageContext("base", work, folder / "prepared", {}))
    return str(work / "model")


def measured_worker(config: dict[str, Any]) -> Any:
    """The worker's own function, between two looks at its memory; the peak is written beside the stage's files."""
    import gc

    import deepspeed.ops.adam
    import peft
    import torch
    import trl.trainer.dpo_trainer
    import trl.trainer.reward_trainer
    from transformers import AutoModelForCausalLM

    from stages.training import trainer

    assert deepspeed and peft and trl and AutoModelForCausalLM
    trainer.import_trainers()
    weight = torch.randn(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = memory_of_process()["VmRSS"]
    result = trainer.train_on_worker(config)
    peak = memory_of_process()["VmHWM"] - before
    (config["job"].work / f"peak-{trainer.worker_rank()[0]}").write_text(str(peak))
    return result


def memory_of_process() -> dict[str, int]:
    """Bytes, by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def run_case(
    folder: Path, model: str, kind: str, tokens: int, config: dict[str, Any], workers: int
) -> tuple[int, dict[str, Any]]:
    """(measured peak of the first worker, its row of the plan) in bytes. Trains in this process, where it may."""
    from pipeline import Pipeline
    from pipeline.estimate import describe
    from stages import KINDS, StageContext
    from stages.base import Artifact, Resources
    from stages.training import recovery

    data = write_data(folder, kind, tokens)
    work = folder / "work"
    work.mkdir()
    stage = KINDS[kind].model_validate({"kind": kind, "data": [{"path": str(data)}]} | config)
    recovery.train_on_worker = measured_worker
    stage.run(
        StageContext(
            "stage", work, folder / ".prepared", {"model": [Artifact("base", "model", model)]},
            resources=Resources(workers=workers), local=workers == 1 and "deepspeed" not in config,
        )
    )  # fmt: skip
    spec = {"kind": kind, "data": [{"path": str(data)}], "workers": workers} | config
    plan = Pipeline(name="p", model=model, storage=str(folder), stages={"stage": spec}).plan()
    return int((work / "peak-0").read_text()), describe(plan)[0]


def child(job: dict[str, Any]) -> None:
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=128 << 20,
    )  # fmt: skip
    peak, row = run_case(Path(job.pop("folder")), **job)
    print(json.dumps({"peak": peak, "memory": row["memory"]}), flush=True)
    os._exit(0)  # Ray's threads may keep a process from ending


def measure(name: str, model: str) -> tuple[int, dict[str, Any]]:
    """(measured, predicted parts) of a case, in bytes, trained in a process of its own."""
    from stages.training.launch import ENVIRONMENT as WORKERS

    kind, tokens, config, workers = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        job = {"folder": folder, "model": model, "kind": kind, "tokens": tokens, "config": config, "workers": workers}
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(job)],
            capture_output=True, text=True, timeout=900, env=os.environ | WORKERS | ENVIRONMENT | {"PYTHONPATH": root},
        )  # fmt: skip
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["memory"]


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        print(f"{'':36}{'measured':>9}{'predicted':>11}{'ratio':>7}   MiB, and what it is made of")
        for name in names:
            peak, parts = measure(name, model)
            moment = parts.pop("moment")
            predicted = sum(v for k, v in parts.items() if k not in ("fixed", "host"))
            said = ", ".join(
                f"{k} {v / MIB:.0f}" for k, v in parts.items() if v >= MIB / 2 and k not in ("fixed", "host")
            )
            print(
                f"{name:36}{peak / MIB:9.0f}{predicted / MIB:11.0f}{predicted / peak:7.2f}   {moment}: {said}",
                flush=True,
            )


if __name__ == "__main__":
    child(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--child"] else main()
