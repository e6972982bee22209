"""Token ids of a conversation, shared by all its snapshots: a turn stores its new ids only."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import overload


class TokenIds(Sequence[int]):
    """An immutable sequence of ids, as 32-bit integers. A slice of it is an array.

    Sequences that extend one another share one buffer, as long as each extends the newest; a branch gets a copy.
    """

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._buffer, self._lock = array("i", ids), Lock()
        self._length = len(self._buffer)

    @classmethod
    def of(cls, ids: Sequence[int]) -> TokenIds:
        """Return `ids`, as they are if they are of this type."""
        return ids if isinstance(ids, TokenIds) else cls(ids)

    def __add__(self, ids: Sequence[int]) -> TokenIds:
        new = array("i", ids)
        with self._lock:
            if len(self._buffer) == self._length:
                self._buffer.extend(new)
                extended = TokenIds()
                extended._buffer, extended._lock = self._buffer, self._lock
                extended._length = self._length + len(new)
                return extended
        return TokenIds(self._buffer[: self._length] + new)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> array[int]: ...
    def __getitem__(self, index: int | slice) -> int | array[int]:
        if isinstance(index, slice):
            return self._buffer[slice(*index.indices(self._length))]
        return self._buffer[range(self._length)[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])
