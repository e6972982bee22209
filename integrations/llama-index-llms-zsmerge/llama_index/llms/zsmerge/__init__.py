"""LlamaIndex on zsmerge-llm: a local model that reads any length in fixed memory."""

from llama_index.llms.zsmerge.base import ZSMergeLLM

__all__ = ["ZSMergeLLM"]
