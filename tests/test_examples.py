"""The examples as they are read: what their heads say can be run, the data is the same every time, and the planned ones fit."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.estimate import describe
from pipeline.plan import make_plan
from pipeline.spec_reader import load_spec
from stages.capacity import Capacity

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SPECS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
GIB = 1 << 30
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "vocab_size": 152064,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


def head(spec: str) -> list[str]:
    """The lines of the comment that a spec begins with, without their marks."""
    lines = (EXAMPLES / spec).read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#") for line in lines[:end]]


def commands(spec: str) -> list[list[str]]:
    """The commands in a head, those indented further than its text, without the variables they set."""
    found = [shlex.split(line) for line in head(spec) if line.startswith("   ")]
    return [[word for i, word in enumerate(c) if not (i == 0 and re.match(r"[A-Z]+=", word))] for c in found]


# ------------------------------------------------------------------------------------------------ their heads


@pytest.mark.parametrize("spec", SPECS)
def test_the_head_says_what_it_is_and_how_it_is_run(spec: str) -> None:
    text = " ".join(line.strip() for line in head(spec) if not line.startswith("   "))
    assert len(text) > 80
    subcommands = get_command(app).commands  # type: ignore[attr-defined]
    run = False
    for command in commands(spec):
        program, *rest = command
        if program == "python":  # the generator of its data, which is there
            assert (ROOT / rest[0]).is_file(), command
        elif program == "raylign":
            parsed = subcommands[rest[0]].make_context(rest[0], list(rest[1:]))
            run = run or str(parsed.params["spec"]) == f"examples/{spec}"
        else:
            assert command[:2] == ["pip", "install"], command
    assert run, "no command of the head runs the spec"


@pytest.mark.parametrize("spec", SPECS)
def test_the_commands_of_the_head_make_the_data_of_the_spec(spec: str) -> None:
    paths = re.findall(r"data/(\w+)/\w+\.\w+", (EXAMPLES / spec).read_text())
    made = {command[2].removeprefix("examples/data/") for command in commands(spec) if command[0] == "python"}
    assert paths and set(paths) <= made


def test_the_readme_has_every_example_and_its_commands() -> None:
    text = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py", ".ipynb")]
    assert [name for name in files if name not in text] == []
    for name in re.findall(r"`([\w.]+\.(?:yaml|py|ipynb))`", text):
        assert (EXAMPLES / name).is_file(), name


# ------------------------------------------------------------------------------------------------ their data


def generate(folder: Path, *arguments: str) -> None:
    generator = EXAMPLES / "example_data.py"
    subprocess.run([sys.executable, str(generator), str(folder), *arguments], check=True, capture_output=True)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    generate(folder)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_the_same_seed_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again")
    generate(tmp_path / "other", "--seed", "1")
    assert digests(tmp_path / "again") == digests(made)
    assert not digests(tmp_path / "other").items() & digests(made).items()


def test_the_docstring_has_every_file(made: Path) -> None:
    text = ast.get_docstring(ast.parse((EXAMPLES / "example_data.py").read_text()))
    assert text is not None
    assert set(re.findall(r"``(\w+\.(?:jsonl|csv))``", text)) == {file.name for file in made.iterdir()}


def test_nothing_that_is_held_out_is_trained_on(made: Path) -> None:
    date = re.compile(r"\d+ [A-Z][a-z]+ \d{4}")
    order, number = re.compile(r"([A-Z]\w+)'s (\w+)"), re.compile(r"#\d{3}")
    for pattern, heldout, *training in (
        (date, "dates_heldout.csv", "dates.csv", "date_chats.jsonl"),
        (order, "tool_heldout.jsonl", "tool_chats.jsonl"),
        (number, "tickets_heldout.jsonl", "tickets.jsonl"),
    ):
        asked = set(pattern.findall((made / heldout).read_text(encoding="utf-8")))
        taught = {x for name in training for x in pattern.findall((made / name).read_text(encoding="utf-8"))}
        assert asked and taught and not asked & taught, heldout


def test_the_csv_has_cells_that_want_reading_with_care(made: Path) -> None:
    with (made / "dates.csv").open(encoding="utf-8", newline="") as file:
        answers = [row["answer"] for row in csv.DictReader(file)]
    assert len(answers) == 2000
    assert any("," in answer for answer in answers) and any("ä" in answer for answer in answers)


def test_every_result_of_a_tool_follows_its_call_and_decides_the_answer(made: Path) -> None:
    called = 0
    for row in rows(made / "tool_chats.jsonl"):
        names = {tool["function"]["name"] for tool in row["tools"]}
        for before, message, after in zip(row["messages"], row["messages"][1:], row["messages"][2:], strict=False):
            if message["role"] == "tool":
                (call,) = before["tool_calls"]
                assert call["function"]["name"] in names
                result = [str(value) for value in json.loads(message["content"]).values()]
                assert all(value in after["content"] for value in result) or result == ["0"]
                called += 1
    assert called > 2500


def test_what_is_expected_is_the_last_turn(made: Path) -> None:
    found = rows(made / "tool_heldout.jsonl")
    for row in found:
        last = row["messages"][-1]
        if "tool_calls" in last:
            inner = row["expected"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
            assert json.loads(inner) == last["tool_calls"][0]["function"]
        else:
            assert row["expected"] == last["content"]
    assert sum("tool_calls" in row["messages"][-1] for row in found) == len(found) / 2 == 100


# ------------------------------------------------------------------------------------------------ the planned ones


@pytest.mark.parametrize(
    ("spec", "workers", "parts"),
    [
        ("full_7b.yaml", 8, {"optimizer", "logits", "activations", "buffers", "weights", "gradients"}),
        ("qlora_24gb.yaml", 1, {"activations", "weights"}),
    ],
)
def test_the_planned_ones_fit_and_say_what_the_plan_says(
    spec: str, workers: int, parts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder that has the model's config and nothing else, on nodes of the size that the spec names."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN_7B))
    shutil.copy(EXAMPLES / spec, tmp_path)
    data = tmp_path / "data" / "quickstart"
    subprocess.run([sys.executable, str(EXAMPLES / "quickstart_data.py"), str(data)], check=True, capture_output=True)
    monkeypatch.setenv("MODEL", str(model))
    plan = make_plan(load_spec(tmp_path / spec))
    (sft,) = describe(plan, Capacity.of({"CPU": 64.0, "GPU": 8.0}))
    assert (sft["workers"], sft["fits"], sft["advice"]) == (workers, True, [])
    room = plan.spec.cluster.gpu_memory_gib
    assert room is not None and sft["memory_per_worker_bytes"] < room * GIB

    said = " ".join(line.strip() for line in head(spec))
    assert "Planned, and never run" in said
    assert f"{sft['memory_per_worker_bytes'] / GIB:.0f} GiB" in said
    assert f"{sft['disk_bytes'] / GIB:.0f} GiB of disk" in said
    stated = dict(re.findall(r"([a-z]+) (\d[\d.]*)[,)]", said.split("(")[1].replace("ZeRO's ", "") + ")"))
    assert stated.keys() == parts
    for part, figure in stated.items():
        value = sft["memory"][part] / GIB
        assert float(figure) == pytest.approx(value, abs=0.5 if "." not in figure else 0.05), part

    wanting = describe(plan, Capacity.of({"CPU": 2.0, "GPU": 0.0}))[0]
    assert not wanting["fits"] and f"needs {workers} GPU; have 0" in wanting["why"]


# ------------------------------------------------------------------------------------------------ the notebook


def test_the_notebook_is_one_without_outputs() -> None:
    book = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"].keys() == {"display_name", "language", "name"}
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert isinstance(cell["source"], list) and all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))
        else:
            assert cell.keys() == {"cell_type", "id", "metadata", "source"} and cell["cell_type"] == "markdown"
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert kinds.count("code") >= 5 and kinds[0] == "markdown"
