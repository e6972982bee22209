"""Where this package keeps what it makes on a machine: models, kernels, layer budgets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Return `cache_dir`, else the variable ZSMERGE_CACHE_DIR, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(cache_dir or os.environ.get("ZSMERGE_CACHE_DIR") or user_cache_dir("zsmerge-llm")).expanduser()
