"""Log-probabilities as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zsmerge_llm.types import TokenLogprob

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What the text of a token has for bytes that are no whole character."""


def entries(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return tokens as chat completions and responses have them."""
    return [{**_entry(token), "top_logprobs": [_entry(each) for each in token.top]} for token in tokens]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    known = REPLACEMENT not in token.token
    data = list(token.token.encode(errors="surrogatepass")) if known else None
    return {"token": token.token, "logprob": token.logprob, "bytes": data}


def chat_logprobs(tokens: Sequence[TokenLogprob], wanted: bool) -> dict[str, Any] | None:
    """Return the log-probabilities of a choice of a chat completion."""
    return {"content": entries(tokens), "refusal": None} if wanted else None


class CompletionLogprobs:
    """Writes log-probabilities as completions have them: with the place of each token in the text.

    wanted: whether the request asked for them.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._offset = 0

    def push(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return the next tokens."""
        if not self._wanted:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{each.token: each.logprob for each in token.top} for token in tokens],
            "text_offset": offsets,
        }
