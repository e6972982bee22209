"""Questions about whole documents: notes taken while reading, beside LlamaIndex's and LangChain's summarizers.

    python benchmarks/quality/whole_documents.py MODEL --out FILE.jsonl [--documents 3] [--slots 512] ...

Contenders, all with the same model:

- `plain`: read ahead with the look-up, as by default. `notes`: the same with `read_document(notes=...)`.
- `tree_summarize`: LlamaIndex's response synthesizer over chunks of the text, with the question, in a full cache.
- `map_reduce`: LangChain's map-reduce for questions (its prompts), as two steps of a chain, in a full cache.

The file gets one line an answer; what it has already is not asked again. `--report` writes the figures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import provenance
from benchmarks.quality.travel_documents import TravelDocument, score, travel_document
from zsmerge_llm import LLM, CacheConfig, SamplingParams

NOTES = "Which town was reached, who was met, and what was bought?"
"""What a user who reads journals would have noted."""
MAP_PROMPT = """\
Use the following portion of a long document to see if any of the text is relevant to answer the question.
Return any relevant text verbatim.
{context}
Question: {question}
Relevant text, if any:"""
REDUCE_PROMPT = """Given the following extracted parts of a long document and a question, create a final answer.
If you don't know the answer, just say that you don't know. Don't try to make up an answer.

QUESTION: {question}
=========
{summaries}
=========
FINAL ANSWER:"""
"""LangChain's prompts of the chain type map_reduce for questions, without its example."""
Ask = Callable[[str], str]


@dataclass
class Cost:
    """Tokens that an engine has read and written, and seconds."""

    read: int = 0
    written: int = 0
    seconds: float = 0.0


@contextmanager
def counted(llm: LLM) -> Iterator[Cost]:
    """Count what the engine reads and writes, whoever asks it."""
    engine, cost, started = llm.engine, Cost(), time.perf_counter()
    read, decode = engine.read, engine.decode

    def counted_read(cache: Any, ids: Sequence[int], **how: Any) -> Any:
        cost.read += len(ids)
        return read(cache, ids, **how)

    def counted_decode(*arguments: Any, **how: Any) -> Iterator[Any]:
        for tokens in decode(*arguments, **how):
            cost.written += sum(token is not None for token in tokens)
            yield tokens

    engine.read, engine.decode = counted_read, counted_decode  # type: ignore[method-assign]
    try:
        yield cost
    finally:
        del engine.read, engine.decode
        cost.seconds = time.perf_counter() - started


def chunks(llm: LLM, text: str, tokens: int) -> list[str]:
    """Return a text's paragraphs in chunks of about so many tokens."""
    found: list[list[str]] = [[]]
    size = 0
    for paragraph in text.split("\n\n"):
        length = llm.count_tokens(paragraph)
        if size + length > tokens and found[-1]:
            found.append([])
            size = 0
        found[-1].append(paragraph)
        size += length
    return ["\n\n".join(each) for each in found]


def document_session(llm: LLM, document: TravelDocument, max_tokens: int, notes: str | bool) -> Ask:
    """Read a document ahead; return what answers questions about it."""
    name = f"{len(document.text)} {notes}"  # a document with notes would be found again without them
    session = llm.read_document(text=document.text, name=name, notes=notes)
    sampling = SamplingParams(max_tokens=max_tokens)
    return lambda question: llm.chat(question, session=session, sampling=sampling).text


def tree_summarize(llm: LLM, document: TravelDocument, max_tokens: int, chunk: int) -> Ask:
    """Return LlamaIndex's synthesizer of that name over the chunks of a document."""
    from llama_index.core.response_synthesizers import TreeSummarize
    from llama_index.llms.zsmerge import ZSMergeLLM

    synthesizer = TreeSummarize(llm=ZSMergeLLM(llm=llm, max_tokens=max_tokens))
    parts = chunks(llm, document.text, chunk)
    return lambda question: str(synthesizer.get_response(question, parts))


