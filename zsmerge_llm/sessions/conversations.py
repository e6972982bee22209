"""Conversations: find the session that a message list continues, and keep the result of each turn.

Identity is verified content. A request carries the whole conversation; the longest prefix that some session holds is
resumed, and only what follows is read. Generated tokens stay as they were generated: the next turn's ids are what the
template writes after them (`ChatTemplate.delta`), however it renders the messages before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, cast

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import SessionError, SessionNotFoundError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.digests import DigestChain
from zsmerge_llm.language.messages import MessageHistory
from zsmerge_llm.language.request_args import mark_prompt, with_request_args
from zsmerge_llm.retrieval import section_notes
from zsmerge_llm.retrieval.passage_search import INTRODUCTION
from zsmerge_llm.sessions import branching
from zsmerge_llm.sessions.branching import MIN_SHARED_TOKENS, SharedPrefix
from zsmerge_llm.sessions.documents import INSTRUCTION, Documents, loses_most, num_merged, put_before
from zsmerge_llm.sessions.ownership import find_owner, new_session
from zsmerge_llm.sessions.prompt_builder import Continuation, PromptBuilder
from zsmerge_llm.sessions.session import Kind, Session, Snapshot
from zsmerge_llm.sessions.store import ResumePoint, Store
from zsmerge_llm.sessions.token_ids import TokenIds
from zsmerge_llm.sessions.transcript import DocumentText, Transcript, find_history, find_indexes, find_transcript
from zsmerge_llm.types import Message


@dataclass
class Turn:
    """One request of a conversation. `cache` is its own copy; nothing is shared until `Conversations.commit`.

    Attributes:
        session: the session that the turn belongs to; a new one (`is_new`) if it continues none under its own name.
        version: that of the session of its name when the turn began, as for `Store.version`.
        tokens: the conversation's ids, this prompt included; those behind `cache.seen` are still to be read.
        reuse: how the conversation was resumed, as for `Usage.reuse`.
        system_tokens: how many of the first tokens form a prefix that conversations may share; 0: none worth keeping.
        single_question: whether this turn's question alone decides what is kept.
        retrieved_tokens: how many of the tokens repeat what was said before.
        resumed_from: the snapshot of its own session that it continues.
        needs_document: as for `FollowingIds`.
        branch_points: where a later request may be written differently, as (messages, tokens) in their order.
    """

    transcript: Transcript
    session: Session
    is_new: bool
    version: int | None
    cache: Cache
    tokens: TokenIds
    reuse: str
    system_tokens: int = 0
    single_question: bool = False
    retrieved_tokens: int = 0
    resumed_from: Snapshot | None = None
    needs_document: bool = False
    branch_points: Sequence[tuple[int, int]] = ()
    snapshots: list[Snapshot] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The messages as they are rendered: with a document at the beginning, and a note at the end."""
        return self.transcript.messages

    @property
    def document(self) -> str:
        """The document that the conversation is about; "" if it is about none."""
        return "" if self.transcript.document is None else self.transcript.document.text

    @property
    def added_texts(self) -> tuple[str, ...]:
        """What was put before the document, and before passages that were read again in this turn or an earlier one."""
        slots = self.cache.config.slots
        may_repeat = slots is not None and len(self.tokens) > slots
        notes = self.transcript.document is not None and self.transcript.document.notes is not None
        repeated = (INTRODUCTION, *((section_notes.INTRODUCTION,) * notes)) * may_repeat
        return (INSTRUCTION,) * bool(self.document) + repeated

    def reading_points(self) -> list[tuple[Kind, int, int]]:
        """Return the snapshots to take while the prompt is read, as (kind, messages, tokens) in their order.

        A branch point behind all messages, before the header of the answer, takes the place of the prompt's.
        """
        points: list[tuple[Kind, int, int]] = []
        # Compressed for this question, a prefix would be worth little to other conversations.
        if self.system_tokens and self.cache.fits(self.system_tokens):
            points.append(("prefix", int(self.messages[0]["role"] == "system"), self.system_tokens))
        points += [("branch", messages, tokens) for messages, tokens in self.branch_points]
        if not self.branch_points or self.branch_points[-1][0] < len(self.messages):
            points.append(("prompt", len(self.messages), len(self.tokens)))
        return points

    def cache_behind_prompt(self, read: Callable[[Cache, Sequence[int]], object]) -> Cache:
        """Return a copy of the cache as it was when the prompt had been read. read: reads ids into a cache."""
        snapshot = self.snapshots[-1]
        cache, header = snapshot.cache.clone(), self.tokens[len(snapshot.tokens) :]
        if len(header):
            read(cache, header)
        return cache

    def add_snapshot(self, kind: Kind, messages: int, num_tokens: int) -> None:
        """Keep the cache as it is now, after so many messages and tokens of the turn."""
        tokens = self.tokens if num_tokens == len(self.tokens) else TokenIds(self.tokens[:num_tokens])
        self.snapshots.append(Snapshot(self.transcript.digests[messages], messages, tokens, self.cache.trimmed(), kind))


