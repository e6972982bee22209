"""The command line's output, errors and exit codes. A fake model answers; one test uses a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, Engine, Session
from zsmerge_llm.cli import app as cli
from zsmerge_llm.errors import InputError, ModelNotFoundError
from zsmerge_llm.sessions.session import Fingerprint, Snapshot
from zsmerge_llm.types import Chunk, FinishReason, Usage


class FakeCache:
    def full_nbytes(self, tokens: int) -> int:
        return tokens * 23_040


class FakeModel:
    device, dtype = "cpu", "torch.float32"


class FakeBackend:
    pending_build = True

    def warm_up(self) -> None:
        self.pending_build = False


class FakeEngine:
    model = FakeModel()

    def __init__(self) -> None:
        self.backend = FakeBackend()

    def new_cache(self, rows: int) -> FakeCache:
        return FakeCache()


class FakeLLM:
    """Answers at once, and records requests."""

    made: list[FakeLLM]
    answer: list[str]
    finish: FinishReason

    def __init__(self, model: str, **settings: Any) -> None:
        if model == "nowhere":
            raise ModelNotFoundError("There is no model 'nowhere': check the spelling.")
        self.name, self.settings, self.cache = model, settings, settings["cache"]
        self.engine, self.requests, self.sampling, self.documents = FakeEngine(), [], [], []
        self.made.append(self)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def read_document(self, *, text: str, name: str | None, probe: str | None, progress: Any) -> str:
        self.documents.append((text, name, probe))
        progress(3000, 3000)
        return text

    def stream(
        self, messages: list[dict[str, Any]], *, sampling: Any, session: Any, cancel: Event | None, progress: Any
    ) -> Iterator[Chunk]:
        self.requests.append(messages)
        self.sampling.append(sampling)
        if "refuse" in messages[-1]["content"]:
            raise InputError("This message cannot be used.")
        if "warn" in messages[-1]["content"]:
            warnings.warn("The prompt goes\nbeyond the window.", stacklevel=2)
        return self._answer(progress, cancel)

    def _answer(self, progress: Any, cancel: Event | None) -> Iterator[Chunk]:
        progress(512, 3000)
        progress(3000, 3000)
        finish = self.finish
        for piece in self.answer:
            if piece == "^C":
                os.kill(os.getpid(), 2)
                continue
            if cancel is not None and cancel.is_set():
                finish = "cancelled"
                break
            yield Chunk(piece)
        yield Chunk("", finish, Usage(3000, 1000, 20, 1976, 2.0, 1.0, 26_700_000))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    FakeLLM.made, FakeLLM.answer, FakeLLM.finish = [], ["It is ", "honey [red]."], "stop"
    monkeypatch.setattr("zsmerge_llm.LLM", FakeLLM, raising=False)
    return FakeLLM


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("\ufeffNine hundred barrels of honey.\n", encoding="utf-8")
    return path


def run(*arguments: object, typed: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], input=typed)


def test_ask_streams_the_answer_and_then_prints_its_usage(document: Path, fake: type[FakeLLM]) -> None:
    result = run("ask", document, "What is it?")
    assert result.exit_code == 0
    assert "It is honey [red]." in result.stdout
    assert "3,000 tokens read (2,000 of them now) | cache 26.7 MB, a full cache 69.6 MB | first token" in result.stdout
    assert "20.0 tokens/s" in result.stdout
    assert "Tokens evicted (mean over heads and layers): 1,976 dropped." in result.stdout
    assert fake.made[0].requests == [[{"role": "user", "content": "What is it?"}]]


def test_several_questions_are_answered_one_by_one(document: Path, fake: type[FakeLLM]) -> None:
    result = run("ask", document, "What is it?", "How much?")
    assert result.stdout.index("> What is it?") < result.stdout.index("> How much?")
    assert [request[-1]["content"] for request in fake.made[0].requests] == ["What is it?", "How much?"]
    assert fake.made[0].documents == [("Nine hundred barrels of honey.\n", None, "What is it? How much?")]


def test_a_document_can_be_stored_for_any_question(document: Path, fake: type[FakeLLM]) -> None:
    assert run("ask", document, "What is it?", "--keep").exit_code == 0
    assert fake.made[0].documents == [("Nine hundred barrels of honey.\n", document.name, None)]
    assert fake.made[0].settings["sessions_dir"].name == "sessions"


def test_stored_sessions_are_listed_shown_and_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    engine = Engine(tiny_model("llama"), CacheConfig(slots=80))
    cache = engine.new_cache()
    engine.read(cache, tokens(12))
    fingerprint = Fingerprint(weights="w", tokenizer="t", template="c", cache='{"slots": 80}')
    session = Session("report", fingerprint, document="Some text.")
    session.add([Snapshot("digest", 0, tokens(12), cache, "document")])
    saved = session.save(folder / "report.zsmerge")
    (folder / "damaged.zsmerge").write_bytes(b"nothing")
    assert "report  12 tokens, document" in run("sessions", "list", "--dir", folder).stdout
    assert "slots" in run("sessions", "show", "report", "--dir", folder).stdout
    assert run("sessions", "rm", "report", "--dir", folder).exit_code == 0
    assert not saved.exists()
    assert "There are no sessions" in run("sessions", "list", "--dir", folder).output
    missing = run("sessions", "rm", "report", "--dir", folder)
    assert missing.exit_code == 2
    assert "no session 'report'" in missing.output


def test_quiet_prints_the_answer_alone(document: Path) -> None:
    result = run("ask", document, "What is it?", "--quiet")
    assert result.stdout == "It is honey [red].\n"
    assert result.stderr == ""


def test_the_prefill_kernels_are_built_before_the_answer(document: Path, fake: type[FakeLLM]) -> None:
    run("ask", document, "What is it?")
    assert not fake.made[0].engine.backend.pending_build


def test_a_pipe_gets_plain_text_only(document: Path, fake: type[FakeLLM]) -> None:
    fake.answer = ["\x1b[31mred", " is plain"]
    result = run("ask", document, "warn me")
    assert "\x1b" not in result.output
    assert "\r" not in result.output


def test_options_reach_the_model_and_the_sampling(document: Path, fake: type[FakeLLM]) -> None:
    options = (
        "--model other --slots 256 --dtype float32 --device cpu --quantization nf4 --max-tokens 7 --temperature 0.5"
    )
    assert run("ask", document, "What?", *options.split()).exit_code == 0
    (llm,) = fake.made
    given = {name: llm.settings[name] for name in ("dtype", "device", "quantization", "cache")}
    assert given == {"dtype": "float32", "device": "cpu", "quantization": "nf4", "cache": CacheConfig(slots=256)}
    assert (llm.name, llm.sampling[0].max_tokens, llm.sampling[0].temperature) == ("other", 7, 0.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], CacheConfig()),
        (["--preset", "paper"], CacheConfig.paper()),
        (["--preset", "h2o", "--slots", "200"], CacheConfig.h2o(200)),
        (["--preset", "streaming"], CacheConfig.streaming()),
        (["--preset", "full"], CacheConfig.full()),
    ],
)
def test_presets_are_those_of_the_config(
    options: list[str], expected: CacheConfig, document: Path, fake: type[FakeLLM]
) -> None:
    assert run("ask", document, "What?", *options).exit_code == 0
    assert fake.made[0].cache == expected


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--slots", "3"], "give at least"),
        (["--preset", "full", "--slots", "99"], "leave out --slots"),
        (["--max-tokens", "0"], "max_tokens must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--model", "nowhere"], "check the spelling"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(options: list[str], remedy: str, document: Path) -> None:
    result = run("ask", document, "What?", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert remedy in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not text in UTF-8"),
        (b"text\x00text", "is not text in UTF-8"),
        ("a long text".encode("utf-16"), "is not text in UTF-8"),
    ],
)
def test_a_file_without_text_is_refused_before_the_model_loads(
    content: bytes, problem: str, tmp_path: Path, fake: type[FakeLLM]
) -> None:
    path = tmp_path / "some.file"
    path.write_bytes(content)
    result = run("ask", path, "What?")
    assert (result.exit_code, fake.made) == (2, [])
    assert problem in result.stderr


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    missing, folder = run("ask", tmp_path / "none.txt", "What?"), run("ask", tmp_path, "What?")
    assert (missing.exit_code, folder.exit_code) == (2, 2)
    assert "There is no file" in missing.stderr
    assert "cannot be read" in folder.stderr


def test_an_empty_question_is_refused(document: Path) -> None:
    result = run("ask", document, " ")
    assert result.exit_code == 2
    assert "The question is empty" in result.stderr


def test_a_document_may_come_through_standard_input(fake: type[FakeLLM]) -> None:
    assert run("ask", "-", "What?", typed="Some text.").exit_code == 0
    assert fake.made[0].documents[0][0] == "Some text."


def test_an_answer_cut_at_max_tokens_is_reported(document: Path, fake: type[FakeLLM]) -> None:
    fake.finish = "length"
    assert "cut at 512 tokens: --max-tokens" in run("ask", document, "What?").stdout


def test_a_warning_of_the_package_is_one_line(document: Path) -> None:
    result = run("ask", document, "warn me")
    assert result.stderr == "Note: The prompt goes beyond the window.\n"


def test_chat_carries_the_conversation_from_turn_to_turn(fake: type[FakeLLM]) -> None:
    result = run("chat", "--system", "Be brief.", typed="Hello\nAnd now?\n")
    assert result.exit_code == 0
    assert result.stdout.count("It is honey [red].") == 2
    assert fake.made[0].requests[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "It is honey [red]."},
        {"role": "user", "content": "And now?"},
    ]


def test_reset_starts_a_new_conversation_and_exit_ends_the_chat(fake: type[FakeLLM]) -> None:
    result = run("chat", typed="Hello\n/reset\nAgain\n/exit\nNever\n")
    assert result.exit_code == 0
    assert [len(request) for request in fake.made[0].requests] == [1, 1]
    assert "A new conversation." in result.stdout


def test_help_and_unknown_commands_list_the_commands(fake: type[FakeLLM]) -> None:
    result = run("chat", typed="/help\n/dance\n\n")
    assert result.stdout.count("/reset  forget") == 2
    assert "There is no command /dance." in result.stdout
    assert fake.made[0].requests == []


def test_ctrl_c_stops_the_answer_and_not_the_chat(fake: type[FakeLLM]) -> None:
    fake.answer = ["It is ", "^C", "never printed"]
    result = run("chat", typed="Hello\nAnd now?\n")
    assert result.exit_code == 0
    assert "never printed" not in result.stdout
    assert result.stdout.count("Stopped.") == 2
    assert fake.made[0].requests[1][1] == {"role": "assistant", "content": "It is "}


def test_a_message_that_is_refused_leaves_the_conversation_as_it_was(fake: type[FakeLLM]) -> None:
    result = run("chat", typed="refuse this\nHello\n")
    assert result.exit_code == 0
    assert "Error: This message cannot be used." in result.stderr
    assert fake.made[0].requests[1] == [{"role": "user", "content": "Hello"}]


def test_demo_reads_the_shipped_text_and_prints_the_usage_of_each_answer(fake: type[FakeLLM]) -> None:
    result = run("demo")
    assert result.exit_code == 0
    assert "times the 1,024 slots of the cache" in result.stdout
    assert len(fake.made[0].requests) == len(cli.DEMO_QUESTIONS)
    assert result.stdout.count("cache 26.7 MB, a full cache 69.6 MB") == len(cli.DEMO_QUESTIONS)


def test_models_lists_the_built_in_names_and_the_other_forms_of_model() -> None:
    result = run("models")
    assert result.exit_code == 0
    for word in ("smollm2", "Hub id", "folder", "GGUF"):
        assert word in result.stdout


def test_version_is_printed() -> None:
    assert run("--version").stdout.startswith("zsmerge-llm 0.")


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, zsmerge_llm.cli.app; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_real_model_answers_about_the_shipped_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    assert "Stone" in result.stdout
    assert "Tokens evicted" in result.stdout
