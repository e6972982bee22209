"""A template that fails in any way, or does not end, is an error of ours in that call and disturbs no other."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from threading import Thread
from unittest import mock

import pytest

from tests.support.templates import byte_level, template
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.language import watchdog
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.watchdog import TimeExceeded, Watchdog

USER = [{"role": "user", "content": "Hello"}]
FAILING = {
    "zero": "{{ 1 // 0 }}",
    "float zero": "{{ 1.0 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(999999) %}{% endfor %}",
    "overflow": "{{ 'a' * (messages | length * 99999999999999999999) }}",
    "memory": "{{ 'a' * 999999999999999999 }}",
    "undefined": "{{ a.b.c }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "call": "{{ messages() }}",
    "key": "{{ messages[7].content | upper }}",
    "assert": "{{ raise_exception('no') }}",
    "format": "{{ '%d' | format('x') }}",
    "include": "{% include 'x' %}",
    "parser": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "blocks": "".join("{% if messages %}" for _ in range(200)) + "".join("{% endif %}" for _ in range(200)),
    "loops": "".join("{% for i in messages %}" for _ in range(40)) + "".join("{% endfor %}" for _ in range(40)),
    "syntax": "{% if %}",
    "open": "{{ messages",
    "power": "{{ 9 ** 9 ** 9 }}",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_an_input_or_config_error(name: str) -> None:
    form = ChatTemplate(byte_level(), FAILING[name])
    with pytest.raises((InputError, ConfigError), match="chat_template="):
        form.render(USER)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_does_not_end_is_stopped_and_the_next_one_renders(source: str) -> None:
    form, good = ChatTemplate(byte_level(), source), template("smollm2")
    with mock.patch("zsmerge_llm.language.chat_template.MAX_RENDER_SECONDS", 0.1):
        started = time.monotonic()
        with pytest.raises(InputError, match=r"did not end within 0\.1 s"):
            form.render(USER)
        assert time.monotonic() - started < 20
        for _ in range(100):
            assert good.render(USER)


def test_a_watchdog_stops_its_own_blocks_only() -> None:
    dog, stopped = Watchdog(), []

    def work(seconds: float) -> None:
        try:
            with dog.limit(seconds):
                ends = time.monotonic() + 1.0
                while time.monotonic() < ends:
                    pass
        except TimeExceeded:
            stopped.append(seconds)

    with mock.patch.object(watchdog, "PERIOD", 0.05):
        threads = [Thread(target=work, args=(seconds,)) for seconds in (0.1, 30.0, 0.2, 60.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(stopped) == [0.1, 0.2]
        with suppress(TimeExceeded), dog.limit(0.0):
            pass
        time.sleep(0.3)  # nothing is raised here


def test_keywords_of_calls_are_no_powers() -> None:
    source = "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(**{'a': messages[0].content}) }}"
    assert ChatTemplate(byte_level(), source).render(USER) == "Hello"


def test_traced_functions_run_after_a_block() -> None:
    """In CPython 3.11 an error that was taken back kept functions from beginning under a debugger, for ever."""
    code = """
import sys
from zsmerge_llm.language.watchdog import Watchdog

with Watchdog().limit(60):
    pass
sys.settrace(lambda frame, event, argument: None)
print((lambda: "runs")())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "runs"


def test_what_is_raised_as_a_block_ends_does_not_reach_the_code_behind_it() -> None:
    dog = Watchdog()
    with mock.patch.object(watchdog, "PERIOD", 0.05):
        for _ in range(5):
            with pytest.raises(TimeExceeded), dog.limit(0.01):
                time.sleep(0.2)  # one step: the error comes behind it
            assert sum(range(10_000)) == 49_995_000
