"""Soak: many threads talk for long, cancel, regenerate and branch, while memory is too small and the model restarts.

    python benchmarks/reliability/soak.py [--minutes 5] [--threads 32] [--model tiny] [--memory 24] [--restart 20]

Conversations follow a fixed number of scripts. One thread answers each script first. Then all threads answer them again
and again, and each answer must be the same. `session_memory` has room for few of the conversations, so the others go to
disk and come back. From time to time the model is closed and started again on the same folder: every second time while
requests run, which then fail with an `InputError`.

wrong: answers that differ. lost: named conversations that were read again from an earlier point than their last answer.
Writes results/soak-MODEL.json: counts, errors by type, latencies by percentile, resident memory and its slope over the
second half of the run, handles and threads before and after.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import resident, trimmed_resident, write
from benchmarks.reliability.resources import megabytes_per_hour, open_resources, percentiles
from benchmarks.reliability.scripts import Conversation, Script, make_scripts, single_thread_answers
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.errors import DeadlineExceededError, InputError, ZSMergeError
from zsmerge_llm.testing import tiny_llm
from zsmerge_llm.types import Usage

CLOSED = "closed"
"""Part of the message of the `InputError` of a request whose LLM was closed."""


class Soak:
    """The model that all threads talk to, and what came of it.

    Args:
        start: makes an LLM on the folder that it always has.
        answered: scripts with the answers of a single thread.
    """

    def __init__(self, start: Callable[[], LLM], answered: Sequence[tuple[Script, list[str]]]) -> None:
        self.answered = answered
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.lost: list[dict[str, Any]] = []
        self.latencies: dict[str, list[float]] = {"turn": [], "first piece": []}
        self.samples: list[tuple[float, int, int, int]] = []
        self.trimmed: list[int] = []
        self.over = threading.Event()
        self._start = start
        self._llm = start()
        self._num_starts = 1
        self._running = 0
        self._numbers = iter(range(10**9))
        self._changed = threading.Condition()
        self._restarting = False

    # -- the model ---------------------------------------------------------------------------------------------------

    @contextmanager
    def request(self) -> Iterator[LLM]:
        """Yield the LLM for one request; wait while it is started again."""
        with self._changed:
            self._changed.wait_for(lambda: not self._restarting)
            self._running += 1
            llm = self._llm
        try:
            yield llm
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def restart(self, abrupt: bool) -> None:
        """Close the LLM, while requests run (`abrupt`) or between them, and start it again on its folder."""
        with self._changed:
            self._restarting = True
            if not abrupt:
                self._changed.wait_for(lambda: not self._running)
        self._llm.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            self._llm = self._start()
            self._num_starts += 1
            self._restarting = False
            self._changed.notify_all()
        self.counts["restarts while requests ran" if abrupt else "restarts"] += 1

    def close(self) -> None:
        self._llm.close()

    def observe(self) -> None:
        """Record resident memory, handles, threads and how many conversations are on disk."""
        with self.request() as llm:
            on_disk = sum(not info.in_memory for info in llm.store)
        self.counts["most on disk"] = max(self.counts["most on disk"], on_disk)
        self.samples.append((time.monotonic(), resident(), *open_resources()))

    # -- the work of a thread ------------------------------------------------------------------------------------------

    def talk(self, seed: int, conversations: int = 3) -> None:
        """Go on with some conversations by turns until the time is over."""
        choices = random.Random(seed)
        talks = [self._begin(choices) for _ in range(conversations)]
        while not self.over.is_set():
            at = choices.randrange(len(talks))
            act = choices.choices((self.ask, self.drop, self.repeat, self.fork), (8, 2, 1, 1))[0]
            talks[at].acts.append(f"{act.__name__} after {self._num_starts} starts")
            try:
                goes_on = act(talks[at], choices)
            except Exception as error:  # counted by its type
                talks[at].acts[-1] += f": {type(error).__name__}"
                goes_on = self._count(error) and talks[at].name is not None  # else it may be read again unseen
            if not goes_on or talks[at].is_over:
                self._remove(talks[at])
                talks[at] = self._begin(choices)

    def ask(self, talk: Conversation, choices: random.Random) -> bool:
        """Take the next turn; return whether it could go on from the last one."""
        started, first, text, usage = time.perf_counter(), 0.0, "", None
        with self.request() as llm:
            for chunk in self._stream(llm, talk):
                first = first or time.perf_counter() - started
                text, usage = text + chunk.text, chunk.usage
        assert usage is not None
        self.latencies["turn"].append(time.perf_counter() - started)
        self.latencies["first piece"].append(first)
        return self._compare(talk, text, usage)

    def drop(self, talk: Conversation, choices: random.Random) -> bool:
        """Begin the next turn and give it up, by its event, by closing the stream, or by its time."""
        event, how = threading.Event(), 0 if talk.name is None else choices.randrange(3)
        self.counts["cancelled"] += 1
        with self.request() as llm:
            if how == 0:
                chunks = list(self._stream(llm, talk, cancel=event, progress=lambda *_: event.set()))
                if chunks[-1].finish_reason == "cancelled":  # else there was nothing to read any more
                    return self._goes_on(talk, chunks[-1].usage)
            elif how == 1:
                stream = self._stream(llm, talk)
                chunks = [next(stream)]
                stream.close()
            else:
                chunks = list(self._stream(llm, talk, timeout=choices.uniform(0.001, 0.1)))
        if chunks[-1].usage is None:
            return True
        self.counts["answered before they were given up"] += 1
        return self._compare(talk, "".join(chunk.text for chunk in chunks), chunks[-1].usage)

    def repeat(self, talk: Conversation, choices: random.Random) -> bool:
        """Take the last turn again."""
        if talk.repeatable:
            talk.points.pop()
            talk.repeatable = False
            self.counts["regenerated"] += 1
        return self.ask(talk, choices)

    def fork(self, talk: Conversation, choices: random.Random) -> bool:
        """Take the next turn in a fork, which is removed then."""
        if talk.name is None or not talk.turn:
            return self.ask(talk, choices)
        branch = talk.branch(f"branch {next(self._numbers)}")
        with self.request() as llm:
            llm.add_session(llm.session(f"{talk.namespace}/{talk.name}").fork(f"{talk.namespace}/{branch.name}"))
        self.counts["forks"] += 1
        self.ask(branch, choices)
        self._remove(branch)
        return True

    def _begin(self, choices: random.Random) -> Conversation:
        script, answers = choices.choice(self.answered)
        number = next(self._numbers)
        self.counts["conversations"] += 1
        return Conversation(script, answers, f"user {number}", "talk" if number % 4 else None)

    def _stream(self, llm: LLM, talk: Conversation, **settings: Any) -> Any:
        wanted = {"sampling": talk.script.sampling, "session": talk.name, "namespace": talk.namespace, **settings}
        return llm.stream(talk.messages(), **wanted)

    def _goes_on(self, talk: Conversation, usage: Usage) -> bool:
        """Return whether a turn read no more than what followed the last answer; else another answer may follow."""
        if usage.cached_tokens < talk.points[-1]:
            self.counts["read again, without a name" if talk.name is None else "lost"] += 1
            if talk.name is not None:
                read = {"cached": usage.cached_tokens, "last answer": talk.points[-1], "reuse": usage.reuse}
                self.lost.append({"turn": talk.turn, **read, "acts": talk.acts})
            return False
        return True

    def _compare(self, talk: Conversation, text: str, usage: Usage) -> bool:
        if not self._goes_on(talk, usage):
            return False
        expected = talk.answers[talk.turn]
        self.counts["compared"] += 1
        if text != expected:
            self.counts["wrong"] += 1
            self.wrong.append({"turn": talk.turn, "name": talk.name, "reuse": usage.reuse, "text": [text, expected]})
        talk.points.append(usage.prompt_tokens)
        talk.repeatable = True
        return True

    def _count(self, error: Exception) -> bool:
        """Count an error by its type; those that are none of ours, or should not have been, as such too."""
        name = type(error).__name__
        expected = isinstance(error, DeadlineExceededError) or (isinstance(error, InputError) and CLOSED in str(error))
        self.errors[name if expected else f"unexpected {name}: {error}"] += 1
        self.counts["other types"] += not isinstance(error, ZSMergeError)
        self.counts["unexpected errors"] += not expected
        return expected

    def _remove(self, talk: Conversation) -> None:
        if talk.name is None:
            return
        try:
            with self.request() as llm:
                name = f"{talk.namespace}/{talk.name}"
                if name in llm.store:
                    llm.store.remove(name)
        except Exception as error:  # counted by its type
            self._count(error)


def run(soak: Soak, threads: int, seconds: float, restart_seconds: float) -> None:
    """Let the threads talk; meanwhile restart and observe."""
    workers = [threading.Thread(target=soak.talk, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    began, next_restart, abrupt = time.monotonic(), time.monotonic() + restart_seconds, False
    half, ends = began + seconds / 2, began + seconds
    try:
        while time.monotonic() < ends and all(worker.is_alive() for worker in workers):
            time.sleep(min(1.0, max(0.0, ends - time.monotonic())))
            soak.observe()
            if time.monotonic() > half:
                half = ends
                soak.trimmed.append(trimmed_resident())
            if time.monotonic() > next_restart:
                soak.restart(abrupt)
                next_restart, abrupt = time.monotonic() + restart_seconds, not abrupt
    finally:
        soak.over.set()
        for worker in workers:
            worker.join()
        soak.trimmed.append(trimmed_resident())


def measure(
    make: Callable[..., LLM],
    threads: int,
    seconds: float,
    restart_seconds: float,
    memory: int = 24,
    scripts: int = 24,
) -> dict[str, Any]:
    """Soak an LLM in a temporary folder, and return what came of it.

    Args:
        make: called with settings of `LLM`.
        memory: how many caches of conversations `session_memory` has room for.
        scripts: how many different conversations there are.
    """
    with make() as llm:
        answered = [(script, single_thread_answers(llm, script)) for script in make_scripts(scripts)]
        cache_nbytes = llm.engine.new_cache().nbytes
    del llm
    gc.collect()
    before, resident_before = open_resources(), resident()
    with tempfile.TemporaryDirectory() as folder:
        start = partial(make, sessions_dir=folder, session_memory=memory * cache_nbytes)
        soak = Soak(start, answered)
        run(soak, threads, seconds, restart_seconds)
        soak.close()
        leftovers = [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]
    samples, counts, errors, latencies = soak.samples, soak.counts, soak.errors, soak.latencies
    wrong, lost = soak.wrong, soak.lost
    trimmed = soak.trimmed
    del soak, start
    gc.collect()
    after = open_resources()
    return {
        **{"seconds": seconds, "threads": threads, "room for conversations": memory},
        "counts": {name: counts[name] for name in ("compared", "wrong", "lost", "other types", "unexpected errors")}
        | dict(counts),
        "errors": dict(errors),
        "wrong": wrong[:20],
        "lost": lost[:20],
        "latency_ms": {name: percentiles(each) for name, each in latencies.items()},
        "resident_mb": {
            **{"before": resident_before / 1e6, "at_half": samples[len(samples) // 2][1] / 1e6},
            **{"trimmed_at_half": trimmed[0] / 1e6, "trimmed_at_the_end": trimmed[-1] / 1e6},
            **{"at_the_end": samples[-1][1] / 1e6, "slope_per_hour": megabytes_per_hour(samples)},
        },
        "handles": {"before": before[0], "most": max(each[2] for each in samples), "after": after[0]},
        "native_threads": {"before": before[1], "most": max(each[3] for each in samples), "after": after[1]},
        "leftovers": leftovers,
    }


def make_llm(model: str, **settings: Any) -> LLM:
    """Return an LLM of a real model, or of a random one of two layers ("tiny"), with a cache that overflows."""
    if model == "tiny":
        cache = CacheConfig(slots=192, recent=32, stage=32, observation_window=8)
        return tiny_llm(cache=cache, retrieval_tokens=0, compile=False, **settings)
    return LLM(model, cache=CacheConfig(slots=256), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help='"tiny": a random one of two layers')
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--memory", type=int, default=24, help="conversations that session_memory has room for")
    parser.add_argument("--restart", type=float, default=20.0, help="seconds between two restarts")
    arguments = parser.parse_args()
    found = measure(
        partial(make_llm, arguments.model),
        arguments.threads,
        60 * arguments.minutes,
        arguments.restart,
        arguments.memory,
    )
    name = Path(arguments.model).stem
    print(json.dumps(found, indent=1))
    print(write(f"soak-{name}", {"model": name, **found}))


if __name__ == "__main__":
    main()
