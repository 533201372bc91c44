"""Sweeps: expanded into ordinary stages, folded back, and their mistakes told where they were written. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline import Pipeline
from pipeline.plan import make_plan
from pipeline.spec import Spec, json_schema
from pipeline.spec_reader import load_spec
from pipeline.sweep import AT_MOST, expand, fold, labels
from stages import DPO, KINDS
from stages.errors import SpecError

SPEC = """\
name: test
model: {model}
stages:
  sft: {{kind: sft, data: [{{path: {data}/chats.jsonl}}]}}
  dpo:
    kind: dpo
    model: stages.sft
    data: [{{path: {data}/pairs.jsonl}}]
    sweep:
      train.beta: [0.05, 0.1,
        0.3]
  eval: {{kind: evaluate, models: [stages.sft, stages.dpo], data: [{{path: {data}/heldout.jsonl}}]}}
"""
BETAS = {f"dpo-beta-{beta}": {"train.beta": beta} for beta in (0.05, 0.1, 0.3)}


@pytest.fixture
def spec(tmp_path: Path, data: Path, model: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.format(model=model, data=data))
    return path


def changed(spec: Path, *changes: tuple[str, str]) -> Path:
    text = spec.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    spec.write_text(text)
    return spec


def problems(path: Path, *overrides: str) -> dict[str, tuple[int | None, str]]:
    with pytest.raises(SpecError) as error:
        load_spec(path, overrides)
    assert len({p.path for p in error.value.problems}) == len(error.value.problems)
    return {p.path: (p.line, p.message) for p in error.value.problems}


def prints(spec: Spec) -> dict[str, str]:
    return {s.name: s.fingerprint for s in make_plan(spec).stages}


def saved(spec: Spec, folder: Path) -> Path:
    with (folder / "again.yaml").open("w") as out:
        YAML().dump(spec.as_yaml(), out)
    return folder / "again.yaml"


# ------------------------------------------------------------------------------------------------ expansion


def test_a_sweep_is_its_variants(spec: Path) -> None:
    read = load_spec(spec)
    assert list(read.stages) == ["sft", *BETAS, "eval"]
    assert [read.stages[name].train.given() for name in BETAS] == [{"beta": 0.05}, {"beta": 0.1}, {"beta": 0.3}]
    assert read.stages["eval"].models == ["stages.sft", *(f"stages.{name}" for name in BETAS)]
    assert read.sweeps == {"dpo": BETAS}
    assert read.upstream("dpo-beta-0.1") == ["sft"]
    assert [s.name for s in make_plan(read).stages] == ["sft", *BETAS, "eval"]


def test_a_variant_is_the_stage_one_would_have_written(spec: Path) -> None:
    variant = prints(load_spec(spec))["dpo-beta-0.1"]
    plain = changed(spec, ("    sweep:\n      train.beta: [0.05, 0.1,\n        0.3]", "    train: {beta: 0.1}"))
    assert prints(load_spec(plain))["dpo"] == variant


def test_changing_one_value_changes_one_variant(spec: Path) -> None:
    before = prints(load_spec(spec))
    after = prints(load_spec(changed(spec, ("0.3]", "0.4]"))))
    assert set(before.items() - after.items()) == {
        ("dpo-beta-0.3", before["dpo-beta-0.3"]),
        ("eval", before["eval"]),
    }


def test_several_paths_are_their_product(spec: Path) -> None:
    read = load_spec(
        spec, ["stages.dpo.sweep={train.beta: [0.1, 1e-5], tuning: [{method: lora, r: 4}, {method: full}]}"]
    )
    assert list(read.sweeps["dpo"]) == [
        f"dpo-beta-{beta}-tuning-{t}" for beta in ("0.1", "1e-05") for t in ("method-lora-r-4", "method-full")
    ]
    assert read.stages["dpo-beta-0.1-tuning-method-lora-r-4"].lora()["r"] == 4
    assert read.stages["dpo-beta-0.1-tuning-method-full"].lora() is None


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("{train.seed_x: [1], tuning.seed_x: [2]}", ["dpo-train.seed_x-1-tuning.seed_x-2"]),
        ("{a.b.c: [1], b.c: [2]}", ["dpo-a.b.c-1-b.c-2"]),
        ("{x: [-1, 1, true, null, 'A b/C d', [p, 2]]}",
         ["dpo-x--1", "dpo-x-1", "dpo-x-true", "dpo-x-none", "dpo-x-c-d", "dpo-x-p-2"]),
        ("{x: [A, a, 1, '1', b]}", ["dpo-x-a-1", "dpo-x-a-2", "dpo-x-1-1", "dpo-x-1-2", "dpo-x-b"]),
        ("{x: [A, a, a-1]}", ["dpo-x-a-2", "dpo-x-a-3", "dpo-x-a-1"]),
        ("{x: [%s]}" % ("y" * 300), ["dpo-x-" + "y" * 40]),
    ],
)  # fmt: skip
def test_names(sweep: str, names: list[str]) -> None:
    raw = YAML(typ="safe").load(sweep)
    assert list(expand({"dpo": {"kind": "dpo", "sweep": raw}}, pytest.fail).stages) == names


def test_what_follows_a_sweep_can_follow_each_variant(spec: Path) -> None:
    follow = "  after: {{kind: dpo, data: [{{path: {0}}}], sweep: {{model: [stages.dpo, stages.sft]}}}}\n  eval:"
    pairs = load_spec(spec).stages["dpo-beta-0.1"].data[0].path
    read = load_spec(changed(spec, ("  eval:", follow.format(pairs)), ("stages.sft, stages.dpo]", "stages.after]")))
    names = [*(f"after-model-{name}" for name in BETAS), "after-model-sft"]
    assert list(read.sweeps["after"]) == names
    assert read.upstream("after-model-dpo-beta-0.3") == ["dpo-beta-0.3"]
    assert read.stages["eval"].models == [f"stages.{name}" for name in names]
    again = read.as_yaml()["stages"]
    assert again["after"]["sweep"] == {"model": ["stages.dpo", "stages.sft"]} and again["eval"]["models"] == [
        "stages.after"
    ]
    assert load_spec(saved(read, spec.parent)).as_yaml() == read.as_yaml()


def test_an_evaluation_may_name_a_variant_besides(spec: Path) -> None:
    models = "stages.eval.models=[stages.dpo-beta-0.3, stages.dpo]"
    read = load_spec(spec, [models, "stages.eval.gates=[{metric: loss, of: stages.dpo-beta-0.1, at_most: 9}]"])
    assert read.stages["eval"].models == [f"stages.dpo-beta-{beta}" for beta in (0.3, 0.05, 0.1)]


def test_an_evaluation_can_be_swept(spec: Path) -> None:
    read = load_spec(spec, ["stages.eval.sweep={max_new_tokens: [4, 8]}"])
    assert [read.stages[f"eval-max_new_tokens-{n}"].max_new_tokens for n in (4, 8)] == [4, 8]
    assert read.stages["eval-max_new_tokens-4"].models[1:] == [f"stages.{name}" for name in BETAS]


def test_variants_do_not_count_again_for_the_tokenizer_of_a_fresh_model(tmp_path: Path, data: Path) -> None:
    text = "model: {init: {config: {}}}\nstages:\n  sft: {kind: sft, data: [{path: %s/chats.jsonl}]%s}\n"
    prints_of_base = []
    for sweep in ("", ", sweep: {train.max_steps: [1, 2]}", ", sweep: {train.max_steps: [1, 2, 3]}"):
        (tmp_path / "s.yaml").write_text(text % (data, sweep))
        prints_of_base.append(prints(load_spec(tmp_path / "s.yaml"))["base"])
    assert len(set(prints_of_base)) == 1


# ------------------------------------------------------------------------------------------------ the saved spec, Python, the schema


@pytest.mark.parametrize(
    "sweep",
    [
        "{train.beta: [0.05, 0.1]}",
        "{train.beta: [0.05, 0.1], train.loss_type: [[sigmoid], [ipo]], max_dropped: ['1%', 0.5]}",
        "{model: [stages.sft, null], tuning: [{method: lora, r: 4}, {method: full}]}",
        "{data.0.weight: [1.0, 2.0], deepspeed: [zero2, ds.json]}",
    ],
)
def test_the_saved_spec_gives_the_same_plan(spec: Path, sweep: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (tmp_path / "elsewhere").mkdir()
    changed(spec, ("    model: stages.sft\n", "")) if "model" in sweep else None
    read = load_spec(spec, [f"stages.dpo.sweep={sweep}"])
    again = load_spec(saved(read, tmp_path / "elsewhere"))
    assert again.as_yaml() == read.as_yaml() and again.sweeps == read.sweeps
    assert "sweep" in again.as_yaml()["stages"]["dpo"] and len(prints(again)) == len(read.stages)
    assert prints(again) == prints(read)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b.c", "b.d", "e.f.g"]),
        st.lists(st.integers(-3, 3) | st.text(max_size=3) | st.booleans() | st.none(), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_folding_undoes_expanding(sweep: dict[str, list[Any]]) -> None:
    told: list[Any] = []
    stages = {"x": {"kind": "k", "b": {"z": 1}, "sweep": sweep}, "y": {"models": ["stages.x", "base"]}}
    out = expand(stages, lambda *said: told.append(said))
    if told:
        assert all("twice" in message for _, message in told)
        return
    assert len(out.sweeps["x"]) == len(set(out.sweeps["x"])) and set(out.sweeps["x"]) < set(out.stages)
    assert all(name == name.lower() and "/" not in name for name in out.stages)
    assert fold(out.stages, out.sweeps) == stages


def test_python_makes_the_same_spec(spec: Path, data: Path, model: str) -> None:
    common: dict[str, Any] = {
        "model": "stages.sft",
        "data": [{"path": str(data / "pairs.jsonl")}],
        "sweep": {"train.beta": [0.05, 0.1, 0.3]},
    }
    for dpo in ({"kind": "dpo", **common}, DPO(**common)):
        stages: dict[str, Any] = {
            "sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]},
            "dpo": dpo,
            "eval": {
                "kind": "evaluate",
                "models": ["stages.sft", "stages.dpo"],
                "data": [{"path": str(data / "heldout.jsonl")}],
            },
        }
        made = Pipeline(name="test", model=model, storage=str(spec.parent / "runs"), stages=stages).spec
        assert made.as_yaml() == load_spec(spec).as_yaml() and prints(made) == prints(load_spec(spec))


def test_the_schema_knows_sweeps_of_every_kind() -> None:
    definitions = json_schema()["$defs"]
    assert all("sweep" in definitions[f"{kind}-stage"]["properties"] for kind in KINDS)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("sweep", "where", "says"),
    [
        ("{train.betta: [1, 2]}", "sweep.train.betta", "unknown key; did you mean beta?"),
        ("{trian.beta: [1, 2]}", "trian", "unknown key; did you mean train?"),
        ("{train.beta: []}", "sweep.train.beta", "the list is empty; a value for each variant is wanted"),
        ("{train.beta: 0.1}", "sweep.train.beta", "a list of values is wanted, not 0.1"),
        ("{train: {beta: [0.1]}}", "sweep.train", "write the path with dots: train.beta: [...]"),
        ("[0.1]", "sweep", "a mapping of paths to their values is wanted, for example {train.beta: [0.05, 0.1]}"),
        ("{}", "sweep", "a mapping of paths to their values is wanted, for example {train.beta: [0.05, 0.1]}"),
        ("{kind: [dpo, reward]}", "sweep.kind", "kind cannot be swept"),
        ("{model: [stages.sft]}", "sweep.model", 'model is given besides, "stages.sft"; leave one of them out'),
        ("{model.x: [1]}", "sweep.model.x", "model is not a mapping"),
        ("{data.1.weight: [1]}", "sweep.data.1.weight", "data is a list of 1, '1' is not in it"),
        ("{train.beta: [0.1, 0.2, 0.1]}", "sweep.train.beta.2", "0.1 stands here twice"),
        ("{train: [{beta: 1}], train.beta: [1]}", "sweep.train.beta", "train is swept as well, which holds it"),
        (f"{{train.beta: {list(range(AT_MOST + 1))}}}", "sweep", "65 variants, at most 64 are made; leave some values out"),
        (f"{{train.beta: {[*range(9)]}, train.max_steps: {[*range(8)]}}}", "sweep",
         "72 variants, at most 64 are made; leave some values out"),
        ("{train.beta: [0.1, much, 0.2]}", "sweep.train.beta.1",
         "should be a valid number, not 'much' (variant dpo-beta-much)"),
        ("{train.beta: [few, much]}", "sweep.train.beta.0", "should be a valid number, not 'few' (variant dpo-beta-few)"),
        ("{tuning: [{method: full}, {method: lora, rr: 4}]}", "sweep.tuning.1.rr",
         "unknown key; did you mean r? (variant dpo-tuning-method-lora-rr-4)"),
        ("{train.max_length: [64, 0]}", "train", "max_length must be at least 1, not 0 (variant dpo-max_length-0)"),
        ("{train.max_length: [64, 4096]}", "sweep.train.max_length.1",
         "4096 is more than the 256 positions of the model (max_position_embeddings); write 256 or less"
         " (variant dpo-max_length-4096)"),
    ],
)  # fmt: skip
def test_mistakes(spec: Path, sweep: str, where: str, says: str) -> None:
    line, message = problems(spec, f"stages.dpo.sweep={sweep}")[f"stages.dpo.{where}"]
    assert message == says and line in (5, 8, 9)  # of the stage, its data or its sweep


def test_a_mistake_has_the_line_of_its_value(spec: Path) -> None:
    assert problems(changed(spec, ("0.3]", "high]"))) == {
        "stages.dpo.sweep.train.beta.2": (11, "should be a valid number, not 'high' (variant dpo-beta-high)")
    }


def test_what_all_variants_have_is_told_once_and_where_it_stands(spec: Path) -> None:
    changed(spec, ("    model: stages.sft\n", "    model: stages.sfd\n    tuning: {method: lora, rr: 1}\n"))
    assert problems(changed(spec, ("pairs.jsonl", "gone.jsonl"))).keys() == {
        "stages.dpo.model",
        "stages.dpo.tuning.rr",
        "stages.dpo.data.0",
    }


def test_a_bad_value_of_one_path_names_the_variants_that_have_it(spec: Path) -> None:
    found = problems(spec, "stages.dpo.sweep={train.beta: [0.1, x], train.max_steps: [1, 2, 3, 4]}")
    assert found["stages.dpo.sweep.train.beta.1"][1].endswith(
        "not 'x' (variants dpo-beta-x-max_steps-1, dpo-beta-x-max_steps-2, dpo-beta-x-max_steps-3 and 1 more)"
    )


def test_where_one_model_is_wanted_the_variants_are_named(spec: Path) -> None:
    which = "stages.dpo is a sweep; name one of its variants: stages.dpo-beta-0.05, stages.dpo-beta-0.1, stages.dpo-beta-0.3"
    gate = "stages.eval.gates=[{metric: loss, of: stages.dpo, at_most: 1}]"
    assert problems(spec, gate)["stages.eval.gates.0.of"] == (12, which)
    changed(spec, ("  eval:", "  after: {kind: dpo, model: stages.dpo, data: [{path: x}]}\n  eval:"))
    assert problems(spec)["stages.after.model"] == (12, which)
    assert problems(spec, "stages.after.model=stages.dop")["stages.after.model"][1].endswith("did you mean dpo?")
    assert "write stages.dpo to use" in problems(spec, "stages.after.model=dpo")["stages.after.model"][1]


def test_lines_of_models_after_a_sweep(spec: Path) -> None:
    changed(spec, ("models: [stages.sft, stages.dpo]", "models: [stages.dpo, stages.sfd]"))
    assert problems(spec) == {"stages.eval.models.1": (12, "there is no stage 'sfd'; did you mean sft?")}


def test_a_name_can_be_taken(spec: Path) -> None:
    changed(spec, ("  eval:", "  dpo-x-1: {kind: dpo, model: stages.sft, data: [{path: x}], sweep: {y: [2]}}\n  eval:"))
    assert "its variant dpo-x-1-y-2 has the name of another stage" in str(
        problems(spec, "stages.dpo.sweep={x: [1], y: [2]}")["stages.dpo-x-1.sweep"]
    )


def test_a_fresh_model_is_one(tmp_path: Path, data: Path) -> None:
    text = (
        "model: {init: {config: {}, sweep: {seed: [1]}}}\nstages:\n  sft: {kind: sft, data: [{path: %s/chats.jsonl}]}\n"
    )
    (tmp_path / "s.yaml").write_text(text % data)
    assert "one model is wanted" in problems(tmp_path / "s.yaml")["model.init.sweep"][1]


def test_circles_through_a_sweep(spec: Path) -> None:
    changed(
        spec,
        ("sft: {kind: sft,", "sft: {kind: sft, sweep: {model: [stages.dpo]},"),
        ("model: stages.sft\n", "model: stages.sft-model-dpo-beta-0.05\n"),
    )
    assert any("circle" in message for _, message in problems(spec).values())


def test_labels_are_the_shortest_that_differ() -> None:
    assert labels(["train.beta", "train.loss_type"]) == {"train.beta": "beta", "train.loss_type": "loss_type"}
    assert labels(["a.r", "b.r", "r"]) == {"a.r": "a.r", "b.r": "b.r", "r": "r"}


def test_a_dataset_and_a_reward_are_one_of_the_variants(spec: Path) -> None:
    """The answers of all variants together, or the sum of all rewards, would be something else."""
    make = "  pairs: {{kind: generate, model: stages.sft, data: [{{path: {0}}}], rewards: [{1}], samples: 2, max_new_tokens: 8, sweep: {{temperature: [0.7, 1.0]}}}}"
    prompts = load_spec(spec).stages["dpo-beta-0.1"].data[0].path
    reward = f"  reward: {{kind: reward, model: stages.sft, data: [{{path: {prompts}}}], sweep: {{train.max_steps: [1, 2]}}}}\n"
    made = make.format(prompts, "stages.reward-max_steps-1")
    changed(spec, ("  eval:", f"{reward}{made}\n  eval:"))
    read = load_spec(spec, ["stages.dpo.data=[{path: stages.pairs-temperature-0.7}]"])
    assert read.upstream("dpo-beta-0.1") == ["sft", "pairs-temperature-0.7"]
    assert load_spec(saved(read, spec.parent)).as_yaml() == read.as_yaml()
    which = "stages.{0} is a sweep; name one of its variants: stages.{0}-{1}, stages.{0}-{2}"
    assert problems(spec, "stages.dpo.data=[{path: stages.pairs}]") == {
        "stages.dpo.data.0.path": (8, which.format("pairs", "temperature-0.7", "temperature-1.0"))
    }
    assert problems(spec, "stages.pairs.rewards=[stages.reward]")["stages.pairs.rewards.0"][1] == which.format(
        "reward", "max_steps-1", "max_steps-2"
    )
