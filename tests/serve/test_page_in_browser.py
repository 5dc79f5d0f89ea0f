"""The page in a headless Chromium, before a scripted server. `make test-page` installs what this needs.

Playwright is imported where it is used: these tests are collected, and left out, in environments without it.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.page_picture import FLAGS
from tests.serve.page_server import INJECTED, KEY, PageServer, serving_page

pytestmark = pytest.mark.browser

DESK, PHONE = {"width": 1200, "height": 760}, {"width": 360, "height": 700}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serving_page() as running:
        yield running


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Opens the page of a server, and wants it to be quiet: no error in the console, no request to another host."""
    contexts, complaints = [], []

    def open_page(server: PageServer, viewport=DESK, color_scheme="light", provoked=""):
        """Args: `provoked` is a failure that the test wants: Chromium reports it by itself."""
        context = browser.new_context(viewport=viewport, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def note(message):
            is_provoked = provoked and message.text.startswith("Failed to load resource") and provoked in message.text
            if message.type in ("error", "warning") and not is_provoked:
                complaints.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda it: None if it.url.startswith(server.url) else complaints.append(it.url))
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def say(page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def wait_until(page, is_so: Callable[[], bool]) -> None:
    """Playwright's own way is to evaluate strings in the page, which its policy refuses."""
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        page.wait_for_timeout(20)


def wait_for_summaries(page, count: int) -> None:
    wait_until(page, lambda: page.locator(".summary").count() == count)


def drawn(page) -> list[list[str]]:
    """The lines of every plot."""
    lines = "all => all.map(it => [...it.querySelectorAll('path:not(.grid)')].map(line => line.getAttribute('d')))"
    return page.locator("#plots figure").evaluate_all(lines)


def summary(page) -> str:
    return page.locator(".summary").last.inner_text()


def colours(page, where: str = ".turn .chunk") -> list[str]:
    return [classes.split()[1] for classes in page.locator(where).evaluate_all("all => all.map(it => it.className)")]


def test_an_answer_is_coloured_by_tokens_per_forward_and_summed_up(server, open_page):
    page = open_page(server)
    page.click("#settings summary")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=seed]", "7")
    page.fill("[name=top_p]", "")
    say(page, "hello")
    page.wait_for_selector(".summary")
    assert page.locator(".turn.chat .text").inner_text() == "".join(f"<{k} é😀>" for k in (1, 2, 3, 4, 9))
    assert colours(page) == ["k1", "k2", "k3", "k4", "k5"]
    shades = page.locator(".turn .chunk").evaluate_all("all => all.map(it => getComputedStyle(it).backgroundColor)")
    legend = page.locator("#legend .chunk").evaluate_all("all => all.map(it => getComputedStyle(it).backgroundColor)")
    assert shades == legend[:5] and len(set(legend)) == 6
    assert re.fullmatch(
        r"19 tokens · 3\.80 per forward · drafts accepted by depth 75 %, 50 %, \u2013 · [\d.]+ s · [\d.]+ tokens/s"
        r" · ended by length",
        summary(page),
    )
    (asked,) = server.asked
    assert asked == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.7,
        "max_tokens": 256,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    say(page, "again")
    wait_for_summaries(page, 2)
    assert [turn["role"] for turn in server.asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    page.click("#clear")
    say(page, "new")
    page.wait_for_selector(".summary")
    assert len(server.asked[2]["messages"]) == 2


def test_text_appears_while_it_comes_and_stop_ends_it(server, open_page):
    page = open_page(server)
    say(page, "slow")
    text, turn = page.locator(".turn.chat .text"), page.locator(".turn.chat")
    for seen in ("one ", "one two "):
        server.go.release()
        wait_until(page, lambda seen=seen: text.text_content() == seen)
    assert turn.get_attribute("aria-busy") == "true"
    assert page.inner_text("#send") == "Stop"
    page.click("#send")
    page.wait_for_selector(".summary")
    assert re.fullmatch(r"stopped · 2 tokens · [\d.]+ s · [\d.]+ tokens/s", summary(page))
    assert turn.get_attribute("aria-busy") is None
    assert (text.inner_text().strip(), page.inner_text("#send")) == ("one two", "Send")
    # What was said so far is part of the conversation.
    say(page, "go on")
    wait_for_summaries(page, 2)
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "one two "}
    assert server.num_hung_up == 1
    say(page, "slow")
    page.keyboard.press("Escape")
    wait_for_summaries(page, 3)
    assert summary(page).startswith("stopped")


