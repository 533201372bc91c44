"""One micro-batch of a model, forward and backward, on tensors without data: what would be held after each operation.

PyTorch's FakeTensorMode runs the model's own code and keeps shapes and types alone, so this is right for any architecture,
and needs neither weights nor a GPU. A dispatch mode sees every operation and counts the storages that live. Where all layers
are alike three are run, and the middle one is repeated in the count: a second or two whatever the depth.
"""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Head = Literal["trained", "score"]
ACTIVATIONS, LOGITS, GRADIENTS = range(3)
BLOCK = 1 << 22  # as in stages/training/losses.py: logits that are in float32 at a time


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, from its config alone. Tied weights count once."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    positions: int | None  # the longest sequence it is made for
    weight_bytes: int  # as they are held: 16 or 32 bits each, adapters included
    buffer_bytes: int
    quantised: int  # parameters of linear layers but the head: what bitsandbytes holds in 4 bits
    largest_linear: int  # parameters of the largest of these
    largest_trainable: int
    adapted: int  # parameters of the weights that have an adapter
    factored: int  # rows + columns of trained matrices, elements of trained vectors: what Adafactor holds


@dataclass(frozen=True)
class DryRun:
    anatomy: Anatomy
    series: np.ndarray  # (operations, 3), bytes: activations, logits, gradients that live after each operation
    estimated: str = ""  # why the activations are not the model's own but a formula's

    def peak(self, gradients_stay: bool = False) -> tuple[int, int, int]:
        """(activations, logits, gradients) at the moment when they need most.

        `gradients_stay`: those of earlier micro-batches are held all the time (accumulation), or wherever a library keeps
        room for all of them; only the other two are then looked at.
        """
        wanted = self.series[:, :GRADIENTS] if gradients_stay else self.series
        activations, logits, gradients = (int(n) for n in self.series[int(wanted.sum(1).argmax())])
        return activations, logits, gradients


@dataclass(frozen=True)
class Shape:
    """What decides a dry run."""

    config: str  # the text of config.json
    head: Head
    rows: int  # sequences of a micro-batch: pairs are two
    length: int  # tokens of each
    scored: int | None = None  # those of which the head computes the logits, where it is not all
    half: bool = False  # weights in bfloat16 rather than float32
    autocast: bool = False  # bfloat16 inside operations
    checkpointing: bool = False
    attention: str = "sdpa"
    lora: str | None = None  # JSON of PEFT's options
    gpu: bool = False  # kernels differ


class Unpredictable(Exception):
    """The model cannot be built: no such type in transformers, or the config is wrong."""


# What the code of models raises where it needs the values of tensors, or a configuration is not one of them.
FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, AssertionError)
OPERATIONS = 150_000  # a loop over tokens (some state-space models without their kernels): seconds and minutes


@lru_cache(maxsize=64)
def dry_run(shape: Shape) -> DryRun:
    """Run it.

    Raises:
        Unpredictable: no such model type in transformers, or the config is not one.
    """
    try:
        with fake():
            model = build(shape)
            anatomy = _anatomy(model, shape)
            try:
                return DryRun(anatomy, _step(model, shape))
            except FAILURES as error:
                return DryRun(anatomy, formula(anatomy, shape), _first_line(error))
    except FAILURES as error:
        raise Unpredictable(_first_line(error)) from error


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Tensors that are made here have a shape and a type, and no data.

    No garbage is collected meanwhile: where that of an earlier run has cycles (PEFT's modules_to_save has), torch 2.13 is
    killed by a segmentation fault when it is freed in the middle of another.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    gc.collect()
    gc.disable()
    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), _experts_without_data():
            yield
    finally:
        gc.enable()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def formula(anatomy: Anatomy, shape: Shape) -> np.ndarray:
    """Where the model's own code cannot tell: Korthikanti et al. 2022 (arXiv:2205.05198), eq. 2, without the attention matrix.

    s b h 34 bytes a layer in 16 bits, twice that in float32; with checkpointing 2 s b h, and one layer whole.
    """
    tokens, wide = shape.rows * shape.length, 1 if shape.half or shape.autocast else 2
    layer = 34 * wide * tokens * anatomy.hidden
    kept = 2 * wide * tokens * anatomy.hidden
    activations = anatomy.layers * kept + layer if shape.checkpointing else anatomy.layers * layer
    scored = shape.rows * min(shape.length, shape.scored or shape.length)
    logits = scored * anatomy.vocabulary * 2 * wide if shape.head == "trained" else 0
    gradients = anatomy.trainable * (2 if shape.half and shape.lora is None else 4)
    return np.array([[activations, logits, 0], [layer, 0, gradients]], dtype=np.int64)


