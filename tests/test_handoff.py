"""The handoff contract: an export keeps it, and whatever is done to the folder afterwards is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.handoff import PROBES, Checker, inspect_model, stop_warnings
from stages.training.export import finish_export, promise
from stages.training.job import TrainJob
from stages.training.probe import FILE, make_probes, probe_of, run_probes, write_probes

STOP, PAD = 2, 0


def export(folder: Path, base: str, tokenizer: Any, dtype: torch.dtype = torch.float32, reward: bool = False) -> Path:
    """A model handed over as a trainer does it: the weights in `dtype`, what it said in float32 beside them."""
    rows = [{"input_ids": [1, 5, 9, 7, STOP, 1], "labels": [-100, -100, 9, 7, STOP, -100], "lengths": [6]}]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    job = TrainJob(
        "conversation", base, folder, [(str(folder / "rows.parquet"), 0, 1)], {}, reward=reward, stop_ids=[STOP]
    )
    torch.manual_seed(0)
    cls = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = cls.from_pretrained(base, dtype=torch.float32, **({"num_labels": 1} if reward else {}))
    probes = make_probes(job, tokenizer)
    logits = run_probes(model, probes, reward=reward)
    write_probes(folder / FILE, probes, logits, promise(job, model, tokenizer, dtype))
    model.to(dtype).save_pretrained(folder / "model")
    finish_export(folder / "model", base, tokenizer, [STOP], dtype)
    return folder / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: str, tokenizer: Any) -> Path:
    return export(tmp_path_factory.mktemp("handoff") / "sft", model, tokenizer)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(made.parent, tmp_path / "sft")) / "model"


def problems(folder: Path, produces: str = "model") -> str:
    checked = inspect_model(str(folder), produces, True)
    assert all("; " in problem for problem in checked["problems"])  # what is wrong; what to do
    return "\n".join(checked["problems"])


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_two_sides_agree_on_the_file() -> None:
    assert FILE == PROBES


def test_an_export_keeps_the_contract_in_a_fresh_process(made: Path, tmp_path: Path) -> None:
    checked = Checker(tmp_path / "log").check(made, "model", trained=True)
    assert checked["problems"] == []
    facts = checked["facts"]
    assert facts["logits_difference"] < 1e-5 and facts["probes"] == 5
    assert (facts["pad_token_id"], facts["stop_token_ids"], facts["dtype"]) == (PAD, [STOP], "float32")
    # A model of random weights has not learned to stop: a warning, and no reason to refuse it.
    assert facts["stops"] is False and len(facts["stop_ranks"]) == 1 and facts["stop_ranks"][0] > 0
    assert "came to no stop token" in checked["warnings"][0] and "after 1 of 1 answers" in checked["warnings"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_the_dtype_of_the_base_is_allowed(
    tmp_path: Path, model: str, tokenizer: Any, dtype: torch.dtype
) -> None:
    folder = export(tmp_path / "half", model, tokenizer, dtype)
    assert problems(folder) == ""
    weights(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(-1))
    assert "not those of the trained model" in problems(folder)


def test_a_reward_model_is_held_to_its_scores(tmp_path: Path, model: str, tokenizer: Any) -> None:
    folder = export(tmp_path / "reward", model, tokenizer, reward=True)
    assert problems(folder, "reward model") == ""
    weights(folder, lambda t: t["score.weight"].mul_(1.01))
    assert "its scores are not those of the trained model" in problems(folder, "reward model")
    weights(folder, lambda t: t.pop("score.weight"))
    assert "weights are missing: score.weight" in problems(folder, "reward model")


def small_change(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 4] += 0.01


def cut_rows(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:300].clone()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (small_change, "its logits are not those of the trained model: they differ by"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "its output is not finite"),
        (lambda t: t.pop("model.norm.weight"), "weights are missing: model.norm.weight"),
        (lambda t: t.update({"model.more.weight": torch.ones(2)}), "weights are left over: model.more.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}), "were not merged"),
        (cut_rows, "it does not load in a fresh process"),
        (lambda t: t.update({k: v.bfloat16() for k, v in t.items()}), "the weights are bfloat16, those of the model"),
    ],
    ids=["a weight", "nan", "missing", "left over", "unmerged", "rows", "dtype"],
)
def test_other_weights_are_found(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], told: str) -> None:
    weights(folder, change)
    assert told in problems(folder)


def test_a_damaged_file_is_found(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "its weights cannot be read" in problems(folder)


def test_a_cut_vocabulary_is_found(folder: Path) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    weights(folder, cut_rows)
    edit(folder / "config.json", vocab_size=300)
    found = problems(folder)
    assert f"the tokenizer has {rows} tokens, the model's embedding 300 rows" in found
    assert f"the embedding has 300 rows, in training it had {rows}" in found


def test_an_untied_embedding_is_found(folder: Path) -> None:
    weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit(folder / "config.json", tie_word_embeddings=False)
    assert "input and output embedding are two tensors, in training they were one tensor" in problems(folder)


def test_another_chat_template_is_found(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human").replace("<|im_start|>", "<|im_start|> "))
    assert "is not the one the masks were made with" in problems(folder)
    template.unlink()
    assert "there is no chat template" in problems(folder)


def test_padding_with_the_stop_token_is_found(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    for file in ("config.json", "generation_config.json"):
        edit(folder / file, pad_token_id=STOP)
    found = problems(folder)
    assert f"the pad token ({STOP}) also ends answers" in found and "the pad token is 2, in training it was 0" in found


def test_a_further_stop_token_of_the_base_may_be_its_pad_token(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[STOP, PAD])
    assert problems(folder) == ""


def test_stop_tokens_are_in_the_generation_config_and_the_vocabulary(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=None)
    assert "tokens that end answers in the data are not stop tokens of generation_config.json: [2]" in problems(folder)
    edit(folder / "generation_config.json", eos_token_id=[STOP, 1000])
    assert "pad or stop tokens lie outside the vocabulary" in problems(folder)


def test_generation_that_goes_on_after_a_stop_token_is_found(folder: Path) -> None:
    """The tokenizer's end of text is made the first token the model says, which the generation config knows nothing of."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = AutoModelForCausalLM.from_pretrained(folder).generate(**ids, max_new_tokens=1, do_sample=False)
    edit(folder / "tokenizer_config.json", eos_token=tokenizer.convert_ids_to_tokens(int(out[0, -1])))
    assert f"a generated chat goes on after the stop token {int(out[0, -1])}" in problems(folder)


