"""LangChain on zsmerge-llm: `ChatZSMerge` (chat model) and `ZSMergeLLM` (plain completion)."""

from langchain_zsmerge.chat_models import ChatZSMerge
from langchain_zsmerge.llms import ZSMergeLLM

__all__ = ["ChatZSMerge", "ZSMergeLLM"]
