"""The card of a model that is pushed to the hub: where it comes from, what it was trained on, and what was found of it.

Everything is read from the run folder. Nothing of the machine goes into it: of files and folders only their names are told,
and no row of the data.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from pipeline.artifacts import SHORT, RunFolder, read_manifest
from pipeline.markdown import cell, code, public, table
from pipeline.progress import number
from pipeline.tables import COLUMNS, SHARES, said_of
from pipeline.tracking import flat
from stages import Evaluate
from stages.data.encode import WARNINGS
from stages.data.hub import SCHEME

Manifest = dict[str, Any]

# kind -> (what was done, arXiv)
METHODS = {
    "init": ("random initialisation, tokenizer trained", ""),
    "sft": ("supervised fine-tuning", ""),
    "reward": ("reward modelling on compared answers (Bradley-Terry)", ""),
    "dpo": ("preference tuning on pairs (DPO)", "2305.18290"),
    "kto": ("preference tuning on single answers (KTO)", "2402.01306"),
    "ppo": ("reinforcement learning (PPO)", "1707.06347"),
    "grpo": ("reinforcement learning (GRPO)", "2402.03300"),
    "rloo": ("reinforcement learning (RLOO)", "2402.14740"),
    "generate": ("answers sampled and judged", ""),
}
TRAINED_ON = {
    "assistant": "every assistant turn and its stop token; no system, user or tool turn, no header of a turn",
    "last_assistant": "the last assistant turn and its stop token",
    "completion": "what comes after the last user turn, and its stop token",
    "all": "every token",
}
TRAINED = {
    "reward": "one score at the end of each whole answer, which includes its stop token",
    "dpo": "both answers of a pair with their stop tokens; the prompt is context",
    "kto": "the answer with its stop token; the prompt is context",
    **dict.fromkeys(("ppo", "grpo", "rloo"), "the tokens of the answers that were sampled, stop token included"),
}
# Of a stage's metrics those that say how it was run, not what came out.
ABOUT_THE_RUN = re.compile(
    r"seconds|per_second|_share$|^(grad_norm|learning_rate|episodes|epoch|first_loss)$|^mfu|skipped"
)
ARCHITECTURE = ("parameters", "vocab_size")
# Of a stage's config what is told elsewhere on the card, or says nothing of the model.
NOT_SETTINGS = ("kind", "model", "models", "data", "push_to_hub", "hub_private_repo", "workers", "sweep", "gates")


def model_card(folder: RunFolder, stage: str, repository: str | None = None) -> str:
    """README.md of a published stage's model: metadata, then Markdown."""
    chain = lineage(folder, folder.manifest(stage) or {})
    own = chain[-1]
    parts = [
        _head(own, chain, repository),
        _use(own, repository or f"path/to/{stage}/model"),
        _lineage(chain),
        _data(chain),
        _training(chain),
        _results(own),
        _evaluation(folder, own, chain),
        _limits(folder, own, chain),
        _versions(chain),
    ]
    return f"---\n{_metadata(own, chain)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def lineage(folder: RunFolder, manifest: Manifest) -> list[Manifest]:
    """The stage and all that led to it, each after what it was made from; of what is gone from the run folder only the name."""
    found: dict[str, Manifest] = {}

    def visit(manifest: Manifest) -> None:
        for ref in (ref for refs in manifest.get("inputs", {}).values() for ref in refs if "stage" in ref):
            if ref["stage"] not in found:
                place = folder.find(ref["stage"], ref["fingerprint"])
                made = read_manifest(place) if place else None
                visit(made or {"name": ref["stage"], "fingerprint": ref["fingerprint"], "kind": "", "inputs": {}})
        found[manifest["name"]] = manifest

    visit(manifest)
    return list(found.values())


# ------------------------------------------------------------------------------------------------ words


def short(fingerprint: str) -> str:
    return code(fingerprint[:SHORT])


def method(manifest: Manifest) -> str:
    kind = manifest.get("kind", "")
    said, paper = METHODS.get(kind, (cell(kind) or "not in the run folder any more", ""))
    tuning = (manifest.get("config") or {}).get("tuning") or {}
    adapter = {"lora": ", LoRA", "qlora": ", QLoRA"}.get(tuning.get("method", ""), "")
    return said + (f", [arXiv:{paper}](https://arxiv.org/abs/{paper})" if paper else "") + adapter


def base_of(chain: list[Manifest]) -> str | None:
    """The hub id of the model that the chain begins with; None of a folder or a fresh model."""
    for manifest in chain:
        for ref in manifest.get("inputs", {}).get("model") or []:
            model = ref.get("model", "")
            if "stage" not in ref and not os.path.isabs(model) and "://" not in model:
                return str(model)
    return None


