"""Packages on disk: used by later processes, never trusted unseen, and never in the way of an answer."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.cpu import compiled_steps, native, package_process, packaged_layers
from zsmerge_llm.cpu.builder_lock import lock_package, unlock
from zsmerge_llm.cpu.compiled_steps import CompiledSteps
from zsmerge_llm.cpu.decoder_layers import decoder_layers
from zsmerge_llm.cpu.package_builder import export_layer, prepared
from zsmerge_llm.cpu.package_key import package_key
from zsmerge_llm.cpu.package_process import PackageProcess, package_job
from zsmerge_llm.cpu.quantized_linear import quantize_model
from zsmerge_llm.cpu.step_capture import step_forms
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS

ALL_FORMS = True
FORMS = step_forms(MAX_DRAFT_TOKENS)
WATCH = CompiledSteps.watch
"""As it is, before the tests' own settings."""
INDUCTOR = ("torch._inductor.compile_fx", "torch._inductor.codecache", "torch._inductor.graph")


def steps_of(engine: Engine) -> CompiledSteps:
    backend: Any = engine.backend
    return backend.compiled


def logits(engine: Engine) -> torch.Tensor:
    """Return the logits of some decode steps."""
    cache = engine.new_cache(CacheConfig.full())
    engine.read(cache, tokens(12))
    return torch.stack([engine.read(cache, [token]) for token in tokens(6, seed=1)])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with one package, of `tiny_model()`: a copy of this machine's, made where it is missing."""
    engine, folder = Engine(tiny_model(), compile=True), tmp_path_factory.mktemp("built")
    assert steps_of(engine).enabled, engine.backend.disabled_reason
    made = steps_of(engine).folder
    shutil.copytree(made, folder / "decode-steps" / made.name)
    return folder


@pytest.fixture
def packages(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, which this test uses: the folder of its package. Nothing is made of its own accord."""
    shutil.copytree(built, tmp_path / "cache")
    monkeypatch.setattr("zsmerge_llm.cpu.step_package.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(CompiledSteps, "watch", WATCH)
    return next(path for path in (tmp_path / "cache" / "decode-steps").iterdir() if path.is_dir())


@pytest.fixture
def one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile steps of one token only, a third of the work."""
    monkeypatch.setattr("zsmerge_llm.cpu.compiled_steps.step_forms", lambda num_draft: FORMS[:1])


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Lets no process be started; holds the jobs that would have been."""
    jobs: list[object] = []

    def refuse(job: object) -> None:
        jobs.append(job)
        raise OSError("no process in this test")

    monkeypatch.setattr(compiled_steps, "PackageProcess", refuse)
    return jobs


SECOND_PROCESS = """
import sys, time, torch
from tests.support.tiny_models import tiny_model
from zsmerge_llm.engine.engine import Engine
model = tiny_model()
start = time.perf_counter()
engine = Engine(model, compile={compile!r})
cache = engine.new_cache()
engine.read(cache, [3])
print(engine.backend.decode_step, any(name in sys.modules for name in {inductor!r}), time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, "auto", False])
def test_a_second_process_uses_the_package_from_its_first_token_without_inductor(compile: object) -> None:
    assert steps_of(Engine(tiny_model(), compile=True)).enabled

    code = SECOND_PROCESS.format(compile=compile, inductor=INDUCTOR)
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    step, has_inductor, _ = output.split()
    assert step == ("eager" if compile is False else "compiled")
    assert has_inductor == "False"


def test_an_engine_finds_the_package_before_it_decodes(packages: Path) -> None:
    assert steps_of(Engine(tiny_model())).enabled
    assert steps_of(Engine(tiny_model(seed=5))).enabled  # the values of weights do not matter
    assert not steps_of(Engine(tiny_model(), compile=False)).enabled


