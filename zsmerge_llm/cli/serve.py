"""`zsmerge-llm serve`: an HTTP server in the dialects of OpenAI and Anthropic, with a page to chat on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Annotated, Any

import typer

from zsmerge_llm.cli.console import LARGEST, Terminal
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import ConfigError, InputError, MissingDependencyError
from zsmerge_llm.server.settings import (
    KEYS,
    ServerSettings,
    check_exposure,
    environment_keys,
    is_loopback,
    responses_folder,
)


def serve(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, Hub id, folder or .gguf file.")
    ] = "smollm2",
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535)] = 8000,
    slots: Annotated[
        int | None, typer.Option(help="Budget of the KV cache: slots per head.", show_default="1024", max=LARGEST)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="int4, int8, nf4 or fp8.", show_default="none")] = None,
    sessions_dir: Annotated[
        str | None,
        typer.Option(help="Folder that keeps conversations, or its fsspec URL.", show_default="the user's data folder"),
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep conversations after the server has stopped.")] = True,
    session_memory: Annotated[str, typer.Option(help="Host memory for idle conversations.")] = "4GiB",
    alias: Annotated[list[str] | None, typer.Option(help="Another name of the model, for clients. Repeatable.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file with one API key a line, besides those in {KEYS}.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without API keys.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, where a request sets no limit.", max=LARGEST)] = 4096,
    max_requests: Annotated[int, typer.Option(help="Requests that may wait or be answered.", max=LARGEST)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer.")] = 600.0,
    replicas: Annotated[
        int, typer.Option(help="Processes with an engine each, behind one address.", min=1, max=1000)
    ] = 1,
    workers: Annotated[int, typer.Option(help="Must be 1.", hidden=True)] = 1,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's dialects, and a page to chat on at /."""
    if workers != 1:
        raise ConfigError(
            "--workers must be 1: one process owns the device, and answers requests together. For more, give "
            "--replicas: processes with an engine each, which continue the conversations of all."
        )
    if replicas > 1 and not keep:
        raise ConfigError("--replicas share conversations through the sessions folder: leave out --no-keep.")
    terminal = Terminal()
    with _server_packages():
        from zsmerge_llm.server.running import run_server
    folder = (sessions_dir or str(_sessions_folder())) if keep else None
    settings = ServerSettings(
        api_keys=_api_keys(api_key_file),
        aliases=tuple(alias or ()),
        max_tokens=max_tokens,
        timeout=timeout,
        responses_dir=responses_folder(folder),
    )
    check_exposure(host, settings, insecure)
    from zsmerge_llm import SchedulingConfig

    llm_settings = {
        "cache": CacheConfig() if slots is None else CacheConfig(slots=slots),
        "dtype": dtype,
        "quantization": quantization,
        "sessions_dir": folder,
        "session_memory": session_memory,
        "scheduling": SchedulingConfig(max_requests=max_requests),
    }
    devices = device.split(",")
    per_replica = [{**llm_settings, "device": devices[each % len(devices)]} for each in range(replicas)]
    with _listening(host, port) as listener:  # a port that is taken is an error before anything is loaded
        port = listener.getsockname()[1]
    kept = f"conversations are kept in {folder}" if folder else "conversations end with the server"
    start = _one_server if replicas == 1 else _several_servers
    with (
        terminal.show_warnings(),
        start(terminal, model, per_replica, settings, host) as app,
        _listening(host, port) as listener,
    ):
        terminal.status(_greeting(model, replicas, settings, f"{_in_url(host)}:{port}", kept))
        run_server(app, listener)


@contextmanager
def _one_server(
    terminal: Terminal, model: str, llm_settings: Sequence[dict[str, Any]], settings: ServerSettings, host: str
) -> Iterator[Any]:
    """Load a model in this process; yield its server."""
    with _server_packages():
        from zsmerge_llm import LLM
        from zsmerge_llm.server.app import create_app

    with terminal.show_steps(f"Loading {model}") as step:
        llm = LLM(model, **llm_settings[0], progress=step)
        llm.warm_up()
    with llm:
        yield create_app(llm, settings, loopback_only=is_loopback(host))


@contextmanager
def _several_servers(
    terminal: Terminal, model: str, llm_settings: Sequence[dict[str, Any]], settings: ServerSettings, host: str
) -> Iterator[Any]:
    """Load a model in processes of their own; yield a router that passes requests on to them."""
    with _server_packages():
        from zsmerge_llm.server.replicas.processes import ReplicaProcesses, ReplicaSettings
        from zsmerge_llm.server.replicas.router import create_router

    processes = ReplicaProcesses([ReplicaSettings(model, each, settings) for each in llm_settings])
    try:
        with terminal.show_steps(f"Loading {model} in {len(llm_settings)} processes"):
            processes.start()
        yield create_router(
            processes.replicas, settings, while_serving=processes.watched, loopback_only=is_loopback(host)
        )
    finally:
        processes.stop()


@contextmanager
def _server_packages() -> Iterator[None]:
    """Import what the server needs. Raises MissingDependencyError: a package is missing."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"The server needs the package {error.name}: pip install 'zsmerge-llm[server]'."
        ) from error


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket]:
    """Listen to an address. Raises InputError: it is taken, or none of this machine's."""
    try:
        listener = create_server((host, port), family=AF_INET6 if ":" in host else AF_INET, backlog=2048)
    except OSError as error:
        raise InputError(
            f"{host} port {port} cannot be listened to ({error.strerror}): give another --port."
        ) from error
    with listener:
        yield listener


def _api_keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of the environment and of a file. Raises InputError: it cannot be read, or has none."""
    keys = environment_keys()
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({error}): give a text file with one API key a line.") from error
        if not any(found):
            raise InputError(f"{file} has no API keys: write one a line.")
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key))


def _sessions_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("zsmerge-llm") / "server"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _greeting(model: str, replicas: int, settings: ServerSettings, address: str, kept: str) -> str:
    from zsmerge_llm.server.requests import served_name

    keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API keys"
    several = f" in {replicas} replicas" if replicas > 1 else ""
    return f"Serving {served_name(model)}{several} at http://{address} ({keys}; {kept}). Ctrl-C stops it."
