"""Attention, precision and kernel libraries: what is used, why, and what is said where it is not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stages.errors import StageError, nearest

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
FLASH, FLASH_PIP = "flash_attention_2", "pip install flash-attn --no-build-isolation"

# Beginning of an optimizer's name in transformers (transformers.training_args.OptimizerNames) -> (module, pip, GPU only).
# Those that no line begins with are torch's or transformers' own.
OPTIMIZER_LIBRARIES: dict[str, tuple[str, str, bool]] = {
    "adamw_bnb": ("bitsandbytes", "bitsandbytes", True),
    "adamw_8bit": ("bitsandbytes", "bitsandbytes", True),
    "paged_": ("bitsandbytes", "bitsandbytes", True),
    "ademamix": ("bitsandbytes", "bitsandbytes", True),
    "lion_": ("bitsandbytes", "bitsandbytes", True),
    "rmsprop_bnb": ("bitsandbytes", "bitsandbytes", True),
    "adamw_torch_4bit": ("torchao", "torchao", True),
    "adamw_torch_8bit": ("torchao", "torchao", True),
    "adamw_torch_xla": ("torch_xla", "torch_xla", False),
    "adamw_torch_npu": ("torch_npu", "torch_npu", False),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx", False),
    "galore_": ("galore_torch", "galore-torch", False),
    "apollo_": ("apollo_torch", "apollo-torch", False),
    "lomo": ("lomo_optim", "lomo-optim", False),
    "adalomo": ("lomo_optim", "lomo-optim", False),
    "grokadamw": ("grokadamw", "grokadamw", False),
    "schedule_free_": ("schedulefree", "schedulefree", False),
    "stable_adamw": ("optimi", "torch-optimi", False),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Used:
    """A choice that was made; `why` is empty where it was asked for or is the best there is."""

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


# ------------------------------------------------------------------------------------------------ attention


def attention_for(
    asked: Attention,
    *,
    gpu: bool,
    half: bool,
    supported: Collection[str],
    flash: str | None = None,
) -> Used:
    """The attention implementation to load a model with.

    Flash attention 2 (Dao 2023, arXiv:2307.08691) where it can be had, else torch's scaled dot product attention, else the
    model's own code.

    Args:
        gpu: whether the model runs on a GPU; `half` whether it computes in bfloat16 or float16.
        supported: of sdpa and flash_attention_2, those the model's class has.
        flash: what keeps the flash-attn library from being used, None where it can be.

    Raises:
        ValueError: what was asked for by name cannot be had.
    """
    if asked != "auto":
        if problem := attention_problem(asked, gpu=gpu, half=half, flash=flash):
            raise ValueError(problem)
        if asked != "eager" and asked not in supported:
            raise ValueError(f"this model has no {asked}; write auto, or {_best(supported, flash is None)}")
        return Used(asked)
    why = _why_not_flash(gpu, half, flash)
    if why is None and FLASH in supported:
        return Used(FLASH)
    why = why or "the model has no flash attention"
    return Used("sdpa", why) if "sdpa" in supported else Used("eager", "the model has no other")


def attention_problem(asked: Attention, *, gpu: bool | None, half: bool | None, flash: str | None = None) -> str | None:
    """What is wrong with asking for an attention by name, as far as it is known; None for what is not known yet."""
    if asked == FLASH and (why := _why_not_flash(gpu, half, flash)):
        return f"{FLASH} cannot be used: {why}; write auto, or sdpa"
    return None


def _why_not_flash(gpu: bool | None, half: bool | None, flash: str | None) -> str | None:
    if gpu is False:
        return "the workers have no GPU"
    if half is False:
        return "it computes in bf16 or fp16 only"
    return flash


def _best(supported: Collection[str], flash: bool) -> str:
    return "sdpa" if "sdpa" in supported else FLASH if FLASH in supported and flash else "eager"


def flash_missing() -> str | None:
    """What is said where flash-attn is not installed, without importing it."""
    return None if installed("flash_attn") else f"flash-attn is not installed ({FLASH_PIP})"


def flash_broken() -> str | None:
    """As `flash_missing`, and it is imported: a build for another torch is there, and cannot be used."""
    if missing := flash_missing():
        return missing
    from transformers.utils import is_flash_attn_2_available

    try:
        import flash_attn  # type: ignore[import-not-found, unused-ignore]
    except (ImportError, OSError) as error:
        return f"flash-attn is installed but cannot be imported: {str(error).splitlines()[0]}"
    if not is_flash_attn_2_available():
        return f"flash-attn {getattr(flash_attn, '__version__', '')} is not supported by transformers"
    return None


def supported_attention(model: str, *, reward: bool = False) -> set[str]:
    """Of sdpa and flash_attention_2, what transformers has for this model's class."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    cls = auto._model_mapping.get(type(config), None)
    found = {"sdpa": getattr(cls, "_supports_sdpa", False), FLASH: getattr(cls, "_supports_flash_attn", False)}
    return {name for name, has in found.items() if has}


# ------------------------------------------------------------------------------------------------ precision


