"""What is checked of a model before the next stage may have it, in a process that uses transformers and nothing of ours.

`python -m pipeline.handoff` reads a line of JSON, `[folder, what it should be, whether it was trained]`, and prints one,
`{"problems": [...], "warnings": [...], "facts": {...}}`. Beside the folder of a trained model lies `handoff.safetensors`, in
which the trainer wrote what the model said to a few inputs, and what else must hold (stages/training/probe.py).

The contract, each part with its remedy where it is broken:

- it loads with transformers alone, no weight missing, none left over, nothing of an adapter in it;
- its logits (a reward model's scores) are the trainer's, to a tolerance by the dtypes it was trained and saved in;
- the chat template is the one its masks were made with;
- padding is a token of its own, and every token that ends an answer ends generation; all are in the vocabulary;
- vocabulary, head, dtype and tied embeddings are those of the model that was trained;
- generation goes no further than a stop token. That it comes to one is wished for, and a warning where it does not.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages import forkserver

PROBES = "handoff.safetensors"
AGAIN = "run the same command again: the stage exports it anew from its last checkpoint"
# Of logits, relative to the largest (or to 1). float32: another order of summing, on another machine. Of a 16-bit dtype
# every layer rounds: 2^-9 for bfloat16 and 2^-12 for float16, added up over tens of layers.
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
OF_ADAPTERS = ("lora_", ".base_layer.", ".modules_to_save.", ".token_adapter.", ".original_module.")
NEW_TOKENS = 24  # of the chat that is generated


class Checker:
    """Another process, which will check one exported model. Made while the stage still trains, so that it is ready."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                forkserver.command("-m", "pipeline.handoff"), env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip

    def check(self, folder: Path, produces: str, trained: bool = False) -> dict[str, Any]:
        """Problems, warnings and facts. Of a model that was `trained`, the trainer's probes lie beside the folder."""
        out, _ = self.process.communicate(json.dumps([str(folder), produces, trained]) + "\n")
        lines = out.strip().splitlines()
        if self.process.returncode != 0 or not lines:
            problem = f"the process that checks the exported model ended early, out of memory perhaps (see {self.log})"
            return {"problems": [problem], "warnings": [], "facts": {}}
        return json.loads(lines[-1])

    def drop(self) -> None:
        """Not needed after all."""
        self.process.kill()
        self.process.communicate()


