"""Small tokenizers, the chat templates under data/templates, and a long chat to render with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.testing import byte_level_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "templates"
# by template: the token that ends an answer, and the other special tokens
SPECIAL_TOKENS = {
    "smollm2": ("<|im_end|>", ["<|im_start|>"]),
    "qwen2.5": ("<|im_end|>", ["<|im_start|>"]),
    "qwen3": ("<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral-v0.3": ("</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]),
    "mistral-nemo": ("</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]),
    "gemma2": ("<end_of_turn>", ["<start_of_turn>"]),
    "gemma3": ("<end_of_turn>", ["<start_of_turn>"]),
}
# templates with rules, for messages that they refuse or ignore
STRICT_TOKENS = {
    "mistral-v0.1": ("</s>", ["[INST]", "[/INST]"]),
    "llama2": ("</s>", ["[INST]", "[/INST]"]),
    "phi3": ("<|end|>", ["<|user|>", "<|assistant|>", "<|system|>"]),
    "deepseek": ("</s>", ["<|User|>", "<|Assistant|>", "<|call|>", "<|output|>"]),
    "qwen3.5": ("<|im_end|>", ["<|im_start|>"]),
}
# templates of models that reason before they answer
REASONING_TOKENS = {
    "deepseek-r1": ("</s>", ["<|User|>", "<|Assistant|>", "<|output|>", "<|output_end|>", "<think>", "</think>"]),
    "smollm3": ("<|im_end|>", ["<|im_start|>", "<think>", "</think>"]),
    "granite3.3": ("<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]),
    "gpt-oss": (
        "<|return|>",
        ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"],
    ),
    "magistral": ("</s>", ["[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]"]),
}
# templates that render earlier messages as they were first rendered
STABLE_TEMPLATES = ("smollm2", "qwen2.5", "llama3", "gemma3")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. How are you today? I am well, thank you.",
    '{"name": "weather", "arguments": {"place": "Zürich"}} user assistant system tool_call',
    "naïve café, größer, 中文字符, 日本語, emoji 🙂🚀 and more 🙂 text; stop STOP ### END\n\nuser: hello",
]


@cache
def byte_level(end: str = "</s>", special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer as in GPT-2, Llama 3 and Qwen."""
    return byte_level_tokenizer(CORPUS, ["<bos>", end, *special], 420, bos_token="<bos>", eos_token=end)


@cache
def sentencepiece(prefix_space: bool = True) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with ▁ for spaces and byte fallback: Llama 2 and Mistral, or (no prefix space) Gemma."""
    pieces = ["<unk>", "<bos>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)] + ["é", "中"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁", "▁"), ("o", "p"), ("s", "t"), ("st", "op")]
    pieces += ["".join(pair) for pair in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(" "), "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix_space else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="</s>", unk_token="<unk>")


def template(name: str, **settings: Any) -> ChatTemplate:
    """Return the template of that name, with a tokenizer that has its special tokens."""
    end, others = {**SPECIAL_TOKENS, **STRICT_TOKENS, **REASONING_TOKENS}[name]
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(byte_level(end, tuple(others)), text, **settings)


def tool_call(place: str, number: int) -> dict[str, Any]:
    """Return a tool call as callers send it: arguments as JSON text, an id of nine characters."""
    function = {"name": "weather", "arguments": json.dumps({"place": place})}
    return {"id": f"abcdefg{number:02d}", "type": "function", "function": function}


def generated_text(name: str, message: dict[str, Any]) -> str:
    """Return the text that a model of that family generates for an assistant message, without its end token."""
    calls = message.get("tool_calls", [])
    if not calls:
        return (" " if name == "mistral-v0.3" else "") + message["content"]
    name_and_arguments = [(c["function"]["name"], json.dumps(c["function"]["arguments"])) for c in calls]
    if name == "llama3":
        ((function, arguments),) = name_and_arguments
        return f'{{"name": "{function}", "parameters": {arguments}}}'
    if name.startswith("mistral"):
        entries = [
            f'{{"name": "{function}", "arguments": {arguments}, "id": "{one["id"]}"}}'
            for one, (function, arguments) in zip(calls, name_and_arguments, strict=True)
        ]
        return f"[TOOL_CALLS]{' ' if name == 'mistral-v0.3' else ''}[{', '.join(entries)}]"
    entries = [
        f'<tool_call>\n{{"name": "{function}", "arguments": {arguments}}}\n</tool_call>'
        for function, arguments in name_and_arguments
    ]
    return "\n".join(([message["content"]] if message["content"] else []) + entries)


def long_chat(turns: int = 12) -> list[list[dict[str, Any]]]:
    """Return the new messages of each request: system and user first; every third turn has a tool call and its result.

    Each entry but the first begins with the assistant's message that answered the request before.
    """
    steps: list[list[dict[str, Any]]] = [[{"role": "system", "content": "You are terse."}]]
    for turn in range(turns):
        steps[-1].append({"role": "user", "content": f"question-{turn:02d}: is it warm?"})
        if turn % 3 == 1:
            steps.append([{"role": "assistant", "content": None, "tool_calls": [tool_call(f"place-{turn:02d}", turn)]}])
            steps[-1].append({"role": "tool", "content": f"result-{turn:02d}", "tool_call_id": f"abcdefg{turn:02d}"})
        steps.append([{"role": "assistant", "content": f"answer-{turn:02d}, it is."}])
    return steps[:-1]
