"""Messages to text and ids by the model's chat template. Imports nothing heavy.

Messages are dicts in the OpenAI format, from `normalize_messages`. What a template refuses, or would leave out
silently, is rendered in another form (`message_forms`): where it knows no tools, they go into the system message.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache, partial
from itertools import pairwise
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from zsmerge_llm.errors import ConfigError, InputError, MissingTemplateError
from zsmerge_llm.language.control_tokens import SEPARATOR, ControlTokens
from zsmerge_llm.language.digests import OWN_KEYS, DigestChain
from zsmerge_llm.language.long_text import LongText
from zsmerge_llm.language.message_forms import (
    calls_as_text,
    other_forms,
    with_text_arguments,
    with_tool_instructions,
)
from zsmerge_llm.language.messages import normalize_messages as normalize_messages
from zsmerge_llm.language.template_probe import TemplateProbe, TemplateRefusal
from zsmerge_llm.language.watchdog import TimeExceeded, Watchdog
from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HARMONY_CALL_END = "<|call|>"
"""What ends a call in gpt-oss's template, where text ends otherwise."""
MAX_RENDER_SECONDS = 20.0
"""How long a template may take: ten thousand messages take a second."""
Tools = Sequence[dict[str, Any]] | None
"""Tool definitions in the OpenAI format."""


