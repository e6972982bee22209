"""Settings of tiny configurations that the general rules do not find."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
"""By family, for its outermost configuration."""

TEXT_OVERRIDES: dict[str, dict[str, Any]] = {}
"""By model type, for a configuration wherever it is nested."""