def test_an_adapter_that_was_left_is_found(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter lies in model/ (adapter_config.json)" in problems(folder)


def test_a_trained_model_without_its_probes_is_refused(folder: Path) -> None:
    (folder.parent / PROBES).unlink()
    assert "there is no handoff.safetensors beside it" in problems(folder)
    assert inspect_model(str(folder), "model", False)["problems"] == []  # a fresh model has none


def test_probes_end_where_the_answer_does() -> None:
    labels = [-100, -100, 7, STOP, -100, 8, STOP]
    probe = probe_of({"input_ids": [4, 5, 7, STOP, 6, 8, STOP], "labels": labels}, [STOP])
    assert probe.ids == [4, 5, 7] and probe.before_stop
    pair = {"prompt_ids": [4, STOP, 5], "chosen_ids": [8, STOP], "rejected_ids": [9, STOP]}
    assert probe_of(pair, [STOP]).ids == [4, STOP, 5, 8]  # a stop token of the prompt is not an answer's end
    packed = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7], "lengths": [2, 2]}
    assert probe_of(packed, [STOP]).ids == [4, 5] and not probe_of(packed, [STOP]).before_stop
    assert len(probe_of({"input_ids": [5] * 999, "labels": [5] * 999}, [STOP]).ids) == 128


@pytest.mark.parametrize(
    ("facts", "warned"),
    [
        ({}, False),
        ({"stops": True, "stop_ranks": [3]}, False),  # it stopped
        ({"stops": False, "stop_ranks": [0, 0]}, False),  # a long answer; it knows where the answers of its data end
        ({"stops": False, "stop_ranks": [0, 2]}, True),
        ({"stops": False}, True),
    ],
)
def test_a_model_that_does_not_stop_is_a_warning(facts: dict[str, Any], warned: bool) -> None:
    assert bool(stop_warnings(facts)) == warned
