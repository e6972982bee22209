"""A saved session comes back bit for bit or not at all; a killed save leaves the old one or the new one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import SHORT, SMALL_CACHE, Chat, dialogue, make_llm
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig, Session
from zsmerge_llm.errors import SessionCorruptError, SessionError, SessionMismatchError, SessionNotFoundError
from zsmerge_llm.models.atomic_write import TEMPORARY_PREFIX, TEMPORARY_SUFFIX
from zsmerge_llm.sessions import file_format
from zsmerge_llm.sessions.fingerprint import fingerprint
from zsmerge_llm.sessions.session import load_session
from zsmerge_llm.sessions.validation import check_facts

ROOT = Path(__file__).parents[2]


def next_logits(llm: LLM, session: Session) -> torch.Tensor:
    """The logits after reading a few more tokens, compressing on the way. The session is left alone."""
    return llm.engine.read(session.cache.clone(), list(range(5, 60)))


def digest(logits: torch.Tensor) -> str:
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm("qwen2.5")


@pytest.fixture(scope="module")
def session(llm: LLM) -> Session:
    chat = Chat(llm, "it")
    for turn in range(4):
        chat.ask(f"Question {turn}?")
    return llm.session("it")


@pytest.mark.parametrize(
    "cache",
    [
        SMALL_CACHE,
        CacheConfig.paper(64),
        CacheConfig.streaming(64),
        CacheConfig.full(),
        SMALL_CACHE.replace(residual=8),
    ],
    ids=["window", "paper", "streaming", "full", "residual"],
)
def test_the_next_logits_are_bit_equal_after_save_and_load(cache: CacheConfig, tmp_path: Path) -> None:
    llm = make_llm("gemma3", cache=cache)
    chat = Chat(llm, "it")
    for turn in range(3):
        chat.ask(f"Question {turn}?")
    session = llm.session("it")
    again = load_session(session.save(tmp_path / "it"), llm.store.fingerprint)

    assert torch.equal(next_logits(llm, session), next_logits(llm, again))
    assert (again.tokens, again.name, again.today) == (session.tokens, session.name, session.today)
    assert (again.head.digest, again.head.kind, again.prefix_digests) == (
        session.head.digest,
        "answer",
        session.prefix_digests,
    )


def test_another_process_continues_bit_for_bit(llm: LLM, session: Session, tmp_path: Path) -> None:
    path = session.save(tmp_path / "it.zsmerge")
    script = f"""
