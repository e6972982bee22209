"""LlamaIndex: router, sub-question and citation query engines, without embeddings.

    python llamaindex_query_engines.py --model path/to/qwen2.5-coder-0.5b-instruct.gguf

The router chooses one document, the sub-question engine asks both and joins the answers, the citation engine numbers
its sources. A grammar makes every choice and every sub-question valid.
"""

from __future__ import annotations

import argparse
from typing import Literal

from llama_index.core import Document, SummaryIndex
from llama_index.core.query_engine import CitationQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.tools import QueryEngineTool
from llama_index.llms.zsmerge import ZSMergeDocumentQueryEngine, ZSMergeLLM
from pydantic import BaseModel, Field

TEXTS = {
    "ships": "The schooner Marigold was built in 1888. Her captain is Anna Stone. Her harbour is Whitby.",
    "lighthouses": "The lighthouse of Whitby was built in 1858. Its keeper is Agnes Hill. It is 13 metres high.",
}


class SubQuestion(BaseModel):
    sub_question: str = Field(max_length=60)
    tool_name: Literal["ships", "lighthouses"]


class SubQuestions(BaseModel):
    items: list[SubQuestion] = Field(min_length=2, max_length=2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Query engines of three kinds.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id, folder or .gguf file")
    llm = ZSMergeLLM(model=parser.parse_args().model, max_tokens=120)
    tools = [
        QueryEngineTool.from_defaults(
            ZSMergeDocumentQueryEngine([text], llm), name=name, description=f"A document about {name}."
        )
        for name, text in TEXTS.items()
    ]

    router = RouterQueryEngine.from_defaults(tools, llm=llm)
    answer = router.query("Who is the keeper of the lighthouse?")
    print(f"router: {tools[answer.metadata['selector_result'].ind].metadata.name}: {answer}")

    generator = LLMQuestionGenerator.from_defaults(llm=llm.as_structured_llm(SubQuestions))
    engine = SubQuestionQueryEngine.from_defaults(
        tools, llm=llm, question_gen=generator, use_async=False, verbose=False
    )
    answer = engine.query("Who is the captain of the Marigold, and who is the keeper of the lighthouse?")
    print(f"sub-questions: {answer}")
    print(*(f"  {' '.join(node.node.get_content().split())}" for node in answer.source_nodes), sep="\n")

    index = SummaryIndex.from_documents([Document(text=text) for text in TEXTS.values()])
    answer = CitationQueryEngine.from_args(index, llm=llm).query("Who is the captain of the Marigold?")
    print(f"citation: {answer}")
    print(*(f"  {' '.join(node.node.get_content().split())}" for node in answer.source_nodes), sep="\n")


if __name__ == "__main__":
    main()