def is_trained(manifest: Manifest) -> bool:
    return "train" in (manifest.get("config") or {}) or bool((manifest.get("details") or {}).get("mixture"))


# ------------------------------------------------------------------------------------------------ parts


def _metadata(own: Manifest, chain: list[Manifest]) -> str:
    """https://huggingface.co/docs/hub/model-cards#model-card-metadata. No licence: it is not ours to choose."""
    from huggingface_hub import ModelCardData

    base = base_of(chain)
    sources = dict.fromkeys(name for manifest in chain for name, _ in _sources(manifest) if name.startswith(SCHEME))
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-classification" if own["produces"] == "reward model" else "text-generation",
        datasets=[source.removeprefix(SCHEME) for source in sources] or None,
        tags=["raylign", *dict.fromkeys(m["kind"] for m in chain if m.get("kind") in METHODS and is_trained(m))],
        **relation,
    ).to_yaml()


def _head(own: Manifest, chain: list[Manifest], repository: str | None) -> str:
    base = base_of(chain)
    start = next((m for m in chain if m.get("kind") == "init"), None)
    folder = next((r["model"] for m in chain for r in m.get("inputs", {}).get("model") or [] if "stage" not in r), None)
    if base:
        begun = f"It starts from [{base}](https://huggingface.co/{base})."
    elif start is not None:
        begun = "It starts from random weights: no pretrained model is in it."
    else:
        begun = f"It starts from a model in a folder, {code(public(folder or 'unknown'))}."
    what = (
        "A reward model: it gives one score to a conversation."
        if own["produces"] == "reward model"
        else "A language model."
    )
    facts = own.get("handoff") or {}
    size = f" {facts['parameters']:,} parameters, {facts['dtype']}." if facts.get("parameters") else ""
    made = f"The stage {code(own['name'])} of a Raylign run made it by {method(own)}."
    return f"# {cell((repository or own['name']).rpartition('/')[2])}\n\n{what} {made} {begun}{size}"


def _use(own: Manifest, where: str) -> str:
    if own["produces"] == "reward model":
        cls, ask = (
            "AutoModelForSequenceClassification",
            "print(model(**inputs).logits[0, 0])  # the score of the last answer",
        )
        messages = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        prompt = ""
    else:
        cls, messages, prompt = (
            "AutoModelForCausalLM",
            '[{"role": "user", "content": "..."}]',
            "add_generation_prompt=True, ",
        )
        ask = (
            'answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]\n'
            "print(tokenizer.decode(answer, skip_special_tokens=True))"
        )
    return f"""## How to use it

```python
from transformers import {cls}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{where}")
model = {cls}.from_pretrained("{where}")
messages = {messages}
inputs = tokenizer.apply_chat_template(messages, {prompt}return_tensors="pt", return_dict=True)
{ask}
```

The chat template in the tokenizer is the one it was trained with."""


def _lineage(chain: list[Manifest]) -> str:
    rows = []
    for manifest in chain:
        refs = [
            (field, ref.get("stage") or public(ref.get("model", "")))
            for field, refs in manifest.get("inputs", {}).items()
            for ref in refs
        ]
        before = ", ".join(code(ref) + ("" if field == "model" else f" ({cell(field)})") for field, ref in refs)
        rows.append([code(manifest["name"]), method(manifest), before or "nothing", short(manifest["fingerprint"])])
    note = (
        "A fingerprint is the hash of all that decides a stage's result: its settings, its data, its inputs, the seed."
    )
    return f"## Lineage\n\n{table(['stage', 'made by', 'from', 'fingerprint'], rows)}\n\n{note}"


