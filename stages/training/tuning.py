"""Which weights are trained: all of them, or those of an adapter (LoRA, DoRA, QLoRA), and what can be wrong with asking so."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, create_model

from stages.base import Config
from stages.errors import StageError, nearest
from stages.training.architecture import Architecture, read_architecture
from stages.training.arguments import LibraryConfig, library_fields

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # the projections of attention (Hu et al. 2021, section 4.2)
# Starts that put a changed base beside the adapter: the adapter alone could not be merged into the base that was given.
KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", None)
ADAPTABLE = re.compile(
    r"^(?!.*Rotary).*(Linear|Embedding|Conv[123]D|Conv[123]d|MultiheadAttention)"
)  # what peft's LoRA can wrap

Dtype = Literal["float32", "bfloat16", "float16"]


class Full(Config):
    """Every weight is trained."""

    method: Literal["full"] = "full"

    def quantization(self) -> dict[str, Any] | None:
        """None: the weights are held as they are."""
        return None


class _Lora(LibraryConfig):
    """An adapter of low rank beside frozen weights (Hu et al. 2021, arXiv:2106.09685); `use_dora: true` makes it DoRA."""

    method: Literal["lora"]

    def given(self) -> dict[str, Any]:
        """Of peft's LoraConfig, what was asked for; targets are the default's where nothing was said."""
        asked = {k: v for k, v in super().given().items() if k != "method" and k not in QLoraOptions.model_fields}
        return {"target_modules": list(DEFAULT_TARGETS)} | asked

    def quantization(self) -> dict[str, Any] | None:
        """Of bitsandbytes, how the frozen weights are held; None as they are."""
        return None


class QLoraOptions(Config):
    """bitsandbytes' options, by its own names; NF4 with double quantisation as in Dettmers et al. 2023, section 3."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="What 4 bits stand for.")
    bnb_4bit_use_double_quant: bool = Field(default=True, description="Quantises the scales of the weights too.")
    bnb_4bit_compute_dtype: Dtype | None = Field(
        default=None, description="bfloat16 on a GPU that has it, float32 on a CPU."
    )
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8", description="What they are kept as."
    )
    llm_int8_skip_modules: list[str] | None = Field(default=None, description="Modules that stay as they are.")


