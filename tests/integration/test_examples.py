"""Every example through the command line at small size: what it is there to show is really there. Those with a task of their own
also as they stand: the task is learned. full_7b.yaml and qlora_24gb.yaml are planned (tests/test_examples.py)."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .test_chain import raylign

EXAMPLES = Path(__file__).parents[2] / "examples"
PLANNED = {"full_7b.yaml", "qlora_24gb.yaml"}
QUICKSTART = (
    "from pathlib import Path; from quickstart_data import generate; "
    "generate(Path('data/quickstart'), chat_count=400, pair_count=40, heldout_count=20, prompt_count=24)"
)
# An answer of a model that has hardly been trained is never right, so that what compares its answers has to be something else.
LENGTHS = """
def shorter(completions, **_):
    return [-float(len(answer[0]["content"])) for answer in completions]
"""
# What stages of the same name are cut down to. The SFT model has to end its answers, or none of them can be used.
FEW = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4}
SFT = {"max_steps": 120, "per_device_train_batch_size": 8}
COMPARED = {"max_prompts": 12, "rewards": ["lengths:shorter"], "margin": 0.1}
PPO = {"per_device_train_batch_size": 4, "total_episodes": 16}
GRPO = {"max_steps": 4, "per_device_train_batch_size": 8, "num_generations": 4, "logging_steps": 1}


def clone_of_examples(folder: Path) -> Path:
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("data", "__pycache__"))
    return folder


def python(clone: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=clone / "examples", capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and little data. The runs in it share what they prepare."""
    folder = clone_of_examples(tmp_path_factory.mktemp("clone"))
    python(folder, "-c", QUICKSTART)
    python(folder, "example_data.py", "data/examples", "--rows", "200")
    (folder / "examples" / "lengths.py").write_text(LENGTHS)
    return folder


class Run:
    """An example that was run: its folder, and what was printed."""

    def __init__(self, clone: Path, name: str, changes: dict[str, Any] | None = None) -> None:
        sets = [word for path, value in (changes or {}).items() for word in ("--set", f"{path}={json.dumps(value)}")]
        done = raylign(clone, "run", f"examples/{name}.yaml", *sets)
        assert done.returncode == 0, done.stdout + done.stderr
        self.printed, self.folder = done.stdout, clone / "runs" / name.replace("_", "-")

    @property
    def stages(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())["stages"]

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "manifest.json").read_text())

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.manifest(stage)["metrics"]

    def ledger(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "ledger.json").read_text())

    def gates(self) -> list[bool]:
        return [gate["holds"] for gate in self.stages["eval"]["gates"]]

    def weights(self, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / stage / "model" / "model.safetensors")

    def answered(self, stage: str) -> Iterator[dict[str, Any]]:
        """The samples that a stage of reinforcement learning keeps."""
        return map(json.loads, (self.folder / stage / "samples.jsonl").read_text().splitlines())

    def samples(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "eval" / "samples.json").read_text())


