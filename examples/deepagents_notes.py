"""Deep Agents: an agent with the default middleware (files, subagents, summaries) writes a file and reads it.

    pip install deepagents
    python deepagents_notes.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

The instructions and tools of the middleware make a prompt of several thousand tokens. It is read once; each step
after that reads only what is new. A middleware chooses the tool of each step, since the model is a small one.
Printed: the calls, their results and the answer, with the tokens of each prompt and the new ones that were read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from deepagents import create_deep_agent
from langchain.agents.middleware import ModelRequest, wrap_model_call
from langchain_core.messages import AIMessage
from langchain_zsmerge import ChatZSMerge

INSTRUCTION = "You answer every question in one sentence, from what the tools return."
TASK = (
    "Write the sentence 'The keeper is Agnes Hill.' into the file /keeper.txt. Then read the file. Who is the keeper?"
)
STEPS = ["write_file", "read_file", "none"]


@wrap_model_call
def step_by_step(request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
    """Let the model call the tools of `STEPS`, one after the other, and then answer."""
    num_results = sum(message.type == "tool" for message in request.messages)
    return handler(request.override(tool_choice=STEPS[num_results]))


def main() -> None:
    parser = argparse.ArgumentParser(description="An agent that writes a file.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    model = ChatZSMerge(model=parser.parse_args().model, max_tokens=100)

    agent = create_deep_agent(model, system_prompt=INSTRUCTION, middleware=[step_by_step])
    state = agent.invoke({"messages": [("user", TASK)]}, {"configurable": {"thread_id": "ann"}})
    for message in state["messages"]:
        calls = [f"{call['name']}({call['args']})" for call in getattr(message, "tool_calls", [])]
        print(f"{message.type}: {message.text or calls}")
        if isinstance(message, AIMessage):
            usage = message.usage_metadata
            new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
            print(f"  [{usage['input_tokens']} tokens, {new} of them new]")
    print("files:", state["files"])


if __name__ == "__main__":
    main()
