"""Tasks of the quality benchmark: documents or chats with questions, from JSON lines to token ids.

One line: `{id, task, context | messages | prompt, qa: [{q, a: [accepted answers], depth}], metric, max_new_tokens}`.
With an `opening` of a question, the assistant's answer begins with it, and the gold answer continues from there. The
gold answer is the first accepted one, or `gold`. A question with a `metric` is also answered (`answers.Metric`), and
one with `options` is a choice whose first one is right. A record that is `complete` has questions that need no guide,
and its document is introduced as `LLM.read_document` does.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passage_search import as_block
from zsmerge_llm.retrieval.query_probe import chat_probe, conversation_probe
from zsmerge_llm.retrieval.questions import find_question
from zsmerge_llm.sessions.documents import INSTRUCTION

GUIDE = "Answer with a few words from the text above.\nQuestion: "
MARK = "@@question@@"


@dataclass(frozen=True)
class Question:
    """One question of an item.

    asking, following: its ids after the document, and after another answer. answer: ids of the gold answer. probe: the
    query probe of a prompt that ends with it. forms: the texts of `asking` and `following`, with MARK before the
    question. message: the user's message. opening: ids of the beginning of the answer. accepted, metric: how an answer
    is scored; None: not at all. options: ids of the answers to choose from, the right one first. kind: of questions.
    """

    index: int
    text: str
    asking: list[int]
    following: list[int]
    answer: list[int]
    probe: list[int]
    depth: float
    forms: tuple[str, str] = ("", "")
    message: str = ""
    opening: Sequence[int] = ()
    accepted: Sequence[str] = ()
    metric: str | None = None
    options: Sequence[list[int]] = ()
    kind: str = ""

    def with_passages(self, template: ChatTemplate, passages: Sequence[str], follows: bool) -> list[int]:
        """Return `asking` or `following` with passages before the question, as `LLM` puts them."""
        return template.encode(self.forms[follows].replace(MARK, as_block(passages)))


@dataclass(frozen=True)
class Item:
    """One document or chat.

    parts: ids that are read one after another (a document is one part), each with the probe of its user's message.
    messages: the chat's messages, or the document as one. texts: each message of a chat as the template renders it.
    """

    id: str
    task: str
    parts: list[tuple[list[int], list[int]]]
    questions: list[Question]
    messages: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def context(self) -> str:
        """The document's text."""
        return str(self.messages[0]["content"])

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(len(ids) for ids, _ in self.parts)


def load(paths: Sequence[str | Path], limit: int | None, join: int = 1) -> Iterator[dict[str, Any]]:
    """Yield `limit` records of each file, with its stem as `file`; `join` documents become one record."""
    for path in map(Path, paths):
        with path.open(encoding="utf-8") as lines:
            records = list(map(json.loads, islice(lines, None if limit is None else limit * join)))
        for start in range(0, len(records) - join + 1, join):
            record = joined(records[start : start + join]) if join > 1 else records[start]
            yield {**record, "file": path.stem if join == 1 else f"{path.stem}x{join}"}


