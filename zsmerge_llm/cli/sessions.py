"""Commands on kept sessions: `zsmerge-llm sessions list | show | rm` and `zsmerge-llm inspect`."""

from __future__ import annotations

import re
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsmerge_llm.cli.console import CommandGroup, Terminal
from zsmerge_llm.errors import InputError, SessionMismatchError, SessionNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.inspection.memory_map import MemoryMap
    from zsmerge_llm.sessions.session import Session

sessions = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Conversations and documents that were kept.")
Folder = Annotated[Path | None, typer.Option("--dir", help="Their folder.", show_default="that of ask --keep")]


@sessions.command("list")
def list_sessions(folder: Folder = None) -> None:
    """List the sessions kept in a folder."""
    screen = Terminal()
    found = _kept(folder)
    for about, path in found:
        what = "document" if about["has_document"] else f"{about['messages']} messages"
        screen.plain(f"{about['name']}  {about['tokens']:,} tokens, {what}, {path.stat().st_size / 1e6:,.1f} MB")
    if not found:
        screen.note(f"There are no sessions in {folder or sessions_folder()}.")


@sessions.command("show")
def show_session(name: str, folder: Folder = None) -> None:
    """What is known of one session."""
    screen = Terminal()
    for about, path in _named(name, folder):
        screen.plain(f"{path}")
        for key in ("name", "tokens", "messages", "today"):
            screen.plain(f"  {key}: {about[key]}")
        screen.plain(f"  document: {'yes' if about['has_document'] else 'no'}")
        screen.plain(f"  cache: {about['fingerprint']['cache']}")


@sessions.command("rm")
def remove_session(name: str, folder: Folder = None) -> None:
    """Delete one session."""
    for _, path in _named(name, folder):
        path.unlink()
        Terminal().note(f"Deleted {path}.")


def inspect_session(
    session: Annotated[str, typer.Argument(help="Its name (see `sessions list`), or the path of a saved file.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model it was made with; only its tokenizer is loaded.")
    ] = "smollm2",
    folder: Folder = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes.", show_default="SESSION.html")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show what the model still holds of a session: an HTML page with every token shaded by it."""
    screen = Terminal()
    path = _file(session, folder)
    with screen.warnings(), screen.steps(f"Reading {path.name}"):
        from zsmerge_llm.inspection.html import write_html
        from zsmerge_llm.inspection.memory_map import memory_map

        opened = _open(path)
        found = memory_map(opened)
        tokenizer = _tokenizer(model, opened)
        target = output or Path(re.sub(r"[^\w.-]+", "-", opened.name).strip(".-") or "session").with_suffix(".html")
        try:
            write_html(found, tokenizer, target, opened.name)
        except OSError as error:
            raise InputError(f"{target} cannot be written ({error.strerror}): give another --output.") from error
    _summary(screen, found)
    screen.plain(f"{target}: {target.stat().st_size / 1e3:,.0f} kB")
    if show:
        webbrowser.open(target.resolve().as_uri())


def sessions_folder() -> Path:
    """Where `ask --keep` keeps what it read."""
    from platformdirs import user_data_path

    return user_data_path("zsmerge-llm") / "sessions"


def _kept(folder: Path | None) -> list[tuple[dict[str, Any], Path]]:
    """The sessions in a folder, by name; damaged files are left out."""
    from zsmerge_llm.sessions.folder import list_folder

    return sorted(list_folder(folder or sessions_folder()), key=lambda entry: entry[0]["name"])


def _named(name: str, folder: Path | None) -> list[tuple[dict[str, Any], Path]]:
    """All of that name: several models may have one each. Raises SessionNotFoundError."""
    every = _kept(folder)
    found = [entry for entry in every if entry[0]["name"] == name]
    if not found:
        known = ", ".join(entry[0]["name"] for entry in every) or "none"
        raise SessionNotFoundError(f"There is no session {name!r}; there are: {known}.")
    return found


def _file(session: str, folder: Path | None) -> Path:
    """The file of a session that was named, or is given by its path. Raises SessionNotFoundError, InputError."""
    path = Path(session)
    if path.is_file() or path.suffix == ".zsmerge" or path.name != session:
        return path
    paths = [path for _, path in _named(session, folder)]
    if len(paths) > 1:
        known = ", ".join(str(path) for path in paths)
        raise InputError(f"Several models have a session {session!r}: give the path of one ({known}).")
    return paths[0]


def _open(path: Path) -> Session:
    """A saved session, on the CPU wherever it was made. Raises as `session.load_session`."""
    from zsmerge_llm.sessions.file_format import read_metadata
    from zsmerge_llm.sessions.session import load_session

    return load_session(path, devices=["cpu"] * len(read_metadata(path)["cache"]["specs"]))


def _tokenizer(model: str, session: Session) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights.

    Raises:
        LoadError: no such model. SessionMismatchError: the session was made with another one.
    """
    from zsmerge_llm.models.loader import load_tokenizer
    from zsmerge_llm.sessions.fingerprint import tokenizer_digest

    tokenizer = load_tokenizer(model)
    if tokenizer_digest(tokenizer) != session.fingerprint.tokenizer:
        raise SessionMismatchError(
            f"Session {session.name!r} was made with another tokenizer than that of {model}: give its model as --model."
        )
    return tokenizer


def _summary(screen: Terminal, found: MemoryMap) -> None:
    """The headline figures."""
    if found.whole:
        screen.note(f"All {found.seen:,} tokens read are held verbatim by every head.")
        return
    screen.note(
        f"{found.seen:,} tokens read; a head holds {found.verbatim:,.0f} of them verbatim "
        f"(mean over {found.pairs:,} heads), {found.nowhere:,} are held by none."
    )
