"""LangChain's ChatOpenAI and `init_chat_model` on a server: an agent whose history costs nothing.

    zsmerge-llm serve --model smollm2
    pip install langchain langchain-openai
    python server_langchain.py

Each answer is followed by its usage: the tokens of the conversation, and the new ones that were read.
"""

from __future__ import annotations

import argparse

from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage
from langchain_zsmerge.middleware import KeepWholeHistory
from langgraph.checkpoint.memory import InMemorySaver


def main() -> None:
    parser = argparse.ArgumentParser(description="A LangChain agent on a server.")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()

    chat = init_chat_model(
        arguments.model, model_provider="openai", base_url=arguments.url, api_key="none", max_tokens=64
    )
    agent = create_agent(chat, middleware=[KeepWholeHistory()], checkpointer=InMemorySaver())
    for text in ("What is the capital of France?", "And of Germany?"):
        messages = agent.invoke({"messages": [("user", text)]}, {"configurable": {"thread_id": "ann"}})["messages"]
        answer = messages[-1]
        assert isinstance(answer, AIMessage)
        usage = answer.usage_metadata
        new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
        print(f"{answer.text}\n  [{usage['input_tokens']} tokens, {new} of them new]")


if __name__ == "__main__":
    main()
