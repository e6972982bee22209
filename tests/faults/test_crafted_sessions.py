"""A session file that somebody made on purpose is refused by a typed error, or does no harm."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.faults.crafted_sessions import Crafted, Parts, crafted
from tests.support.chat import SMALL_CACHE, Chat, make_llm
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig, SamplingParams, Session
from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError
from zsmerge_llm.sessions.session import load_session

ROOT = Path(__file__).parents[2]
REFUSED, SAME, OTHER = "refused", "the same answer", "another answer"
KINDS: dict[str, tuple[str, str, torch.dtype, CacheConfig]] = {
    "window": ("qwen2.5", "llama", torch.float32, SMALL_CACHE),
    "bfloat16": ("qwen2.5", "qwen2", torch.bfloat16, SMALL_CACHE),
    "residual": ("smollm2", "llama-mqa", torch.float32, SMALL_CACHE.replace(residual=8)),
    "sliding": ("gemma3", "gemma3", torch.float32, CacheConfig.paper(64)),
    "sinks": ("smollm2", "gpt_oss-sinks", torch.bfloat16, CacheConfig.streaming(64)),
    "exact": ("llama3", "llama", torch.float32, CacheConfig.full()),
}


def make(kind: str, **settings: Any) -> LLM:
    template, family, dtype, cache = KINDS[kind]
    with mock.patch("tests.support.chat.tiny_model", partial(tiny_model, family, dtype=dtype)):
        return make_llm(template, cache=cache, compile=False, **settings)


def saved(kind: str, folder: Path) -> Path:
    """Save a chat that has overflowed its cache."""
    llm = make(kind)
    chat = Chat(llm, "it")
    for turn in range(4):
        chat.ask(f"Question {turn}?")
    return llm.session("it").save(folder / f"{kind}.zsmerge")


def answer(llm: LLM, session: Session) -> str:
    """Return a digest of what a session says next: after a chunk that compresses, and in decode steps."""
    cache = session.cache.clone()
    logits = llm.engine.read(cache, list(range(5, 30)))
    ids = list(llm.engine.decode(cache, [SamplingParams(max_tokens=4, ignore_eos=True)], [session.tokens]))
    text = json.dumps([session.tokens, ids, session.document])
    return hashlib.sha256(logits.numpy().tobytes() + text.encode(errors="replace")).hexdigest()


def outcome(llm: LLM, path: Path, original: str) -> str:
    """Load a file and go on from it; say what came of it."""
    try:
        session = llm.load_session(path)
    except (SessionCorruptError, SessionMismatchError):
        return REFUSED
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        return SAME if answer(llm, session) == original else OTHER
    except Exception as error:
        return f"while decoding {type(error).__name__}: {error}"
    finally:
        llm.store.remove(session.name)


def worker(kind: str, original: str) -> None:
    """Read files from standard input, one a line, and print the outcome of each. The parent notices a signal."""
    llm = make(kind)
    expected, path = answer(llm, llm.load_session(original)), Path(original).with_suffix(".crafted")
    for line in sys.stdin:
        path.write_bytes(base64.b64decode(line))
        print(json.dumps(outcome(llm, path, expected)), flush=True)


def outcomes(kind: str, original: Path, files: Iterable[Crafted]) -> list[tuple[Crafted, str]]:
    """Load files in a process of its own: a file that kills it has its signal as the outcome, and the next go on."""
    waiting, found = list(files), []
    code = f"from tests.faults.test_crafted_sessions import worker; worker({kind!r}, {str(original)!r})"
    while waiting:
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            while waiting:
                process.stdin.write(base64.b64encode(waiting[0].content) + b"\n")
                process.stdin.flush()
                said = process.stdout.readline()
                found.append((waiting.pop(0), json.loads(said) if said else f"signal {-process.wait()}"))
                if not said:
                    break
            process.stdin.close()
    return found


def unexpected(found: list[tuple[Crafted, str]]) -> dict[str, str]:
    """Return what was neither refused nor harmless. Plausible content may be another conversation's."""
    return {
        file.name: result
        for file, result in found
        if result not in (REFUSED, SAME) and not (file.is_plausible and result == OTHER)
    }


@pytest.mark.slow
def test_a_hundred_crafted_files_are_refused_or_do_no_harm(tmp_path: Path) -> None:
    original = saved("window", tmp_path)
    files = list(crafted(original))
    found = outcomes("window", original, [files[0], *random.Random(0).sample(files[1:], 100)])

    assert unexpected(found) == {}
    assert found[0][1] == SAME, "the generator keeps a file as it is where it changes nothing"


@pytest.mark.parametrize("name", ["0.keys", "1.values", "0.queries"])
@pytest.mark.parametrize("number", [2.0**60, -(2.0**60)])
def test_numbers_so_large_that_the_logits_would_overflow_are_refused(name: str, number: float, tmp_path: Path) -> None:
    parts = Parts.of(saved("window", tmp_path))
    array = parts.array(name)
    array.reshape(-1)[-1] = number
    parts.put(name, array)
    path = tmp_path / "huge"
    path.write_bytes(parts.write())
    with pytest.raises(SessionCorruptError, match=f"holds {name}"):
        load_session(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_has_saved_it_reads_again(kind: str, tmp_path: Path) -> None:
    llm = make(kind, sessions_dir=tmp_path)
    chat = Chat(llm, "it")
    for turn in range(3):
        chat.ask(f"Question {turn}?")
        path = llm.session("it").save(tmp_path / "copy")
        assert answer(llm, load_session(path)) == answer(llm, llm.load_session(path))
    again = Chat(make(kind, sessions_dir=tmp_path), "it", chat.messages)

    assert again.ask("And now?").usage.reuse == "continued"
    assert again.messages[-1]["content"] == chat.ask("And now?").text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_crafted_files_are_refused_or_do_no_harm(kind: str, tmp_path: Path) -> None:
    original = saved(kind, tmp_path)
    files = list(crafted(original))
    assert len(files) > 1000
    found = outcomes(kind, original, [files[0], *random.sample(files[1:], 500)])
    print(kind, dict(Counter(result for _, result in found)))

    assert found[0][1] == SAME
    assert unexpected(found) == {}


def test_a_folder_of_crafted_files_is_opened_and_only_what_is_whole_is_listed(tmp_path: Path) -> None:
    original = saved("window", tmp_path)
    llm = make("window", sessions_dir=tmp_path / "chats")
    Chat(llm, "it").ask("Hello")
    (kept,) = (tmp_path / "chats").glob("*.zsmerge")
    files = list(crafted(original))
    for index, file in enumerate(random.Random(1).sample(files, 300)):
        kept.with_name(f"crafted{index}{kept.name.removeprefix('it')}").write_bytes(file.content)
    again = make("window", sessions_dir=tmp_path / "chats")
    results = set()
    for info in list(again.store):
        try:
            results.add(len(again.session(info.name).tokens))
        except SessionCorruptError:
            again.store.forget(info.name)

    assert len(llm.session("it").tokens) in results
    assert Chat(again, "it").ask("Hello").text


def test_a_crafted_file_is_described_without_a_model_or_refused(tmp_path: Path) -> None:
    original = saved("window", tmp_path)
    path = tmp_path / "crafted"
    for file in random.Random(2).sample(list(crafted(original)), 200):
        path.write_bytes(file.content)
        try:
            assert load_session(path).cache.nbytes < 10 * original.stat().st_size
        except (SessionCorruptError, SessionMismatchError):
            continue
