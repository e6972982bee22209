"""LangChain: an agent with three tools that reads every token of a conversation once.

    pip install langchain
    python langchain_agent.py
    python langchain_agent.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

The agent's thread names the session. The model decides which tool to call; a grammar makes every call fit the tool's
schema. Each answer is followed by its usage: the tokens of the conversation, and the new ones that were read.
"""

from __future__ import annotations

import argparse

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge
from langgraph.checkpoint.memory import InMemorySaver

TURNS = [
    "What is the weather in Paris?",
    "How many people live in London?",
    "What is 17 * 23?",
    "What is the weather in London?",
    "How many people live in Paris?",
    "What is 12 * 12?",
]


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return {"Paris": "18 degrees, sunny", "London": "12 degrees, rain"}.get(city, f"No station in {city}.")


@tool
def get_population(city: str) -> str:
    """Get the number of people who live in a city."""
    return {"Paris": "2,100,000", "London": "8,900,000"}.get(city, f"Unknown for {city}.")


@tool
def multiply(a: int, b: int) -> str:
    """Multiply two whole numbers."""
    return str(a * b)


def main() -> None:
    parser = argparse.ArgumentParser(description="An agent with tools.")
    parser.add_argument("turns", nargs="*", default=TURNS)
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    arguments = parser.parse_args()

    model = ChatZSMerge(model=arguments.model, max_tokens=100)
    agent = create_agent(model, [get_weather, get_population, multiply], checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "ann"}}
    num_messages = 0
    for turn in arguments.turns:
        print(f"> {turn}")
        messages = agent.invoke({"messages": [("user", turn)]}, thread)["messages"]
        for message in messages[num_messages + 1 :]:
            if isinstance(message, ToolMessage):
                print(f"  {message.name}: {message.text}")
            elif isinstance(message, AIMessage):
                show(message)
        num_messages = len(messages)


def show(message: AIMessage) -> None:
    """Print the text or the calls of an answer, and its usage."""
    for call in message.tool_calls:
        print(f"  {call['name']}({', '.join(f'{name}={value!r}' for name, value in call['args'].items())})")
    if message.text:
        print(message.text)
    usage = message.usage_metadata
    new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
    print(f"  [{usage['input_tokens']} tokens, {new} of them new]")


if __name__ == "__main__":
    main()
