"""A chat loop with `LLM`: a conversation of any length on a KV cache of constant size.

    python chat_loop.py
    python chat_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --file report.txt

With --file the conversation is about that text. Every turn passes the whole conversation; `LLM` recognises it and reads
only the new message. Without a terminal a script of a few turns runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from zsmerge_llm import LLM, SamplingParams

SCRIPT = ["I have a dog. His name is Rex.", "Tell me one thing that dogs like.", "What is the name of my dog?"]


def turns() -> Iterator[str]:
    """Yield the user's messages: typed, or from the script without a terminal."""
    if not sys.stdin.isatty():
        for line in SCRIPT:
            print(f"> {line}")
            yield line
        return
    print("An empty line ends the conversation.")
    while line := input("> ").strip():
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a local model.")
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    parser.add_argument("--file", type=Path, help="a text file to ask about")
    arguments = parser.parse_args()

    llm = LLM(arguments.model)
    messages = []
    if arguments.file:
        messages.append({"role": "system", "content": arguments.file.read_text(encoding="utf-8")})
    for line in turns():
        messages.append({"role": "user", "content": line})
        answer = ""
        for chunk in llm.stream(messages, sampling=SamplingParams(max_tokens=100)):
            answer += chunk.text
            print(chunk.text, end="", flush=True)
        messages.append({"role": "assistant", "content": answer})
        usage = chunk.usage
        new = usage.prompt_tokens - usage.cached_tokens
        print(f"\n[{usage.prompt_tokens} tokens, {new} of them new; cache {usage.cache_bytes / 1e6:.1f} MB]\n")


if __name__ == "__main__":
    main()
