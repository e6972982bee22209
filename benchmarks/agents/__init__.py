"""Agents of LangChain on a real model: what their tool conversations end with."""
