"""What a trained model says to a few fixed inputs, written down by the trainer: the export must say the same.

`handoff.safetensors`, beside the exported folder, has for each probe N `ids.N` (tokens,) and `logits.N`: of a language model
float32 (last positions, vocabulary), of a reward model (1, 1), its score. Its metadata `promise` is what else must hold.
The check of it (pipeline/handoff.py) knows nothing of this package but this file's form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.groups import read_group
from stages.training.job import TrainJob

FILE = "handoff.safetensors"
CONVERSATIONS = (
    [("user", "Hello.")],
    [("user", "What is 2 + 2?")],
    [("user", "Name three colours, one a line.")],
    [("user", "Is water wet?"), ("assistant", "Yes."), ("user", "Why?")],
)
ROWS = 4  # prepared rows that are probed, besides
LONGEST = 128  # tokens of a probe
POSITIONS = 4  # the last of a probe, whose logits are kept; they depend on all before


@dataclass(frozen=True)
class Probe:
    """Token ids; `before_stop` says that in the data a stop token comes next."""

    ids: list[int]
    chat: bool = False
    before_stop: bool = False


def make_probes(job: TrainJob, tokenizer: Any) -> list[Probe]:
    """Chats rendered with the model's own template, and rows of the prepared data, each up to where its answer stops."""
    from jinja2 import TemplateError

    probes = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError:
            continue  # a template may insist on a system message, say; the rows below are always there
        probes.append(Probe([int(i) for i in ids][:LONGEST], chat=len(ids) <= LONGEST))
    return probes + [probe_of(row, job.stop_ids) for row in first_rows(job.groups)]


def first_rows(groups: list[tuple[str, int, int]]) -> list[dict[str, Any]]:

    file, group, _ = groups[0]
    return read_group(file, group).slice(0, ROWS).to_pylist()


def probe_of(row: dict[str, Any], stop_ids: list[int]) -> Probe:
    """A prepared row up to its first trained stop token; of a pack, its first document; cut where that is too far."""
    prompt = row.get("prompt_ids") or []
    answer = row.get("chosen_ids") or row.get("completion_ids") or []
    ids = row.get("input_ids") or [*prompt, *answer]
    trained = row.get("labels") or [-100] * len(prompt) + list(answer)
    if row.get("lengths"):
        ids = ids[: row["lengths"][0]]
    stop = next((i for i, label in enumerate(trained[: min(len(ids), LONGEST)]) if i and label in stop_ids), None)
    return Probe(ids[: stop if stop is not None else LONGEST], before_stop=stop is not None)


def run_probes(model: Any, probes: list[Probe], *, reward: bool) -> list[Any]:
    """The logits of each probe's last positions (positions, vocabulary), or its score (1, 1): float32, on the CPU.

    Each probe goes alone, so that no padding plays a part. Under ZeRO-3 every rank has to come here.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    out = []
    with torch.no_grad():
        for probe in probes:
            ids = torch.tensor([probe.ids], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            out.append((logits if reward else logits[0, -POSITIONS:]).float().cpu().contiguous())
    model.train(was_training)
    return out


def write_probes(path: Path, probes: list[Probe], logits: list[Any], promise: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {f"ids.{n}": torch.tensor(probe.ids) for n, probe in enumerate(probes)}
    tensors |= {f"logits.{n}": values for n, values in enumerate(logits)}
    told = {
        "probes": [{"chat": probe.chat, "before_stop": probe.before_stop} for probe in probes],
        **promise,
    }
    save_file(tensors, str(path), metadata={"promise": json.dumps(told)})


def largest_difference(first: list[Any], second: list[Any]) -> tuple[float, float]:
    """(the largest absolute difference, the largest absolute value of `first`); NaN where anything is not a number."""
    differences = [float((a - b).abs().max()) for a, b in zip(first, second, strict=True)]
    nan = next((d for d in differences if d != d), None)
    return nan if nan is not None else max(differences), max(float(a.abs().max()) for a in first)
