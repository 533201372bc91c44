"""What a run's tables show, from run folders as the runner leaves them."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline.artifacts import RunFolder
from pipeline.chat import choose_models
from pipeline.cli import app
from pipeline.progress import Terminal, brief
from pipeline.report import write_report
from pipeline.report.reading import read_run
from pipeline.tables import render_run, sweep_tables, warnings
from stages.errors import DataError

BETAS = (0.05, 0.1, 0.3)


def run_folder(path: Path, metrics: dict[str, dict[str, Any]], sweeps: dict[str, Any], **details: Any) -> RunFolder:
    """A run of dpo stages and, where `eval` is among them, an evaluation, all published."""
    stages = {}
    for name, values in metrics.items():
        kind, produces = ("evaluate", "metrics") if name.startswith("eval") else ("dpo", "model")
        stages[name] = {"kind": kind, "fingerprint": name, "state": "done", "seconds": 1.0}
        manifest = {"name": name, "kind": kind, "produces": produces, "fingerprint": name, "metrics": values}
        (path / name).mkdir(parents=True)
        manifest |= {"details": {"samples": [], **details.get(name, {})}, "handoff": {"warnings": []}}
        (path / name / "manifest.json").write_text(json.dumps(manifest))
    state = {"name": "r", "state": "done", "started": 0.0, "finished": 1.0, "stages": stages, "sweeps": sweeps}
    (path / "run.json").write_text(json.dumps(state))
    return RunFolder(path)


def variants(*betas: float) -> dict[str, Any]:
    return {"dpo": {f"dpo-beta-{beta}": {"train.beta": beta} for beta in betas}}


def shown(folder: RunFolder) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_run(read_run(folder, whole=False)))
    return console.export_text()


def test_a_sweep_has_a_table_and_its_best_values_are_marked(tmp_path: Path) -> None:
    metrics: dict[str, dict[str, Any]] = {
        f"dpo-beta-{beta}": {"loss": 0.5 + beta, "eval_loss": 0.6 - beta, "rewards/margins": 2 * beta, "grad_norm": 1.0}
        for beta in BETAS
    }
    metrics["eval"] = {
        f"dpo-beta-{beta}": {"exact_match": match} for beta, match in zip(BETAS, (0.4, 0.6, 0.6), strict=True)
    }
    metrics["eval"]["sft"] = {"exact_match": 0.99}
    folder = run_folder(tmp_path, metrics, variants(*BETAS))
    (table,) = sweep_tables(read_run(folder))
    assert table.columns == ["variant", "beta", "loss", "eval loss", "margins", "exact match"]
    assert table.rows[2] == ["dpo-beta-0.3", "0.3", "0.800", "0.300", "0.600", "60.0%"]
    assert table.best == {(0, 2), (2, 3), (1, 5), (2, 5)}  # no margin is the better one, and both best matches are
    text = shown(folder)
    assert "dpo: 3 variants, * the best of a column" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("dpo-beta") and " dpo " not in line]
    assert ["dpo-beta-0.05", "0.05", "0.550*", "0.550", "0.100", "40.0%"] in lines
    assert ["dpo-beta-0.3", "0.3", "0.800", "0.300*", "0.600", "60.0%*"] in lines
    write_report(folder)
    page = (tmp_path / "report.html").read_text()
    assert '<b class="done">0.550</b>' in page and page.count('<b class="done">') == 4


def test_what_is_not_there_yet_is_left_empty(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"dpo-beta-0.1": {"loss": 0.5}}, variants(0.1))
    state = folder.state()
    state["stages"]["dpo-beta-0.3"] = {"kind": "dpo", "fingerprint": "x", "state": "running"}
    state["sweeps"] = variants(0.1, 0.3)
    folder.save_state(state)
    (table,) = sweep_tables(read_run(folder))
    assert table.rows == [["dpo-beta-0.1", "0.1", "0.500"], ["dpo-beta-0.3", "0.3", ""]] and not table.best
    assert shown(folder)


def test_two_evaluations_are_told_apart_and_held_out_metrics_come_first(tmp_path: Path) -> None:
    own = {"rewards/accuracies": 0.1, "eval_rewards/accuracies": 0.7}
    metrics = {"dpo-beta-0.1": own, "dpo-beta-0.3": own | {"eval_rewards/accuracies": 0.8}}
    of_models = {name: {"loss": 1.0} for name in metrics}
    folder = run_folder(tmp_path, {**metrics, "eval-a": of_models, "eval-b": of_models}, variants(0.1, 0.3))
    (table,) = sweep_tables(read_run(folder))
    assert table.columns == ["variant", "beta", "eval accuracies", "eval-a: held-out loss", "eval-b: held-out loss"]
    assert table.best == {(1, 2)}  # equal values have no best


def test_a_run_without_sweeps_and_one_of_before_there_were_any(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"dpo": {"loss": 0.5}}, {})
    assert sweep_tables(read_run(folder)) == []
    state = folder.state()
    del state["sweeps"]
    folder.save_state(state)
    assert sweep_tables(read_run(folder)) == [] and "variants" not in shown(folder)


def test_warnings_of_the_stages_themselves_are_shown(tmp_path: Path) -> None:
    said = {"dpo": {"training_warnings": ["answers run away"]}, "eval": {"evaluation_warnings": ["dpo: <b>longer</b>"]}}
    folder = run_folder(tmp_path, {"dpo": {}, "eval": {"dpo": {"loss": 1.0}}}, {}, **said)
    assert warnings(read_run(folder)) == ["dpo: answers run away", "eval: dpo: <b>longer</b>"]
    assert "dpo: answers run away" in shown(folder)
    write_report(folder)
    page = (tmp_path / "report.html").read_text()
    assert "<li>answers run away</li>" in page and "dpo: &lt;b&gt;longer" in page


def test_what_is_told_of_reinforcement_learning(tmp_path: Path) -> None:
    ppo = {
        "loss": 0.012,
        "reward": 0.5,
        "eval_reward": 0.25,
        "kl": 3.0,
        "kl_per_token": 0.4,
        "stopped": 0.875,
        "answer_tokens": 12.5,
    }
    grpo = {name: value for name, value in ppo.items() if name not in ("kl", "eval_reward")}
    assert brief(ppo) == "reward 0.500, eval reward 0.250, kl 3.000, stopped 0.875, answer tokens 12.500"
    assert brief(grpo) == "reward 0.500, kl per token 0.400, stopped 0.875, answer tokens 12.500"
    assert brief({"loss": 0.5, "eval_loss": 0.25, "stopped": 0.5}) == "loss 0.500, eval loss 0.250, stopped 0.500"
    folder = run_folder(
        tmp_path, {"a": ppo, "b": ppo | {"eval_reward": 0.375}}, {"ppo": {"a": {"x": 1}, "b": {"x": 2}}}
    )
    (table,) = sweep_tables(read_run(folder))
    assert table.columns == ["variant", "x", "eval reward", "kl", "kl per token"]  # the loss says nothing
    assert table.best == {(1, 2)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_run(read_run(folder)))
    text = " ".join(console.export_text().split())
    assert "eval reward 0.250" in text and "…" not in text


def test_the_lines_of_a_log_show_what_is_learned(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text(
        json.dumps({"phase": "train", "steps": 8})
        + "\n"
        + json.dumps({"done": 4, "total": 8, "unit": "step", "reward": 0.5, "kl": 1.25})
        + "\n"
    )
    told = io.StringIO()
    terminal = Terminal(console=Console(file=told, width=80))
    terminal.plan([("ppo", "ppo", [])])
    terminal.stage("ppo", "running")
    terminal.lines["ppo"].told = -1e9
    terminal.follow("ppo", events)
    terminal.lines["ppo"].told = -1e9
    terminal._event("ppo", {"done": 8, "total": 8, "unit": "step", "loss": 0.5})
    assert "train 8/8 steps  loss 0.500" in told.getvalue()
    terminal.lines["ppo"].told = -1e9
    terminal._event("ppo", {"done": 4, "total": 8, "unit": "step", "reward": 0.5, "kl": 1.25})
    assert "train 4/8 steps  reward 0.500  kl 1.250" in told.getvalue()


def test_a_terminal_shows_every_stage_where_it_stands() -> None:
    drawn = io.StringIO()
    terminal = Terminal(console=Console(file=drawn, width=120, height=30, force_terminal=True))
    terminal.plan(
        [("base", "init", []), ("sft", "sft", ["base"]), ("dpo", "dpo", ["sft"]), ("eval", "evaluate", ["sft", "dpo"])]
    )
    terminal.stage("base", "cached")
    terminal.stage("sft", "running")
    terminal._event("sft", {"phase": "train"})
    begun = time.time() - 10
    terminal._event("sft", {"time": begun, "done": 100, "total": 400, "unit": "step", "loss": 2.0})
    terminal._event("sft", {"time": begun + 10, "done": 200, "total": 400, "unit": "step", "loss": 1.5})
    terminal._event("sft", {"waiting": None})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal._tree())
    text = console.export_text()
    assert [line.split()[1] for line in text.splitlines()] == ["base", "sft", "dpo", "eval"]
    assert "train 200/400 steps  loss 1.500  10 steps/s, 0:20 left" in text and "after sft, dpo" in text
    terminal._event("sft", {"waiting": "4 GPU: have 0", "seconds": 3, "limit": 60})
    assert terminal.waiting("sft") == "waiting for 4 GPU: have 0; 3 s of 60"
    terminal.stage("sft", "done", seconds=12.3, metrics={"loss": 1.5})
    console.print(terminal._tree())
    assert "12.3 s" in console.export_text() and drawn.getvalue() == ""  # no lines beside the tree


def test_more_stages_than_the_terminal_has_lines() -> None:
    terminal = Terminal(console=Console(file=io.StringIO(), width=100, height=10, force_terminal=True))
    names = [f"variant-{i}" for i in range(20)]
    terminal.plan([(name, "dpo", []) for name in names])
    for name in names[:9]:
        terminal.stage(name, "done", seconds=1)
    terminal.stage("variant-12", "running")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal._tree())
    text = console.export_text()
    assert "variant-12" in text and "and 13 more: 3 done, 10 waiting" in text and len(text.splitlines()) == 8


def test_the_state_of_a_running_stage_says_how_far_it_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"sft": {}}, {})
    state = folder.state()
    state["stages"]["sft"] |= {"state": "running", "fingerprint": "new"}
    folder.save_state(state)
    work = folder.work("sft", "new")
    work.mkdir(parents=True)
    told = [
        {"phase": "train"},
        *({"time": 10.0 * n, "done": 20 * n, "total": 100, "unit": "step", "loss": 2.0} for n in (1, 2)),
    ]
    (work / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told) + '{"done": 41')
    assert "train 40/100 steps  loss 2.000  2 steps/s, 0:30 left" in shown(folder)


# ------------------------------------------------------------------------------------------------ damaged run folders


def damaged(path: Path, file: str, text: str) -> str:
    """What `raylign status` shows of a run of which one file is not what was written."""
    folder = run_folder(path, {"sft": {"loss": 0.5}, "dpo": {"loss": 0.25}}, {})
    (path / "spec.yaml").write_text("name: r\n")
    (path / file).write_text(text)
    told = CliRunner().invoke(app, ["status", str(path)])
    assert told.exit_code == 0 and told.exception is None, told.output
    assert folder.stage("dpo").is_dir() and "loss 0.250" in told.output
    return told.output


@pytest.mark.parametrize("text", ["{", "", "[]", '"x"', '{"fingerprint": ', "\x00"])
def test_status_of_a_run_with_a_torn_manifest(tmp_path: Path, text: str) -> None:
    said = damaged(tmp_path, "sft/manifest.json", text)
    assert "r: done" in said and "sft/manifest.json is not" in said


@pytest.mark.parametrize("text", ["{", "", "[]", '{"stages": 1}', '{"name": "r"}'])
def test_status_of_a_run_with_a_torn_record(tmp_path: Path, text: str) -> None:
    said = damaged(tmp_path, "run.json", text)
    assert "its stages are those that have a manifest: sft, dpo" in said and "loss 0.500" in said


def test_status_of_a_record_without_states_and_kinds(tmp_path: Path) -> None:
    said = damaged(tmp_path, "run.json", '{"stages": {"sft": {}, "dpo": {"fingerprint": "dpo"}, "x": {"seconds": []}}}')
    assert ": unknown" in said and "loss 0.500" in said


def test_a_torn_manifest_says_what_to_do_where_it_decides(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"sft": {}, "dpo": {}}, {})
    (tmp_path / "sft" / "manifest.json").write_text('{"fingerprint": "sft", "me')
    told = rf"{re.escape(str(tmp_path))}/sft/manifest\.json: not whole: .*\n  put it back, or remove the folder "
    for decides in (
        lambda: folder.find("sft", "sft"), lambda: folder.artifact("sft"), lambda: choose_models(folder, ["sft"]),
    ):  # fmt: skip
        with pytest.raises(DataError, match=told):
            decides()
    assert list(choose_models(folder, [])) == ["dpo"] == list(choose_models(folder, ["dpo"]))  # another's is no matter
    (tmp_path / "sft" / "manifest.json").write_text('{"kind": "sft"}')
    with pytest.raises(DataError, match="it has no fingerprint"):
        folder.find("sft", "sft")
    shutil.rmtree(tmp_path / "sft")
    assert folder.find("sft", "sft") is None  # it would be made again
