"""LlamaIndex on zsmerge-llm: a local model that reads any length in fixed memory."""

from llama_index.llms.zsmerge.base import ZSMergeLLM
from llama_index.llms.zsmerge.chat_engine import AppendingContextChatEngine, ZSMergeDocumentChatEngine
from llama_index.llms.zsmerge.memory import WholeHistoryMemory
from llama_index.llms.zsmerge.query_engine import ZSMergeDocumentQueryEngine

__all__ = [
    "AppendingContextChatEngine",
    "WholeHistoryMemory",
    "ZSMergeDocumentChatEngine",
    "ZSMergeDocumentQueryEngine",
    "ZSMergeLLM",
]
