"""`LLM.explain`: planned before the model is loaded, measured afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.chat import SHORT, SMALL_CACHE, make_llm
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM
from zsmerge_llm.attention.backend import TorchBackend
from zsmerge_llm.errors import UnsupportedModelError


def test_it_says_the_same_before_and_after_loading() -> None:
    llm = make_llm(compile=False)
    before = llm.explain()
    assert not llm.loaded
    assert llm.engine is not None
    after = llm.explain()
    assert (before.loaded, after.loaded) == (False, True)
    for name in ("weights_nbytes", "slots", "cache_nbytes", "workspace_nbytes", "full_cache_nbytes", "decode_step"):
        assert getattr(before, name) == getattr(after, name), name
    assert before.conversations_in_memory is None


def test_the_cache_it_names_is_the_engines() -> None:
    llm = make_llm()
    llm.chat("Who keeps the lighthouse?", sampling=SHORT)
    cache = llm.store.get(next(iter(llm.store)).name).head.cache
    assert llm.explain().cache_nbytes == cache.clone().nbytes  # with its free slots


def test_it_counts_conversations_in_memory_and_on_disk(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    for name in ("a", "b"):
        llm.chat(f"I am {name}.", session=name, sampling=SHORT)
    again = make_llm(sessions_dir=tmp_path)
    again.chat("I am c.", session="c", sampling=SHORT)
    found = again.explain()
    assert (found.conversations_in_memory, found.conversations_on_disk) == (1, 2)
    assert found.conversations_nbytes == again.store.nbytes


def test_it_is_frozen_and_readable() -> None:
    found = make_llm().explain()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.slots = 1  # type: ignore[misc]
    text = str(found)
    assert "not loaded yet" in text
    assert f"{SMALL_CACHE.slots} slots" in text
    assert "decode step" in text


def test_it_names_the_threads_of_a_pass_once_the_model_is_loaded() -> None:
    llm = make_llm()
    assert llm.explain().threads is None
    llm.chat("Hello", sampling=SHORT)
    assert llm.explain().threads in range(1, torch.get_num_threads() + 1)
    assert "\nthreads" in str(llm.explain())


def test_it_names_the_decode_step_and_why() -> None:
    steps = {compile: make_llm(compile=compile) for compile in (False, "auto")}
    for llm in steps.values():
        assert llm.engine.backend.decode_step == "eager"
    assert steps[False].explain().reason == "compile=False"
    left = steps["auto"].engine.backend.steps_until_start
    assert steps["auto"].explain().reason == f"compiled after {left} more tokens"


def test_it_quotes_why_layers_could_not_be_compiled() -> None:
    llm = make_llm()
    backend: Any = llm.engine.backend
    backend.compiled.disable(UnsupportedModelError("This layer is strange."))
    found = llm.explain()
    assert found.decode_step == "eager"
    assert "This layer is strange." in found.reason
    assert backend.steps_until_start is None


@pytest.mark.slow
def test_a_started_backend_decodes_through_compiled_layers() -> None:
    llm = make_llm(compile=False)
    llm.engine.backend.start()
    assert (llm.explain().decode_step, llm.explain().reason) == ("compiled", "ready")
    assert TorchBackend().decode_step == "eager"


def test_a_model_object_is_explained_without_a_tokenizer() -> None:
    assert LLM(tiny_model(), compile=False).explain().dtype == "float32"
