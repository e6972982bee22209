"""After a restart: loading a saved conversation beside prefill of its tokens.

    python benchmarks/sessions/restart.py [--model smollm2] [--tokens 8000] [--text FILE]

Reads a document of that many tokens into a session, saves it, loads it in a new process and compares the logits of the
next token bit for bit. Writes results/restart-MODEL.json. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import long_text, median_seconds, repeat_to, write
from zsmerge_llm import LLM

NAME = "document"


def read_and_save(model: str, text: str, tokens: int, path: Path) -> dict[str, Any]:
    """Read and save a document, and time prefill of the same tokens."""
    llm = LLM(model)
    ids = repeat_to(llm.tokenizer(text).input_ids, tokens)
    session = llm.read_document(llm.tokenizer.decode(ids), name=NAME)
    session.save(path)
    torch.save(session.cache.logits, path.with_suffix(".logits"))
    seconds = median_seconds(lambda: llm.engine.read(llm.engine.new_cache(), session.tokens), repeats=1, warmup=0)
    return {
        "tokens": len(session.tokens),
        "reading_seconds": seconds,
        "cache_bytes": session.cache.nbytes,
        "file_bytes": path.stat().st_size,
    }


def load_saved(model: str, path: Path) -> dict[str, Any]:
    """Load the session a few times, in a process of its own."""
    llm = LLM(model)
    llm.chat("Hello.")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        session = llm.load_session(path)
        cache = session.cache
        times.append(time.perf_counter() - started)
        llm.store.remove(NAME)
    equal = torch.equal(cache.logits, torch.load(path.with_suffix(".logits")))
    return {"first_load_seconds": times[0], "loading_seconds": sorted(times)[2], "logits_bit_equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--text", help="a text file to read; repeated where it is too short")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_saved(arguments.model, arguments.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.zsmerge"
        result = read_and_save(arguments.model, long_text(arguments.text), arguments.tokens, path)
        command = [sys.executable, __file__, "--model", arguments.model, "--load", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result |= json.loads(done.stdout.splitlines()[-1])
    result["reading_over_loading"] = result["reading_seconds"] / result["loading_seconds"]
    result["file_over_cache"] = result["file_bytes"] / result["cache_bytes"]
    print(json.dumps(result, indent=1))
    write(f"restart-{Path(arguments.model).stem}", {"model": Path(arguments.model).stem, **result})


if __name__ == "__main__":
    main()
