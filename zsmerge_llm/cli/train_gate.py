"""`zsmerge-llm train-gate`: make what scores a model's slots in documents that are read before their questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zsmerge_llm.cli.console import LARGEST, Terminal
from zsmerge_llm.cli.text_files import read_text
from zsmerge_llm.errors import ConfigError


def train_gate(
    texts: Annotated[list[Path], typer.Argument(help="Text files like the documents that will be read.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, Hub id, model folder or .gguf file (see `models`).")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens of text to train on.", min=1, max=LARGEST)] = 30_000,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu.")] = "auto",
) -> None:
    """Train a model's gate, which decides what is kept of documents that are read ahead. Later runs use it."""
    terminal = Terminal()
    found = [read_text(file) for file in texts]
    with terminal.show_steps(f"Loading {model}") as step:
        from zsmerge_llm import LLM
        from zsmerge_llm.engine.gate_training import train_gates
        from zsmerge_llm.language.chat_template import ChatTemplate
        from zsmerge_llm.models.gate_files import gates_path, model_key, save_gates
        from zsmerge_llm.retrieval.gate_texts import gate_texts

        llm = LLM(model, dtype=dtype, device=device, compile=False, progress=step)
        path = gates_path(model_key(llm.engine.model))
        _check_writable(path.parent)
        prepared = list(gate_texts(ChatTemplate(llm.tokenizer), found, tokens))
        size = sum(len(text.ids) for text in prepared)
        gates = train_gates(
            llm.engine, prepared, lambda done: step(f"Read {done} of {len(prepared)} parts of {size:,} tokens")
        )
        save_gates(path, gates)
    terminal.print(f"Trained on {size:,} tokens: {path}")


def _check_writable(folder: Path) -> None:
    """Check that a file can be written before minutes are spent on it. Raises ConfigError: it cannot."""
    from zsmerge_llm.paths import private_folder

    try:
        private_folder(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error}): set ZSMERGE_CACHE_DIR to another folder.") from error