def paragraphs(record: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the paragraphs of a document, each with the questions that its text answers."""
    found, start, whole = [], 0, record["context"]
    for text in whole.split("\n\n"):
        first, last = start / len(whole), (start + len(text)) / len(whole)
        asked = [each for each in record["qa"] if first <= each["depth"] < last and each["a"][0] in text]
        if text.strip():
            found.append((text.strip(), asked))
        start += len(text) + 2
    return found


def rephrased(records: Iterable[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records that a JSON file names, with those of their questions that it puts in other words."""
    known = json.loads(path.read_text(encoding="utf-8"))
    for record in records:
        if own := known.get(record["id"]):
            qa = [{**record["qa"][int(index)], "q": asked} for index, asked in own.items()]
            yield {**record, "qa": qa, "file": f"{record['file']}-rephrased"}


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join documents to one, with passages numbered throughout ("Document [1]", ...) and the questions of all."""
    numbers = count(1)
    context = "\n\n".join(record["context"] for record in records)
    size, before, qa = len(context), 0, []
    for record in records:
        length = len(record["context"])
        qa += [{**asked, "depth": (before + asked["depth"] * length) / size} for asked in record["qa"]]
        before += length + 2
    context = re.sub(r"^Document \[\d+\]", lambda _: f"Document [{next(numbers)}]", context, flags=re.MULTILINE)
    return {**records[0], "context": context, "qa": qa, "id": "+".join(str(record["id"]) for record in records)}


def item(template: ChatTemplate, record: dict[str, Any], most: int) -> Item:
    """Return a record as an item, with at most `most` of its questions, spread evenly over the document."""
    if "messages" in record:
        parts, texts, closing = _chat(template, record["messages"])
        messages = record["messages"]
    else:
        texts, messages = [], [{"role": "user", "content": record["context"]}]
        parts, closing = _document(template, (INSTRUCTION if record.get("complete") else "") + record["context"])
    asked, between = record["qa"], _between(template)
    step = max(1.0, len(asked) / most)
    picked = [int(number * step) for number in range(min(most, len(asked)))]
    complete = "messages" in record or record.get("complete") or record.get("task", "").startswith(("kv_", "longchat"))
    guide = "" if complete else GUIDE  # those questions are complete instructions
    questions = [_question(template, index, asked[index], guide, closing, between) for index in picked]
    return Item(str(record["id"]), record["file"], parts, questions, messages, texts)


def _question(
    template: ChatTemplate, index: int, asked: dict[str, Any], guide: str, closing: str, between: str
) -> Question:
    """Return one of a record's `qa`, asked after the document (`closing`) or another answer (`between`)."""
    opening, message = asked.get("opening", ""), guide + asked["q"]
    space = " " if opening else ""
    return Question(
        index,
        asked["q"],
        template.encode(closing.replace(MARK, message) + opening),
        template.encode(between.replace(MARK, message) + opening),
        template.encode(space + asked.get("gold", asked["a"][0])),
        chat_probe(template, find_question(asked["q"])),
        float(asked.get("depth", 0.0)),
        tuple(form.replace(MARK, MARK + message) + opening for form in (closing, between)),
        message,
        template.encode(opening) if opening else [],
        asked["a"],
        asked.get("metric"),
        [template.encode(space + option) for option in asked.get("options", ())],
        asked.get("kind", ""),
    )


def _between(template: ChatTemplate) -> str:
    """Return what the template writes from one assistant's answer to the next, with MARK in the question's place."""
    turns = [("user", "?"), ("assistant", "@@answer@@"), ("user", MARK)]
    return template.render([{"role": role, "content": text} for role, text in turns]).rpartition("@@answer@@")[2]


def _document(template: ChatTemplate, context: str) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Return the document as one part, and what follows it, with MARK in the question's place."""
    head, _, tail = template.render([{"role": "user", "content": f"{context}\n\n{MARK}"}]).partition(MARK)
    return [(template.encode(head), [])], MARK + tail


def _chat(
    template: ChatTemplate, messages: list[dict[str, Any]]
) -> tuple[list[tuple[list[int], list[int]]], list[str], str]:
    """Return each message as a part, those but answers with the probe that `LLM` takes; the texts; and the closing."""
    parts, texts, before = [], [], ""
    for number, message in enumerate(messages, start=1):
        after = template.render(messages[:number], add_generation_prompt=False)
        probe = conversation_probe(template, messages[:number]) if message["role"] != "assistant" else []
        texts.append(after.removeprefix(before))
        parts.append((template.encode(texts[-1]), probe))
        before = after
    answers_result = messages[-1]["role"] == "tool"  # the question is that of a request before it
    marked = template.render(messages if answers_result else [*messages, {"role": "user", "content": MARK}])
    return parts, texts, marked.removeprefix(before)


def summary(template: ChatTemplate, record: dict[str, Any]) -> Item:
    """Return a plain prompt and its reference as an item with one question."""
    ids = template.encode_prompt(record["prompt"])
    reference = template.encode(" " + record["reference"].strip())
    asked = Question(0, record["stop"], ids[-1:], [], reference, template.encode(find_question(record["prompt"])), 0.0)
    return Item(str(record["id"]), record["file"], [(ids[:-1], asked.probe)], [asked])


def needles(book: Path, tokens_of: ChatTemplate, documents: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Hide six secret codes at even depths of each of `documents` excerpts of a long text.

    The answers continue a sentence's opening, so that exactness is about the code alone.
    """
    draw = random.Random(seed)
    text = book.read_text(encoding="utf-8")
    places = ("harbour", "library", "garden", "station", "kitchen", "tower", "cellar", "chapel", "bakery", "archive")
    words = ("amber", "falcon", "violet", "copper", "meadow", "winter", "saddle", "harvest", "lantern", "pepper")
    per_token = len(text[:40_000]) / len(tokens_of.encode(text[:40_000]))
    size, records = int(tokens * per_token), []
    for number in range(documents):
        start = (number * 7 + 3) * len(text) // (7 * documents + 5)
        paragraphs = text[start : start + size].split("\n\n")[1:-1]
        qa, chosen, before = [], draw.sample(places, 6), len(paragraphs)
        for order, place in enumerate(chosen):
            code = f"{draw.choice(words)} {draw.randint(100, 999)}"
            depth = (order + 0.5) / 6
            at = int(depth * before) + order
            paragraphs.insert(at, f"The secret code of the {place} is {code}.")
            asked = {"q": f"What is the secret code of the {place}?", "a": [code], "depth": depth}
            qa.append({**asked, "opening": f"The secret code of the {place} is"})
        context = "\n\n".join(paragraphs)
        records.append(
            {"id": f"needles-{number}", "task": "needles", "file": "needles-opened", "context": context, "qa": qa}
        )
    return records
