"""A configuration of another tool is converted and run, as one who comes from there would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .test_chain import raylign

FACTORY = """\
### model
model_name_or_path: {model}
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
### dataset
dataset: letters
dataset_dir: data
template: qwen
cutoff_len: 128
preprocessing_num_workers: 16
### output
output_dir: saves/letters
logging_steps: 1
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
max_steps: 3
lr_scheduler_type: cosine
"""


@pytest.mark.slow
def test_a_configuration_of_llama_factory_is_converted_and_run(tmp_path: Path, model: str) -> None:
    for folder in ("data", "configs"):
        (tmp_path / folder).mkdir()
    rows = [{"question": f"Reverse: {a} {b}", "answer": f"{b} {a}"} for a in "abcdef" for b in "abcdef"]
    (tmp_path / "data" / "letters.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "response": "answer"}
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"letters": {"file_name": "letters.json", "columns": columns}})
    )
    (tmp_path / "configs" / "letters.yaml").write_text(FACTORY.format(model=model))

    said = raylign(tmp_path, "init", "--from", "configs/letters.yaml")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "a configuration of LLaMA-Factory" in said.stdout and "to mend" not in said.stdout
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "letters" / "sft"
    made = json.loads((run / "manifest.json").read_text())
    assert (made["steps"], made["rows"]) == (3, len(rows)) and (run / "adapter").is_dir()
    assert (run / "model" / "model.safetensors").is_file()
    # three steps of 2 x 2 rows
    consumed = [json.loads(line) for line in (run / "consumed.jsonl").read_text().splitlines()]
    assert max(line["to"] for line in consumed) == 12
