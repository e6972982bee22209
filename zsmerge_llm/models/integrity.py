"""Whether a model's files are what was fetched or converted, and one digest of all bytes of its weights.

A file is read once: its SHA-256 is kept in the cache folder with its size and times, and counts until they change.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import ConfigError, CorruptModelError
from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.models.weight_files import weight_files
from zsmerge_llm.paths import check_folder, private_folder
from zsmerge_llm.types import CONFIG_ORIGIN

SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")
"""Endings of the files that make up a model."""
SETTLED_NS = 100_000_000
"""Nanoseconds after which a file that is written again has another time on every file system."""


def weights_digest(folder: Path, cache: Path) -> str:
    """Return a digest of all bytes of a folder's weights, and of its config. The folder's place is no part of it.

    Raises:
        CorruptModelError: a file cannot be read.
    """
    config = read_json(folder / "config.json")
    kept = config
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in CONFIG_ORIGIN}
    digests = file_digests(folder, (path.name for path in weight_files(folder)), cache)
    return _sha256(json.dumps([kept, sorted(digests.items())], sort_keys=True))


def verify(folder: Path, cache: Path, remedy: str) -> None:
    """Check that a folder's files are what they were when it was verified first, and then what the Hub calls them.

    Args:
        remedy: what to do about a file that is not.

    Raises:
        CorruptModelError: a file has changed, or is gone.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    found, record = file_digests(folder, names, cache), _record(folder, cache, "fetched")
    expected = _read_private(record)
    if not expected:
        expected = {name: digest for name in names if (digest := _hub_digest(folder / name, found[name]))}
        _write_private(record, {**found, **expected})
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise CorruptModelError(f"{folder / name} has changed since it was put there: {remedy}.")


def file_digests(folder: Path, names: Iterable[str], cache: Path) -> dict[str, str]:
    """Return the SHA-256 of files by name. One that has its size and times of an earlier call is not read again.

    Raises:
        CorruptModelError: a file cannot be read.
    """
    path = _record(folder, cache, "digests")
    known = _read_private(path)
    found, kept = {}, {}
    for name in names:
        try:
            times = _size_and_times(folder / name)
            entry = known.get(name)
            if not (isinstance(entry, list) and entry[:-1] == times and isinstance(entry[-1], str)):
                settled = time.time_ns() - max(times[1:]) > SETTLED_NS
                entry = [*times, _digest(folder / name)]
                if not settled or _size_and_times(folder / name) != times:
                    times = []
        except (OSError, ValueError) as error:
            raise CorruptModelError(f"{folder / name} cannot be read ({error}): fetch the model again.") from error
        found[name] = entry[-1]
        if times:
            kept[name] = entry
    if {**known, **kept} != known:
        _write_private(path, {**known, **kept})
    return found


def remembered_digest(content: str, find: Callable[[], str], cache: Path) -> str:
    """Return what `find` gives for a content. It is kept in the cache folder, by the content's own SHA-256."""
    path = cache / "digests" / f"{_sha256(content)}.json"
    known = _read_private(path).get("digest")
    if isinstance(known, str):
        return known
    digest = find()
    _write_private(path, {"digest": digest})
    return digest


def pinned_revision(source: str, cache: Path) -> str | None:
    """Return the revision of a Hub model that was fetched first; None where none was."""
    revision = _read_private(_pin(source, cache)).get("revision")
    return revision if isinstance(revision, str) else None


def pin_revision(source: str, revision: str, cache: Path) -> None:
    """Keep the revision of a Hub model for later loads."""
    _write_private(_pin(source, cache), {"revision": revision})


def read_json(path: Path) -> Any:
    """Return what a JSON file of a model holds.

    Raises:
        CorruptModelError: it cannot be read, is no JSON, or is nested too deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptModelError(
            f"The {path.name} of {path.parent} cannot be read ({error}): fetch it again."
        ) from error


def _pin(source: str, cache: Path) -> Path:
    return cache / "fetched" / f"{source.replace('/', '--')}.json"


def _record(folder: Path, cache: Path, kind: str) -> Path:
    return cache / kind / f"{_sha256(str(folder.resolve()))[:32]}.json"


def _size_and_times(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()


def _hub_digest(path: Path, digest: str) -> str | None:
    """Return the SHA-256 that the Hub knows a file by; None for one that is none of its blobs.

    huggingface_hub names a blob by its SHA-256, or by Git's SHA-1 where it is small.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return None
    if len(blob.name) == 64:
        return blob.name
    content = blob.read_bytes()
    same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return digest if same or len(blob.name) != 40 else blob.name


def _read_private(path: Path) -> dict[str, Any]:
    """Return a JSON object of the cache folder; an empty one where there is none that can be trusted."""
    with suppress(OSError, ValueError, RecursionError):
        check_folder(path.parent)
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _write_private(path: Path, content: dict[str, Any]) -> None:
    """Keep a JSON object in the cache folder; where that is not possible, the next process computes it again."""
    with suppress(OSError, ConfigError):
        private_folder(path.parent)
        write_atomically(path, json.dumps(content).encode(), durable=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
