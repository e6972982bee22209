"""LlamaIndex's tools and choices in the OpenAI format, and the calls that come back as its `ToolSelection`s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.llms.llm import ToolSelection
from llama_index.llms.zsmerge._messages import arguments, tool_calls, with_id

from zsmerge_llm.errors import InputError
from zsmerge_llm.types import ToolChoice

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool


def to_tool(tool: BaseTool) -> dict[str, Any]:
    """A tool's definition under its own name: LlamaIndex's `to_openai_tool` alters names, and then finds no tool."""
    metadata = tool.metadata
    function = {
        "name": metadata.get_name(),
        "description": metadata.description or "",
        "parameters": metadata.get_parameters_dict(),
    }
    return {"type": "function", "function": function}


def to_choice(choice: str | Mapping[str, Any] | None) -> ToolChoice | None:
    """None, "auto", "none", "required" (or "any"), or one tool: its name, or a dictionary that holds it.

    Raises:
        InputError: a dictionary without a name.
    """
    if choice is None or choice == "auto" or choice == "none" or choice == "required":
        return choice
    if choice == "any":
        return "required"
    name = choice if isinstance(choice, str) else (choice.get("function") or choice).get("name")
    if not name:
        form = "{'type': 'function', 'function': {'name': ...}}"
        raise InputError(f"tool_choice must be 'auto', 'required', 'none', a tool's name or {form}, not {choice!r}.")
    return {"type": "function", "function": {"name": name}}


def selections(response: ChatResponse, error_on_no_tool_call: bool = True) -> list[ToolSelection]:
    """The tools the model chose. Raises ValueError if there is none and `error_on_no_tool_call`."""
    calls = [with_id(call) for call in tool_calls(response.message)]
    if not calls and error_on_no_tool_call:
        broken = response.raw.get("invalid_tool_calls") if isinstance(response.raw, dict) else None
        said = f"began a call that cannot be read: {broken!r}" if broken else f"answered {response.message.content!r}"
        raise ValueError(
            f"The model called no tool; it {said}. Pass tool_required=True to have one called, "
            "and more max_tokens if the answer was cut."
        )
    return [
        ToolSelection(tool_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=arguments(call))
        for call in calls
    ]
