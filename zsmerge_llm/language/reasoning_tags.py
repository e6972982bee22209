"""How model families mark reasoning, and which variables of their chat templates set how much of it there is.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReasoningMode = Literal["off", "optional", "open"]
"""Whether a model reasons before it answers. `open`: the prompt has opened the reasoning already."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How much a model is to reason, in the words of OpenAI's and Anthropic's interfaces."""
WITHOUT_REASONING = ("none", "minimal")
LEVELS = ("low", "medium", "high")
"""The efforts that every template with a variable for them knows."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables of templates that switch reasoning on and off: Qwen, SmolLM3, GLM, Gemma; Granite, DeepSeek V3."""


class ReasoningTags(NamedTuple):
    """The texts around reasoning and, where a family marks that too, around the answer behind it."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""


THINK = ReasoningTags("<think>", "</think>")
HARMONY = ReasoningTags("<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>")
"""OpenAI's gpt-oss, as far as it can be said so; see `harmony`."""
FAMILIES = (
    HARMONY,
    ReasoningTags("<think>", "</think>", "<response>", "</response>"),  # Granite 3.3
    ReasoningTags("<think>", "</think>", "<answer>", "</answer>"),  # Hunyuan
    THINK,
    ReasoningTags("[THINK]", "[/THINK]"),  # Magistral
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command A
    ReasoningTags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ReasoningTags("<|channel>thought", "<channel|>"),  # Gemma 4
    ReasoningTags("◁think▷", "◁/think▷"),  # Kimi-VL
    ReasoningTags("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)
"""The more specific ones first."""


def control_tokens_of(tags: ReasoningTags) -> tuple[str, ...]:
    """Return the texts around reasoning and answers that may be tokens of their own."""
    if tags is HARMONY:
        names = ("start", "channel", "message", "constrain", "end", "call", "return")
        return tuple(f"<|{name}|>" for name in names)
    return tuple(tags)


def added_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of the added token that spells exactly `text`, if there is one."""
    return next((index for index, token in tokenizer.added_tokens_decoder.items() if token.content == text), None)


def reasoning_tags(template_source: str) -> ReasoningTags | None:
    """Return how a family marks reasoning, by the Jinja text of its chat template; None: it does not reason."""

    def is_named(tags: ReasoningTags) -> bool:
        return tags.close in template_source and tags.answer_open in template_source

    return next(filter(is_named, FAMILIES), None)


def reasoning_mode(tags: ReasoningTags | None, prompt: str) -> ReasoningMode:
    """Return how a model reasons behind a prompt, or the end of one.

    A template that writes empty reasoning there (`enable_thinking=False`) has the model answer at once.
    """
    if tags is None:
        return "off"
    end = prompt.rstrip()
    if end.endswith(tags.open):
        return "open"
    return "off" if end.endswith(tags.close) else "optional"


def without_reasoning(text: str) -> str:
    """Return an answer without reasoning in tags at its beginning, and without outer whitespace."""
    return _LEADING.sub("", text).strip()


_BLOCKS = (rf"{re.escape(tags.open)}.*?{re.escape(tags.close)}" for tags in FAMILIES if tags is not HARMONY)
_LEADING = re.compile(rf"\A\s*(?:{'|'.join(_BLOCKS)})", re.DOTALL)


def effort_args(template_source: str, effort: str | None) -> dict[str, Any]:
    """Return the variables with which a chat template asks for so much reasoning; {} where it knows none.

    Args:
        effort: one of `EFFORTS`; None: as the template does by itself.
    """
    if effort is None:
        return {}
    args: dict[str, Any] = {}
    if _reads(template_source, "reasoning_effort"):
        is_known = re.search(rf"[\"']{effort}[\"']", template_source) is not None
        nearest = LEVELS[0] if effort in WITHOUT_REASONING else LEVELS[-1]
        args["reasoning_effort"] = effort if is_known or effort in LEVELS else nearest
    switch = next((name for name in SWITCHES if _reads(template_source, name)), None)
    return args if switch is None else {**args, switch: effort not in WITHOUT_REASONING}


def _reads(template_source: str, name: str) -> bool:
    """Return whether a template's code, not only a text in it, names a variable."""
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template_source, re.DOTALL))
    return re.search(rf"(?<![\w.]){name}\b", re.sub(r"\"[^\"]*\"|'[^']*'", "", code)) is not None
