"""From a trained model to a plain Hugging Face folder, the adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.training.job import TrainJob


def save_model(trainer: Any, job: TrainJob, rank: int) -> None:
    """The plain Hugging Face folder. With LoRA the adapter is kept beside it and merged into it."""
    target = job.work / "model"
    if job.lora is not None:
        trainer.save_model(str(job.work / "adapter"))
    else:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on every rank: ZeRO-3 gathers the weights
        if rank == 0:
            # DeepSpeed hands tied weights over as copies, which would be saved twice.
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            model.save_pretrained(str(target), state_dict={k: v for k, v in state.items() if k not in tied})
    if rank != 0:
        return
    if job.lora is not None:
        merge_adapter(job.model, job.work / "adapter", target, reward=job.reward)
    finish_export(target, job.model, trainer.processing_class, job.stop_ids)


def merge_adapter(base: str, adapter: Path, target: Path, *, reward: bool) -> None:
    """Fold a LoRA adapter into its base model, read afresh so that it works the same under every ZeRO stage."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would partition what is loaded here
    if reward:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target))


def finish_export(target: Path, model: str, tokenizer: Any, stop_ids: list[int]) -> None:
    """Tokenizer, chat template and stop tokens beside the weights, so that the folder generates as it was trained to."""
    from transformers import AutoConfig, GenerationConfig

    tokenizer.save_pretrained(str(target))
    config = AutoConfig.from_pretrained(str(target))
    if config.pad_token_id != tokenizer.pad_token_id:
        config.pad_token_id = tokenizer.pad_token_id
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
