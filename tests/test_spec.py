"""The spec: what is accepted, and that every mistake is told at once with its line, path and the nearest name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import Pipeline
from pipeline.spec import json_schema
from pipeline.spec_reader import load_spec
from stages import DPO, SFT, Evaluate
from stages.errors import SpecError

SPEC = """\
name: test
model: {model}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    train: {{learning_rate: 1e-3, max_steps: 5}}
  reward: {{kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}]}}
  dpo: {{kind: dpo, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], tuning: {{method: lora, r: 4}}}}
  eval: {{kind: evaluate, models: [stages.sft, stages.dpo, stages.reward], data: [{{path: {data}/heldout.jsonl}}]}}
"""


@pytest.fixture
def spec(tmp_path: Path, data: Path, model: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.format(model=model, data=data))
    return path


def problems(path: Path, *overrides: str) -> dict[str, tuple[int | None, str]]:
    with pytest.raises(SpecError) as error:
        load_spec(path, overrides)
    assert error.value.exit_code == 2
    return {p.path: (p.line, p.message) for p in error.value.problems}


def test_a_spec_is_read(spec: Path, data: Path, model: str) -> None:
    read = load_spec(spec)
    assert list(read.stages) == ["sft", "reward", "dpo", "eval"]
    assert read.stages["sft"].train.given() == {"learning_rate": 1e-3, "max_steps": 5}
    assert read.references("sft") == {"model": [model]}
    assert read.upstream("eval") == ["sft", "dpo", "reward"]
    assert read.stages["dpo"].lora()["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert read.storage == str(spec.parent / "runs")


def test_the_folder_of_a_spec_is_not_where_a_link_leads_to(spec: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: a link into a folder whose name no other pod has."""
    hidden = tmp_path / "..2026_12_01"
    hidden.mkdir()
    spec.rename(hidden / "spec.yaml")
    spec.symlink_to(hidden / "spec.yaml")
    read = load_spec(spec)
    assert read.folder == str(tmp_path) and read.storage == str(tmp_path / "runs")


