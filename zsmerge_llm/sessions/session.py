"""A conversation as a session: exact token ids, the compressed cache, and snapshots to go back to.

A `Snapshot` is never changed: whoever reads on works on a copy of its cache. So branches, forks and concurrent requests
share snapshots and cannot corrupt each other. A `Session` is a named line of snapshots. Its head is after the last
answer: a turn that is not answered leaves it where it is. Saved are the head and, in a file beside it, the last
answered point before it.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from zsmerge_llm.errors import InputError, SessionMismatchError, SessionStorageError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.paths import as_path
from zsmerge_llm.retrieval.saved_index import is_index
from zsmerge_llm.retrieval.section_notes import SectionNotes, notes_from
from zsmerge_llm.sessions import file_format
from zsmerge_llm.sessions.identity import Fingerprint, Kind
from zsmerge_llm.sessions.token_ids import TokenIds
from zsmerge_llm.sessions.validation import ExpectedCache, SavedCache, check_facts, check_header, check_tensors

if TYPE_CHECKING:
    from zsmerge_llm.sessions.transcript import Transcript

MAX_ANSWER_SNAPSHOTS = 4
"""Snapshots after answers that a session keeps: the newest two, and older ones ever further apart."""

MAX_SNAPSHOTS = {"prompt": 1, "prefix": 1, "branch": 2}
"""Snapshots of other kinds that it keeps, the newest ones."""
Tier = Literal["device", "host", "disk"]
"""Where a conversation is kept: where the model computes, in host memory, or in a file."""


@dataclass(frozen=True)
class SessionInfo:
    """One session as it is listed, and recognised in a saved file without reading its tensors.

    Attributes:
        named: whether the caller chose the name.
        digest: digest of the messages up to the head.
        messages, tokens: their number up to the head.
        prefix_digests: digests of all prefixes of its messages, the shortest first.
        has_document: whether it is about a document.
        is_document: whether it is that document itself, before any question.
        nbytes: bytes in memory or, where `in_memory` is False, on disk.
        used: when it was last used, in seconds since 1970.
        path: its file, for a session on disk.
        tier: where its head is. On a model that computes in host memory there is no "device".
        kind: that of the head, as for `Snapshot`.
        stamp: tells the file from every other one that was or will be at its path.
    """

    name: str
    named: bool
    digest: str
    messages: int
    tokens: int
    prefix_digests: tuple[str, ...]
    has_document: bool
    is_document: bool
    nbytes: int
    used: float
    path: Path | None = None
    tier: Tier = "host"
    kind: Kind = "answer"
    stamp: tuple[int, ...] = ()

    @property
    def in_memory(self) -> bool:
        return self.path is None

    def to_metadata(self) -> dict[str, Any]:
        """Return what a file's header holds, as JSON values."""
        elsewhere = ("nbytes", "used", "path", "tier", "stamp")  # the file system knows these
        return {key: value for key, value in asdict(self).items() if key not in elsewhere}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], path: Path) -> SessionInfo:
        """Return the description of the saved session at `path`. Raises OSError: the file is gone."""
        stat = path.stat()
        values = {key: metadata[key] for key in cls.__dataclass_fields__ if key in metadata}
        values["prefix_digests"] = tuple(metadata["prefix_digests"])
        return cls(**values, nbytes=stat.st_size, used=stat.st_mtime, path=path, tier="disk", stamp=file_stamp(stat))