def load_config(text: str) -> Any:
    """The transformers config of a config.json.

    Raises:
        ValueError: transformers has no such model type.
    """
    from transformers import AutoConfig

    fields = json.loads(text)
    kind = fields.pop("model_type", None)
    return AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "quantization_config"})


def build(shape: Shape) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = load_config(shape.config)
    family = AutoModelForCausalLM
    if shape.head == "score":
        family, config.num_labels = AutoModelForSequenceClassification, 1
    dtype = torch.bfloat16 if shape.half else torch.float32
    implementation = "eager" if shape.attention == "eager" else None  # None: sdpa where the model has it
    model = family.from_config(config, dtype=dtype, attn_implementation=implementation)
    if shape.lora is not None:
        from peft import LoraConfig, get_peft_model

        task = "SEQ_CLS" if shape.head == "score" else "CAUSAL_LM"
        with _modules_stay():
            model = get_peft_model(model, LoraConfig(task_type=task, **json.loads(shape.lora)))
    model.train()
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
        if shape.lora is not None:
            model.enable_input_require_grads()
    return model


def _anatomy(model: Any, shape: Shape) -> Anatomy:
    import torch

    parameters = list(model.parameters())  # each once, however often it is tied
    trained = [p for p in parameters if p.requires_grad]
    base = model.get_base_model() if shape.lora is not None else model
    head = base.get_output_embeddings() if shape.head != "score" else base.score
    linear = [m.weight for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    linear = [w for w in linear if not w.requires_grad] if shape.lora is not None else linear
    text = base.config.get_text_config()
    vectors = [p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in trained]
    return Anatomy(
        parameters=base.num_parameters() if shape.lora is None else sum(p.numel() for p in parameters if not p.requires_grad),
        trainable=sum(p.numel() for p in trained),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=getattr(text, "num_attention_heads", 0) or 0,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        quantised=sum(w.numel() for w in linear),
        largest_linear=max((w.numel() for w in linear), default=0),
        largest_trainable=max((p.numel() for p in trained), default=0),
        adapted=sum(m.base_layer.weight.numel() for m in base.modules() if hasattr(m, "base_layer")),
        factored=sum(vectors),
    )  # fmt: skip


def _step(model: Any, shape: Shape) -> np.ndarray:
    """The series of the micro-batch."""
    meter = meter_class()([*model.parameters(), *model.buffers()])
    layers = _layers(model, shape)
    cuts = _Cuts(meter, layers) if layers is not None and len(layers) > 3 and _alike(layers) else None
    with meter:
        _pass(model, shape, meter)
    series = meter.table({p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None})
    return series if cuts is None else cuts.repeated(series)


def _layers(model: Any, shape: Shape) -> Any:
    """The list of the model's layers; None where it keeps them in another way."""
    import torch

    base = model.get_base_model() if shape.lora is not None else model
    depth = base.config.get_text_config().num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


def _alike(layers: Any) -> bool:
    def signature(layer: Any) -> list[Any]:
        parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()]
        return [*parameters, *[(n, type(m)) for n, m in layer.named_modules()]]

    first = signature(layers[0])
    return all(signature(layer) == first for layer in layers)


