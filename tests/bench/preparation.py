"""How fast rows become masked tokens, beside TRL's own preparation and the bare tokenizer. One run, side by side, as ratios.

    python tests/bench/preparation.py questions.jsonl            # encoder and TRL
    python tests/bench/preparation.py questions.jsonl --ray      # through Ray Data, 200,000 rows, with Parquet written
    python tests/bench/preparation.py questions.jsonl --nodes    # the same on two nodes of one core each, and on one
    python tests/bench/preparation.py questions.jsonl --memory   # peak memory of 20,000 and 200,000 rows

`questions.jsonl` has rows of `question` and `answer` (GSM8K's do); two of them make a two-turn chat. Each figure is the median
of interleaved rounds, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROUNDS = 5
BATCH = 10_000
START, END = "<|im_start|>", "<|im_end|>"


Chat = list[dict[str, str]]


def chats(path: Path, count: int) -> Iterator[Chat]:
    rows = [json.loads(line) for line in path.open()]
    for i in range(count):
        pair = (rows[i % len(rows)], rows[(i * 7 + i // len(rows) + 1) % len(rows)])
        turns = [(("user", row["question"]), ("assistant", row["answer"])) for row in pair]
        yield [{"role": role, "content": content} for turn in turns for role, content in turn]


def tokenizer(path: Path) -> Any:
    """A byte-level BPE of 16,000 tokens, made of the data itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from stages.data.chat import CHATML

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["<|pad|>", START, END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((" ".join(m["content"] for m in chat) for chat in chats(path, 8000)), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": [START]})
    made.chat_template = CHATML
    return made


def rounds(ways: dict[str, Callable[[], None]], rows: int, count: int = ROUNDS) -> dict[str, float]:
    """Rows a second of each way, the median of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: rows / statistics.median(taken) for name, taken in times.items()}


def encoder_bench(path: Path) -> None:
    from stages.data.chat import ChatEncoder, load_tokenizer_json, tokenizer_spec

    made, conversations = tokenizer(path), list(chats(path, 20_000))
    spec = tokenizer_spec(made)
    bare, encoder = load_tokenizer_json(spec.json), ChatEncoder(spec)
    texts = [encoder.render(chat) for chat in conversations]

    def batches(items: list[Any], way: Callable[[list[Any]], Any]) -> Callable[[], None]:
        def run() -> None:
            for at in range(0, len(items), BATCH):
                way(items[at : at + BATCH])

        return run

    speed = rounds(
        {
            "encode_batch_fast, no masks": batches(
                texts, lambda batch: bare.encode_batch_fast(batch, add_special_tokens=False)
            ),
            "ChatEncoder": batches(conversations, encoder.encode_batch),
        },
        len(texts),
    )
    for name, processes in (("TRL, assistant_only_loss", None), ("the same, a process for each core", os.cpu_count())):
        speed[name] = statistics.median(trl_speed(made, conversations[:8000], processes) for _ in range(3))
    show(speed, "encode_batch_fast, no masks")


def trl_speed(made: Any, conversations: list[Any], processes: int | None) -> float:
    """TRL's own preparation with a template that marks the assistant's tokens; its default is one process."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from stages.data.chat import CHATML

    content = "{{ message['content'] }}<|im_end|>"
    tagged = (
        "{% if message.role == 'assistant' %}{% generation %}"
        + content
        + "{% endgeneration %}{% else %}"
        + content
        + "{% endif %}"
    )
    made.chat_template = CHATML.replace(content, tagged)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=len(made), **sizes)
    data = datasets.Dataset.from_list([{"messages": chat} for chat in conversations])
    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, assistant_only_loss=True, max_length=None, use_cpu=True, report_to="none", bf16=False,
            dataset_num_proc=processes,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        small = data.select(range(8))
        trainer = SFTTrainer(model, args, train_dataset=small, processing_class=made)
        started = time.perf_counter()
        trainer._prepare_dataset(data, made, args, False, None, "train")
        return len(conversations) / (time.perf_counter() - started)


def ray_bench(path: Path, rows: int) -> None:
    """JSON Lines to Parquet through Ray Data, beside the bare tokenizer on texts that are in memory already."""
    import ray

    from stages.data.chat import ChatEncoder, load_tokenizer_json, tokenizer_spec
    from stages.data.encode import Recipe
    from stages.data.prepare import prepare
    from stages.data.source import DataSource
    from stages.training.launch import quiet_ray

    spec = tokenizer_spec(tokenizer(path))
    bare, encoder = load_tokenizer_json(spec.json), ChatEncoder(spec)
    with tempfile.TemporaryDirectory() as folder:
        source = write(path, Path(folder) / "chats.jsonl", rows)
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        quiet_ray()
        turn = iter(range(100))

        def through_ray() -> None:
            prepare([DataSource(path=str(source))], Recipe("conversation", spec), Path(folder) / str(next(turn)))

        def tokenise() -> None:
            for at in range(0, rows, BATCH):
                bare.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)

        texts = [encoder.render(chat) for chat in chats(path, rows)]
        speed = rounds({"encode_batch_fast, no masks": tokenise, "Ray Data to Parquet": through_ray}, rows, 3)
        show(speed, "encode_batch_fast, no masks")


