"""Output of the command line: answers and usage on stdout; progress, warnings and errors on stderr.

Output to a file or pipe is plain text, without colours and progress bars.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from zsmerge_llm.errors import ZSMergeError

if TYPE_CHECKING:
    from rich.console import Console

    from zsmerge_llm.config import CacheConfig
    from zsmerge_llm.types import Progress as ReadCallback
    from zsmerge_llm.types import Usage

LARGEST = 10**9
"""The largest number that an option takes."""
TextCallback = Callable[[str], None]


class CommandGroup(TyperGroup):
    """Turns an error of ours, of the system or of memory into one line and exit code 2. Others are bugs: a traceback.

    A closed pipe ends the program with exit code 1, and says nothing.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ZSMergeError, OSError, MemoryError) as error:
            with suppress(OSError):  # stderr may be what fails
                Terminal().error(error if str(error) else MemoryError("There is not enough memory."))
            raise typer.Exit(2) from error


def open_streams() -> None:
    """Open the standard streams that are closed on the null device, and let none of them fail at a character."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  until the end
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack a character


def flush_streams() -> bool:
    """Write what is still to be written; return whether that was possible. Where not, Python's end says nothing."""
    written = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            written = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            with suppress(OSError):
                Terminal().error(error)
    return written


class Terminal:
    """Prints to stdout and stderr, and reads messages.

    Args:
        quiet: print answers, warnings and errors only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._seconds_to_first_token = 0.0

    # -- single lines ------------------------------------------------------------------------------------------------

    def print(self, text: str) -> None:
        """Print a line on stdout."""
        self._out.print(printable(text), markup=False)

    def status(self, text: str) -> None:
        """Print a dim line on stdout, unless quiet."""
        if not self.quiet:
            self._out.print(printable(text), style="dim", markup=False)

    def error(self, error: Exception) -> None:
        """Print an error as one red line on stderr."""
        self._err.print(f"Error: {_one_line(error)}", style="bold red", markup=False)

    def question(self, text: str) -> None:
        """Print a question before its answer."""
        self._out.print(f"\n> {printable(text)}", style="bold cyan", markup=False)

    def read_message(self) -> str | None:
        """Read the next message: None at the end of the input, "" after Ctrl-C."""
        try:
            if sys.stdin.isatty():
                import readline  # noqa: F401 - gives input() its editing keys and history

                return input("\n> ").strip()
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            self.status("\n/exit ends the chat.")
            return ""
        except EOFError:
            self.print("")
            return None
        if line.strip() and not self.quiet:
            self.question(line.strip())
        return line.strip() if line else None

    # -- loading, reading, answering ---------------------------------------------------------------------------------

    @contextmanager
    def show_warnings(self) -> Iterator[None]:
        """Print each warning inside the block as one dim line on stderr."""

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            self._err.print(f"Note: {_one_line(message)}", style="dim", markup=False)

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield

    @contextmanager
    def show_steps(self, first: str) -> Iterator[TextCallback]:
        """Show the current step with a spinner. Yields a function that takes the next step."""
        if self.quiet or not self._err.is_terminal:
            yield lambda step: None
            return
        from rich.text import Text

        def line(step: str) -> Text:
            return Text(f"{printable(step)} ...")

        with self._err.status(line(first), spinner_style="dim") as status:
            yield lambda step: status.update(line(step))

    @contextmanager
    def show_reading(self) -> Iterator[ReadCallback]:
        """Show a progress bar of prompt tokens. Yields the callback for `LLM`."""
        with self._bar() as (progress, _):
            yield progress

    @contextmanager
    def stream_answer(self) -> Iterator[tuple[ReadCallback, TextCallback]]:
        """Show one answer. Yields the callback for prompt tokens, and a function that prints a chunk of text."""
        started, self._seconds_to_first_token = time.perf_counter(), 0.0
        with self._bar() as (progress, stop):

            def show(text: str) -> None:
                stop()
                self._seconds_to_first_token = self._seconds_to_first_token or time.perf_counter() - started
                self._out.print(printable(text), end="", markup=False)

            try:
                yield progress, show
            finally:
                stop()
                self._out.print()

    @contextmanager
    def _bar(self) -> Iterator[tuple[ReadCallback, Callable[[], None]]]:
        """Show a progress bar of prompt tokens. Yields its callback and a function that removes it."""
        if self.quiet or not self._err.is_terminal:
            yield lambda done, total: None, lambda: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("Reading"), BarColumn(), TextColumn("{task.fields[tokens]}, ETA"), TimeRemainingColumn())
        bar = Progress(*columns, console=self._err, transient=True)
        task = bar.add_task("", total=None, tokens="")
        started = time.perf_counter()

        def progress(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(task, completed=done, total=total, tokens=f"{done:,} of {total:,} tokens, {rate:,.0f}/s")

        with bar:
            yield progress, bar.stop

    # -- model, document, usage --------------------------------------------------------------------------------------

    def model(self, name: str, device: str, dtype: str) -> None:
        """Print which model runs on which device."""
        self.status(f"{name} on {device} in {dtype}")

    def document(self, title: str, tokens: int, cache: CacheConfig) -> None:
        """Print the length of a document, compared with the budget of the cache."""
        times = f", {tokens / cache.slots:.1f} times the {cache.slots:,} slots of the cache" if cache.slots else ""
        self.print(f"{title}: {tokens:,} tokens{times}")

    def usage(self, usage: Usage, full_nbytes: int) -> None:
        """Print the usage of an answer. `full_nbytes`: size of an exact cache of the same tokens."""
        prompt, new = usage.prompt_tokens, usage.prompt_tokens - usage.cached_tokens
        details = "" if new == prompt else f" ({new:,} of them now)"
        details += f", {usage.retrieved_tokens:,} retrieved" if usage.retrieved_tokens else ""
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds else 0.0
        self.status(
            f"{prompt:,} tokens read{details} | "
            f"cache {_megabytes(usage.cache_bytes)}, a full cache {_megabytes(full_nbytes)} | "
            f"first token after {self._seconds_to_first_token:.1f} s, then {rate:.1f} tokens/s"
        )
        counts = {"dropped": usage.dropped_tokens, "merged": usage.merged_tokens}
        if evicted := [f"{count:,} {how}" for how, count in counts.items() if count]:
            self.status(f"Tokens evicted (mean over heads and layers): {', '.join(evicted)}.")


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True, emoji=False)


def printable(text: str) -> str:
    """Return a text without control characters: names and answers must not send commands to the terminal."""
    return text.translate(_CONTROL_CHARACTERS)


_CONTROL_CHARACTERS = dict.fromkeys(
    [*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
"""Without tab and newline; with the C1 controls and the marks that reverse the direction of text."""


def _one_line(message: object) -> str:
    return " ".join(printable(str(message)).split())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
