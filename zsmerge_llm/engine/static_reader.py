"""Read the full chunks of a long text in fixed memory, by passes that a device may repeat as graphs.

Once the slots of every layer are full, each further chunk is the same work on the same shapes: attend to the slots and
to the chunk, score, and compress to as many slots. The conversation is copied into fixed memory for these chunks and
back afterwards. Everything else, the last part of a text for one, is read by `ModelRunner.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zsmerge_llm.attention.backend import Replay
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.passes import ForwardPass, VotingPass
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.model_runner import ModelRunner, Probe
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import TENSORS
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.slots import LayerSpec

PROBE_MULTIPLE = 32
"""Probes are padded to such a length, so that questions of different lengths share a pass."""
MIN_VOTES_BITS = 15
"""Votes are counted in a tensor of a power of two, at least 2^15, of tokens."""


@dataclass(frozen=True)
class ChunkShape:
    """What makes one captured pass differ from another.

    num_new, num_probe: tokens of the chunk and, padded, of its probe. num_votes: tokens that votes are counted for.
    voting: whether layers vote for passages. multi_turn: see `AttentionInputs`.
    """

    num_new: int
    num_probe: int
    num_votes: int
    voting: bool
    multi_turn: bool


class StaticReader:
    """Reads full chunks of one conversation at a time in fixed memory. Runs in the device thread.

    Args:
        specs: of the model's layers.
    """

    def __init__(self, runner: ModelRunner, specs: tuple[LayerSpec, ...]) -> None:
        self._runner, self._specs = runner, specs
        self._memory: Cache | None = None
        self._resident: Cache | None = None
        self._replays: dict[ChunkShape, Replay] = {}
        self._inputs: dict[str, Tensor] = {}

    def takes(self, cache: Cache, num_new: int, probe: Probe | None) -> bool:
        """Return whether a chunk can be read here: all layers are full to their slots, and have no room for it."""
        if cache.rows > 1 or cache.config.slots is None or cache.states:
            return False
        layers = cache.layers
        steady = all(each.num_filled[0] == each.config.slots and not each.has_room(num_new) for each in layers)
        if not steady or not all(policy_of(each.config).capturable for each in layers):
            return False
        num_probe = 0 if probe is None else len(probe.tokens)
        remapper = self._runner.remapper
        enough = num_new <= remapper.max_pass_tokens(cache, num_new, num_probe)
        return enough and not remapper.is_due(cache, [num_new], num_probe)

    @torch.inference_mode()
    def run(self, cache: Cache, chunk: Tensor, probe: Probe | None, multi_turn: bool) -> Tensor:
        """Read ids [n] into the cache: logits [1, 1, vocab] after the last. Sets `cache.logits`; see `release`."""
        self._runner.check_usable()
        seen = cache.lengths[0] + len(chunk)
        num_probe = 0 if probe is None else len(probe.tokens)
        padded = -(-num_probe // PROBE_MULTIPLE) * PROBE_MULTIPLE
        voting = probe is not None and probe.voting
        num_votes = 1 << max(MIN_VOTES_BITS, seen.bit_length()) if voting else 0
        shape = ChunkShape(len(chunk), padded, num_votes, voting, multi_turn)
        replay = self._replay(cache.config, shape)
        self._load(cache)
        tokens = torch.zeros(len(chunk) + padded, dtype=torch.long)
        tokens[: len(chunk)] = chunk
        if probe is not None:
            tokens[len(chunk) : len(chunk) + num_probe] = probe.tokens
        numbers = torch.tensor([cache.lengths[0], cache.position_maps[0].offset, num_probe])
        self._inputs["tokens"][: len(tokens)].copy_(tokens)
        self._inputs["numbers"].copy_(numbers)
        replay()
        cache.lengths = [seen]
        cache.logits = self._inputs["logits"].clone()
        return cache.logits[:, None]

    def release(self, cache: Cache | None = None) -> None:
        """Bring the resident conversation up to date and forget it; with `cache`, only if it is that one."""
        resident, memory = self._resident, self._memory
        if resident is None or memory is None or cache not in (None, resident):
            return
        for own, static in zip(resident.layers, memory.layers, strict=True):
            for name in TENSORS:
                getattr(own, name).copy_(getattr(static, name))
        self._resident = None

    def _load(self, cache: Cache) -> None:
        """Copy a conversation into the fixed memory."""
        if self._resident is cache or self._memory is None:
            return
        self.release()
        for own, static in zip(cache.layers, self._memory.layers, strict=True):
            for name in TENSORS:
                getattr(static, name).copy_(getattr(own, name))
        self._resident = cache

    def _replay(self, config: CacheConfig, shape: ChunkShape) -> Replay:
        """Return what reads a chunk of a shape, captured when it first occurs."""
        if self._memory is None or self._memory.config != config:
            self.release()
            self._replays.clear()
            self._memory = Cache(config, self._specs)
            for layer in self._memory.layers:
                layer.set_filled([layer.config.slots or 0], layer.filled.new_tensor([layer.config.slots or 0]))
            self._inputs.clear()
        self._allocate(shape)
        if shape not in self._replays:
            self.release()  # capturing runs on whatever is in the memory
            work = partial(self._read, shape)
            self._replays[shape] = self._runner.backend.capture(work, work)
        return self._replays[shape]

    def _allocate(self, shape: ChunkShape) -> None:
        """Make the tensors that a pass reads its inputs from and writes its logits to; larger ones if need be."""
        device, total = self._specs[-1].device, shape.num_new + shape.num_probe
        if "tokens" not in self._inputs or len(self._inputs["tokens"]) < total:
            model = self._runner.model
            vocab = model.get_output_embeddings().weight.shape[0]
            self._replays.clear()
            self._inputs = {
                "tokens": torch.zeros(2 * total, dtype=torch.long, device=device),
                "numbers": torch.zeros(3, dtype=torch.long, device=device),
                "logits": torch.zeros(1, vocab, dtype=model.dtype, device=device),
            }

    def _read(self, shape: ChunkShape) -> None:
        """Read a chunk: tensor functions on the fixed memory alone."""
        assert self._memory is not None
        new, total = shape.num_new, shape.num_new + shape.num_probe
        length, offset, num_probe = self._inputs["numbers"].unbind()
        places = torch.arange(total, device=length.device)
        # Padding repeats the last position: it must not reach beyond the model's window.
        positions = (length + torch.minimum(places, new + num_probe - 1))[None]
        layout = PassLayout(new, positions, None, [new], (length + new)[None])
        if shape.num_probe:
            layout.probe_valid = (places[new:] < new + num_probe)[None]
        arguments = (self._memory, layout, self._runner.backend, 0, shape.multi_turn)
        step = VotingPass(*arguments, num_votes=shape.num_votes) if shape.voting else ForwardPass(*arguments)
        logits = forward(
            self._runner.model,
            step,
            input_ids=self._inputs["tokens"][None, :total],
            position_ids=positions - offset,
            logits_to_keep=places[new - 1 : new],
        )
        step.finish()
        self._inputs["logits"].copy_(logits[:, 0])
