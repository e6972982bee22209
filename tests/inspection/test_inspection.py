"""The memory map reports what the cache holds; its page shows that, and runs nothing from the session's text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tests.support.chat import LARGE_CACHE, SMALL_CACHE, Chat, make_llm
from tests.support.templates import template
from tests.support.tiny_models import WINDOW, tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig, Engine
from zsmerge_llm.cli import app as cli
from zsmerge_llm.errors import InputError
from zsmerge_llm.inspection.html import render, write_html
from zsmerge_llm.inspection.memory_map import LayerMap, MemoryMap, map_cache, memory_map
from zsmerge_llm.inspection.spans import (
    LEVELS,
    decode_tokens,
    least_held,
    most_held,
    shade_levels,
    split_blocks,
    split_passages,
    token_styles,
)
from zsmerge_llm.kvcache.cache_state import cache_state
from zsmerge_llm.sessions.session import Session

MERGING = SMALL_CACHE.replace(residual=8)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'too' &amp; {{ 7 * 7 }} </div>"


class Page(HTMLParser):
    """A page as a browser reads it: its elements, the text of each block, and what its scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self.contents: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "div":
            self._inside = "block" if dict(attrs).get("class") == "block" else ""
            self.blocks += [""] if self._inside else []
        elif tag in ("script", "style"):
            self._inside = tag
            self.contents.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag != "span":
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "block":
            self.blocks[-1] += data
        elif self._inside:
            self.contents[-1] += data

    def data(self) -> Any:
        at = [attrs.get("id") for tag, attrs in self.elements if tag in ("script", "style")].index("data")
        return json.loads(self.contents[at])


def chat_session(cache: CacheConfig = SMALL_CACHE, name: str = "smollm2", *said: str) -> tuple[LLM, Session]:
    """Return a chat of some turns with a random model."""
    llm = make_llm(name, cache=cache)
    chat = Chat(llm, "it")
    for text in said or ("Who is it?", "And the other one, who came later?", "Say their names again, please."):
        chat.ask(text)
    return llm, llm.session("it")


def decode_varints(text: str) -> list[int]:
    """Invert the page's base64 coding of integers."""
    found, value, shift = [], 0, 0
    for byte in base64.b64decode(text):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found


def expand_runs(text: str) -> list[int]:
    runs = decode_varints(text)
    return [value for count, value in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)]


def map_of(held: list[list[int]], heads: int = 2) -> MemoryMap:
    """Return the map of layers whose heads hold each token as often as `held` says."""
    seen = len(held[0])
    layers = tuple(
        LayerMap(at, heads, None, 8, torch.tensor(row), (), seen - sum(row) / heads) for at, row in enumerate(held)
    )
    ids = tuple(template("smollm2").encode("x" * seen))[:seen]
    return MemoryMap(ids, seen, layers, 0, 1000, 2000)


# -- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cache",
    [SMALL_CACHE, CacheConfig.paper(64), CacheConfig.streaming(64), CacheConfig.h2o(64), MERGING],
    ids=["window", "paper", "streaming", "h2o", "residual"],
)
def test_every_token_is_held_merged_or_dropped(cache: CacheConfig) -> None:
    _, session = chat_session(cache)
    found = memory_map(session)
    assert found.seen == session.cache.seen > cache.slots
    for layer in found.layers:
        assert layer.verbatim_tokens + layer.merged_tokens + layer.dropped_tokens == pytest.approx(found.seen)
    assert found.verbatim_tokens + found.merged_tokens + found.dropped_tokens == pytest.approx(found.seen)
    assert round(found.seen - found.verbatim_tokens) == session.cache.dropped_tokens + session.cache.merged_tokens
    assert (found.merged_tokens > 0) == (cache.residual > 0)


