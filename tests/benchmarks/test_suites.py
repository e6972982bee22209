"""Suites of benchmarks/quality: what stands in their texts, how answers are scored, who is compared, figures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import (
    agents,
    answers,
    dialogues,
    product,
    ruler,
    run,
    scbench,
    structured_documents,
    suite_report,
    suite_table,
    tasks,
    updates,
)
from benchmarks.quality.contenders import contenders
from benchmarks.quality.evaluator import Budget, Evaluator
from benchmarks.quality.product import Product
from benchmarks.quality.sources import Record, Sources
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.templates import template

TOKENS = 3000
GENERATED = [(suite, name) for suite in (ruler, scbench, structured_documents, updates) for name in suite.TASKS]


def count_words(text: str) -> int:
    return len(text.split()) * 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A book of random sentences, and documents with a question in each paragraph."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 8))) for _ in range(600)]
    sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(2000)]
    folder.joinpath("moby_dick.txt").write_text(" ".join(sentences))
    for name in ("xquad_multi_2k", "xquad_multi_4k", "nq_multidoc_10"):
        lines = [document(draw, f"{name}-{number}") for number in range(10)]
        folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Sources(folder, count_words)


def document(draw: random.Random, name: str) -> Record:
    towers = [f"{name}-{number}" for number in range(6)]
    texts = [f"The tower {tower} is {draw.randint(100, 999)} feet high. " + "It is old. " * 12 for tower in towers]
    whole = "\n\n".join(texts)
    qa = [
        {
            "q": f"How high is {tower}?",
            "a": [text.split(" is ")[1].split(" high")[0]],
            "depth": whole.index(tower) / len(whole),
        }
        for tower, text in zip(towers, texts, strict=True)
    ]
    return {"id": name, "task": "toy", "context": whole, "qa": qa}


def generate(suite: Any, name: str, sources: Sources, seed: str = "0") -> Record:
    record: Record = suite.TASKS[name](sources, seed, TOKENS, 3)
    return record


@pytest.mark.parametrize(("suite", "name"), GENERATED)
def test_a_generated_text_has_the_length_that_was_asked_for(suite: Any, name: str, sources: Sources) -> None:
    record = generate(suite, name, sources)
    length = count_words(record["context"]) + max(count_words(asked["q"]) for asked in record["qa"])
    assert 0.95 * TOKENS <= length <= TOKENS


@pytest.mark.parametrize(("suite", "name"), GENERATED)
def test_a_seed_gives_the_same_text_again_and_another_seed_another_one(suite: Any, name: str, sources: Sources) -> None:
    assert generate(suite, name, sources) == generate(suite, name, sources)
    assert generate(suite, name, sources) != generate(suite, name, sources, seed="1")


@pytest.mark.parametrize(("suite", "name"), [each for each in GENERATED if each[1] != "many_shot"])
def test_every_part_of_an_answer_stands_in_the_text_and_not_in_the_question(
    suite: Any, name: str, sources: Sources
) -> None:
    record = generate(suite, name, sources)
    for asked in record["qa"]:
        assert all(part in record["context"] for part in asked["a"][:1] + asked["a"] * (asked["metric"] == "all"))
        assert not any(part in asked["q"] + asked["opening"] for part in asked["a"])
        assert answers.METRICS[asked["metric"]](asked.get("gold", asked["a"][0]), asked["a"]) == 1


@pytest.mark.parametrize("name", list(ruler.NEEDLES))
def test_no_two_needles_are_alike_and_each_stands_near_its_depth(name: str, sources: Sources) -> None:
    record = generate(ruler, name, sources)
    parts = record["context"].split("One of the special magic ")[1:]
    told = [part.split(" is: ")[1].split(".")[0].split("\n")[0] for part in parts]
    assert len(set(told)) == len(told)
    for asked in record["qa"]:
        at = [record["context"].index(value) / len(record["context"]) for value in asked["a"]]
        assert sum(at) / len(at) == pytest.approx(asked["depth"], abs=0.12)


def test_ruler_has_its_thirteen_tasks(sources: Sources) -> None:
    found = list(ruler.records(sources, [TOKENS], 1, 2))
    assert [record["task"] for record in found] == list(ruler.TASKS)
    assert len(found) == 13
    assert {record["file"] for record in found} == {f"ruler-{TOKENS}"}


def test_a_chain_of_variables_stands_in_order(sources: Sources) -> None:
    record = generate(ruler, "vt", sources)
    (asked,) = record["qa"]
    places = [record["context"].index(f"VAR {name} =") for name in asked["a"]]
    assert places == sorted(places)
    assert len(places) == 5


def test_common_words_are_ten_times_as_frequent_as_the_others(sources: Sources) -> None:
    record = generate(ruler, "cwe", sources)
    listed = record["context"].rpartition("most often.\n")[2].split()[1::2]
    counts = {word: listed.count(word) for word in listed}
    (asked,) = record["qa"]
    assert {counts[word] for word in asked["a"]} == {30}
    assert {times for word, times in counts.items() if word not in asked["a"]} == {3}


def test_the_three_most_frequent_words_are_asked_for(sources: Sources) -> None:
    record = generate(ruler, "fwe", sources)
    words = [word for word in record["context"].partition("words. ")[2].split() if word != "..."]
    ranked = sorted(set(words), key=lambda word: -words.count(word))
    assert set(ranked[:3]) == set(record["qa"][0]["a"])


def test_beam_asks_for_the_facts_of_its_rubric(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("user", "Again"), ("assistant", "Hello"), ("user", "Open")]
    asked = {"q": "When?", "a": ["On March 29."], "kind": "update", "rubric": ["LLM response should state: March 29"]}
    record = {"id": "b", "turns": [{"role": role, "content": text} for role, text in turns], "qa": [asked]}
    (tmp_path / dialogues.BEAM_FILE).write_text(json.dumps(record) + "\n")
    (read,) = dialogues.beam(Sources(tmp_path, len))
    assert [(each["role"], each["content"]) for each in read["messages"]] == [
        ("user", "Hi\n\nAgain"),
        ("assistant", "Hello"),
    ]
    assert read["qa"][0]["a"] == ["March 29"]
    assert answers.METRICS["rubric"]("It is on the 29 March", ["March 29", "a sprint"]) == 0.5
    assert [len(each["qa"]) for each in dialogues.beam(Sources(tmp_path, len), kinds=["update"])] == [1]
    assert [len(each["qa"]) for each in dialogues.beam(Sources(tmp_path, len), kinds=["abstention"])] == [0]


def test_the_turns_behind_a_preference_begin_alike_however_many_they_are(tmp_path: Path) -> None:
    talks = [[{"role": ("user", "assistant")[n % 2], "content": f"{talk} {n}"} for n in range(4)] for talk in "abc"]
    (tmp_path / dialogues.FILLER_FILE).write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    preference = {"id": "p", "preference": "I like tea.", "question": "What to drink?", "options": ["Tea", "Coffee"]}
    (tmp_path / dialogues.PREFERENCES_FILE).write_text(json.dumps(preference) + "\n")
    near, far = dialogues.preferences(Sources(tmp_path, len), [2, 5], 1)
    assert (near["file"], len(near["messages"]), len(far["messages"])) == ("prefeval-2", 6, 12)
    assert far["messages"][:6] == near["messages"]
    assert near["messages"][0]["content"] == "I like tea."
    assert near["qa"][0]["options"][0] == "Tea", "the one that heeds the preference"
    assert [message["role"] for message in far["messages"]] == ["user", "assistant"] * 6


def test_one_conversation_may_begin_with_several_preferences(tmp_path: Path) -> None:
    (tmp_path / dialogues.FILLER_FILE).write_text(
        json.dumps([{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Yes"}]) + "\n"
    )
    lines = [{"id": str(n), "preference": f"I like {n}.", "question": f"{n}?", "options": ["a", "b"]} for n in range(4)]
    (tmp_path / dialogues.PREFERENCES_FILE).write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = list(dialogues.preferences(Sources(tmp_path, len), [1], 4, together=2))
    assert [len(record["qa"]) for record in found] == [2, 2]
    assert [len(record["messages"]) for record in found] == [6, 6]
    assert len({asked["q"] for record in found for asked in record["qa"]}) == 4


def test_an_agent_s_results_hold_the_answer_of_the_request_before_them(sources: Sources) -> None:
    made = list(agents.records(sources, [600], 3))
    assert [(each["task"], each["id"]) for each in made[::3]] == [("xquad", "xquad-0"), ("nq", "nq-0")]
    for record in made:
        request, *steps = record["messages"]
        (asked,) = record["qa"]
        results = "\n\n".join(step["content"] for step in steps[1::2])
        assert [step["role"] for step in steps] == ["assistant", "tool"] * (len(steps) // 2)
        assert request["content"].endswith(asked["q"])
        assert asked["a"][0] in results
        assert asked["a"][0] not in request["content"]
        assert 400 < count_words(results) <= 600


def test_f1_counts_common_words_without_articles_and_punctuation() -> None:
    assert answers.token_f1("The Eiffel Tower.", ["Eiffel tower", "x"]) == 1
    assert answers.token_f1("a tower", ["Eiffel tower"]) == pytest.approx(2 / 3)
    assert answers.token_f1("", ["Eiffel tower"]) == 0


# -- contenders on a tiny random model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Evaluator:
    return Evaluator(make_llm(cache=LARGE_CACHE).engine, template("smollm2"))


def read_item(bench: Evaluator, sources: Sources, name: str = "qa_1") -> tasks.Item:
    suite = ruler if name in ruler.TASKS else scbench
    record = next(iter(suite.records(sources, [700], 1, 2, tasks=[name])))
    return tasks.item(bench.template, record, 10)


NAMES = [
    "full",
    "bm25",
    "reconstruction",
    "truncate-retrieval",
    "streaming",
    "ours",
    "ours-cache-alone",
    "cache-alone-without-gate",
    "streaming-look-up",
]


CASES = [
    (name, setting)
    for name in NAMES
    for setting in ("unknown", "turns")
    if (name, setting) != ("reconstruction", "turns")
]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_each_contender_answers_each_question(name: str, setting: str, bench: Evaluator, sources: Sources) -> None:
    read = read_item(bench, sources)
    rows = list(getattr(contenders(bench)[name], setting)(Budget(120), read))
    assert [row["question"] for row in rows] == [0, 1]
    for row in rows:
        assert row["nll"] > 0
        assert 0 <= row["score"] <= 1
        assert row["cache_bytes"] > 0
        assert row["reading_bytes"] > 0


def test_the_library_and_a_full_cache_that_holds_all_answer_alike(bench: Evaluator, sources: Sources) -> None:
    read = read_item(bench, sources)
    rows = [list(contenders(bench)[name].unknown(Budget(8000), read)) for name in ("full", "ours")]
    for full, ours in zip(*rows, strict=True):
        assert ours["nll"] == pytest.approx(full["nll"], abs=1e-3)
        assert ours["generated"] == full["generated"]


def test_the_library_looks_up_what_its_cache_has_lost(bench: Evaluator, sources: Sources) -> None:
    record = next(iter(ruler.records(sources, [1600], 1, 2, tasks=["niah_multikey_1"])))
    read = tasks.item(bench.template, record, 2)
    for tokens in (1000, 0):
        rows = list(Product("ours", bench, retrieval_tokens=tokens).unknown(Budget(2000), read))
        assert [row["retrieved_tokens"] > 0 for row in rows] == [tokens > 0] * 2


def test_all_hold_the_same_bytes(bench: Evaluator, sources: Sources) -> None:
    read, known = read_item(bench, sources), contenders(bench)
    sizes = {name: next(iter(known[name].unknown(Budget(200), read)))["cache_bytes"] for name in ("ours", "streaming")}
    logits = 4 * bench.engine.vocab_size
    assert abs(sizes["ours"] - sizes["streaming"]) <= logits + 0.02 * sizes["streaming"]


def test_a_loop_of_tools_is_answered_behind_its_last_result(bench: Evaluator, sources: Sources) -> None:
    read = tasks.item(bench.template, next(agents.records(sources, [500], 1)), 1)
    rows = {name: next(iter(contenders(bench)[name].unknown(Budget(8000), read))) for name in ("full", "ours")}
    assert rows["ours"]["nll"] == pytest.approx(rows["full"]["nll"], abs=1e-3)
    (row,) = contenders(bench)["ours"].unknown(Budget(1000), read)
    assert row["retrieved_tokens"] > 0
    assert row["tokens_read"] < read.tokens  # what answers the last result is asked


def test_a_choice_is_right_where_its_first_option_is_the_likeliest(bench: Evaluator, sources: Sources) -> None:
    read = read_item(bench, sources, "many_shot")
    rows = list(contenders(bench)["full"].unknown(Budget(200), read))
    assert {row["score"] for row in rows} <= {0.0, 1.0}
    assert not any("generated" in row for row in rows)


def test_a_conversation_is_read_turn_by_turn(bench: Evaluator) -> None:
    said = [{"role": ("user", "assistant")[n % 2], "content": f"Message {n} about the sea."} for n in range(12)]
    asked = {"q": "What about?", "a": ["the sea"], "metric": "any"}
    record = {"id": "c", "file": "toy", "messages": said, "qa": [asked]}
    read = tasks.item(bench.template, record, 3)
    for name in ("ours", "bm25", "streaming"):
        (row,) = contenders(bench)[name].unknown(Budget(100), read)
        assert row["tokens_read"] >= read.tokens - 4
        assert 0 <= row["score"] <= 1


def test_each_turn_of_a_conversation_continues_the_one_before(bench: Evaluator) -> None:
    said = [{"role": ("user", "assistant")[n % 2], "content": f"Message {n} about the sea."} for n in range(6)]
    record = {"id": "c", "file": "toy", "messages": said, "qa": [{"q": "What about?", "a": ["the sea"]}]}
    read, runtime = tasks.item(bench.template, record, 1), Product("ours", bench).runtime(2000, read_ahead=False)
    cache = product.read_conversation(runtime, read)
    turn = product.begin(runtime, [*said, {"role": "user", "content": "What about?"}])
    assert (turn.reuse, turn.cache.seen) == ("continued", cache.seen)
    assert runtime.tokenizer.decode(turn.tokens[: cache.seen]) in bench.template.render(said)


# -- figures ---------------------------------------------------------------------------------------------------


def line(policy: str, text: int, question: int, nll: float, score: float, kind: str = "") -> dict[str, Any]:
    budget = "full" if policy == "full" else "512"
    key = {"policy": policy, "budget": budget, "setting": "unknown", "task": "t", "item": str(text), "asked": 2}
    costs = dict.fromkeys(("slots", "cache_bytes", "reading_bytes", "seconds", "tokens_read"), 1.0)
    return {**key, **costs, "kind": kind, "question": question, "nll": nll, "score": score, "f1": score, "exact": True}


def test_a_suite_is_compared_on_the_same_questions_with_intervals_over_texts(tmp_path: Path) -> None:
    path = tmp_path / "suite-x.jsonl"
    lines = [line("ours", text, asked, 1.0, 1.0) for text in range(4) for asked in range(2)]
    lines += [line("h2o", text, asked, 2.0 + text, 0.5) for text in range(3) for asked in range(2)]
    lines += [line("full", text, asked, 0.5, 1.0) for text in range(4) for asked in range(2)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = suite_report.report(path, "toy")
    assert "| h2o | 6 (3) | 0.50 [0.50, 0.50] | 0.50 | -0.50 [-0.50, -0.50]" in text
    cell = json.loads(path.with_suffix(".json").read_text())["cells"]["t / unknown / 512"]
    assert set(cell) == {"ours", "h2o", "full"}
    low, high = cell["h2o"]["gaps"]["nll"]["interval"]
    assert 1.0 <= low < cell["h2o"]["gaps"]["nll"]["mean"] < high <= 3.0


def test_kinds_count_alike_however_many_questions_they_have() -> None:
    own = {("a", "1", n): line("ours", 1, n, 0.0, 1.0) for n in range(9)} | {
        ("b", "1", 0): line("ours", 1, 0, 0.0, 0.0)
    }
    assert suite_report.mean(own, lambda each: each["score"]) == 0.5


def test_an_interval_over_kinds_of_one_text_each_is_not_empty() -> None:
    own = {(kind, "1", 0): line("ours", 1, 0, 0.0, score) for kind, score in (("a", 0.0), ("b", 1.0), ("c", 1.0))}
    low, high = suite_report.interval(own, lambda each: each["score"])
    assert low < suite_report.mean(own, lambda each: each["score"]) < high


def test_the_page_shows_what_the_result_files_give(tmp_path: Path) -> None:
    text = suite_table.PAGE.read_text(encoding="utf-8")
    assert suite_table.page(text) == text, "run python benchmarks/quality/suite_table.py"
    path = tmp_path / "suite-x.jsonl"
    path.write_text("".join(json.dumps(line("ours", n, 0, 1.0, 1.0)) + "\n" for n in range(3)))
    suite_report.report(path, "toy")
    assert "| ours | 3 (3) | 1.00 [1.00, 1.00]" in suite_table.page(text, tmp_path)


def test_progress_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 160.0)
    assert run.progress(3, 6, 3, 100.0) == "[3/6, 3 min left]"
    assert run.progress(3, None, 1, 100.0) == "[3]"


def test_documents_of_a_file_are_asked_without_needles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "LLM", lambda *_, **__: make_llm(cache=LARGE_CACHE))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    record = {"id": 1, "task": "facts", "context": "The sky is blue.", "qa": [{"q": "What is blue?", "a": ["sky"]}]}
    data = tmp_path / "facts.jsonl"
    data.write_text(json.dumps(record) + "\n")
    monkeypatch.setattr("sys.argv", ["run.py", "files", "--data", str(data), "--contenders", "full", "--no-rouge"])
    run.main()
    assert "n=1" in capsys.readouterr().out


def test_a_suite_is_one_command_and_a_restart_measures_nothing_again(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "LLM", lambda *_, **__: make_llm(cache=LARGE_CACHE))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setenv("ZSMERGE_EVALUATION_DATA", str(sources.folder))
    options = ["ruler", "--tasks", "niah_single_2", "--lengths", "2500", "--documents", "2", "--budgets", "100"]
    monkeypatch.setattr("sys.argv", ["run.py", *options, "--contenders", "bm25,truncate"])
    for _ in range(2):
        run.main()
        lines = (tmp_path / "suite-ruler-smollm2.jsonl").read_text().splitlines()
        assert len(lines) == 4
    assert capsys.readouterr().out.count("[2/2, 0 min left]") == 2
    (cell,) = json.loads((tmp_path / "suite-ruler-smollm2.json").read_text())["cells"].values()
    assert set(cell) == {"bm25", "truncate"}