def map_reduce(llm: LLM, document: TravelDocument, max_tokens: int, chunk: int) -> Ask:
    """Return LangChain's map-reduce over the chunks of a document, as a chain of two prompts."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_zsmerge import ChatZSMerge

    model = ChatZSMerge(llm=llm, max_tokens=max_tokens)
    mapped = ChatPromptTemplate.from_template(MAP_PROMPT) | model | StrOutputParser()
    reduced = ChatPromptTemplate.from_template(REDUCE_PROMPT) | model | StrOutputParser()
    parts = chunks(llm, document.text, chunk)

    def ask(question: str) -> str:
        found = [mapped.invoke({"context": part, "question": question}) for part in parts]
        return reduced.invoke({"summaries": "\n\n".join(found), "question": question})

    return ask


def contenders(models: Callable[[int | None], LLM], slots: int, max_tokens: int, chunk: int) -> dict[str, Any]:
    """Return for each contender its model, and what makes it ready to answer about a document."""
    return {
        "notes": (models(slots), lambda llm, document: document_session(llm, document, max_tokens, NOTES)),
        "plain": (models(slots), lambda llm, document: document_session(llm, document, max_tokens, False)),
        "tree_summarize": (models(None), lambda llm, document: tree_summarize(llm, document, max_tokens, chunk)),
        "map_reduce": (models(None), lambda llm, document: map_reduce(llm, document, max_tokens, chunk)),
    }


def measure(arguments: argparse.Namespace) -> None:
    """Ask every contender every question, and append a line for each answer."""
    out = Path(arguments.out)
    known = {tuple(json.loads(line)["key"]) for line in out.read_text().splitlines()} if out.exists() else set()
    made: dict[int | None, LLM] = {}

    def models(slots: int | None) -> LLM:
        settings: dict[str, Any] = {"dtype": arguments.dtype, "quantization": arguments.quantization}
        return made.setdefault(slots, LLM(arguments.model, cache=CacheConfig(slots=slots), compile=False, **settings))

    for number in range(arguments.documents):
        document = travel_document(number, arguments.chapters, arguments.paragraphs)
        settings = (models, arguments.slots, arguments.max_tokens, arguments.chunk)
        for name, (llm, prepare) in contenders(*settings).items():
            wanted = [question for question in document.questions if (name, number, question.text) not in known]
            if not wanted or name not in arguments.contenders:
                continue
            with counted(llm) as reading:
                ask = prepare(llm, document)
            for question in wanted:
                with counted(llm) as cost:
                    answer = ask(question.text)
                line = {
                    **{"key": [name, number, question.text], "contender": name, "kind": question.score},
                    **{"score": score(question, answer), "answer": answer, "tokens": llm.count_tokens(document.text)},
                    **{"reading": vars(reading), "cost": vars(cost)},
                }
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(name, number, question.score, f"{line['score']:.2f}", answer[:100].replace("\n", " "), flush=True)


def figures(path: Path) -> dict[str, Any]:
    """Return the mean scores and costs of each contender, on the documents that all have answered."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = list(dict.fromkeys(line["contender"] for line in lines))
    asked = [{tuple(line["key"][1:]) for line in lines if line["contender"] == name} for name in names]
    shared = set.intersection(*asked)
    rows = {}
    for name in names:
        own = [line for line in lines if line["contender"] == name and tuple(line["key"][1:]) in shared]
        kinds = sorted({line["kind"] for line in own})
        documents = {line["key"][1]: line["reading"] for line in own}.values()
        rows[name] = {
            "scores": {kind: round(fmean([x["score"] for x in own if x["kind"] == kind]), 3) for kind in kinds},
            "document": {key: round(fmean([each[key] for each in documents]), 1) for key in vars(Cost())},
            "question": {key: round(fmean([line["cost"][key] for line in own]), 1) for key in vars(Cost())},
        }
    tokens = fmean([line["tokens"] for line in lines])
    return {
        "tokens": round(tokens),
        "documents": len({key[0] for key in shared}),
        "questions": len(shared),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    parser.add_argument("--report", action="store_true", help="write the figures as FILE.json, and measure nothing")
    parser.add_argument("--contenders", nargs="*", default=["notes", "plain", "tree_summarize", "map_reduce"])
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--chapters", type=int, default=8)
    parser.add_argument("--paragraphs", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk of the frameworks' summarizers")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default=None)
    arguments = parser.parse_args()
    if not arguments.report:
        measure(arguments)
        return
    path = Path(arguments.out)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "report", "model")}
    found = {**provenance(), "model": Path(arguments.model).stem, "settings": settings, **figures(path)}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
