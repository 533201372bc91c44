"""One SFT step, side by side: ours, a bare torch loop, and TRL's SFTTrainer as configured by default.

    python tests/bench/training.py gsm8k_train.jsonl [--rounds 5] [--steps 60] [--only bare ours ...]

Rows are `{"question", "answer"}`. The model has 1.25 million parameters, a step is 2 x 8 rows, and every way is a process of
its own, that is given the same 16 x steps rows. The ways take turns, and what counts is the median of the ratios of one turn: on
a shared machine absolute figures swing several-fold. The first steps of each are not counted.

    bare        padded batches, the model's own loss over the same trained tokens, AdamW: what a careful user writes
    ours        the SFT stage on one worker
    packed      the same with packing to 1,024 tokens
    trl         SFTTrainer as it comes, `assistant_only_loss`
    two         the SFT stage on two workers of one thread each (the other ways have two threads), 2 x 8 rows a step
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
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SKIPPED = 10  # steps that are not counted
BATCH, ACCUMULATION = 8, 2
Chats = list[list[dict[str, str]]]


def make(rows: Path, folder: Path, count: int) -> None:
    """The model, its tokenizer and the chats that every way is given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.data.source import DataSource
    from stages.init import train_tokenizer

    lines = [json.loads(line) for line in rows.open()]
    chats = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in lines]
    (folder / "all.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats[:count]))
    tokenizer = train_tokenizer([DataSource(path=str(folder / "all.jsonl"))], 4096, CHATML)
    tokenizer.save_pretrained(str(folder / "model"))
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder / "model"))


def read(folder: Path) -> Chats:
    return [json.loads(line)["messages"] for line in (folder / "chats.jsonl").open()]


def bare(folder: Path, steps: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    rows = []
    for chat in read(folder):
        made = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        rows.append((made["input_ids"], made["assistant_masks"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, start = 0, 0.0
    for step in range(steps):
        if step == SKIPPED:
            tokens, start = 0, time.perf_counter()
        for k in range(ACCUMULATION):
            first = (step * ACCUMULATION + k) * BATCH
            batch = rows[first : first + BATCH]
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
            mask, trained = torch.zeros(BATCH, longest, dtype=torch.long), torch.zeros(BATCH, longest, dtype=torch.long)
            for i, (row, marks) in enumerate(batch):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
                trained[i, : len(row)] = torch.tensor(marks)
            labels = ids.masked_fill(trained == 0, -100)
            (model(input_ids=ids, attention_mask=mask, labels=labels).loss / ACCUMULATION).backward()
            tokens += int(mask.sum())
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {"samples": (steps - SKIPPED) * BATCH * ACCUMULATION / seconds, "tokens": tokens / seconds}


def trl(folder: Path, steps: int) -> dict[str, float]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    chats = read(folder)

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == SKIPPED:
                self.start = time.perf_counter()

    args = SFTConfig(
        output_dir=str(folder / "trl"), assistant_only_loss=True, use_cpu=True, bf16=False, report_to=[], max_length=1024,
        max_steps=steps, per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, learning_rate=1e-3,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"messages": c} for c in chats]), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    seconds = time.perf_counter() - clock.start
    length = sum(len(tokenizer.apply_chat_template(c, tokenize=True, return_dict=True)["input_ids"]) for c in chats)
    samples = (steps - SKIPPED) * BATCH * ACCUMULATION / seconds
    return {"samples": samples, "tokens": samples * length / len(chats)}


def ours(folder: Path, steps: int, packing: bool = False, workers: int = 1) -> dict[str, float]:
    import ray

    from stages import KINDS, StageContext
    from stages.base import Artifact, Resources

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    work = Path(tempfile.mkdtemp(dir=folder))
    train = {
        "learning_rate": 1e-3, "max_length": 1024, "packing": packing, "logging_steps": 1 if packing else 5,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION // workers,
        "num_train_epochs": 3 if packing else 1, "save_strategy": "no",
    }  # fmt: skip
    if packing:  # packs are about six times as long as rows
        train |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    config = {"kind": "sft", "data": [{"path": str(folder / "chats.jsonl")}], "train": train, "shuffle": packing}
    stage = KINDS["sft"].model_validate(config)
    context = StageContext(
        "stage", work, folder / "prepared", {"model": [Artifact("base", "model", str(folder / "model"))]},
        resources=Resources(workers=workers), local=workers == 1,
    )  # fmt: skip
    result = stage.run(context)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").open()]
    counted = [line for line in lines if line["step"] > (result.steps or 0) * SKIPPED // steps]
    before = next(line for line in reversed(lines) if line not in counted)
    seconds = counted[-1]["time"] - before["time"]
    rows, tokens = result.rows or 0, result.tokens or 0
    share = (counted[-1]["step"] - before["step"]) / (result.steps or 1) * (3 if packing else 1)
    waited = statistics.mean(line["data_wait_share"] for line in counted)
    return {"samples": rows * share / seconds, "tokens": tokens * share / seconds, "waited": waited}


WAYS = {
    "bare": bare,
    "ours": ours,
    "packed": lambda folder, steps: ours(folder, steps, packing=True),
    "trl": trl,
    "two": lambda folder, steps: ours(folder, steps, workers=2),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.rows, options.steps)))
        return
    from stages.training.launch import ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        make(options.rows, Path(folder), options.steps * BATCH * ACCUMULATION)
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in options.only}
        for _ in range(options.rounds):
            for way in options.only:
                environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1" if way == "two" else "2"}
                environment |= {"HF_HUB_OFFLINE": "1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
                command = [sys.executable, __file__, folder, "--steps", str(options.steps), "--way", way]
                out = subprocess.run(command, env=environment, capture_output=True, text=True)
                if out.returncode:
                    sys.exit(out.stderr[-3000:])
                seen[way].append(json.loads(out.stdout.strip().splitlines()[-1]))
                print(way, seen[way][-1], flush=True)
    for of, over, unit in (
        ("ours", "bare", "samples"), ("ours", "trl", "samples"), ("packed", "bare", "tokens"),
        ("packed", "trl", "tokens"), ("two", "ours", "samples"),
    ):  # fmt: skip
        if of in seen and over in seen:
            ratios = [a[unit] / b[unit] for a, b in zip(seen[of], seen[over], strict=True)]
            print(f"{of} / {over}, {unit}/s: median {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]}")


if __name__ == "__main__":
    main()
