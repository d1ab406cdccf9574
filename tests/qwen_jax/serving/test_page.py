"""The chat page, in a headless Chromium at the widths of a phone and of a desk."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import SIZES, open_chromium
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.serving import Running, client, serve

PAGE = Path(__file__).parents[3] / "qwen_jax" / "serving" / "page.html"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOOL = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = PAGE.read_text()
    assert not re.findall(r"https?://|//cdn|@import|\bsrc=|innerHTML|eval\(", text)
    answer = client(FakeEngine()).get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_chromium() as chromium:
        yield chromium


@pytest.fixture
def running() -> Iterator[tuple[FakeEngine, Running]]:
    def reply(request: Any) -> str:
        prompt = engine.tokenizer.decode(request.prompt) if engine.tokenizer else ""
        last = prompt.rsplit("<|im_start|>", 2)[1]
        if "endless" in last:
            return "word " * 5000
        if "weather" in last and "tool_response" not in last:
            return f"Let me look.\n{CALL}"
        if "tool_response" in last:
            return "It is sunny."
        return "Grüezi! Try `print(1)`:\n```python\nprint('<b>é</b>')\n```\nDone."

    engine = FakeEngine(reply, delay=0.003)
    with serve(engine) as found:
        yield engine, found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation(browser: Any, running: tuple[FakeEngine, Running], size: str, scheme: str) -> None:
    engine, server = running
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(server.url)

    def shot(name: str) -> None:
        if folder := os.environ.get("QWEN_JAX_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{size}-{scheme}-{name}.png")

    def ask(text: str, wait: bool = True) -> None:
        page.fill("#input", text)
        page.press("#input", "Enter")
        if wait:
            page.wait_for_selector(".message:last-child .again")

    # A streamed answer, with code and without HTML.
    ask("Hello")
    answer = page.locator(".message.assistant").last
    assert answer.locator(".text pre").inner_text() == "print('<b>é</b>')"
    assert "tokens/s" in answer.locator(".facts").inner_text()
    assert page.locator("#log b").count() == 0
    shot("answer")
    # Settings reach the engine.
    page.click("#open")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.25")
    page.fill("#top_k", "5")
    page.check("#probabilities")
    page.fill("#tools", TOOL)
    shot("settings")
    page.click("#close")
    # Regenerate, with probabilities under the pointer and under the arrow keys.
    page.click(".again")
    page.wait_for_selector(".token")
    page.wait_for_selector(".message:last-child .again")
    assert page.locator(".message").count() == 2
    request = engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_k, request.top_logprobs) == (0.25, 5, 5)
    assert engine.tokenizer is not None
    assert "Be brief." in engine.tokenizer.decode(request.prompt)
    assert answer.locator(".text").inner_text().startswith("Grüezi!")
    page.hover(".token >> nth=2")
    assert "%" in page.locator("#tip").inner_text()
    assert "ü" in page.locator("#tip").inner_text()
    shot("probabilities")
    page.focus(".message.assistant .text")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.on").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    # A tool call, its result, and the answer to it.
    ask("How is the weather?")
    assert "weather" in page.locator(".call strong").inner_text()
    shot("tool")
    page.fill(".call textarea", "sunny")
    page.click("text=Give the result")
    page.wait_for_selector("text=It is sunny.")
    page.wait_for_selector(".message:last-child .again")
    # Stop ends the request on the server, too.
    ask("Tell an endless story", wait=False)
    page.wait_for_selector("text=word word")
    page.click("#stop")
    page.wait_for_selector(".message:last-child .again")
    assert "stopped" in page.locator(".facts").last.inner_text()
    page.wait_for_timeout(300)
    assert not engine.running
    # An error of the server is shown, and the conversation goes on.
    page.click("#open")
    page.fill("#temperature", "9")
    page.click("#close")
    ask("Hello again", wait=False)
    page.wait_for_selector("[role=alert]")
    assert "temperature" in page.locator("[role=alert]").inner_text()
    shot("error")
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The settings are still there when the page is loaded again.
    page.reload()
    assert page.input_value("#temperature") == "9"
    assert [text for text in problems if "400" not in text] == []
    page.close()


def test_a_key_is_asked_for(browser: Any) -> None:
    with serve(FakeEngine("Hello."), api_keys=("secret",)) as running:
        page = browser.new_page(viewport=SIZES["phone"])
        page.goto(running.url)
        page.wait_for_selector("[role=alert]", state="attached")
        page.fill("#key", "secret")
        page.click("#close")
        page.wait_for_selector("#model option", state="attached")
        page.fill("#input", "Hi")
        page.click("#send")
        page.wait_for_selector("text=Hello.")
        page.close()


def test_every_control_has_a_name(browser: Any) -> None:
    """For screen readers; and the contrast of text is at least 4.5 to 1 in both schemes."""
    with serve(FakeEngine("Hello.")) as running:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            page.goto(running.url)
            page.click("#open")
            nameless = page.evaluate("""
                [...document.querySelectorAll("button, input, textarea, select")].filter(node =>
                    !(node.textContent.trim() && node.tagName === "BUTTON") && !node.labels?.length &&
                    !node.getAttribute("aria-label")).map(node => node.outerHTML)
            """)
            assert nameless == []
            values = page.evaluate("""
                Object.fromEntries("back panel text soft user accent on-accent bad code".split(" ").map(name =>
                    [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))
            """)
            for front, back in [
                ("text", "back"), ("text", "panel"), ("text", "user"), ("text", "code"), ("soft", "back"),
                ("soft", "panel"), ("on-accent", "accent"), ("bad", "back"),
            ]:  # fmt: skip
                assert contrast(values[front], values[back]) >= 4.5, (scheme, front, back)
            page.close()


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
