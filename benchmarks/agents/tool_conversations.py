"""Tool conversations of LangChain agents: what they end with, how many calls they make, and what is read again.

    python benchmarks/agents/tool_conversations.py --model qwen.gguf [--turns 200] [--agents plain,todos,limits,summary]
        [--quantization int4] [--resume]

Each conversation has two user messages: one that needs one tool, and one that needs two. An agent is `create_agent`
with one middleware or none. Counted are, for each agent: answers that repeat a text which zsmerge-llm itself puts into
prompts, turns that make the same call three times or never end, answers that hold what the tools returned, and model
calls that read a conversation again. Writes results/tool-conversations-MODEL.json after each conversation; `--resume`
goes on from that file. All agents have a conversation before any has the next one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware, TodoListMiddleware, ToolCallLimitMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langchain_zsmerge import ChatZSMerge
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError

from benchmarks.common import RESULTS, write
from zsmerge_llm.language import chat_template, output_format
from zsmerge_llm.retrieval import passage_search
from zsmerge_llm.sessions import documents

AGENTS = ("plain", "todos", "limits", "summary")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Dakar", "Turin", "Perth", "Kyoto", "Porto", "Basel")
ITEMS = ("lamp", "chair", "kettle", "tent", "violin", "clock", "scarf", "ladder", "radio", "basket", "globe", "saddle")
MAX_MODEL_CALLS = 12
Rows = list[dict[str, Any]]
"""What is counted of each turn."""
NOTE_WORDS = 6
"""Successive words of one of the product's texts that make an answer a repetition of it."""


def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"{5 + len(city) * 3} degrees, {'sunny' if len(city) % 2 else 'rain'}"


def get_population(city: str) -> str:
    """Get the number of people who live in a city."""
    return str(len(city) * 137_000)


def get_time(city: str) -> str:
    """Get the time of day in a city."""
    return f"{len(city) + 6}:35"


def current_time() -> str:
    """Current time."""
    return "14:35"


def current_user() -> str:
    """Name of the user who is logged in."""
    return "Ines Marlow"


def get_price(item: str) -> str:
    """Get the price of an item."""
    return json.dumps({"item": item, "euros": len(item) * 7})


def get_stock(item: str) -> str:
    """Get how many pieces of an item are in stock."""
    return str(len(item) * 11)


def multiply(a: float, b: float) -> str:
    """Multiply two numbers."""
    return f"{a * b:g}"


TOOLS = (get_weather, get_population, get_time, current_time, current_user, get_price, get_stock, multiply)


