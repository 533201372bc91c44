"""Publishing on the hub, against a stand-in of its API on loopback: what arrives there, byte by byte, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.hub import push_by_hand
from pipeline.plan import make_plan
from pipeline.spec_reader import load_spec
from stages.errors import DataError, SpecError

TOKEN = "hf_standinstandinstandinstandin"
SPEC = """\
name: cards
storage: runs
model: {model}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    push_to_hub: org/cards
    hub_private_repo: true
    train: {{learning_rate: 1.0e-3, max_steps: 5, max_length: 128}}
  eval:
    kind: evaluate
    models: [stages.sft]
    data: [{{path: {data}/heldout.jsonl}}]
    gates: [{{metric: exact_match, of: stages.sft, at_least: 0.5}}]
"""


class Hub(ThreadingHTTPServer):
    """The parts of https://huggingface.co/api that a push uses; `repositories`: name -> {"private", "files", "message"}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256, as Git LFS has them
        self.commits = 0
        self.role = "write"
        self.refuses_commits = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, body: Any, code: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self, path: str) -> tuple[str, dict[str, Any] | None]:
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        return name, self.server.repositories.get(name)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid user token."}, 401)
        return False

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self.allowed():
            return
        if path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.server.role}}
            self.answer({"name": "ann", "type": "user", "orgs": [{"name": "org", "roleInOrg": "write"}], "auth": token})
            return
        name, there = self.repository(path)
        if there is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            self.answer(
                [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in there["files"].items()]
            )
        else:
            siblings = [{"rfilename": path} for path in there["files"]]
            self.answer({"id": name, "private": there["private"], "siblings": siblings, "sha": "1" * 40})

    def do_POST(self) -> None:
        body = self.body()
        if not self.allowed():
            return
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            if name in self.server.repositories:
                self.answer(
                    {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}, 409
                )
                return
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.server.repositories[name] = {"private": private, "files": {}, "message": None}
            self.answer({"url": f"{self.server.address}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit(body)
        else:
            self.answer({"error": f"no {self.path} here"}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def commit(self, body: bytes) -> None:
        if self.server.refuses_commits:
            self.answer({"error": "You have exceeded your quota"}, 403)
            return
        name, there = self.repository(self.path)
        assert there is not None
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                there["message"] = value["summary"]
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                there["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                there["files"][value["path"]] = self.server.large[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del there["files"][value["path"]]
        self.server.commits += 1
        self.answer(
            {"success": True, "commitOid": "2" * 40, "commitUrl": f"{self.server.address}/{name}/commit/{'2' * 40}"}
        )

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def raylign(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "HF_TOKEN")}
    # Large files go by plain HTTP, not by Xet's own protocol.
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def publish(folder: Path, name: str, **facts: Any) -> None:
    """A stage as if it had been carried out: its manifest is of the fingerprint that the spec gives."""
    planned = make_plan(load_spec(folder / "spec.yaml"))[name]
    place = folder / "runs" / "cards" / name
    place.mkdir(parents=True, exist_ok=True)
    manifest = {
        "name": name, "kind": planned.stage.kind, "produces": planned.stage.produces, "fingerprint": planned.fingerprint,
        "config": planned.stage.model_dump(mode="json", exclude_unset=True), "seed": 0, "inputs": {},
        "handoff": {"warnings": []}, "workers": 1, "seconds": 1.0, "versions": {"raylign": "0.1.0"}, "metrics": {},
        "rows": 101, "tokens": 4000, "steps": 5, "details": {"samples": []},
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(manifest | facts))


@pytest.fixture
def folder(tmp_path: Path, data: Path, model: str) -> Path:
    """spec.yaml, and its run with every stage published: `raylign run` finds nothing to do but to push."""
    (tmp_path / "spec.yaml").write_text(SPEC.format(data=data, model=model))
    publish(tmp_path, "sft", inputs={"model": [{"model": model}]}, metrics={"loss": 0.5})
    shutil.copytree(model, tmp_path / "runs" / "cards" / "sft" / "model")
    judge(tmp_path, 0.75)
    stages = {
        name: {
            "kind": name.replace("eval", "evaluate"),
            "state": "done",
            "fingerprint": make_plan(spec)[name].fingerprint,
        }
        for spec in [load_spec(tmp_path / "spec.yaml")]
        for name in spec.stages
    }
    state = {"name": "cards", "state": "done", "started": 0.0, "stages": stages, "sweeps": {}}
    (tmp_path / "runs" / "cards" / "run.json").write_text(json.dumps(state))
    return tmp_path


def judge(folder: Path, exact_match: float) -> None:
    sft = json.loads((folder / "runs" / "cards" / "sft" / "manifest.json").read_text())
    inputs = {"models": [{"stage": "sft", "fingerprint": sft["fingerprint"], "model": "elsewhere"}]}
    metrics = {"sft": {"exact_match": exact_match, "answers": 20, "stopped": 1.0}}
    publish(folder, "eval", inputs=inputs, metrics=metrics)


def model_files(folder: Path) -> dict[str, bytes]:
    model = folder / "runs" / "cards" / "sft" / "model"
    return {path.name: path.read_bytes() for path in model.iterdir()}


# ------------------------------------------------------------------------------------------------ what arrives


def test_a_run_pushes_what_its_spec_says(folder: Path, hub: Hub) -> None:
    before = model_files(folder)
    done = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft: pushed, " in done.stdout
    there = hub.repositories["org/cards"]
    card = there["files"].pop("README.md").decode()
    assert there["files"] == before == model_files(folder)  # the very bytes, and the artifact is as it was
    assert there["private"]
    assert "org/cards" in card and "75.0% ± 9.7" in card and "gate held: " in card
    assert str(folder) not in card and str(Path.home()) not in card and TOKEN not in card
    fingerprint = json.loads((folder / "runs" / "cards" / "sft" / "manifest.json").read_text())["fingerprint"]
    assert there["message"] == f"cards: sft, {fingerprint}"
    for file in (folder / "runs").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    # Once more: nothing has changed, nothing is sent.
    again = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert again.returncode == 0 and hub.commits == 1


def test_by_hand_and_over_an_older_push(folder: Path, hub: Hub) -> None:
    """Weights that an older model left are taken away: from_pretrained would load them. Other files stay."""
    older = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    hub.repositories["ann/mine"] = {"private": True, "files": dict(older), "message": None}
    command = ("push", "runs/cards", "--stage", "sft", "--to", "ann/mine", "--private")
    done = raylign(folder, *command, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*hub.repositories["ann/mine"]["files"]} == {*model_files(folder), "README.md", "notes.md"}
    assert hub.commits == 1


def test_a_dry_run_sends_nothing(folder: Path, hub: Hub) -> None:
    done = raylign(folder, "push", "runs/cards", "--to", "org/cards", "--dry-run", HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "## Lineage" in done.stdout
    head = done.stdout.split("README.md:\n\n---\n")[1].split("\n---\n")[0]
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    assert not hub.repositories


# ------------------------------------------------------------------------------------------------ what does not


def test_a_gate_that_is_not_met_keeps_the_model_here(folder: Path, hub: Hub) -> None:
    judge(folder, 0.25)
    done = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "sft: not pushed to org/cards: gate not met: exact_match of sft is 0.25" in done.stdout
    assert not hub.repositories
    by_hand = raylign(folder, "push", "runs/cards", "--to", "org/cards", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert by_hand.returncode == 0  # who says so by hand may
    assert "gate **not met**" in hub.repositories["org/cards"]["files"]["README.md"].decode()


def test_what_can_be_known_before_is_told_before(folder: Path, hub: Hub) -> None:
    before = (folder / "runs" / "cards" / "run.json").read_text()
    hub.repositories["org/cards"] = {"private": False, "files": {}, "message": None}
    done = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert (
        done.returncode == 2
        and "stages.sft.push_to_hub: org/cards is there and public, and a private one" in done.stderr
    )
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr
    assert (folder / "runs" / "cards" / "run.json").read_text() == before  # nothing was started


ASK = """\
import json, os, sys
from pipeline.hub import account_problem
said = []
for token, repository in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    said.append(account_problem(repository, None))
print(json.dumps(said))
"""


def ask(folder: Path, endpoint: str, *cases: tuple[str, str]) -> list[str | None]:
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(cases)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_who_may_write_where(tmp_path: Path, hub: Hub) -> None:
    fine, none, wrong, others = ask(
        tmp_path,
        hub.address,
        (TOKEN, "org/new"),
        ("", "org/new"),
        ("hf_wrongwrongwrong", "org/new"),
        (TOKEN, "others/new"),
    )
    assert fine is None
    assert none is not None and "the hub wants a token: set HF_TOKEN" in none
    assert wrong is not None and "the hub does not take the token (Invalid user token.)" in wrong
    assert others == "ann, whose token this is, is not others and not a member of it"
    hub.role = "read"
    (read,) = ask(tmp_path, hub.address, (TOKEN, "org/new"))
    assert read is not None and "the token may only read" in read
    (unreachable,) = ask(tmp_path, "http://127.0.0.1:9", (TOKEN, "org/new"))
    assert unreachable is not None and "the hub cannot be reached" in unreachable
    assert not hub.repositories


@pytest.mark.parametrize("name", ["cards", "org/cards/more", "org/car ds", "org/cards--", "../cards"])
def test_what_is_no_name_of_a_repository(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="--to"):
        list(push_by_hand(str(folder / "runs" / "cards"), "sft", name, None, dry_run=True))
    with pytest.raises(SpecError, match=r"spec.yaml:\d+: stages.sft: push_to_hub: "):
        load_spec(folder / "spec.yaml", [f"stages.sft.push_to_hub={name}"])


def test_two_models_for_one_repository(folder: Path) -> None:
    text = (folder / "spec.yaml").read_text()
    source = text.split("data: [{path: ")[1].split("}")[0]
    two = f"  two: {{kind: sft, data: [{{path: {source}}}], push_to_hub: org/cards}}\n"
    (folder / "spec.yaml").write_text(text.replace("  eval:\n", two + "  eval:\n"))
    with pytest.raises(
        SpecError, match=r"stages\.two\.push_to_hub: org/cards is where stages.sft is pushed; one model"
    ):
        load_spec(folder / "spec.yaml")


def test_a_push_that_fails_loses_nothing(folder: Path, hub: Hub) -> None:
    hub.refuses_commits = True
    done = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "stage sft is done, and could not be pushed to org/cards" in done.stderr
    assert "You have exceeded your quota" in done.stderr and "raylign push" in done.stderr
    state = json.loads((folder / "runs" / "cards" / "run.json").read_text())
    assert state["stages"]["sft"]["state"] == "cached"
    hub.refuses_commits = False
    done = raylign(folder, "run", "spec.yaml", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and "README.md" in hub.repositories["org/cards"]["files"]


def test_links_are_not_followed(folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("not for the hub")
    (folder / "runs" / "cards" / "sft" / "model" / "notes.txt").symlink_to(secret)
    with pytest.raises(DataError, match="a link; only files are pushed"):
        list(push_by_hand(str(folder / "runs" / "cards"), "sft", "org/cards", None, dry_run=True))


@pytest.mark.parametrize("stage", ["eval", "nothing"])
def test_no_such_stage(folder: Path, stage: str) -> None:
    with pytest.raises(DataError, match=f"{stage}: no model of that name is published"):
        list(push_by_hand(str(folder / "runs" / "cards"), stage, "org/cards", None, dry_run=True))
