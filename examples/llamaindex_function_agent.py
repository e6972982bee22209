"""LlamaIndex: a FunctionAgent with three tools on a model of half a billion parameters.

    python llamaindex_function_agent.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct
    python llamaindex_function_agent.py --model qwen2.5-coder-0.5b-instruct.gguf "How many people live in Rome?"

Any chat model can call tools: a grammar makes every call fit the tool's schema. The questions are one conversation, and
the figures show that no token is read twice.
"""

from __future__ import annotations

import argparse
import asyncio

from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.llms.zsmerge import ZSMergeLLM

QUESTIONS = ["What is the weather in Paris?", "How many people live in Rome?", "What is 17 plus 25?"]


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


def population(city: str) -> str:
    """The number of people who live in a city."""
    return f"{city} has 2,800,000 inhabitants."


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def ask(agent: FunctionAgent, question: str, memory: ChatMemoryBuffer) -> None:
    """Ask one question, and print the agent's calls, its answer and their usage."""
    print(f"> {question}")
    handler = agent.run(question, memory=memory)
    async for event in handler.stream_events():
        if isinstance(event, AgentOutput):
            usage = event.raw["usage"]
            new = usage["prompt_tokens"] - usage["cached_tokens"]
            print(f"  [{usage['prompt_tokens']} tokens, {new} of them new]")
        if isinstance(event, ToolCallResult):
            print(f"  {event.tool_name}({event.tool_kwargs}) -> {event.tool_output}")
    print(f"{await handler}\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description="Ask an agent with tools.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    arguments = parser.parse_args()

    llm = ZSMergeLLM(model=arguments.model, max_tokens=128)
    agent = FunctionAgent(tools=[weather, population, add], llm=llm, system_prompt="You are a helpful assistant.")
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    for question in arguments.questions:
        await ask(agent, question, memory)


if __name__ == "__main__":
    asyncio.run(main())