class _Cuts:
    """Leaves three layers of a model, and marks when the forward pass has left, and the backward pass reaches, two of them."""

    def __init__(self, meter: Any, layers: Any) -> None:
        self.meter, self.more = meter, len(layers) - 3
        self.left: dict[int, int] = {}  # layer -> time
        self.reached: dict[int, int] = {}
        del layers[3:]
        for i in (0, 1):
            layers[i].register_forward_hook(lambda _, __, out, i=i: self._mark(i, out))

    def _mark(self, i: int, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if i not in self.left:  # else it is run again: by a checkpoint
            self.left[i] = self.meter.time
            hidden.register_hook(lambda _: self.reached.setdefault(i, self.meter.time) and None)

    def repeated(self, series: np.ndarray) -> np.ndarray:
        """The series with the middle layer as often as it is there."""
        f0, f1, b1, b0 = self.left[0], self.left[1], self.reached[1], self.reached[0]
        up, down = series[f1 - 1] - series[f0 - 1], series[b0 - 1] - series[b1 - 1]
        more = self.more
        return np.concatenate(
            [
                series[:f0],
                *(series[f0:f1] + i * up for i in range(more + 1)),
                series[f1:b1] + more * up,
                *(series[b1:b0] + (more * up + i * down) for i in range(more + 1)),
                series[b0:] + more * (up + down),
            ]
        )


def _pass(model: Any, shape: Shape, meter: Any) -> None:
    """Forward and backward. The head is run apart, in between, so that what it holds can be told apart."""
    import torch

    base = model.get_base_model() if shape.lora is not None else model
    inputs = {"input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long), "use_cache": False}
    if "flash" not in shape.attention:  # rows of unequal length, and packs, need a mask; flash attention takes lengths
        inputs["attention_mask"] = torch.ones(shape.rows, shape.length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.autocast):
        backbone = base.base_model if base.base_model is not base else base.model
        hidden = backbone(**inputs).last_hidden_state
        above = hidden.detach().requires_grad_()
        meter.label = LOGITS
        if shape.head == "score":
            scores = base.score(above)
            torch.autograd.backward(scores, torch.empty_like(scores))
        else:
            trained_head(base.get_output_embeddings(), above if shape.scored is None else above[:, : shape.scored])
        meter.label = ACTIVATIONS
    gradient, above.grad, above = above.grad, None, None
    torch.autograd.backward(hidden, gradient)


# ---------------------------------------------------------------------------------------------- heads


def trained_head(head: Any, hidden: Any) -> None:
    """What stages/training/losses.py holds if every token is scored: the logits once, their gradient written over them."""
    import torch

    logits = head(hidden.flatten(0, 1).clone())  # picked by a mask
    block = torch.empty(2 * min(BLOCK, logits.numel()), dtype=torch.float32)
    del block
    torch.autograd.backward(logits, logits.detach())


# ---------------------------------------------------------------------------------------------- counting


@lru_cache
def meter_class() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Meter(TorchDispatchMode):
        """Counts the bytes of living storages, by what they are for, after each operation."""

        def __init__(self, known: list[Any]) -> None:
            super().__init__()
            self.label = ACTIVATIONS
            self.known = [t.untyped_storage() for t in known]  # held: another storage could be given the same address
            self.seen = {storage._cdata for storage in self.known}
            self.time = 0
            self.events: list[list[int]] = []  # [storage, label, bytes, born, died]

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor.untyped_storage())
            self.time += 1
            if self.time > OPERATIONS:
                raise RuntimeError(f"more than {OPERATIONS} operations")
            return out

        def _see(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.seen:
                return
            self.seen.add(key)
            event = [key, self.label, storage.nbytes(), self.time, -1]
            self.events.append(event)
            weakref.finalize(storage, self._died, event)

        def _died(self, event: list[int]) -> None:
            event[4] = self.time
            self.seen.discard(event[0])

        def table(self, gradients: set[int]) -> np.ndarray:
            """(operations, 3) bytes that live; `gradients` are the storages that are left in `.grad` at the end."""
            changes = np.zeros((self.time + 1, 3), dtype=np.int64)
            for key, label, size, born, died in self.events:
                kind = GRADIENTS if died < 0 and key in gradients else label
                changes[born, kind] += size
                if died >= 0:
                    changes[max(died, born + 1), kind] -= size
            return changes.cumsum(0)[: max(self.time, 1)]

    return Meter


@contextlib.contextmanager
def _experts_without_data() -> Iterator[None]:
    """Let mixtures of experts run in float32: the kernel that transformers takes is checked for bfloat16 by its fake only.

    https://github.com/pytorch/pytorch/issues/172440 is of the kernel itself. transformers has an operation of its own for
    where the kernel cannot be used, with the same shapes. May go when torch's fake of `_grouped_mm` takes float32.
    """
    from transformers.integrations import moe

    original = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


@contextlib.contextmanager
def _modules_stay() -> Iterator[None]:
    """PEFT moves adapters to where the model is, which they are already; torch cannot swap the data of fake parameters."""
    import torch

    original = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *_, **__: module  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.to = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' notes on how the model is built concern nobody here."""
    import logging
    import warnings

    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    disabled, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.manager.disable = disabled
        transformers.logging.set_verbosity(level)
