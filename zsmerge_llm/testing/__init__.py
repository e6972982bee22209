"""Test doubles for programs that use zsmerge-llm: no weights to load, no network.

`FakeLLM` answers from a script and records its requests. `tiny_llm` is a real `LLM` on a random model of two layers.
Importing this package imports neither torch nor transformers.
"""

from zsmerge_llm.testing.event_loop import event_loop_gaps
from zsmerge_llm.testing.fake_llm import FakeLLM, FakeRequest, scripted_answer
from zsmerge_llm.testing.tiny_model import byte_level_tokenizer, tiny_llm, tiny_model

__all__ = [
    "FakeLLM",
    "FakeRequest",
    "byte_level_tokenizer",
    "event_loop_gaps",
    "scripted_answer",
    "tiny_llm",
    "tiny_model",
]
