"""benchmarks/speed/peers.py without its peers: the order of the processes, medians, ratios, errors, and our own row."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import make_results
from benchmarks.common import provenance
from benchmarks.speed import peer_process, peers
from benchmarks.speed.peer_systems import SYSTEMS, OnToken, Setting

RATES = {"zsmerge bf16": 30.0, "zsmerge int4": 60.0, "llama.cpp q4": 40.0, "transformers bf16": 10.0}


class Counting:
    """A system whose tokens are letters and whose answers cost nothing."""

    packages = ("torch",)
    asked: list[int] = []  # noqa: RUF012 - each test begins with a new one

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        self.asked.append(len(ids))
        for _ in range(tokens):
            if not on_token():
                return

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        assert len({len(prompt) for prompt in prompts}) == 1
        self.asked.append(len(prompts))
        return len(prompts) * tokens


def options(tmp_path: Path, **changed: Any) -> argparse.Namespace:
    made = {"model": tmp_path, "formats": ["bf16", "int4"], "llama_cpp": ["q4=m.gguf"], "openvino": [], "systems": None}
    how = {"repeats": 2, "minutes": 1.0, "threads": 1, "text": None, "tokens": 4}
    return argparse.Namespace(**{**made, **how, **changed})


def fake_process(job: dict[str, Any]) -> dict[str, Any]:
    name = f"{job['kind']} {job['setting']['format']}"
    if name not in RATES:
        return {"error": "RuntimeError: no kernels here"}
    rate = RATES[name]
    figures = {"first": 1 / rate, "last": 32 / rate, "decode": rate, "prefill": 10 * rate, "all": 2 * rate}
    return {"figures": figures, "versions": {"package": "1"}}


def test_every_row_of_every_system_runs_in_turns_and_ratios_are_against_the_best_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "in_a_process", fake_process)
    given = options(tmp_path)
    result = peers.measure(peers.chosen_peers(given), ["cold", "4096", "together"], given)
    assert result["rounds"] == 2
    assert result["figures"]["decoding behind 4096"]["zsmerge int4"] == {"median": 60.0, "runs": [60.0, 60.0]}
    assert set(result["figures"]["8 at once"]) == set(RATES)
    ahead = result["over_best_peer"]
    assert ahead["reading 4096"] == {"peer": "llama.cpp q4", "zsmerge bf16": 0.75, "zsmerge int4": 1.5}
    assert ahead["token 32, s"]["zsmerge int4"] == pytest.approx(1.5), "of seconds, fewer are better"
    assert result["errors"] == {"transformers continuous bf16": {"together": "RuntimeError: no kernels here"}}
    shown = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("cold")]
    assert shown == [f"cold, {name}" for name in RATES] * 2


def test_no_round_begins_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "in_a_process", fake_process)
    given = options(tmp_path, repeats=5, minutes=0.0)
    assert peers.measure(peers.chosen_peers(given), ["cold"], given)["rounds"] == 1


def test_systems_can_be_chosen_by_kind_or_by_name(tmp_path: Path) -> None:
    names = [peer.name for peer in peers.chosen_peers(options(tmp_path, systems=["zsmerge int4", "llama.cpp"]))]
    assert names == ["zsmerge int4", "llama.cpp q4"]


@pytest.mark.parametrize("row", ["cold", "300", "together"])
def test_a_process_measures_a_row(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "counting", Counting)
    monkeypatch.setattr(Counting, "asked", [])
    job = peers.job(peers.Peer("counting", "bf16", ""), row, 1, "A text. ", 8)
    result = peer_process.run({**json.loads(json.dumps(job)), "started": 0.0})
    assert all(figure > 0 for figure in result["figures"].values()), result
    assert set(result["figures"]) == set(peers.figure_names(row)), result
    assert Counting.asked[-1] == {"cold": len(peer_process.PROMPT), "300": 300, "together": peers.CONVERSATIONS}[row]


def test_what_a_peer_cannot_do_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    job = peers.job(peers.Peer("openvino", "int8", "/no/such/folder"), "cold", 1, "", 8)
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    assert "openvino_genai" in peer_process.run(job)["error"]


def test_a_process_that_dies_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.exit('no such instruction')")
    monkeypatch.setattr(peers, "PROCESS", script)
    job = peers.job(peers.Peer("zsmerge", "bf16", ""), "cold", 1, "", 8)
    assert peers.in_a_process(job) == {"error": "exit status 1: no such instruction"}


def test_the_results_page_has_a_row_for_each_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "in_a_process", fake_process)
    given = options(tmp_path)
    result = peers.measure(peers.chosen_peers(given), ["4096", "together"], given)
    (tmp_path / "peers-m.json").write_text(json.dumps({**provenance(), "model": "m", **result}))
    page = make_results.page(tmp_path)
    assert "| m | zsmerge int4 |  |  |  | 60.0 | 600.0 | 120.0 |  |" in page
    assert set(make_results.PEER_FIGURES) >= set(result["figures"])