def damage_file(folder: Path) -> None:
    file = next(folder.glob("*.pt2"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_file(folder: Path) -> None:
    file = next(folder.glob("*.pt2"))
    file.write_bytes(file.read_bytes()[:100])


def remove_file(folder: Path) -> None:
    next(folder.glob("*.pt2")).unlink()


def link_file(folder: Path) -> None:
    file = next(folder.glob("*.pt2"))
    other = file.rename(folder.parent / "elsewhere.pt2")
    file.symlink_to(other)


def change(**values: object) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return run


def empty_manifest(folder: Path) -> None:
    folder.joinpath("manifest.json").write_text("")


def no_manifest(folder: Path) -> None:
    folder.joinpath("manifest.json").unlink()


def open_to_others(folder: Path) -> None:
    folder.chmod(0o777)


def open_parent_to_others(folder: Path) -> None:
    folder.parent.chmod(0o777)


BAD = {
    "a changed file": damage_file,
    "a cut file": cut_file,
    "a missing file": remove_file,
    "a linked file": link_file,
    "an empty manifest": empty_manifest,
    "no manifest": no_manifest,
    "another machine's": change(key="0" * 64),
    "files outside": change(files={"../single-0.pt2": "0"}),
    "other layers": change(kinds=[0]),
    "no kinds": change(kinds=["x", None]),
    "no steps": change(forms=[{}]),
    "a folder that others write to": open_to_others,
    "a parent that others write to": open_parent_to_others,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_package_is_not_used_and_named_in_one_line(
    case: str, packages: Path, no_process: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(Engine(tiny_model(), compile=False))
    BAD[case](packages)

    with caplog.at_level(logging.WARNING):
        engine = Engine(tiny_model())

    assert not steps_of(engine).enabled
    assert torch.equal(logits(engine), expected)
    assert caplog.text.count("is not used") == 1


def test_a_package_for_other_shapes_never_reaches_native_code(packages: Path, no_process: list[object]) -> None:
    path = packages / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["forms"][0]["weights"][0][0]["shape"][0] += 1
    path.write_text(json.dumps(manifest))

    assert not steps_of(Engine(tiny_model())).enabled


def test_a_package_that_computes_something_else_is_thrown_away_and_made_again(
    packages: Path, no_process: list[object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(Engine(tiny_model(), compile=False))
    monkeypatch.setattr(packaged_layers, "TOLERANCE", {torch.float32: -1.0})
    engine = Engine(tiny_model())
    assert steps_of(engine).enabled

    with caplog.at_level(logging.WARNING):
        found = logits(engine)

    assert torch.allclose(found, expected, atol=1e-5)
    assert not packages.exists()
    assert caplog.text.count("is made again") == 1
    list(engine.stream(engine.new_cache(), tokens(5), SamplingParams(max_tokens=20, ignore_eos=True, lookup=False)))
    assert len(no_process) == 1


def test_a_package_that_was_wrong_twice_is_made_by_no_later_process(
    packages: Path, no_process: list[object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packages.with_name("whole")
    shutil.copytree(packages, whole)
    monkeypatch.setattr(packaged_layers, "TOLERANCE", {torch.float32: -1.0})
    for _ in range(2):
        engine = Engine(tiny_model())
        assert steps_of(engine).enabled
        logits(engine)
        assert not packages.exists()
        shutil.copytree(whole, packages)
    monkeypatch.undo()
    monkeypatch.setattr("zsmerge_llm.cpu.step_package.cache_folder", lambda: packages.parents[1])
    monkeypatch.setattr(CompiledSteps, "watch", WATCH)

    later = Engine(tiny_model())
    list(later.stream(later.new_cache(), tokens(5), SamplingParams(max_tokens=20, ignore_eos=True, lookup=False)))

    assert not steps_of(later).enabled
    assert no_process == []
    record = packages.with_suffix(".mismatches")
    assert str(record) in str(later.backend.disabled_reason)
    record.unlink()
    assert steps_of(Engine(tiny_model())).enabled


@pytest.mark.slow
@pytest.mark.usefixtures("one_form")
def test_decoding_goes_on_while_a_package_is_made_and_then_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsmerge_llm.cpu.step_package.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(CompiledSteps, "watch", WATCH)
    monkeypatch.setattr(compiled_steps, "POLL_SECONDS", 0.0)
    engine, cache = Engine(tiny_model()), None
    limit, steps = time.monotonic() + 300, 0
    while not steps_of(engine).enabled and time.monotonic() < limit:
        cache = cache or engine.new_cache(CacheConfig.full())
        engine.read(cache, [1 + steps % 50])
        steps += 1
        time.sleep(0.01)
        assert engine.backend.disabled_reason is None

    assert steps > compiled_steps.COMPILE_AFTER + 10
    assert torch.allclose(logits(engine), logits(Engine(tiny_model(), compile=False)), atol=1e-4)
    assert not list((tmp_path / "decode-steps").glob(".building-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_form")
def test_a_cache_folder_that_cannot_be_used_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.joinpath("cache").write_text("a file, where there should be a folder")
    monkeypatch.setattr("zsmerge_llm.cpu.step_package.cache_folder", lambda: tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        engine = Engine(tiny_model(), compile=True)

    assert steps_of(engine).enabled, engine.backend.disabled_reason
    assert caplog.text.count("are not kept") == 1
    assert not steps_of(engine).folder.parent.exists()


@pytest.mark.parametrize("where", ["exit 3", "raise OSError('No space left on device')", "os.kill(os.getpid(), 9)"])
def test_a_compiler_process_that_fails_leaves_nothing_and_is_named_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = {"exit 3": "import sys; sys.exit(3)"}.get(where, f"import os; {where}")
    real = subprocess.Popen
    monkeypatch.setattr(
        package_process.subprocess, "Popen", lambda command, **how: real([command[0], "-c", code], **how)
    )
    monkeypatch.setattr("zsmerge_llm.cpu.step_package.cache_folder", lambda: tmp_path)
    with caplog.at_level(logging.WARNING):
        engine = Engine(tiny_model(), compile=True)

    assert engine.backend.disabled_reason is not None
    assert torch.allclose(logits(engine), logits(Engine(tiny_model(), compile=False)), atol=1e-4)
    assert caplog.text.count("without compiled layers") == 1
    assert not list((tmp_path / "decode-steps").glob("*/manifest.json"))


def test_a_package_that_another_process_makes_is_awaited_and_used(packages: Path, no_process: list[object]) -> None:
    made, lock = packages.rename(packages.parent / "elsewhere"), lock_package(packages)
    found: list[Engine] = []
    thread = Thread(target=lambda: found.append(Engine(tiny_model(), compile=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_steps, "PackageProcess", PackageProcess)
        thread.start()
        thread.join(2)
        assert thread.is_alive()
        made.rename(packages)
        unlock(lock)
        thread.join()

    assert steps_of(found[0]).enabled
    assert no_process == []


def test_a_package_that_another_process_has_failed_to_make_is_made_here(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(packages)
    jobs: list[object] = []

    def start(job: object) -> None:
        jobs.append(job)
        raise [BlockingIOError("locked"), OSError("no process in this test")][len(jobs) - 1]

    monkeypatch.setattr(compiled_steps, "PackageProcess", start)
    engine = Engine(tiny_model(), compile=True)

    assert engine.backend.disabled_reason == "OSError: no process in this test"
    assert jobs[0] is jobs[1]


def test_a_model_whose_layers_cannot_be_told_decodes_without(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(tiny_model(), compile=False)
    engine.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING):
        engine.backend.start()

    assert "hooks" in str(engine.backend.disabled_reason)
    assert caplog.text.count("without compiled layers") == 1
    assert native.is_built(native.DECODE_SOURCES)


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_products_that_share_an_input_are_one_call(form: int) -> None:
    native.build()
    engine = Engine(tiny_model(), compile=False)
    layers = decoder_layers(engine.model, len(engine.specs))
    job = package_job(engine.model, layers, FORMS, "", Path(), 0)
    (kind,) = job.kinds
    with prepared({kind.first}):
        exported = export_layer(kind.first, kind.calls[form], job.manifest.forms[form])

    calls = [node for node in exported.graph.nodes if node.target is torch.ops.zsmerge.gemv.default]
    assert [node.args[2] for node in calls] == [3, 1, 2, 1]  # q, k, v; o; gate, up; down


# -- keys --------------------------------------------------------------------------------------------------------------


def key(model: Any) -> str:
    return package_key(model, decoder_layers(model, model.config.num_hidden_layers), FORMS)


def quantized(bits: int) -> Any:
    model = tiny_model(hidden_size=128, intermediate_size=192)
    quantize_model(model, bits, torch.float32)
    return model


def with_constant() -> Any:
    model = tiny_model()
    model.model.layers[1].self_attn.scaling = 0.125
    return model


def with_adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model


def test_models_with_other_code_have_other_keys() -> None:
    models = [
        *(tiny_model(), tiny_model(intermediate_size=96), tiny_model(dtype=torch.bfloat16), tiny_model("qwen2")),
        *(tiny_model(hidden_size=128, intermediate_size=192), quantized(4), quantized(8)),
        *(tiny_model(rope_theta=77), with_constant(), with_adapter()),
    ]
    keys = [key(model) for model in models]
    assert len(set(keys)) == len(keys)


def test_equal_models_with_other_weights_or_from_elsewhere_have_one_key() -> None:
    other = tiny_model(seed=3)
    other.config._name_or_path = "elsewhere"
    assert key(other) == key(tiny_model())


def test_an_engine_that_has_started_does_not_change_the_key() -> None:
    engine = Engine(tiny_model(), compile=False)
    before = key(engine.model)
    engine.backend.start()
    assert key(engine.model) == before


def test_another_version_or_processor_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    keys = {key(model)}
    monkeypatch.setattr(native, "library_name", lambda sources: "another")
    keys.add(key(model))
    monkeypatch.setattr("zsmerge_llm.cpu.package_key.version", lambda name: "0")
    keys.add(key(model))
    assert len(keys) == 3
