"""Token vectors of a model that is made up: a few words, some of which are alike."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from zsmerge_llm.retrieval.token_vectors import SIZE, TokenVectors

WORDS = re.findall(r"\w+", "harbour port vault safe password code falcon market bread rain village tower keeper guard")
LIKE = {"port": "harbour", "safe": "vault", "code": "password", "guard": "keeper"}
"""Words of like meaning in the made-up model below."""
VOCAB = 600


def embeddings() -> Tensor:
    """Embeddings of `WORDS`, of which some are alike, and of others; all point the same way, as a model's do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(VOCAB, 2 * SIZE, generator=generator)
    for word, like in LIKE.items():
        rows[WORDS.index(word)] = rows[WORDS.index(like)] + 0.5 * rows[WORDS.index(word)]
    return rows + 5 * torch.randn(2 * SIZE, generator=generator)


def made_up_vectors() -> TokenVectors:
    """The vectors of a model whose first tokens are `WORDS`."""
    rows = embeddings()

    def encode(texts: list[str]) -> list[list[int]]:
        words = (re.findall(r"\w+", text.lower()) for text in texts)
        return [[WORDS.index(word) for word in each if word in WORDS] for each in words]

    return TokenVectors(lambda ids: rows[torch.as_tensor(ids)], encode, VOCAB)
