"""Logits to the next token (`Sampler`), and tokens to text with stop strings (`Detokenizer`). One row each.

`Sampler` never waits for the device. Filters are transformers' own, in `generate`'s order: repetition penalty,
temperature, top_k, top_p, min_p. Logits that hold NaN or +inf, or nothing but -inf, mean that the model has broken
down (float16 overflow, usually): `Sampler` then returns -1, and `accept(-1)` raises. Never feed a token to the model
before `accept` has seen it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ZSMergeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers put for bytes that are not (yet) a character."""
WINDOW_TOKENS = 16
"""More tokens than this without a complete last character are not text; they are cut, so that no step grows."""
CHARACTER_TOKENS = 4
"""A UTF-8 character has four bytes, so it has at most four tokens."""


class Sampler:
    """Draws the tokens of one row, greedily at temperature 0. Repeatable where `params.seed` is set.

    Args:
        params: how to draw.
        prompt_ids: ids the repetition penalty counts as seen; not touched where there is no penalty.
        device: where the logits live.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device | str) -> None:
        self.penalty = params.repetition_penalty
        self.greedy = params.temperature == 0
        self._seen_ids = list(prompt_ids) if self.penalty != 1 else []
        self._seen: Tensor | None = None  # bool[vocab]: its cost does not depend on how much was said
        self._filters: list[Any] = [] if self.greedy else _filters(params)
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: float32[vocab] → the next token, int64, 0-d, on the same device; -1 for broken logits."""
        peak = logits.max()  # NaN wherever one logit is NaN
        scores = logits if self.penalty == 1 else self._penalised(logits)
        token = scores.argmax() if self.greedy else self._draw(scores)
        return torch.where(peak.isfinite(), token, -1)

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen.

        Raises:
            ZSMergeError: `token` is -1: the logits it was drawn from were not numbers.
        """
        if token < 0:
            raise ZSMergeError(
                "The model's logits are not finite (NaN or infinity), so there is no next token. Its numbers overflow: "
                "load it with dtype='float32' or 'bfloat16', and without quantization if that does not help."
            )
        if self.penalty == 1:
            return
        if self._seen is None:
            self._seen_ids.append(token)
        else:
            self._seen[token] = True

    def _penalised(self, logits: Tensor) -> Tensor:
        """transformers' RepetitionPenaltyLogitsProcessor, in O(vocab) instead of O(tokens so far)."""
        if self._seen is None:
            self._seen = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
            known = torch.tensor(self._seen_ids, dtype=torch.long)
            self._seen[known[known < logits.shape[0]].to(logits.device)] = True
        lowered = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self._seen, lowered, logits)

    def _draw(self, scores: Tensor) -> Tensor:
        """Gumbel-max: argmax(log p - log e), e ~ Exp(1), draws from p without multinomial's look at the device."""
        row = (scores - scores.max())[None]  # filters do not see the shift; a tiny temperature cannot overflow now
        for apply in self._filters:
            row = apply(None, row)
        noise = torch.empty_like(row).exponential_(generator=self._generator)
        return (row - noise.clamp_min_(torch.finfo(row.dtype).tiny).log_())[0].argmax()


def _filters(params: SamplingParams) -> list[Any]:
    """The parts of transformers' sampling that `params` turns on; each maps (ids, float32[1, vocab]) to the latter."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    wanted = [
        (TemperatureLogitsWarper, float(params.temperature), params.temperature != 1),
        (TopKLogitsWarper, params.top_k, params.top_k > 0),
        (TopPLogitsWarper, float(params.top_p), params.top_p < 1),
        (MinPLogitsWarper, float(params.min_p), params.min_p > 0),
    ]
    return [kind(value) for kind, value, on in wanted if on]


class Detokenizer:
    """Turns tokens into text as they come; the pieces add up to `tokenizer.decode` of all of them.

    Held back: a character whose bytes are not all there, and text that may become a stop string. The answer ends
    before the stop string that is completed first (the longest of several that end together), whatever the tokens'
    borders. Each step decodes a few tokens only.

    Exact for every token sequence of byte-level tokenizers. Where bytes are tokens of their own (sentencepiece's byte
    fallback) exact for text; bytes that are no text may give another number of U+FFFD than one decoding of all.

    Args:
        tokenizer: a transformers tokenizer.
        stop: non-empty strings that end the text and are not part of it.
        skip_special_tokens: leave the tokenizer's special tokens out of the text.
        shown: special tokens that are text all the same, such as those that announce a tool call.
        context: ids before the first token, not part of the text. A completion passes the end of its prompt:
            sentencepiece drops the space before the first word of a text, which this one then is not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._hidden = _special_ids(tokenizer) - frozenset(shown) if skip_special_tokens else frozenset()
        self._window = [token for token in context if token not in self._hidden][-WINDOW_TOKENS:]
        self._settled = len(self._window)  # tokens of the window whose text is complete
        self._given = len(self._decode())  # characters of the window's text already handed on
        self._held = ""  # decoded text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Text that is safe to show after `token`; often "". Always "" once `stopped`."""
        if self.stopped or token in self._hidden:
            return ""
        self._window.append(token)
        text = self._decode()
        open_end = len(text) - len(text.rstrip(REPLACEMENT))
        if open_end and self._pending > WINDOW_TOKENS:
            open_end = 1  # too much for one character: all but the last is broken for good
        new = text[self._given : len(text) - open_end]
        self._given = max(self._given, len(text) - open_end)
        self._slide(open_end, bool(new))
        return self._cut(new)

    def finish(self) -> str:
        """The text held back so far. May find a stop string in it."""
        if self.stopped:
            return ""
        text = self._cut(self._decode()[self._given :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        self._window, self._settled, self._given = [], 0, 0
        return text

    def _decode(self) -> str:
        return cast(str, self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False))

    @property
    def _pending(self) -> int:
        return len(self._window) - self._settled

    def _slide(self, open_end: int, shown: bool) -> None:
        """Forget tokens that later ones do not depend on, but keep the last piece: spaces depend on it."""
        if not open_end:
            self._window = self._window[self._settled if shown else -WINDOW_TOKENS :]
            self._settled = len(self._window)
        elif self._pending > WINDOW_TOKENS:
            self._window, self._settled = self._window[-CHARACTER_TOKENS:], 0
        else:
            return
        self._given = len(self._decode()) - open_end

    def _cut(self, new: str) -> str:
        """What of the held text and `new` is safe, up to the first stop string."""
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = overlap(text, self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that `decode(skip_special_tokens=True)` leaves out."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