def test_a_token_counts_once_for_each_head_that_holds_it() -> None:
    _, session = chat_session()
    found, cache = memory_map(session), session.cache
    for at in range(0, found.seen, 7):
        holders = sum(
            int(((layer.position[0, head] == at) & (layer.multiplicity[0, head] == 1)).any())
            for layer in cache.layers
            for head in range(layer.spec.kv_heads)
        )
        assert found.verbatim_heads[at] == holders
        assert found.verbatim_share[at] == pytest.approx(holders / found.num_heads)


def test_sinks_and_newest_tokens_are_held_by_every_head() -> None:
    _, session = chat_session()
    found = memory_map(session)
    assert (found.verbatim_share[: SMALL_CACHE.sink] == 1).all()
    assert (found.verbatim_share[-SMALL_CACHE.recent :] == 1).all()
    assert not found.is_complete
    assert found.num_unheld > 0


@pytest.mark.parametrize("cache", [LARGE_CACHE, CacheConfig.full()], ids=["below the budget", "full"])
def test_nothing_is_dropped_below_the_budget_or_without_one(cache: CacheConfig) -> None:
    llm, session = chat_session(cache)
    found = memory_map(session)
    assert found.is_complete
    assert (found.num_unheld, found.merged_tokens, found.dropped_tokens) == (0, 0, 0)
    html = render(found, llm.tokenizer)
    assert "Nothing was dropped or merged" in html
    assert "Held by the fewest heads" not in html


def test_sliding_window_layers_are_shown_and_do_not_count_in_the_figures() -> None:
    engine = Engine(tiny_model("gemma3"), CacheConfig(slots=32, recent=8, stage=8))
    cache = engine.new_cache()
    engine.read(cache, tokens(200))
    found = map_cache(cache, tokens(200))
    assert [layer.sliding_window for layer in found.layers] == [WINDOW, None, WINDOW]
    assert [layer.index for layer in found.measured_layers] == [1]
    for layer in (found.layers[0], found.layers[2]):
        assert (layer.verbatim_heads[-WINDOW:] == layer.num_heads).all()
        assert not layer.verbatim_heads[: -WINDOW - cache.layers[0].config.stage - 1].any()
    html = render(found, make_llm("smollm2").tokenizer)
    assert "layer 0 (window)" in html
    assert "do not count in the figures above" in html


def test_the_figures_of_a_model_with_sliding_windows_alone_count_all_layers() -> None:
    engine = Engine(tiny_model("mistral-sliding"), CacheConfig(slots=100))
    cache = engine.new_cache()
    engine.read(cache, tokens(60))
    found = map_cache(cache, tokens(60))
    assert found.measured_layers == found.layers
    assert "All layers of this model have sliding-window attention" in render(found, make_llm("smollm2").tokenizer)


def test_a_memory_map_does_not_change_the_cache() -> None:
    _, session = chat_session(CacheConfig.paper(64))
    before = {name: tensor.clone() for name, tensor in cache_state(session.cache)[0].items()}
    memory_map(session)
    assert all(torch.equal(before[name], tensor) for name, tensor in cache_state(session.cache)[0].items())


def test_an_empty_cache_and_missing_ids_are_refused() -> None:
    engine = Engine(tiny_model("llama"), CacheConfig(slots=80))
    cache = engine.new_cache()
    with pytest.raises(InputError, match="read something first"):
        map_cache(cache, [])
    engine.read(cache, tokens(12))
    with pytest.raises(InputError, match="give all"):
        map_cache(cache, tokens(11))


# -- the text --------------------------------------------------------------------------------------------------------


def test_token_texts_add_up_to_the_text_even_where_a_character_takes_several_tokens() -> None:
    text = "Zürich 🙂🚀 中文字符\n\n  indented\tand tabbed <|im_end|>\nend 🗼"
    tokenizer = template("smollm2").tokenizer
    pieces = decode_tokens(tokenizer, template("smollm2").encode(text)).texts
    assert "".join(pieces) == text
    assert "" in pieces  # a character's first bytes alone


