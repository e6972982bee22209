"""What a conversation keeps so that its next turn computes nothing twice: checked messages, digests, passages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from zsmerge_llm.language.digests import DigestChain
from zsmerge_llm.language.messages import MessageHistory, shared_prefix
from zsmerge_llm.retrieval.passage_search import PassageIndexes
from zsmerge_llm.retrieval.section_notes import SectionNotes
from zsmerge_llm.sessions.delta_renderer import DeltaRenderer
from zsmerge_llm.types import Message

FEW_NEW = 4
"""New messages of a turn at most: where a transcript lacks no more, no better one is looked for."""


@dataclass(eq=False)
class DocumentText:
    """A document that a conversation is about, and the notes about it.

    num_tokens: its length with the template's opening, once known.
    """

    text: str
    digest: str
    notes: SectionNotes | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Transcript:
    """The messages of a request, and what was computed from them.

    Attributes:
        history: the messages as they were given, and checked.
        chain: the digests of the messages as they are rendered: with a document at the beginning and a note at the end.
        document: what the conversation is about; None if it is about no document.
        indexes, deltas: shared by all turns of a session; each turn adds its new messages. Until its session is known
            (`of_session`), the indexes are those of the conversation that it has most in common with.
    """

    history: MessageHistory
    chain: DigestChain
    document: DocumentText | None = None
    indexes: PassageIndexes = field(default_factory=PassageIndexes)
    deltas: DeltaRenderer = field(default_factory=DeltaRenderer)

    @property
    def messages(self) -> list[Message]:
        """The messages as they are rendered."""
        return self.chain.messages

    @property
    def digests(self) -> list[str]:
        """One digest for each prefix of the messages."""
        return self.chain.digests

    def of_session(
        self, known: Transcript | None, forked: bool = False, saved: Mapping[str, Tensor] | None = None
    ) -> Transcript:
        """Return the transcript with the indexes of a session's earlier turns, or with its own for another session.

        forked: whether another session begins with most of the messages that are indexed: these are not indexed anew.
        saved: the index of the file that the session was loaded from.
        """
        if known is not None:
            return replace(self, indexes=known.indexes, deltas=known.deltas)
        indexes = self.indexes.copy() if forked else PassageIndexes()
        return replace(self, indexes=replace(indexes, saved=saved or {}), deltas=DeltaRenderer())


def find_history(transcripts: Iterable[Transcript], messages: list[Message]) -> tuple[MessageHistory, int]:
    """Return the history that shares most messages, as they were given, with a request, and how many it shares."""
    best, length = _most_shared(transcripts, lambda each: each.history.shared_prefix(messages), len(messages))
    return (MessageHistory() if best is None else best.history), length


def find_transcript(
    transcripts: Iterable[Transcript], messages: list[Message], start: DigestChain, document: str | None
) -> Transcript | None:
    """Return the transcript that shares most messages with a request.

    Args:
        messages: in normal form, without a document.
        start: the digest chain of no messages, with the request's tools.
        document: its document's text.
    """

    def shared(transcript: Transcript) -> int:
        known = transcript.document.text if transcript.document is not None else None
        if transcript.chain.states[0] != start.states[0] or known != document:
            return 0
        return shared_prefix(transcript.history.messages, messages)

    return _most_shared(transcripts, shared, len(messages))[0]


def find_indexes(transcripts: Iterable[Transcript], known: Transcript | None, document: str | None) -> PassageIndexes:
    """Return the indexes that hold most of a request's text, or new ones.

    known: as `find_transcript` found it. document: the document's text.
    """
    about = (each for each in transcripts if each.document is not None and each.document.text == document)
    found = known or next(about, None)
    return PassageIndexes() if found is None else found.indexes


def _most_shared(
    transcripts: Iterable[Transcript], shared: Callable[[Transcript], int], num_messages: int
) -> tuple[Transcript | None, int]:
    """Return the transcript that shares most of a request's messages, and how many; None where none shares any."""
    best, length = None, 0
    for transcript in transcripts:
        found = shared(transcript)
        if found > length:
            best, length = transcript, found
        if length and length >= num_messages - FEW_NEW:
            break
    return best, length
