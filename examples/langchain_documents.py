"""LangChain: read a document once and ask many questions about it.

    python langchain_documents.py
    python langchain_documents.py --model Qwen/Qwen2.5-0.5B-Instruct --file report.txt "Who signed it?" "When?"

Each question is answered on a copy of the document's cache, and reads only its own tokens.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from langchain_zsmerge import ChatZSMerge, ZSMergeDocuments

QUESTIONS = ["Who is the captain of the Marigold?", "Who is the keeper of the lighthouse?"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about a document that is read once.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    parser.add_argument("--file", type=Path, help="a text file")
    arguments = parser.parse_args()

    with as_file(files("zsmerge_llm") / "data" / "marigold.txt") as default:
        documents = ZSMergeDocuments(
            model=ChatZSMerge(model=arguments.model, max_tokens=100), documents=[arguments.file or default]
        )
        for question in arguments.questions:
            answer = documents.invoke(question)
            usage = answer.usage_metadata
            new = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
            print(f"> {question}\n{answer.text}\n[{usage['input_tokens']} tokens, {new} of them new]\n")


if __name__ == "__main__":
    main()