def precision_for(train: Mapping[str, Any], *, gpu: bool, bf16_there: bool) -> dict[str, bool]:
    """`bf16` and `fp16` of the training arguments: bf16 on GPUs that have it, float32 on CPUs, else as asked.

    Raises:
        ValueError: what was asked for cannot be had.
    """
    if problem := precision_problem(train, gpu=gpu, bf16_there=bf16_there):
        raise ValueError(problem)
    fp16, bf16 = bool(train.get("fp16")), train.get("bf16")
    return {"fp16": fp16, "bf16": bool(bf16) if bf16 is not None else gpu and bf16_there and not fp16}


def precision_problem(train: Mapping[str, Any], *, gpu: bool | None, bf16_there: bool | None) -> str | None:
    """What is wrong with the precision that was asked for, as far as it is known. A CPU computes bf16, slowly."""
    if train.get("fp16") and train.get("bf16"):
        return "train.fp16 and train.bf16 are both true; keep one"
    if train.get("fp16") and gpu is False:
        return "train.fp16: true wants workers with GPUs; on CPUs leave it out, or write bf16: true"
    if train.get("bf16") and gpu and bf16_there is False:
        return "train.bf16: true, but this GPU has no bf16 (it takes compute capability 8.0); write fp16: true, bf16: false"
    return None


def model_dtype(precision: Mapping[str, bool], *, frozen: bool) -> str:
    """What the weights are loaded as: those that are trained in float32, under autocast; frozen ones as they compute.

    bfloat16 has 8 bits: an update smaller than 1/256 of a weight would be lost (Micikevicius et al. 2018, section 3.1).
    Frozen weights lose nothing, and float32 ones would be cast again in every forward pass.
    """
    if not frozen:
        return "float32"
    return "bfloat16" if precision["bf16"] else "float16" if precision["fp16"] else "float32"


# ------------------------------------------------------------------------------------------------ libraries


def optimizer_problem(name: str, names: Collection[str], *, gpu: bool | None) -> str | None:
    """An optimizer that transformers does not have (`names` are those it has), or that cannot run on these workers."""
    if name not in names:
        return f"{name!r} is not an optimizer of transformers{nearest(name, names)}"
    library = _library_of(name)
    if gpu is False and library is not None and library[2]:
        return f"{name} runs on a GPU only, and the workers have none; use adamw_torch"
    return None


def missing_libraries(
    train: Mapping[str, Any], attention: Attention, there: Callable[[str], bool] = installed
) -> Iterator[tuple[str, str]]:
    """(field, message) of everything a stage asks for by name whose library is not installed."""
    if attention == FLASH and not there("flash_attn"):
        yield "attention", f"flash-attn is not installed: {FLASH_PIP}; or write auto, which uses sdpa without it"
    library = _library_of(str(train.get("optim") or ""))
    if library is not None and not there(library[0]):
        yield (
            "train.optim",
            f"{train['optim']} needs {library[0]}: pip install {library[1]}; or leave it out, for adamw_torch",
        )
    if train.get("use_liger_kernel") and not there("liger_kernel"):
        yield "train.use_liger_kernel", "liger-kernel is not installed: pip install liger-kernel; or leave it out"


def _library_of(optimizer: str) -> tuple[str, str, bool] | None:
    found = [library for start, library in OPTIMIZER_LIBRARIES.items() if optimizer.startswith(start)]
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------ on a worker


@dataclass(frozen=True)
class Kernels:
    """What a worker computes with."""

    attention: Used
    precision: dict[str, bool]  # bf16 and fp16 of the training arguments
    dtype: str  # of the weights as they are loaded

    def load_options(self) -> dict[str, str]:
        """For `from_pretrained`, of the policy and of its reference."""
        return {"dtype": self.dtype, "attn_implementation": self.attention.name}

    def facts(self) -> dict[str, str]:
        """For the log and the manifest."""
        computes = next((name for name, on in self.precision.items() if on), "float32")
        return {"attention": str(self.attention), "precision": computes, "weights": self.dtype}


def worker_kernels(
    model: str, train: Mapping[str, Any], asked: Attention, *, gpu: bool, frozen: bool, reward: bool
) -> Kernels:
    """What this worker, with its own GPU and its own libraries, computes with.

    Args:
        train: the training arguments as given.
        frozen: whether the model's own weights stay as they are (an adapter is trained).

    Raises:
        StageError: what was asked for by name cannot be had here.
    """
    import torch

    for field, message in missing_libraries(train, asked):
        raise StageError(f"{field}: {message}")
    bf16_there = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        precision = precision_for(train, gpu=gpu, bf16_there=bf16_there)
    except ValueError as error:
        raise StageError(str(error)) from error
    try:
        attention = attention_for(
            asked,
            gpu=gpu,
            half=any(precision.values()),
            supported=supported_attention(model, reward=reward),
            flash=flash_broken(),
        )
    except ValueError as error:
        raise StageError(f"attention: {error}") from error
    return Kernels(attention, precision, model_dtype(precision, frozen=frozen))
