"""How conversations are rendered and what of them counts: the options that every stage has."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import Field

from stages.base import Config
from stages.data.chat import ControlTokens, History, TrainOn
from stages.data.encode import PRINTED_DATE


class Mask(Config):
    """How conversations are rendered and tokenised. Stages that read the same kind of rows should have the same."""

    history: History = Field(
        default="refuse",
        description="Where the template renders earlier turns without what they had (reasoning): refuse the row, "
        "per_turn (an example for each turn, after exactly the text it is generated from) or last_turn.",
    )
    stop_token: str | None = Field(
        default=None, description="What ends an answer, for templates that write nothing there."
    )
    control_tokens: ControlTokens = Field(
        default="text", description="Control tokens spelled in contents: tokenised as text, refuse the row, or allow."
    )
    date: datetime.date = Field(
        default=PRINTED_DATE.date(), strict=False, description="What templates that print today's date print."
    )

    def options(self) -> dict[str, Any]:
        """As fields of a Recipe."""
        date = datetime.datetime.combine(self.date, datetime.time())
        return self.model_dump(exclude={"date"}) | {"date": date}


class TrainMask(Mask):
    """How conversations are rendered and tokenised, and what of them is trained."""

    train_on: TrainOn = Field(
        default="assistant",
        description="assistant (every turn and its stop token), last_assistant, completion (after the last user turn) or all.",
    )
