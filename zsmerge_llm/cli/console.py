"""What the command line shows: answers and their cost on stdout; progress, warnings and errors on stderr.

Without a terminal everything is plain text: no colours, no bars.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from zsmerge_llm.errors import ZSMergeError

if TYPE_CHECKING:
    from rich.console import Console

    from zsmerge_llm.config import CacheConfig
    from zsmerge_llm.types import Progress as Read
    from zsmerge_llm.types import Usage

Show = Callable[[str], None]


class CommandGroup(TyperGroup):
    """Our own errors end a command with one line and exit code 2; all others are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ZSMergeError as error:
            Terminal().error(error)
            raise typer.Exit(2) from error


class Terminal:
    """The two outputs of the program.

    Args:
        quiet: answers, warnings and errors only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._waited = 0.0

    # -- single lines ------------------------------------------------------------------------------------------------

    def plain(self, text: str) -> None:
        """A line on stdout."""
        self._out.print(text, markup=False)

    def note(self, text: str) -> None:
        """A dim line about what happens."""
        if not self.quiet:
            self._out.print(text, style="dim", markup=False)

    def error(self, error: Exception) -> None:
        """One red line."""
        self._err.print(f"Error: {_one_line(error)}", style="bold red", markup=False)

    def question(self, text: str) -> None:
        """A question that an answer follows."""
        self._out.print(f"\n> {text}", style="bold cyan", markup=False)

    def ask(self) -> str | None:
        """The next message; None at the end of the input. Ctrl-C empties the line."""
        try:
            if sys.stdin.isatty():
                import readline  # noqa: F401 - gives input() its editing keys and history

                return input("\n> ").strip()
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            self.note("\n/exit leaves.")
            return ""
        except EOFError:
            self.plain("")
            return None
        if line.strip() and not self.quiet:
            self.question(line.strip())
        return line.strip() if line else None

    # -- loading, reading, answering ---------------------------------------------------------------------------------

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Warnings as one dim line each."""

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            self._err.print(f"Note: {_one_line(message)}", style="dim", markup=False)

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield

    @contextmanager
    def steps(self, first: str) -> Iterator[Show]:
        """Takes lines about what is being done; shows the latest while it is done."""
        if self.quiet or not self._err.is_terminal:
            yield lambda step: None
            return
        with self._err.status(f"{first} ...", spinner_style="dim") as status:
            yield lambda step: status.update(f"{step} ...")

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """A function that is told how much is read."""
        with self._bar() as (progress, _):
            yield progress

    @contextmanager
    def answer(self) -> Iterator[tuple[Read, Show]]:
        """One answer: a function that is told how much is read, and one that shows the text as it comes."""
        started, self._waited = time.perf_counter(), 0.0
        with self._bar() as (progress, stop):

            def show(text: str) -> None:
                stop()
                self._waited = self._waited or time.perf_counter() - started
                self._out.print(text.replace("\x1b", ""), end="", markup=False)  # it cannot steer the terminal

            try:
                yield progress, show
            finally:
                stop()
                self._out.print()

    @contextmanager
    def _bar(self) -> Iterator[tuple[Read, Callable[[], None]]]:
        """A progress bar for reading, and how to stop it."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("Reading"), BarColumn(), TextColumn("{task.fields[words]}, ETA"), TimeRemainingColumn())
        hidden = self.quiet or not self._err.is_terminal
        bar = Progress(*columns, console=self._err, transient=True, disable=hidden)
        task = bar.add_task("", total=None, words="")
        started = time.perf_counter()

        def progress(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(task, completed=done, total=total, words=f"{done:,} of {total:,} tokens, {rate:,.0f}/s")

        with bar:
            yield progress, bar.stop

    # -- reports -----------------------------------------------------------------------------------------------------

    def loaded(self, name: str, device: str, dtype: str) -> None:
        """What runs where."""
        self.note(f"{name} on {device} in {dtype}")

    def about(self, title: str, tokens: int, cache: CacheConfig) -> None:
        """A document, next to the cache it has to go through."""
        times = f", {tokens / cache.slots:.1f} times the {cache.slots:,} slots of the cache" if cache.slots else ""
        self.plain(f"{title}: {tokens:,} tokens{times}")

    def memory(self, usage: Usage, full: int) -> None:
        """What the answer cost. `full`: bytes an exact cache would hold."""
        read, new = usage.prompt_tokens, usage.prompt_tokens - usage.cached_tokens
        again = "" if new == read else f" ({new:,} of them now)"
        again += f", {usage.retrieved_tokens:,} once more" if usage.retrieved_tokens else ""
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds else 0.0
        self.note(
            f"{read:,} tokens read{again} | cache {_megabytes(usage.cache_bytes)}, a full cache {_megabytes(full)} | "
            f"first token after {self._waited:.1f} s, then {rate:.1f} tokens/s"
        )
        if lost := usage.dropped_tokens + usage.merged_tokens:
            self.note(f"{lost:,} tokens are no longer held verbatim (mean over heads and layers).")


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True, emoji=False)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
