"""`raylign chat`: talk to a model of a run, in the chat template it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifacts import RunFolder
from stages.data.tokenizer import check_model_folder
from stages.errors import DataError
from stages.storage import pull


def choose_model(folder: RunFolder, stage: str | None) -> Path:
    """The model folder of a stage, or of the last stage of the run that made a policy.

    Raises:
        DataError: there is none.
    """
    names = [n for n in folder.state().get("stages", {}) if (folder.manifest(n) or {}).get("produces") == "model"]
    if stage is not None and stage not in names:
        raise DataError(
            f"--stage {stage}: no published model of that name; there are: {', '.join(names) or 'none yet'}"
        )
    if not names:
        raise DataError(f"{folder.path}: no model is published in this run yet")
    return folder.stage(stage or names[-1]) / "model"


def talk(run: str, stage: str | None, max_new_tokens: int, console: Console) -> None:
    """Read lines, answer them greedily and remember the conversation, until an empty line or the end of input."""
    path = pull(choose_model(RunFolder.open(run), stage))
    check_model_folder(str(path))  # the run may be another's
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    console.print(f"{path}; an empty line ends", style="dim", highlight=False)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
