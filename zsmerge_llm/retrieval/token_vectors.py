"""Short vectors of tokens, from the model's own input embeddings: they tell how alike in meaning two tokens are.

A model learns them together with everything else, so they exist for each of its languages, and cost no second model.
As they are, all embeddings point the same way: their mean and their few strongest directions say how frequent a token
is, and no more (arXiv 1702.01417). What is left is reduced to its principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Embed = Callable[[Sequence[int]], Tensor]
"""Token ids → the model's input embeddings, float32 [n, D] (`Engine.token_embeddings`)."""
SIZE = 128
"""Numbers of a vector: with 64 less is found, with all hardly more (docs/research/retrieval)."""
COMMON = 3
"""Strongest directions, which are left out."""
SAMPLE = 4096
"""Tokens of the vocabulary in which directions are looked for."""
MAX_LETTERS = 4096
"""Characters of a text whose tokens are looked at."""
MIN_WIDTH = 2 * SIZE
"""Narrower embeddings are not used."""
ITERATIONS = 2
"""Rounds of the subspace iteration: more change nothing that is found."""


class TokenVectors:
    """The vectors of one model's tokens, each made when it is first asked for. Safe to use from several threads.

    Args:
        encode: texts → the token ids of each.
        vocab_size: tokens that `embed` knows.
    """

    def __init__(self, embed: Embed, encode: Callable[[list[str]], list[list[int]]], vocab_size: int) -> None:
        self._embed = embed
        self._encode = encode
        self._lock = Lock()
        self._fitted: tuple[Tensor, Tensor] | None = None  # the mean float32 [D], directions float32 [D, SIZE]
        self._places = np.full(vocab_size, -1, dtype=np.int32)  # of a token among `_vectors`; -1: not there yet
        self._vectors = np.empty((0, 0), dtype=np.float16)  # [n, SIZE], or fewer of a vocabulary that is smaller

    def distinct_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens that each of some texts has, each once. A first word is taken as one inside a text.

        Of a very long text, as one without spaces is, the beginning stands for all of it.
        """
        valid = [text[:MAX_LETTERS].encode("utf-8", "ignore").decode() for text in texts]
        tokens = self._encode([f" {text}" for text in valid]) if valid else []
        # A text may spell a control token, and a tokenizer have more of these than its model.
        return [sorted({token for token in ids if token < len(self._places)}) for ids in tokens]

    def similarity(self, left: Sequence[int], right: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Return the similarity of each token to each other one: float32 [n, m], from 0 to 1 for the same one."""
        wanted = np.concatenate([np.asarray(left, dtype=np.uint32), right])
        with self._lock:
            self._add(wanted)
            vectors = self._vectors[self._places[wanted]].astype(np.float32)
        cosines: NDArray[np.float32] = vectors[: len(left)] @ vectors[len(left) :].T
        return cosines.clip(0, 1)

    def _add(self, tokens: NDArray[np.uint32]) -> None:
        """Make the vectors that are missing."""
        missing = np.unique(tokens[self._places[tokens] < 0])
        if len(missing):
            new = self._reduced(self._embed(missing.tolist())).numpy().astype(np.float16)
            self._places[missing] = np.arange(len(self._vectors), len(self._vectors) + len(missing))
            self._vectors = np.concatenate([self._vectors, new]) if len(self._vectors) else new

    @torch.inference_mode()
    def _reduced(self, embeddings: Tensor) -> Tensor:
        """Return vectors of length 1 for embeddings [n, D]: float32 [n, SIZE]."""
        if self._fitted is None:
            self._fitted = self._fit()
        mean, directions = self._fitted
        return _unit((_unit(embeddings) - mean) @ directions)

    def _fit(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the directions of a sample of the vocabulary."""
        sample = torch.linspace(0, len(self._places) - 1, min(SAMPLE, len(self._places))).long()
        rows = _unit(self._embed(sample.tolist()))
        mean = rows.mean(0)
        return mean, principal_directions(rows - mean, COMMON + SIZE)[:, COMMON:]


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """Return the directions in which rows [n, D] vary most, the strongest first: float32 [D, count].

    Subspace iteration: a random subspace turns towards them with each round, for a small part of the cost of all D.
    """
    generator = torch.Generator().manual_seed(0)  # of its own: nobody else's random numbers change
    subspace = torch.randn(rows.shape[1], count, generator=generator)
    for _ in range(ITERATIONS):
        subspace = torch.linalg.qr(rows.T @ (rows @ subspace)).Q
    # Inside the subspace the directions are not in order yet.
    return subspace @ torch.linalg.svd(rows @ subspace, full_matrices=False).Vh.T


def _unit(rows: Tensor) -> Tensor:
    """Return rows of length 1; zeros stay."""
    return torch.nn.functional.normalize(rows, dim=-1)
