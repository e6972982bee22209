"""LlamaIndex's OpenAILike on a server: an agent with a tool, and a memory that no message leaves.

    zsmerge-llm serve --model smollm2
    pip install llama-index-llms-openai-like
    python server_llamaindex.py

Each answer is followed by its usage: the tokens of the conversation, and the new ones that were read.
"""

from __future__ import annotations

import argparse
import asyncio

from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.llms.openai_like import OpenAILike
from llama_index.llms.zsmerge import WholeHistoryMemory


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


async def main() -> None:
    parser = argparse.ArgumentParser(description="A LlamaIndex agent on a server.")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()

    llm = OpenAILike(
        model=arguments.model,
        api_base=arguments.url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=1_000_000,
        max_tokens=64,
    )
    # streaming=False: OpenAILike asks for no usage in a stream
    agent = FunctionAgent(tools=[weather], llm=llm, initial_tool_choice="weather", streaming=False)
    memory = WholeHistoryMemory.from_defaults()
    for text in ("What is the weather in Paris?", "And in Oslo?"):
        handler = agent.run(text, memory=memory)
        async for event in handler.stream_events():
            if isinstance(event, ToolCallResult):
                print(f"  {event.tool_name}({event.tool_kwargs}) -> {event.tool_output}")
            if isinstance(event, AgentOutput):
                usage = event.raw["usage"]
                new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
                print(f"  [{usage['prompt_tokens']} tokens, {new} of them new]")
        print(await handler)


if __name__ == "__main__":
    asyncio.run(main())
