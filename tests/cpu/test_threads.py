"""How many threads a pass runs on: what the process may use, and fewer while its threads wait for cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import threads
from zsmerge_llm.cpu.threads import CoreTimes, OpenMP, PassThreads, ThreadGovernor, core_limit, cpu_quota
from zsmerge_llm.engine.engine import Engine


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Two threads, whatever the machine has; at the end as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "_affinity", lambda: range(4))


def files(folder: Path, contents: dict[str, str]) -> Path:
    """Write files into a folder."""
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def observe(governor: ThreadGovernor, passes: int, seconds: float, waiting: float = 0.0, idle: float = 0.0) -> None:
    """Show a governor some passes: `waiting` threads without a core and `idle` cores, on average."""
    for _ in range(passes):
        governor.observe(governor.threads, CoreTimes(seconds, waiting * seconds, idle * seconds))


# -- what the process may use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("membership", "contents", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 1.0),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", {"unified/a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../../outside\n", {"cpu.max": "50000 100000\n"}, None),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "300", "cpu,cpuacct/cpu.cfs_period_us": "100"}, 3.0),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "300", "cpu/a/cpu.cfs_period_us": "100"}, 3.0),
        ("4:cpuacct,cpu:/a\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "many cores\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
        ("0::/\n", {"cpu.max": "\xff\xfe"}, None),
        ("garbage", {}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_smallest_quota_of_a_cgroup_and_its_ancestors_counts(
    tmp_path: Path, membership: str, contents: dict[str, str], quota: float | None
) -> None:
    process, cgroups = files(tmp_path / "self", {"cgroup": membership}), files(tmp_path / "cgroups", contents)
    assert cpu_quota(process, cgroups) == quota


def test_a_quota_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    process = files(tmp_path / "self", {"cgroup": "0::/\n"})
    (tmp_path / "cgroups" / "cpu.max").mkdir(parents=True)
    assert cpu_quota(process, tmp_path / "cgroups") is None
    assert cpu_quota(tmp_path / "missing", tmp_path / "cgroups") is None


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("100000", 1), ("290000", 2), ("400000", 4), ("900000", 4)])
def test_a_quota_limits_to_its_whole_cores_and_at_least_one(tmp_path: Path, quota: str, cores: int) -> None:
    process = files(tmp_path / "self", {"cgroup": "0::/\n"})
    limit = core_limit(process, files(tmp_path / "cgroups", {"cpu.max": f"{quota} 100000\n"}))
    assert limit.cores == cores
    assert ("quota" in limit.reason) == (cores < 4)


@pytest.mark.usefixtures("four_cores")
def test_an_affinity_smaller_than_the_cores_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_affinity", lambda: [1, 3])
    limit = core_limit(tmp_path, tmp_path)
    assert (limit.cores, "affinity" in limit.reason) == (2, True)


# -- times -------------------------------------------------------------------------------------------------------------


def test_waiting_of_all_threads_and_idle_time_of_usable_cores_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_affinity", lambda: [0, 2])
    process = files(tmp_path / "self", {"task/7/schedstat": "1 1500000000 3\n", "task/8/schedstat": "1 500000000 3\n"})
    (process / "task" / "9").mkdir()  # has just ended
    core = "cpu{0} 0 0 0 {1} 0 0 0 0 0 0\n"
    stat = files(tmp_path, {"stat": "".join(core.format(*each) for each in (("", 999), (0, 100), (1, 500), (2, 50)))})
    times = threads.read_core_times(process, stat / "stat")
    assert times is not None
    assert times.waited == 2.0
    assert times.idle * os.sysconf("SC_CLK_TCK") == 150


def test_a_system_that_does_not_count_waiting_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.read_core_times(tmp_path, tmp_path / "stat") is None
    monkeypatch.setattr(threads, "read_core_times", lambda: None)
    passes = PassThreads()
    passes.INTERVAL = 0.0
    for _ in range(3):
        with passes.running(8):
            pass
    assert passes.governor.threads == passes.limit.cores


# -- the governor ------------------------------------------------------------------------------------------------------


def test_steady_passes_change_nothing() -> None:
    governor = ThreadGovernor(2)
    observe(governor, 1000, 0.1, waiting=0.02)
    assert governor.threads == 2


def test_longer_and_longer_passes_change_nothing() -> None:
    governor = ThreadGovernor(2)
    for seconds in (0.01, 0.1, 1.0, 10.0, 100.0):
        observe(governor, 5, seconds, waiting=0.01)
    assert governor.threads == 2


def test_one_hiccup_changes_nothing() -> None:
    governor = ThreadGovernor(2)
    for _ in range(20):
        observe(governor, 1, 0.1, waiting=1.5)
        observe(governor, 9, 0.1, waiting=0.01)
    assert governor.threads == 2


@pytest.mark.parametrize("seconds", [0.1, 0.3, 2.4])
def test_sustained_load_leads_to_one_thread_within_half_a_second_or_a_pass(seconds: float) -> None:
    governor = ThreadGovernor(2)
    observe(governor, max(1, round(0.5 / seconds)), seconds, waiting=0.7)
    assert governor.threads == 1


def test_with_many_threads_as_many_are_given_up_as_wait() -> None:
    governor = ThreadGovernor(16)
    observe(governor, 1, 0.1, waiting=4.0)
    assert governor.threads == 12
    observe(governor, 100, 0.1, waiting=1.0)
    assert governor.threads == 1
    observe(governor, 10, 0.1, waiting=8.0)
    assert governor.threads == 1


def test_fewer_threads_stay_while_no_core_is_idle() -> None:
    governor = ThreadGovernor(2)
    observe(governor, 5, 0.1, waiting=1.0)
    observe(governor, 10_000, 0.1, waiting=0.3, idle=0.1)
    assert governor.threads == 1


def test_threads_come_back_when_the_load_ends() -> None:
    governor = ThreadGovernor(4)
    observe(governor, 1, 0.2, waiting=3.0)
    assert governor.threads == 1
    observe(governor, 10, 0.1, idle=3.0)
    assert governor.threads == 4


def test_threads_come_back_in_a_pause_without_passes() -> None:
    governor = ThreadGovernor(2)
    observe(governor, 1, 1.0, waiting=1.0)
    observe(governor, 4, 0.1, waiting=0.3)
    governor.observe(0, CoreTimes(5.0, 0.0, 5.0))  # one idle core is for the thread that there is
    assert governor.threads == 1
    governor.observe(0, CoreTimes(5.0, 0.0, 9.9))
    assert governor.threads == 2


def test_returns_that_fail_become_rare_and_one_that_lasts_makes_them_frequent_again() -> None:
    governor, returns = ThreadGovernor(2), 0
    for _ in range(6000):  # ten minutes in a quota that nobody knows of: a core is idle, but not for this process
        before = governor.threads
        observe(governor, 1, 0.1, waiting=1.0 if before == 2 else 0.0, idle=1.0)
        returns += before < governor.threads
    assert 5 < returns < 20
    observe(governor, 700, 0.1, idle=1.0)
    assert governor.threads == 2
    observe(governor, 3000, 0.1, waiting=0.0)
    observe(governor, 5, 0.1, waiting=1.0)
    observe(governor, 8, 0.1, idle=1.0)
    assert governor.threads == 2


# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["by OpenMP", "by PyTorch"])
def limited(request: pytest.FixtureRequest, torch_threads: None) -> PassThreads:
    """Passes on one thread, of two."""
    passes = PassThreads()
    passes.governor = ThreadGovernor(2)
    passes.governor.threads = 1
    passes._times = None  # nothing is learned
    if not request.param:
        passes._openmp._set = None
    return passes


def test_a_pass_runs_on_the_chosen_number_and_the_caller_has_its_own_again(limited: PassThreads) -> None:
    with limited.running(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_the_caller_has_its_own_number_again_when_a_pass_raises(limited: PassThreads) -> None:
    with suppress(ZeroDivisionError), limited.running(2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_number_that_the_user_chose_is_never_exceeded(limited: PassThreads) -> None:
    limited.governor.threads = 2
    with limited.running(1):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(1)
    assert limited.choice()[0] == 1
    assert "torch.set_num_threads" in limited.choice()[1]


@pytest.mark.usefixtures("torch_threads")
def test_a_thread_that_begins_within_a_pass_has_the_users_number() -> None:
    openmp, found = OpenMP(), []
    if openmp._set is None:
        pytest.skip("PyTorch's OpenMP was not found")
    restore = openmp.set(1)
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    restore()
    assert found == [2]


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("work", [lambda x: x @ x, lambda x: x.bfloat16() @ x.bfloat16(), lambda x: x.softmax(-1)])
def test_results_of_one_thread_are_those_of_pytorchs_own_limit(work: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 300)
    restore = OpenMP().set(1)
    found = work(x)
    restore()
    torch.set_num_threads(1)
    assert torch.equal(found, work(x))


def test_what_is_said_of_the_choice(limited: PassThreads) -> None:
    limited.limit = threads.CoreLimit(2, "all cores")
    assert limited.choice() == (1, "of 2: threads waited for cores that other work has")
    limited.governor.threads = 2
    assert limited.choice() == (2, "all cores")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_a_caller_that_waits_for_a_pass_keeps_no_idle_threads_of_openmp() -> None:
    """With more threads than cores in a process, GNU's OpenMP lets those of a pass sleep whenever they wait."""
    engine = Engine(tiny_model(), CacheConfig(slots=128), compile=False)
    engine.read(engine.new_cache(), [1, 2, 3])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        num_idle = len(list(Path("/proc/self/task").iterdir()))
        torch.randn(1 << 22).exp()
        num_with_team = len(list(Path("/proc/self/task").iterdir()))
        torch.set_num_threads(before)
        engine.read(engine.new_cache(), [1, 2, 3])
        assert num_with_team > num_idle
        assert len(list(Path("/proc/self/task").iterdir())) <= num_idle
    finally:
        torch.set_num_threads(before)