def test_complete_mode_continues_raw_text_and_works_from_the_keyboard(server, open_page):
    page = open_page(server)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[value=complete]")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("def f():")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    page.wait_for_selector(".summary")
    assert server.asked[0]["prompt"] == "def f():\nx"
    assert page.locator(".turn.complete .text").evaluate("it => it.textContent").startswith("def f():\nx<1 ")
    assert page.locator(".turn.complete .given").evaluate("it => it.textContent") == "def f():\nx"


def test_the_newest_text_is_in_sight_unless_someone_reads_above(server, open_page):
    page = open_page(server)
    page.check("[value=complete]")
    below = "it => it.scrollHeight - it.scrollTop - it.clientHeight"
    for count in (1, 2):
        page.fill("#prompt", "line\n" * 60)
        page.press("#prompt", "Enter")
        wait_for_summaries(page, count)
        assert page.locator("#log").evaluate(below) < 40
    say(page, "slow")
    server.go.release()
    wait_until(page, lambda: "one" in page.locator(".turn .text").last.text_content())
    page.locator("#log").evaluate("it => it.scrollTop = 100")
    server.go.release(2)
    wait_for_summaries(page, 3)
    assert page.locator("#log").evaluate("it => it.scrollTop") == 100


def test_thoughts_are_folded(server, open_page):
    page = open_page(server)
    say(page, "think")
    page.wait_for_selector(".summary")
    thoughts = page.locator(".thoughts .text")
    assert not thoughts.is_visible()
    page.click(".thoughts summary")
    assert thoughts.inner_text() == "let me seean end of thought"
    assert page.locator(".turn.chat > .text").inner_text() == "an answer"
    # The last thought and the answer came in one forward.
    assert colours(page) == ["k2", "k3", "k3"]


def test_a_server_that_counts_nothing_is_grey(server, open_page):
    page = open_page(server)
    say(page, "uncounted")
    page.wait_for_selector(".summary")
    assert colours(page) == ["k0"]


def test_html_of_a_model_or_a_person_stays_text(server, open_page):
    page = open_page(server)
    say(page, "inject")
    page.wait_for_selector(".summary")
    say(page, INJECTED)
    wait_for_summaries(page, 2)
    assert page.locator(".turn .text").all_text_contents()[1:3] == [INJECTED, INJECTED]
    assert page.locator("#log img, #log script").count() == 0
    assert page.title() == "I-DLM"


def test_errors_are_said_in_words(server, open_page):
    page = open_page(server, provoked="status of 429")
    say(page, "full")
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble") == "The queue is full: try again in 3 seconds (8 requests wait already)."
    assert page.locator(".turn").count() == 0
    assert page.input_value("#prompt") == "full"  # to be sent again
    say(page, "cut")
    page.wait_for_selector(".summary")
    assert page.inner_text("#trouble") == "The connection ended before the answer was complete."
    assert summary(page).startswith("incomplete · 1 tokens")
    say(page, "break")
    wait_for_summaries(page, 2)
    assert page.inner_text("#trouble") == "The server failed in the middle of the answer: out of memory"
    page.click("#settings summary")
    page.fill("[name=top_p]", "2")
    say(page, "hello")
    assert page.inner_text("#trouble").startswith("Top p: ")
    assert len(server.asked) == 3


