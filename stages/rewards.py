"""What an answer is worth: the scores of reward models and of Python functions, summed with weights.

A function has TRL's signature, so one that was written for its GRPOTrainer works here:

    def exact(prompts, completions, expected, **columns):
        return [float(c[0]["content"].strip() == e) for c, e in zip(completions, expected)]

    prompts         list of conversations, each a list of messages {"role", "content"}
    completions     list of answers, each a list of one message {"role": "assistant", "content": text}
    completion_ids  list of the answers' tokens, stop token included
    expected        list of the rows' expected answers, None where a row has none
    **columns       every other column of the rows, as a list each, with None where a row lacks it
    returns         one number for each answer

It is called with some answers at a time, those of a prompt one after another, in the processes that score: perhaps in
several of them, none of which sees all answers.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from stages.base import Artifact, Config
from stages.data.messages import Message
from stages.data.tokenise import load_tokenizer_json, tokenizer_spec
from stages.data.tokenizer import load_tokenizer
from stages.errors import DataError, StageError
from stages.own import is_named, load_for, raised

RESERVED = ("prompts", "completions", "completion_ids", "expected")
SHOWN = 80  # characters of an answer in a message


class RewardTerm(Config):
    """One reward of the sum."""

    reward: str = Field(description="A reward stage (stages.NAME), a reward model, or a Python function `module:name`.")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="What its score is multiplied by in the sum.")
    normalize: bool | None = Field(
        default=None,
        description="Subtract the mean and divide by the standard deviation that a reward stage found on its data; "
        "by default wherever these are known.",
    )

    @field_validator("normalize")
    @classmethod
    def _of_models(cls, value: bool | None, info: Any) -> bool | None:
        if value and is_function(info.data.get("reward", "")):
            raise ValueError("a function's rewards are taken as they are; only those of a reward stage are normalised")
        return value


def _named(value: Any) -> Any:
    return {"reward": value} if isinstance(value, str) else value


Reward = Annotated[RewardTerm, BeforeValidator(_named, json_schema_input_type=str | RewardTerm)]


def is_function(reward: str) -> bool:
    """Whether a reward names a Python function rather than a model."""
    return is_named(reward)


@dataclass(frozen=True)
class Scorer:
    """A term with all that a worker needs to compute it."""

    name: str
    weight: float
    function: str | None = None  # module:name
    model: str | None = None  # a folder or hub id
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Answered:
    """An answer that is to be scored, and the row its prompt comes from."""

    prompt_ids: Sequence[int]
    prompt: Sequence[Message]
    answer_ids: Sequence[int]
    answer: str
    source: str
    row: int
    expected: str | None
    columns: dict[str, Any]


def scorers(terms: Sequence[RewardTerm], models: Sequence[Artifact]) -> list[Scorer]:
    """The terms with their models, which are given in the order of the terms that name one.

    Raises:
        StageError: a term is to be normalised, and nothing is known to normalise it by.
    """
    left = iter(models)
    return [
        Scorer(term.reward, term.weight, function=term.reward)
        if is_function(term.reward)
        else _of_model(term, next(left))
        for term in terms
    ]


def _of_model(term: RewardTerm, artifact: Artifact) -> Scorer:
    metrics = artifact.manifest.get("metrics", {})
    mean, std = metrics.get("reward_mean"), metrics.get("reward_std")
    known = mean is not None and bool(std)
    if term.normalize and not known:
        raise StageError(
            f"rewards: {term.reward} has no reward_mean and reward_std to normalise by; leave `normalize` out"
        )
    if not known or term.normalize is False:
        return Scorer(artifact.name, term.weight, model=artifact.model)
    return Scorer(artifact.name, term.weight, model=artifact.model, mean=float(mean), std=float(std))


# ------------------------------------------------------------------------------------------------ before anything is sampled


def check(scorers: Sequence[Scorer], policy: Artifact, chat_template: str | None) -> None:
    """Every function can be imported, and every reward model reads the policy's text as the policy does.

    Raises:
        StageError: with what is wrong.
    """
    tokenizer = load_tokenizer(policy.model, chat_template)
    for scorer in scorers:
        if scorer.function is not None:
            load_for("rewards", scorer.function)
            continue
        assert scorer.model is not None
        _check_scores(scorer)
        try:
            other = load_tokenizer(scorer.model)
        except DataError as error:
            raise StageError(f"rewards: {error}") from error
        if what := difference(tokenizer, other):
            raise StageError(
                f"rewards: {scorer.name} has another {what} than {policy.name}, whose answers it is to score; train it "
                f"from {policy.name}, or from what {policy.name} was trained from"
            )


def _check_scores(scorer: Scorer) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(scorer.model, trust_remote_code=False)
    named = ", ".join(config.architectures or ["no architecture"])
    if not named.endswith("ForSequenceClassification"):
        raise StageError(f"rewards: {scorer.name} is no reward model: its config names {named}")
    if config.num_labels != 1:
        raise StageError(f"rewards: {scorer.name} gives {config.num_labels} scores, a reward model gives one")


def difference(policy: Any, reward: Any) -> str | None:
    """What two tokenizers differ in: the same text would be other tokens to the reward model than it was trained on."""
    ours, theirs = tokenizer_spec(policy), tokenizer_spec(reward)
    # Through the same reader: how it last padded is saved with a tokenizer.
    if load_tokenizer_json(ours.json).to_str() != load_tokenizer_json(theirs.json).to_str():
        return "tokenizer"
    return "chat template" if ours.chat_template != theirs.chat_template else None


# ------------------------------------------------------------------------------------------------ scoring


class Scoring:
    """All terms of a sum, their models loaded once.

    Args:
        batch_size: answers that a reward model scores together.
    """

    def __init__(self, scorers: Sequence[Scorer], batch_size: int) -> None:
        self.terms: list[Callable[[Sequence[Answered]], list[float]]] = [
            _FunctionReward(scorer.function) if scorer.function is not None else _ModelReward(scorer, batch_size)
            for scorer in scorers
        ]

    def __call__(self, answers: Sequence[Answered]) -> list[list[float]]:
        """Of each answer the score of every term, without the weights."""
        if not answers:
            return []
        return [list(scores) for scores in zip(*(term(answers) for term in self.terms), strict=True)]


class _ModelReward:
    def __init__(self, scorer: Scorer, batch_size: int) -> None:
        from stages.scoring import load_for_scoring

        assert scorer.model is not None
        self.scorer, self.batch_size = scorer, batch_size
        self.model = load_for_scoring(scorer.model, reward=True)
        self.pad_id = load_tokenizer(scorer.model).pad_token_id

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        from stages.scoring import rewards

        rows = [{"prompt_ids": list(a.prompt_ids), "answer_ids": list(a.answer_ids)} for a in answers]
        scores = rewards(self.model, rows, "answer_ids", self.pad_id, self.batch_size).tolist()
        out = [(score - self.scorer.mean) / self.scorer.std for score in scores]
        if (bad := next((i for i, score in enumerate(out) if not math.isfinite(score)), None)) is not None:
            raise StageError(f"rewards: {self.scorer.name} gave {out[bad]} for {_where(answers[bad])}")
        return out


class _FunctionReward:
    def __init__(self, path: str) -> None:
        self.path, self.function = path, load_for("rewards", path)

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        return call_function(self.function, self.path, answers)


def call_function(function: Callable[..., Any], name: str, answers: Sequence[Answered]) -> list[float]:
    """The rewards that a function gives.

    Raises:
        StageError: it raised, or gave anything but one finite number for each answer; with its name, row and value.
    """
    columns = dict.fromkeys(column for answer in answers for column in answer.columns if column not in RESERVED)
    try:
        given = function(
            prompts=[list(a.prompt) for a in answers],
            completions=[[{"role": "assistant", "content": a.answer}] for a in answers],
            completion_ids=[list(a.answer_ids) for a in answers],
            expected=[a.expected for a in answers],
            **{column: [a.columns.get(column) for a in answers] for column in columns},
        )
    except Exception as error:  # whatever a function of the user's raises
        traceback.print_exc()
        rows = f"{_place(answers[0])} to {_place(answers[-1])}"
        raise StageError(f"rewards: {name} raised {raised(error)}, for {len(answers)} answers, {rows}") from error
    try:
        values = list(given)
    except TypeError:
        raise StageError(f"rewards: {name} returned {_seen(given)}; wanted is a list of numbers") from None
    if len(values) != len(answers):
        raise StageError(
            f"rewards: {name} returned {len(values)} rewards for {len(answers)} answers; wanted is one for each"
        )
    return [_number(value, name, answer) for value, answer in zip(values, answers, strict=True)]


def _number(value: Any, name: str, answer: Answered) -> float:
    item = value.item() if hasattr(value, "item") else value  # of numpy and torch
    if not isinstance(item, Real) or not math.isfinite(item):
        raise StageError(f"rewards: {name} gave {_seen(item)} for {_where(answer)}; wanted is a number")
    return float(item)


def _seen(value: Any) -> str:
    return repr(value) if isinstance(value, str | Real | None) else f"a {type(value).__name__}"


def _place(answer: Answered) -> str:
    return f"{Path(answer.source).name}, row {answer.row}"


def _where(answer: Answered) -> str:
    return f"{_place(answer)} (the answer {answer.answer[:SHOWN]!r})"