def _sources(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, facts) of what a stage read; facts are there of a training."""
    mixture = (manifest.get("details") or {}).get("mixture") or []
    made = {
        ref.get("data"): f"stages.{ref['stage']}"
        for ref in manifest.get("inputs", {}).get("data") or []
        if "stage" in ref
    }
    given = (manifest.get("config") or {}).get("data") or []
    for source in mixture or given:
        path = str(source.get("path", ""))
        yield made.get(path) or str(public(path)), source if mixture else {}


def _data(chain: list[Manifest]) -> str:
    rows, lost = [], []
    for manifest in chain:
        for name, facts in _sources(manifest):
            counts = [facts.get(key) for key in ("read", "kept", "held_out", "tokens")]
            weight = facts.get("weight", 1.0)
            format = cell(facts.get("format") or ("for its tokenizer" if manifest["kind"] == "init" else "")) + (
                f", weight {weight:g}" if weight != 1.0 else ""
            )
            rows.append([code(manifest["name"]), code(name), format, *(cell(count) for count in counts)])
        reasons = ((manifest.get("details") or {}).get("ledger") or {}).get("reasons") or {}
        if reasons:
            said = ", ".join(f"{code(reason)} {count:,}" for reason, count in reasons.items())
            lost.append(f"- {code(manifest['name'])} left out {sum(reasons.values()):,} rows: {said}")
    if not rows:
        return ""
    headings = ["stage", "source", "format", "#rows read", "#rows used", "#held out", "#tokens"]
    return "\n\n".join(["## Data", table(headings, rows), *(["\n".join(lost)] if lost else [])])


def _trained_part(manifest: Manifest) -> str:
    config, details = manifest.get("config") or {}, manifest.get("details") or {}
    if manifest["kind"] == "sft":
        said = TRAINED_ON.get((config.get("mask") or {}).get("train_on", "assistant"), "")
        if "text" in {source.get("format") for source in details.get("mixture") or []}:
            said += "; of rows of plain text every token"
    else:
        said = TRAINED.get(manifest["kind"], "")
    trained, tokens = details.get("trained_tokens"), manifest.get("tokens")
    if manifest["kind"] not in ("sft", "dpo", "kto"):
        return said  # a score, or answers that are not in the data
    share = f" ({trained:,} of {tokens:,} tokens an epoch, {100 * trained / tokens:.1f}%)" if trained and tokens else ""
    return f"{said}{share}"


def _training(chain: list[Manifest]) -> str:
    parts = ["## How each stage was made"]
    for manifest in chain:
        details, config = manifest.get("details") or {}, manifest.get("config") or {}
        kernels = details.get("kernels") or {}
        facts = [
            ("trained on", _trained_part(manifest)),
            ("steps", cell(manifest.get("steps"))),
            ("rows a step", _rows_a_step(manifest)),
            ("epochs begun", cell(details.get("epochs"))),
            ("workers", cell(manifest.get("workers"))),
            ("seed", cell(manifest.get("seed"))),
            ("seconds of training", cell((manifest.get("metrics") or {}).get("train_seconds"))),
            ("precision", cell(kernels.get("precision"))),
            ("attention", cell(kernels.get("attention"))),
            *_reference(manifest),
        ]
        given = {k: v for k, v in config.items() if k not in NOT_SETTINGS}
        settings = ", ".join(
            code(f"{key}: {public(value)}") for key, value in flat(given).items() if key != "train.report_to"
        )
        parts.append(f"### {cell(manifest['name'])}: {method(manifest)}")
        if rows := [[name, said] for name, said in facts if said]:
            parts.append(table(["", ""], rows))
        parts.append(f"Settings (all others are the defaults of the versions below): {settings or 'none'}.")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _rows_a_step(manifest: Manifest) -> str:
    """Of a training on rows; what a step of reinforcement learning holds is among its settings."""
    if manifest["kind"] not in ("sft", "reward", "dpo", "kto"):
        return ""
    train = manifest["config"].get("train") or {}
    rows = train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
    return cell(rows * (manifest.get("workers") or 1))


def _reference(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a preference-tuned model is held near to, and what it was rewarded by."""
    inputs = manifest.get("inputs", {})
    if manifest["kind"] in ("dpo", "kto", "ppo", "grpo", "rloo"):
        ref = next(iter(inputs.get("model") or [{}]))
        name = code(ref.get("stage") or public(ref.get("model", "")))
        yield (
            "reference",
            f"the model it was given, {name}" + (f", {short(ref['fingerprint'])}" if "stage" in ref else ""),
        )


def _results(own: Manifest) -> str:
    metrics = {
        name: value
        for name, value in (own.get("metrics") or {}).items()
        if isinstance(value, int | float) and not ABOUT_THE_RUN.search(name) and name not in ARCHITECTURE
    }
    if not metrics:
        return ""
    rows = [[code(name), cell(float(value))] for name, value in metrics.items()]
    note = (
        "Over the last steps that were logged, on what it was trained on, unless a name begins with `eval`; `samples/` are "
        "answers sampled at the end."
    )
    return f"## At the end of training\n\n{note}\n\n{table(['metric', '#value'], rows)}"


