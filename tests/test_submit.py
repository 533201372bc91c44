"""What travels with a submitted job, what it is called, and its log, each part of which is printed once. No Ray."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from pipeline.job_log import Once
from pipeline.spec import Spec
from pipeline.spec_reader import load_spec
from pipeline.submit import DIGEST, excludes, job_id, named_paths, stem, submit_spec
from stages.errors import RaylignError, SpecError

SPEC = """\
model: {model}
storage: {storage}
stages:
  sft:
    kind: sft
    data: [{{path: data/chats.jsonl}}, {{path: made/*.jsonl}}, {{path: s3://bucket/x.jsonl}}, {{path: /on/the/cluster.jsonl}}]
"""
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that ignores generated data, with a spec that names some of it; the present folder."""
    folder = tmp_path / "work"
    files = (
        "data/chats.jsonl",
        "made/a.jsonl",
        "made/notes.txt",
        "big/weights.bin",
        "odd/a[1].bin",
        "base/config.json",
    )
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(ROW if file.endswith("jsonl") else "{}")
    (folder / ".gitignore").write_text("/data/\n/big/\n*.jsonl\n*.txt\n*.bin\n")
    (folder / "spec.yaml").write_text(SPEC.format(model="./base", storage=tmp_path / "shared"))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0")
    return folder


def read(*overrides: str) -> Spec:
    return load_spec("spec.yaml", overrides, within=Path.cwd())


def test_what_a_spec_names_of_the_present_folder(folder: Path) -> None:
    assert {str(path) for path in named_paths(read())} == {"base", "data/chats.jsonl", "made/*.jsonl"}


def test_what_git_ignores_stays_but_what_the_spec_names_travels(folder: Path) -> None:
    stays = excludes(named_paths(read()))
    assert {".git/", "runs/", "__pycache__/", "/big/", "/made/notes.txt", "/odd/"} <= set(stays)
    assert not {"/data/", "/made/a.jsonl", "/base/"} & set(stays)
    # Ray's own packing agrees; a name with brackets is a name.
    (folder / "odd" / "kept.py").write_text("")
    stays = excludes(named_paths(read()))
    assert packed(folder, stays) == {
        "data/chats.jsonl", "made/a.jsonl", "base/config.json", "odd/kept.py", "spec.yaml", ".gitignore",
    }  # fmt: skip


def packed(folder: Path, stays: list[str]) -> set[str]:
    from ray._private.runtime_env.packaging import create_package

    target = folder.parent / "package.zip"
    create_package(str(folder), target, include_gitignore=False, excludes=stays)
    from zipfile import ZipFile

    with ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_without_a_repository_ray_reads_gitignore_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(folder / "nowhere"))
    assert not any(pattern.startswith("/") for pattern in excludes([]))


@pytest.mark.parametrize(
    ("storage", "model", "env", "said"),
    [
        ("runs", "./base", [], "storage: .*runs travels with the job and is gone after it; name an object store"),
        ("/shared", "./runs/old/model", [], "runs/old/model: runs/ does not travel"),
        ("/shared", "./base", ["NOT_SET_ANYWHERE"], "--env: not set: NOT_SET_ANYWHERE"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_sent(
    folder: Path, storage: str, model: str, env: list[str], said: str
) -> None:
    (folder / model).mkdir(parents=True, exist_ok=True)
    (folder / model / "config.json").write_text("{}")
    (folder / "spec.yaml").write_text(SPEC.format(model=model, storage=storage))
    with pytest.raises(SpecError, match=said):
        submit_spec(Path("spec.yaml"), "http://127.0.0.1:9", env=env)


def test_a_spec_from_elsewhere_does_not_travel(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "work" / "data")
    for spec in (folder / "spec.yaml", Path("../spec.yaml")):
        with pytest.raises(SpecError, match="not in the present folder"):
            submit_spec(spec, "http://127.0.0.1:9")


def test_a_cluster_that_is_not_there(folder: Path) -> None:
    with pytest.raises(RaylignError, match=r"^http://127.0.0.1:9: Failed to connect"):
        submit_spec(folder / "spec.yaml", "http://127.0.0.1:9")


def job(number: int, status: str, digest: str | None = "d") -> Any:
    metadata = {DIGEST: digest} if digest else None
    return SimpleNamespace(submission_id=f"raylign-x-{number}", status=JobStatus(status), metadata=metadata)


def test_ids_count_up_and_a_running_job_is_found_again() -> None:
    assert job_id([], "raylign-x", "d") == ("raylign-x-1", False)
    assert job_id([job(1, "FAILED"), job(2, "SUCCEEDED")], "raylign-x", "d") == ("raylign-x-3", False)
    assert job_id([job(1, "FAILED"), job(2, "RUNNING")], "raylign-x", "d") == ("raylign-x-2", True)
    assert job_id([job(1, "PENDING")], "raylign-y", "d") == ("raylign-y-1", False)
    for other in ("e", None):
        with pytest.raises(RaylignError, match="raylign-x-1 runs now with another spec"):
            job_id([job(1, "RUNNING", other)], "raylign-x", "d")


def test_the_id_is_that_of_the_run_folder(folder: Path) -> None:
    first = stem(read())
    assert first.startswith("raylign-spec-")
    assert first == stem(read("stages.sft.train.max_steps=3"))
    assert first != stem(read("storage=/elsewhere")) != stem(read("name=b"))


def test_a_log_read_again_from_its_beginning_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = Once()
    for text in ("one\ntw", "one\n", "one\ntwo\nth", "one\ntwo\nthree\n"):
        log.rewind()
        for part in (text[:3], text[3:]):
            log.write(part)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
