"""A text of any length is read, so that nothing warns of its length."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_zsmerge import ChatZSMerge
from llama_index.llms.zsmerge import ZSMergeLLM
from transformers.utils import logging

from tests.support.chat import make_llm
from tests.support.templates import byte_level
from zsmerge_llm.models.loader import load_tokenizer

LONG = "a " * 500


def test_counting_and_reading_a_long_text_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm("smollm2")
    llm.tokenizer.model_max_length = 100
    logging.enable_propagation()
    try:
        chat = ChatZSMerge(llm=llm, max_tokens=2)
        assert chat.get_num_tokens(LONG) == len(ZSMergeLLM(llm=llm).tokenize(LONG)) == llm.count_tokens(LONG)
        assert chat.get_num_tokens_from_messages(chat._convert_input(LONG).to_messages()) > 500
        assert chat.invoke(LONG).usage_metadata
    finally:
        logging.disable_propagation()
    assert caplog.records == []


def test_the_tokenizer_of_a_loaded_model_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    found.model_max_length = 100
    logging.enable_propagation()
    try:
        assert len(found(LONG)["input_ids"]) > 100
    finally:
        logging.disable_propagation()
    assert caplog.records == []
