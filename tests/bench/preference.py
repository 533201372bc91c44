"""DPO side by side: ours, a bare torch loop, and TRL's DPOTrainer without and with precomputed references.

    python tests/bench/preference.py gsm8k_train.jsonl [--rounds 3] [--pairs 256] [--epochs 3] [--only ours trl ...]
    python tests/bench/preference.py gsm8k_train.jsonl --memory

Rows are `{"question", "answer"}`: the question is the prompt, its answer the chosen one, another row's the rejected one. The
model has 1.25 million parameters, a step is 8 pairs, float32 without checkpointing, two threads, the rows in the same order.
Every way is a process of its own and the ways take turns; what counts is the median of the ratios of one turn: on a shared
machine absolute figures swing several-fold. Counted is training from its beginning to its end, and besides the pass of the
reference where there is one apart; neither tokenisation nor the export. Told besides, since other work on the machine hardly
moves it: the processor time of all threads of the process after its imports, of ours the export included.

    bare        both answers padded, log-probabilities of the trained tokens, AdamW; the reference is run once before
    ours        the DPO stage on one worker, without samples (`watch: {prompts: 0}`)
    watched     the same with the 32 prompts that are sampled by default, before and after
    trl         DPOTrainer as it comes: the reference is a second model, run in every step
    computed    DPOTrainer with `precompute_ref_log_probs`

The losses of ours, trl and computed have to agree: ln 2 in the first step, and to 1e-4 in the mean of the steps up to the tenth.

`--memory` trains a model of 60 million parameters for three steps, once each way, and tells the highest resident memory of
the process over what it had after its imports, everything from the data to the last step (of ours to the export) included.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import MIB, memory_of_process  # of this folder
from training import CHATML

# The answer ends with its stop token: TRL trains what the template writes after it too, a newline, and we do not.
TEMPLATE = CHATML.replace("{% endgeneration %}\n", "{% endgeneration %}")
BATCH, BETA = 8, 0.1
SMALL = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10}
Figures = dict[str, Any]


def make(rows: Path, folder: Path, pairs: int, large: bool, train: dict[str, Any]) -> None:
    """The model, its tokenizer, the pairs that every way is given, and TRL's own arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.data.source import DataSource
    from stages.init import train_tokenizer

    lines = [json.loads(line) for line in rows.open()]
    columns = {"prompt": "question", "completion": "answer"}
    tokenizer = train_tokenizer([DataSource(path=str(rows.absolute()), columns=columns)], 4096, TEMPLATE)
    tokenizer.save_pretrained(str(folder / "model"))
    config = LlamaConfig(
        vocab_size=16384 if large else 4096, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **(LARGE if large else SMALL),
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(str(folder / "model"))
    random.seed(0)
    used = lines[:pairs]
    with (folder / "pairs.jsonl").open("w") as out:
        for line in used:
            other = random.choice([row for row in used if row is not line])
            turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
            pair = {
                "prompt": turn("user", line["question"]),
                "chosen": turn("assistant", line["answer"]),
                "rejected": turn("assistant", other["answer"]),
            }
            out.write(json.dumps(pair) + "\n")
    common = {
        "learning_rate": 1e-4, "beta": BETA, "per_device_train_batch_size": BATCH, "max_length": 1024,
        "save_strategy": "no", "logging_steps": 10, "logging_first_step": True,
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(common | train))


def given(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pairs, and the trainer's arguments."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    return rows, json.loads((folder / "train.json").read_text())


def begin() -> tuple[int, float]:
    """Resident memory and processor time now; the highest memory is counted from here on."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of_process()["VmRSS"], time.process_time()


def figures(
    rows: int, epochs: int, seconds: float, apart: float, losses: list[float], before: tuple[int, float]
) -> Figures:
    peak, processor = (memory_of_process()["VmHWM"] - before[0]) // MIB, time.process_time() - before[1]
    speed = rows * epochs / (seconds + apart)
    told = {"pairs": speed, "seconds": seconds, "apart": apart, "processor": processor, "peak": peak}
    return {name: round(value, 2) for name, value in told.items()} | {"losses": losses}


def bare(folder: Path) -> Figures:
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = begin()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    pairs, train = given(folder)

    def encode(pair: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        chat = pair["prompt"] + pair[side]
        made = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return made["input_ids"], made["assistant_masks"]

    rows = [(encode(pair, "chosen"), encode(pair, "rejected")) for pair in pairs]
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]

    def logps(batch: list[Any]) -> Any:
        """(2, pairs)"""
        lines = [pair[side] for side in (0, 1) for pair in batch]
        longest = max(len(ids) for ids, _ in lines)
        ids = torch.full((len(lines), longest), tokenizer.pad_token_id)
        mask, trained = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (line, marks) in enumerate(lines):
            ids[i, : len(line)], mask[i, : len(line)], trained[i, : len(line)] = (
                torch.tensor(line),
                1,
                torch.tensor(marks),
            )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (each * trained[:, 1:]).sum(1).view(2, -1)

    start = time.perf_counter()
    with torch.no_grad():
        references = [logps(batch) for batch in batches]
    apart = time.perf_counter() - start
    optimizer = torch.optim.AdamW(model.parameters(), lr=train["learning_rate"])
    epochs, losses = train.get("num_train_epochs", 1), []
    start = time.perf_counter()
    for _ in range(epochs):
        for batch, reference in zip(batches, references, strict=True):
            ratios = logps(batch) - reference
            loss = -logsigmoid(BETA * (ratios[0] - ratios[1])).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return figures(len(rows), epochs, time.perf_counter() - start, apart, losses[:1], before)


def trl(folder: Path, computed: bool = False) -> Figures:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.ones(4, 4, requires_grad=True).sum().backward()
    datasets.disable_caching()
    apart = 0.0

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any) -> Any:
            nonlocal apart
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            apart += time.perf_counter() - start
            return dataset

    before = begin()
    rows, train = given(folder)
    args = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        gradient_checkpointing=False, precompute_ref_log_probs=computed, train_sampling_strategy="sequential", **train,
    )  # fmt: skip
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"), args=args,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return figures(len(rows), train.get("num_train_epochs", 1), seconds, apart, losses, before)


def ours(folder: Path, watched: bool = False) -> Figures:
    import ray
    import torch
    import trl.trainer.dpo_trainer

    from stages import DPO, StageContext
    from stages.base import Artifact
    from stages.training.trainer import import_trainers

    assert trl
    import_trainers()
    torch.ones(4, 4, requires_grad=True).sum().backward()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    before = begin()
    rows, train = given(folder)
    work = Path(tempfile.mkdtemp(dir=folder))
    config = {"data": [{"path": str(folder / "pairs.jsonl")}], "train": train, "shuffle": False}
    stage = DPO.model_validate(config if watched else config | {"watch": {"prompts": 0}})
    result = stage.run(
        # The reference is kept beside the prepared data, which is therefore of this process alone.
        StageContext("stage", work, work / "prepared", {"model": [Artifact("base", "model", str(folder / "model"))]})
    )
    events = [json.loads(line) for line in (work / "events.jsonl").open()]
    came = {event["phase"]: event["time"] for event in events if "phase" in event}
    losses = [json.loads(line).get("loss") for line in (work / "metrics.jsonl").open()]
    reference = result.details["reference"]
    assert not reference["reused"] and result.rows == len(rows)
    seconds, epochs = came["export"] - came["train"], train.get("num_train_epochs", 1)
    told = [loss for loss in losses if loss is not None]
    return figures(len(rows), epochs, seconds, reference["seconds"], told, before)


WAYS: dict[str, Callable[[Path], Figures]] = {
    "bare": bare,
    "ours": ours,
    "watched": lambda folder: ours(folder, watched=True),
    "trl": trl,
    "computed": lambda folder: trl(folder, computed=True),
}


def run(way: str, folder: str) -> Figures:
    from stages.training.launch import ENVIRONMENT

    environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, __file__, folder, "--way", way], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{way}:\n{done.stderr[-3000:]}")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    shown = {k: v for k, v in found.items() if k != "losses"}
    print(f"{way:9}{shown}, machine's load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def check_losses(found: dict[str, Figures]) -> None:
    """Those of the same steps agree, or the comparison is not one."""
    for way, told in found.items():
        if abs(told["losses"][0] - math.log(2)) > 1e-5:
            sys.exit(f"{way}: the first loss is {told['losses'][0]}, not ln 2")
    same = {way: told["losses"] for way, told in found.items() if way != "bare" and len(told["losses"]) > 1}
    if len(same) > 1:
        apart = [max(each) - min(each) for each in zip(*same.values(), strict=True)]
        print(f"losses of {', '.join(same)}: {apart[1]:.1e} apart up to step 10, at most {max(apart):.1e} later")
        if apart[1] > 1e-4:
            sys.exit(f"losses differ: {same}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.rows)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            make(options.rows, Path(folder), 3 * BATCH, True, {"num_train_epochs": 1})
            found = {way: run(way, folder) for way in options.only}
            check_losses(found)
            for over in ("trl", "computed", "bare"):
                if {"ours", over} <= found.keys():
                    print(f"ours / {over}, peak memory: {found['ours']['peak'] / found[over]['peak']:.2f}")
            return
        make(options.rows, Path(folder), options.pairs, False, {"num_train_epochs": options.epochs})
        seen: dict[str, list[Figures]] = {way: [] for way in options.only}
        for _ in range(options.rounds):
            for way in options.only:
                seen[way].append(run(way, folder))
        check_losses({way: told[-1] for way, told in seen.items()})
    for of, over in (("ours", "trl"), ("ours", "computed"), ("ours", "bare"), ("watched", "ours"), ("watched", "trl")):
        if of in seen and over in seen:
            turns = list(zip(seen[of], seen[over], strict=True))
            for unit, ratios in (
                ("pairs/s", [a["pairs"] / b["pairs"] for a, b in turns]),
                ("pairs a processor second", [b["processor"] / a["processor"] for a, b in turns]),
            ):
                print(
                    f"{of} / {over}, {unit}: median {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]}"
                )


if __name__ == "__main__":
    main()
