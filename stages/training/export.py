"""From a trained model to a plain Hugging Face folder, the adapter beside it.

The export has the dtype of the model that the stage was given, whatever it was trained in: weights trained in float32 are
rounded once, here. Tied embeddings are one tensor, as they were; the generation config is the base's own, with the tokens
that end an answer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stages.errors import StageError
from stages.training import documents
from stages.training.job import TrainJob
from stages.training.kernels import FLASH
from stages.training.probe import FILE, Probe, largest_difference, make_probes, run_probes, write_probes

# Of logits, relative to the largest: an adapter folded into its weights adds in another order, no more.
MERGE_TOLERANCE = 1e-4


def save_model(trainer: Any, job: TrainJob, rank: int) -> dict[str, Any]:
    """The plain folder `model/`, and what the trained model says to probes beside it. Every rank has to come here.

    An adapter is kept in `adapter/` and merged into `model/`. Returns what there is to say of the merge.

    Raises:
        StageError: the merged model is not the adapter's.
    """
    target, tokenizer = job.work / "model", trainer.processing_class
    dtype = base_dtype(job.model)
    if job.lora is not None:
        trainer.save_adapter(str(job.work / "adapter"))
    else:
        model = trainer.trained_model()
        state = trainer.trained_state()  # on every rank: ZeRO-3 gathers the weights
        if rank == 0:
            # DeepSpeed hands tied weights over as copies, which would be saved twice.
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            model.save_pretrained(str(target), state_dict=cast(model, state, dtype, without=tied))
    # Autocast is left out from here on: the probes are run in the dtype of the weights.
    model = trainer.trained_model(keep_fp32_wrapper=False)
    if model.config._attn_implementation in (FLASH, documents.NAME):  # of half precision only, or for training alone
        model.set_attn_implementation("sdpa")
    probes = make_probes(job, tokenizer)
    logits = run_probes(model, probes, reward=job.reward)
    if rank != 0:
        return {}
    merged = {}
    if job.lora is not None:
        merged = merge_adapter(job, model.config, target, dtype, probes)
        forget_grown_base(job)
    finish_export(target, job.model, tokenizer, job.stop_ids, dtype)
    write_probes(job.work / FILE, probes, logits, promise(job, model, tokenizer, dtype))
    return merged


def promise(job: TrainJob, model: Any, tokenizer: Any, dtype: Any) -> dict[str, Any]:
    """What must hold of the export, besides what it says to probes; `model` is the trained one."""
    config = model.config.get_text_config()
    return {
        "dtype": name_of(dtype),
        "trained_in": name_of(coarsest(model)),
        "vocabulary": config.vocab_size,
        "tied": bool(config.tie_word_embeddings) and not job.reward,
        "pad_token_id": tokenizer.pad_token_id,
        "stop_ids": job.stop_ids,
        "chat_template": job.template_hash or template_hash(tokenizer),
    }


def template_hash(tokenizer: Any) -> str:
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]


def base_dtype(model: str) -> Any:
    """The dtype that a model's weights are stored in: what its config says, else that of its first tensor."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    said = AutoConfig.from_pretrained(model, trust_remote_code=False).dtype
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            return tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return torch.float32


def cast(model: Any, state: dict[str, Any], dtype: Any, without: Any = ()) -> dict[str, Any]:
    """Weights in `dtype`, but for those that the architecture keeps in float32."""
    kept = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    return {
        name: tensor if not tensor.is_floating_point() or any(k in name.split(".") for k in kept) else tensor.to(dtype)
        for name, tensor in state.items()
        if name not in without
    }


def merge_adapter(job: TrainJob, trained: Any, target: Path, dtype: Any, probes: list[Probe]) -> dict[str, Any]:
    """Fold the adapter into its base model, read afresh and in float32, so that it works the same under every ZeRO stage.

    What a QLoRA adapter was trained beside is the base in 4 bits: its weights are quantised again, as `trained` (the config
    of the trainer's model) says, and back, so the export computes what the trainer computed. Merged into the original
    weights, as is often done, it would be another function, by the whole error of quantisation.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would partition what is loaded here
    cls = AutoModelForSequenceClassification if job.reward else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1} if job.reward else {}
    quantized = getattr(trained, "quantization_config", None)
    if quantized is not None:
        loaded = cls.from_pretrained(
            job.model,
            dtype=trained.dtype,
            quantization_config=quantized,
            device_map={"": "cpu"},
            trust_remote_code=False,
            **options,
        )
        model = loaded.dequantize().float()
    else:
        import torch

        model = cls.from_pretrained(job.model, dtype=torch.float32, trust_remote_code=False, **options)
    adapted = PeftModel.from_pretrained(model, str(job.work / "adapter"), autocast_adapter_dtype=True).eval()
    wanted = run_probes(adapted, probes, reward=job.reward)
    merged = adapted.merge_and_unload()
    difference, scale = largest_difference(wanted, run_probes(merged, probes, reward=job.reward))
    if not difference <= MERGE_TOLERANCE * max(1.0, scale):
        raise StageError(
            f"the merged model is not the adapter's: logits differ by {difference:.2g} (at most {MERGE_TOLERANCE:g} of"
            f" {scale:.2g} is allowed); the adapter is kept in {job.work / 'adapter'}, use other `tuning` options"
        )
    keys = getattr(merged, "all_tied_weights_keys", None) or {}
    merged.save_pretrained(str(target), state_dict=cast(merged, merged.state_dict(), dtype, without=keys))
    return {"merge_difference": difference, "merged_into": "dequantized base" if quantized is not None else "base"}


def forget_grown_base(job: TrainJob) -> None:
    """The adapter names the model the stage was given, not our copy of it with longer embeddings, which goes."""
    file = job.work / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = job.given_model or job.model
    file.write_text(json.dumps(config, indent=2))


def finish_export(target: Path, model: str, tokenizer: Any, stop_ids: list[int], dtype: Any) -> None:
    """Tokenizer, chat template and stop tokens beside the weights, so that the folder generates as it was trained to."""
    from transformers import AutoConfig, GenerationConfig

    tokenizer.save_pretrained(str(target))
    config = AutoConfig.from_pretrained(str(target), trust_remote_code=False)
    if config.pad_token_id != tokenizer.pad_token_id or config.dtype != dtype:
        config.pad_token_id, config.dtype = tokenizer.pad_token_id, dtype
        config.save_pretrained(str(target))
    if "ForCausalLM" not in "".join(config.architectures or []):
        return
    try:
        generation = GenerationConfig.from_pretrained(model)  # the base's own stop tokens and sampling stay
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    generation.eos_token_id = list(dict.fromkeys([*ids, *stop_ids]))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(str(target))


def coarsest(model: Any) -> Any:
    """The dtype of fewest bits that a model's floating weights have: what its logits can be trusted to."""
    import torch

    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if getattr(model, "is_loaded_in_4bit", False) and next(model.parameters()).device.type != "cpu":
        return torch.bfloat16  # computed in half precision, whatever the weights that are not quantised
    return min(kinds, key=lambda kind: torch.finfo(kind).bits)


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
