"""A probe is a question and what the template writes behind it, and nothing of what it writes before."""

from __future__ import annotations

import pytest

from tests.support.templates import SPECIAL_TOKENS, STRICT_TOKENS, template
from zsmerge_llm.retrieval.query_probe import chat_probe


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS, *STRICT_TOKENS])
def test_a_probe_ends_with_the_header_of_the_answer_alone(name: str) -> None:
    made = template(name)
    text = made.tokenizer.decode(chat_probe(made, "Where is it?"))
    prompt = made.render([{"role": "user", "content": "Where is it?"}])
    assert text.startswith("Where is it?")
    assert prompt.endswith(text)
    assert "<bos>" not in text
