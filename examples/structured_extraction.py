"""LlamaIndex: facts of a long document as checked objects.

    python structured_extraction.py
    python structured_extraction.py --model Qwen/Qwen2.5-0.5B-Instruct

The document is several times as long as the cache. For each object it is read with that question in mind, and the
answer is bound to the schema of a pydantic class: what comes back is valid, whatever the model.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from llama_index.core.prompts import PromptTemplate
from llama_index.llms.zsmerge import ZSMergeLLM
from pydantic import BaseModel

PROMPT = PromptTemplate("{document}\n\n{question}")


class Captain(BaseModel):
    ship_name: str
    captain_name: str


class Keeper(BaseModel):
    keeper_name: str


QUESTIONS: dict[type[BaseModel], str] = {
    Captain: "Who is the captain of the Marigold?",
    Keeper: "Who is the keeper of the lighthouse?",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Read objects out of a document.")
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    arguments = parser.parse_args()

    llm = ZSMergeLLM(model=arguments.model, max_tokens=100)
    document = (files("zsmerge_llm") / "data" / "marigold.txt").read_text(encoding="utf-8").strip()
    for kind, question in QUESTIONS.items():
        print(f"> {question}")
        print(llm.structured_predict(kind, PROMPT, document=document, question=question).model_dump_json(), "\n")


if __name__ == "__main__":
    main()
