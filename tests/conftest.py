"""What tests share: tiny data and models made on the spot, and one Ray for the whole session."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline.cluster import WORKER_PROCESSES
from stages import forkserver, own
from stages.training.launch import ENVIRONMENT

os.environ.update(ENVIRONMENT | WORKER_PROCESSES | {"TORCHDYNAMO_DISABLE": "1"})
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ[forkserver.WANTED] = str(os.getpid())  # all runs of the tests are forked from the same process
os.environ["COLUMNS"] = "160"

# Modules that specs of tests name: Ray's processes, which the tests share, are told where to look when they are started.
CODE = Path(tempfile.mkdtemp(prefix="pytest-code-"))
atexit.register(shutil.rmtree, CODE, ignore_errors=True)
own.use(str(CODE))

# The same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)  # a shared machine may be slow
settings.register_profile("explore", settings.get_profile("default"), max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.06,
}  # fmt: skip


BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="slow and cluster tests that would begin after so many are skipped",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    long = item.get_closest_marker("slow") or item.get_closest_marker("cluster")
    if budget is not None and long and time.monotonic() - BEGUN > 60 * budget:
        pytest.skip(f"no time left of {budget:g} minutes")


PREPARED = Path(tempfile.mkdtemp(prefix="pytest-prepared-"))
atexit.register(shutil.rmtree, PREPARED, ignore_errors=True)


@contextmanager
def prepared_beside(work: Path) -> Iterator[Path]:
    """A folder for prepared data beside a stage's, with what other tests have prepared (it is addressed by content), so that
    each test of a training does not prepare the same rows again. References and samples are a test's own."""

    def link(source: Path, target: Path) -> None:
        for folder in source.glob("[!.]*"):
            if (
                not any(part in folder.name for part in ("reference", "samples"))
                and not (target / folder.name).exists()
            ):
                shutil.copytree(folder, target / folder.name, copy_function=os.link)

    folder = work.parent / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    link(PREPARED, folder)
    yield folder
    link(folder, PREPARED)


def chat(rng: random.Random, turns: int = 2) -> list[dict[str, str]]:
    """A conversation whose answers are the questions backwards."""
    messages = [{"role": "system", "content": "Answer in small letters."}]
    for _ in range(turns):
        letters = rng.sample("abcdefgh", 3)
        messages.append({"role": "user", "content": "Reverse: " + " ".join(letters)})
        messages.append({"role": "assistant", "content": " ".join(reversed(letters))})
    return messages


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """Modules that a test wrote beside its spec are gone after it: the next one's may have the same name."""
    path, modules = list(sys.path), set(sys.modules)
    own.use(str(CODE))
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if any(sign in str(getattr(sys.modules[name], "__file__", None)) for sign in ("pytest-of-", "pytest-code-")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chats.jsonl (101 rows), pairs.jsonl (37), heldout.jsonl (20): numbers that nothing divides evenly."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    write_jsonl(folder / "chats.jsonl", [{"messages": chat(rng, rng.choice((1, 2, 3)))} for _ in range(101)])
    pairs = []
    for _ in range(37):
        messages = chat(rng)
        wrong = {"role": "assistant", "content": messages[-1]["content"][::-1] + " h"}
        pairs.append({"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [wrong]})
    write_jsonl(folder / "pairs.jsonl", pairs)
    heldout = [chat(rng) for _ in range(20)]
    write_jsonl(folder / "heldout.jsonl", [{"messages": m, "expected": m[-1]["content"]} for m in heldout])
    return folder


@pytest.fixture(scope="session")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder of about 0.1 million parameters, made by the `init` stage itself."""
    from stages import Init, StageContext

    work = tmp_path_factory.mktemp("model")
    stage = Init.model_validate(
        {"config": LLAMA, "tokenizer": {"vocab_size": 320}, "data": [{"path": str(data / "chats.jsonl")}]}
    )
    stage.run(StageContext("base", work, work / "prepared", {}))
    return str(work / "model")


@pytest.fixture(scope="session")
def tokenizer(model: str) -> Any:
    from stages.data.tokenizer import load_tokenizer

    return load_tokenizer(model)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server on loopback with a bucket; what stands behind addresses there (stages/data/files.py)."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
    yield f"?endpoint_override={host}:{port}&scheme=http"
    server.stop()


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray for every test; what starts runs of its own uses it through RAY_ADDRESS."""
    import ray

    own.use(
        str(CODE)
    )  # the test before may have named another folder, and Ray's processes have what Ray is started with
    context = ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=256 << 20, runtime_env={"py_executable": forkserver.py_executable()},
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    ray.shutdown()
