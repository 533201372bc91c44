"""What is checked of a model before the next stage may have it: it loads as it was published, in a clean process.

`python -m pipeline.handoff` reads a line of JSON, `[folder, what it should be]`, and has nothing of ours imported but this
file: the model must load with transformers alone. It prints one line of JSON, `{"problems": [...], "facts": {...}}`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Checker:
    """A fresh process that will check one exported model. Made while the stage still trains, so that its imports are done."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.handoff"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip

    def check(self, folder: Path, produces: str) -> dict[str, Any]:
        """The result is kept in the manifest."""
        out, _ = self.process.communicate(json.dumps([str(folder), produces]) + "\n")
        lines = out.strip().splitlines()
        if self.process.returncode != 0 or not lines:
            return {"problems": [f"the exported model does not load in a fresh process (see {self.log})"], "facts": {}}
        return json.loads(lines[-1])

    def drop(self) -> None:
        """Not needed after all."""
        self.process.kill()
        self.process.communicate()


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
        problems.append(
            f"pad token: {model.config.pad_token_id} in the config, {tokenizer.pad_token_id} in the tokenizer"
        )
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


def main() -> None:
    import warnings

    from transformers import AutoModelForCausalLM, AutoTokenizer  # the slow part, done before it is waited for

    assert AutoModelForCausalLM and AutoTokenizer
    warnings.simplefilter("ignore")
    line = sys.stdin.readline()
    if line:
        print(json.dumps(inspect_model(*json.loads(line))))


if __name__ == "__main__":
    main()
