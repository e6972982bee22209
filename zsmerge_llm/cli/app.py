"""The command line: `zsmerge-llm demo | ask | chat | sessions | inspect | models`.

Answers and what they cost go to stdout; progress, warnings and errors go to stderr (see `screen`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsmerge_llm import __version__
from zsmerge_llm.cli.console import CommandGroup, Terminal
from zsmerge_llm.cli.sessions import inspect_session, sessions, sessions_folder
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from zsmerge_llm import LLM, Session
    from zsmerge_llm.types import Chunk, Message

DEMO_TEXT = "marigold.txt"
DEMO_QUESTIONS = (
    "Who is the captain of the Marigold?",
    "What is the name of the cat?",
    "Who is the keeper of the lighthouse?",
)
DEMO_END = """These answers are the model's own. smollm2 is very small and gets harder questions wrong.
--model takes another. Next: zsmerge-llm ask FILE QUESTION, or zsmerge-llm chat"""
CHAT_HELP = """/reset  forget the conversation and begin anew
/help   this list
/exit   leave (so does Ctrl-D)
Ctrl-C stops an answer."""


class Preset(str, Enum):
    """The named cache rules of `CacheConfig`."""

    default = "default"
    paper = "paper"
    h2o = "h2o"
    streaming = "streaming"
    full = "full"


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Local LLMs on a cache of constant size: whole documents and endless conversations in fixed memory.",
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="Built-in name, Hub id, model folder or .gguf file (see `models`).")
]
Slots = Annotated[
    int | None,
    typer.Option(help="Tokens that the cache of every head holds.", show_default="1024; full: no limit"),
]
Rule = Annotated[Preset, typer.Option(help="What the cache keeps; `full` keeps everything and grows.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu.")]
QUANTIZATION_HELP = "int4 or int8: torch's kernels on a CPU; nf4, and int8 on a GPU: bitsandbytes."
Quantization = Annotated[str | None, typer.Option(help=QUANTIZATION_HELP, show_default="none")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The answers alone.")]


def main() -> None:
    """The program `zsmerge-llm`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model's text may hold what the terminal's encoding lacks
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zsmerge-llm {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def demo(model: Model = "smollm2", slots: Slots = None) -> None:
    """Read a document longer than the cache and answer questions about it, in a minute."""
    screen = Terminal()
    text = files("zsmerge_llm").joinpath("data").joinpath(DEMO_TEXT).read_text(encoding="utf-8")
    with screen.warnings():
        llm = _open(screen, model, _cache(Preset.default, slots), "auto", "auto", None)
        screen.about(text.partition("\n")[0], llm.count_tokens(text), llm.cache)
        for question in DEMO_QUESTIONS:
            screen.question(question)
            _answer(screen, llm, _about(text, question), SamplingParams(max_tokens=60))
        screen.plain("")
        screen.note(DEMO_END)


@app.command()
def ask(
    file: Annotated[Path, typer.Argument(help="A text file in UTF-8, or - for standard input.")],
    questions: Annotated[list[str], typer.Argument(help="One or more, each in quotes.")],
    model: Model = "smollm2",
    slots: Slots = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = None,
    preset: Rule = Preset.default,
    keep: Annotated[bool, typer.Option(help="Read for any question and keep what was read for the next time.")] = False,
    quiet: Quiet = False,
) -> None:
    """Answer questions about a document of any length. It is read once, with all the questions in mind."""
    screen = Terminal(quiet)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    cache = _cache(preset, slots)
    text = _read(file)
    if not all(question.strip() for question in questions):
        raise InputError("The question is empty: put it in quotes behind the file.")
    with screen.warnings():
        llm = _open(screen, model, cache, dtype, device, quantization, sessions_folder() if keep else None)
        with screen.reading() as progress:
            probe = None if keep else " ".join(questions)
            document = llm.read_document(text=text, name=file.name if keep else None, probe=probe, progress=progress)
        for question in questions:
            if len(questions) > 1:
                screen.question(question)
            _answer(screen, llm, [{"role": "user", "content": question}], sampling, session=document)


app.add_typer(sessions, name="sessions")
app.command("inspect")(inspect_session)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    model: Model = "smollm2",
    slots: Slots = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = None,
    preset: Rule = Preset.default,
    quiet: Quiet = False,
) -> None:
    """Talk with the model for as long as you like; reads one message a line where input is piped."""
    screen = Terminal(quiet)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    cache, messages = _cache(preset, slots), list(start)
    with screen.warnings():
        llm = _open(screen, model, cache, dtype, device, quantization)
        if sys.stdin.isatty():
            screen.note("/help lists the commands, /exit leaves.")
        while (line := screen.ask()) is not None and line != "/exit":
            if line == "/reset":
                messages = list(start)
                screen.note("A new conversation.")
            elif line.startswith("/"):
                screen.note(CHAT_HELP if line == "/help" else f"There is no command {line}.\n{CHAT_HELP}")
            elif line:
                messages = _turn(screen, llm, messages, line, sampling)