class _QLora(_Lora, QLoraOptions):
    """LoRA beside weights held in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

    method: Literal["qlora"]  # type: ignore[assignment]

    def quantization(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in QLoraOptions.model_fields}
        return {k: v for k, v in options.items() if v is not None}


def _lora_fields() -> dict[str, Any]:
    return {k: (v, Field(default=None)) for k, v in library_fields("LoraConfig").items() if k != "task_type"}


Lora: type[_Lora] = create_model("Lora", __base__=_Lora, **_lora_fields())
QLora: type[_QLora] = create_model("QLora", __base__=_QLora, **_lora_fields())


# ------------------------------------------------------------------------------------------------ what is tuned


def default_targets(architecture: Architecture) -> list[str] | str:
    """The attention projections by their usual names; else what peft has for the architecture; else every linear layer."""
    usual = [t for t in DEFAULT_TARGETS if matched([t], architecture.modules)]
    if "q_proj" in usual:  # else its attention has other names, and o_proj alone would be a poor adapter
        return usual
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT

    known = OF_PEFT.get(architecture.model_type)
    return known if known and matched(known, architecture.modules) else "all-linear"


def adapter_options(
    tuning: Any, options: dict[str, Any], architecture: Architecture, new_tokens: Sequence[int] = ()
) -> dict[str, Any]:
    """What peft's LoraConfig is given: `options` with the targets that this model has, and the rows of new tokens trained.

    Rows of `new_tokens` are trained wherever they stand, in the input embedding and in an output one of its own; the rest
    of the embedding stays frozen (peft's `trainable_token_indices`).
    """
    if tuning.target_modules is None:
        options = options | {"target_modules": default_targets(architecture)}
    saved = options.get("modules_to_save") or []
    layers = [architecture.input_embedding, *([] if architecture.tied else [architecture.output_embedding])]
    wanted = [n for n in layers if n and not matched(saved, [n])]
    if not new_tokens or not wanted:
        return options
    asked = options.get("trainable_token_indices") or {}
    rows = {architecture.input_embedding: list(asked)} if isinstance(asked, list) else dict(asked)
    for name in wanted:
        key = next((k for k in rows if matched([k], [name])), name)
        rows[key] = sorted({*rows.get(key, []), *new_tokens})
    return options | {"trainable_token_indices": rows}


def rows_problem(options: Mapping[str, Any], zero_stage: int, *, gpu: bool) -> str | None:
    """What keeps single rows of an embedding from being trained beside an adapter.

    Under ZeRO-3 peft 0.21 gathers them on a GPU only (TrainableTokensLayer._collect_token_weights); until it does elsewhere.
    """
    if not options.get("trainable_token_indices") or zero_stage != 3 or gpu:
        return None
    return "tuning: an adapter trains rows of added tokens under ZeRO-3 on GPUs only; use zero2, or `method: full`"


def matched(targets: str | Collection[str], names: Collection[str]) -> list[str]:
    """The modules that peft would take: a string is a regular expression, names in a list are ends of paths."""
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return list(names)
        return [n for n in names if re.fullmatch(targets, n)]
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]


# ------------------------------------------------------------------------------------------------ what is wrong with it


def tuning_problems(
    tuning: Any, architecture: Architecture | None, *, reward: bool = False, zero_stage: int = 0
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it and what to do) of all that keeps a model from being tuned so; nothing for full training.

    Args:
        tuning: `tuning:` of a stage.
        architecture: of the model, from its config alone (`read_architecture`); None where it is not known yet.
        reward: whether it becomes a reward model, whose head is a score.
        zero_stage: of DeepSpeed; 0 without it.
    """
    if isinstance(tuning, Full):
        return
    if tuning.quantization() is not None and zero_stage == 3:
        yield (
            "method",
            "qlora does not go with ZeRO-3, which would have to partition weights that are quantised while they are"
            " loaded; use zero2 (weights in 4 bits are small), or `method: lora` with zero3",
        )
    if tuning.init_lora_weights not in KEEPS_THE_BASE:
        yield (
            "init_lora_weights",
            f"{tuning.init_lora_weights!r} changes the frozen weights too, so its adapter could not be merged into the"
            " model that was given; use true, gaussian or orthogonal",
        )
    if architecture is None:
        return
    if tuning.target_modules is not None:
        yield from _target_problems(tuning, architecture)
    for name in tuning.modules_to_save or []:
        if not matched([name], architecture.modules) and not (reward and name == "score"):
            yield "modules_to_save", f"{name!r} matches nothing in this model{_known(name, architecture.modules)}"
    embeddings = [n for n in (architecture.input_embedding, architecture.output_embedding) if n]
    yield from _tied_problems("modules_to_save", tuning.modules_to_save or [], embeddings, tuning, architecture)


def missing_library(tuning: Any) -> str | None:
    """What is said where the tuning needs a library that is not installed, without importing it."""
    if isinstance(tuning, Full) or tuning.quantization() is None or importlib.util.find_spec("bitsandbytes"):
        return None
    return "qlora needs bitsandbytes: pip install 'raylign[qlora]'"


def _target_problems(tuning: Any, architecture: Architecture) -> Iterator[tuple[str, str]]:
    modules, targets, field = architecture.modules, tuning.target_modules, "target_modules"
    if str(targets).lower() == "all-linear":
        return
    for target in [targets] if isinstance(targets, str) else targets:
        found = matched(targets if isinstance(targets, str) else [target], modules)
        wrong = next((n for n in found if not ADAPTABLE.search(modules[n])), None)
        if not found:
            what = "a regular expression for whole paths, " if isinstance(targets, str) else ""
            yield field, f"{what}{target!r} matches nothing in this model{_known(target, modules)}"
        elif wrong is not None:
            inside = {_last(n) for n in modules if n.startswith(f"{wrong}.") and ADAPTABLE.search(modules[n])}
            hint = f"; name its layers: {', '.join(sorted(inside))}" if inside else ""
            yield field, f"{target!r} is a {modules[wrong]}, which LoRA cannot adapt{hint}"
        elif architecture.output_embedding in found:
            yield (
                field,
                (
                    f"{target!r} is the output layer, which the loss multiplies by directly: its adapter would not be trained;"
                    " leave it out, or train the layer itself with `modules_to_save`"
                ),
            )
    yield from _tied_problems(field, targets, [architecture.input_embedding], tuning, architecture)


def _tied_problems(
    field: str, names: Any, among: list[str], tuning: Any, architecture: Architecture
) -> Iterator[tuple[str, str]]:
    """Training one of two places where the same tensor stands would leave two tensors."""
    if architecture.tied and not tuning.ensure_weight_tying and (found := matched(names, among)):
        yield (
            field,
            (
                f"{', '.join(map(_last, found))}: input and output embedding of this model are one tensor; add"
                " `ensure_weight_tying: true`, or train single rows of it with `trainable_token_indices`"
            ),
        )


def checked_architecture(tuning: Any, model: str, *, reward: bool, zero_stage: int) -> Architecture | None:
    """The architecture an adapter is made for, None for full training.

    Raises:
        StageError: the model's config cannot be read, or it cannot be tuned so.
    """
    if isinstance(tuning, Full):
        return None
    try:
        architecture = read_architecture(model, reward=reward)
    except (OSError, ValueError) as error:
        raise StageError(f"{model}: its config cannot be read: {str(error).splitlines()[0]}") from error
    problems = [
        f"tuning.{f}: {m}" for f, m in tuning_problems(tuning, architecture, reward=reward, zero_stage=zero_stage)
    ]
    if missing := missing_library(tuning):
        problems.append(f"tuning.method: {missing}")
    if problems:
        raise StageError("\n".join(problems))
    return architecture


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _known(name: str, modules: Mapping[str, str]) -> str:
    """The nearest name of this model, or the layers there are."""
    layers = sorted(
        {_last(n) for n, kind in modules.items() if n and ADAPTABLE.search(kind) and not _last(n).isdigit()}
    )
    return nearest(_last(name), layers) or f"; it has {', '.join(layers)}"


def quantization_config(options: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    """transformers' `quantization_config` for weights in 4 bits."""
    import torch

    half = "bfloat16" if not on_cpu and torch.cuda.is_bf16_supported() else "float16"
    compute = {"bnb_4bit_compute_dtype": "float32" if on_cpu else half}
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, **compute, **options}


def settle_quantized(model: Any) -> None:
    """Make a model in 4 bits compute the same in training and evaluation.

    In evaluation mode bitsandbytes 0.50 repacks weights on CPUs with AVX512-BF16 for a kernel that computes in bfloat16,
    whatever the compute dtype, and that has no backward pass (Linear4bit.forward, bitsandbytes/nn/modules.py): off, until
    it asks for the compute dtype.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def train_in_float32(model: Any) -> None:
    """What is trained beside frozen weights is held in float32; autocast and DeepSpeed do their own casting.

    TRL casts the adapters of quantised models to bfloat16 (peft#2889), and peft leaves whole layers that are trained, as a
    score head, in the base's half precision: an update under 1/256 of a weight would be lost. What ZeRO-3 has partitioned
    already is DeepSpeed's matter.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(torch.float32)
