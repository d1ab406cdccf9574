"""The server and the page on which people label pairs: who may use them, and what two labellers do with keys alone."""

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from qwen_jax.errors import InputError
from tests.helpers.browser import SIZES, open_chromium
from tests.helpers.review import open_review, request, serve, text_rows, values, write_rows
from train.synthesize.review import COMMENT_CHARACTERS, CRITERIA, Review
from train.synthesize.review_server import MAX_BODY_BYTES, ReviewServer

PAGE = Path(__file__).parents[3] / "train" / "synthesize" / "review.html"


@pytest.fixture
def review(tmp_path: Path) -> Review:
    return open_review(write_rows(tmp_path / "pairs.jsonl", text_rows(40)))


def test_the_page_runs_its_own_script_only(review: Review) -> None:
    text = PAGE.read_text()
    assert not re.findall(r"https?://|@import|\bsrc=|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    assert not re.findall(r"<[^>]*\s(?:style|on\w+)=", text.split("<script>")[0])  # The policy would refuse these.
    with serve(review) as server:
        path = urlsplit(server.url)
        status, page, headers = request(server.url, "GET", f"/?{path.query}", Authorization=None)
    assert (status, page) == (200, PAGE.read_bytes())
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert (headers["Referrer-Policy"], headers["X-Content-Type-Options"]) == ("no-referrer", "nosniff")


def test_who_is_refused(review: Review) -> None:
    """Without the token, from another host or page, with another method or path: nothing is read or written."""
    with serve(review) as server:
        host = f"127.0.0.1:{server.server_address[1]}"
        shown = review.show("ann", 0)
        label = values(shown, "ann", "left")
        for method, path, headers, status, message in (
            ("GET", "/", {}, 401, "Open the address"),
            ("GET", "/?token=wrong", {}, 401, "Open the address"),
            ("GET", f"/api/info?token={server.token}", {"Authorization": None}, 401, "token"),
            ("GET", "/api/info", {"Authorization": f"Basic {server.token}"}, 401, "token"),
            ("GET", "/api/info", {"Authorization": f"Bearer {server.token}x"}, 401, "token"),
            ("GET", "/api/info", {"Authorization": "Bearer t\xf6ken"}, 401, "token"),
            ("GET", "/api/info", {"Host": "evil.example"}, 403, "expected a Host of 127.0.0.1 or localhost"),
            ("GET", "/api/info", {"Host": "127.0.0.1.evil.example"}, 403, "expected a Host"),
            ("GET", "/api/info", {"Host": "localhost:80@evil"}, 403, "expected a Host"),
            ("GET", "/api/info", {"Origin": "http://evil.example"}, 403, "got the Origin 'http://evil.example'"),
            ("POST", "/api/label", {"Origin": "null"}, 403, "Origin"),
            ("POST", "/api/label", {"Origin": "http://localhost:1"}, 403, "Origin"),
            ("POST", "/api/label", {"Sec_Fetch_Site": "cross-site"}, 403, "got a cross-site one"),
            ("POST", "/api/label", {"Content_Type": "text/plain"}, 415, "Content-Type application/json"),
            ("POST", "/api/label", {"Authorization": None}, 401, "token"),
            ("POST", "/api/info", {}, 404, "no POST /api/info"),
            ("GET", "/api/label", {}, 404, "no GET /api/label"),
            ("GET", "/../etc/passwd", {}, 404, "there is no"),
            ("GET", "//[", {}, 404, "there is no"),
            ("GET", "/api/pair", {}, 400, "labeller's name"),
            ("GET", "/api/pair?labeller=ann&at=40", {}, 400, "from 0 to 39, got 40"),
            ("GET", "/api/pair?labeller=ann&at=-1", {}, 400, "'at' as a number"),
        ):
            answer = request(server.url, method, path, label if method == "POST" else None, **headers)
            assert answer[0] == status, (path, headers, answer)
            assert message in answer[1]["error"]
            assert "Access-Control-Allow-Origin" not in answer[2]
        for method in ("OPTIONS", "PUT", "DELETE"):
            assert request(server.url, method, "/api/label", label)[0] == 501
        assert not review.labels.path.exists()
        # The page's own requests, also through a tunnel with another port.
        for own in (host, "localhost:9999"):
            answer = request(
                server.url, "POST", "/api/label", label, Host=own, Origin=f"http://{own}", Sec_Fetch_Site="same-origin"
            )
            assert answer[0] == 200
    assert len(review.labels.path.read_text().splitlines()) == 2
    with serve(review, "ann") as server:
        assert request(server.url, "GET", "/api/pair?labeller=ann")[0] == 200
        status, answer, _ = request(server.url, "GET", "/api/pair?labeller=bob")
        assert (status, answer["error"]) == (403, "this review is by ann; start it without --labeller for others.")


def test_bad_bodies(review: Review) -> None:
    """Too large, without a length, cut, no JSON, no object, a field too many: refused, and the server goes on."""
    with serve(review) as server:
        good = values(review.show("ann", 0), "ann", "left", comment="\U0001f642" * COMMENT_CHARACTERS)
        for body, status, message in (
            (b"x" * (MAX_BODY_BYTES + 1), 413, f"at most {MAX_BODY_BYTES:,} bytes"),
            (b"x" * (40 * MAX_BODY_BYTES), 413, "at most"),
            (b"{", 400, "not JSON"),
            (b"[" * 20000, 400, "not JSON"),
            (b"\xff", 400, "not JSON"),
            (b"[1]", 400, "expected a JSON object, got a list"),
            ({**good, "admin": True}, 400, "unknown field 'admin'"),
            ({**good, "comment": good["comment"] + "x"}, 400, "at most 4,000 characters"),
        ):
            answer = request(server.url, "POST", "/api/label", body)
            assert (answer[0], message in answer[1]["error"]) == (status, True), answer
        assert request(server.url, "POST", "/api/label", b"{}", Content_Length="-1")[0] == 411
        assert request(server.url, "POST", "/api/label", b"0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411
        # A client that goes away in the middle of its request.
        with socket.create_connection(server.server_address[:2]) as client:
            client.sendall(b"POST /api/label HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert not review.labels.path.exists()
        # The longest comment fits, however it is escaped.
        assert request(server.url, "POST", "/api/label", good)[0] == 200
    assert review.show("ann", 0)["label"]["comment"] == good["comment"]


def test_a_full_disk_is_said(review: Review, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.synthesize.review.append_record", full)
    with serve(review) as server:
        status, answer, _ = request(server.url, "POST", "/api/label", values(review.show("ann", 0), "ann", "left"))
    assert status == 400
    assert "The label is not saved" in answer["error"]
    assert "No space left on device" in answer["error"]


def test_a_port_in_use(review: Review) -> None:
    with serve(review) as server, pytest.raises(InputError, match="Give another one as --port"):
        ReviewServer(review, "pairs.jsonl", port=server.server_address[1])


def test_two_labellers_at_once(review: Review) -> None:
    """Each goes through all pairs on one connection; no label is lost or mixed up, and they agree where they should."""
    names = ["ann", "Zoë"]
    with serve(review) as server:

        def label(name: str) -> None:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
            headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
            connection.request("GET", f"/api/pair?labeller={'ann' if name == 'ann' else 'Zo%C3%AB'}", headers=headers)
            found = json.loads(connection.getresponse().read())
            while found["pair"] is not None:
                shown = found["pair"]
                # Both prefer the answer with the even number, which the file calls chosen.
                left = int(shown["left"]["blocks"][0]["text"]) % 2 == 0
                body = json.dumps(values(shown, name, "left" if left else "right", comment=f"{name} {shown['at']}"))
                connection.request("POST", "/api/label", body.encode(), headers)
                found = json.loads(connection.getresponse().read())
            assert found["progress"] == {"pairs": 40, "labelled": 40, "skipped": 0, "left": 0}
            connection.close()

        threads = [threading.Thread(target=label, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        _, report, _ = request(server.url, "GET", "/api/report")
    assert len(review.labels.path.read_text().splitlines()) == 80
    for at in range(40):
        for name in names:
            assert review.show(name, at)["label"]["comment"] == f"{name} {at}"
    (two,) = report["agreement"]
    assert two["common"] == 40
    assert two["questions"]["overall"]["kappa"] == pytest.approx(1)
    # Nothing tells a labeller what the file prefers.
    assert all("agrees_with_file" not in one for one in report["labellers"])
    sides = {name: [one["left"] for one in report["labellers"] if one["name"] == name] for name in names}
    assert all(0 < left < 40 for (left,) in sides.values())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_chromium() as chromium:
        yield chromium


class Labeller:
    """A browser of its own in which somebody labels with keys alone."""

    def __init__(self, browser: Any, url: str, size: str, scheme: str, name: str):
        self.page = browser.new_context(viewport=SIZES[size], color_scheme=scheme).new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self._picture = f"review-{size}-{scheme}"
        self.page.goto(url)
        self.page.wait_for_selector("#ask[open]")
        self.page.keyboard.type(name)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Presses keys, each when the page has answered to the one before."""
        for key in keys:
            self.page.keyboard.press(key)
            end = time.monotonic() + 10
            while self.get("busy"):
                assert time.monotonic() < end
                time.sleep(0.005)

    def get(self, expression: str) -> Any:
        """Evaluates an expression in the page."""
        return self.page.evaluate(expression)

    def text(self, id: str) -> str:
        return str(self.page.text_content(f"#{id}"))

    def shot(self, name: str) -> None:
        if folder := os.environ.get("QWEN_JAX_SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{self._picture}-{name}.png")


def test_two_labellers_with_keys_alone(browser: Any, tmp_path: Path) -> None:
    texts = ["<img src=x onerror=alert(1)>", "</script><b>2</b>", "three"]
    rows = [{"prompt": "\n".join([text] * 99), "chosen": text, "rejected": f"no {text}"} for text in texts]
    review = open_review(write_rows(tmp_path / "pairs.jsonl", rows))
    with serve(review) as server:
        ann = Labeller(browser, server.url, "desktop", "light", "ann")
        bob = Labeller(browser, server.url, "phone", "dark", "bob")
        # Texts are texts.
        for one in (ann, bob):
            assert texts[0] in (one.text("left-text"), one.text("right-text"))
            assert one.get("document.querySelectorAll('.text img, .text b').length") == 0
            assert one.get("document.activeElement.id") == "prompt-text"
            assert not one.get("document.documentElement.scrollWidth > innerWidth")
            one.shot("begin")
        # The prompt scrolls by arrows; an incomplete answer is not saved, and the page says what is missing.
        ann.press(*["ArrowDown"] * 3)
        ann.press("1", "2", "3", "Enter")
        assert "Not answered yet: relevance, harmlessness, debiasing, overall" in ann.text("error")
        assert ann.get("document.activeElement.name") == "relevance"
        assert not review.labels.path.exists()
        ann.shot("incomplete")
        # Digits, arrows, and j and k; a comment with what would be keys elsewhere.
        ann.press("ArrowRight", "ArrowLeft", "j", "ArrowLeft", "ArrowDown", "ArrowRight", "k", "3", "j", "1", "c")
        ann.page.keyboard.type("bs1?")
        ann.press("Shift+Enter", "Escape")
        expected = dict(zip(CRITERIA, ("left", "tie", "right", "tie", "right", "right"), strict=True))
        assert ann.get("answers()") == {**expected, "overall": "left"}
        ann.press("Enter")
        (label,) = review.labels.newest().values()
        assert (label.labeller, label.overall, dict(label.criteria)) == ("ann", "left", expected)
        assert label.comment == "bs1?\n"
        assert 0 < label.seconds < 60
        assert (label.left, label.right) == tuple(review.show("ann", 0)[side]["id"] for side in ("left", "right"))
        # Skip, back, change; what was answered and not saved is kept.
        ann.press("s", "1", "b")
        assert "which you have skipped" in ann.text("prompt-name")
        ann.press("b")
        assert "which you have labelled" in ann.text("prompt-name")
        assert ann.page.input_value("#comment") == "bs1?\n"
        ann.press("k", "1", "2", "n", "n")
        assert ann.get("answers()") == {"truthfulness": "left"}
        ann.press("b", "b")
        assert ann.get("answers()") == {**expected, "overall": "left", "helpfulness": "tie"}
        ann.press("j", *"3333333", "Enter")
        assert review.show("ann", 0)["label"]["choices"]["overall"] == "right"
        ann.press(*"111111", "2", "Enter")
        assert "You have gone through all 3 pairs: 2 labelled, 1 skipped." in ann.text("finished-text")
        # The other one has seen nothing of this.
        assert "0 of 3 labelled, 0 skipped, 3 left" in bob.text("progress")
        for _ in range(3):
            bob.press(*"1111112", "Enter")
        assert review.progress("bob") == {"pairs": 3, "labelled": 3, "skipped": 0, "left": 0}
        bob.press("r")
        assert "ann and bob: 2 common pairs" in bob.text("agreement-tables")
        bob.shot("agreement")
        bob.press("Escape", "b", "?")
        assert not bob.get("document.getElementById('keys').open")
        bob.shot("back")
        # Every control has a name, and Tab reaches all of them.
        controls = "[...document.querySelectorAll('input, textarea, button')]"
        assert bob.get(f"{controls}.every(x => x.labels?.length || x.textContent)")
        reached = set()
        for _ in range(30):
            bob.press("Tab")
            reached.add(bob.get("document.activeElement.name || document.activeElement.id"))
        others = {"comment", "skip", "back", "forward", "report", "prompt-text", "left-text", "right-text"}
        assert reached >= {*CRITERIA, "overall", *others}
        # A tab that is loaded again goes on as the same labeller.
        ann.page.reload()
        ann.page.wait_for_selector("#finished:not([hidden])")
        assert ann.text("who") == "Labeller: ann"
        ann.press("b")
        assert ann.problems == bob.problems == []
        # Without the server nothing that was answered is lost.
        ann.page.context.set_offline(True)
        ann.press(*"333", "Enter")
        assert "The server does not answer" in ann.text("error")
        ann.shot("gone")
        ann.page.context.set_offline(False)
        ann.press("Enter")
        assert ann.text("error") == ""
        assert review.show("ann", 2)["label"]["choices"]["conciseness"] == "right"
