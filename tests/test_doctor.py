"""`raylign doctor`: every check says something, none fails, and what makes runs impossible is a problem."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline import doctor
from pipeline.doctor import Check


def found(check: object) -> dict[str, Check]:
    return {each.name: each for each in doctor.safely(check)}  # type: ignore[arg-type]


def test_everything_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    checks = doctor.examine()
    assert {"python", "versions", "torch", "compiler", "machine", "disk", "open files", "hub", "cluster"} <= {
        c.name for c in checks
    }
    assert all(check.state in ("ok", "note", "problem") and check.says for check in checks)
    assert not [check for check in checks if "could not be looked at" in check.says]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.render(checks))
    assert "ready" in console.export_text()


def test_a_library_of_another_version_is_a_problem_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.0.0" if name == "transformers" else installed(name)
    )
    (check,) = doctor.safely(doctor._stack)
    assert check.state == "problem" and "is 4.0.0, wanted " in check.says
    assert check.command.startswith("pip install 'transformers<5.24,>=") or check.command.startswith(
        "pip install 'transformers>="
    )


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = doctor.safely(doctor._stack)
    assert {"torch", "ray", "trl"} <= {check.name for check in checks}
    assert all(check.state == "problem" and "is not installed" in check.says for check in checks)


def test_a_cluster_that_does_not_answer_is_a_problem_and_soon_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    check = found(doctor._cluster)["cluster"]
    assert check.state == "problem" and "no Ray answers there" in check.says and check.command == "unset RAY_ADDRESS"


def test_a_port_that_takes_calls_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of doctor is over in a bounded time, whatever hangs."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor, "_torch", lambda: iter(()))
        begun = time.monotonic()
        checks = {check.name: check for check in doctor.examine()}
        assert checks["cluster"].state != "ok" and time.monotonic() - begun < 30


def test_little_disk_memory_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    disk = found(doctor._disk)
    assert (
        disk["disk"].state == "problem"
        and "no room for a run" in disk["disk"].says
        and disk["hub's cache"].state == "note"
    )
    assert found(doctor._shared_memory)["/dev/shm"].state == "note"
    files = found(doctor._open_files)["open files"]
    assert files.state == "note" and files.command == "ulimit -n 1024"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert found(doctor._compiler)["compiler"].command == "apt-get install g++"


def test_secrets_are_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-SECRET")
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    checks = doctor.safely(doctor._credentials)
    assert "AWS_ACCESS_KEY_ID" in str(checks) and "HF_TOKEN" in str(checks) and "SECRET" not in str(checks)


def test_a_check_that_fails_is_a_note() -> None:
    def _broken() -> Iterator[Check]:
        raise OSError("the disk is on fire\nand more")
        yield

    (check,) = doctor.safely(_broken)
    assert (check.name, check.state) == (
        "broken",
        "note",
    ) and check.says == "could not be looked at: OSError: the disk is on fire"


def test_gpus_without_a_build_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("pipeline.plan.machine_gpus", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = found(doctor._torch)["torch"]
    assert check.state == "problem" and "there are 2 GPUs" in check.says
