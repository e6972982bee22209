"""Output of the command line: names, answers and errors send no commands to the terminal."""

from __future__ import annotations

import pytest

from zsmerge_llm.cli.console import Terminal, printable
from zsmerge_llm.errors import InputError

HOSTILE = "\x1b]0;owned\x07\x1b[2Jname\x9b31m\r\x08\u202egnp.exe[/red][bold]\n\tend"


def test_control_characters_are_left_out_and_the_text_stays() -> None:
    assert printable(HOSTILE) == "]0;owned[2Jname31mgnp.exe[/red][bold]\n\tend"
    assert printable("Zürich 中文 🙂 שלום") == "Zürich 中文 🙂 שלום"


def test_every_line_of_the_terminal_is_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.print(HOSTILE)
    terminal.status(HOSTILE)
    terminal.question(HOSTILE)
    terminal.error(InputError(HOSTILE))
    with terminal.show_steps(HOSTILE) as step:
        step(HOSTILE)
    with terminal.stream_answer() as (_, show):
        show(HOSTILE)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "name" in text
        assert not {letter for letter in text if not letter.isprintable()} - {"\n", "\t"}