def inspect_model(folder: str, produces: str, trained: bool) -> dict[str, Any]:
    """Load the folder as a user would, run it, and compare what must agree."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path, reward = Path(folder), produces == "reward model"
    probes = path.parent / PROBES
    if trained and not probes.is_file():
        return _refused(f"there is no {PROBES} beside it, so nothing says what the trained model computes; {AGAIN}")
    promise = read_promise(probes) if trained else {}
    try:
        tensors = stored_tensors(path)
    except (OSError, ValueError) as error:
        return _refused(f"its weights cannot be read: {first_line(error)}; {AGAIN}")
    problems = list(adapter_problems(path, tensors))
    if problems:  # transformers would load the adapter on top
        return _refused(*problems)
    problems += stored_problems(tensors, promise)
    cls = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = cls.from_pretrained(folder, dtype="float32", output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers has to say, and there are many classes of it
        traceback.print_exc()
        return _refused(*problems, f"it does not load in a fresh process: {first_line(error)}; {AGAIN}")
    for what, names in (("missing", info["missing_keys"]), ("left over", info["unexpected_keys"])):
        if names:
            problems.append(f"weights are {what}: {', '.join(sorted(names)[:3])}; {AGAIN}")
    problems += [f"{p}; {AGAIN}" for p in head_problems(model, tokenizer, promise, reward)]
    problems += [f"{p}; {AGAIN}" for p in token_problems(model, tokenizer, promise, reward)]
    facts: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "dtype": ", ".join(sorted({kind for kind, _ in tensors.values()})),
        "chat_template": template_hash(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "stop_token_ids": [] if reward else stop_tokens(model),
    }
    warnings: list[str] = []
    if not problems:  # else what it computes is of no interest, and may not be computable
        for found, told in (
            said_problems(model, probes, promise),
            spoken_problems(model, tokenizer, probes, promise, reward),
        ):
            problems += found
            facts |= told
        warnings += stop_warnings(facts)
    return {"problems": problems, "warnings": warnings, "facts": facts}


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refused(*problems: str) -> dict[str, Any]:
    return {"problems": list(problems), "warnings": [], "facts": {}}


# ------------------------------------------------------------------------------------------------ what is in the files


def read_promise(probes: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(probes), framework="pt") as file:
        return json.loads(file.metadata()["promise"])


def stored_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor, from the headers of the safetensors files."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        tensors |= {
            name: (names.get(entry["dtype"], entry["dtype"].lower()), entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return tensors


def adapter_problems(folder: Path, tensors: dict[str, Any]) -> Iterator[str]:
    """A merged model is a plain one."""
    files = sorted(file.name for file in folder.glob("adapter_*"))
    if files:
        yield f"an adapter lies in model/ ({', '.join(files)}); it belongs into adapter/, model/ has it merged; {AGAIN}"
    left = [name for name in tensors if any(mark in name for mark in OF_ADAPTERS)]
    if left:
        yield f"weights of an adapter were not merged: {', '.join(left[:3])}; {AGAIN}"


def stored_problems(tensors: dict[str, tuple[str, list[int]]], promise: dict[str, Any]) -> Iterator[str]:
    if not promise:
        return
    kinds = {kind for kind, _ in tensors.values()}
    if promise["dtype"] not in kinds:
        yield f"the weights are {', '.join(sorted(kinds))}, those of the model it was trained from {promise['dtype']}; {AGAIN}"


# ------------------------------------------------------------------------------------------------ what was loaded


def head_problems(model: Any, tokenizer: Any, promise: dict[str, Any], reward: bool) -> Iterator[str]:
    """Vocabulary, head and tied embeddings."""
    rows, tokens = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if rows < tokens:
        yield f"the tokenizer has {tokens} tokens, the model's embedding {rows} rows"
    if promise and rows != promise["vocabulary"]:
        yield f"the embedding has {rows} rows, in training it had {promise['vocabulary']}"
    if reward:
        if model.config.num_labels != 1:
            yield f"a reward model gives one score, this one gives {model.config.num_labels}"
        return
    head = model.get_output_embeddings()
    if head is not None and head.weight.shape[0] != rows:
        yield f"the embedding has {rows} rows, the output layer {head.weight.shape[0]}"
    if promise and head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        if tied != promise["tied"]:
            words = {True: "one tensor", False: "two tensors"}
            yield f"input and output embedding are {words[tied]}, in training they were {words[promise['tied']]}"


def token_problems(model: Any, tokenizer: Any, promise: dict[str, Any], reward: bool) -> Iterator[str]:
    """Chat template, padding and stop tokens."""
    if not tokenizer.chat_template:
        yield "there is no chat template beside the model"
    elif promise and template_hash(tokenizer) != promise["chat_template"]:
        yield (
            f"the chat template ({template_hash(tokenizer)}) is not the one the masks were made with"
            f" ({promise['chat_template']}), so it would be talked to in another form than it was trained in"
        )
    rows, pad = model.get_input_embeddings().weight.shape[0], tokenizer.pad_token_id
    if pad is None:
        yield "the tokenizer has no pad token"
        return
    if model.config.pad_token_id != pad:
        yield f"pad token: {model.config.pad_token_id} in the config, {pad} in the tokenizer"
    if promise and pad != promise["pad_token_id"]:
        yield f"the pad token is {pad}, in training it was {promise['pad_token_id']}"
    stops = [] if reward else stop_tokens(model)
    outside = [i for i in (pad, *stops) if not 0 <= i < rows]
    if outside:
        yield f"pad or stop tokens lie outside the vocabulary of {rows}: {outside}"
    ends = {tokenizer.eos_token_id, *promise.get("stop_ids", ())}
    if pad in ends or stops == [pad]:  # a base's further stop token may be its pad token, as Qwen2.5-Instruct's is
        yield f"the pad token ({pad}) also ends answers, so the end of an answer could not be told from padding"
    missing = [i for i in promise.get("stop_ids", ()) if i not in stops] if not reward else []
    if missing:
        yield (
            f"tokens that end answers in the data are not stop tokens of generation_config.json: {missing}, so generation"
            " would go on after an answer"
        )


def stop_tokens(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def template_hash(tokenizer: Any) -> str:
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ what it computes


def said_problems(model: Any, probes: Path, promise: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What it says to the trainer's probes, beside what the trained model said."""
    import torch
    from safetensors import safe_open

    model.eval()
    if not promise:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, 1]])).logits
        return ([] if torch.isfinite(logits).all() else [f"its output is not finite (NaN or infinity); {AGAIN}"]), {}
    worst, scale = 0.0, 0.0
    ranks: list[int] = []
    with safe_open(str(probes), framework="pt") as file, torch.no_grad():
        for n, probe in enumerate(promise["probes"]):
            ids, wanted = file.get_tensor(f"ids.{n}")[None], file.get_tensor(f"logits.{n}")
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            if not torch.isfinite(logits).all() or not torch.isfinite(wanted).all():
                whose = "its output is" if torch.isfinite(wanted).all() else "the trained model's output is"
                remedy = (
                    AGAIN
                    if torch.isfinite(wanted).all()
                    else "train with a lower learning_rate, from an earlier checkpoint"
                )
                return [f"{whose} not finite (NaN or infinity); {remedy}"], {}
            logits = logits if logits.ndim == 2 else logits[0, -wanted.shape[0] :]
            worst, scale = max(worst, float((logits - wanted).abs().max())), max(scale, float(wanted.abs().max()))
            if probe["before_stop"] and logits.shape[-1] > 1:
                ranks.append(min(int((logits[-1] > logits[-1, stop]).sum()) for stop in promise["stop_ids"]))
    tolerance = max(TOLERANCE.get(promise[kind], TOLERANCE["bfloat16"]) for kind in ("dtype", "trained_in"))
    allowed = tolerance * max(1.0, scale)
    facts: dict[str, Any] = {"logits_difference": worst, "logits_allowed": allowed, "probes": len(promise["probes"])}
    if ranks:
        facts["stop_ranks"] = ranks
    problems = []
    if not worst <= allowed:
        what = "scores" if logits.shape[-1] == 1 else "logits"
        problems.append(
            f"its {what} are not those of the trained model: they differ by {worst:.3g}, {allowed:.3g} is allowed, so other"
            f" weights were saved than were trained; {AGAIN}, and see that nothing else writes into its folder"
        )
    return problems, facts