class ChatTemplate:
    """One model's chat template, with everything that must not change during a conversation.

    Methods take messages from `normalize_messages`. A model without a template can have one of these too: completions
    (`encode_prompt`) need none.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: Jinja text, or the name of one of the tokenizer's templates, instead of its default.
        today: the date that templates with `strftime_now` print; None is the current one. Frozen here, so that a
            conversation renders the same tomorrow.
        args: further variables for the template, such as `{"enable_thinking": False}`.
        allow_control_tokens: whether text of messages and tools that spells a control token is read as one. By default
            only the template makes control tokens.

    Attributes:
        model_args: `args` without those of one request.
        history_args: the part of `args` that changes how messages are written.
        header_args: the rest, of one request: it changes the header of the answer alone (`request_args`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        today: date | None = None,
        args: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.today = today or date.today()
        self.args = dict(args or {})
        self._control_tokens = None if allow_control_tokens else ControlTokens(tokenizer)
        self._check: Callable[[], None] = lambda: None
        self._long_text = LongText(tokenizer)
        self._watchdog = Watchdog()
        self._probes: dict[str, TemplateProbe] = {}  # by the text of a template and its variables
        self.model_args = self.history_args = self.args
        self.header_args: dict[str, Any] = {}

    def with_date(self, today: date) -> ChatTemplate:
        """Return the same template with another date."""
        template = copy.copy(self)
        template.today = today
        return template

    def with_check(self, check: Callable[[], None]) -> ChatTemplate:
        """Return the same template, which calls `check` before each piece of a long text that it tokenizes.

        What that raises ends the work.
        """
        template = copy.copy(self)
        template._check = check
        return template

    def source(self, tools: Tools = None) -> str:
        """Return the Jinja text in use, with `strftime_now("…")` replaced by the frozen date.

        Raises:
            MissingTemplateError: the model has none.
        """
        try:
            text = self.tokenizer.get_chat_template(self.chat_template, tools=list(tools) if tools else None)
        except ValueError as error:
            raise MissingTemplateError(
                "This model has no chat template, so it cannot take messages: use LLM.complete with plain text, choose "
                "an instruct model, or pass chat_template= (Jinja text)."
            ) from error
        # transformers turns callables among the variables into text, so the clock can only be stopped in the source
        stamp = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        return re.sub(stamp, lambda found: json.dumps(self.today.strftime(found[2])), text)

    def render(self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = True) -> str:
        """Return the conversation as the text that the model reads, special tokens included. It is for `encode` alone.

        Control tokens that messages or tools spell have separators in them. Messages that the template refuses are
        rendered in the closest form that it accepts.

        Raises:
            InputError: the template refuses every form (its own message about the first is passed on), fails or does
                not end.
            MissingTemplateError: the model has none.
            ConfigError: the template is no valid Jinja.
        """
        source = self.source(tools)
        given, offered = _with_notes(messages), validate_tools(tools)
        if ".thinking" in source:
            given = [_with_thinking(message) for message in given]
        if self._control_tokens is not None:
            given = [self._control_tokens.guard_message(message) for message in given]
            offered = self._control_tokens.guard_values(offered)
        probe, arguments = self._probe(source), "objects"
        if offered and not probe.shows_tools:
            given, offered = with_tool_instructions(given, offered), None
        if any("tool_calls" in message or message["role"] == "tool" for message in given):
            arguments = probe.call_arguments or ""
            given = given if arguments else calls_as_text(given)
        refusals = []
        for form in other_forms(given):
            if not probe.leaves_out(form, given):
                try:
                    form = with_text_arguments(form) if arguments == "text" else form
                    return self._apply(source, form, offered, add_generation_prompt)
                except TemplateRefusal as refusal:
                    refusals.append(refusal)
        raise refusals[0]

    def _probe(self, source: str) -> TemplateProbe:
        key = f"{self.args}{source}"
        if key not in self._probes:
            self._probes[key] = TemplateProbe(source, partial(self._apply, source, prompt=False))
        return self._probes[key]

    def _apply(self, source: str, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        from jinja2 import TemplateSyntaxError

        settings = {"chat_template": source, "add_generation_prompt": prompt, "tokenize": False, **self.args}
        check_jinja(source)
        try:
            with self._watchdog.limit(MAX_RENDER_SECONDS):
                return cast(str, self.tokenizer.apply_chat_template(messages, tools=cast(Any, tools), **settings))
        except (TemplateSyntaxError, SyntaxError) as error:
            raise ConfigError(
                f"The chat template is not valid Jinja ({error}): pass another as chat_template=."
            ) from error
        except TimeExceeded as error:
            raise InputError(
                f"The chat template did not end within {MAX_RENDER_SECONDS:g} s: pass another as chat_template=."
            ) from error
        except Exception as error:  # a template is a program, and may fail in any way
            raise TemplateRefusal(
                f"The model's chat template refuses these messages: {error} "
                "Change them accordingly, or pass another template as chat_template=."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of rendered text. Nothing is added: a template writes its own BOS.

        Raises:
            InputError: no valid Unicode. ContextLimitError: as `LongText.pieces`.
        """
        _check_text(text)
        ids: list[int] = []
        for piece in self._long_text.pieces(text):
            self._check()
            if self._control_tokens is not None and SEPARATOR in piece:
                ids += self._control_tokens.encode(piece)
            else:
                ids += self._ids(piece, add_special_tokens=False)
        return ids

    def guard(self, text: str) -> str:
        """Return a message's text as `render` passes it on: with separators in what spells a control token."""
        return text if self._control_tokens is None else self._control_tokens.guard(text)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of text that a message holds."""
        return self.encode(self.guard(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a plain prompt, with the special tokens that this tokenizer adds by itself."""
        _check_text(text)
        first, *others = self._long_text.pieces(text)
        if not others:
            return self._ids(text, add_special_tokens=True)
        whole, ids = (self._ids(first, add_special_tokens=added) for added in (True, False))
        before = next(at for at in range(len(whole)) if whole[at : at + len(ids)] == ids)
        suffix = whole[before + len(ids) :]
        for piece in others:
            self._check()
            ids += self._ids(piece, add_special_tokens=False)
        return [*whole[:before], *ids, *suffix]

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return cast(
            "list[int]", self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        )

    def count(self, messages: Sequence[Message], tools: Tools = None) -> int:
        """Count the tokens of messages as a prompt or, where the template refuses such a part, of their plain text."""
        answered = messages[-1]["role"] == "assistant"
        try:
            text = self.render(messages, tools, add_generation_prompt=not answered)
        except InputError:
            text = self.guard("\n".join(f"{message['role']}: {message['content']}" for message in messages))
        return len(self.encode(text))

    def delta(
        self, messages: Sequence[Message], n: int, tools: Tools = None, add_generation_prompt: bool = True
    ) -> str:
        """Return what follows the generated content of `messages[n-1]`: its closing tokens, `messages[n:]`, the next
        header.

        Correct also where the template renders earlier messages differently now than when they were read: only what
        follows that content is returned. Its first token is usually the one that the model ended its answer with.

        Raises:
            InputError: `messages[n-1]` is not the assistant's, or the template refuses these messages.
        """
        if not 0 < n <= len(messages) or messages[n - 1]["role"] != "assistant":
            raise InputError(f"messages[{n - 1}] is not an answer of the assistant, so nothing can follow it.")
        whole = self.render(messages, tools, add_generation_prompt)
        first = None
        for ending in self._endings(list(messages), n, tools, add_generation_prompt):
            if whole.endswith(ending):
                return ending
            first = first or ending
        if first is None:
            raise InputError(
                f"The chat template does not show where messages[{n - 1}] ends: pass another as chat_template=."
            )
        return first

    def _endings(self, messages: list[Message], n: int, tools: Tools, prompt: bool) -> Iterator[str]:
        """Yield candidates for `delta`, the most reliable first: what follows a marker in the answer's place."""
        marker = uuid.uuid4().hex
        plain: Message = {"role": "assistant", "content": marker}
        yield from self._after(marker, [*messages[: n - 1], plain, *messages[n:]], tools, prompt)
        if not (calls := messages[n - 1].get("tool_calls")):
            return
        # Some templates want results to follow calls: mark the last call's arguments, and skip the rest of its JSON
        function = {**calls[-1]["function"], "arguments": {marker: marker}}
        marked = {**messages[n - 1], "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
        closes = self._after(marker, [{"role": "user", "content": "-"}, plain], None, False)
        for close in (*closes, HARMONY_CALL_END):
            for ending in self._after(marker, [*messages[: n - 1], marked, *messages[n:]], tools, prompt):
                if close and close in ending:
                    yield ending[ending.index(close) :]

    def _after(self, marker: str, messages: list[Message], tools: Tools, prompt: bool) -> Iterator[str]:
        try:
            _, found, ending = self.render(messages, tools, prompt).rpartition(marker)
        except InputError:
            return
        if found:
            yield ending

    def digest_chain(self, tools: Tools = None, extra: Any = None) -> DigestChain:
        """Return the digests of no messages with these tools, `args` and `extra` (JSON): `of` gives those of some.

        Variables that change the header of an answer alone are left out.
        """
        allowing = ["control tokens"] if self._control_tokens is None else []
        return DigestChain.start([validate_tools(tools), self.history_args, extra, *allowing])

    def digests(self, messages: Sequence[Message], tools: Tools = None, extra: Any = None) -> list[str]:
        """Return one digest per prefix: entry i stands for `messages[:i]` with these tools, `args` and `extra`."""
        return self.digest_chain(tools, extra).of(messages).digests


def validate_tools(tools: Tools) -> list[dict[str, Any]] | None:
    """Return OpenAI tool definitions; None for an empty list, which some templates would take for tools."""
    if not isinstance(tools, (list, tuple, NoneType)):
        raise InputError(f"tools must be a list of definitions, not a {type(tools).__name__}.")
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            raise InputError(f"tools[{index}] must have the form {form}.")
    return list(tools) if tools else None


@lru_cache(maxsize=16)
def check_jinja(source: str) -> None:
    """Refuse a template that takes powers: of large numbers, they take for ever, and nothing can stop them.

    Raises:
        ConfigError: names the operator.
    """
    from jinja2 import Environment, TemplateError

    try:
        found = [text for _, kind, text in Environment().lex(source) if kind not in ("whitespace", "data")]
    except (TemplateError, RecursionError):
        return  # the template will be refused for it
    if any(text == "**" and before not in ("(", ",") for before, text in pairwise(found)):
        raise ConfigError("The chat template takes powers (**), which may never end: pass another as chat_template=.")


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"Text must be a string, not a {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The text is not valid Unicode ({error}): decode it with errors='replace'.") from error


def _with_notes(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with their notes at their ends."""
    return [
        {**{key: message[key] for key in message if key not in OWN_KEYS}, "content": _content_with_note(message)}
        for message in messages
    ]


def _with_thinking(message: Message) -> Message:
    """Return a message with its reasoning in `thinking` too, where gpt-oss's template looks; not beside text."""
    reasoning = message.get("reasoning_content")
    return {**message, "thinking": reasoning} if reasoning and not message["content"] else message


def _content_with_note(message: Message) -> str:
    return f"{message['content']}\n\n{message['note']}" if message.get("note") else cast(str, message["content"])