def file_stamp(stat: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from every other one that was or will be at its path."""
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state of a conversation that requests can resume from. Never mutated.

    Attributes:
        digest: digest of the messages it stands for.
        messages: their number.
        tokens: the exact ids. The last ones may not be in the cache yet.
        kind: where it ends: after a prefix that conversations share (`prefix`), behind messages after which a later
            request is written differently (`branch`), before an answer (`prompt`), after one (`answer`), or after a
            document's text (`document`).
        offloaded: whether the cache is in host memory though the model computes elsewhere.
        state: the same object for all copies of the snapshot on other tiers.
    """

    digest: str
    messages: int
    tokens: Sequence[int] = field(repr=False)
    cache: Cache = field(repr=False)
    kind: Kind
    offloaded: bool = False
    state: object = field(default_factory=object, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", TokenIds.of(self.tokens))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the cache and the ids."""
        return self.cache.nbytes + 4 * len(self.tokens)

    def moved(self, cache: Cache, offloaded: bool) -> Snapshot:
        """Return the same snapshot on another tier. cache: the copy of its cache there."""
        return replace(self, cache=cache, offloaded=offloaded)


@dataclass(eq=False)
class Session:
    """A named conversation. Made and kept by the store; `fork` and `save` are for everyone.

    Attributes:
        today: the date its template shows, frozen when it began.
        used: when it was last used, in seconds since 1970.
        document: the text that its questions are about. notes: those about its sections; None: none were wanted.
        named: whether the caller chose the name.
        forked: whether `fork` made it, so that it continues under its own name even where it begins at a document.
        prefix_digests: digests of all prefixes of its messages, the shortest first. They explain what was not reused.
        transcript: what need not be computed again for its next turn; of it the index is saved.
        saved_index: that index, in a session that was loaded (`saved_index`); {} if there is none.
        origin: the folder of the store that has made or checked its caches; None: no model has checked them.
    """

    name: str
    fingerprint: Fingerprint
    today: date = field(default_factory=date.today)
    snapshots: dict[str, Snapshot] = field(default_factory=dict, repr=False)
    used: float = field(default_factory=time.time)
    document: str | None = field(default=None, repr=False)
    notes: SectionNotes | None = field(default=None, repr=False)
    named: bool = True
    forked: bool = False
    prefix_digests: tuple[str, ...] = field(default=(), repr=False)
    transcript: Transcript | None = field(default=None, repr=False)
    saved_index: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    origin: object | None = field(default=None, repr=False)

    @property
    def head(self) -> Snapshot:
        """The snapshot after the last answer; before any answer, the newest one."""
        return next(reversed(self.snapshots.values()))

    @property
    def last_answered(self) -> Snapshot | None:
        """The last answered point before the head, from which its last turn can be taken again; None: not in memory."""
        return max(
            (each for each in self.snapshots.values() if each is not self.head and self.answered(each)),
            key=lambda snapshot: snapshot.messages,
            default=None,
        )

    def answered(self, point: Snapshot | SessionInfo) -> bool:
        """Return whether the head continues a point that is after an answer."""
        return point.kind == "answer" and point.messages < self.head.messages and self.contains(point)

    def contains(self, point: Snapshot | SessionInfo) -> bool:
        """Return whether the head is at this point or continues it."""
        return self.prefix_digests[point.messages : point.messages + 1] == (point.digest,)

    def at(self, snapshot: Snapshot) -> Session:
        """Return the session as it was at one of its snapshots."""
        digests = self.prefix_digests[: snapshot.messages + 1]
        return replace(self, snapshots={snapshot.digest: snapshot}, prefix_digests=digests)

    @property
    def is_document(self) -> bool:
        """Whether it is a document before any question. A question about it begins a conversation of its own."""
        return self.document is not None and self.head.kind == "document" and not self.forked

    @property
    def cache(self) -> Cache:
        """The cache at the head. Do not read into it: clone it first."""
        return self.head.cache

    @property
    def tokens(self) -> list[int]:
        """Every id read and generated up to the head."""
        return list(self.head.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots in memory."""
        return sum(snapshot.nbytes for snapshot in self.snapshots.values())

    @property
    def info(self) -> SessionInfo:
        """The session as it is listed."""
        head = self.head
        return SessionInfo(
            name=self.name,
            named=self.named,
            digest=head.digest,
            messages=head.messages,
            tokens=len(head.tokens),
            prefix_digests=self.prefix_digests,
            has_document=self.document is not None,
            is_document=self.is_document,
            nbytes=self.nbytes,
            used=self.used,
            kind=head.kind,
        )

    def fork(self, name: str) -> Session:
        """Return a session that continues from here by itself. Snapshots are shared, so this costs nothing.

        Raises:
            InputError: a name that is no text.
        """
        if not isinstance(name, str):
            raise InputError(f"The name of a session must be text, not a {type(name).__name__}.")
        return Session(
            name,
            self.fingerprint,
            self.today,
            dict(self.snapshots),
            document=self.document,
            notes=self.notes,
            forked=True,
            prefix_digests=self.prefix_digests,
            transcript=self.transcript and self.transcript.of_session(None, forked=True),
            saved_index=self.saved_index,
            origin=self.origin,
        )

    def with_moved(self, snapshots: Iterable[Snapshot]) -> Session:
        """Return the session with copies of its snapshots on another tier; this one keeps its tensors."""
        moved = {snapshot.state: snapshot for snapshot in snapshots}
        kept = {digest: moved.get(snapshot.state, snapshot) for digest, snapshot in self.snapshots.items()}
        return replace(self, snapshots=kept)

    def add(self, snapshots: Iterable[Snapshot], prefix_digests: Sequence[str] = ()) -> None:
        """Keep the snapshots of a turn, and move the head to the last one if that is after an answer.

        Older ones are dropped, but not a document's or the last prefix.

        prefix_digests: digests of all prefixes of the turn's messages.
        """
        kept, newest = dict(self.snapshots), {snapshot.digest: snapshot for snapshot in snapshots}
        head = _head([*list(kept.values())[-1:], *newest.values()])
        for digest, snapshot in newest.items():
            kept.pop(digest, None)
            kept[digest] = snapshot
        kept[head.digest] = kept.pop(head.digest)
        for snapshot in _superfluous(list(kept.values()), {head.digest, *newest}):
            del kept[snapshot.digest]
        self.snapshots = kept  # in one step: other threads may be looking
        if tuple(prefix_digests[head.messages : head.messages + 1]) == (head.digest,):
            self.prefix_digests = tuple(prefix_digests[: head.messages + 1])
        self.used = time.time()

    def save(self, path: str | Path, durable: bool = True) -> Path:
        """Write the head to `path`, atomically: the file there is the old or the new one, never a part.

        Args:
            durable: whether it must outlast a power failure too, and not only the end of the process.

        Raises:
            InputError: no path. SessionStorageError: no room or no permission. The file that was there stays.
        """
        head, target = self.head, as_path(path, "The path of a session's file")
        tensors, cache_metadata = cache_state(head.cache)
        index = self.saved_index if self.transcript is None else self.transcript.indexes.tensors()
        tensors = {**tensors, **index, "tokens": torch.tensor(head.tokens[:], dtype=torch.int32)}
        if self.document:
            tensors["document"] = torch.frombuffer(bytearray(self.document.encode()), dtype=torch.uint8)
        metadata = {
            **self.info.to_metadata(),
            "forked": self.forked,
            "fingerprint": asdict(self.fingerprint),
            "today": self.today.isoformat(),
            "kind": head.kind,
            "notes": {} if self.notes is None else asdict(self.notes),
            "cache": cache_metadata,
        }
        try:
            file_format.write(target, metadata, tensors, durable)
        except OSError as error:
            raise SessionStorageError(
                f"The session cannot be saved as {target} ({error.strerror or error}): give another path, or make room."
            ) from error
        return target


def load_session(
    path: str | Path, fingerprint: Fingerprint | None = None, expected: ExpectedCache | None = None
) -> Session:
    """Read a session back, bit for bit.

    Args:
        fingerprint: what the session must belong to; None accepts any.
        expected: what its cache must be like. None: whatever the file describes, in host memory.

    Raises:
        InputError: no path. SessionNotFoundError: no such file.
        SessionCorruptError: truncated, altered, no session at all, or none that this model can have made.
        SessionMismatchError: saved with another model, tokenizer, template or cache configuration, or in another
            format.
    """
    source = as_path(path, "The path of a session's file")
    checked: list[SavedCache] = []

    def check(facts: dict[str, Any], tensors: dict[str, file_format.TensorInfo]) -> None:
        check_facts(facts)
        _check_fingerprint(source, Fingerprint(**facts["fingerprint"]), fingerprint)
        checked.append(check_header(facts, tensors, expected))

    facts, tensors = file_format.read(source, check)
    (saved,) = checked
    with file_format.refusing(source):
        check_tensors(saved, tensors)
        document = tensors.pop("document").numpy().tobytes().decode() if facts["has_document"] else None
    tokens = array("i", tensors.pop("tokens").numpy().tobytes() if saved.num_tokens else b"")
    index = {name: tensors.pop(name) for name in list(tensors) if is_index(name)}
    policy = None if expected is None else expected.config.policy
    cache = restore_cache(tensors, facts["cache"], policy, saved.specs, saved.recurrent)
    head = Snapshot(facts["digest"], facts["messages"], tokens, cache, facts["kind"])
    return Session(
        facts["name"],
        Fingerprint(**facts["fingerprint"]),
        date.fromisoformat(facts["today"]),
        {head.digest: head},
        used=source.stat().st_mtime,
        document=document,
        notes=notes_from(facts["notes"]),
        named=facts["named"],
        forked=facts["forked"],
        prefix_digests=tuple(facts["prefix_digests"]),
        saved_index=index,
    )


def _check_fingerprint(path: Path, saved: Fingerprint, wanted: Fingerprint | None) -> None:
    if wanted is not None and saved != wanted:
        parts = [name for name, value in asdict(saved).items() if value != getattr(wanted, name)]
        raise SessionMismatchError(
            f"{path} was saved with another {' and '.join(parts)}: load it with the settings it was saved with, "
            "or read the conversation anew."
        )


def _head(snapshots: list[Snapshot]) -> Snapshot:
    """Return the head of a session. snapshots: its head until now, if there is one, and those of a turn in order."""
    answered = (each for each in snapshots if each.kind in ("answer", "document"))
    return next(answered, snapshots[-1]) if snapshots[-1].kind in ("prompt", "branch") else snapshots[-1]


def _superfluous(snapshots: list[Snapshot], needed: Set[str]) -> list[Snapshot]:
    """Return the snapshots to drop: more than `MAX_SNAPSHOTS`, and answers too close to their neighbours.

    Those with the digests `needed` stay.
    """
    dropped = []
    for kind, most in MAX_SNAPSHOTS.items():
        dropped += [snapshot for snapshot in snapshots if snapshot.kind == kind][:-most]
    answers = [snapshot for snapshot in snapshots if snapshot.kind == "answer"]
    answers.sort(key=lambda snapshot: snapshot.messages)  # after an edit, newer ones may have fewer
    while len(answers) > MAX_ANSWER_SNAPSHOTS:
        ends = [0, *(snapshot.messages for snapshot in answers)]
        # Going back by n messages costs reading about as many again: drop where the gap is smallest for its age.
        gaps = [(ends[i + 2] - ends[i]) / (1 + ends[-1] - ends[i + 1]) for i in range(len(answers) - 2)]
        dropped.append(answers.pop(gaps.index(min(gaps))))
    return [snapshot for snapshot in dropped if snapshot.digest not in needed]
