"""LangChain: a chatbot whose conversation survives a restart, on a KV cache of constant size.

    python langchain_long_memory_chatbot.py --folder chats --name ann
    python langchain_long_memory_chatbot.py --folder chats --name ann     # continues

The messages are stored in a JSON file, and the model's session beside it (`sessions_dir`), so a conversation of any
length continues without reading it again. Without a terminal a script runs: two parts of a conversation, each with a
new model.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from langchain_core.messages import (
    AIMessageChunk,
    HumanMessage,
    message_chunk_to_message,
    messages_from_dict,
    messages_to_dict,
)
from langchain_zsmerge import ChatZSMerge

PARTS = [
    ["I have a dog. His name is Rex.", "Tell me one thing that dogs like."],
    ["What is the name of my dog?"],
]


def typed() -> Iterable[str]:
    """Yield what the user types."""
    print("An empty line ends the conversation.")
    while line := input("> ").strip():
        yield line


def talk(model: str, folder: Path, name: str, lines: Iterable[str]) -> None:
    """Run one part of a conversation with a new model."""
    chat = ChatZSMerge(model=model, max_tokens=100, sessions_dir=str(folder))
    path = folder / f"{name}.json"
    messages = messages_from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    for line in lines:
        messages.append(HumanMessage(line))
        whole: AIMessageChunk | None = None
        for chunk in chat.stream(messages, session_id=name):
            print(chunk.text, end="", flush=True)
            whole = chunk if whole is None else whole + chunk
        messages.append(message_chunk_to_message(whole))
        path.write_text(json.dumps(messages_to_dict(messages), ensure_ascii=False), encoding="utf-8")
        usage = whole.usage_metadata
        new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
        print(f"\n[{usage['input_tokens']} tokens, {new} of them new]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="A chatbot with a long memory.")
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "zsmerge-chats")
    parser.add_argument("--name", default="ann", help="name of the conversation")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    if sys.stdin.isatty():
        talk(arguments.model, arguments.folder, arguments.name, typed())
        return
    for part in PARTS:
        print("-- the model starts" + (" again" if part is not PARTS[0] else ""))
        talk(arguments.model, arguments.folder, arguments.name, played(part))
        gc.collect()  # frees the first model


def played(lines: list[str]) -> Iterable[str]:
    """Yield the lines of a script."""
    for line in lines:
        print(f"> {line}")
        yield line


if __name__ == "__main__":
    main()
