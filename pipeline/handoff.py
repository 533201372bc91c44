"""What is checked of a model before the next stage may have it: it loads as it was published, in a clean process.

Run as `python -m pipeline.handoff FOLDER KIND`, with nothing of ours imported but this file: the model must load with
transformers alone. Prints one line of JSON, `{"problems": [...], "facts": {...}}`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def check(folder: Path, produces: str, log: Path) -> dict[str, Any]:
    """Check an exported model in a fresh process; the result is kept in the manifest."""
    command = [sys.executable, "-m", "pipeline.handoff", str(folder), produces]
    with log.open("a") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"problems": [f"the exported model does not load in a fresh process (see {log})"], "facts": {}}
    return json.loads(lines[-1])


def inspect_model(folder: str, produces: str) -> dict[str, Any]:
    """Load the folder as a user would, run it once, and compare what must agree."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    problems: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cls = AutoModelForSequenceClassification if produces == "reward model" else AutoModelForCausalLM
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        problems.append(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary < len(tokenizer):
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary}")
    if not tokenizer.chat_template:
        problems.append("there is no chat template beside the model")
    if model.config.pad_token_id != tokenizer.pad_token_id:
        problems.append(f"pad token: {model.config.pad_token_id} in the config, {tokenizer.pad_token_id} in the tokenizer")
    stops: list[int] = []
    if produces == "model":
        eos = model.generation_config.eos_token_id
        stops = eos if isinstance(eos, list) else [eos]
        if tokenizer.pad_token_id in stops:
            problems.append("the pad token is also a stop token, so padded batches would stop early")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if not torch.isfinite(logits).all():
        problems.append("the model's output is not finite (NaN or infinity)")
    if produces == "reward model" and logits.shape[-1] != 1:
        problems.append(f"a reward model gives one score, this one gives {logits.shape[-1]}")
    facts = {
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16],
        "pad_token_id": tokenizer.pad_token_id,
        "stop_token_ids": stops,
    }
    return {"problems": problems, "facts": facts}


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    print(json.dumps(inspect_model(sys.argv[1], sys.argv[2])))
