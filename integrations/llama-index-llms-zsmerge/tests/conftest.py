"""What the tests talk to: a stand-in for `zsmerge_llm.LLM`, a tiny random model, and a real one for the slow tests."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler

from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.types import Chunk, Result, Usage

NOTHING = Usage(1, 0, 1, 0, 0.0, 0.0, 0)


def _without(names: dict[str, Any], *others: str) -> dict[str, Any]:
    return {name: value for name, value in names.items() if name not in others}


class FakeLLM:
    """The surface of `zsmerge_llm.LLM`. Answers from a script (the last answer repeats) and writes down every call.

    `delay` is the time of one token in seconds; `produced` counts tokens generated. One request runs at a time.
    """

    def __init__(self, *answers: str | Result, delay: float = 0.0) -> None:
        self.model = "fake"
        self.cache = CacheConfig()
        self.answers = list(answers) or ["Paris is the capital."]
        self.delay = delay
        self.calls: list[SimpleNamespace] = []
        self.threads: set[int] = set()
        self.produced = 0
        self.closed = 0
        self.documents: dict[str, str] = {}
        self.read = 0
        self.warm = False
        self.probe: str | None = None
        self.error: Exception | None = None
        self.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(range(len(text.split()))))
        self._lock = threading.Lock()

    def chat(self, messages: Any, **options: Any) -> Result:
        return self._whole(self.stream(messages, **options))

    def complete(self, prompt: str, **options: Any) -> Result:
        return self._whole(self.stream_complete(prompt, **options))

    def stream(
        self,
        messages: Any,
        *,
        sampling=None,
        tools=None,
        tool_choice=None,
        parallel_tool_calls=True,
        response_format=None,
        grammar=None,
        session=None,
        probe=None,
        reread=False,
        cancel=None,
    ) -> Iterator[Chunk]:
        return self._stream(SimpleNamespace(kind="chat", prompt=messages, **_without(locals(), "self", "messages")))

    def stream_complete(
        self, prompt: str, *, sampling=None, response_format=None, grammar=None, cancel=None
    ) -> Iterator[Chunk]:
        return self._stream(SimpleNamespace(kind="complete", **_without(locals(), "self")))

    def warm_up(self) -> None:
        self.warm = True

    def read_document(self, *, text: str, name=None, probe=None, cancel=None) -> SimpleNamespace:
        with self._lock:
            name = name or f"document-{abs(hash(text)):x}"
            if name not in self.documents:
                time.sleep(self.delay)
                self.documents[name] = text
                self.read += 1
            self.probe = probe
            return SimpleNamespace(name=name)

    def _whole(self, chunks: Iterator[Chunk]) -> Result:
        seen = list(chunks)
        calls = [call for chunk in seen for call in chunk.tool_calls]
        last = seen[-1]
        text = "".join(chunk.text for chunk in seen)
        thought = "".join(chunk.reasoning for chunk in seen)
        return Result(text, last.finish_reason, last.usage, calls, last.invalid_tool_calls, thought)

    def _stream(self, call: SimpleNamespace) -> Iterator[Chunk]:
        with self._lock:
            self.calls.append(call)
            self.threads.add(threading.get_ident())
            if self.error is not None:
                raise self.error
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(answer, str):
                answer = Result(answer, "stop", NOTHING)
            text, tool_calls = answer.text, answer.tool_calls
            written, reason = 0, "tool_calls" if tool_calls else "stop"
            try:
                if answer.reasoning:
                    yield Chunk("", reasoning=answer.reasoning)
                for word in re.findall(r"\S+\s*", text):
                    if call.cancel is not None and call.cancel.is_set():
                        reason = "cancelled"
                        break
                    time.sleep(self.delay)
                    self.produced, written = self.produced + 1, written + 1
                    yield Chunk(word)
                yield Chunk("", reason, self._usage(call.prompt, written), tool_calls, answer.invalid_tool_calls)
            finally:
                self.closed += 1

    def _usage(self, prompt: Any, written: int) -> Usage:
        return Usage(
            prompt_tokens=len(str(prompt).split()),
            cached_tokens=2,
            completion_tokens=written,
            dropped_tokens=1,
            prefill_seconds=0.1,
            decode_seconds=0.2,
            cache_bytes=1024,
        )


@pytest.fixture
def fake() -> Callable[..., FakeLLM]:
    """Makes a FakeLLM: `fake("first answer", "second answer", delay=0.01)`."""
    return FakeLLM


@pytest.fixture
def result() -> Callable[..., Result]:
    """Makes a scripted answer with tool calls: `result("text", {"name": ..., "arguments": {...}})`."""

    def make(text: str, *functions: dict[str, Any], ids: bool = True) -> Result:
        calls = [
            {"type": "function", "function": function} | ({"id": f"id_{n}"} if ids else {})
            for n, function in enumerate(functions)
        ]
        return Result(text, "tool_calls", NOTHING, calls)

    return make


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition holds, for at most five seconds."""

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 5 seconds"
            time.sleep(0.005)

    return until


TEMPLATE = """{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == "system" else "You help." }}
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call> to call one.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% elif message.role == "assistant" %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif not (tools and loop.first and message.role == "system") %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Seen(BaseEventHandler):
    """Writes down the events of LlamaIndex, and what the models' answers cost."""

    names: list[str]
    usages: list[dict[str, Any]]

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.names.append(event.class_name())
        if event.class_name() == "LLMChatEndEvent":
            self.usages.append(event.response.raw["usage"])


@pytest.fixture
def seen() -> Iterator[Seen]:
    """All events while the test runs."""
    handler = Seen(names=[], usages=[])
    get_dispatcher().add_event_handler(handler)
    yield handler
    get_dispatcher().event_handlers.remove(handler)


CORPUS = """<tool_call>
{"name": "add", "arguments": {"a": 1, "b": 2}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"place": "Oslo", "unit": "celsius"}}
</tool_call>
{"name": "Oslo", "country": "Norway", "people": 700000}
the ship and the sea, the keeper of the light and the captain of the ship"""


@pytest.fixture(scope="session")
def tiny_parts() -> tuple[Any, Any]:
    """A random model of two layers and a tokenizer with a token for every byte. It says nonsense, always the same."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator([CORPUS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1_000_000,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@pytest.fixture
def tiny(tiny_parts: tuple[Any, Any]) -> LLM:
    """The random model, with a cache that nothing here uses up, and without memories of other tests."""
    model, tokenizer = tiny_parts
    return LLM(model, tokenizer=tokenizer, chat_template=TEMPLATE, cache=CacheConfig(slots=8192))