@dataclass(frozen=True)
class Conversations:
    """The sessions of one model, as conversations of messages.

    today: the date on which a new conversation begins.
    """

    store: Store
    template: ChatTemplate
    new_cache: Callable[[CacheConfig], Cache]
    prompts: PromptBuilder
    documents: Documents
    today: Callable[[], date] = date.today

    def check(self, messages: str | Sequence[Message], session: str | Session | None = None) -> MessageHistory:
        """Return the messages of a request in normal form, for `begin`. Only new ones are checked.

        Raises:
            InputError, UnsupportedContentError: as `normalize_messages`.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            return MessageHistory().normalize(messages)
        known = self.store.transcripts(session.name if isinstance(session, Session) else session)
        request = list(cast(Sequence[Message], messages))
        history, shared = find_history(known, request)
        return history.normalize(request, shared=shared)

    def with_check(self, check: Callable[[], None]) -> Conversations:
        """Return the same for one request, as `ChatTemplate.with_check`."""
        return self._using(self.template.with_check(check))

    def _using(self, template: ChatTemplate) -> Conversations:
        return replace(self, template=template, prompts=self.prompts.using(template))

    def with_args(self, args: Mapping[str, Any]) -> Conversations:
        """Return the same for one request with further variables, as `with_request_args`."""
        return self._using(with_request_args(self.template, args))

    def begin(
        self,
        history: MessageHistory,
        messages: list[Message],
        tools: Tools = None,
        session: str | Session | None = None,
        *,
        namespace: str | None = None,
        reread: bool = False,
    ) -> Turn:
        """Return what is to be read for a request, and on which cache.

        Args:
            history: the request's messages, from `check`.
            messages: the same as they are rendered: the last one may have a note.
            session: a session or its name. A hint: it is resumed only if its content is a prefix of `messages`; if not,
                the conversation takes over the name. A document's session stays as it is: `messages` are asked about
                it, in a conversation of their own.
            namespace: only conversations of the same one are recognized; those of documents by any.
            reread: read everything again, for this question alone.

        Raises:
            InputError, MissingTemplateError: as `ChatTemplate.render`.
            SessionCorruptError: a document whose file is corrupt.
        """
        name, source = self._resolve(session)
        start, messages = self.template.digest_chain(tools, namespace), mark_prompt(self.template, messages)
        transcript = self._transcript(history, messages, start, name, source)
        if source is not None and self.documents.is_document(name):
            name = None
        shared = branching.shared_prefix(self.store, transcript)
        if reread:
            return replace(self._start(transcript, tools, name, namespace, "asked for"), single_question=True)
        known = dict(transcript.chain.lengths)
        if transcript.document is not None:
            known[transcript.document.digest] = -1
        resumed: Turn | None = None
        reason, points = "", self._find_resume_points(transcript, known, name)
        is_named_so = any(candidate == name and known[digest] > 1 for candidate, digest in points)
        for candidate, digest in points:
            try:
                found = self.store.open(candidate, digest)
            except SessionNotFoundError:
                continue  # another request took it away meanwhile
            except SessionError:
                self.store.forget(candidate)
                reason = "the saved session is damaged or gone"
                continue
            if transcript.document is not None and found.session.notes != transcript.document.notes:
                continue  # the same text and questions, read with other notes
            turn = self._resume(found, transcript, tools, name, namespace, is_named_so)
            if turn is not None and not turn.needs_document:
                return self._with_branch_points(turn, tools, shared)
            resumed = resumed or turn
            if found.snapshot.kind in ("prompt", "answer"):
                reason = reason or "the chat template writes it differently from what was read"
        if resumed is None:
            reason = reason or branching.reread_reason(self.store, transcript, name, shared)
            resumed = self._start(transcript, tools, name, namespace, reason)
        return self._with_branch_points(resumed, tools, shared)

    def commit(self, turn: Turn, answer: Message | None, generated: Sequence[int]) -> Session:
        """Keep the result of a turn: its snapshots and, unless `answer` is None (cancelled), the answer's end.

        A turn that was cancelled before its prompt was read changes nothing. If the session has moved on meanwhile,
        the turn becomes a session of its own.
        """
        snapshots, chain = turn.snapshots, turn.transcript.chain
        if answer is not None:
            chain = chain.of([*turn.messages, answer])
            tokens = turn.tokens + generated
            cache = turn.cache.trimmed()
            snapshots = [*snapshots, Snapshot(chain.digests[-1], len(chain.messages), tokens, cache, "answer")]
        if all(snapshot.messages < len(turn.messages) for snapshot in snapshots):
            return turn.session
        if turn.resumed_from is not None:  # who goes back to it may do so again, and it must not be dropped meanwhile
            snapshots = [turn.resumed_from, *snapshots]
        return self.store.commit_turn(
            turn.session, snapshots, chain.digests, turn.version, turn.is_new, turn.transcript
        )

    def _find_resume_points(
        self, transcript: Transcript, known: dict[str, int], name: str | None
    ) -> list[tuple[str, str]]:
        """Return what `Store.find_resume_points` does, also where another process has given the last answer."""
        points = self.store.find_resume_points(known, name)
        messages = transcript.messages
        answered = next((n for n in range(len(messages), 0, -1) if messages[n - 1]["role"] == "assistant"), 0)
        if answered > max((known[digest] for _, digest in points), default=0):
            self.store.refresh_all()
            points = self.store.find_resume_points(known, name)
        return points

    def _with_branch_points(self, turn: Turn, tools: Tools, shared: SharedPrefix) -> Turn:
        """Return the turn with the points behind which later requests may be written differently."""
        known = shared() if turn.reuse != "continued" and not turn.document else 0
        template, seen = self.template.with_date(turn.session.today), turn.cache.seen
        turn.branch_points = branching.branch_points(template, turn.transcript, tools, turn.tokens, seen, known)
        return turn

    # -- what a request is about -------------------------------------------------------------------------------------

    def _resolve(self, session: str | Session | None) -> tuple[str | None, Session | None]:
        """Return a session's name and, if it is about a document, the session. A new fork is put into the store."""
        if isinstance(session, Session) and session.name not in self.store:
            self.store.adopt(session)
        name = session.name if isinstance(session, Session) else session
        if name is not None:
            self.store.refresh(name)
        info = self.store.info(name) if name is not None else None
        return name, self.store.get(info.name) if info is not None and info.has_document else None

    def _transcript(
        self,
        history: MessageHistory,
        messages: list[Message],
        start: DigestChain,
        name: str | None,
        source: Session | None,
    ) -> Transcript:
        document = source.document if source is not None else None
        transcripts = self.store.transcripts(name)
        known = find_transcript(transcripts, history.messages, start, document)
        chain, indexes = start if known is None else known.chain, find_indexes(transcripts, known, document)
        if source is None or document is None:
            return Transcript(history, chain.of(messages), indexes=indexes)
        document_text = known.document if known is not None else None
        if document_text is None or document_text.notes != source.notes:
            document_text = DocumentText(document, self.documents.digest(document), source.notes)
        used = num_merged(messages)
        if known is not None and known.history.messages[:used] == messages[:used]:
            messages = [known.messages[0], *messages[used:]]
        else:
            messages = put_before(document, messages)
        return Transcript(history, chain.of(messages), document_text, indexes)

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _resume(
        self,
        found: ResumePoint,
        transcript: Transcript,
        tools: Tools,
        name: str | None,
        namespace: str | None,
        is_named_so: bool,
    ) -> Turn | None:
        """Return a turn from a snapshot: of its session or, under another name, of a new one.

        None where the ids that follow it cannot be known, or where its cache is not the one that is wanted.

        is_named_so: whether the session of that name is this conversation, too. It goes on then, with its own points.
        """
        source, snapshot = found.session, found.snapshot
        # A prefix is shared only while its date is right.
        template = self.template.with_date(self.today() if snapshot.kind == "prefix" else source.today)
        owner = find_owner(self.store, found, name, is_named_so)
        known, begins_alike = owner and owner[0].transcript, snapshot.kind != "prefix"
        transcript = transcript.of_session(known, begins_alike, source.saved_index)
        document = transcript.document
        if document is None and source.document is not None:  # the messages repeat it
            document = DocumentText(source.document, snapshot.digest, source.notes)
        continuation = Continuation(template, snapshot, transcript, tools, document)
        if snapshot.kind == "answer" and document is None:
            earlier = branching.before_dropped_reasoning(self.prompts, source, continuation)
            if earlier is not None:
                with suppress(SessionError):  # it may be gone meanwhile
                    found = self.store.open(source.name, earlier.digest)
                    return self._resume(found, transcript, tools, name, namespace, is_named_so)
        following = self.prompts.following_ids(continuation, transcript.messages)
        if following is None or not self.prompts.keeps_config(snapshot, len(following)):
            return None
        if owner is not None:
            session, version = owner
        else:
            shared = (each for each in source.snapshots.values() if each.kind == "prefix")
            snapshots = {each.digest: each for each in (*shared, snapshot) if each.kind != "document"}
            session, version = new_session(self.store, name, namespace, template.today, document, snapshots)
        longer = self.prompts.with_retrieved(continuation, following)
        begins_anew = longer.has_evidence and snapshot.kind == "document" and loses_most(snapshot.cache)
        return Turn(
            transcript,
            session,
            is_new=owner is None,
            version=version,
            cache=self.documents.beginning(snapshot, template) if begins_anew else snapshot.cache.clone(),
            tokens=TokenIds.of(snapshot.tokens) + longer.ids,
            reuse="continued" if snapshot.digest == found.head and snapshot.kind == "answer" else "restored",
            retrieved_tokens=len(longer.ids) - len(following),
            resumed_from=snapshot if owner is not None else None,
            needs_document=longer.needs_document,
        )

    def _start(
        self, transcript: Transcript, tools: Tools, name: str | None, namespace: str | None, reason: str
    ) -> Turn:
        """Return a turn that reads everything. reason: why a known conversation is read again, if that is known."""
        template, messages = self.template.with_date(self.today()), transcript.messages
        transcript, document = transcript.of_session(None), transcript.document
        prompt = self.prompts.build(messages, tools, template, transcript.indexes, document)
        session, version = new_session(self.store, name, namespace, template.today, document, {})
        return Turn(
            transcript,
            session,
            is_new=True,
            version=version,
            cache=self.new_cache(prompt.config),
            tokens=TokenIds(prompt.ids),
            reuse=f"reread: {reason}" if reason else "new",
            system_tokens=prompt.system_tokens if prompt.system_tokens >= MIN_SHARED_TOKENS else 0,
            retrieved_tokens=prompt.retrieved_tokens,
        )
