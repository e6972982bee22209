"""The command line: `zsmerge-llm demo | ask | chat | serve | sessions | inspect | plan | train-gate | models`.

Answers and usage go to stdout; progress, warnings and errors go to stderr (see `console`).
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
from zsmerge_llm.cli.console import LARGEST, CommandGroup, Terminal, flush_streams, open_streams
from zsmerge_llm.cli.plan import plan
from zsmerge_llm.cli.serve import serve
from zsmerge_llm.cli.sessions import inspect_session, sessions, sessions_folder
from zsmerge_llm.cli.text_files import read_text
from zsmerge_llm.cli.train_gate import train_gate
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
DEMO_END = """smollm2 is a very small model and gets harder questions wrong: --model takes another.
Next: zsmerge-llm ask FILE QUESTION, or zsmerge-llm chat"""
CHAT_HELP = """/reset  forget the conversation and start a new one
/help   print this list
/exit   end the chat (so does Ctrl-D)
Ctrl-C stops an answer."""


class Preset(str, Enum):
    """The presets of `CacheConfig`."""

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
    help="Local LLMs on a KV cache of constant size: documents and conversations of any length in fixed memory.",
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="Built-in name, Hub id, model folder or .gguf file (see `models`).")
]
Slots = Annotated[
    int | None,
    typer.Option(help="Budget of the KV cache: slots per head.", show_default="1024; full: no limit", max=LARGEST),
]
PresetOption = Annotated[Preset, typer.Option(help="Eviction policy; `full` evicts nothing and grows.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens of an answer.", max=LARGEST)]
Temperature = Annotated[float, typer.Option(help="0: greedy.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu.")]
QUANTIZATION_HELP = (
    "int4, int8: torch's kernels on a CPU; nf4, int8 on a GPU: bitsandbytes; int4, fp8 on a GPU: torchao."
)
Quantization = Annotated[str | None, typer.Option(help=QUANTIZATION_HELP, show_default="none")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answers only.")]


def main() -> None:
    """Run the program `zsmerge-llm`.

    Exit codes: 0 done; 1 a plan that does not fit, a pipe that was closed, or Ctrl-C; 2 wrong use, or an error that is
    said in one line on stderr.
    """
    open_streams()
    try:
        app()
    except SystemExit as end:
        code = end.code
    except OSError:  # help or a usage error could not be printed
        code = 2
    sys.exit(code if flush_streams() else code or 2)


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
    terminal = Terminal()
    text = files("zsmerge_llm").joinpath("data").joinpath(DEMO_TEXT).read_text(encoding="utf-8")
    with terminal.show_warnings():
        llm = _load(terminal, model, _cache_config(Preset.default, slots), "auto", "auto", None)
        terminal.document(text.partition("\n")[0], llm.count_tokens(text), llm.cache)
        for question in DEMO_QUESTIONS:
            terminal.question(question)
            _answer(terminal, llm, _document_messages(text, question), SamplingParams(max_tokens=60))
        terminal.print("")
        terminal.status(DEMO_END)


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
    preset: PresetOption = Preset.default,
    keep: Annotated[bool, typer.Option(help="Read for any question, and store the session.")] = False,
    quiet: Quiet = False,
) -> None:
    """Answer questions about a document of any length. It is read once, and the questions decide what is kept."""
    terminal = Terminal(quiet)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    cache = _cache_config(preset, slots)
    text = read_text(file)
    if not all(question.strip() for question in questions):
        raise InputError("The question is empty: put it in quotes behind the file.")
    with terminal.show_warnings():
        llm = _load(terminal, model, cache, dtype, device, quantization, sessions_folder() if keep else None)
        with terminal.show_reading() as progress:
            probe = None if keep else " ".join(questions)
            document = llm.read_document(text=text, name=file.name if keep else None, probe=probe, progress=progress)
        for question in questions:
            if len(questions) > 1:
                terminal.question(question)
            _answer(terminal, llm, [{"role": "user", "content": question}], sampling, session=document)


app.add_typer(sessions, name="sessions")
app.command("inspect")(inspect_session)
app.command("plan")(plan)
app.command("serve")(serve)
app.command("train-gate")(train_gate)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    model: Model = "smollm2",
    slots: Slots = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization: Quantization = None,
    preset: PresetOption = Preset.default,
    quiet: Quiet = False,
) -> None:
    """Chat with the model. Reads one message per line from a pipe."""
    terminal = Terminal(quiet)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    cache, messages = _cache_config(preset, slots), list(start)
    with terminal.show_warnings():
        llm = _load(terminal, model, cache, dtype, device, quantization)
        if sys.stdin.isatty():
            terminal.status("/help lists the commands, /exit ends the chat.")
        while (line := terminal.read_message()) is not None and line != "/exit":
            if line == "/reset":
                messages = list(start)
                terminal.status("A new conversation.")
            elif line.startswith("/"):
                terminal.status(CHAT_HELP if line == "/help" else f"There is no command {line}.\n{CHAT_HELP}")
            elif line:
                messages = _turn(terminal, llm, messages, line, sampling)


@app.command()
def models() -> None:
    """List the built-in models and the other forms of --model."""
    from zsmerge_llm.models.loader import builtin_models

    terminal = Terminal()
    for known in builtin_models():
        terminal.print(f"{known.name}  {known.description}")
        terminal.print(f"{' ' * len(known.name)}  {'cached' if known.cached else 'downloaded at the first use'}")
    terminal.print("")
    terminal.print("--model also takes")
    terminal.print("  a Hub id          Qwen/Qwen2.5-0.5B-Instruct")
    terminal.print("  a model folder    ./my-model (config.json, weights in safetensors, tokenizer)")
    terminal.print("  a GGUF file       ./model.gguf (dequantized once, then cached)")


def _cache_config(preset: Preset, slots: int | None) -> CacheConfig:
    """Return the cache's configuration. Raises ConfigError: slots for the cache without a limit."""
    if preset is Preset.full:
        if slots is not None:
            raise ConfigError("--preset full has no budget: leave out --slots, or choose another preset.")
        return CacheConfig.full()
    size = CacheConfig().slots if slots is None else slots
    assert size is not None  # the default budget
    presets = {"paper": CacheConfig.paper, "h2o": CacheConfig.h2o, "streaming": CacheConfig.streaming}
    return CacheConfig(slots=size) if preset is Preset.default else presets[preset.value](size)


