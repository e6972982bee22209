"""Plans: what is counted, what fits, and what is proposed where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.planning.test_shape import held
from tests.support.gguf_writer import random_model, write_gguf
from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.attention.static_states import StaticState
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.model_runner import STEP_TOKENS
from zsmerge_llm.errors import ConfigError, ModelNotFoundError
from zsmerge_llm.models.description import describe
from zsmerge_llm.models.loader import load
from zsmerge_llm.planning import decode_step, planner
from zsmerge_llm.planning.planner import Plan, plan
from zsmerge_llm.planning.sizes import format_bytes

CACHE = CacheConfig(slots=256)


def make(model: Any = None, **settings: Any) -> Plan:
    """Plan a tiny model on the CPU in float32."""
    return plan(model or tiny_model(), **{"cache": CACHE, "dtype": "float32", "device": "cpu", **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without a tokenizer."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_plan_adds_up_and_leaves_the_rest_as_headroom() -> None:
    made = make(sessions=3, memory="4GiB")
    parts = (made.weights_nbytes, made.runtime_nbytes, 3 * made.cache_nbytes, made.turn_nbytes, made.workspace_nbytes)
    assert made.total_nbytes == sum(parts)
    assert made.headroom_nbytes == 4 * 2**30 - made.total_nbytes
    assert made.fits
    assert made.remedy is None


def test_its_cache_is_the_engines() -> None:
    engine = Engine(tiny_model(), CACHE, compile=False)
    cache = engine.new_cache()
    engine.read(cache, [5])
    assert make().cache_nbytes == cache.nbytes


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "lfm2"])
def test_states_of_recurrent_layers_behind_pending_tokens_are_counted_on_a_gpu(family: str) -> None:
    model = tiny_model(family)
    recurrent = Engine(model, CACHE, compile=False).layers.recurrent
    states = [StaticState(spec, 1, STEP_TOKENS) for spec in recurrent]
    pending = sum(each.nbytes for state in states for each in state.pending)
    made, on_host = make(model, device="cuda", memory="4GiB"), make(model, memory="4GiB")

    assert (pending > 0) is (family != "llama")
    assert made.turn_nbytes == 4 * made.cache_nbytes + pending
    assert on_host.turn_nbytes == 2 * on_host.cache_nbytes
    assert made.states_nbytes == sum(state.counted.nbytes for state in states)


def test_what_does_not_fit_names_the_largest_slots_and_sessions_that_do() -> None:
    fits = make(sessions=8)
    memory = fits.total_nbytes
    too_many = make(sessions=20, memory=memory)
    assert not too_many.fits
    assert too_many.remedy is not None
    assert "8 sessions of these slots" in too_many.remedy
    slots = int(too_many.remedy.partition("slots=")[2].partition(" ")[0])
    assert make(sessions=20, memory=memory, cache=CacheConfig(slots=slots)).fits
    assert not make(sessions=20, memory=memory, cache=CacheConfig(slots=slots + 1)).fits


def test_a_quantization_that_fits_is_named() -> None:
    model = tiny_model(vocab=50_000)
    packed = make(model, quantization="int8").total_nbytes
    remedy = make(model, memory=packed).remedy
    assert remedy is not None
    assert "quantization='int8'" in remedy


def test_where_nothing_fits_that_is_said() -> None:
    made = make(memory="1MB")
    assert made.remedy is not None
    assert "use a smaller model or more memory" in made.remedy
    assert "does not fit" in str(made)


def test_memory_that_cannot_be_told_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "device_memory", lambda device: None)
    made = make(sessions=10**6)
    assert made.fits
    assert made.headroom_nbytes is None
    assert "unknown" in str(made)


def test_another_machines_device_can_be_planned_for_if_its_memory_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match="not available"):
        make(device="cuda", dtype="auto")
    made = make(device="cuda", dtype="auto", memory="16GiB")
    assert (made.device, made.dtype, made.runtime_nbytes) == ("cuda", "bfloat16", planner.DEVICE_RUNTIME)


def test_the_exact_cache_is_planned_at_its_context_window() -> None:
    made = make(cache=CacheConfig.full())
    assert made.full_cache_nbytes is not None
    assert made.cache_nbytes >= made.full_cache_nbytes
    assert "exact" in str(made)


def test_a_folder_is_planned_as_it_is_loaded(folder: Path) -> None:
    made = make(folder)
    assert made.weights_nbytes == held(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert made.weights_mapped
    assert not make(folder, dtype="bfloat16").weights_mapped


def test_a_folder_that_is_quantized_already_counts_as_it_is_stored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    save_file({"a": torch.zeros(64, 8, dtype=torch.float8_e4m3fn), "b": torch.zeros(9)}, folder / "model.safetensors")
    assert make(folder).weights == {"fp8": 512, "float32": 36}


def test_a_gguf_file_is_planned_before_it_is_converted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    planned = plan(path, cache=CACHE, dtype="float32", device="cpu", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    model = load(path, dtype="float32", device="cpu", cache_dir=tmp_path / "cache").model
    assert planned.weights_nbytes == held(model)
    assert planned.cache_nbytes == plan(model, cache=CACHE, dtype="float32", device="cpu").cache_nbytes
    assert describe(path, tmp_path / "cache").stored is not None


def test_an_unknown_model_and_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        make("./no such model")
    with pytest.raises(ConfigError, match="at least 1"):
        make(sessions=0)
    with pytest.raises(ConfigError, match="fp8"):
        make(quantization="fp8")
    with pytest.raises(ConfigError, match="size"):
        make(memory="much")


def test_the_decode_step_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (make().decode_step, make(compile=False).decode_step) == ("compiled", "eager")
    assert "eager until then" in make().reason
    assert "while loading" in make(compile=True).reason
    on_gpu = make(device="cuda", dtype="auto", memory="8GiB", quantization="nf4")
    assert (on_gpu.decode_step, on_gpu.chunk) == ("captured", 2048)
    assert "experts" in make(tiny_model("gpt_oss-sinks")).reason
    monkeypatch.setattr(decode_step, "find_compiler", lambda: None)
    assert "no C++ compiler" in make().reason


def test_a_plan_is_written_as_json() -> None:
    made = json.loads(json.dumps(make(memory="4GiB").to_dict()))
    assert made["total_nbytes"] + made["headroom_nbytes"] == 4 * 2**30
    assert made["fits"] is True


def test_sizes_are_written_in_binary_units() -> None:
    assert [format_bytes(size) for size in (12, 2048, 3 * 2**29, -(2**20))] == [
        "12 B",
        "2.0 KiB",
        "1.5 GiB",
        "-1.0 MiB",
    ]