def test_control_characters_and_direction_marks_are_shown_as_signs() -> None:
    ids = template("smollm2").encode("a\r\nb\0c\u202ed\x1b")
    assert "".join(decode_tokens(template("smollm2").tokenizer, ids).texts) == "a␍\nb␀c\ufffdd␛"


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "llama3", "gemma3", "mistral-v0.3", "mistral-nemo"])
def test_blocks_begin_at_the_turns_of_the_chat_template(name: str) -> None:
    llm, session = chat_session(LARGE_CACHE, name, "Who is it?", "And now? user said\nassistant said")
    found = memory_map(session)
    text = decode_tokens(llm.tokenizer, found.tokens)
    said = [role for role in text.roles.values() if role != "system"]
    assert said == ["user", "assistant", "user", "assistant"]
    cut = split_blocks(text, token_styles(found, text))
    assert [block.role for block in cut if block.role and block.role != "system"] == said
    user = next(block for block in cut if block.role == "user")
    assert "Who is it?" in "".join(run.text for run in user.runs)
    assert not any("user" in run.text for run in user.runs if run.style != "m")


@given(st.lists(st.floats(0, 1), min_size=1))
def test_the_lowest_shade_means_none_and_the_highest_all(shares: list[float]) -> None:
    found = shade_levels(torch.tensor(shares, dtype=torch.float64).numpy()).tolist()
    for share, level in zip(shares, found, strict=True):
        assert (level == 0) == (share == 0)
        assert (level == LEVELS) == (share == 1)
    assert [level for _, level in sorted(zip(shares, found, strict=True))] == sorted(found)


def test_passages_are_ranked_by_the_share_of_heads_that_hold_them() -> None:
    text = "All of this is kept. None of that is kept. The newest words stay anyway."
    ids = template("smollm2").encode(text)
    pieces = decode_tokens(template("smollm2").tokenizer, ids).texts
    where = torch.tensor([len("".join(pieces[: at + 1])) for at in range(len(ids))])
    held = ((where <= 20) | (where > 42)).long() * 2
    found = MemoryMap(tuple(ids), len(ids), (LayerMap(0, 2, None, 8, held, (), 0.0),), 0, 1, 2)
    assert found.num_newest == int((where > 42).sum())
    every = split_passages(found, decode_tokens(template("smollm2").tokenizer, ids))
    assert [passage.text for passage in every] == text.replace(". ", ".|").split("|")
    assert [round(passage.share) for passage in every] == [1, 0, 1]
    assert least_held(every, 1)[0].text == "None of that is kept."
    assert [passage.text for passage in most_held(every, 8, found)] == ["All of this is kept.", "None of that is kept."]


def test_tokens_not_in_the_cache_yet_are_marked() -> None:
    engine = Engine(tiny_model("llama"), CacheConfig(slots=80))
    cache = engine.new_cache()
    engine.read(cache, tokens(12))
    found = map_cache(cache, [*tokens(12), 5])
    text = decode_tokens(template("smollm2").tokenizer, found.tokens)
    assert token_styles(found, text)[-1] == "p"
    assert "1 more not read yet" in render(found, template("smollm2").tokenizer)


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_text_as_it_is_whatever_it_holds() -> None:
    llm, session = chat_session(LARGE_CACHE, "smollm2", HOSTILE, "And\n\n  then? 🙂")
    page = Page(render(memory_map(session), llm.tokenizer, title=HOSTILE))
    text = llm.tokenizer.decode(session.tokens)
    assert "".join(page.blocks) == text
    assert HOSTILE in text
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(tag in ("img", "link", "iframe", "a") for tag, _ in page.elements)
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.elements for name in attrs)


def test_only_the_page_s_own_script_and_style_may_run_and_nothing_may_be_fetched() -> None:
    llm, session = chat_session()
    html = render(memory_map(session), llm.tokenizer)
    page = Page(html)
    (policy,) = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    style, _, script = page.contents
    for content in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", html)


