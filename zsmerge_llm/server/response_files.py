"""The newest answers to `/v1/responses` as files, so that every replica, and a later process, can go on from them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.server.errors import RequestError
from zsmerge_llm.server.openai_responses import StoredResponse, StoredResponses

NAME = re.compile(r"resp_[0-9a-f]{32}")
FOLDER = "responses"
CLEAN_EVERY = 100
"""Answers between two looks whether there are too many files."""


class ResponseFiles(StoredResponses):
    """The newest answers by their ids, each in a file too.

    Args:
        most: how many are kept.
        folder: of the sessions: a path, or a URL that fsspec knows. The files are in a folder within it.
    """

    def __init__(self, most: int, folder: str) -> None:
        super().__init__(most)
        self._fs: AbstractFileSystem
        self._fs, root = url_to_fs(folder, use_listings_cache=False)
        self._root = f"{root.rstrip('/')}/{FOLDER}"
        self._fs.makedirs(self._root, exist_ok=True)
        self._until_cleaning = 0

    def put(self, name: str, response: StoredResponse) -> None:
        """Keep an answer. Raises OSError: it cannot be written."""
        super().put(name, response)
        content = json.dumps({"owner": response.owner, "messages": response.messages}).encode()
        if isinstance(self._fs, LocalFileSystem):
            write_atomically(Path(self._root, name), content)  # only the owner may read it
        else:
            self._fs.pipe_file(f"{self._root}/{name}", content)
        self._until_cleaning -= 1
        if self._until_cleaning < 0:
            self._until_cleaning = CLEAN_EVERY
            self._delete_oldest()

    def get(self, name: str, owner: str | None) -> StoredResponse:
        """Return an answer. Raises RequestError: it is not there, or somebody else's."""
        try:
            return super().get(name, owner)
        except RequestError:
            if not NAME.fullmatch(name):
                raise
            with suppress(OSError, ValueError, KeyError):
                found = StoredResponse(**json.loads(self._fs.cat_file(f"{self._root}/{name}")))
                if found.owner == owner:
                    return found
            raise

    def _delete_oldest(self) -> None:
        with suppress(OSError):
            names = self._fs.ls(self._root, detail=False)
            for name in sorted(names, key=self._fs.modified)[: -self._most]:
                self._fs.rm_file(name)


def stored_responses(most: int, folder: str | None) -> StoredResponses:
    """Return where answers are kept: in memory alone where no folder is given."""
    return StoredResponses(most) if folder is None else ResponseFiles(most, folder)
