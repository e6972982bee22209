"""LlamaIndex: a query engine over a long document, without embeddings and without a network.

    python llamaindex_document_query.py
    python llamaindex_document_query.py --model Qwen/Qwen2.5-0.5B-Instruct --file report.txt "What was decided?"

A summary index passes the whole document. The model's `context_window` is larger than that, so `compact` makes one
prompt of it instead of a chain of refine calls.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from llama_index.core import Document, PromptTemplate, Settings, SummaryIndex
from llama_index.llms.zsmerge import ZSMergeLLM

PROMPT = PromptTemplate("{context_str}\n\n{query_str}")  # small models answer short prompts better
QUESTIONS = ["Who is the captain of the Marigold?", "Who is the keeper of the lighthouse?"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about a document with LlamaIndex.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    parser.add_argument("--file", type=Path, default=files("zsmerge_llm") / "data" / "marigold.txt", help="a text file")
    arguments = parser.parse_args()

    llm = ZSMergeLLM(model=arguments.model, max_tokens=100)
    Settings.llm = llm
    Settings.tokenizer = llm.tokenize  # counts with the model's own tokenizer

    index = SummaryIndex.from_documents([Document(text=arguments.file.read_text(encoding="utf-8"))])
    engine = index.as_query_engine(response_mode="compact", text_qa_template=PROMPT, streaming=True)
    for question in arguments.questions:
        print(f"> {question}")
        for piece in engine.query(question).response_gen:
            print(piece, end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
