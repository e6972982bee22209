"""Anthropic's client: a conversation, streamed.

    zsmerge-llm serve --model smollm2
    pip install anthropic
    python server_anthropic.py

Each answer is followed by its usage: the tokens of the conversation, and the new ones that were read.
"""

from __future__ import annotations

import argparse
from typing import Any

from anthropic import Anthropic


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to a server with Anthropic's client.")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    client = Anthropic(base_url=arguments.url, api_key="none")

    messages: list[Any] = []
    for text in ("What is the capital of France?", "And of Germany?"):
        messages.append({"role": "user", "content": text})
        with client.messages.stream(model=arguments.model, messages=messages, max_tokens=64) as stream:
            for piece in stream.text_stream:
                print(piece, end="", flush=True)
            answer = stream.get_final_message()
        messages.append({"role": "assistant", "content": answer.content})
        new, cached = answer.usage.input_tokens, answer.usage.cache_read_input_tokens or 0
        print(f"\n  [{new + cached} tokens, {new} of them new]")


if __name__ == "__main__":
    main()
