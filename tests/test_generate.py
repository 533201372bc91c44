"""The generate stage in a spec: what is checked, planned and fingerprinted of a dataset that a stage makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import Pipeline
from pipeline.artifacts import RunFolder
from pipeline.estimate import describe
from pipeline.inspection import inspect
from pipeline.plan import Plan, lineage, make_plan, with_made_data
from pipeline.spec_reader import load_spec
from stages.answering import cut
from stages.data.prepare import Prepared
from stages.errors import SpecError

from .conftest import write_jsonl

SPEC = """\
name: test
model: {model}
stages:
  sft: {{kind: sft, data: [{{path: {data}/chats.jsonl}}], train: {{max_steps: 5}}}}
  reward: {{kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}]}}
  pairs:
    kind: generate
    model: stages.sft
    data: [{{path: {data}/heldout.jsonl}}]
    max_new_tokens: 8
    max_prompts: 15
    rewards: [stages.reward, {{reward: "own_rewards:f", weight: 0.5}}]
  dpo: {{kind: dpo, model: stages.sft, data: [{{path: stages.pairs, eval: 10%}}, {{path: {data}/pairs.jsonl}}]}}
"""


@pytest.fixture
def spec(tmp_path: Path, data: Path, model: str) -> Path:
    (tmp_path / "own_rewards.py").write_text("def f(**_): return []\n")
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.format(model=model, data=data))
    return path


def problems(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(SpecError) as error:
        load_spec(path, overrides)
    return {p.path: p.message for p in error.value.problems}


def test_a_dataset_is_a_stage_before(spec: Path) -> None:
    read = load_spec(spec)
    assert read.upstream("pairs") == ["sft", "reward"] and read.upstream("dpo") == ["sft", "pairs"]
    assert read.references("pairs")["rewards"] == ["stages.reward"]
    assert read.references("dpo")["data"] == ["stages.pairs"]
    assert [s.name for s in make_plan(read).stages] == ["sft", "reward", "pairs", "dpo"]
    again = spec.with_name("again.yaml")
    from ruamel.yaml import YAML

    with again.open("w") as out:
        YAML().dump(read.as_yaml(), out)
    assert [s.fingerprint for s in make_plan(load_spec(again)).stages] == [
        s.fingerprint for s in make_plan(read).stages
    ]


@pytest.mark.parametrize(
    ("override", "path", "says"),
    [
        ("stages.dpo.data=[{path: stages.pears}]", "stages.dpo.data.0.path", "no stage 'pears'; did you mean pairs?"),
        ("stages.dpo.data=[{path: pairs}]", "stages.dpo.data.0.path", "write stages.pairs"),
        ("stages.dpo.data=[{path: stages.reward}]", "stages.dpo.data.0.path", "makes a reward model; wanted here: dataset"),
        ("stages.sft.data=[{path: stages.pairs}]", "stages.sft.data.0", "sft wants conversations or text, these rows are preference"),
        ("stages.pairs.make=kto", "stages.dpo.data.0", "dpo wants preference pairs, these rows are kto; see `make`"),
        ("stages.dpo.model=stages.pairs", "stages.dpo.model", "makes a dataset; wanted here: model"),
        ("stages.pairs.model=stages.dpo", "stages.pairs", "in a circle: pairs -> dpo -> pairs"),
        ("stages.pairs.data=[{path: stages.pairs}]", "stages.pairs", "in a circle: pairs -> pairs"),
        ("stages.pairs.rewards=[stages.rewrad]", "stages.pairs.rewards.0", "did you mean reward?"),
        ("stages.pairs.rewards=[reward]", "stages.pairs.rewards.0", "write stages.reward"),
        ("stages.pairs.rewards=[stages.sft]", "stages.pairs.rewards.0", "makes a model; wanted here: reward model"),
        ("stages.pairs.rewards=[{reward: stages.sft}]", "stages.pairs.rewards.0.reward", "wanted here: reward model"),
        ("stages.pairs.rewards=['nowhere_at_all:f']", "stages.pairs.rewards.0", "no module 'nowhere_at_all'"),
        ("stages.pairs.rewards=[{reward: 'own_rewards:f', wieght: 2}]", "stages.pairs.rewards.0.wieght", "did you mean weight?"),
        ("stages.pairs.rewards=[./gone]", "stages.pairs.rewards", "no such model folder"),
        ("stages.pairs.rewards=[]", "stages.pairs.rewards", "at least 1 item"),
        ("stages.pairs.samples=1", "stages.pairs", "there have to be at least 2"),
        ("stages.pairs.threshold=0.5", "stages.pairs", "set `margin`"),
        ("stages.pairs.max_new_tokens=256", "stages.pairs.max_new_tokens", "no room for a prompt in the model's 256 positions"),
        ("stages.pairs.temperature=0", "stages.pairs.temperature", "greater than 0"),
        ("stages.pairs.engine=vlm", "stages.pairs.engine", "'auto', 'transformers' or 'vllm'"),
        ("stages.pairs.data=[{path: stages.pairs, weight: 2}]", "stages.pairs.data", "leave `weight` and `eval` out"),
    ],
)  # fmt: skip
def test_mistakes(spec: Path, override: str, path: str, says: str) -> None:
    found = problems(spec, override)
    assert path in found and says in found[path], found


def test_a_fresh_model_has_its_tokenizer_from_files(spec: Path, model: str) -> None:
    config = "{model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    text = spec.read_text().replace(f"model: {model}\n", f"model: {{init: {{config: {config}}}}}\n")
    spec.write_text(text)
    sft = "stages.sft.data=[{path: stages.pairs}, {path: " + str(spec.parent / "chats.jsonl") + "}]"
    write_jsonl(
        spec.parent / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    )
    read = load_spec(spec, ["stages.pairs.make=best", "stages.pairs.model=stages.base", "stages.dpo.data=[{path: stages.pairs}]",
                            "stages.dpo.kind=sft", "stages.reward.model=stages.base", sft])  # fmt: skip
    assert [source.path for source in read.stages["base"].data] == [str(spec.parent / "chats.jsonl")]
    spec.write_text(text.replace("init: {config", "init: {data: [{path: stages.pairs}], config"))
    assert "a tokenizer is trained on files" in problems(spec)["model.init.data.0.path"]


def test_what_decides_a_dataset_decides_what_is_trained_on_it(spec: Path) -> None:
    def fingerprints(*overrides: str) -> dict[str, str]:
        return {s.name: s.fingerprint for s in make_plan(load_spec(spec, overrides)).stages}

    before = fingerprints()

    def changed(after: dict[str, str]) -> set[str]:
        return {name for name in before if after[name] != before[name]}

    assert changed(fingerprints()) == set()
    assert changed(fingerprints("stages.pairs.samples=8")) == {"pairs", "dpo"}
    assert changed(fingerprints("stages.reward.train.num_train_epochs=9")) == {"reward", "pairs", "dpo"}
    assert changed(fingerprints("stages.pairs.workers=2")) == set()
    assert changed(fingerprints("stages.dpo.data.0.filter=margin > 1")) == {"dpo"}
    (spec.parent / "own_rewards.py").write_text("def f(**_): return [1.0]\n")
    assert changed(fingerprints()) == {"pairs", "dpo"}


def publish(plan: Plan, name: str, rows: list[Any]) -> None:
    """What a generate stage leaves, without the work."""
    planned = plan[name]
    folder = plan.folder.work(name, planned.fingerprint)
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "part-00000.jsonl", rows)
    about = {"fingerprint": planned.fingerprint, "produces": "dataset", "rows": len(rows), "tokens": 5, "steps": None}
    plan.folder.publish(name, about)


def test_a_plan_before_and_after_the_dataset_is_made(spec: Path, data: Path) -> None:
    read = load_spec(spec)
    before = {row["name"]: row for row in describe(make_plan(read))}
    assert before["dpo"]["rows"] is None and before["dpo"]["steps"] is None and before["dpo"]["disk_bytes"] is None
    assert before["dpo"]["inputs"] == ["stages.sft", "stages.pairs"]
    assert before["pairs"]["rows"] is None and before["pairs"]["why"] == "not made yet; 15 prompts, 4 answers to each"
    assert with_made_data(make_plan(read), read.stages["dpo"]) is None
    pairs = [json.loads(line) for line in (data / "pairs.jsonl").open()]
    publish(make_plan(read), "pairs", pairs[:20])
    plan = make_plan(read)
    after = {row["name"]: row for row in describe(plan)}
    assert (after["pairs"]["state"], after["pairs"]["rows"], after["dpo"]["rows"]) == ("cached", 20, 18 + 37)
    made = with_made_data(plan, read.stages["dpo"])
    assert made is not None and made.sources()[0].path == str(plan.folder.stage("pairs") / "data")
    assert read.stages["dpo"].sources()[0].path == "stages.pairs"
    (of_dpo,) = lineage(plan, plan["dpo"])["data"]
    assert of_dpo == {"stage": "pairs", "fingerprint": plan["pairs"].fingerprint, "data": made.sources()[0].path}
    assert plan.folder.artifact("pairs").model == made.sources()[0].path


def test_inspect_shows_what_is_made_and_names_who_makes_the_rest(spec: Path, data: Path) -> None:
    read = load_spec(spec)
    with pytest.raises(SpecError, match=r"its data is made by stages.pairs, which has not run yet"):
        inspect(make_plan(read), "dpo", 1)
    assert [i.stage for i in inspect(make_plan(read), None, 1)] == ["sft", "reward", "pairs"]
    publish(make_plan(read), "pairs", [json.loads(line) for line in (data / "pairs.jsonl").open()])
    (shown,) = inspect(make_plan(read), "dpo", 1)
    assert shown.stats.read == 74 and shown.rows[0][0].source.endswith("pairs/data/part-00000.jsonl")


def test_an_interrupted_stage_is_told_as_that(spec: Path) -> None:
    plan = make_plan(load_spec(spec))
    (plan.folder.work("pairs", plan["pairs"].fingerprint) / "rewards").mkdir(parents=True)
    assert make_plan(load_spec(spec))["pairs"].state == "resume"


def test_from_python(spec: Path, data: Path, model: str) -> None:
    from stages import SFT, Generate

    pipeline = Pipeline(
        name="test",
        model=model,
        storage=str(spec.parent / "runs"),
        stages={
            "best": Generate(
                data=[{"path": str(data / "heldout.jsonl")}], rewards=["json:loads"], make="best", max_new_tokens=8
            ),
            "sft": SFT(data=[{"path": "stages.best"}]),
        },
    )
    assert [s.name for s in pipeline.plan().stages] == ["best", "sft"]
    assert isinstance(pipeline.plan().folder, RunFolder)


def test_chunks_hold_every_prompt_once(tmp_path: Path) -> None:
    shards = [{"file": "a", "rows": 150, "groups": [100, 50]}, {"file": "b", "rows": 3, "groups": [3]}]
    data = Prepared(tmp_path, {"rows": 153, "shards": shards})

    def seen(most: int | None) -> list[tuple[str, int, int]]:
        chunks = cut(data, 64, most)
        assert [c.number for c in chunks] == list(range(len(chunks)))
        assert [c.first for c in chunks] == [sum(b.count for b in chunks[:i]) for i in range(len(chunks))]
        return [(Path(c.file).name, c.group, at) for c in chunks for at in range(c.start, c.start + c.count)]

    everything = [("a", 0, i) for i in range(100)] + [("a", 1, i) for i in range(50)] + [("b", 0, i) for i in range(3)]
    assert seen(None) == everything
    for most in (1, 64, 100, 101, 152, 999):
        assert seen(most) == everything[:most]
