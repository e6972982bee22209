"""Idle conversations live on the device, then in host memory, then on disk, and nobody waits for another's move."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Semaphore, Thread
from typing import Any
from unittest import mock

import pytest
import torch

from tests.engine.test_concurrency import answers_of, run_concurrently, sequential_answers
from tests.support.chat import SNAPSHOT_NBYTES, Chat, equal_caches, make_llm
from tests.support.tiers import device_tier, pretended_device
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.sessions.folder import Folder
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot
from zsmerge_llm.sessions.store import Store
from zsmerge_llm.sessions.tiers import OVERSHOOT_CACHES

LIMIT = 60
"""Seconds after which a thread counts as stuck."""
CONFIG = CacheConfig(slots=32, recent=8, stage=8, observation_window=4)
SPECS = [LayerSpec(2, 1, 4, 4, None, torch.float32, torch.device("cpu")) for _ in range(2)]
MARK = Fingerprint("weights", "tokenizer", "template", "cache")


def random_cache() -> Cache:
    cache = Cache(CONFIG, SPECS)
    for layer in cache.layers:
        layer.keys.normal_()
    return cache


NBYTES = random_cache().nbytes


def snapshot(digest: str, kind: Any = "answer") -> Snapshot:
    return Snapshot(digest, 2, [1, 2, 3], random_cache(), kind)


def make_store(limit: float, device_limit: float | None = None, **settings: Any) -> Store:
    """Make a store whose limits are given in caches."""
    device = None if device_limit is None else device_tier(int((device_limit + 0.5) * NBYTES), len(SPECS))
    return Store(MARK, int((limit + 0.5) * NBYTES), NBYTES, device=device, **settings)


def commit(store: Store, name: str, *snapshots: Snapshot) -> None:
    store.commit(Session(name, MARK), snapshots or [snapshot(name)])


def tiers(store: Store) -> dict[str, str]:
    store.flush()
    return {info.name: info.tier for info in store}


class StuckDisk:
    """A disk that writes no file but those the test allows. begun: the first one is to be written."""

    def __init__(self) -> None:
        self.begun = Event()
        self.num_written = 0
        self._allowed = Semaphore(0)

    def allow(self, num_files: int) -> None:
        self._allowed.release(num_files)

    def wait(self) -> None:
        self.begun.set()
        assert self._allowed.acquire(timeout=LIMIT)
        self.num_written += 1


@pytest.fixture
def stuck_disk(monkeypatch: pytest.MonkeyPatch) -> StuckDisk:
    save, disk = Folder.save, StuckDisk()

    def saving(self: Folder, session: Session, *known: Any) -> Any:
        disk.wait()
        return save(self, session, *known)

    monkeypatch.setattr(Folder, "save", saving)
    return disk


# -- what goes where ---------------------------------------------------------------------------------------------------


def test_the_least_recently_used_conversation_goes_down_first_and_comes_back_up_when_it_is_used() -> None:
    store = make_store(limit=2, device_limit=2)
    for name in "abcdef":
        commit(store, name)
    assert tiers(store) == dict(zip("fedcba", ["device"] * 2 + ["host"] * 2 + ["disk"] * 2, strict=True))

    store.open("c", "c")
    store.get("a")
    assert tiers(store) == {"a": "device", "c": "device", "f": "host", "e": "host", "d": "disk", "b": "disk"}
    assert store.nbytes <= store.limit
    assert store.device_nbytes <= store.device_limit


def test_older_snapshots_go_down_before_any_head_and_are_still_there() -> None:
    store = make_store(limit=4, device_limit=2)
    older, head = snapshot("a1"), snapshot("a2")
    expected = older.cache.clone()
    commit(store, "a", older, head)
    commit(store, "b")

    assert tiers(store) == {"a": "device", "b": "device"}
    assert not store.open("b", "b").snapshot.offloaded
    assert store.nbytes > NBYTES  # of the older one, in host memory
    resumed = store.open("a", "a1")
    assert equal_caches(resumed.snapshot.cache, expected)
    assert (resumed.head, resumed.snapshot.offloaded) == ("a2", False)


def test_a_snapshot_that_sessions_share_moves_once_and_for_all_of_them() -> None:
    store = make_store(limit=9, device_limit=1)
    shared = snapshot("system", "prefix")
    for name in "abc":
        commit(store, name, shared, snapshot(name))
    assert tiers(store) == {"c": "device", "b": "host", "a": "host"}
    assert store.nbytes + store.device_nbytes < 4.5 * NBYTES


def test_a_model_that_computes_in_host_memory_has_no_device_tier() -> None:
    store = make_store(limit=1)
    commit(store, "a")
    commit(store, "b")
    assert tiers(store) == {"b": "host", "a": "disk"}
    assert (store.device_nbytes, store.device_limit) == (0, 0)


def test_a_device_without_room_for_idle_conversations_keeps_none() -> None:
    store = make_store(limit=4, device_limit=-0.5)
    commit(store, "a")
    assert tiers(store) == {"a": "host"}
    found = store.get("a")
    assert not found.head.offloaded, "who uses it has it on the device"
    assert tiers(store) == {"a": "host"}
    assert not found.head.offloaded, "and keeps it there"


def test_a_conversation_that_host_memory_has_no_room_for_goes_to_disk() -> None:
    store = make_store(limit=4, device_limit=1)
    session = snapshot("a2")
    commit(store, "b", snapshot("a1"), session)
    transfer: Any = store._transfer
    tried: list[Cache] = []

    def failing_once(cache: Cache) -> Cache:
        if not any(cache is each for each in tried):
            tried.append(cache)
            raise MemoryError("no room")
        return to_host(cache)

    to_host = transfer.to_host
    with mock.patch.object(type(transfer), "to_host", lambda _, cache: failing_once(cache)):
        commit(store, "c")
        assert tiers(store) == {"c": "device", "b": "disk"}
    assert equal_caches(store.get("b").cache, session.cache)


def test_nothing_is_lost_silently_where_neither_host_memory_nor_disk_take_it() -> None:
    store = make_store(limit=4, device_limit=1)
    copies: Any = store._transfer
    commit(store, "a")
    copies.copies.full = True
    with pytest.warns(UserWarning, match=r"'a' is forgotten: memory is full and it cannot be saved \(no room\)"):
        assert_moved(store, "b")
    assert tiers(store) == {"b": "device"}


def assert_moved(store: Store, name: str) -> None:
    commit(store, name)
    store.flush()


def test_moving_a_cache_reads_no_value_on_the_host() -> None:
    there = random_cache().copy_to([torch.device("meta")] * 2, lambda tensor, device: tensor.to(device))
    again = there.copy_to([torch.device("meta")] * 2, lambda tensor, device: torch.empty_like(tensor, device=device))
    assert [layer.spec.device.type for layer in again.layers] == ["meta"] * 2
    assert again.nbytes == NBYTES


# -- nobody waits ------------------------------------------------------------------------------------------------------


def test_a_slow_disk_delays_no_other_conversation_and_the_one_that_is_written_no_longer_than_its_file(
    stuck_disk: StuckDisk,
) -> None:
    llm = make_llm(session_memory=2 * SNAPSHOT_NBYTES)
    one, two, three = (Chat(llm, name) for name in ("one", "two", "three"))
    for chat in (one, two, three):
        chat.ask("Hello")
    assert stuck_disk.begun.wait(LIMIT)  # "one" is on its way

    two.ask("Are you there?")
    Chat(llm, "four").ask("Hello")
    assert stuck_disk.num_written == 0
    stuck_disk.allow(1)
    assert one.ask("And you?").usage.reuse == "continued"
    assert stuck_disk.num_written == 1
    stuck_disk.allow(100)
    llm.store.flush()
    assert llm.store.nbytes <= llm.store.limit


def test_a_persistent_conversation_is_on_disk_when_it_is_answered_and_delays_no_other(
    stuck_disk: StuckDisk, tmp_path: Path
) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    other = Chat(llm)
    asking = Thread(target=lambda: Chat(llm, "slow").ask("Hello"))
    asking.start()
    assert stuck_disk.begun.wait(LIMIT)
    assert llm.store.info("slow") is not None
    assert llm.store.get("slow").tokens  # it is in memory
    assert asking.is_alive()
    assert stuck_disk.num_written == 0
    stuck_disk.allow(100)
    asking.join(LIMIT)
    assert not asking.is_alive()
    assert [info.name for info in make_llm(sessions_dir=tmp_path).store] == ["slow"]
    assert other.ask("Hello").text


def test_memory_above_the_limit_is_bounded_while_the_disk_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    save, stuck = Folder.save, Event()

    def saving(self: Folder, session: Session, *known: Any) -> Any:
        assert stuck.wait(LIMIT)
        return save(self, session, *known)

    monkeypatch.setattr(Folder, "save", saving)
    store = make_store(limit=1)
    for number in range(OVERSHOOT_CACHES + 1):
        commit(store, f"c{number}")
    most = store.limit + OVERSHOOT_CACHES * NBYTES
    assert store.limit < store.nbytes <= most
    waiting = [Thread(target=commit, args=(store, f"late-{number}")) for number in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    assert all(thread.is_alive() for thread in waiting), "those wait for room"
    assert store.open("c3", "c3").snapshot.digest == "c3", "who needs no room does not"
    stuck.set()
    for thread in waiting:
        thread.join(LIMIT)
    store.flush()
    assert store.nbytes <= store.limit
    assert len(store) == OVERSHOOT_CACHES + 3


def test_a_request_waits_for_the_conversation_that_it_needs_to_be_loaded_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store(limit=1)
    expected = snapshot("a")
    commit(store, "a", expected)
    commit(store, "b")
    store.flush()
    load, loading, go_on = Folder.load, Event(), Event()

    def slow_load(self: Folder, info: Any) -> Session:
        loading.set()
        assert go_on.wait(LIMIT)
        return load(self, info)

    monkeypatch.setattr(Folder, "load", slow_load)
    found: list[Session] = []
    readers = [Thread(target=lambda: found.append(store.get("a"))) for _ in range(2)]
    for thread in readers:
        thread.start()
    assert loading.wait(LIMIT)
    assert store.get("b").name == "b"
    assert not found
    go_on.set()
    for thread in readers:
        thread.join(LIMIT)
    assert [equal_caches(session.cache, expected.cache) for session in found] == [True, True]


# -- a whole model -----------------------------------------------------------------------------------------------------


def answers(llm: LLM) -> list[str]:
    chats = [Chat(llm, f"chat-{number}") for number in range(5)]
    texts = []
    for turn in range(3):
        for chat in chats[:: (-1) ** turn]:  # the one used last is on the device, the first one used on disk
            result = chat.ask(f"{chat.session}, question {turn}")
            assert result.usage.reuse == ("continued" if turn else "new")
            texts.append(result.text)
    return texts


def test_conversations_answer_the_same_on_whatever_tier_they_were() -> None:
    expected = answers(make_llm())
    with pretended_device(2 * SNAPSHOT_NBYTES) as copies:
        llm = make_llm(session_memory=2 * SNAPSHOT_NBYTES)
        assert answers(llm) == expected
    llm.store.flush()

    assert {info.tier for info in llm.store} == {"device", "host", "disk"}
    assert copies.down
    assert copies.up
    assert llm.store.nbytes <= llm.store.limit
    assert llm.store.device_nbytes <= llm.store.device_limit


def test_a_closed_model_moves_nothing_any_more() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES)
    Chat(llm, "it").ask("Hello")
    store = llm.store
    llm.close()
    store.commit(Session("late", store.fingerprint), [snapshot("late")])
    store.flush()
    assert {info.tier for info in store} == {"host"}


def test_threads_on_small_tiers_do_not_change_each_others_answers() -> None:
    names = [f"n{number}" for number in range(8)]
    expected = sequential_answers(names, 3)
    with pretended_device(2 * SNAPSHOT_NBYTES) as copies:
        llm = make_llm(session_memory=3 * SNAPSHOT_NBYTES)
        work = [lambda name=name: answers_of(llm, name, 3, session=name) for name in names]
        assert dict(zip(names, run_concurrently(work), strict=True)) == expected
    llm.store.flush()

    assert copies.down
    assert sorted(info.name for info in llm.store) == names
    assert llm.store.nbytes <= llm.store.limit
    assert llm.store.device_nbytes <= llm.store.device_limit
