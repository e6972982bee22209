"""Commands on stored sessions: `zsmerge-llm sessions list | show | rm` and `zsmerge-llm inspect`."""

from __future__ import annotations

import re
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsmerge_llm.cli.console import CommandGroup, Terminal
from zsmerge_llm.errors import InputError, SessionCorruptError, SessionMismatchError, SessionNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.inspection.memory_map import MemoryMap
    from zsmerge_llm.sessions.session import Session

sessions = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Stored conversations and documents.")
Folder = Annotated[Path | None, typer.Option("--dir", help="Sessions folder.", show_default="that of ask --keep")]


@sessions.command("list")
def list_sessions(folder: Folder = None) -> None:
    """List the sessions in a folder."""
    terminal = Terminal()
    found = _list(folder)
    for metadata, path in found:
        what = "document" if metadata["has_document"] else f"{metadata['messages']} messages"
        terminal.print(
            f"{metadata['name']}  {metadata['tokens']:,} tokens, {what}, {path.stat().st_size / 1e6:,.1f} MB on disk"
        )
    if not found:
        terminal.status(f"There are no sessions in {folder or sessions_folder()}.")


@sessions.command("show")
def show_session(name: str, folder: Folder = None) -> None:
    """Show the properties of a session."""
    terminal = Terminal()
    for metadata, path in _find(name, folder):
        terminal.print(f"{path}")
        for key in ("name", "tokens", "messages", "today"):
            terminal.print(f"  {key}: {metadata[key]}")
        terminal.print(f"  document: {'yes' if metadata['has_document'] else 'no'}")
        terminal.print(f"  cache: {metadata['fingerprint']['cache']}")


@sessions.command("rm")
def remove_session(name: str, folder: Folder = None) -> None:
    """Delete a session."""
    from zsmerge_llm.sessions.folder import delete_files

    for _, path in _find(name, folder):
        delete_files(path)
        Terminal().status(f"Deleted {path}.")


def inspect_session(
    session: Annotated[str, typer.Argument(help="Name (see `sessions list`) or path of a saved session.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The session's model; only its tokenizer is loaded.")
    ] = "smollm2",
    folder: Folder = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Path of the page.", show_default="SESSION.html")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write an HTML page that shows which tokens of a session the KV cache holds, merged or dropped."""
    terminal = Terminal()
    path = _file(session, folder)
    with terminal.show_warnings(), terminal.show_steps(f"Reading {path.name}"):
        from zsmerge_llm.inspection.html import write_html
        from zsmerge_llm.inspection.memory_map import memory_map
        from zsmerge_llm.sessions.session import load_session

        opened = load_session(path)
        memory = memory_map(opened)
        tokenizer = _tokenizer(model, opened)
        target = output or Path(re.sub(r"[^\w.-]+", "-", opened.name).strip(".-") or "session").with_suffix(".html")
        write_html(memory, tokenizer, target, opened.name)
    _print_summary(terminal, memory)
    terminal.print(f"{target}: {target.stat().st_size / 1e3:,.0f} kB")
    if show:
        webbrowser.open(target.resolve().as_uri())


def sessions_folder() -> Path:
    """Return the folder in which `ask --keep` stores sessions."""
    from platformdirs import user_data_path

    return user_data_path("zsmerge-llm") / "sessions"


def _list(folder: Path | None) -> list[tuple[dict[str, Any], Path]]:
    """Return metadata and path of the sessions in a folder, sorted by name, without damaged files.

    Raises:
        InputError: the folder that was given is none, or cannot be read.
    """
    from zsmerge_llm.sessions.folder import list_folder

    if folder is not None:
        try:
            next(folder.iterdir(), None)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is no folder that can be read ({error}): give another --dir.") from error
    return sorted(list_folder(folder or sessions_folder()), key=lambda entry: entry[0]["name"])


def _find(name: str, folder: Path | None) -> list[tuple[dict[str, Any], Path]]:
    """Return all sessions of a name: several models may have one each. Raises SessionNotFoundError."""
    stored = _list(folder)
    found = [entry for entry in stored if entry[0]["name"] == name]
    if not found:
        known = ", ".join(entry[0]["name"] for entry in stored) or "none"
        raise SessionNotFoundError(f"There is no session {name!r}; there are: {known}.")
    return found


def _file(session: str, folder: Path | None) -> Path:
    """Return the file of a session given by name or path. Raises SessionNotFoundError, InputError."""
    from zsmerge_llm.sessions.file_format import read_metadata
    from zsmerge_llm.sessions.validation import check_facts

    path = Path(session)
    if path.suffix == ".zsmerge":
        return path
    is_stored = any(entry[0]["name"] == session for entry in _list(folder))  # `ask --keep` names one after its file
    if not is_stored and (path.is_file() or path.name != session):
        try:
            read_metadata(path, check_facts)
        except SessionCorruptError as error:
            raise InputError(f"{path} is no saved session: give the name of one, or a .zsmerge file.") from error
        return path
    paths = [path for _, path in _find(session, folder)]
    if len(paths) > 1:
        known = ", ".join(str(path) for path in paths)
        raise InputError(f"Several models have a session {session!r}: give the path of one ({known}).")
    return paths[0]


def _tokenizer(model: str, session: Session) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, without its weights.

    Raises:
        LoadError: no such model. SessionMismatchError: the session has another model's tokens.
    """
    from zsmerge_llm.models.loader import load_tokenizer
    from zsmerge_llm.sessions.fingerprint import tokenizer_digest

    tokenizer = load_tokenizer(model)
    if tokenizer_digest(tokenizer) != session.fingerprint.tokenizer:
        raise SessionMismatchError(
            f"Session {session.name!r} was made with another tokenizer than that of {model}: give its model as --model."
        )
    return tokenizer


def _print_summary(terminal: Terminal, memory: MemoryMap) -> None:
    """Print the headline figures of a memory map."""
    if memory.is_complete:
        terminal.status(f"All {memory.seen:,} tokens read are held verbatim by every head.")
        return
    terminal.status(
        f"{memory.seen:,} tokens read; a head holds {memory.verbatim_tokens:,.0f} of them verbatim, "
        f"{memory.merged_tokens:,.0f} merged, and dropped {memory.dropped_tokens:,.0f} "
        f"(mean over {memory.num_heads:,} heads); {memory.num_unheld:,} are held by none."
    )