def _evaluation(folder: RunFolder, own: Manifest, chain: list[Manifest]) -> str:
    known = {manifest["name"]: manifest["fingerprint"] for manifest in chain}
    parts = []
    for name, manifest in folder.published("evaluate"):
        judged = {ref["stage"]: ref["fingerprint"] for ref in manifest["inputs"].get("models", []) if "stage" in ref}
        if judged.get(own["name"]) != own["fingerprint"]:
            continue
        models = [own["name"], *(m for m in judged if m != own["name"] and known.get(m) == judged[m])]
        metrics = {model: manifest["metrics"].get(model, {}) for model in models}
        columns = [column for column in COLUMNS if any(metrics[model].get(column) is not None for model in models)]
        rows = [[COLUMNS[column], *(measured(metrics[model], column) for model in models)] for column in columns]
        data = ", ".join(code(source) for source, _ in _sources(manifest))
        longest = (manifest.get("config") or {}).get("max_new_tokens", Evaluate.model_fields["max_new_tokens"].default)
        counts = ", ".join(
            f"{metrics[own['name']][key]:,} {what}"
            for key, what in (
                ("answers", f"prompts answered greedily in at most {longest} tokens"),
                ("pairs", "pairs"),
                ("kl_answers", "answers sampled for the KL"),
            )
            if metrics[own["name"]].get(key)
        )
        parts.append(f"### {cell(name)}\n\nOn {data}: {counts}.{_seen_before(manifest, chain)}")
        parts.append(table(["", *(f"#{code(model)}" for model in models)], rows))
        parts.append(_gates(folder.state()["stages"].get(name, {}).get("gates") or [], own["name"]))
    note = "± is one standard error over the rows (of shares: binomial). KL is in nats an answer, to the reference."
    if not parts:
        return "## Evaluation\n\nNone: this model has not been held against any held-out rows in its run."
    return "\n\n".join(["## Evaluation", *filter(None, parts), note])


def _seen_before(evaluation: Manifest, chain: list[Manifest]) -> str:
    """Which stages read files of the names of those evaluated on."""
    held_out = {source for source, _ in _sources(evaluation)}
    again = [
        f"{code(source)} was read by {code(manifest['name'])} too"
        + " (for its tokenizer)" * (manifest["kind"] == "init")
        for manifest in chain
        for source, _ in _sources(manifest)
        if source in held_out
    ]
    return f" By their names, {'; '.join(again)}." if again else " By their names, no stage above has read these."


def measured(metrics: dict[str, Any], name: str) -> str:
    """A metric with its standard error."""
    value = metrics.get(name)
    if value is None:
        return ""
    if name not in SHARES:
        error = metrics.get(f"{name}_stderr")
        return cell(value) + (f" ± {number(error)}" if error else "")
    rows = metrics.get("pairs" if name == "preference_accuracy" else "answers")
    error = f" ± {100 * math.sqrt(value * (1 - value) / rows):.1f}" if rows and 0 < value < 1 else ""
    return f"{100 * value:.1f}%{error}"


def _gates(verdicts: list[dict[str, Any]], stage: str) -> str:
    """Those of this model, which a verdict names (`loss of NAME is ...`), and checks of the user's, which name none."""
    other = re.compile(rf"\S+ of (?!{re.escape(stage)}( is| over|:))")
    mine = [verdict for verdict in verdicts if not other.match(verdict["says"])]
    return "\n".join(
        f"- gate {'held' if verdict['holds'] else '**not met**'}: {cell(verdict['says'])}" for verdict in mine
    )


def _limits(folder: RunFolder, own: Manifest, chain: list[Manifest]) -> str:
    said = []
    for manifest in [*chain, *(m for _, m in folder.published("evaluate"))]:
        found = (manifest.get("details") or {}).get("warnings") or {}
        said += [
            f"{code(manifest['name'])}: {count:,} rows: {cell(WARNINGS.get(key, key))}" for key, count in found.items()
        ]
        said += [f"{code(manifest['name'])}: {cell(warning)}" for warning in said_of(manifest)]
    facts = own.get("handoff") or {}
    if "logits_difference" in facts:
        said.append(
            f"Checked before it was published: reloaded in another process, its logits on {facts.get('probes')} probes "
            f"differ from the trainer's by at most {facts['logits_difference']:.2g} ({facts['logits_allowed']:.2g} is allowed)."
        )
    said += [
        "It is only known to do what the evaluation above measures, on rows like those. Nobody has looked for harmful, "
        "false or biased answers; do so before people rely on it.",
        "No licence is set: the base model's and those of the data decide which it may have.",
    ]
    return "## Limits and warnings\n\n" + "\n".join(f"- {line}" for line in said)


def _versions(chain: list[Manifest]) -> str:
    """Of all stages together; they may have been made at different times."""
    found: dict[str, dict[str, None]] = {}
    for manifest in chain:
        for library, version in (manifest.get("versions") or {}).items():
            found.setdefault(library, {})[version] = None
    return (
        "## Versions\n\n"
        + ", ".join(f"{library} {' and '.join(versions)}" for library, versions in found.items())
        + "."
    )