def test_the_resolved_spec_reads_back_the_same(spec: Path, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    read = load_spec(spec)
    again = tmp_path / "again.yaml"
    with again.open("w") as out:
        YAML().dump(read.as_yaml(), out)
    assert load_spec(again).as_yaml() == read.as_yaml()


def test_python_makes_the_same_spec(spec: Path, data: Path, model: str) -> None:
    pairs = [{"path": str(data / "pairs.jsonl")}]
    pipeline = Pipeline(
        name="test",
        model=model,
        storage=str(spec.parent / "runs"),
        stages={
            "sft": SFT(data=[{"path": str(data / "chats.jsonl")}], train={"learning_rate": 1e-3, "max_steps": 5}),
            "reward": {"kind": "reward", "model": "stages.sft", "data": pairs},
            "dpo": DPO(model="stages.sft", data=pairs, tuning={"method": "lora", "r": 4}),
            "eval": Evaluate(
                models=["stages.sft", "stages.dpo", "stages.reward"], data=[{"path": str(data / "heldout.jsonl")}]
            ),
        },
    )
    assert pipeline.spec.as_yaml() == load_spec(spec).as_yaml()
    assert [s.fingerprint for s in pipeline.plan().stages] == [
        s.fingerprint for s in Pipeline.from_file(spec).plan().stages
    ]


def test_every_mistake_is_told_at_once(spec: Path, data: Path) -> None:
    text = spec.read_text().replace("learning_rate: 1e-3", "learning_rte: 1e-3, warmup_steps: many")
    text = text.replace("kind: reward, model: stages.sft", "kind: reward, model: stages.sfd")
    text = text.replace("kind: evaluate", "kind: evaluat").replace(
        "tuning: {method: lora, r: 4}", "tuning: {method: lora, rr: 4}"
    )
    spec.write_text(text + "storag: ./x\n")
    found = problems(spec)
    assert found == {
        "stages.sft.train.learning_rte": (7, "unknown key; did you mean learning_rate?"),
        "stages.sft.train.warmup_steps": (7, "should be a valid number, not 'many'"),
        "stages.reward.model": (8, "there is no stage 'sfd'; did you mean sft?"),
        "stages.dpo.tuning.rr": (9, "unknown key; did you mean r?"),
        "stages.eval.kind": (10, "kind 'evaluat' is not a kind of stage; did you mean evaluate?; kinds: init, sft, reward, dpo, kto, ppo, grpo, rloo, generate, evaluate, or a class of yours as module:Class"),
        "storag": (11, "unknown key; did you mean storage?"),
    }  # fmt: skip


def test_wrong_kinds_of_input_and_cycles(spec: Path) -> None:
    text = spec.read_text().replace("kind: dpo, model: stages.sft", "kind: dpo, model: stages.reward")
    text = text.replace("    kind: sft\n", "    kind: sft\n    model: stages.dpo\n")
    text = text.replace("kind: reward, model: stages.sft", "kind: reward, model: sft")
    spec.write_text(text)
    found = problems(spec)
    assert found["stages.dpo.model"] == (10, "stages.reward makes a reward model; wanted here: model")
    assert found["stages.reward.model"] == (9, "write stages.sft to use what the stage 'sft' makes")
    spec.write_text(
        text.replace("kind: reward, model: sft", "kind: reward, model: stages.sft").replace(
            "stages.reward, data", "stages.sft, data"
        )
    )
    assert problems(spec)["stages.sft"][1] == "the stages go round in a circle: sft -> dpo -> sft"


def test_data_and_models_are_looked_at_before_anything_starts(spec: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "notamodel").mkdir()
    text = spec.read_text().replace(
        f"path: {data}/chats.jsonl", "path: gone.jsonl}, {path: empty.jsonl}, {path: odd.jsonl"
    )
    text = text.replace(
        f"kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl",
        f"kind: reward, model: ./notamodel, data: [{{path: {data}/chats.jsonl",
    )
    spec.write_text(text)
    found = {path: message for path, (_, message) in problems(spec).items()}
    assert "no such file" in found["stages.sft.data.0"]
    assert "the file is empty" in found["stages.sft.data.1"]
    assert "question, answer, which is none of the formats" in found["stages.sft.data.2"]
    assert "reward wants preference pairs" in found["stages.reward.data.0"]
    assert "no config.json" in found["stages.reward.model"]


def test_what_the_pipeline_decides_is_refused_with_the_place_to_say_it(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("max_steps: 5", "output_dir: /tmp/x, padding_free: true, max_stps: 1"))
    assert problems(spec) == {
        "stages.sft.train.output_dir": (7, "the run folder decides where a stage writes"),
        "stages.sft.train.padding_free": (7, "use `packing: true`"),
        "stages.sft.train.max_stps": (7, "unknown key; did you mean max_steps?"),
    }


def test_gates_name_models_that_are_evaluated(spec: Path) -> None:
    gate = "[{metric: exact_match, of: stages.sfd, at_least: 0.1}, {metric: losss, of: stages.sft, at_most: 1}]"
    found = problems(spec, f"stages.eval.gates={gate}")
    assert found["stages.eval.gates.0.of"][1] == "stages.sfd is not among `models`; did you mean stages.sft?"
    assert "should be 'loss'" in found["stages.eval.gates.1.metric"][1]


def test_the_data_of_a_fresh_models_tokenizer_is_looked_at(tmp_path: Path, data: Path) -> None:
    text = "model: {init: {config: {}, data: [{path: gone.jsonl}]}}\nstages:\n  sft: {kind: sft, data: [{path: %s/chats.jsonl}]}\n"
    (tmp_path / "s.yaml").write_text(text % data)
    assert "no such file" in problems(tmp_path / "s.yaml")["model.init.data.0"][1]
    (tmp_path / "s.yaml").write_text(
        "model: {init: {config: {}}}\nstages:\n  sft: {kind: sft, data: [{path: gone.jsonl}]}\n"
    )
    assert list(problems(tmp_path / "s.yaml")) == ["stages.sft.data.0"]  # told once, where it stands


def test_the_config_of_a_fresh_model_is_checked(tmp_path: Path, data: Path) -> None:
    text = "model: {init: {config: {model_type: %s, hidden_sze: 16}}}\nstages:\n  sft: {kind: sft, data: [{path: %s/chats.jsonl}]}\n"
    (tmp_path / "s.yaml").write_text(text % ("llama", data))
    assert problems(tmp_path / "s.yaml")["model.init.config.hidden_sze"] == (
        1,
        "unknown key of a llama config; did you mean hidden_size?",
    )
    (tmp_path / "s.yaml").write_text(text % ("lama", data))
    assert "no model type 'lama'" in problems(tmp_path / "s.yaml")["model.init.config.model_type"][1]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ("{per_device_train_batch_size: 0}", "at least 1"),
        ("{max_steps: null}", "valid integer"),
        ("{gradient_accumulation_steps: -1}", "at least 1"),
    ],
)
def test_numbers_that_cannot_be(spec: Path, train: str, says: str) -> None:
    assert any(says in message for _, message in problems(spec, f"stages.sft.train={train}").values())


