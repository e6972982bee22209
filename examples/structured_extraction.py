"""LlamaIndex: facts of a long document as validated objects.

    python structured_extraction.py
    python structured_extraction.py --model Qwen/Qwen2.5-0.5B-Instruct

The document is several times as long as the cache. It is read once per object, together with the question. A grammar
enforces the schema of the pydantic class, so the answer is valid with any model.
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
    Captain: "What are the names of the ship and of her captain?",
    Keeper: "Who is the keeper of the lighthouse?",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Extract objects from a document.")
    parser.add_argument("--model", default="smollm2", help="built-in name, Hub id, model folder or .gguf file")
    arguments = parser.parse_args()

    llm = ZSMergeLLM(model=arguments.model, max_tokens=100)
    document = (files("zsmerge_llm") / "data" / "marigold.txt").read_text(encoding="utf-8").strip()
    for output_cls, question in QUESTIONS.items():
        print(f"> {question}")
        print(llm.structured_predict(output_cls, PROMPT, document=document, question=question).model_dump_json(), "\n")


if __name__ == "__main__":
    main()
