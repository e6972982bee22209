"""Recall of evidence, without a model: does the text that is looked up for a question hold its answer?

    python benchmarks/quality/evidence_recall.py --data FILE.jsonl[xN]... [--tokens 128,256,...] [--model smollm2]
    python benchmarks/quality/evidence_recall.py --journals 6 --name evidence-recall-lists
    python benchmarks/quality/evidence_recall.py --structured 3 --name evidence-recall-structured
    python benchmarks/quality/evidence_recall.py --updates 5 --name evidence-recall-updates

`FILE.jsonl x5` as FILE.jsonlx5: five documents joined to one. For documents with `qa`, the share of questions whose
gold answer stands in the passages found. For conversations (`turns`, with a `rubric` for each question), the mean share
of the rubric's words, as far as the question does not have them and few passages do. For journals (`travel_documents`),
the mean share of what is to be listed. Documents of records (`structured_documents`) and facts that change (`updates`)
are measured as documents: an answer stands in one place alone. The tokens are those of the passages, by the model's
tokenizer. Searched by words alone, and by words and the meaning of the model's tokens. Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import write
from benchmarks.quality import structured_documents, updates
from benchmarks.quality.generated import GeneratedSuite
from benchmarks.quality.sources import Sources
from benchmarks.quality.tasks import load
from benchmarks.quality.travel_documents import travel_document
from zsmerge_llm import LLM
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passage_search import PassageIndexes, PassageSearch
from zsmerge_llm.retrieval.passages import split
from zsmerge_llm.retrieval.questions import Query, search_text
from zsmerge_llm.retrieval.terms import query_terms, terms
from zsmerge_llm.retrieval.token_vectors import TokenVectors
from zsmerge_llm.runtime import token_vectors

COMMON = 60
"""Passages that a word of a rubric stands in at most: words of more tell nothing."""

GENERATED_TOKENS = 4096
"""Length of documents of records, and of texts with facts that change."""

Data = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]
"""A document or conversation: task, messages, and questions."""


@cache
def plain(text: str) -> str:
    """Return a text's words alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def items(spec: str) -> Iterator[Data]:
    """Yield the documents or conversations of a file: task, messages, and questions."""
    path, join = (spec.rpartition("x")[0], int(spec.rpartition("x")[2])) if re.search(r"lx\d+$", spec) else (spec, 1)
    for record in load([path], None, join):
        if "turns" in record:
            yield record["file"], record["turns"], record["qa"]
        else:
            yield record["file"], [{"role": "user", "content": record["context"]}], record["qa"]


def journals(count: int) -> Iterator[Data]:
    """Yield journals with the questions whose answers stand at many places of them."""
    for seed in range(count):
        journal = travel_document(seed, chapters=8, paragraphs=6)
        lists = [{"q": each.text, "all": each.gold} for each in journal.questions if each.score in ("list", "order")]
        questions = [{**each, "kind": each["q"].rstrip(".")} for each in lists]
        yield "journals", [{"role": "user", "content": journal.text}], questions


def generated(suite: GeneratedSuite, count: int, sources: Sources) -> Iterator[Data]:
    """Yield so many texts of each task of a suite, with ten questions each."""
    for record in suite.records(sources, [GENERATED_TOKENS], count, questions=10):
        messages = record.get("messages") or [{"role": "user", "content": record["context"]}]
        yield f"{suite.name} {record['task']}", messages, record["qa"]


def facts(asked: dict[str, Any], spread: Counter[str]) -> set[str]:
    """Return the terms of a rubric that the conversation has, and the question has not."""
    answers = asked["a"] if isinstance(asked["a"], list) else [asked["a"]]
    stated = query_terms(" ".join([*asked["rubric"], *answers]).replace("LLM response should", ""))
    return {term for term in stated if 0 < spread[term] < COMMON} - set(terms(asked["q"]))


def found_share(asked: dict[str, Any], text: str, spread: Counter[str]) -> float | None:
    """Return how much of a question's evidence a text holds; None where it is not known."""
    if "all" in asked:
        return statistics.fmean(plain(each) in plain(text) for each in asked["all"])
    if "rubric" not in asked:
        return float(any(plain(answer) in plain(text) for answer in asked["a"]))
    needed = facts(asked, spread)
    if asked["kind"] == "abstention" or not needed:
        return None
    return len(needed & set(terms(text))) / len(needed)


def recall_by_limit(
    template: ChatTemplate, searches: dict[str, TokenVectors | None], limits: list[int], data: Iterable[Data]
) -> Iterator[dict[str, Any]]:
    """Yield the recall of all questions of each task and kind, by each search and limit."""
    found: dict[tuple[str, str, int], list[tuple[float, int]]] = {}
    for task, messages, questions in data:
        spread = Counter(term for each in messages for part in split(each["content"]) for term in set(terms(part)))
        indexes = {by: PassageIndexes() for by in searches}
        for (by, vectors), limit in product(searches.items(), limits):
            search = PassageSearch(template, limit, vectors)
            for asked in questions:
                text = "\n\n".join(search.search(messages, [Query(search_text(asked["q"]))], limit, indexes[by]))
                share = found_share(asked, text, spread)
                if share is None:
                    continue
                for name in [task, *([f"{task} {asked['kind']}"] if "kind" in asked else [])]:
                    found.setdefault((name, by, limit), []).append((share, len(template.encode_text(text))))
    for (task, by, limit), each in sorted(found.items()):
        yield {"task": task, "search": by, "limit": limit, **means(each)}


def means(found: list[tuple[float, int]]) -> dict[str, Any]:
    """Return how many questions there are, and the means of their recall and of the tokens read."""
    return {
        "questions": len(found),
        "recall": round(statistics.fmean(share for share, _ in found), 4),
        "tokens": round(statistics.fmean(size for _, size in found)),
    }


def report(name: str, model: str, rows: Iterable[dict[str, Any]]) -> None:
    """Print rows and write them as results."""
    shown = list(rows)
    for row in shown:
        print(*row.values(), sep="\t")
    print(write(name, {"model": model, "rows": shown}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="JSON lines")
    parser.add_argument("--journals", type=int, default=0, help="how many")
    parser.add_argument("--structured", type=int, default=0, help="how many of each kind")
    parser.add_argument("--updates", type=int, default=0, help="texts of each kind in which facts change")
    parser.add_argument("--folder", help="with the evaluation data, for these (default: ZSMERGE_EVALUATION_DATA)")
    parser.add_argument("--name", default="evidence-recall", help="of the results")
    parser.add_argument("--tokens", default="128,256,384,512,640,1024")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer counts, and whose tokens are compared")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, compile=False)
    template = ChatTemplate(llm.tokenizer)

    def count(text: str) -> int:
        return len(template.encode_text(text))

    searches = {"words": None, "words and meaning": token_vectors(llm.engine, llm.tokenizer)}
    limits = list(map(int, arguments.tokens.split(",")))
    files = (each for spec in arguments.data for each in items(spec))
    sources = Sources.at(arguments.folder, count) if arguments.updates else Sources(Path(), count)
    records = generated(structured_documents.SUITE, arguments.structured, sources)
    facts_that_change = generated(updates.SUITE, arguments.updates, sources)
    data = chain(files, journals(arguments.journals), records, facts_that_change)
    report(arguments.name, arguments.model, recall_by_limit(template, searches, limits, data))


if __name__ == "__main__":
    main()