def _load(
    terminal: Terminal,
    model: str,
    cache: CacheConfig,
    dtype: str,
    device: str,
    quantization: str | None,
    sessions_dir: Path | None = None,
) -> LLM:
    """Load a model, and show the steps on the terminal."""
    with terminal.show_steps(f"Loading {model}") as step:
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
        loaded, backend = llm.engine.model, llm.engine.backend
        if backend.pending_build:
            step("Loading the prefill kernels, built once on a machine in about 10 s")
            backend.warm_up()
    terminal.model(llm.name, str(loaded.device), str(loaded.dtype).removeprefix("torch."))
    return llm


def _document_messages(text: str, question: str) -> list[Message]:
    """Return a prompt that ends with the question: the cache keeps the tokens that its end attends to."""
    return [{"role": "user", "content": f"{text.rstrip()}\n\n{question}"}]


def _turn(terminal: Terminal, llm: LLM, messages: list[Message], line: str, sampling: SamplingParams) -> list[Message]:
    """Answer one message of a chat. Returns the conversation, unchanged if there is no answer."""
    prompt = [*messages, {"role": "user", "content": line}]
    cancel = Event()
    try:
        with _ctrl_c(cancel):
            text = _answer(terminal, llm, prompt, sampling, cancel)
    except InputError as error:  # the chat continues
        terminal.error(error)
        return messages
    return [*prompt, {"role": "assistant", "content": text}] if text else messages


def _answer(
    terminal: Terminal,
    llm: LLM,
    messages: list[Message],
    sampling: SamplingParams,
    cancel: Event | None = None,
    session: Session | None = None,
) -> str:
    """Stream one answer to the terminal, print its usage, and return its text."""
    text, last = "", None
    with terminal.stream_answer() as (progress, show):
        for last in llm.stream(messages, sampling=sampling, session=session, cancel=cancel, progress=progress):
            text += last.text
            show(last.text)
    assert last is not None
    _print_usage(terminal, llm, last, sampling)
    return text


def _print_usage(terminal: Terminal, llm: LLM, last: Chunk, sampling: SamplingParams) -> None:
    """Print the usage of an answer, and why it ended early."""
    usage = last.usage
    assert usage is not None
    terminal.usage(usage, full_nbytes=llm.engine.new_cache(rows=0).full_nbytes(usage.total_tokens))
    if last.finish_reason == "length":
        terminal.status(f"The answer was cut at {sampling.max_tokens} tokens: --max-tokens allows more.")
    elif last.finish_reason == "cancelled":
        terminal.status("Stopped.")


@contextmanager
def _ctrl_c(cancel: Event) -> Iterator[None]:
    """Make Ctrl-C set `cancel`, which keeps the cache consistent. A second Ctrl-C interrupts as usual."""

    def stop(number: int, frame: Any) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
