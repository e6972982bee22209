"""LlamaIndex: an AgentWorkflow of two agents, the first of which hands the question to the second.

    python llamaindex_handoff.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

Printed: each agent's calls and answer, with the tokens of its prompt and the new ones that were read.
"""

from __future__ import annotations

import argparse
import asyncio

from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, FunctionAgent, ToolCallResult
from llama_index.llms.zsmerge import ZSMergeLLM


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


async def main() -> None:
    parser = argparse.ArgumentParser(description="Two agents and a handoff.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    llm = ZSMergeLLM(model=parser.parse_args().model, max_tokens=100)

    reception = FunctionAgent(
        name="reception",
        description="Receives every question.",
        system_prompt="You hand every question to the agent that can answer it.",
        llm=llm,
        can_handoff_to=["meteorologist"],
        initial_tool_choice="handoff",  # a small model needs the help
    )
    meteorologist = FunctionAgent(
        name="meteorologist", description="Knows the weather.", llm=llm, tools=[weather], initial_tool_choice="weather"
    )
    workflow = AgentWorkflow(agents=[reception, meteorologist], root_agent="reception")
    handler = workflow.run(user_msg="What is the weather in Paris?")
    async for event in handler.stream_events():
        if isinstance(event, AgentOutput):
            usage = event.raw["usage"]
            new = usage["prompt_tokens"] - usage["cached_tokens"]
            print(f"{event.current_agent_name}: {event.response.content or ''}")
            print(f"  [{usage['prompt_tokens']} tokens, {new} of them new]")
        if isinstance(event, ToolCallResult):
            print(f"  {event.tool_name}({event.tool_kwargs}) -> {event.tool_output}")
    print(await handler)


if __name__ == "__main__":
    asyncio.run(main())
