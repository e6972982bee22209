"""The index of a conversation's passages as tensors of its saved session: after loading, only new text is indexed.

An index has no text but dates and headings, so it is of use only beside the messages that it was made of. It has their
digest. Beside other messages, or where a version with other rules has made it (`RULES`), a new one is made.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsmerge_llm.retrieval.passage_index import MAX_FREQUENCY, IndexState, PassageIndex, Passages
from zsmerge_llm.retrieval.similarity_index import SimilarityIndex
from zsmerge_llm.retrieval.token_vectors import TokenVectors
from zsmerge_llm.types import Message

RULES = 3
"""Number of the rules by which texts become passages, terms and tokens: whoever changes one raises it."""
PREFIX = "index."
ABOUT = f"{PREFIX}about"
"""Name of the tensor with an index's rules, words of a passage, digest of the messages, and lines above passages."""
ARRAYS = ("added", "places", "contexts", "lengths", "starts", "terms", "frequencies")
"""Arrays of int32: three numbers for each message, four for each passage, the others as in `IndexState`. Dates and
contexts are places in the lines."""
SIMILAR = ("similar_starts", "similar_tokens")
"""Those of an index by meaning."""
FACTS = {"rules": int, "size": int, "digest": str, "lines": list}
"""What `ABOUT` says, and its types."""


def index_tensors(index: PassageIndex) -> dict[str, Tensor]:
    """Return an index as tensors of a session's file; {} where it holds nothing."""
    state = index.state()
    dates = [date for _, _, date in state.added]
    lines = list(dict.fromkeys([*state.passages.contexts, *dates]))
    at = {line: number for number, line in enumerate(lines)}
    digest = _digest(state.passages.messages[: len(state.added)])
    about = json.dumps({"rules": RULES, "size": index.size, "digest": digest, "lines": lines}).encode()
    added = [number for joined, count, date in state.added for number in (joined, count, at[date])]
    contexts = [at[context] for context in state.passages.contexts]
    arrays = (added, state.passages.places, contexts, state.lengths, state.starts, state.terms, state.frequencies)
    found = {_name(name): _tensor(each) for name, each in zip(ARRAYS, arrays, strict=True)}
    if state.similar is not None:
        found |= {_name(name): _tensor(each) for name, each in zip(SIMILAR, state.similar.arrays(), strict=True)}
    if not all(each.numel() for each in found.values()):
        return {}  # a file has no empty tensors
    return {ABOUT: torch.frombuffer(bytearray(about), dtype=torch.uint8), **found}


