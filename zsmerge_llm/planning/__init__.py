"""What a model, its conversations and a forward pass take of a device's memory, before anything is loaded."""

from __future__ import annotations

from zsmerge_llm.planning.explanation import Explanation
from zsmerge_llm.planning.planner import Plan, plan

__all__ = ["Explanation", "Plan", "plan"]
