"""LangChain: a chain that puts a whole document into the prompt.

    python langchain_document_chain.py
    python langchain_document_chain.py --model Qwen/Qwen2.5-0.5B-Instruct --file report.txt "What was decided?"

The document is longer than the cache. The prompt ends with the question: while the document is read, the cache keeps
the tokens that the question attends to.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_zsmerge import ChatZSMerge

QUESTIONS = ["Who is the captain of the Marigold?", "Who is the keeper of the lighthouse?"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about a document with LangChain.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    parser.add_argument("--file", type=Path, default=files("zsmerge_llm") / "data" / "marigold.txt", help="a text file")
    arguments = parser.parse_args()

    prompt = ChatPromptTemplate.from_messages([("human", "{document}\n\n{question}")])
    chain = prompt | ChatZSMerge(model=arguments.model, max_tokens=100) | StrOutputParser()

    document = arguments.file.read_text(encoding="utf-8").strip()
    for question in arguments.questions:
        print(f"> {question}")
        for piece in chain.stream({"document": document, "question": question}):
            print(piece, end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
