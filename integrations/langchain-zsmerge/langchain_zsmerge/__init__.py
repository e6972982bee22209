"""LangChain on zsmerge-llm: `ChatZSMerge` (chat model), `ZSMergeLLM` (plain completion), `ZSMergeDocuments`."""

from langchain_zsmerge.chat_models import ChatZSMerge
from langchain_zsmerge.documents import ZSMergeDocuments
from langchain_zsmerge.llms import ZSMergeLLM

__all__ = ["ChatZSMerge", "ZSMergeDocuments", "ZSMergeLLM"]
