"""Trainings that are cut off: by SIGKILL of workers or of the driver at any step, then run again, to the very same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stages import KINDS, Init, StageContext, forkserver
from stages.base import Artifact, Resources, StageResult
from stages.errors import StageError
from stages.training import recovery
from stages.training import trainer as trainer_module
from stages.training.checkpoint import COMPLETE
from stages.training.consumption import check_consumption
from stages.training.writer import write_state

from ..conftest import LLAMA, prepared_beside
from ..processes import family
from .test_training import train, weights

ROWS = 101  # 13 steps of 8 an epoch, the last of 5
WITH_DROPOUT = LLAMA | {"attention_dropout": 0.2}


@pytest.fixture(scope="module")
def dropping(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with dropout, so that weights are the same only if random numbers are."""
    work = tmp_path_factory.mktemp("dropping")
    config = {"config": WITH_DROPOUT, "tokenizer": {"vocab_size": 320}, "data": [{"path": str(data / "chats.jsonl")}]}
    Init.model_validate(config).run(StageContext("base", work, work / "prepared", {}))
    return str(work / "model")


def sft(
    folder: Path,
    model: str,
    data: Path,
    workers: int,
    at_step: Callable[[int, int], None] | None = None,
    /,
    stall: float = 600.0,
    resources: Resources | None = None,
    **config: Any,
) -> StageResult:
    """Run the stage in its folder, again where it was begun; `at_step(rank, step)` is called after each step on each worker."""

    def watched(job: dict[str, Any]) -> Any:
        from transformers import TrainerCallback

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                at_step(args.process_index, state.global_step)  # type: ignore[misc]

        def build(parts: Any) -> Any:
            made = job["build"](parts)
            made.add_callback(Watch())
            return made

        return trainer_module.train_on_worker(job | {"build": build})

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"train": train(8 // workers, save_steps=3, logging_steps=2)} | config
    stage = KINDS["sft"].model_validate({"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]} | settings)
    with pytest.MonkeyPatch.context() as patch, prepared_beside(folder) as prepared:
        context = StageContext(
            "stage", folder, prepared, {"model": [Artifact("base", "model", model)]},
            resources=resources or Resources(workers=workers, stall_minutes=stall / 60),
            local=workers == 1 and "deepspeed" not in config,
        )  # fmt: skip
        if at_step is not None:
            patch.setattr(recovery, "train_on_worker", watched)
        return stage.run(context)


def once(folder: Path, signal: int, ranks: set[int], at: int) -> Callable[[int, int], None]:
    """Send the worker's own process a signal after a step; not again after it has been replaced."""

    def at_step(rank: int, step: int) -> None:
        marker = folder / f"signalled-{rank}"
        if step == at and rank in ranks and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal)

    return at_step


def accident(rank: int, step: int) -> None:
    if step == 11:
        raise RuntimeError("an accident")


def log(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [
        {k: line.get(k) for k in ("step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens")}
        for line in lines
    ]


def assert_same(whole: Path, cut: Path) -> None:
    wanted, got = weights(whole), weights(cut)
    assert set(wanted) == set(got) and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert log(whole) == log(cut)
    assert (whole / "consumed.jsonl").read_text() == (cut / "consumed.jsonl").read_text()


def test_one_worker_goes_on_from_its_checkpoint_or_the_one_before(
    ray_address: str, tmp_path: Path, dropping: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted after step 11 of 13; the newest checkpoint (9) is damaged; a model of another shape is refused."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = sft(whole, dropping, data, 1)
    assert result.details["consumption"] == {"steps": 13, "epochs": 1, "rows_after": 0, "problems": []}
    with pytest.raises(RuntimeError, match="an accident"):
        sft(cut, dropping, data, 1, accident)
    folder = cut / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-6", "checkpoint-9"]
    assert not list(folder.rglob("*.safetensors")) and not list(folder.rglob("tokenizer*"))

    newest = folder / "checkpoint-9" / "weights.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:-100] + bytes(100))
    capsys.readouterr()
    assert sft(cut, dropping, data, 1).steps == 13
    told = capsys.readouterr().out
    assert "checkpoint-9 is damaged (weights.pt has changed since it was written)" in told
    assert "training goes on from checkpoint-6" in told
    assert_same(whole, cut)
    sft(cut, dropping, data, 1)  # and once more: nothing is left to train, the model stays
    assert_same(whole, cut)

    with pytest.raises(StageError, match=r"checkpoint-13 is of another model .* remove .*checkpoints"):
        sft(cut, dropping, data, 1, tuning={"method": "lora", "r": 4})


def test_weights_in_four_bits_go_on_from_their_checkpoint(
    ray_address: str, tmp_path: Path, dropping: str, data: Path
) -> None:
    """The checkpoint has the adapter; the base is quantised again."""
    pytest.importorskip("bitsandbytes")
    tuning = {"method": "qlora", "r": 4, "lora_dropout": 0.2, "bnb_4bit_use_double_quant": True}
    sft(tmp_path / "whole", dropping, data, 1, tuning=tuning)
    with pytest.raises(RuntimeError, match="an accident"):
        sft(tmp_path / "cut", dropping, data, 1, accident, tuning=tuning)
    stored = torch.load(tmp_path / "cut" / "checkpoints" / "checkpoint-9" / "weights.pt", weights_only=True)
    assert stored and all("lora_" in name for name in stored)
    assert sft(tmp_path / "cut", dropping, data, 1, tuning=tuning).steps == 13
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_early_stopping_counts_on_after_an_interruption(
    ray_address: str, tmp_path: Path, dropping: str, data: Path
) -> None:
    """No evaluation is better by the threshold: the fourth, at step 12, is the third in vain. Cut off after step 11."""
    config = {
        "train": train(8, num_train_epochs=2, logging_steps=2, eval_strategy="steps", eval_steps=3, save_steps=3),
        "data": [{"path": str(data / "chats.jsonl"), "eval": "20%"}],
        "early_stopping": {"patience": 3, "threshold": 100.0},
    }
    assert sft(tmp_path / "whole", dropping, data, 1, **config).steps == 12
    with pytest.raises(RuntimeError, match="an accident"):
        sft(tmp_path / "cut", dropping, data, 1, accident, **config)
    assert sft(tmp_path / "cut", dropping, data, 1, **config).steps == 12
    assert_same(tmp_path / "whole", tmp_path / "cut")
    ledger = (tmp_path / "cut" / "consumed.jsonl").read_text()
    assert sft(tmp_path / "cut", dropping, data, 1, **config).steps == 12, "it had stopped: nothing is left to train"
    assert (tmp_path / "cut" / "consumed.jsonl").read_text() == ledger
    wanted, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_while_it_trains_a_users_code_loads_what_it_likes(
    ray_address: str, tmp_path: Path, model: str, data: Path
) -> None:
    """Only checkpoints are held to tensors; before and after one is gone on from."""
    torch.save({"of": Path("mine")}, tmp_path / "own.pt")
    read: list[int] = []

    def loads(rank: int, step: int) -> None:
        read.append(step)
        assert torch.load(tmp_path / "own.pt", weights_only=False) == {"of": Path("mine")}
        if step == 11 and read.count(11) == 1:
            raise RuntimeError("an accident")

    with pytest.raises(RuntimeError, match="an accident"):
        sft(tmp_path / "sft", model, data, 1, loads)
    sft(tmp_path / "sft", model, data, 1, loads)
    assert read == [*range(1, 12), *range(10, 14)]


class Evil:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.slow
def test_a_shard_of_deepspeeds_runs_nothing(ray_address: str, tmp_path: Path, model: str, data: Path) -> None:
    """Its hash is right: whoever can change a file can change that too."""
    folder, mark = tmp_path / "sft", tmp_path / "mark"
    with pytest.raises(RuntimeError, match="an accident"):
        sft(folder, model, data, 1, accident, deepspeed="zero1")
    checkpoint = folder / "checkpoints" / "checkpoint-9"
    (shard,) = checkpoint.rglob("*optim_states.pt")
    state = torch.load(shard, weights_only=False)
    record = json.loads((checkpoint / COMPLETE).read_text())
    record["files"][str(shard.relative_to(checkpoint))] = write_state(shard, state | {"more": Evil(mark)})
    (checkpoint / COMPLETE).write_text(json.dumps(record))
    with pytest.raises(StageError, match=r"checkpoint-9 holds more than tensors.*system"):
        sft(folder, model, data, 1, deepspeed="zero1")
    assert not mark.exists()


def elsewhere(job: dict[str, Any]) -> Any:
    """The worker's own function, where the second worker's disk is another."""

    def build(parts: Any) -> Any:
        made = job["build"](parts)
        if made.args.process_index == 1:
            made.args.output_dir = str(job["job"].work.parent / "other disk" / "checkpoints")
        return made

    return trainer_module.train_on_worker(job | {"build": build})


@pytest.mark.slow
def test_workers_that_do_not_share_a_disk_are_told_so(
    ray_address: str, tmp_path: Path, model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other disk").mkdir()
    monkeypatch.setattr(recovery, "train_on_worker", elsewhere)
    with pytest.raises(StageError, match=r"workers do not share .*: set `storage` to a path that every node mounts"):
        sft(tmp_path / "sft", model, data, 2)
    assert not list((tmp_path / "sft").glob(".shared-*"))


@pytest.mark.slow
def test_a_killed_worker_of_two(ray_address: str, tmp_path: Path, dropping: str, data: Path) -> None:
    at = random.randint(4, 12)
    print("killed at step", at)
    whole = sft(tmp_path / "whole", dropping, data, 2)
    cut = sft(tmp_path / "cut", dropping, data, 2, once(tmp_path, signal.SIGKILL, {1}, at))
    assert cut.steps == 13 and (tmp_path / "signalled-1").exists()
    assert whole.details["workers"] == {"workers": 2, "lost": 0, "resizes": 0}
    assert cut.details["workers"] == {"workers": 2, "lost": 1, "resizes": 0}
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again(
    ray_address: str,
    tmp_path: Path,
    model: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number of times without a new checkpoint, and the stage says so; its checkpoint stays."""

    def at_step(rank: int, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(recovery, "RESTARTS", 1)
    with pytest.raises(StageError, match=r"a worker was lost[\s\S]*2 times without a checkpoint since step 3"):
        sft(tmp_path / "sft", model, data, 2, at_step)
    assert "training goes on from checkpoint-3" in capsys.readouterr().out
    assert (tmp_path / "sft" / "checkpoints" / "checkpoint-3").is_dir()


@pytest.mark.slow
def test_a_worker_that_stands_still_is_named_and_replaced(
    ray_address: str, tmp_path: Path, dropping: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped (SIGSTOP), or standing in somebody's code while the other waits for it."""
    sft(tmp_path / "whole", dropping, data, 2)
    stopped = sft(tmp_path / "stopped", dropping, data, 2, once(tmp_path, signal.SIGSTOP, {1}, 5), stall=5.0)
    told = capsys.readouterr().out
    assert "worker 1 (process" in told and "has not been heard of for 5 s, since step" in told
    assert stopped.details["workers"]["lost"] == 1
    assert_same(tmp_path / "whole", tmp_path / "stopped")

    def stands_still(rank: int, step: int) -> None:
        if step == 5 and rank == 0 and not (tmp_path / "stood").exists():
            (tmp_path / "stood").touch()
            time.sleep(600)

    standing = sft(tmp_path / "standing", dropping, data, 2, stands_still, stall=5.0)
    told = capsys.readouterr().out
    assert "nothing has moved for 5 s, since step" in told and "worker 0" in told and "stands in stands_still" in told
    assert "worker 1" not in told.split("nothing has moved")[1].splitlines()[0], "it waits in a collective"
    assert standing.details["workers"]["lost"] == 1
    assert_same(tmp_path / "whole", tmp_path / "standing")


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "zero3"])
def test_fewer_workers_where_there_is_room_for_fewer_and_more_when_there_is_more(
    ray_address: str, tmp_path: Path, model: str, data: Path, deepspeed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`workers: 1..2` on a cluster of 4 CPUs of which 3 are taken until the first steps are made: the same steps, of the same
    rows, and the same model as with 2 workers from the start."""
    import ray

    @ray.remote(num_cpus=3)
    class Other:
        pass

    settings = {"train": train(4, save_steps=100, num_train_epochs=3)} | ({"deepspeed": deepspeed} if deepspeed else {})
    whole = sft(tmp_path / "whole", model, data, 2, **settings)
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 1.0)
    other = Other.remote()
    ray.get(other.__ray_ready__.remote())

    def slowly(rank: int, step: int) -> None:
        import torch.distributed as dist

        workers = dist.get_world_size() if dist.is_initialized() else 1
        if workers == 1:
            (tmp_path / "begun").touch()
            time.sleep(0.5)

    def leave() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.1)
        ray.kill(other)

    leaving = threading.Thread(target=leave)
    leaving.start()
    elastic = Resources(workers=2, at_least=1)
    result = sft(tmp_path / "sft", model, data, 2, slowly, resources=elastic, **settings)
    leaving.join()
    assert result.details["workers"] == {"workers": 2, "lost": 0, "resizes": 1}
    lines = [json.loads(line) for line in (tmp_path / "sft" / "consumed.jsonl").open()]
    assert [line["workers"] for line in lines] == sorted(line["workers"] for line in lines)
    assert {line["workers"] for line in lines} == {1, 2}
    assert result.steps == whole.steps == 39 and result.details["consumption"]["problems"] == []
    wanted, got = log(tmp_path / "whole"), log(tmp_path / "sft")
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in wanted], rel=1e-4)
    trained = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "sft").items():
        assert torch.allclose(tensor, trained[name], atol=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"deepspeed": "zero2"},
        {"deepspeed": "zero3"},
        {"deepspeed": "zero3", "tuning": {"method": "lora", "r": 4, "lora_dropout": 0.2}},
    ],
    ids=["zero2", "zero3", "zero3 lora"],
)
def test_all_workers_killed_under_deepspeed(
    ray_address: str, tmp_path: Path, dropping: str, data: Path, config: dict[str, Any]
) -> None:
    at = random.randint(4, 12)
    print("killed at step", at)
    sft(tmp_path / "whole", dropping, data, 2, **config)
    cut = sft(tmp_path / "cut", dropping, data, 2, once(tmp_path, signal.SIGKILL, {0, 1}, at), **config)
    assert cut.steps == 13 and cut.details["workers"]["lost"] == 1
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_workers_then_one_then_two(ray_address: str, tmp_path: Path, model: str, data: Path) -> None:
    """Another number of workers cuts steps of another size, from where the last ones stopped. With ZeRO it is the same
    training: its checkpoints are converted."""
    losses: dict[str, list[dict[str, Any]]] = {}
    for name in ("none", "zero2", "zero3"):
        folder, config = tmp_path / name, {} if name == "none" else {"deepspeed": name}
        settings = config | {"train": train(4, save_steps=3, num_train_epochs=2, weight_decay=0.1)}
        for workers, stop in ((2, 5), (1, 9)):
            with pytest.raises(RuntimeError, match="stop"):
                sft(folder, model, data, workers, stopping(folder, stop), **settings)
        result = sft(folder, model, data, 2, **settings)
        lines = [json.loads(line) for line in (folder / "consumed.jsonl").open()]
        # 3 steps of 8 rows and 3 of 4 are 36; 9 steps of 8 for the other 65 of the epoch, 13 for the second epoch
        assert result.steps == 3 + 3 + 9 + 13
        assert [line["workers"] for line in lines] == [2] * 3 + [1] * 3 + [2] * (result.steps - 6)
        assert check_consumption(lines, ROWS).as_dict() == {
            "steps": result.steps,
            "epochs": 2,
            "rows_after": 0,
            "problems": [],
        }
        losses[name] = [line["loss"] for line in log(folder)]
    assert losses["zero2"] == pytest.approx(losses["none"], rel=1e-5)
    assert losses["zero3"] == pytest.approx(losses["none"], rel=1e-5)


def stopping(folder: Path, at: int) -> Callable[[int, int], None]:
    """Raise after a step, when the checkpoint of three steps or so before is there."""

    def at_step(rank: int, step: int) -> None:
        if step >= at:
            wanted = folder / "checkpoints" / f"checkpoint-{(at - 1) // 3 * 3}"
            while not wanted.is_dir():
                time.sleep(0.05)
            raise RuntimeError("stop")

    return at_step


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"deepspeed": "zero2"}, {"deepspeed": "zero3"}], ids=["none", "zero2", "zero3"])
def test_the_best_model_is_loaded_from_its_checkpoint(
    ray_address: str, tmp_path: Path, model: str, data: Path, config: dict[str, Any]
) -> None:
    """The best is taken to be the greatest loss, which is that of the first step."""
    settings = train(
        4, max_steps=5, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    source = [{"path": str(data / "chats.jsonl"), "eval": "20%"}]
    result = sft(tmp_path / "sft", model, data, 2, train=settings, data=source, **config)
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").open()]
    losses = {line["step"]: line["eval_loss"] for line in reversed(lines) if "eval_loss" in line}
    assert max(losses, key=losses.__getitem__) == 1 and losses[1] > losses[5] + 0.01
    assert result.metrics["eval_loss"] == pytest.approx(losses[1], rel=1e-6)
    kept = sorted(p.name for p in (tmp_path / "sft" / "checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]


# ------------------------------------------------------------------------------------------------ the whole command

SPEC = """
name: {name}
storage: runs
cluster: {{workers: 2}}
model: {model}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    train: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, num_train_epochs: 10, logging_steps: 5, save_steps: 10}}
"""


def started(folder: Path, name: str, model: str, data: Path) -> subprocess.Popen[str]:
    (folder / f"{name}.yaml").write_text(SPEC.format(name=name, model=model, data=data))
    env = {
        k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", forkserver.WANTED)
    }  # its processes are its own
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", f"{name}.yaml"], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(dropping: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = started(folder, "whole", dropping, data)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return folder / "runs" / "whole" / "sft"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["workers", "driver"])
def test_a_run_goes_on_after_sigkill(undisturbed: Path, tmp_path: Path, dropping: str, data: Path, victim: str) -> None:
    at = 5 * random.randint(3, 20)
    print("killed at step", at)
    process = started(tmp_path, "cut", dropping, data)
    deadline = time.time() + 200
    while time.time() < deadline and not steps_done(tmp_path) >= at:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    others = family(psutil.Process(process.pid))
    killed = [p for p in others if "RayTrainWorker" in " ".join(p.cmdline())] if victim == "workers" else [process]
    assert len(killed) == (2 if victim == "workers" else 1)
    for each in killed:
        each.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (0 if victim == "workers" else -signal.SIGKILL), out + err
    psutil.wait_procs(others, timeout=30)
    if victim == "driver":
        again = started(tmp_path, "cut", dropping, data)
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, out + err
        assert "goes on where it was" in out
    assert_same(undisturbed, tmp_path / "runs" / "cut" / "sft")
    made = json.loads((tmp_path / "runs" / "cut" / "sft" / "manifest.json").read_text())
    assert made["workers"] == 2
    assert made["details"]["consumption"] == {"steps": 130, "epochs": 10, "rows_after": 0, "problems": []}


def steps_done(folder: Path) -> int:
    for path in folder.glob("runs/cut/.work/sft-*/consumed.jsonl"):
        return len(path.read_text().splitlines())
    return 0