from tests.sessions.test_file_format import digest, make_llm, next_logits
llm = make_llm("qwen2.5")
print(digest(next_logits(llm, llm.load_session({str(path)!r}))))
"""
    own_cache = {**os.environ, "ZSMERGE_CACHE_DIR": str(tmp_path)}  # without compiled steps, which this process has not
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=own_cache, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(next_logits(llm, session))


def test_a_loaded_session_is_recognised_by_its_messages(session: Session, llm: LLM, tmp_path: Path) -> None:
    chat = Chat(llm, "new")
    chat.ask("Hello")
    path = llm.session("new").save(tmp_path / "new")
    other = Chat(make_llm("qwen2.5"), None, chat.messages)
    other.llm.load_session(path)

    assert other.ask("Go on").usage.reuse == "continued"
    assert other.messages[-1]["content"] == chat.ask("Go on").text


def test_a_document_is_saved_with_its_text(llm: LLM, tmp_path: Path) -> None:
    document = llm.read_document("Odile keeps the lighthouse: naïve 灯台 🙂.", name="island")
    path = document.fork("copy").save(tmp_path / "copy")
    again = make_llm("qwen2.5").load_session(path)

    assert (again.document, again.head.kind, again.forked) == (document.document, "document", True)


def test_a_file_is_not_much_larger_than_the_cache(tmp_path: Path) -> None:
    llm = make_llm("qwen2.5", cache=CacheConfig(slots=1024), retrieval_tokens=0)
    chat = Chat(llm, "it")
    for turn in range(24):
        chat.ask(f"Question {turn}? " + "What else is there to say? " * 8)
    session = llm.session("it")
    size = session.save(tmp_path / "it").stat().st_size

    assert session.cache.seen > 4096
    assert session.cache.nbytes < size <= 1.1 * session.cache.nbytes


def test_a_missing_file_and_files_of_others_are_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(SessionNotFoundError, match="no saved session at"):
        llm.load_session(tmp_path / "missing")
    with pytest.raises(SessionNotFoundError):
        llm.load_session(tmp_path)
    foreign = {
        "empty": b"",
        "text": b"Dear diary,\n" * 20,
        "huge": (2**63).to_bytes(8, "little") + b"{}",
        "nested": (10**5).to_bytes(8, "little") + b"[" * 10**5,
        "list": (2).to_bytes(8, "little") + b"[]",
        "metadata": (21).to_bytes(8, "little") + b'{"__metadata__":null}',
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SessionCorruptError, match=r"no saved session.*give a file"):
            llm.load_session(tmp_path / name)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "model", {"format": "pt"})
    with pytest.raises(SessionCorruptError, match="no saved session"):
        llm.load_session(tmp_path / "model")


def content(session: Session, folder: Path) -> bytes:
    return session.save(folder / "whole").read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_cut_off_anywhere_is_refused(
    data: st.DataObject, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = content(session, folder)
    path = folder / "part"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])

    with pytest.raises(SessionCorruptError):
        load_session(path, session.fingerprint)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_with_any_byte_changed_is_refused(
    data: st.DataObject, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    changed = bytearray(content(session, folder))
    header = 8 + int.from_bytes(changed[:8], "little")
    places = st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(header, len(changed) - 1))
    changed[data.draw(places)] ^= data.draw(st.integers(1, 255))
    path = folder / "changed"
    path.write_bytes(changed)

    with pytest.raises((SessionCorruptError, SessionMismatchError)):
        load_session(path, session.fingerprint)


def test_bytes_added_at_the_end_are_noticed(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "longer"
    path.write_bytes(content(session, tmp_path) + b"\0")

    with pytest.raises(SessionCorruptError):
        load_session(path)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "template", "cache"])
def test_a_session_of_something_else_is_refused_by_name(part: str, llm: LLM, session: Session, tmp_path: Path) -> None:
    path = session.save(tmp_path / "it")
    other = {
        "weights": lambda: make_llm("qwen2.5", seed=1),
        "tokenizer": lambda: make_llm("llama3"),
        "template": lambda: make_llm("qwen2.5"),
        "cache": lambda: make_llm("qwen2.5", cache=SMALL_CACHE.replace(slots=97)),
    }[part]()
    mark = other.store.fingerprint
    mine = {"tokenizer": replace(session.fingerprint, tokenizer=mark.tokenizer)}.get(part, mark)
    if part == "template":
        mine = fingerprint(llm.engine.model, llm.tokenizer, "{{ messages }}", llm.cache)

    with pytest.raises(SessionMismatchError, match=f"saved with another {part}:"):
        load_session(path, mine)


def test_several_differences_are_all_named(session: Session, tmp_path: Path) -> None:
    with pytest.raises(SessionMismatchError, match="another weights and cache:"):
        load_session(session.save(tmp_path / "it"), replace(session.fingerprint, weights="-", cache="-"))


@pytest.mark.parametrize("number", [6, 11])
def test_a_file_of_another_format_is_refused_by_its_number(
    number: int, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert file_format.FORMAT == 10
    with monkeypatch.context() as patch:
        patch.setattr(file_format, "FORMAT", number)
        path = session.save(tmp_path / "it")

    with pytest.raises(SessionMismatchError, match=f"has format {number} and .* reads formats 7 to 10"):
        load_session(path)


def test_a_file_of_an_older_format_which_has_free_slots_is_continued(
    llm: LLM, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(file_format, "FORMAT", 7)
        whole = replace(session.head, cache=session.cache.clone())
        path = replace(session, snapshots={whole.digest: whole}).save(tmp_path / "it")
    again = load_session(path, llm.store.fingerprint)

    assert again.nbytes == whole.nbytes > session.nbytes / len(session.snapshots)
    assert torch.equal(next_logits(llm, session), next_logits(llm, again))


def test_fingerprints_tell_models_apart_and_do_not_change_with_use(llm: LLM) -> None:
    before = llm.store.fingerprint
    llm.tokenizer("one two three", truncation=True, max_length=2)
    model, source = llm.engine.model, llm.tokenizer.chat_template
    assert fingerprint(model, llm.tokenizer, source, llm.cache) == before

    weights = {
        fingerprint(tiny_model(family, seed), llm.tokenizer, None, llm.cache).weights
        for family in ("llama", "qwen2", "falcon-new")
        for seed in (0, 1)
    }
    assert len(weights) == 6
    half = tiny_model(dtype=torch.bfloat16)
    assert fingerprint(half, llm.tokenizer, None, llm.cache).weights not in weights


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = session.save(tmp_path / "it")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace(session, name="changed").save(path)

    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["it"]


def test_only_the_owner_may_read_a_saved_session(session: Session, tmp_path: Path) -> None:
    assert session.save(tmp_path / "it").stat().st_mode & 0o077 == 0


SAVER = """
import os, sys
from zsmerge_llm.sessions.session import load_session
sessions = [load_session(path) for path in sys.argv[2:]]
for _ in sys.stdin:
    if child := os.fork():
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
    else:
        while True:
            for session in sessions:
                session.save(sys.argv[1])
