"""LangGraph: an agent on a SQLite checkpointer that waits for approval, and goes back to an earlier turn.

    pip install langchain langgraph-checkpoint-sqlite
    python langgraph_time_travel.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

Printed: the agent's messages, and after each answer the tokens of the conversation and the new ones that were read.
A user's message is answered by a call of the tool, which runs once a person has approved it. The last turn forks the
conversation after its first turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_zsmerge import ChatZSMerge
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command


def send_mail(to: str, text: str) -> str:
    """Send a mail to somebody."""
    return f"Sent to {to}."


@wrap_model_call
def call_a_tool_first(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """Let a user's message be answered by a call: a small model may claim to have sent a mail that it has not."""
    asked = isinstance(request.messages[-1], HumanMessage)
    return handler(request.override(tool_choice="any") if asked else request)


def decide(agent: Any, thread: Any, decision: dict[str, str]) -> list[BaseMessage]:
    """Answer the agent's question about its call, and return all messages."""
    (interrupt,) = agent.get_state(thread).interrupts
    print(f"waits for approval: {interrupt.value['action_requests'][0]['args']}: {decision['type']}")
    return agent.invoke(Command(resume={"decisions": [decision]}), thread)["messages"]


def show(messages: list[BaseMessage]) -> None:
    """Print a conversation, with the usage of each answer."""
    for message in messages:
        print(f"{message.type}: {message.text or [call['args'] for call in message.tool_calls]}")
        if isinstance(message, AIMessage):
            usage = message.usage_metadata
            new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
            print(f"  [{usage['input_tokens']} tokens, {new} of them new]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Approve a call, and go back in time.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    model = ChatZSMerge(model=parser.parse_args().model, max_tokens=60)
    approval = HumanInTheLoopMiddleware(interrupt_on={"send_mail": True})
    path = Path(tempfile.mkdtemp()) / "checkpoints.sqlite"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        agent = create_agent(model, [send_mail], middleware=[approval, call_a_tool_first], checkpointer=saver)
        thread = {"configurable": {"thread_id": "ann"}}
        agent.invoke({"messages": [("user", "Send a mail to Bob. The text is: Lunch at noon.")]}, thread)
        show(decide(agent, thread, {"type": "approve"}))
        earlier = agent.get_state(thread).config

        agent.invoke({"messages": [("user", "Send a mail to Eve. The text is: See you at six.")]}, thread)
        show(decide(agent, thread, {"type": "reject", "message": "No mail to Eve today."}))

        print("-- back to the first turn")
        agent.invoke({"messages": [("user", "Send a mail to Tom. The text is: Dinner at eight.")]}, earlier)
        show(decide(agent, thread, {"type": "approve"}))


if __name__ == "__main__":
    main()