def test_the_numbers_in_the_page_are_those_of_the_map() -> None:
    llm, session = chat_session(CacheConfig.paper(64))
    found = memory_map(session)
    page = Page(render(found, llm.tokenizer))
    data = page.data()
    assert (data["tokens"], data["seen"]) == (len(found.tokens), found.seen)
    for given_, layer in zip(data["layers"], found.layers, strict=True):
        assert expand_runs(given_["held"]) == layer.verbatim_heads.tolist()
        assert given_["merged"] == [[slot.position, slot.tokens] for slot in layer.merged_slots]
    lengths = decode_varints(data["lengths"])
    assert len(lengths) == len(expand_runs(data["kinds"])) == len(found.tokens)
    starts = [int(attrs["data-at"] or 0) for _, attrs in page.elements if "data-at" in attrs]
    for text, start, end in zip(page.blocks, starts, [*starts[1:], len(lengths)], strict=True):
        assert len(text.encode("utf-16-le")) // 2 == sum(lengths[start:end])


def test_neighbours_of_one_shade_are_one_element() -> None:
    held = [[2] * 4000 + [0] * 8000 + [1] * 4000]
    html = render(map_of(held), template("smollm2").tokenizer)
    text = html[html.index('<div id="text"') : html.index('<div id="token"')]
    assert text.count("<span") == 2
    assert len(Page(html).data()["layers"][0]["held"]) < 40


def test_a_page_is_written_as_utf_8(tmp_path: Path) -> None:
    llm, session = chat_session(LARGE_CACHE, "smollm2", "größer 🙂")
    path = write_html(memory_map(session), llm.tokenizer, tmp_path / "it.html", "größer")
    assert "größer 🙂" in path.read_text(encoding="utf-8")


# -- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(each) for each in ("inspect", *arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, whose weights cannot be read."""
    folder = tmp_path_factory.mktemp("model")
    llm = make_llm("smollm2")
    llm.engine.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, session = chat_session()
    return session.save(tmp_path_factory.mktemp("sessions") / "it.zsmerge")


def test_inspect_takes_a_file_and_needs_no_weights(model: Path, saved: Path, tmp_path: Path) -> None:
    result = run(saved, "--model", model, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "are held by none" in result.stdout
    assert "page.html" in result.stdout
    assert "And the other one" in "".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).blocks)


def test_inspect_takes_a_name_and_names_the_page_by_it(
    model: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    result = run("it", "--dir", saved.parent, "--model", model, "--open")
    assert result.exit_code == 0, result.output
    assert opened == [(tmp_path / "it.html").as_uri()]


def test_inspect_refuses_another_model_s_tokenizer(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    llm = make_llm("llama3")
    llm.engine.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    result = run(saved, "--model", folder)
    assert result.exit_code == 2
    assert "another tokenizer" in result.stderr
    assert "--model" in result.stderr


def test_inspect_reports_what_it_cannot_find_or_write(model: Path, saved: Path, tmp_path: Path) -> None:
    assert "no session 'nobody'" in run("nobody", "--dir", saved.parent).stderr
    assert "no saved session at" in run(tmp_path / "none.zsmerge").stderr
    assert "cannot be written" in run(saved, "--model", model, "--output", tmp_path / "no" / "page.html").stderr
    (saved.parent / "copy.zsmerge").write_bytes(b"damaged")
    assert "no saved session" in run(saved.parent / "copy.zsmerge").stderr


def test_inspect_asks_which_of_two_sessions_of_one_name_is_meant(tmp_path: Path) -> None:
    paths = []
    for slots in (96, 128):
        _, session = chat_session(SMALL_CACHE.replace(slots=slots), "smollm2", "Hello")
        llm = make_llm("smollm2", cache=SMALL_CACHE.replace(slots=slots), sessions_dir=tmp_path)
        llm.add_session(session)
        paths += [path.name for path in tmp_path.glob("*.zsmerge")]
    result = run("it", "--dir", tmp_path)
    assert result.exit_code == 2
    assert "give the path of one" in result.stderr
    assert len(set(paths)) == 2
