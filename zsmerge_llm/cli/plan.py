"""`zsmerge-llm plan`: what a model and its conversations take of memory, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from zsmerge_llm.cli.console import LARGEST, Terminal
from zsmerge_llm.config import CacheConfig


def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, Hub id, model folder or .gguf file (see `models`).")
    ] = "smollm2",
    slots: Annotated[int, typer.Option(help="Budget of the KV cache: slots per head.", max=LARGEST)] = 1024,
    sessions: Annotated[int, typer.Option(help="Conversations in memory at once.", max=LARGEST)] = 1,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens of a pass; by default what suits the device.", max=LARGEST)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="int4 or int8 on a CPU; nf4 or int8 on a GPU.", show_default="none")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help='Memory of another machine, such as "16GiB".', show_default="what is free here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan the memory of a model and its conversations. Reads no weights; exits with 1 where they do not fit."""
    terminal = Terminal(quiet=as_json)
    with terminal.show_steps(f"Planning {model}") as step:
        from zsmerge_llm.planning import plan as make_plan

        made = make_plan(
            model,
            cache=CacheConfig(slots=slots),
            sessions=sessions,
            chunk="auto" if chunk is None else chunk,
            dtype=dtype,
            device=device,
            quantization=quantization,
            memory=memory,
            progress=step,
        )
    terminal.print(json.dumps(made.to_dict(), indent=2) if as_json else str(made))
    if not made.fits:
        if not as_json:
            terminal.print(made.remedy or "")
        raise typer.Exit(1)
