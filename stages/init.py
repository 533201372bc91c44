"""A fresh small model: its tokenizer is trained on the data, its weights are random. For trying a whole chain anywhere."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.base import Config, Stage, StageContext, StageResult
from stages.cache import kept
from stages.data.chat import CHATML, ChatEncoder, TokenizerSpec
from stages.data.records import Conversation, Labelled, Preference, Prompt, Record, Rejected, Text, normalise
from stages.data.source import BadRow, DataSource, find_files, read_file, resolve_formats, shaped
from stages.errors import nearest

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class TokenizerConfig(Config):
    """The tokenizer of a fresh model."""

    vocab_size: int = Field(
        default=4096, ge=260, description="Of the byte-level BPE tokenizer, special tokens included."
    )


class Init(Stage):
    """Makes a model from a transformers config and a byte-level BPE tokenizer trained on `data`."""

    kind: Literal["init"] = "init"
    config: dict[str, Any] = Field(description="Fields of the transformers config, `model_type` among them.")
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: list[DataSource] = Field(
        default_factory=list, description="What the tokenizer is trained on; the data of the stages that use the model."
    )

    produces: ClassVar = "model"
    uses_ray: ClassVar[bool] = False

    def run(self, ctx: StageContext) -> StageResult:
        import torch
        from transformers import AutoModelForCausalLM

        ctx.report.phase("tokenizer")
        tokenizer = train_tokenizer(self.data, self.tokenizer.vocab_size, ctx.chat_template or CHATML)
        ctx.report.phase("model")
        torch.manual_seed(ctx.seed)
        model = AutoModelForCausalLM.from_config(model_config(self.config, tokenizer))
        model.save_pretrained(str(ctx.model_dir))
        tokenizer.save_pretrained(str(ctx.model_dir))
        return StageResult({"parameters": model.num_parameters(), "vocab_size": len(tokenizer)})


def model_config(fields: dict[str, Any], tokenizer: Any) -> Any:
    """The transformers config of the model, with the tokenizer's own sizes and ids.

    Raises:
        ValueError: transformers has no such `model_type`.
    """
    from transformers import AutoConfig

    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return AutoConfig.for_model(**({"model_type": "llama", "vocab_size": len(tokenizer)} | ids | fields))


def config_problems(fields: dict[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with it, for `config`: a model type transformers has not got, or a key its config does not know."""
    kind = str(fields.get("model_type", "llama"))
    told = config_keys(kind)
    if "known" not in told:
        return {"model_type": f"transformers has no model type {kind!r}{nearest(kind, told['types'])}"}
    known = told["known"]
    return {key: f"unknown key of a {kind} config{nearest(key, known)}" for key in fields if key not in known}


def config_keys(kind: str) -> dict[str, list[str]]:
    """The keys of a config of transformers as `known`; where it has no such model type its `types`.

    Kept, since transformers imports torch for its configs: seconds, before a misspelt key is told.
    """

    def find() -> dict[str, list[str]]:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if kind not in CONFIG_MAPPING_NAMES:
            return {"types": list(CONFIG_MAPPING_NAMES)}
        config = AutoConfig.for_model(kind)
        return {"known": sorted({*config.to_dict(), *config.attribute_map, "rope_theta", "rope_scaling", "model_type"})}

    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", kind):
        return find()  # no name of a file
    return kept(f"config-{importlib.metadata.version('transformers')}-{kind}", find)


def train_tokenizer(sources: Sequence[DataSource], vocab_size: int, chat_template: str) -> Any:
    """A byte-level BPE tokenizer with ChatML's control tokens. The same data gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([PAD, START, END])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder = ChatEncoder(TokenizerSpec(json=bpe.to_str(), chat_template=chat_template))
    bpe.train_from_iterator(texts(sources, encoder), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    tokenizer.chat_template = chat_template
    return tokenizer


def texts(sources: Sequence[DataSource], encoder: ChatEncoder) -> Iterator[str]:
    """The data as the model will see it, without the control tokens; rows that cannot be used are left to the stages.

    Rows of tokens are those of another tokenizer, and have no text.
    """
    control = re.compile("|".join(re.escape(token) for token in encoder.control))
    for record in records(sources):
        match record:
            case Text():
                yield record.text
            case Conversation():
                yield from control.split(encoder.render(record.messages, record.tools))
            case Preference():
                yield from control.split(encoder.render([*record.prompt, record.chosen], record.tools))
                yield str(record.rejected["content"])
            case Labelled():
                yield from control.split(encoder.render([*record.prompt, record.completion], record.tools))
            case Prompt():
                yield from control.split(encoder.render(record.prompt, record.tools))


def records(sources: Sequence[DataSource]) -> Iterator[Record]:
    """Every row of the data that is a record."""
    for source, format in zip(sources, resolve_formats(sources), strict=True):
        for file in find_files(source):
            for _, row in read_file(file):
                if not isinstance(row, BadRow):
                    with suppress(Rejected):
                        yield normalise(shaped(row, source), format)
