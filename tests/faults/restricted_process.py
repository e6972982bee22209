"""A program that uses the library where it may write nowhere, and says what came of each use.

Usage: python -m tests.faults.restricted_process FOLDER. There are `kept`, with the session "it", `closed`, `model.gguf`
and `messages`, what was said in "it". Writes one JSON object: by use, "done", what was returned, or the error's types.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.chat import SNAPSHOT_NBYTES, Chat, make_llm
from zsmerge_llm import LLM, SamplingParams, memory_map, write_html


def outcome(use: Callable[[], Any]) -> Any:
    try:
        found = use()
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__]
    return found if isinstance(found, (bool, list, str)) else "done"


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    messages = json.loads((folder / "messages").read_text())
    llm = make_llm(sessions_dir=folder / "kept", retrieval_tokens=0, compile=False, session_memory=3 * SNAPSHOT_NBYTES)
    chat, others = Chat(llm, "it", messages), [Chat(llm, f"other {number}") for number in range(4)]
    target = folder / "kept" / "copy"
    one = SamplingParams(max_tokens=1)
    uses: dict[str, Callable[[], Any]] = {
        "go on": lambda: [chat.ask(f"Question {turn}").usage.reuse for turn in range(3)],
        "more than fits into memory": lambda: [
            each.ask(f"Question {turn}").text != "" for turn in range(2) for each in others
        ],
        "remove": lambda: llm.store.remove("it"),
        "still there": lambda: "it" in llm.store,
        "save": lambda: llm.session("it").save(target),
        "load": lambda: llm.load_session(next((folder / "kept").glob("it.*.zsmerge"))),
        "page": lambda: write_html(memory_map(llm.session("it")), llm.tokenizer, target),
        "closed folder": lambda: make_llm(sessions_dir=folder / "closed").store,
        "new folder": lambda: make_llm(sessions_dir=folder / "kept" / "new").store,
        "model to convert": lambda: LLM(folder / "model.gguf", compile=False).complete("Hello", sampling=one),
    }
    print(json.dumps({name: outcome(use) for name, use in uses.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
