"""How many idle conversations stay on a device: by the plan, and by caches that are really allocated."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from tests.planning.test_plan import make
from tests.support.tiers import device_tier
from zsmerge_llm import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.models.footprint import meta_model
from zsmerge_llm.planning import plan
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot
from zsmerge_llm.sessions.store import Store
from zsmerge_llm.sessions.tiers import DeviceTier

CONFIG = CacheConfig(slots=1024)
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    max_position_embeddings=8192,
)
SCALE = 32 * 8
"""The layers and KV heads of that model: the caches that are allocated have one of each."""
VOCAB = LLAMA_8B.vocab_size // SCALE


def eight_billion(memory: str) -> int:
    """Return how many conversations of 1,024 slots the plan keeps on a card beside Llama-3-8B in bfloat16."""
    made = plan(meta_model(LLAMA_8B, torch.bfloat16), cache=CONFIG, device="cuda", memory=memory)
    assert made.resident_sessions is not None
    assert f"{made.resident_sessions:,}  idle conversations that stay on cuda" in str(made)
    assert made.to_dict()["resident_sessions"] == made.resident_sessions
    return made.resident_sessions


def formula(slots: int, stage: int, window: int) -> int:
    """Bytes of one layer and KV head of that model: keys and values, four numbers a slot, queries of its four heads."""
    return (slots + stage) * (2 * 128 * 2 + 4 * 4) + 4 * window * 128 * 2


def part_of_a_cache() -> Cache:
    """One layer with one KV head of that model's cache, and its share of the logits."""
    cache = Cache(CONFIG, [LayerSpec(4, 1, 128, 128, None, torch.bfloat16, torch.device("cpu"))])
    cache.logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    return cache


def test_an_80_gib_card_keeps_350_conversations_of_an_8b_model() -> None:
    assert eight_billion("80GiB") >= 350


def test_an_idle_conversation_costs_one_cache_of_the_formula_and_so_many_stay() -> None:
    expected = eight_billion("80GiB")
    cache = part_of_a_cache()
    own = formula(CONFIG.slots or 0, CONFIG.stage, CONFIG.num_recorded_queries)
    assert 0 <= cache.nbytes - own - 2 * VOCAB < 256, "a few numbers for each row beside it"
    copies: DeviceTier = device_tier(int((expected + 0.5) * cache.nbytes), 1)
    store = Store(Fingerprint("", "", "", ""), 1 << 40, cache.nbytes, device=copies)
    mark = store.fingerprint
    for number in range(expected):
        turn = [Snapshot(f"{kind} {number}", 2, [1], part_of_a_cache(), kind) for kind in ("prompt", "answer")]
        store.commit(Session(f"chat {number}", mark), turn)
    store.flush()

    resident = [info for info in store if info.tier == "device"]
    assert len(resident) == expected - 1, "the one used last has its prompt there too"
    assert len(resident) >= 350
    assert store.device_nbytes <= store.device_limit
    ids = 4 * expected
    assert store.device_nbytes == expected * cache.nbytes + ids


def test_on_the_host_session_memory_alone_says_how_many_stay() -> None:
    made = make(memory="4GiB")
    assert made.resident_sessions is None
    assert "resident" not in str(made)