def restored_index(
    tensors: Mapping[str, Tensor], messages: Sequence[Message], size: int, vectors: TokenVectors | None
) -> PassageIndex | None:
    """Return the index of `index_tensors`, which `check_index` has checked; None where it is of no use.

    messages: what is to be searched. It begins with what was indexed. size, vectors: as for `PassageIndex`.
    """
    about = json.loads(tensors[ABOUT].numpy().tobytes())
    added, places, contexts, lengths, starts, terms, frequencies = (_numbers(tensors, name) for name in ARRAYS)
    known, lines = list(messages[: len(added) // 3]), about["lines"]
    by_meaning = _name(SIMILAR[0]) in tensors
    if (about["rules"], about["size"], by_meaning) != (RULES, size, vectors is not None):
        return None
    if 3 * len(known) < len(added) or about["digest"] != _digest(known):
        return None
    similar = (
        None if vectors is None else SimilarityIndex(vectors, *(_numbers(tensors, name).tolist() for name in SIMILAR))
    )
    state = IndexState(
        Passages(known, array("i", places.tobytes()), [lines[at] for at in contexts.tolist()]),
        [(bool(joined), count, lines[date]) for joined, count, date in added.reshape(-1, 3).tolist()],
        array("i", lengths.tobytes()),
        array("i", starts.tobytes()),
        array("I", terms.tobytes()),
        array("H", frequencies.astype(np.uint16).tobytes()),
        similar,
    )
    return PassageIndex.of_state(size, state)


def is_index(name: str) -> bool:
    """Return whether a tensor of a session's file is of its index."""
    return name.startswith(PREFIX)


def check_index(tensors: Mapping[str, Tensor], vocab_size: int) -> None:
    """Check an index that was saved: it agrees with itself. Other tensors are not looked at.

    Raises:
        ValueError: it does not.
    """
    own = {name: tensor for name, tensor in tensors.items() if is_index(name)}
    if not own:
        return
    plain = {ABOUT, *map(_name, ARRAYS)}
    if set(own) not in (plain, plain | {*map(_name, SIMILAR)}):
        raise ValueError("has an index of other parts")
    for name, each in own.items():
        if each.dim() != 1 or not each.numel() or each.dtype != (torch.uint8 if name == ABOUT else torch.int32):
            raise ValueError("has an index of other parts")
    lines = _check_about(own[ABOUT])
    numbers = {name: _numbers(own, name) for name in (*ARRAYS, *SIMILAR) if _name(name) in own}
    count, terms = len(numbers["lengths"]), len(numbers["terms"])
    sizes = (len(numbers["added"]) % 3, len(numbers["places"]), len(numbers["contexts"]), len(numbers["starts"]))
    if sizes != (0, 4 * count, count, count) or len(numbers["frequencies"]) != terms:
        raise ValueError("has an index whose parts do not fit together")
    added, places = numbers["added"].reshape(-1, 3), numbers["places"].reshape(-1, 4)
    (joined, new, dates), (first, start, end, last) = added.T, places.T
    is_sound = (
        _within(joined, 0, 2)
        and _within(dates, 0, lines)
        and _within(numbers["contexts"], 0, lines)
        and _within(first, 0, len(added))
        and (np.bincount(first, minlength=len(added)) == new).all()
        and (np.cumsum(new) - new > 0)[joined == 1].all()
        and _within(last, 0, len(added))
        and _ascend(first)
        and (first <= last).all()
        and _within(start, 0, None)
        and (start <= end).all()
        and _within(numbers["lengths"], 0, None)
        and _within(numbers["frequencies"], 1, MAX_FREQUENCY + 1)
        and _are_starts(numbers["starts"], terms)
    )
    if SIMILAR[0] in numbers:
        starts, tokens = (numbers[name] for name in SIMILAR)
        is_sound = is_sound and len(starts) == count and _are_starts(starts, len(tokens))
        is_sound = is_sound and _within(tokens, 0, vocab_size)
    if not is_sound:
        raise ValueError("has an index whose numbers contradict each other")


def _check_about(about: Tensor) -> int:
    """Check what an index says of itself; return the number of its lines."""
    facts = json.loads(about.numpy().tobytes())
    if type(facts) is not dict or {name: type(each) for name, each in facts.items()} != FACTS:
        raise ValueError("describes its index in other words")
    if not all(type(line) is str for line in facts["lines"]):
        raise ValueError("describes its index in other words")
    return len(facts["lines"])


def _are_starts(starts: NDArray[np.int32], size: int) -> bool:
    """Return whether numbers are where parts of an array of `size` begin."""
    return bool(starts[0] == 0 and _ascend(starts) and starts[-1] <= size)


def _ascend(numbers: NDArray[np.int32]) -> bool:
    """Return whether no number is less than the one before. Compared, for a difference of int32 may overflow."""
    return bool((numbers[1:] >= numbers[:-1]).all())


def _within(numbers: NDArray[np.int32], least: int, end: int | None) -> bool:
    """Return whether all numbers are at least `least` and below `end`, if there is one."""
    return bool(numbers.min() >= least and (end is None or numbers.max() < end))


def _digest(messages: Sequence[Message]) -> str:
    """Return a digest of what is indexed of messages."""
    shown = [[each["role"], each["content"]] for each in messages]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _name(array_name: str) -> str:
    return PREFIX + array_name


def _tensor(numbers: Sequence[int]) -> Tensor:
    """Return numbers of 32 bits as int32."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64).astype(np.int32))


def _numbers(tensors: Mapping[str, Tensor], name: str) -> NDArray[np.int32]:
    found: NDArray[np.int32] = tensors[_name(name)].numpy()
    return found