def within(stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    """`--set` of several fields of a stage, or of its `train` where that is said."""
    return {f"stages.{stage}.{name}": value for name, value in fields.items()}


def few(*stages: str) -> dict[str, Any]:
    return {path: value for stage in stages for path, value in within(f"{stage}.train", FEW).items()}


def any_gain(*gates: int) -> dict[str, Any]:
    """Gates that so short a training cannot but hold; they are looked at all the same."""
    return {f"stages.eval.gates.{n}.at_least": -1 for n in gates}


def test_every_example_is_run_or_planned() -> None:
    run = {"csv_lora", "tools", "sweep", "own", "quickstart", "ppo", "grpo", "on_policy_dpo", "frontier"}
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == {f"{name}.yaml" for name in run} | PLANNED


# ------------------------------------------------------------------------------------------------ small


@pytest.mark.slow
def test_csv_lora(clone: Path) -> None:
    run = Run(clone, "csv_lora", few("taught", "lora") | any_gain(0))
    with (clone / "examples" / "data" / "examples" / "dates.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ledger = run.ledger("lora")
    assert (ledger["read"], ledger["reasons"].keys()) == (len(rows), {"held_out"})
    assert 0 < ledger["reasons"]["held_out"] < len(rows) / 5 and "eval_loss" in run.metrics("lora")

    adapter = run.folder / "lora" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 16
    trained = load_file(adapter / "adapter_model.safetensors")
    assert trained and all(".lora_" in name for name in trained)
    before, after = run.weights("taught"), run.weights("lora")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)  # merged: the linear layers, nothing else

    (told,) = run.stages["eval"]["gates"]
    assert told["holds"] and "exact_match of lora over taught" in told["says"]
    assert run.metrics("eval")["lora"]["answers"] == 20
    assert all(re.fullmatch(r"[A-Z]\w+ \d+, \d{4}|\d+\. \w+ \d{4}", s["expected"]) for s in run.samples())


@pytest.mark.slow
def test_tools(clone: Path) -> None:
    shown = json.loads(raylign(clone, "inspect", "examples/tools.yaml", "--stage", "sft", "--json", "-n", "8").stdout)
    trained = [s for row in shown["rows"] for s in row["segments"] if s["trained"]]
    calls = [s["text"] for s in trained if s["text"].startswith("<tool_call>\n")]
    assert {s["role"] for s in trained} == {"assistant"} and 0 < len(calls) < len(trained)
    assert all(called(text.removesuffix("<|im_end|>"))["name"] in ("order_status", "stock") for text in calls)
    results = [s for row in shown["rows"] for s in row["segments"] if s["role"] == "tool"]
    assert len(results) >= len(calls) and not any(s["trained"] for s in results)

    run = Run(clone, "tools", few("sft") | {"stages.eval.gates.0.at_least": 0})
    assert run.gates() == [True] and run.metrics("eval")["sft"]["answers"] == 20
    assert all("<tools>" in s["prompt"] and "order_status" in s["prompt"] for s in run.samples())


def called(text: str) -> dict[str, Any]:
    """The call that an answer is, as the template has it written."""
    found = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text)
    assert found is not None, text
    return json.loads(found.group(1))


@pytest.mark.slow
def test_sweep(clone: Path) -> None:
    run = Run(clone, "sweep", few("sft", "dpo") | {"stages.eval.kl_samples": 8})
    betas = (0.1, 0.3, 1.0)
    made = [run.manifest(f"dpo-beta-{beta}") for beta in betas]
    assert [m["config"]["train"]["beta"] for m in made] == list(betas)
    assert len({m["inputs"]["model"][0]["fingerprint"] for m in made}) == 1
    assert run.metrics("eval").keys() == {"sft", *(f"dpo-beta-{beta}" for beta in betas)}
    table = run.printed.split("dpo: 3 variants")[1]
    rows = [line.split()[:2] for line in table.splitlines() if line.strip().startswith("dpo-beta-")]
    assert rows == [[f"dpo-beta-{beta}", str(beta)] for beta in betas]


@pytest.mark.slow
def test_own(clone: Path) -> None:
    run = Run(clone, "own", few("taught", "fast", "slow"))
    check_own(run)
    assert run.ledger("fast")["reasons"] == {"filtered": 66}


def check_own(run: Run) -> None:
    assert "gate: own:no_worse: holds" in run.printed
    fast, slow, average = (run.weights(name) for name in ("fast", "slow", "average"))
    assert all(torch.allclose(average[name], (fast[name] + slow[name]) / 2, atol=1e-6) for name in average)
    assert any(not torch.equal(fast[name], slow[name]) for name in fast)


@pytest.mark.slow
def test_quickstart(clone: Path) -> None:
    changes = few("reward", "dpo", "kto") | any_gain(0, 1, 2) | within("ppo.train", PPO)
    run = Run(clone, "quickstart", changes | within("sft.train", SFT) | within("compared", COMPARED))
    assert run.gates() == [True] * 3
    compared = run.metrics("eval")
    assert compared.keys() == {"sft", "reward", "dpo", "kto", "ppo"}
    assert compared["reward"]["preference_by"] == "reward" and "exact_match" not in compared["reward"]
    assert all("kl" in compared[name] for name in ("dpo", "kto", "ppo"))
    assert run.ledger("compared")["read"] == 24 and run.ledger("compared")["kept"] > 0
    assert run.manifest("kto")["rows"] == 2 * run.manifest("dpo")["rows"] == 80  # each pair is two answers


@pytest.mark.slow
def test_ppo(clone: Path) -> None:
    changes = few("reward") | any_gain(0) | within("ppo.train", PPO)
    run = Run(clone, "ppo", changes | within("sft.train", SFT) | within("compared", COMPARED))
    answered = list(run.answered("ppo"))
    assert answered and all(answer["scores"].keys() == {"reward"} for answer in answered)
    assert run.manifest("reward")["rows"] == 40 + run.ledger("compared")["kept"]
    assert run.gates() == [True] and run.manifest("ppo")["inputs"].keys() >= {"model", "rewards"}


