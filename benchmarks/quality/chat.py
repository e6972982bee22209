"""Long chats, turn by turn, at equal bytes: what is left of the first third when the chat has continued for long.

    python benchmarks/quality/chat.py --data FILE.jsonl... [--model M] [--policies A,B] [--slots 512] [--documents N]

Chats are made of the data's documents: each turn is a paragraph with a question about it, and the gold answer as reply.
Records with `messages` are taken as they are. Every policy reads message by message; the library's own policies
compress between two turns as `LLM.chat` does, with the last line of a user's message as the probe. Then questions about
the first third are asked (of `messages`: the record's own), each of a copy of the cache: `later`. The setting `first`
asks the same questions right after the turn that holds their answer. Lines are appended to
results/quality-chat-MODEL.jsonl; a restart continues where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS
from benchmarks.policies import POLICIES
from benchmarks.policies.base import STAGE, Policy
from benchmarks.quality.evaluator import Budget, Evaluator, row
from benchmarks.quality.report import report
from benchmarks.quality.run import done
from benchmarks.quality.tasks import GUIDE, Item, item, load, paragraphs
from zsmerge_llm import LLM
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passage_search import as_block

DEFAULT = "full,truncate,streaming,h2o,snapkv,expected,zsmerge-chat,zsmerge-chat-retrieval,truncate-retrieval"
EARLY = 1 / 3


@dataclass(frozen=True)
class Chat:
    """A chat as an item, and the number of messages after which each question can be asked first."""

    item: Item
    asked_after: list[int]


def conversation(record: dict[str, Any], early: float = EARLY) -> tuple[dict[str, Any], list[int]]:
    """Return a document as a chat with questions about its first third, and after which message each can be asked.

    One question of each paragraph is asked and answered on the way.
    """
    messages: list[dict[str, str]] = []
    later: list[dict[str, Any]] = []
    after: list[int] = []
    parts = paragraphs(record)
    for number, (text, asked) in enumerate(parts):
        question, answer = (GUIDE + asked[0]["q"], asked[0]["a"][0]) if asked else ("Go on.", "All right.")
        messages += [{"role": "user", "content": f"{text}\n\n{question}"}, {"role": "assistant", "content": answer}]
        if number < len(parts) * early:
            later += [{**each, "q": GUIDE + each["q"]} for each in asked[1:]]
            after += [len(messages)] * len(asked[1:])
    return {"id": record["id"], "file": f"chat-{record['file']}", "messages": messages, "qa": later}, after


def chat(template: ChatTemplate, record: dict[str, Any], most: int) -> Chat:
    """Return a chat with at most `most` of its questions, spread evenly."""
    if "messages" in record:
        after = [len(record["messages"])] * len(record["qa"])
    else:
        record, after = conversation(record)
    read = item(template, record, most)
    return Chat(read, [after[asked.index] for asked in read.questions])


def turns(evaluator: Evaluator, policy: Policy, slots: int, read: Item) -> Iterator[Cache]:
    """Yield the cache after each message; one that only keeps the newest text is made anew each time."""
    if policy.newest_only:
        ids: list[int] = []
        for part, _ in read.parts:
            ids += part
            cache = evaluator.new_cache(policy, Budget(slots), read.tokens)
            evaluator.engine.read(cache, ids[-slots - STAGE :])
            yield cache
        return
    cache = evaluator.new_cache(policy, Budget(slots), read.tokens)
    for number, (part, question) in enumerate(read.parts):
        if (
            policy.retrieval_tokens
            and question
            and cache.exact_capacity is not None
            and cache.seen + len(part) > cache.exact_capacity
        ):
            part = with_passages(evaluator, policy, slots, read, number)
        evaluator.engine.read(cache, part, probe=evaluator.probe(policy, question) or None, multi_turn=number > 0)
        if policy.eviction is None and not question:  # an answer: `LLM` compresses before the next turn
            cache.compress_stage()
        yield cache


def with_passages(evaluator: Evaluator, policy: Policy, slots: int, read: Item, number: int) -> list[int]:
    """Return the ids of a user's message with passages of earlier ones before it."""
    content = read.messages[number]["content"]
    passages = as_block(evaluator.passages(policy, Budget(slots), read, number, content))
    return evaluator.template.encode(read.texts[number].replace(content, passages + content, 1))


def measure(evaluator: Evaluator, policy: Policy, slots: int, chat: Chat) -> list[dict[str, Any]]:
    """Ask the chat's questions `first` and `later`; return one line each."""
    lines, asked = [], list(zip(chat.item.questions, chat.asked_after, strict=True))
    for number, cache in enumerate(turns(evaluator, policy, slots, chat.item), start=1):
        facts = {"slots": cache.slots, "tokens_read": sum(len(ids) for ids, _ in chat.item.parts[:number])}
        facts |= {"cache_bytes": cache.full_nbytes() if cache.slots is None else cache.nbytes, "reading_bytes": 0}
        due = {"first": [each for each, after in asked if after == number]}
        due["later"] = [each for each, _ in asked] if number == len(chat.item.parts) else []
        for setting, questions in due.items():
            scores = evaluator.scores(policy, Budget(slots), chat.item, cache, questions, before=number)
            both = zip(questions, scores, strict=True)
            lines += [{**row(each, score, facts), "setting": setting} for each, score in both]
    return lines


def run(arguments: argparse.Namespace, path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Measure what is missing and append it, one chat under one policy at a time."""
    llm = LLM(arguments.model)
    evaluator = Evaluator(llm.engine, ChatTemplate(llm.tokenizer))
    finished = {key[:2] + key[3:] for key in done(path)}
    for record in records:
        made = chat(evaluator.template, record, arguments.questions)
        for name in arguments.policies.split(","):
            label = "full" if name == "full" else str(arguments.slots)
            key = (name, label, made.item.task, made.item.id, len(made.item.questions))
            if key in finished:
                continue
            fields = dict(zip(("policy", "budget", "task", "item", "asked"), key, strict=True))
            lines = measure(evaluator, POLICIES[name], arguments.slots, made)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**line, **fields}) + "\n" for line in lines)
            later = [line["nll"] for line in lines if line["setting"] == "later"]
            print(*key, f"n={len(later)} NLL {sum(later) / len(later):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="*", default=[], help="JSON lines")
    parser.add_argument("--policies", default=DEFAULT, help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--documents", type=int, help="of each file (default: all)")
    parser.add_argument("--questions", type=int, default=12, help="of each chat")
    parser.add_argument("--reference", default="zsmerge-chat", help="the policy that the others are compared with")
    parser.add_argument("--name", help="of the results (default: the model's)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"quality-chat-{arguments.name or Path(arguments.model).name.removesuffix('.gguf')}.jsonl"
    if not arguments.report:
        run(arguments, path, list(load(arguments.data, arguments.documents)))
    print(report(path, [arguments.reference], Path(arguments.model).stem))


if __name__ == "__main__":
    main()
