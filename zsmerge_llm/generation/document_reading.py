"""Read a document into its session and, where notes are wanted, write one after each of its sections.

A note is written from its section alone, in a cache of its own that is dropped then: from a fork of the document's
cache, small models go on telling what stood in the sections before (docs/research/retrieval). Where the notes exceed
their budget, neighbours are condensed into one (map-reduce), so that a document of any length has notes of a fixed
size, in its order. All answers are greedy.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, cast

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.scheduling import Cancelled, check_cancelled
from zsmerge_llm.generation.answer import Answer, Attempt, Request
from zsmerge_llm.generation.loops import check_length, generate
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.output_format import OutputFormats
from zsmerge_llm.language.reasoning_tags import effort_args
from zsmerge_llm.language.request_args import with_request_args
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe, message_probe
from zsmerge_llm.retrieval.section_notes import INTRODUCTION, NoteBudget, SectionNotes
from zsmerge_llm.sessions.documents import document_head
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.types import Chunk, Progress

if TYPE_CHECKING:
    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.kvcache.cache import Cache
    from zsmerge_llm.sessions.documents import DocumentReading, Documents
    from zsmerge_llm.sessions.session import Session

NOTE_REQUEST = "Write a short note about this part of a text."
CONDENSE_REQUEST = "Shorten these notes to one. Keep their order, and all names and numbers."
CONDENSED_NOTES = 4
"""Neighbouring notes that become one."""


@dataclass
class Note:
    """A note while the document is read. level: how often what it says was condensed."""

    text: str
    tokens: int
    level: int = 0


@dataclass(frozen=True)
class DocumentReader:
    """Reads the documents of one model. max_input_tokens: as for `LLM`."""

    engine: Engine
    documents: Documents
    template: ChatTemplate
    output_formats: OutputFormats
    max_input_tokens: int | None

    def read(
        self,
        document: tuple[str, str],
        name: str | None,
        probe: str | None,
        instruction: str | None,
        cancel: Event | None,
        progress: Progress | None,
    ) -> Session:
        """Read a document (its text and title), unless it has been read under that name. As `LLM.read_document`.

        instruction: what notes are about; None writes none.
        """
        text, title = document
        check = partial(check_cancelled, cancel)
        reading = self.documents.open(text, name, title, probe is not None, check, instruction)
        if reading.new_ids:
            limit = self.engine.exact_limit
            check_length(len(reading.tokens), SamplingParams(), self.max_input_tokens, limit, stacklevel=5)
            probe_ids = chat_probe(self.template, probe or GENERIC_QUESTION)
            with self.engine.requests.admit():
                if instruction is None:
                    read = partial(self.engine.read, probe=probe_ids, cancel=cancel)
                    read(reading.cache, reading.new_ids, progress=progress)
                else:
                    writer = NoteWriter(self.engine, self.template, self.output_formats, instruction, cancel)
                    reading.session.notes = writer.read(reading, probe_ids, progress)
            self.documents.keep(reading)
        return reading.session


class NoteWriter:
    """Reads one document in sections, and writes notes about them.

    Args:
        cancel: stops within a chunk or a token: Cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        output_formats: OutputFormats,
        instruction: str,
        cancel: Event | None,
    ) -> None:
        # What a model reasons is no part of a note, and would take all its tokens.
        template = with_request_args(template, effort_args(template.source(), "none"))
        self._engine, self._template, self._cancel = engine, template, cancel
        self._output_formats = output_formats.using(template)
        self._instruction = instruction
        self._notes: list[Note] = []

    def read(self, reading: DocumentReading, probe: Sequence[int], progress: Progress | None) -> SectionNotes:
        """Read a document into its cache, and return the notes: none where all of it fits."""
        cache, ids, slots = reading.cache, reading.new_ids, reading.cache.config.slots
        if slots is None or len(ids) <= slots:
            self._engine.read(cache, ids, probe=probe, cancel=self._cancel, progress=progress)
            return SectionNotes(self._instruction)
        budget, opening = NoteBudget.of(slots), len(self._template.encode(document_head(self._template, "")))
        for start in range(0, len(ids), budget.section_tokens):
            section = ids[start : start + budget.section_tokens]
            shown = progress and partial(_report, progress, start, len(ids))
            self._engine.read(cache, section, probe=probe, cancel=self._cancel, progress=shown)
            text = str(self._template.tokenizer.decode(list(section[max(0, opening - start) :])))
            self._add(self._ask(text, NOTE_REQUEST, budget.note_tokens) if text.strip() else "")
            self._condense(budget)
        return SectionNotes(self._instruction, tuple(note.text for note in self._notes))

    def _add(self, text: str) -> None:
        """Keep a note, if it says something that the one before does not."""
        if text and not (self._notes and self._notes[-1].text == text):
            self._notes.append(self._as_note(text))

    def _condense(self, budget: NoteBudget) -> None:
        """Condense neighbours into one until the notes fit into their budget, those first that were so least often."""
        left = budget.total - self._count(INTRODUCTION)
        while len(self._notes) > 1 and sum(note.tokens for note in self._notes) > left:
            size = min(CONDENSED_NOTES, len(self._notes))
            levels = [note.level for note in self._notes]
            start = min(range(len(levels) - size + 1), key=lambda at: sum(levels[at : at + size]))
            group = self._notes[start : start + size]
            most = min(budget.note_tokens, sum(note.tokens for note in group) // 2)
            text = self._ask("\n".join(note.text for note in group), CONDENSE_REQUEST, max(1, most)) or group[0].text
            condensed = replace(self._as_note(text), level=1 + max(note.level for note in group))
            self._notes[start : start + size] = [condensed]

    def _ask(self, text: str, request: str, max_tokens: int) -> str:
        """Return what the model answers to a request about a text, on one line, in a cache of its own.

        The answer is greedy. It does not repeat the request; the text it may quote.

        Raises:
            Cancelled: it was stopped.
        """
        request = f"{request} {self._instruction}"
        content = f"{text}\n\n{request}"
        ids = self._template.encode(self._template.render([{"role": "user", "content": content}]))
        prompt = Prompt(ids, self._engine.config, message_probe(self._template, content))

        def behind_prompt() -> Cache:
            cache = self._engine.new_cache()
            self._engine.read(cache, ids, probe=prompt.probe, cancel=self._cancel)
            return cache

        output_format = self._output_formats.chat([{"role": "user", "content": text}]).with_added(request)
        wanted = Request(prompt, SamplingParams(max_tokens=max_tokens), output_format)
        attempt = Attempt(wanted, behind_prompt(), self._template.tokenizer)
        steps = generate(self._engine, attempt, lambda: None, self._cancel, behind_prompt)
        result = _finished(steps).result
        if result.finish_reason == "cancelled":
            raise Cancelled
        return " ".join(result.text.split())

    def _as_note(self, text: str) -> Note:
        return Note(text, self._count(text))

    def _count(self, text: str) -> int:
        return len(self._template.encode_text(text + "\n"))


def _finished(steps: Generator[Chunk, None, Answer]) -> Answer:
    """Return the answer that a generation ends with."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(Answer, end.value)


def _report(progress: Progress, before: int, total: int, read: int, _: int) -> None:
    """Report what is read of a section as a part of the whole text."""
    progress(before + read, total)
