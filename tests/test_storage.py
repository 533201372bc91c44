"""Runs in an object store: what goes there and comes back, against an S3 server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from pipeline import lease
from pipeline.artifacts import RunFolder
from stages import storage
from stages.errors import RaylignError, StageError
from stages.storage import address, mirrored, names, pull, push, remove, use
from stages.training.checkpoint import Record, hash_file, newest_sound, publish
from stages.training.checkpoint import forget as forget_checkpoints


@pytest.fixture
def where(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(storage.STORAGE, raising=False)
    yield f"s3://bucket/{uuid4().hex}/runs{s3}"
    os.environ.pop(storage.STORAGE, None)


def forget(root: Path) -> None:
    """As if on another node."""
    shutil.rmtree(root)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_is_left_as_it_is(tmp_path: Path) -> None:
    root = use(str(tmp_path))
    write(root / "run", a="1")
    push(root / "run")
    assert pull(root / "run") == root / "run" and not mirrored(root) and address(root) == str(root)
    remove(root / "run")
    assert (root / "run" / "a").read_text() == "1" and storage.environment() == {}


def test_what_is_pushed_can_be_pulled_elsewhere(where: str) -> None:
    root = use(where)
    folder = write(root / "run", a="1", b__c="22", **{".lock": "", "d.tmp": "x"})
    push(folder)
    assert names(folder) >= {"a", "b"} and mirrored(folder)
    forget(root)
    assert sorted(p.name for p in pull(folder).rglob("*") if p.is_file()) == ["a", "c"], "locks and halves stay"
    assert (folder / "b" / "c").read_text() == "22"
    assert address(folder).startswith("s3://bucket/") and address(folder).partition("?")[0].endswith("/runs/run")
    assert storage.environment()[storage.STORAGE] == where


def test_parts_of_a_folder(where: str) -> None:
    root = use(where)
    folder = write(root / "run", **{"one.json": "{}"}, model__weights="w", checkpoints__c1__complete="{}")
    push(folder, without=("model",))
    forget(root)
    pull(folder, only="*.json")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["one.json"]
    pull(folder, without=("checkpoints",))
    assert not (folder / "checkpoints").exists() and not (folder / "model").exists()
    assert names(folder) == {"one.json", "checkpoints"}


def test_a_file_of_the_same_size_that_is_newer_is_fetched(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = use(where)
    push(write(root / "run", a="old"))
    kept = shutil.copytree(root, root.with_name("other node"), copy_function=shutil.copy2)
    before = (root / "run" / "a").stat().st_mtime_ns
    while (root / "run" / "a").stat().st_mtime_ns == before:  # the store tells seconds
        push(write(root / "run", a="new"))
    forget(root)
    shutil.copytree(kept, root, copy_function=shutil.copy2)
    assert (root / "run" / "a").read_text() == "old"
    assert (pull(root / "run") / "a").read_text() == "new"


def test_what_is_there_is_not_sent_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = use(where)
    push(write(root / "run", a="1", b="2"))
    sent: list[str] = []
    monkeypatch.setattr(storage._Store, "send", lambda self, source, key: sent.append(source.name))
    monkeypatch.setattr(storage._Store, "fetch", lambda self, key, info, target: sent.append(key))
    push(root / "run")
    pull(root / "run")
    write(root / "run", b="3")
    push(root / "run")
    assert sent == ["b"]


def test_the_file_that_makes_it_whole_is_sent_last_and_removed_first(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = use(where)
    order: list[str] = []
    real = storage._Store.send
    monkeypatch.setattr(
        storage._Store, "send", lambda self, source, key: order.append(source.name) or real(self, source, key)
    )
    folder = write(root / "run", **{f"{n}.bin": "x" for n in range(20)}, **{"manifest.json": "{}"}, z__manifest="no")
    push(folder, last="manifest.json")
    assert len(order) == 22 and order[-1] == "manifest.json"
    remove(folder, first="manifest.json")
    assert names(root) <= {"run"} and storage._store().files(storage._key(folder) or "") == {}


def test_a_store_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    gone = "s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http"
    folder = use(gone) / "run"
    with pytest.raises(StageError, match=r"s3://bucket/runs/run\?.*: "):
        pull(folder)
    with pytest.raises(StageError, match="s3://no-such-bucket"):
        push(write(use(where.replace("bucket", "no-such-bucket", 1)) / "run", a="1"))


def published(folder: RunFolder, fingerprint: str) -> Path:
    write(folder.work("sft", fingerprint), model__weights=fingerprint, checkpoints__c__complete="{}")
    manifest = {"fingerprint": fingerprint, "produces": "model"}
    return folder.publish("sft", manifest)


def test_artifacts_are_published_replaced_and_recalled(where: str) -> None:
    root = use(where)
    folder = RunFolder(root / "run")
    published(folder, "one" * 10)
    forget(root)
    assert folder.manifest("sft") == {"fingerprint": "one" * 10, "produces": "model"}
    assert not (folder.stage("sft") / "model").exists(), "what is not asked for is not fetched"
    published(folder, "two" * 10)
    forget(root)
    assert (folder.manifest("sft") or {})["fingerprint"] == "two" * 10
    assert folder.find("sft", "one" * 10) == folder.path / ".previous" / ("sft-" + ("one" * 10)[:12])
    assert names(folder.path / ".work") == set() or not names(folder.path / ".work" / ("sft-" + ("two" * 10)[:12]))
    folder.recall("sft", "one" * 10)
    forget(root)
    assert (folder.manifest("sft") or {})["fingerprint"] == "one" * 10
    assert (pull(folder.stage("sft")) / "model" / "weights").read_text() == "one" * 10
    assert folder.find("sft", "two" * 10) is not None


def test_what_was_cut_off_while_it_was_sent_is_sent_again(where: str) -> None:
    root = use(where)
    folder = RunFolder(root / "run")
    file = root / "run" / "sft" / "manifest.json"
    with without_the_bucket(), pytest.raises(StageError, match="s3://bucket"):
        published(folder, "one" * 10)
    assert file.is_file() and not storage.there(file), "the store has nothing of it"
    assert folder.find("sft", "one" * 10) == folder.stage("sft"), "but it is whole, and here"
    folder.recall("sft", "one" * 10)
    forget(root)
    assert folder.find("sft", "one" * 10) == folder.stage("sft")
    assert (pull(folder.stage("sft")) / "model" / "weights").read_text() == "one" * 10


@contextmanager
def without_the_bucket() -> Iterator[None]:
    """It is really gone meanwhile, and comes back with what was in it."""
    store = storage._store()
    host = dict(p.split("=") for p in store.options.strip("?").split("&"))["endpoint_override"]
    client = boto3.client("s3", endpoint_url=f"http://{host}")
    kept = {}
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        kept[found["Key"]] = client.get_object(Bucket="bucket", Key=found["Key"])["Body"].read()
        client.delete_object(Bucket="bucket", Key=found["Key"])
    client.delete_bucket(Bucket="bucket")
    try:
        yield
    finally:
        client.create_bucket(Bucket="bucket")
        for key, body in kept.items():
            client.put_object(Bucket="bucket", Key=key, Body=body)


def test_what_somebody_removed_in_the_store_is_not_there(where: str) -> None:
    root = use(where)
    folder = RunFolder(root / "run")
    published(folder, "one" * 10)
    remove(folder.stage("sft"))
    assert (folder.stage("sft") / "manifest.json").is_file(), "the mirror has it still"
    assert folder.find("sft", "one" * 10) is None and folder.manifest("sft") is None
    published(folder, "one" * 10)
    forget(root)
    assert (pull(folder.stage("sft")) / "model" / "weights").read_text() == "one" * 10
    assert not names(folder.path / ".previous"), "what was left of the first is gone"


def quick_leases(where: str, monkeypatch: pytest.MonkeyPatch, patience: float) -> Path:
    """The folder of a run whose lease is renewed five times a second."""
    for name, seconds in (("RENEW_SECONDS", 0.2), ("PATIENCE_SECONDS", patience), ("SETTLE_SECONDS", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    folder = use(where) / "run"
    folder.mkdir(parents=True)
    return folder


def test_only_one_carries_out_a_run_of_a_bucket(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quick_leases(where, monkeypatch, patience=3.0)
    said: list[str] = []
    with lease.leased(folder, said.append) as held:
        assert lease.is_leased(folder) and RunFolder(folder).is_locked()
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(RaylignError, match=rf"process {os.getpid()} on .* is carrying out this run"):
            lease.leased(folder, said.append).__enter__()
        assert "may be carrying out this run" in said[0]
        held.check()
    assert not lease.is_leased(folder) and not RunFolder(folder).is_locked()


def test_the_lease_of_one_that_is_gone_is_taken(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quick_leases(where, monkeypatch, patience=1.5)
    gone = json.dumps({"id": "x", "beat": 7, "host": "elsewhere", "process": 1})
    storage.put(folder / lease.FILE, gone)
    began = time.monotonic()
    with lease.leased(folder, lambda _: None) as held:
        assert 1.5 <= time.monotonic() - began < 10
        storage.put(folder / lease.FILE, gone)  # it was not gone, but cut off
        while not held._lost:
            time.sleep(0.05)
            assert time.monotonic() - began < 20
        with pytest.raises(StageError, match="process 1 on elsewhere has taken over this run"):
            held.check()
    assert storage.look(folder / lease.FILE) is not None, "the other's is left alone"
    here = {"id": "y", "beat": 7, "host": lease.socket.gethostname(), "process": 2**22 - 1}
    storage.put(folder / lease.FILE, json.dumps(here))
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 60.0)
    began = time.monotonic()
    with lease.leased(folder, lambda _: None):
        assert time.monotonic() - began < 10, "a process of this machine that is no more is not waited for"


def test_a_run_is_opened_by_its_address(where: str) -> None:
    root = use(where)
    folder = RunFolder(root / "run")
    folder.path.mkdir(parents=True)
    folder.save_state({"name": "run", "stages": {}})
    told = address(folder.path)
    forget(root)
    os.environ.pop(storage.STORAGE)
    opened = RunFolder.open(told)
    assert opened.state() == {"name": "run", "stages": {}} and opened.address == told
    assert json.loads((opened.path / "run.json").read_text())["name"] == "run"


# ------------------------------------------------------------------------------------------------ checkpoints


def saved_checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    path = write(folder / f"checkpoint-{step}", **{"weights.pt": "w" * step, "rank-1.pt": "r"})
    files = {name: (len((path / name).read_text()), hash_file(path / name)) for name in ("weights.pt", "rank-1.pt")}
    if whole:
        publish(path, Record(step, 0, step, 2, None, "x", files))
    push(path)
    return path


def test_mirrors_keep_no_checkpoints_that_the_store_has_not(where: str) -> None:
    folder = use(where) / "run" / ".work" / "sft-1" / "checkpoints"
    for step, whole in ((3, True), (6, True), (9, True), (12, False)):
        saved_checkpoint(folder, step, whole)
    remove(folder / "checkpoint-3", first="complete.json")  # as the first worker prunes, on another node
    write(folder / "checkpoint-7", **{"weights.pt": "half"})  # of a save that was cut off
    forget_checkpoints(folder)
    assert {p.name for p in folder.iterdir()} == {"checkpoint-6", "checkpoint-9", "checkpoint-12"}, (
        "12 may be being written"
    )
    forget_checkpoints(folder, unfinished=True)
    assert {p.name for p in folder.iterdir()} == {"checkpoint-6", "checkpoint-9"}


def test_the_driver_looks_at_a_checkpoint_where_it_lies(where: str) -> None:
    root = use(where)
    folder = root / "run" / ".work" / "sft-1" / "checkpoints"
    saved_checkpoint(folder, 3), saved_checkpoint(folder, 6)
    forget(root)
    said: list[str] = []
    found = newest_sound(folder, said.append)
    assert found is not None and found.record.step == 6 and said == ["training goes on from checkpoint-6"]
    assert [p.name for p in folder.rglob("*.pt")] == [], "a record is enough: workers fetch the rest"
    remove(folder / "checkpoint-6" / "rank-1.pt")
    found = newest_sound(folder, said.append)
    assert found is not None and found.record.step == 3
    assert said[1] == "checkpoint-6 is damaged (rank-1.pt is missing) and is not used"


def test_blocks_are_counted_as_they_come_and_go(where: str, tmp_path: Path) -> None:
    root = use(where)
    folder = write(root / "run", small="1")
    size = 2 * storage.BLOCK + 1
    with (folder / "large").open("wb") as out:
        out.truncate(size)
    before = storage.blocks()
    push(folder)
    assert storage.blocks() - before == 3 + 1
    forget(root)
    assert (pull(folder) / "large").stat().st_size == size
    assert storage.blocks() - before == 2 * (3 + 1)


class Held(BaseHTTPRequestHandler):
    """A store that takes parts of a file when it is told to."""

    protocol_version, gate = "HTTP/1.1", threading.Event()

    def do_GET(self) -> None:
        self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        begins = "uploads" in self.path
        kind, field = ("Initiate", "UploadId") if begins else ("Complete", "ETag")
        body = f"<{kind}MultipartUploadResult><{field}>1</{field}></{kind}MultipartUploadResult>"
        self.answer(200, body.encode())

    def do_PUT(self) -> None:
        self.gate.wait(30)
        self.answer(200)

    def answer(self, code: int, body: bytes = b"") -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        for name, value in (("ETag", '"1"'), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_blocks_are_not_counted_long_before_the_store_has_taken_them(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow's S3 takes what it is given, and sends it later."""
    monkeypatch.setattr(storage, "BLOCK", 1 << 20)
    monkeypatch.setattr(Held, "gate", threading.Event())
    with (tmp_path / "large").open("wb") as out:
        out.truncate(48 << 20)
    with ThreadingHTTPServer(("127.0.0.1", 0), Held) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = storage._Store(f"s3://bucket/held?endpoint_override=127.0.0.1:{server.server_port}&scheme=http", "")
        before = storage.blocks()
        with (tmp_path / "large").open("rb") as data, store.fs.open_output_stream("bucket/held/x") as out:
            sending = threading.Thread(target=storage._copy, args=(data, out))
            sending.start()
            sending.join(2)
            held = storage.blocks() - before
            Held.gate.set()
            sending.join(30)
        server.shutdown()
    # S3's parts are of 10 MiB: with the 16th block the first of them is waited for.
    assert held == 15 and storage.blocks() - before == 48
