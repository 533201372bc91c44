"""The spec of `raylign init`, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.starter.base import TINY_CONFIG, TINY_VOCABULARY, Base
from pipeline.starter.choices import (
    LENGTHS,
    Choice,
    Way,
    dropped_for,
    epochs_for,
    length_for,
    rate_for,
    step_rows_for,
    tiny_steps_for,
)
from pipeline.starter.page import Page, head, scalar
from pipeline.starter.seen import Measured, Seen, duplicates

SAYS = {
    "sft": "supervised fine-tuning: the model learns to answer as the data does",
    "dpo": "preference tuning: the chosen answer of each pair becomes likelier than the rejected one",
    "kto": "preference tuning on single answers: wanted ones become likelier, others less so",
    "evaluate": "the models on rows that are kept for it; the report has the table and their answers side by side",
}


@dataclass(frozen=True)
class Part:
    """A stage that trains, and its data."""

    kind: str  # sft, dpo or kto
    seen: Sequence[Seen]
    measured: Sequence[Measured]
    paths: Sequence[str]  # as the spec has them
    share: Choice | None  # held out
    says: str = ""

    @property
    def rows(self) -> int | None:
        """Rows to train on; None where that is not known."""
        counts = [seen.rows for seen in self.seen]
        if None in counts:
            return None
        total = sum(count or 0 for count in counts)
        return total - total * int(self.share.value.rstrip("%")) // 100 if self.share else total

    @property
    def all_rows(self) -> int | None:
        counts = [seen.rows for seen in self.seen]
        return None if None in counts else sum(count or 0 for count in counts)


@dataclass(frozen=True)
class Draft:
    """All that a spec is written from."""

    name: str
    command: str
    base: Base
    model: str  # as the spec has it
    parts: Sequence[Part]
    way: Way
    history: str | None  # of `mask`
    found: Sequence[str]  # what was found, in sentences
    evaluated: Mapping[str, str]  # path of a file of held-out rows -> what it is
    notes: Sequence[str] = field(default=())


def spec_text(draft: Draft) -> str:
    page = Page()
    head(page, draft.command, draft.found)
    page.key(0, "name", draft.name, "runs lie in runs/NAME")
    _model(page, draft)
    page.key(0, "storage", "runs", "a folder, or a bucket: s3://bucket/runs")
    page.key(0, "seed", 0, "of the order of rows, and of which are held out")
    _cluster(page, draft)
    if draft.base.chat_template:
        why = "the model has none; also hermes (with tools), or a file"
        if draft.base.chat_template == "hermes":
            why = "has a place for tools"
        page.key(0, "chat_template", draft.base.chat_template, why)
    page.add(0, "stages:")
    before = None
    for part in draft.parts:
        _training(page, draft, part, before)
        if part.kind == "sft":
            before = "stages.sft"
    _evaluation(page, draft)
    return page.text()


def _model(page: Page, draft: Draft) -> None:
    if not draft.base.fresh:
        page.key(0, "model", draft.model)
        return
    length = max(length_of(part, None).value for part in draft.parts)
    positions = next((n for n in LENGTHS if n >= 2 * length), LENGTHS[-1])
    page.comment(
        0, "A fresh small model, to try the chain without a hub or a GPU: it learns these rows and no language. For"
    )
    page.comment(
        0, "use, name a pretrained one instead: model: Qwen/Qwen2.5-0.5B, or a folder; then write the spec again."
    )
    page.add(0, "model:")
    page.add(2, "init:")
    page.add(4, "config:", "any transformers config; about 1 million parameters")
    for key, value in TINY_CONFIG.items():
        page.key(6, key, value)
    page.key(6, "max_position_embeddings", positions, "room for the longest row and an answer")
    page.key(4, "tokenizer", {"vocab_size": TINY_VOCABULARY}, "trained on the data below")


def _cluster(page: Page, draft: Draft) -> None:
    for note in draft.way.note:
        page.comment(0, note)
    if draft.way.elsewhere:
        page.key(0, "cluster", {"workers": 1, "gpus_per_worker": 1, "gpu_memory_gib": 24.0})
    else:
        page.comment(0, "cluster: {workers: 8, gpus_per_worker: 1}   # where it is not what this machine has")


def length_of(part: Part, limit: int | None) -> Choice:
    exact = all(seen.exact for seen in part.seen)
    return length_for(part.measured, part.all_rows if exact else None, limit)


def _training(page: Page, draft: Draft, part: Part, before: str | None) -> None:
    way, base, kind = draft.way, draft.base, part.kind
    page.add(2, f"{kind}:", part.says or SAYS[kind])
    page.key(4, "kind", kind)
    if before:
        page.key(4, "model", before)
    page.add(4, "data:")
    for seen, path in zip(part.seen, part.paths, strict=True):
        page.source(6, *_source(seen, path, part.share))
    if kind == "sft":
        mask = {"train_on": "assistant"} | ({"history": draft.history} if draft.history else {})
        page.key(4, "mask", mask, "what is trained: every answer and its stop token, never the questions")
    elif draft.history:
        page.key(4, "mask", {"history": draft.history})
    length = length_of(part, base.limit)
    if (dropped := dropped_for(part.measured, length.value)) is not None:
        page.key(4, "max_dropped", dropped.value, dropped.why)
    if (again := sum(map(duplicates, part.seen))) > 0.005 * sum(len(s.records) for s in part.seen):
        page.key(4, "deduplicate", True, f"{again:,} of the rows that were looked at stand in the data twice")
    page.add(4, "train:", f"{'TRL' if kind != 'sft' else 'the trainer'}'s own fields, by their own names")
    _arguments(page, draft, part, length)
    adapter: dict[str, Any] = {"method": way.method}
    if way.adapter:
        adapter |= {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    page.key(4, "tuning", adapter, f"{METHODS[way.method]}: {way.why}" if way.why else METHODS[way.method])
    if way.deepspeed:
        page.key(4, "deepspeed", way.deepspeed, ZERO[way.deepspeed])


METHODS = {
    "full": "every weight is trained",
    "lora": "an adapter beside frozen weights, merged at the end",
    "qlora": "an adapter beside weights in 4 bits (pip install 'raylign[qlora]')",
}
ZERO = {
    "zero2": "the optimizer's memory is shared out over the workers",
    "zero3": "weights, gradients and the optimizer's memory are shared out over the workers",
}


def _source(seen: Seen, path: str, share: Choice | None) -> tuple[dict[str, Any], dict[str, str]]:
    source, comments = seen.source, {}
    options: dict[str, Any] = {"path": path}
    if source.messages is not None:
        options["messages"] = [turn.model_dump(exclude_none=True) for turn in source.messages]
        comments["messages"] = "made of the columns, with Jinja"
    elif source.format is not None:
        options["format"] = source.format
    if source.columns:
        options["columns"] = dict(source.columns)
        comments["columns"] = "new name: the file's own"
    if source.filter:
        options["filter"] = source.filter
        comments["filter"] = "answers that are wanted; the others would be learned too"
    if share is not None:
        options["eval"] = share.value
        comments["eval"] = share.why
    return options, comments


def _arguments(page: Page, draft: Draft, part: Part, length: Choice) -> None:
    way, base, kind = draft.way, draft.base, part.kind
    rate = rate_for(kind, base, way)
    batch = max(1, way.batch // 2) if kind == "dpo" and not base.fresh else way.batch
    step_rows = step_rows_for(part.rows)
    accumulation = max(1, round(step_rows / (batch * way.workers)))
    lengths = [n for m in part.measured for n in m.lengths]
    mean = sum(lengths) / len(lengths)
    page.key(6, "learning_rate", rate.value, rate.why)
    if base.fresh and kind == "sft":
        steps = tiny_steps_for(part.rows, batch, mean)
        page.key(6, "max_steps", steps.value, steps.why)
    else:
        epochs = epochs_for(kind, part.rows)
        page.key(6, "num_train_epochs", epochs.value, epochs.why)
    page.key(6, "lr_scheduler_type", "cosine")
    page.key(6, "warmup_steps", 0.03, "below 1 it is a share of all steps")
    page.key(6, "per_device_train_batch_size", batch, "pairs" if kind == "dpo" else "rows a worker holds at a time")
    if not base.fresh:
        rows = batch * accumulation * way.workers
        page.key(6, "gradient_accumulation_steps", accumulation, f"so {rows} rows a step")
    if kind == "dpo":
        page.key(6, "beta", 0.1, "how near it stays to the model it was given")
    page.key(6, "max_length", length.value, length.why)
    if way.checkpointing:
        page.key(6, "gradient_checkpointing", True, "slower, and much less memory")
    page.key(6, "logging_steps", 5)
    filled = mean / length.value
    if kind == "sft" and filled < 0.5 and not base.fresh:
        why = f"rows fill {filled:.0%} of max_length: packed, a step does the work of {1 / filled:.0f}"
        page.comment(6, f"packing: true   # {why}; several rows in one, which do not see each other")


def _evaluation(page: Page, draft: Draft) -> None:
    if not draft.evaluated:
        return
    models = [f"stages.{part.kind}" for part in draft.parts]
    if not draft.base.fresh and not draft.base.chat_template:
        models = [draft.model, *models]
    answers = sorted(n for part in draft.parts for m in part.measured for n in m.answers)
    longest = answers[int(0.99 * (len(answers) - 1))]
    tokens = next((n for n in (32, 64, 128, 256, 512) if n >= longest), 512)
    page.add(2, "eval:", SAYS["evaluate"])
    page.key(4, "kind", "evaluate")
    page.key(4, "models", models)
    page.add(4, "data:")
    for path, what in draft.evaluated.items():
        page.add(6, f"- path: {scalar(path)}", what)
    page.key(4, "batch_size", max(1, min(32, draft.way.batch * 2)))
    page.key(4, "max_new_tokens", tokens, "of an answer that is sampled; nearly all in the data are shorter")
    page.key(4, "max_samples", 100, "rows that are answered, to be read and compared")
    if len(draft.parts) > 1:
        page.key(4, "kl_samples", 32, "answers for how far preference tuning went from where it began")
        last, first = models[-1], "stages.sft"
        page.comment(
            4, f"gates: [{{metric: loss, of: {last}, over: {first}, at_most: 0.5}}]   # a run that fails it fails"
        )
