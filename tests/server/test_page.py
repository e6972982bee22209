"""The chat page, in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.conftest import KEYS, serving
from tests.support.chat import make_llm
from zsmerge_llm import LLM
from zsmerge_llm.server.settings import ServerSettings

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
MARIGOLD = Path(__file__).parents[2] / "zsmerge_llm" / "data" / "marigold.txt"
RUN = "document.title='owned'"
HOSTILE = [
    f'<img src=x onerror="{RUN}"><script>{RUN}</script>',
    f"</script><script>{RUN}</script>",
    f'<svg onload="{RUN}"><animate onbegin="{RUN}" attributeName=x dur=1s>',
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'"><a href="javascript:{RUN}" autofocus onfocus="{RUN}">x</a>',
    f'[x](javascript:{RUN}) ![y](x "onerror={RUN}")',
    f'</textarea></title></style><body onload="{RUN}"><details open ontoggle="{RUN}">',
    f"${{{RUN}}} {{{{{RUN}}}}} <%= {RUN} %>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; \\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f'<meta http-equiv=refresh content="0;url=javascript:{RUN}"><base href=//example.org><form><input name=body>',
    f'<math><mtext></table><mglyph><style><!--</style><img title="--><img src=1 onerror={RUN}>">',
    "<link rel=stylesheet href=https://example.org/x.css><img src=https://example.org/x.png>",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: install it, or set CHROMIUM to its path"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, llm: LLM) -> Iterator[Page]:
    """The page of a server whose answers have at most twelve tokens. Requests elsewhere and errors fail the test."""
    with serving(llm, ServerSettings(max_tokens=12)) as address, browser.new_context() as context:
        page, problems = context.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda each: each.url.startswith((address, "data:", "blob:")) or problems.append(each.url))
        page.on("dialog", lambda dialog: dialog.accept())
        page.route("**/v1/chat/completions", _shorten)
        page.goto(address)
        expect(page.locator("#model")).to_have_text("tiny")
        yield page
        assert problems == []


def _shorten(route: object) -> None:
    """Send a message of the page with a limit of twelve tokens: the model's answers do not end by themselves."""
    body = route.request.post_data_json  # type: ignore[attr-defined]
    route.continue_(post_data={**body, "max_tokens": 12})  # type: ignore[attr-defined]


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    expect(page.locator("#memory button")).to_be_visible(timeout=60_000)
    expect(page.locator("#send")).to_be_visible(timeout=60_000)


def test_a_conversation_streams_and_is_there_after_a_reload(page: Page) -> None:
    say(page, "Name a tree.")
    say(page, "And a river?")
    expect(page.locator("#messages li")).to_have_count(4)
    expect(page.locator("#memory")).to_contain_text("tokens read")
    texts = page.locator("#messages").inner_text()

    page.reload()
    expect(page.locator("#messages li")).to_have_count(4)
    assert page.locator("#messages").inner_text() == texts
    say(page, "And a town?")
    expect(page.locator("#status")).not_to_contain_text(", 0 before")


def opened(page: Page, content: object, folder: Path) -> None:
    """Open a conversation that was saved as a file."""
    (folder / "saved.json").write_text(json.dumps(content), encoding="utf-8")
    page.set_input_files("#open", folder / "saved.json")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_written_in_a_conversation_is_shown_and_never_run(page: Page, tmp_path: Path, text: str) -> None:
    say(page, text)
    page.reload()
    expect(page.locator("#messages li").first).to_have_text(text)
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    saved = {"id": "web-1", "title": text, "messages": [{"role": "user", "content": text}] * 2}
    opened(page, {**saved, "messages": [saved["messages"][0], {"role": "assistant", "content": text}]}, tmp_path)
    expect(page.locator("#list li.current .title")).to_have_text(text)
    (tmp_path / "a document.txt").write_text(f"{text} The keeper is Ann. " * 20, encoding="utf-8")
    page.set_input_files("#file", tmp_path / "a document.txt")
    expect(page.locator("#document")).to_contain_text("a document.txt", timeout=60_000)

    assert page.title() == "zsmerge-llm"
    assert page.locator("#messages :is(img, script, svg, iframe, a, body, form, math, link)").count() == 0
    assert page.locator("#list :is(img, script, svg, iframe, a, form, math, link)").count() == 0


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_memory_map_shows_what_is_hostile_and_never_runs_it(browser: Browser, llm: LLM, text: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "session_id": "mapped"}
    with serving(llm) as address, browser.new_context() as context:
        assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 200
        page = context.new_page()
        page.on("request", lambda each: each.url.startswith(address) or pytest.fail(each.url))
        page.goto(f"{address}/v1/sessions/mapped/map")
        page.wait_for_timeout(200)
        assert "owned" not in page.title()


def test_a_document_is_read_and_asked_about(page: Page) -> None:
    page.set_input_files("#file", MARIGOLD)
    expect(page.locator("#document")).to_have_text("About marigold.txt", timeout=60_000)
    say(page, "Who is the captain?")
    expect(page.locator("#messages li")).to_have_count(2)


def test_conversations_are_forked_renamed_saved_opened_and_deleted(page: Page, tmp_path: Path) -> None:
    say(page, "Name a tree.")
    page.get_by_role("button", name="Fork").click()
    expect(page.locator("#list li")).to_have_count(2)
    say(page, "And a river?")
    expect(page.locator("#status")).not_to_contain_text(", 0 before")

    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Rivers")
    page.keyboard.press("Enter")
    expect(page.locator("#list li.current .title")).to_have_text("Rivers")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    download.value.save_as(tmp_path / "rivers.json")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#list li")).to_have_count(1)
    page.set_input_files("#open", tmp_path / "rivers.json")
    expect(page.locator("#list li.current .title")).to_have_text("Rivers")
    expect(page.locator("#messages li")).to_have_count(4)


def test_the_page_works_by_keyboard_and_on_a_narrow_screen(page: Page) -> None:
    say(page, "Name a tree.")
    page.keyboard.press("Alt+n")
    expect(page.locator("#list li")).to_have_count(2)
    page.set_viewport_size({"width": 360, "height": 600})
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.locator("#list .title").nth(1).click()
    expect(page.locator("#messages li")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_an_answer_is_stopped_and_the_conversation_goes_on(page: Page) -> None:
    page.unroute("**/v1/chat/completions")
    page.fill("#text", "Name all trees.")
    page.keyboard.press("Enter")
    expect(page.locator("#messages li").nth(1)).not_to_be_empty(timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    page.route("**/v1/chat/completions", _shorten)
    say(page, "And a river?")
    expect(page.locator("#messages li")).to_have_count(4)


def test_where_keys_are_needed_the_page_asks_for_one(browser: Browser) -> None:
    with make_llm() as llm, serving(llm, ServerSettings(api_keys=KEYS)) as address, browser.new_context() as context:
        llm.model = "tiny"
        page = context.new_page()
        page.goto(address)
        for key in ("a wrong key", KEYS[0]):
            page.fill("#key", key)
            page.get_by_role("button", name="Continue").click()
        expect(page.locator("#model")).to_have_text("tiny")
