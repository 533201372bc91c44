"""Which tokens are the assistant's: render a conversation with the model's chat template and mask it, verified.

For each assistant turn i of a conversation rendered as F: the prompt P_i (everything before the turn, and the generation
prompt) and R_i (everything up to its end) must both be prefixes of F. The trained span then runs from the end of P_i, so
the header is out, to the turn's stop token, and must hold the content. F is tokenised once, and a token is trained where it
lies wholly inside a span. A template for which any of this does not hold is refused with a reason, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from stages.data.records import Message

IGNORE = -100  # the label of a token that is not trained, as torch's cross-entropy has it
TrainOn = Literal["assistant", "last_assistant", "completion", "all"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN = {"chatml": CHATML}


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it. `spans` are (message index, start, end) in characters of `text`."""

    text: str
    input_ids: list[int]
    labels: list[int]  # IGNORE where untrained
    spans: list[tuple[int, int, int]]

    @property
    def trained(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Refused:
    reason: str  # short and stable
    detail: str


@dataclass(frozen=True)
class TokenizerSpec:
    """All the encoder needs of a tokenizer, small enough to be sent to every task: no transformers, no files."""

    json: str  # tokenizer.json
    chat_template: str | None
    variables: dict[str, Any] = field(default_factory=dict)  # bos_token, eos_token, ... as templates use them
    eos_token: str | None = None

    def __hash__(self) -> int:
        return hash((self.json, self.chat_template))


@lru_cache(maxsize=8)
def load_tokenizer_json(json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@lru_cache(maxsize=32)
def compile_template(template: str) -> Callable[..., str]:
    """The template's render function in the very environment that transformers renders it in."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template).render


class ChatEncoder:
    """Encodes conversations for one tokenizer and template.

    Args:
        tokenizer: a `TokenizerSpec`, or a fast transformers tokenizer.
        train_on: `assistant` trains every assistant turn and its stop token, `last_assistant` and `completion` only the
            last one, `all` every token (plain language modelling).

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn = "assistant") -> None:
        spec = tokenizer if isinstance(tokenizer, TokenizerSpec) else tokenizer_spec(tokenizer)
        if spec.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.spec, self.train_on = spec, train_on
        self.tokenizer = load_tokenizer_json(spec.json)
        self._render = compile_template(spec.chat_template)
        self.control = [t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, **self.spec.variables
        )

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant's answer to `messages` stands."""
        return self.render(messages, add_generation_prompt=True)

    def encode_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | Refused]:
        """Encode conversations, in order. The texts are tokenised together, which uses every core."""
        plans = [self._plan(messages) for messages in conversations]
        texts = [plan[0] for plan in plans if not isinstance(plan, Refused)]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [plan if isinstance(plan, Refused) else self._finish(*plan, next(encodings)) for plan in plans]

    def encode_text(self, texts: Sequence[str]) -> list[Encoded | Refused]:
        """Plain text for language modelling: every token is trained, and the end-of-text token after it."""
        ends = [text + (self.spec.eos_token or "") for text in texts]
        encodings = self.tokenizer.encode_batch(ends, add_special_tokens=False)
        out: list[Encoded | Refused] = []
        for raw, text, encoding in zip(texts, ends, encodings, strict=True):
            token = self._control_token_in(raw)
            if token:
                out.append(Refused("control_token_in_content", token))
            else:
                out.append(Encoded(text, encoding.ids, list(encoding.ids), [(0, 0, len(text))]))
        return out

    def _control_token_in(self, content: str) -> str | None:
        return next((token for token in self.control if token in content), None)

    def _plan(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int, int]]] | Refused:
        """The rendered text and its trained spans, or why not."""
        for i, message in enumerate(messages):
            # Would be read as a control token by the tokenizer: content must not be able to end a turn or open one.
            if token := self._control_token_in(message["content"]):
                return Refused("control_token_in_content", f"message {i} spells {token}")
        try:
            text = self.render(messages)
            spans = [
                self._span(text, messages, i) for i, message in enumerate(messages) if message["role"] == "assistant"
            ]
        except Exception as error:  # a template is the model's own program: whatever it raises refuses the row
            return Refused("template_error", str(error) or type(error).__name__)
        refused = next((span for span in spans if isinstance(span, Refused)), None)
        if refused:
            return refused
        good = [span for span in spans if not isinstance(span, Refused)]
        if self.train_on in ("last_assistant", "completion"):
            good = good[-1:]
        if self.train_on == "all":
            good = [(len(messages) - 1, 0, len(text))]
        if not good:
            return Refused("no_assistant_turn", f"{len(messages)} messages")
        return text, good

    def _span(self, text: str, messages: Sequence[Message], i: int) -> tuple[int, int, int] | Refused:
        prompt, upto = self.prompt(messages[:i]), self.render(messages[: i + 1])
        if not text.startswith(prompt):
            return Refused("prompt_not_prefix", f"turn {i}: {_difference(prompt, text)}")
        if not text.startswith(upto):
            return Refused("history_rewritten", f"turn {i}: {_difference(upto, text)}")
        end = len(upto.rstrip())  # white space after the stop token is not trained
        stop = next((t for t in self.control if upto.endswith(t, len(prompt), end)), None)
        if stop is None:
            return Refused("no_stop_token", f"turn {i} ends with {upto[max(len(prompt), end - 20) : end]!r}")
        if messages[i]["content"].strip() not in text[len(prompt) : end - len(stop)]:
            return Refused("content_changed", f"turn {i} is rendered as {text[len(prompt) : end][:80]!r}")
        return i, len(prompt), end

    def _finish(self, text: str, spans: list[tuple[int, int, int]], encoding: Encoding) -> Encoded | Refused:
        ids = encoding.ids
        labels, at = [IGNORE] * len(ids), 0
        for token, (start, end) in enumerate(encoding.offsets):
            while at < len(spans) and start >= spans[at][2]:
                at += 1
            if at < len(spans) and spans[at][1] <= start and end <= spans[at][2] and start < end:
                labels[token] = ids[token]
        if all(label == IGNORE for label in labels):
            return Refused("no_trained_token", f"{len(ids)} tokens")
        return Encoded(text, ids, labels, spans)

    def message_ends(self, messages: Sequence[Message]) -> list[int]:
        """Where each message's text ends, in characters of the rendered text (for showing who speaks)."""
        whole = len(self.render(messages))
        ends = []
        for i in range(len(messages)):
            try:
                ends.append(len(self.render(messages[: i + 1])))
            except Exception:  # a template may refuse half a conversation; the part is then shown with the next speaker
                ends.append(ends[-1] if ends else 0)
        return [*ends[:-1], whole]


def _difference(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{a[at : at + 40]!r} where the whole conversation has {b[at : at + 40]!r}"


def tokenizer_spec(tokenizer: Any, chat_template: str | None = None) -> TokenizerSpec:
    """What the encoder needs of a transformers tokenizer.

    Raises:
        ValueError: the tokenizer has no Rust backend, so tokens cannot be traced back to characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the tokenizer has no fast (Rust) version, which masks need: tokens without character offsets")
    template = chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerSpec(
        json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        variables={k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        eos_token=tokenizer.eos_token,
    )
