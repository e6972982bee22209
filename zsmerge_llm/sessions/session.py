"""A conversation that lives on: exact token ids, the compressed cache, and snapshots to go back to.

A `Snapshot` is never changed: whoever reads on works on a copy of its cache. So branches, forks and concurrent requests
share snapshots freely and cannot corrupt each other. A `Session` is a named line of snapshots with a newest one, its
head; only that one is saved.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from zsmerge_llm.errors import SessionMismatchError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.sessions import file_format as saving

KEPT_ANSWERS = 4
"""Points after answers that a session keeps: the newest two, and older ones ever further apart."""

Kind = Literal["prefix", "prompt", "answer", "document"]


@dataclass(frozen=True)
class Fingerprint:
    """What a saved cache belongs to. Digests, but for `cache`, the cache configuration."""

    weights: str
    tokenizer: str
    template: str
    cache: str


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A point of a conversation, never mutated.

    digest: of the messages it stands for. messages: how many they are. tokens: the exact ids (kept as 32-bit integers);
    the last ones may not be in the cache yet. kind: ends after a common beginning (`prefix`), before an answer
    (`prompt`), after one (`answer`), or after a document's text (`document`).
    """

    digest: str
    messages: int
    tokens: Sequence[int]
    cache: Cache
    kind: Kind

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", array("i", self.tokens))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the cache and the ids."""
        return self.cache.nbytes + 4 * len(self.tokens)


@dataclass(eq=False)
class Session:
    """A named conversation. Made and kept by the store; `fork` and `save` are for everyone.

    today: the date its template shows, frozen when it began. document: the text that its questions are asked about.
    named: whether the caller chose the name. forked: made by `fork`, so that it goes on under its own name even where
    it begins at a document. chain: digests of all its messages so far, oldest first, to explain what was not reused.
    used: when it was last used, in seconds since 1970.
    """

    name: str
    fingerprint: Fingerprint
    today: date = field(default_factory=date.today)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    used: float = field(default_factory=time.time)
    document: str | None = None
    named: bool = True
    forked: bool = False
    chain: tuple[str, ...] = ()

    @property
    def head(self) -> Snapshot:
        """The newest point."""
        return next(reversed(self.snapshots.values()))

    @property
    def fixed(self) -> bool:
        """Whether it is a document that stays as it is: what is asked about it becomes a conversation of its own."""
        return self.document is not None and self.head.kind == "document" and not self.forked

    @property
    def cache(self) -> Cache:
        """The cache at the newest point. Do not read into it: clone it first."""
        return self.head.cache

    @property
    def tokens(self) -> list[int]:
        """Every id read and generated up to the newest point."""
        return list(self.head.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots in memory."""
        return sum(snapshot.nbytes for snapshot in self.snapshots.values())

    def fork(self, name: str) -> Session:
        """A session of its own that goes on from here. Snapshots are shared, so this costs nothing."""
        snapshots = dict(self.snapshots)
        return Session(
            name, self.fingerprint, self.today, snapshots, document=self.document, forked=True, chain=self.chain
        )

    def add(self, snapshots: Iterable[Snapshot], chain: Sequence[str] = ()) -> None:
        """Move on to the last of `snapshots`. Others go with time, but a document's and the common beginning stay."""
        kept, newest = dict(self.snapshots), {snapshot.digest: snapshot for snapshot in snapshots}
        for digest, snapshot in newest.items():
            kept.pop(digest, None)
            kept[digest] = snapshot
        for snapshot in _superfluous(list(kept.values()), set(newest)):
            del kept[snapshot.digest]
        self.snapshots = kept  # in one step: others may be looking
        self.chain = tuple(chain) or self.chain
        self.used = time.time()

    def save(self, path: str | Path, durable: bool = True) -> Path:
        """Write the newest point to `path`, atomically: the file there is the old or the new one, never a part.

        Args:
            durable: whether it must outlast a power failure too, and not only the end of the process.

        Raises:
            OSError: no room or no permission. What was there stays.
        """
        head, target = self.head, Path(path)
        tensors, facts = head.cache.state()
        tensors = {**tensors, "tokens": torch.tensor(head.tokens, dtype=torch.int32)}
        if self.document:
            tensors["document"] = torch.frombuffer(bytearray(self.document.encode()), dtype=torch.uint8)
        about = {
            "name": self.name,
            "named": self.named,
            "forked": self.forked,
            "fingerprint": asdict(self.fingerprint),
            "today": self.today.isoformat(),
            "digest": head.digest,
            "messages": head.messages,
            "kind": head.kind,
            "tokens": len(head.tokens),
            "chain": self.chain,
            "document": self.document is not None,
            "fixed": self.fixed,
            "cache": facts,
        }
        saving.write(target, about, tensors, durable)
        return target


def load_session(
    path: str | Path, fingerprint: Fingerprint | None = None, devices: Sequence[str] | None = None
) -> Session:
    """Read a session back, bit for bit.

    Args:
        fingerprint: what the session must belong to; None accepts any.
        devices: where each layer's tensors go; None is where they were.

    Raises:
        SessionNotFoundError: no such file.
        SessionCorruptError: truncated, altered, or no session at all.
        SessionMismatchError: saved with another model, tokenizer, template or cache configuration.
    """
    source = Path(path)
    about = saving.read_about(source)
    saved = Fingerprint(**about["fingerprint"])
    if fingerprint is not None and saved != fingerprint:
        parts = [name for name, value in asdict(saved).items() if value != getattr(fingerprint, name)]
        raise SessionMismatchError(
            f"{source} was saved with another {' and '.join(parts)}: load it with the settings it was saved with, "
            "or read the conversation anew."
        )
    tensors = saving.read_tensors(source)
    facts = about["cache"]
    for spec, device in zip(facts["specs"], devices or (), strict=False):
        spec["device"] = device
    tokens = tensors.pop("tokens").tolist() if "tokens" in tensors else []
    text = tensors.pop("document", None)
    try:
        cache = Cache.from_state(tensors, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise saving.damaged(source, "does not hold a whole cache") from error
    return Session(
        about["name"],
        saved,
        date.fromisoformat(about["today"]),
        {about["digest"]: Snapshot(about["digest"], about["messages"], tokens, cache, about["kind"])},
        used=source.stat().st_mtime,
        document=None if text is None else text.numpy().tobytes().decode(),
        named=about["named"],
        forked=about["forked"],
        chain=tuple(about["chain"]),
    )


def _superfluous(snapshots: list[Snapshot], newest: Set[str]) -> list[Snapshot]:
    """The points to let go: all prompts and beginnings but the last, and answers too close to their neighbours. Those
    with the digests `newest` stay."""
    gone = []
    for kind in ("prompt", "prefix"):
        gone += [snapshot for snapshot in snapshots if snapshot.kind == kind][:-1]
    answers = [snapshot for snapshot in snapshots if snapshot.kind == "answer"]
    while len(answers) > KEPT_ANSWERS:
        at = [0, *(snapshot.messages for snapshot in answers)]
        # Going back by n messages costs reading about as many again: let the smallest gap for its age go.
        gaps = [(at[i + 2] - at[i]) / (1 + at[-1] - at[i + 1]) for i in range(len(answers) - 2)]
        gone.append(answers.pop(gaps.index(min(gaps))))
    return [snapshot for snapshot in gone if snapshot.digest not in newest]