@app.command()
def models() -> None:
    """List the models known by name, and say what else may be given."""
    from zsmerge_llm.models.loader import builtin_models

    screen = Terminal()
    for known in builtin_models():
        screen.plain(f"{known.name}  {known.description}")
        screen.plain(f"{' ' * len(known.name)}  {'in the cache' if known.cached else 'fetched on first use'}")
    screen.plain("")
    screen.plain("--model also takes")
    screen.plain("  a Hub id          Qwen/Qwen2.5-0.5B-Instruct")
    screen.plain("  a model folder    ./my-model (config.json, weights in safetensors, tokenizer)")
    screen.plain("  a GGUF file       ./model.gguf (dequantised once, then cached)")


def _cache(preset: Preset, slots: int | None) -> CacheConfig:
    """The cache that was asked for. Raises ConfigError on slots for the cache without a limit."""
    if preset is Preset.full:
        if slots is not None:
            raise ConfigError("--preset full keeps everything: leave out --slots, or choose another preset.")
        return CacheConfig.full()
    size = CacheConfig().slots if slots is None else slots
    assert size is not None
    presets = {"paper": CacheConfig.paper, "h2o": CacheConfig.h2o, "streaming": CacheConfig.streaming}
    return CacheConfig(slots=size) if preset is Preset.default else presets[preset.value](size)


def _open(
    screen: Terminal,
    model: str,
    cache: CacheConfig,
    dtype: str,
    device: str,
    quantization: str | None,
    sessions_dir: Path | None = None,
) -> LLM:
    """A model, loaded, with its steps on the screen."""
    with screen.steps(f"Loading {model}") as step:
        from zsmerge_llm import LLM

        llm = LLM(
            model,
            cache=cache,
            dtype=dtype,
            device=device,
            quantization=quantization,
            sessions_dir=sessions_dir,
            progress=step,
        )
        network, backend = llm.engine.model, llm.engine.backend
        if backend.pending_build:
            step("Loading the kernels that read, built once on a machine in about 10 s")
            backend.warm_up()
    screen.loaded(llm.name, str(network.device), str(network.dtype).removeprefix("torch."))
    return llm


def _read(file: Path) -> str:
    """The text of a file, or of standard input for "-". Raises InputError where there is none."""
    name = "standard input" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {name}: check the path.") from error
    except OSError as error:  # a folder, no permission
        raise InputError(f"{name} cannot be read ({error.strerror}): give a text file.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} is not text in UTF-8: convert it first (a PDF with pdftotext, say).")
    if not text.strip():
        raise InputError(f"{name} is empty: give a file with some text.")
    return text


def _about(text: str, question: str) -> list[Message]:
    """The question comes last: what a prompt ends with tells the cache what to keep while it reads."""
    return [{"role": "user", "content": f"{text.rstrip()}\n\n{question}"}]


def _turn(screen: Terminal, llm: LLM, messages: list[Message], line: str, sampling: SamplingParams) -> list[Message]:
    """One turn of a chat: the conversation with the answer, or as it was where there is none."""
    asked = [*messages, {"role": "user", "content": line}]
    cancel = Event()
    try:
        with _ctrl_c(cancel):
            text = _answer(screen, llm, asked, sampling, cancel)
    except InputError as error:  # this message cannot be used; the next one may be
        screen.error(error)
        return messages
    return [*asked, {"role": "assistant", "content": text}] if text else messages


def _answer(
    screen: Terminal,
    llm: LLM,
    messages: list[Message],
    sampling: SamplingParams,
    cancel: Event | None = None,
    session: Session | None = None,
) -> str:
    """Stream one answer to the screen, with what it cost."""
    text, last = "", None
    with screen.answer() as (progress, show):
        for last in llm.stream(messages, sampling=sampling, session=session, cancel=cancel, progress=progress):
            text += last.text
            show(last.text)
    assert last is not None
    _report(screen, llm, last, sampling)
    return text


def _report(screen: Terminal, llm: LLM, last: Chunk, sampling: SamplingParams) -> None:
    """The memory line."""
    usage = last.usage
    assert usage is not None
    full = llm.engine.new_cache(rows=0).full_nbytes(usage.total_tokens)
    screen.memory(usage, full)
    if last.finish_reason == "length":
        screen.note(f"The answer was cut at {sampling.max_tokens} tokens: --max-tokens allows more.")
    elif last.finish_reason == "cancelled":
        screen.note("Stopped.")


@contextmanager
def _ctrl_c(cancel: Event) -> Iterator[None]:
    """Ctrl-C sets `cancel`, which leaves the cache whole; a second Ctrl-C interrupts as usual."""

    def stop(number: int, frame: Any) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
