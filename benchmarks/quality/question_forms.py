"""Recall of evidence for questions as prompts and conversations put them, without a model.

    python benchmarks/quality/question_forms.py --data FILE.jsonl[xN]... [--documents N] [--limit 640] [--model smollm2]

Each question of a document is put in several forms: as prompt templates of frameworks, with instructions around it.
Where two questions of one paragraph share a name, the second is also asked behind the first one, with "it" or "they"
for the name. Measured is the share of questions whose gold answer stands in what `PassageSearch.augment` reads again.
Data as for `evidence_recall.py`. Writes results/question-forms.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, permutations
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.quality.evidence_recall import Data, found_share, items, means, report
from benchmarks.quality.ruler.questions import INSTRUCTION
from benchmarks.quality.tasks import paragraphs
from zsmerge_llm import LLM
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passage_search import PassageIndexes, PassageSearch
from zsmerge_llm.runtime import token_vectors
from zsmerge_llm.types import Message

FORMS = {
    "the question alone": "{}",
    "LangChain": "Use the context above to answer the question. If you don't know the answer, just say that you don't "
    "know, don't try to make up an answer. Keep the answer as concise as possible.\n\nQuestion: {}\n\nHelpful Answer:",
    "LlamaIndex": "Given the context information and not prior knowledge, answer the query.\nQuery: {}\nAnswer: ",
    "RULER": f"{INSTRUCTION}\n\nQuestion: {{}}",
    "order before it": "Answer in one short sentence: {}",
    "order behind it": "{} Answer in one short sentence and cite the source.",
    "order in a line behind it": "{}\nAnswer briefly, with nothing but the name or number.",
    "role before it": "You are a research assistant. Answer from the document only, in a single sentence.\n\n{}",
    "polite": "I have a question about the document that I gave you earlier. {} Thanks in advance!",
}
"""What prompts put around a question."""
NAME = r"[A-Z][\w'-]+(?: (?:of |the |de |von )?[A-Z][\w'-]+)*"
"""A name of one or more words."""

Found = dict[str, list[tuple[float, int]]]
"""Form → of each question, how much of its answer is found, and the tokens read."""


def follow_ups(document: dict[str, Any], draw: Random) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Yield questions of a document, each behind another about the same thing, and with a pronoun for it."""
    for _, asked in paragraphs(document):
        for first, second in permutations(asked, 2):
            if shared := {*re.findall(NAME, first["q"][1:])} & {*re.findall(NAME, second["q"][1:])}:
                yield first, second, second["q"].replace(max(sorted(shared), key=len), draw.choice(["it", "they"]))
                break


def measure(search: PassageSearch, data: Data, draw: Random) -> Found:
    """Return the recall of a document's questions in each form, and as follow-ups."""
    _, messages, questions = data
    found, indexes = defaultdict[str, list[tuple[float, int]]](list), PassageIndexes()

    def ask(form: str, question: dict[str, Any], text: str, before: list[Message]) -> None:
        asking: Message = {"role": "user", "content": text}
        augmented = search.augment([*messages, *before, asking], 2 * int(search.max_tokens), indexes=indexes)
        read = augmented[-1]["content"].removesuffix(text)
        found[form].append((found_share(question, read, Counter()) or 0.0, len(search.template.encode_text(read))))

    for form, around in FORMS.items():
        for question in questions:
            ask(form, question, around.format(question["q"]), [])
    for first, second, text in follow_ups({"context": messages[0]["content"], "qa": questions}, draw):
        before: list[Message] = [
            {"role": "user", "content": first["q"]},
            {"role": "assistant", "content": first["a"][0]},
        ]
        ask("follow-up in full", second, second["q"], before)
        ask("follow-up with a pronoun", second, text, before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSON lines")
    parser.add_argument("--documents", type=int, help="of each file (default: all)")
    parser.add_argument("--limit", type=int, default=640, help="tokens of passages for a question")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer counts, and whose tokens are compared")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, compile=False)
    search = PassageSearch(ChatTemplate(llm.tokenizer), arguments.limit, token_vectors(llm.engine, llm.tokenizer))
    rows, draw = list[dict[str, Any]](), Random(0)
    for spec in arguments.data:
        found: Found = defaultdict(list)
        for data in islice(items(spec), arguments.documents):
            for form, each in measure(search, data, draw).items():
                found[form] += each
        rows += [
            {"task": data[0], "form": form, "limit": arguments.limit, **means(each)} for form, each in found.items()
        ]
    report("question-forms", arguments.model, rows)


if __name__ == "__main__":
    main()
