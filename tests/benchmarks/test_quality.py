"""benchmarks/quality/run.py on tiny random models: equal bytes, what each policy keeps, scoring, resuming, figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.policies import POLICIES, ModelFacts
from benchmarks.policies.attention_based import pyramid
from benchmarks.policies.base import ScoredWhenFull
from benchmarks.policies.key_based import KeyDiff, NestedKV
from benchmarks.policies.least_squares_merging import LeastSquaresMerging, attention_mass_by_query
from benchmarks.quality import evaluator, report, run, tasks
from benchmarks.quality.ask import ask
from benchmarks.quality.rouge import rouge
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.templates import template
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.slots import AttentionInputs

BOUNDED = sorted(name for name, policy in POLICIES.items() if policy.config(1024).slots is not None)
RECORD: dict[str, Any] = {
    "id": "d1",
    "file": "toy",
    "context": "The cat is called Bishop. " * 30 + "\n\n" + "The dog sleeps. " * 30,
    "qa": [{"q": "What is the cat called?", "a": ["Bishop"], "depth": 0.1}, {"q": "Who sleeps?", "a": ["The dog"]}],
}

LONG = {**RECORD, "context": RECORD["context"] * 2}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("qwen2"))


@pytest.fixture(scope="module")
def bench() -> evaluator.Evaluator:
    llm = make_llm(cache=LARGE_CACHE)
    return evaluator.Evaluator(llm.engine, template("smollm2"))


@pytest.mark.parametrize("family", ["qwen2", "mistral-sliding", "gemma2-softcap", "gpt_oss-sinks"])
def test_asking_together_scores_as_asking_one_by_one(family: str) -> None:
    engine = Engine(tiny_model(family), POLICIES["paper"].config(200))
    cache = engine.new_cache()
    engine.read(cache, tokens(700))
    asked = [(tokens(5 + n, seed=n), tokens(3 + n, seed=9 + n)) for n in range(3)]
    before = [layer.keys.clone() for layer in cache.layers]
    for (question, answer), score in zip(asked, ask(engine, cache, asked), strict=True):
        alone = cache.clone()
        engine.read(alone, question)
        assert score.nll == pytest.approx(-engine.logprobs(alone, answer).mean().item(), abs=1e-3)
        assert score.tokens == len(answer)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers, strict=True))


def test_questions_beyond_the_trained_window_get_positions_that_the_model_knows() -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 512
    engine = Engine(model, POLICIES["streaming"].config(64))
    cache = engine.new_cache()
    engine.read(cache, tokens(1500))
    assert cache.position_maps[0].offset > 0, "positions were remapped"
    asked = [(tokens(5, seed=1), tokens(4, seed=2)), (tokens(6, seed=3), tokens(3, seed=4))]
    for (question, answer), score in zip(asked, ask(engine, cache, asked), strict=True):
        alone = cache.clone()
        engine.read(alone, question)
        assert score.nll == pytest.approx(-engine.logprobs(alone, answer).mean().item(), abs=1e-3)


def test_an_answer_is_exact_iff_greedy_decoding_gives_it(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(50))
    question = tokens(4, seed=1)
    answer = list(engine.stream(cache.clone(), question))[:3]
    other = [*answer[:-1], answer[-1] % 90 + 3]
    right, wrong = ask(engine, cache, [(question, answer), (question, other)])
    assert right.exact
    assert not wrong.exact


@pytest.mark.parametrize("name", BOUNDED)
def test_every_policy_reads_within_the_same_bytes(name: str, engine: Engine) -> None:
    policy, budget = POLICIES[name], evaluator.plain_bytes(engine, 200)
    slots = policy.slots_for(engine.specs, budget)
    cache = policy.new_cache(engine.specs, slots, ModelFacts.of(engine))
    engine.chunk = policy.chunk or 700
    engine.read(cache, tokens(700), probe=tokens(5, seed=1) if policy.probe else None)
    logits = cache.logits
    held, cache.logits = cache.nbytes, None
    slot = engine.specs[0].kv_heads * len(engine.specs) * 100
    assert budget - slot * 4 < cache.nbytes <= budget, "as much as fits, and no more"
    assert held == cache.nbytes + logits.nbytes
    for layer in cache.layers:
        assert max(layer.num_filled) <= layer.capacity
        seen = layer.multiplicity.sum(-1) + layer.dropped
        assert torch.equal(seen, torch.full_like(seen, 700.0)), "every token is accounted for"
    assert all(torch.isfinite(logits).flatten())


@pytest.mark.parametrize("name", ["keydiff", "nestedkv", "knorm", "tova", "snapkv", "expected", "cam", "lm-infinite"])
def test_policies_differ_from_heavy_hitters(name: str, engine: Engine) -> None:
    def kept(which: str) -> list[Any]:
        cache = POLICIES[which].new_cache(engine.specs, 200, ModelFacts.of(engine))
        engine.chunk = 350
        engine.read(cache, tokens(700), probe=tokens(5, seed=1) if POLICIES[which].probe else None)
        return [cache.layers[0].position[0, 0, :200].tolist(), cache.layers[0].values[0, 0, :200].sum().item()]

    assert kept(name) != kept("h2o")


def test_nestedkv_keeps_a_key_that_is_unlike_its_block_alone(engine: Engine) -> None:
    slots, odd = 512, 100
    cache = POLICIES["nestedkv"].new_cache(engine.specs, slots, ModelFacts.of(engine))
    layer = cache.layers[0]
    shape = layer.keys[:, :, :slots].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    noise[:, :, : slots // 2, 0] += 1.0
    noise[:, :, slots // 2 :, 1] += 1.0
    noise[:, :, odd] = noise[:, :, slots // 2]  # as all of the second half
    layer.keys[:, :, :slots] = noise
    layer.multiplicity[:, :, :slots] = 1

    def higher(policy: ScoredWhenFull) -> torch.Tensor:
        scores = policy.scores(cast(KVView, layer), cast(AttentionInputs, None))
        return (scores > scores[..., odd, None]).sum(-1)

    assert higher(NestedKV()).max() < slots // 20, "those unlike the whole text are kept, too"
    assert higher(KeyDiff()).min() > slots // 10, "half of all keys are like it"


def test_lm_infinite_puts_no_key_further_away_than_its_slots(engine: Engine) -> None:
    cache = POLICIES["lm-infinite"].new_cache(engine.specs, 200, ModelFacts.of(engine))
    exact = engine.new_cache(POLICIES["full"].config(0))
    engine.chunk = 350
    for each in (cache, exact):
        engine.read(each, tokens(700))
    rotation = ModelFacts.of(engine).rotation
    assert rotation is not None
    expected = rotation.rotate(exact.layers[0].keys[:, :, :4], torch.tensor([500.0]))
    assert torch.allclose(cache.layers[0].keys[:, :, :4], expected, atol=1e-3)


def test_least_squares_merging_answers_its_queries_better_than_eviction(engine: Engine) -> None:
    fitted: list[torch.Tensor] = []

    class Recording(LeastSquaresMerging):
        def fitted_queries(self, inputs: AttentionInputs) -> torch.Tensor:
            fitted.append(super().fitted_queries(inputs))
            return fitted[-1]

    merging, evicting = POLICIES["least-squares-merging"], POLICIES["value-weighted-mean"]
    policies = {"merging": replace(merging, eviction=Recording), "evicting": evicting}
    caches = {name: each.new_cache(engine.specs, 200, ModelFacts.of(engine)) for name, each in policies.items()}
    exact = engine.new_cache(POLICIES["full"].config(0))
    engine.chunk = 700
    for cache in (exact, *caches.values()):
        engine.read(cache, tokens(700), probe=tokens(5, seed=1))

    def outputs(cache: Cache) -> torch.Tensor:
        view = cache.layers[0].view()
        return attention_mass_by_query(view, fitted[0]) @ view.values

    errors = {name: (outputs(cache) - outputs(exact)).square().mean().item() for name, cache in caches.items()}
    assert errors["merging"] < 0.5 * errors["evicting"]
    position = [cache.layers[0].position[:, :, :200] for cache in caches.values()]
    assert torch.equal(*position), "the same tokens stay"


def test_a_pyramid_keeps_the_total() -> None:
    budgets = pyramid(512, 24)
    assert sum(budgets) == 512 * 24
    assert budgets == sorted(budgets, reverse=True)
    assert min(budgets) == 96


def test_layers_get_the_budgets_measured_on_the_model(bench: evaluator.Evaluator) -> None:
    weights = bench.layer_budgets
    assert len(weights) == len(bench.engine.specs)
    assert sum(weights) / len(weights) == pytest.approx(1)
    cache = bench.new_cache(POLICIES["value-weighted-max"], evaluator.Budget(300), 0)
    slots = [layer.config.slots for layer in cache.layers]
    assert sum(slots) == pytest.approx(cache.config.slots * len(slots), abs=1)
    assert slots == [pytest.approx(cache.config.slots * weight, abs=1) for weight in weights]


def test_a_question_behind_the_generic_probe_changes_what_is_kept(bench: evaluator.Evaluator) -> None:
    read = tasks.item(bench.template, RECORD, 1)
    both, generic = (
        bench.fill(POLICIES[name], evaluator.Budget(96), read, read.questions[0])
        for name in ("question-and-generic-max", "value-weighted-mean")
    )
    assert both.seen == generic.seen
    kept = [[set(layer.position[0, 0].tolist()) for layer in cache.layers] for cache in (both, generic)]
    assert kept[0] != kept[1]


def test_follow_ups_are_asked_after_each_known_question(bench: evaluator.Evaluator) -> None:
    read = tasks.item(bench.template, RECORD, 5)
    budget = evaluator.Budget.parse("30%")
    rows = list(bench.known(POLICIES["zsmerge-question"], budget, read))
    assert [row.get("setting") for row in rows] == [None, "followup", "followup"] * 2
    assert {row["question"] for row in rows} == {0, 1}
    assert all(row["cache_bytes"] > 0 and row["nll"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "expected"])
def test_a_shared_prefill_equals_one_for_each_question(name: str, bench: evaluator.Evaluator) -> None:
    read, policy = tasks.item(bench.template, LONG, 2), POLICIES[name]
    budget = evaluator.Budget(100)
    begun = bench.read_shared(policy, budget, read)
    assert begun is not None
    assert 0 < begun.seen < read.tokens
    before = begun.layers[0].keys.clone()
    for asked in read.questions:
        cache = bench.fill(policy, budget, read, asked, begun)
        alone = bench.new_cache(policy, budget, read.tokens)
        ids = [*read.parts[0][0], *asked.asking[:-1]]
        bench.read(alone, policy, ids[: begun.seen], [])
        bench.read(alone, policy, ids[begun.seen :], [])
        assert cache.seen == alone.seen == len(ids)
        assert torch.equal(cache.layers[0].keys, alone.layers[0].keys)
    assert torch.equal(begun.layers[0].keys, before), "each continues a copy"
    assert bench.read_shared(POLICIES["zsmerge-question"], budget, read) is None, (
        "its probe is another for each question"
    )


def test_joined_documents_are_numbered_throughout_and_keep_their_questions_depths(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    lines = [
        {"id": f"r{n}", "context": f"Document [1] The sea.\n\nDocument [2] Word{n}.", "qa": [{"q": "?", "depth": 0.5}]}
        for n in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = tasks.load([path], None, join=2)
    assert (first["id"], first["file"], second["id"]) == ("r0+r1", "passagesx2", "r2+r3")
    assert first["context"].split("\n\n")[2:] == ["Document [3] The sea.", "Document [4] Word1."]
    assert [asked["depth"] for asked in first["qa"]] == [pytest.approx(0.25, abs=0.02), pytest.approx(0.75, abs=0.02)]
    assert len(list(tasks.load([path], 1, join=2))) == 1


def test_the_peak_of_prefill_grows_with_the_text_only_where_the_full_cache_comes_first(
    bench: evaluator.Evaluator,
) -> None:
    budget, peaks = evaluator.Budget(96), {}
    for name in ("h2o", "h2o-whole", "full"):
        for record in (RECORD, LONG):
            read = tasks.item(bench.template, record, 1)
            (row,) = bench.unknown(POLICIES[name], budget, read)
            peaks[name, read.tokens] = row["reading_bytes"] - row["cache_bytes"] * (name != "full")
    short, long = sorted({tokens for _, tokens in peaks})
    assert peaks["h2o-whole", long] == peaks["full", long] > 1.5 * peaks["full", short]
    assert peaks["h2o", long] < 1.2 * peaks["h2o", short] < peaks["full", short]


def test_a_chat_is_read_message_by_message(bench: evaluator.Evaluator) -> None:
    said = [{"role": ("user", "assistant")[n % 2], "content": f"Message {n} about the sea."} for n in range(9)]
    record = {"id": "c", "file": "toy", "messages": said, "qa": [{"q": "What about?", "a": ["the sea"], "depth": 0.0}]}
    read = tasks.item(bench.template, record, 3)
    whole = bench.template.render([*said, {"role": "user", "content": "What about?"}])
    ids = [token for part, _ in read.parts for token in part] + read.questions[0].asking
    assert bench.template.tokenizer.decode(ids) == whole
    assert [bool(probe) for _, probe in read.parts] == [True, False] * 4 + [True]
    (row,) = bench.unknown(POLICIES["zsmerge-question"], evaluator.Budget(96), read)
    assert row["tokens_read"] == read.tokens


def test_needles_are_hidden_at_their_depths(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {n}. It was a quiet day at sea." for n in range(4000)))
    for record in tasks.needles(book, template("smollm2"), 2, 600):
        for asked in record["qa"]:
            at = record["context"].index(asked["a"][0]) / len(record["context"])
            assert at == pytest.approx(asked["depth"], abs=0.12)


def test_an_answer_continues_its_opening() -> None:
    asked = {**RECORD["qa"][0], "opening": "The cat is called"}
    reads = [tasks.item(template("smollm2"), {**RECORD, "qa": [each]}, 1) for each in (RECORD["qa"][0], asked)]
    plain, opened = (read.questions[0] for read in reads)
    said = template("smollm2").tokenizer.decode(opened.asking[len(plain.asking) :] + opened.answer)
    assert said == "The cat is called Bishop"
    assert opened.probe == plain.probe, "what the model says is not what it was asked"


def test_a_restart_skips_what_is_done_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "quality-x.jsonl"
    line = {"policy": "h2o", "budget": "512", "setting": "followup", "task": "t", "item": "1", "asked": 3}
    path.write_text(json.dumps(line) + '\n{"policy": "sn')
    assert run.done(path) == {("h2o", "512", "known", "t", "1", 3)}
    assert path.read_text() == json.dumps(line) + "\n"


def test_intervals_hold_the_mean_and_shrink_with_the_noise() -> None:
    low, high = report.interval([0.5, 1.5] * 50)
    assert low < 1.0 < high
    assert report.interval([1.0] * 10) == (1.0, 1.0)


def test_the_report_compares_the_same_questions(tmp_path: Path) -> None:
    path = tmp_path / "quality-x.jsonl"
    facts = {"setting": "unknown", "task": "t", "item": "1", "exact": True, "cache_bytes": 1, "reading_bytes": 1}
    rows = [("ours", "512", 0, 1.0), ("ours", "512", 1, 2.0), ("h2o", "512", 1, 3.0), ("full", "full", 1, 0.5)]
    lines = [{**facts, "policy": p, "budget": b, "question": q, "nll": n, "depth": 0.5} for p, b, q, n in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.report(path, ["not measured", "ours"], "toy")
    assert "| h2o | 1 (1) | 3.00 | 6.00 | 100% | +1.00 [+1.00, +1.00]" in text
    assert "| full | 1 (1) | 0.50 | 1.00 | 100% | -1.50" in text
    assert "| ours | 2 (1) | 1.50 | 4.00 | 100% |  |" in text, "against full on the question that both have"
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert list(tables) == ["t / unknown / 512"]
    assert path.with_name("quality-x-depth.png").stat().st_size > 0


def test_a_full_cache_that_was_asked_once_for_all_questions_stands_beside_known_ones() -> None:
    facts = {"task": "t", "item": "1", "question": 0}
    full = {**facts, "policy": "full", "budget": "full", "setting": "unknown"}
    ours = {**facts, "policy": "ours", "budget": "512", "setting": "known"}
    assert set(report.groups([ours, full])["t", "known", "512"]) == {"ours", "full"}


def test_rouge_counts_common_words_pairs_and_subsequences() -> None:
    figures = rouge("the cat sat", "The cat is sat.")
    assert figures == {
        "rouge1": pytest.approx(6 / 7, abs=1e-3),
        "rouge2": 0.4,
        "rougeL": pytest.approx(6 / 7, abs=1e-3),
    }
    assert rouge("", "a") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
