"""What an eviction policy is: it may observe each forward pass, and it ranks the slots when a layer has to compress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.slots import AttentionInputs


@dataclass(frozen=True)
class RankingContext:
    """What a policy may use beside the slots when it ranks them.

    seen: int [B], tokens read by each row. multi_turn: bool [B], whether the conversation has been answered before.
    votes: float32 [T], for each token read what all layers' heads vote for its surroundings, None without a vote.
    pinned_recent: how many of the newest tokens belong to a turn that is still being read.
    """

    seen: Tensor
    multi_turn: Tensor
    votes: Tensor | None = None
    pinned_recent: int = 0


class EvictionPolicy(ABC):
    """Decide which slots a layer evicts. Stateless: what it knows of a layer is in the layer's own tensors.

    Subclass it, and give an object to `CacheConfig(policy=...)`. The cache itself handles sinks, recent tokens, empty
    slots, merging, padding and batches. See docs/adding-a-policy.

    Attributes:
        name: stands for the policy in configurations that are saved.
        records_queries: whether each layer keeps its newest `CacheConfig.observation_window` queries
            (`view.layer.queries`, `view.layer.query_positions`). `observe` has to push them.
        uses_probe: whether the tokens of a prompt's question are run behind each chunk (`inputs.probe_queries`).
        votes: whether all layers vote for passages before any of them evicts (`vote`).
        observes_every_pass: whether `observe` must see decode steps too, also where nothing is compressed.
        capturable: whether all methods are tensor functions that read nothing from the host (no `.item()`, no
            `view.layer.num_filled`), so that a GPU can repeat them as a graph. `observe` must then leave what is done
            only before compressing to `prepare`, and gets no keys and values in decode steps (`inputs.keys` is empty).
    """

    name: str
    records_queries = False
    uses_probe = False
    votes = False
    observes_every_pass = True
    capturable = False

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:  # noqa: B027 - nothing to observe by default
        """Look at a forward pass after its attention, and update `view.score` or other tensors of the view in place.

        `view.layer.rows_due(inputs)` says which rows are compressed next.
        """

    def observe_between_turns(self, view: KVView, due: Tensor) -> None:  # noqa: B027 - as `observe`
        """Note that the rows `due`, bool [B], are compressed between two turns, when no tokens come in."""

    def prepare(self, view: KVView, due: Tensor, inputs: AttentionInputs | None) -> None:  # noqa: B027 - as `observe`
        """Score the slots of the rows `due`, bool [B], which are ranked next.

        inputs: the tokens of the pass, which `observe` has seen; None where no pass is running.
        """

    def vote(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Score as `prepare`, and return the layer's votes for its slots: float32 [B, H, C]. Where `votes` is set."""
        raise NotImplementedError(f"{type(self).__name__} sets votes and does not define vote.")

    @abstractmethod
    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        """Rank the slots of the rows that are compressed: float32 [B, H, C], the highest are kept.

        The view holds verbatim tokens only, in order of position. Whatever is returned for sinks, for the
        `view.config.recent` newest tokens and for empty slots is overruled.
        """