def test_a_connection_that_breaks_is_said_to_be_lost(server, open_page):
    page = open_page(server, provoked="net::ERR_INCOMPLETE_CHUNKED_ENCODING")
    say(page, "vanish")
    page.wait_for_selector(".summary")
    assert page.inner_text("#trouble") == "The connection was lost in the middle of the answer."
    assert summary(page).startswith("incomplete · 1 tokens")


def test_a_server_that_is_gone_is_said_to_be_gone(open_page):
    with serving_page() as server:
        page = open_page(server, provoked="net::ERR_CONNECTION_REFUSED")
        page.wait_for_selector("#plots path:not(.grid)", state="attached")
    say(page, "hello")
    page.wait_for_selector("#trouble:visible")
    expected = "The server cannot be reached. Is it still running, and are you online?"
    assert page.inner_text("#trouble") == expected
    wait_until(page, lambda: page.inner_text("#health") == expected)


def test_a_key_is_asked_for_and_used(open_page):
    with serving_page(KEY) as server:
        page = open_page(server, provoked="status of 401")
        page.wait_for_selector("#health.bad")
        assert "asks for an API key" in page.inner_text("#health")
        say(page, "hello")
        page.wait_for_selector("#trouble:visible")
        assert "asks for an API key" in page.inner_text("#trouble")
        assert page.evaluate("document.activeElement.name") == "key"
        assert (server.num_status, server.asked) == (0, [])
        page.keyboard.type("wrong")
        say(page, "hello")
        page.wait_for_selector("text=does not accept this API key")
        page.fill("[name=key]", KEY)
        say(page, "hello")
        page.wait_for_selector(".summary")
        page.wait_for_selector("#plots path:not(.grid)", state="attached")
        page.reload()
        page.wait_for_selector("#plots path:not(.grid)", state="attached")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_the_status_is_shown_and_plotted(server, open_page):
    page = open_page(server)
    wait_until(page, lambda: [sum("L" in line for line in lines) for lines in drawn(page)] == [1, 1, 3])
    assert page.inner_text("#model") == "scripted · ISD, stride 4"
    numbers = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert numbers["Running"] == "1 of 4" and numbers["Waiting"] == "2 of 8"
    assert numbers["Pages in use"] == "16 of 64 (25 %)"
    assert numbers["Prefix-cache hits"] == "25 %"
    assert numbers["Tokens per forward"] == "2.50"
    rate, per_forward, accepted = page.locator("#plots output").all_inner_texts()
    assert 5 < float(rate) < 30  # 25 in somewhat more than a second
    assert (per_forward, accepted.split(" · ")) == ("2.5", ["80 %", "50 %", "0 %"])
    # Nobody looks, nothing is asked.
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.wait_for_timeout(300)
    before = server.num_status
    page.wait_for_timeout(1500)
    assert server.num_status == before
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(500)
    assert server.num_status == before + 1


@pytest.mark.parametrize(("name", "viewport"), [("desk", DESK), ("phone", PHONE)])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_fits_the_screen(server, open_page, tmp_path: Path, name, viewport, color_scheme):
    page = open_page(server, viewport, color_scheme)
    say(page, "hello " * 40)
    page.wait_for_selector(".summary")
    page.wait_for_selector("#plots path:not(.grid)", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for place in ("#prompt", "#send", "#log"):
        box = page.locator(place).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
        assert box["y"] >= 0 and box["y"] + box["height"] <= viewport["height"], place
    assert page.screenshot(path=tmp_path / f"{name}_{color_scheme}.png").startswith(b"\x89PNG")
    # Every tint leaves text readable (WCAG AA wants 4.5).
    ratios = page.locator(".turn .chunk, #legend .chunk").evaluate_all(CONTRASTS)
    assert len(ratios) == 11 and min(ratios) >= 7, ratios


CONTRASTS = """all => all.map(it => {
  const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const style = getComputedStyle(it);
  const [dim, bright] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
  return (bright + 0.05) / (dim + 0.05);
})"""