def conversations(count: int) -> Iterator[tuple[list[Any], tuple[str, str]]]:
    """Yield the tools and the two user messages of each conversation.

    The first message needs one tool, the second two. Every other conversation has the tools that it needs and no more.
    """
    for number in range(count):
        city, other = CITIES[number % len(CITIES)], CITIES[(number * 7 + 5) % len(CITIES)]
        item = ITEMS[(number * 5 + number // len(ITEMS)) % len(ITEMS)]
        single = (
            (get_weather, f"What is the weather in {city}?"),
            (current_time, ("What time is it?", "Tell me the time please.")[number % 2]),
            (get_population, f"How many people live in {city}?"),
            (get_price, f"How much does a {item} cost?"),
            (get_stock, f"How many pieces of {item} are in stock?"),
            (current_user, ("Who is logged in?", "What is my name?")[number // 2 % 2]),
            (multiply, f"What is {number + 13} times {number + 7}?"),
        )
        double = (
            (get_weather, get_weather, f"What is the weather in {city} and in {other}?"),
            (get_price, get_weather, f"Tell me the price of a {item}, and the weather in {other}."),
            (get_population, get_stock, f"How many people live in {other}, and how many pieces of {item} do you have?"),
            (get_time, get_price, f"What time is it in {other}, and what does a {item} cost?"),
        )
        (tool, first), (*both, second) = single[number % len(single)], double[number // 2 % len(double)]
        yield list(TOOLS) if number % 2 else list(dict.fromkeys([tool, *both])), (first, second)


def product_texts() -> list[str]:
    """Return the texts that zsmerge-llm puts into prompts."""
    texts = [
        value
        for module in (chat_template, output_format, passage_search, documents)
        for name, value in vars(module).items()
        if isinstance(value, str) and re.search("INSTRUCTION|INTRODUCTION", name)
    ]
    return [line for text in texts for line in text.splitlines() if line]


def repeats(answer: str, texts: Sequence[str]) -> bool:
    """Return whether an answer repeats one of the texts, or `NOTE_WORDS` successive words of it."""
    words = _words(answer)
    spoken = {tuple(words[at : at + NOTE_WORDS]) for at in range(len(words) - NOTE_WORDS + 1)}
    for text in map(_words, texts):
        if len(text) >= NOTE_WORDS:
            if any(tuple(text[at : at + NOTE_WORDS]) in spoken for at in range(len(text) - NOTE_WORDS + 1)):
                return True
        elif text and text == words[: len(text)]:
            return True
    return False


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def make_agent(kind: str, chat: ChatZSMerge, tools: Sequence[Any]) -> Any:
    """Return an agent with one middleware or none."""
    middleware: dict[str, list[Any]] = {
        "plain": [],
        "todos": [TodoListMiddleware()],
        "limits": [ToolCallLimitMiddleware(run_limit=4)],
        "summary": [SummarizationMiddleware(model=chat, trigger=("messages", 7), keep=("messages", 3))],
    }
    return create_agent(chat, list(tools), middleware=middleware[kind], checkpointer=InMemorySaver())


def run_turn(agent: Any, question: str, thread: str, seen: set[str]) -> tuple[dict[str, Any], list[AIMessage]]:
    """Ask an agent; return what is counted of the turn, and the messages of the model in it."""
    config = {"configurable": {"thread_id": thread}, "recursion_limit": 4 * MAX_MODEL_CALLS}
    try:
        messages = agent.invoke({"messages": [("user", question)]}, config)["messages"]
        endless = False
    except GraphRecursionError:
        messages, endless = agent.get_state(config).values["messages"], True
    new = [message for message in messages if message.id not in seen]
    seen.update(message.id for message in messages)
    said = [message for message in new if isinstance(message, AIMessage) and message.usage_metadata]
    made = [call for message in said for call in message.tool_calls]
    calls = Counter(json.dumps([call["name"], call["args"]], sort_keys=True) for call in made)
    results = [re.findall(r"[\d,.]*\d", message.text)[:1] for message in new if isinstance(message, ToolMessage)]
    answer = said[-1].text if said else ""
    numbers = re.sub(r"(?<=\d),(?=\d{3})", "", answer)
    return {
        "question": question,
        "answer": answer,
        "leaked": any(repeats(message.text, product_texts()) for message in said),
        "endless": endless or any(count >= 3 for count in calls.values()),
        "tool_calls": sum(calls.values()),
        "informed": bool(results) and all(not found or found[0] in numbers for found in results),
    }, said


def run_conversation(kind: str, chat: ChatZSMerge, number: int, tools: Sequence[Any], questions: Sequence[str]) -> Rows:
    """Return what is counted of each turn of one conversation."""
    agent, seen, rows = make_agent(kind, chat, tools), set[str](), Rows()
    for at, question in enumerate(questions):
        started = time.perf_counter()
        row, said = run_turn(agent, question, f"{kind}-{number}", seen)
        usages = [message.response_metadata["token_usage"] for message in said]
        # The first request of a conversation is new; so is the one behind a summary that replaces the history.
        reuse = [each["reuse"] if at or place else "first" for place, each in enumerate(usages)]
        rows.append({"conversation": number, **row, "reuse": reuse, "seconds": time.perf_counter() - started})
        print(f"{kind} {number} {row['leaked']} {row['endless']} {row['answer'][:100]!r}", flush=True)
    return rows


def summary(rows: Rows) -> dict[str, Any]:
    """Return the counts of one agent's turns, and the turns one by one."""
    return {
        "turns": len(rows),
        **{name: sum(row[name] for row in rows) for name in ("leaked", "endless", "informed", "tool_calls", "seconds")},
        "reuse": dict(Counter(each for row in rows for each in row["reuse"])),
        "rows": rows,
    }


def saved_rows(name: str) -> dict[str, Rows]:
    """Return the turns that an earlier run has written, by agent."""
    path = RESULTS / f"{name}.json"
    agents = json.loads(path.read_text())["agents"] if path.is_file() else {}
    return {kind: found["rows"] for kind, found in agents.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, default=200, help="of all agents together")
    parser.add_argument("--agents", default=",".join(AGENTS))
    parser.add_argument("--quantization", help="of the weights, such as int4")
    parser.add_argument("--name", help="of the result; by default the model's")
    parser.add_argument("--resume", action="store_true", help="go on from the result of that name")
    arguments = parser.parse_args()
    kinds = arguments.agents.split(",")
    model = ChatZSMerge(model=arguments.model, quantization=arguments.quantization, temperature=0, max_tokens=100)
    name = arguments.name or Path(arguments.model).stem
    rows = saved_rows(f"tool-conversations-{name}") if arguments.resume else {}
    for number, (tools, questions) in enumerate(conversations((arguments.turns // len(kinds) + 1) // 2)):
        for kind in kinds:
            known = rows.setdefault(kind, [])
            if all(row["conversation"] != number for row in known):
                known += run_conversation(kind, model, number, tools, questions)
                agents = {each: summary(found) for each, found in rows.items()}
                about = {"model": name, "quantization": arguments.quantization}
                write(f"tool-conversations-{name}", {**about, "agents": agents})


if __name__ == "__main__":
    main()