def test_overrides(spec: Path) -> None:
    read = load_spec(
        spec, ["stages.sft.train.learning_rate=1e-5", "seed=7", "stages.eval.models.0=stages.dpo", "cluster.workers=2"]
    )
    assert read.stages["sft"].train.given()["learning_rate"] == 1e-5
    assert (read.seed, read.stages["eval"].models[0], read.cluster.workers) == (7, "stages.dpo", 2)
    assert (
        "there is no stage 'sfd'; did you mean sft?" in problems(spec, "stages.sfd.seed=1")["--set stages.sfd.seed"][1]
    )
    assert "path=value" in problems(spec, "seed")["--set seed"][1]
    assert problems(spec, "sead=1")["sead"][1] == "unknown key; did you mean seed?"


def test_environment(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.write_text(spec.read_text() + "seed: ${SEED}\nstorage: ${STORE:-./out}/runs\n")
    line, message = problems(spec)["seed"]
    assert (line, message.split(";")[0]) == (11, "the environment variable SEED is not set")
    monkeypatch.setenv("SEED", "3")
    read = load_spec(spec)
    assert (read.seed, read.storage) == (3, str(spec.parent / "out" / "runs"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: [", "not YAML"),
        ("model: {init: {}}\nstages:\n", "at least one stage"),
        ("model: {init: {config: {}}}\nstages:\n", "at least one stage"),
        ("model: m\nstages: {a: {kind: [sft]}}\n", "is not a kind"),
        ("- a\n", "a spec is a mapping"),
        ("model: m\n", "at least one stage"),
        ("a: 1\na: 2\n", "not YAML"),
    ],
)
def test_what_is_no_spec_at_all(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError, match=says):
        load_spec(tmp_path / "s.yaml")


def test_names_cannot_leave_the_run_folder(spec: Path) -> None:
    assert "should match pattern" in problems(spec, "name=../x")["name"][1]
    spec.write_text(spec.read_text().replace("  reward:", "  ../reward:"))
    assert "small letters" in problems(spec)["stages.../reward"][1]


def test_the_schema_knows_the_trainers_own_fields() -> None:
    text = json.dumps(json_schema())
    assert all(
        name in text for name in ("learning_rate", "center_rewards_coefficient", "lora_alpha", "train_on", "at_least")
    )
    assert '"padding_free"' not in text


# ------------------------------------------------------------------------------------------------ reinforcement learning

PPO = """\
name: test
model: {model}
stages:
  reward: {{kind: reward, data: [{{path: {data}/pairs.jsonl}}]}}
  ppo:
    kind: ppo
    rewards: [stages.reward]
    max_new_tokens: 32
    data: [{{path: {data}/chats.jsonl}}]
"""


@pytest.fixture
def ppo(tmp_path: Path, data: Path, model: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(PPO.format(model=model, data=data))
    return path


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("reward_model=stages.reward", "write `rewards: [stages.reward]`"),
        ("response_length=53", "write `max_new_tokens: 53` beside `train`"),
        ("kl_coef=0.1", "write it in `train`: `train: {kl_coef: ...}`"),
        ("train.response_length=53", "write `max_new_tokens: 53` beside `train`"),
        ("train.max_new_tokens=53", "write it beside `train`"),
        ("train.placement=separate", "write it beside `train`"),
        ("train.num_generations=4", "kind: grpo compares several answers to it"),
        ("train.num_iterations=4", "write num_ppo_epochs"),
        ("train.sft_model_path=x", "write `model: stages.sft` beside `train`"),
        ("train.ref_model=x", "the reference is the model that the stage was given"),
        ("train.num_sample_generations=10", "write `samples: {every: 10, prompts: 8}`"),
        ("train.local_rollout_forward_batch_size=8", "per_device_train_batch_size answers at a time"),
        ("train.batch_size=8", "per_device_train_batch_size x gradient_accumulation_steps x workers"),
        ("train.stop_token=eos", "ends with a stop token of the model's generation config"),
        ("train.cliprang=0.1", "did you mean cliprange?"),
        ("train.temperature=0.7", "`temperature: 1.0`"),
    ],
)
def test_what_other_tools_call_it_is_told_with_what_to_write(ppo: Path, key: str, says: str) -> None:
    path = "stages.ppo." + key.partition("=")[0]
    assert says in problems(ppo, f"stages.ppo.{key}")[path][1]


def test_what_the_value_model_begins_as_is_looked_at_as_other_models_are(ppo: Path, model: str) -> None:
    assert problems(ppo, "stages.ppo.value_model=stages.rewrd")["stages.ppo.value_model"][1] == (
        "there is no stage 'rewrd'; did you mean reward?"
    )
    assert "no config.json" in problems(ppo, "stages.ppo.value_model=.")["stages.ppo.value_model"][1]
    (ppo.parent / "value").symlink_to(model)
    read = load_spec(ppo, ["stages.ppo.value_model=value"])
    assert read.references("ppo") == {
        "model": [model], "rewards": ["stages.reward"], "value_model": [str(ppo.parent / "value")],
    }  # fmt: skip


def test_rewards_of_reinforcement_learning_are_looked_at_before_anything_starts(ppo: Path) -> None:
    assert problems(ppo, "stages.ppo.rewards.0=stages.ppo")["stages.ppo"][1].startswith("the stages go round")
    (ppo.parent / "own_rewards.py").write_text("from math import exp\n\ndef short(completions, **_):\n    return 0\n")
    for name in ("short", "exp"):
        assert load_spec(ppo, [f"stages.ppo.rewards.0=own_rewards:{name}"])
    wrong = problems(ppo, "stages.ppo.rewards.0=own_rewards:shot")["stages.ppo.rewards.0"][1]
    assert "own_rewards.py has no 'shot'; did you mean short?" in wrong
    assert "no module 'my_rewards'" in problems(ppo, "stages.ppo.rewards.0=my_rewards:short")["stages.ppo.rewards.0"][1]
    (ppo.parent / "own_rewards.py").write_text("from math import *\n")
    assert load_spec(ppo, ["stages.ppo.rewards.0=own_rewards:exp"])  # what it has is known when it is imported


def test_a_prompt_has_to_have_room(ppo: Path) -> None:
    said = problems(ppo, "stages.ppo.max_new_tokens=256")["stages.ppo.max_new_tokens"][1]
    assert said == "256 leaves no room for a prompt in the model's 256 positions"


def test_vllm_wants_gpus_in_the_workers(ppo: Path) -> None:
    assert load_spec(ppo, ["stages.ppo.engine=vllm"])  # it may be sent to a cluster that has them
    found = problems(ppo, "stages.ppo.engine=vllm", "cluster={gpus_per_worker: 0}")["stages.ppo.engine"][1]
    assert "vllm runs in the workers that train, which have no GPU" in found