def spoken_problems(
    model: Any, tokenizer: Any, probes: Path, promise: dict[str, Any], reward: bool
) -> tuple[list[str], dict[str, Any]]:
    """A chat generated from it: nothing may come after a stop token."""
    import torch
    from safetensors import safe_open

    chats = [n for n, probe in enumerate(promise.get("probes", ())) if probe["chat"]]
    if reward or not chats:
        return [], {}
    with safe_open(str(probes), framework="pt") as file:
        ids = file.get_tensor(f"ids.{chats[0]}")[None]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
        )
    said, stops = out[0, ids.shape[1] :].tolist(), {*promise["stop_ids"], tokenizer.eos_token_id}
    end = next((i for i, token in enumerate(said) if token in stops), None)
    if end is not None and end < len(said) - 1:
        return [
            f"a generated chat goes on after the stop token {said[end]}; set eos_token_id in generation_config.json"
        ], {}
    return [], {"stops": end is not None}


def stop_warnings(facts: dict[str, Any]) -> list[str]:
    """Whether a model has learned to stop is a matter of training, not of the export."""
    ranks = facts.get("stop_ranks", [])
    late = [rank for rank in ranks if rank > 0]
    if facts.get("stops", True) or (ranks and not late):
        return []
    where = (
        f", and after {len(late)} of {len(ranks)} answers of its data a stop token is not what it expects"
        if late
        else ""
    )
    return [f"a generated chat came to no stop token in {NEW_TOKENS} tokens{where}; has it trained long enough?"]


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