"""


def kill_while_saving(folder: Path, sessions: list[Session], kills: int) -> list[str]:
    """Let a process save two sessions by turns over one file, kill it at a random moment, again and again.

    Returns the name of the session that was found after each kill.
    """
    target, moment = folder / "it", random.Random(0)
    originals = [str(session.save(folder / f"original-{n}")) for n, session in enumerate(sessions)]
    sessions[0].save(target)
    found = []
    command = [sys.executable, "-c", SAVER, str(target), *originals]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(kills):
            print("go", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            time.sleep(moment.uniform(0.005, 0.06))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            found.append(load_session(target, sessions[0].fingerprint).name)
        process.stdin.close()
    return found


@pytest.fixture
def pair(session: Session, llm: LLM) -> list[Session]:
    chat = Chat(llm, "other")
    chat.ask("Quite another conversation.")
    return [session, llm.session("other")]


@pytest.mark.slow
def test_after_fifty_killed_saves_the_old_or_the_new_session_loads(pair: list[Session], tmp_path: Path) -> None:
    found = kill_while_saving(tmp_path, pair, 50)

    assert set(found) == {"it", "other"}
    assert any(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(tmp_path))  # some were killed in the middle


def test_what_a_killed_save_left_is_ignored_and_deleted_later(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    Chat(llm, "it").ask("Hello")
    start, end = TEMPORARY_PREFIX, TEMPORARY_SUFFIX
    fresh, old = tmp_path / f"{start}1{end}", tmp_path / f"{start}2{end}"
    for path in (fresh, old):
        path.write_bytes(b"part of a file")
    os.utime(old, (0, 0))
    again = make_llm(sessions_dir=tmp_path)

    assert [info.name for info in again.store] == ["it"]
    assert fresh.exists()  # another process may be at it
    assert not old.exists()


def test_the_header_alone_tells_what_a_file_holds(session: Session, tmp_path: Path) -> None:
    path = session.save(tmp_path / "it")
    metadata = file_format.read_metadata(path, check_facts)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, 8 + size)

    assert file_format.read_metadata(path, check_facts) == metadata
    assert (metadata["name"], metadata["tokens"], metadata["messages"]) == ("it", len(session.tokens), 8)
    assert json.loads(json.dumps(metadata)) == metadata
    with pytest.raises(SessionError):
        load_session(path)


def test_a_request_on_a_corrupt_saved_session_reads_anew_and_says_so(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    (path,) = tmp_path.glob("*.zsmerge")
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    again = Chat(make_llm(sessions_dir=tmp_path), "it", chat.messages)

    assert again.ask("Go on").usage.reuse == "reread: the saved session is damaged or gone"
    assert again.ask("And on").usage.reuse == "continued"
    assert make_llm(sessions_dir=tmp_path).session("it").tokens == again.llm.session("it").tokens


def test_a_corrupt_document_is_an_error_and_can_be_read_again(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    llm.read_document("Odile keeps the lighthouse.", name="island")
    (path,) = tmp_path.glob("*.zsmerge")
    os.truncate(path, path.stat().st_size - 1)
    again = make_llm(sessions_dir=tmp_path)

    with pytest.raises(SessionCorruptError, match="read the conversation anew"):
        again.chat(dialogue("Who?"), session="island", sampling=SHORT)
    assert again.read_document("Odile keeps the lighthouse.", name="island").tokens
    assert again.chat(dialogue("Who?"), session="island", sampling=SHORT).usage.reuse == "restored"