@pytest.mark.slow
def test_grpo(clone: Path) -> None:
    run = Run(clone, "grpo", any_gain(0) | within("sft.train", SFT) | within("grpo.train", GRPO))
    answered = list(run.answered("grpo"))
    assert answered and all(answer["reward"] in (0.0, 1.0) for answer in answered)  # a program verifies them
    assert run.gates() == [True] and run.manifest("grpo")["steps"] == 4


@pytest.mark.slow
def test_on_policy_dpo(clone: Path) -> None:
    changes = few("reward", "dpo") | any_gain(0) | within("sft.train", SFT)
    run = Run(clone, "on_policy_dpo", changes | within("pairs", {"max_prompts": 16, "margin": 0.01}))
    pairs = [json.loads(line) for file in (run.folder / "pairs" / "data").glob("*.jsonl") for line in file.open()]
    assert pairs and all(pair["chosen"] != pair["rejected"] and pair["margin"] >= 0.01 for pair in pairs)
    assert run.manifest("dpo")["rows"] == len(pairs) == run.ledger("pairs")["kept"]
    assert run.gates() == [True]


@pytest.mark.slow
def test_frontier(clone: Path) -> None:
    changes = few("reward", "dpo") | within("sft.train", SFT) | within("compared", COMPARED)
    for stage, least in (("dpo", {}), ("ppo", PPO), ("verified", PPO), ("grpo", GRPO)):
        path = "train.kl_coef" if least is PPO else "train.beta"
        changes |= within(f"{stage}.train", least) | {f"stages.{stage}.sweep": {path: [0.2]}}
    run = Run(clone, "frontier", changes)
    tuned = {"dpo-beta-0.2", "ppo-kl_coef-0.2", "verified-kl_coef-0.2", "grpo-beta-0.2"}
    compared = run.metrics("eval")
    assert compared.keys() == {"sft", "reward"} | tuned
    assert all({"kl", "exact_match"} <= compared[name].keys() for name in tuned)  # a point of the picture
    learned, verified = (next(run.answered(f"{name}-kl_coef-0.2"))["scores"] for name in ("ppo", "verified"))
    assert learned.keys() == {"reward"} != verified.keys()


@pytest.mark.slow
def test_the_notebook(clone: Path) -> None:
    """Its cells in one process, one after the other, with fewer rows and steps."""
    book = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    code = "\n\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    for old, new in (
        ("generate(DATA)", "generate(DATA, chat_count=400, pair_count=40, heldout_count=20, prompt_count=24)"),
        ('"max_steps": 700', '"max_steps": 20'),
        ('"num_train_epochs": 1', '"max_steps": 3'),
        ('"logging_steps": 25', '"logging_steps": 1'),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    code += (
        "\n\nassert report.is_file() and losses and len(losses) >= 20, losses"
        "\nassert set(compared) == {'sft', 'dpo'} and isinstance(answer, str)"
        "\nassert compared['dpo']['kl'] is not None"
    )
    assert "exact match" in python(clone, "-c", code)


# ------------------------------------------------------------------------------------------------ as they stand


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples and their data as a user has them."""
    folder = clone_of_examples(tmp_path_factory.mktemp("whole"))
    python(folder, "example_data.py", "data/examples")
    return folder


@pytest.mark.slow
def test_csv_lora_learns_what_the_csv_has(whole: Path) -> None:
    run = Run(whole, "csv_lora", {"stages.eval.shown": 200})
    found = run.metrics("eval")
    assert found["taught"]["exact_match"] < 0.05 and found["lora"]["exact_match"] > 0.8
    assert len(run.samples()) == 200 and run.gates() == [True]


@pytest.mark.slow
def test_tools_learns_the_calls(whole: Path) -> None:
    run = Run(whole, "tools", {"stages.eval.shown": 200})
    asked = [s for s in run.samples() if s["expected"].startswith("<tool_call>")]
    right = sum(s["answers"]["sft"] == s["expected"] for s in asked)
    assert len(asked) == 100 and right > 80
    calls = [called(s["answers"]["sft"]) for s in asked if s["answers"]["sft"] == s["expected"]]
    assert {call["name"] for call in calls} == {"order_status", "stock"} and run.gates() == [True]


@pytest.mark.slow
def test_own_as_it_stands(whole: Path) -> None:
    run = Run(whole, "own")
    check_own(run)
    assert run.metrics("eval")["average"]["exact_match"] > 0.8