def nodes_bench(path: Path, rows: int) -> None:
    """Rows a second through Ray Data on two nodes of this machine, beside one; each in a process and a cluster of its own."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for nodes, taken in seconds.items():
            command = [sys.executable, __file__, str(path), "--ray", str(rows), "--on-nodes", str(nodes)]
            taken.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    for nodes, taken in seconds.items():
        print(f"{nodes} nodes: {' '.join(f'{s:.1f}' for s in taken)} s for {rows:,} rows")
    print(f"two nodes / one, rows/s: median {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]}")


def on_nodes(path: Path, rows: int, nodes: int) -> None:
    """Seconds, after a first preparation of few rows: Ray's processes are started then."""
    import ray
    from ray.cluster_utils import Cluster

    from stages.data.chat import tokenizer_spec
    from stages.data.encode import Recipe
    from stages.data.prepare import prepare
    from stages.data.source import DataSource
    from stages.training.launch import quiet_ray

    recipe = Recipe("conversation", tokenizer_spec(tokenizer(path)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    quiet_ray()
    with tempfile.TemporaryDirectory() as folder:
        for count in (2_000, rows):
            source = write(path, Path(folder) / f"{count}.jsonl", count)
            started = time.perf_counter()
            prepare([DataSource(path=str(source))], recipe, Path(folder) / str(count))
        print(time.perf_counter() - started)
    ray.shutdown()
    cluster.shutdown()


def memory_bench(path: Path) -> None:
    """Peak resident memory of a process that prepares chunk after chunk, and of one with ten times the rows."""
    peaks = {}
    for rows in (20_000, 200_000):
        done = subprocess.run(
            [sys.executable, __file__, str(path), "--prepare-here", str(rows)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[rows] = int(done.stdout.split()[-1])
        print(f"{rows:>8} rows: {peaks[rows] / 1024:.0f} MiB")
    print(f"ratio {peaks[200_000] / peaks[20_000]:.3f}")


def prepare_here(path: Path, rows: int) -> None:
    """What the tasks do, one after the other in this process."""
    from stages.data.chat import tokenizer_spec
    from stages.data.chunks import chunks
    from stages.data.encode import Recipe
    from stages.data.shards import prepare_chunk
    from stages.data.source import DataSource, find_files

    recipe = Recipe("conversation", tokenizer_spec(tokenizer(path)))
    with tempfile.TemporaryDirectory() as folder:
        source = DataSource(path=str(write(path, Path(folder) / "chats.jsonl", rows)))
        (file,) = find_files(source)
        for index, chunk in enumerate(chunks(0, file)):
            prepare_chunk(index, chunk, source, "messages", recipe, Path(folder))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def write(path: Path, target: Path, rows: int) -> Path:
    with target.open("w") as out:
        out.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats(path, rows))
    return target


def show(speed: dict[str, float], base: str) -> None:
    for name, value in speed.items():
        print(f"{name:34} {value:9,.0f} rows/s   {value / speed[base]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ray", type=int, nargs="?", const=200_000, metavar="ROWS")
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--on-nodes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prepare-here", type=int, metavar="ROWS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare_here:
        prepare_here(given.data, given.prepare_here)
    elif given.on_nodes:
        on_nodes(given.data, given.ray, given.on_nodes)
    elif given.nodes:
        nodes_bench(given.data, given.ray or 200_000)
    elif given.memory:
        memory_bench(given.data)
    elif given.ray:
        ray_bench(given.data, given.ray)
    else:
        encoder_bench(given.data)


if __name__ == "__main__":
    main()
