"""LlamaIndex: a FunctionAgent whose tools come from a server of the Model Context Protocol (MCP).

    pip install llama-index-tools-mcp
    python llamaindex_mcp_agent.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

The server is `mcp_server.py` beside this file, a process of its own. Printed: the calls, the answer, and the tokens of
each prompt with the new ones that were read.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.llms.zsmerge import ZSMergeLLM
from llama_index.tools.mcp import BasicMCPClient, McpToolSpec

SERVER = Path(__file__).parent / "mcp_server.py"


async def main() -> None:
    parser = argparse.ArgumentParser(description="An agent with the tools of an MCP server.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    llm = ZSMergeLLM(model=parser.parse_args().model, max_tokens=100)

    tools = await McpToolSpec(BasicMCPClient(sys.executable, args=[str(SERVER)])).to_tool_list_async()
    agent = FunctionAgent(tools=tools, llm=llm, initial_tool_choice=tools[0].metadata.name)
    handler = agent.run("How high is the tide in Dover at 9 o'clock?")
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"  {event.tool_name}({event.tool_kwargs}) -> {event.tool_output}")
        if isinstance(event, AgentOutput):
            usage = event.raw["usage"]
            new = usage["prompt_tokens"] - usage["cached_tokens"]
            print(f"  [{usage['prompt_tokens']} tokens, {new} of them new]")
    print(await handler)


if __name__ == "__main__":
    asyncio.run(main())
