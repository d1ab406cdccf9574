"""Files of requests: both formats, what fails alone, and runs that are interrupted at any byte."""

import dataclasses
import errno
import fcntl
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import batch
from qwen_jax.cli.batch import PlainPrompts, answer_file, report
from qwen_jax.errors import InputError
from qwen_jax.inference import SamplingParams
from qwen_jax.inference.outputs import Finished, Step, TokenInfo
from qwen_jax.inference.request import Request
from qwen_jax.tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).parents[3]
TOKENIZER = train_bpe(["the text of prompts"], 300)


class ScriptedEngine:
    """Repeats the last token of a prompt as often as it may, and counts how many requests run at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.tokenizer: Tokenizer | None = TOKENIZER
        self.requests: list[Request] = []
        self.running = self.most = 0
        self._lock, self._seconds = threading.Lock(), seconds

    def submit(self, request: Request) -> Iterator[Step]:
        with self._lock:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
        return self._steps(request)

    def _steps(self, request: Request) -> Iterator[Step]:
        time.sleep(self._seconds)
        ids = [request.prompt[-1]] * request.ending.max_new_tokens
        tokens = [TokenInfo(i, -0.5) for i in ids]
        bad = TOKENIZER.decode(request.prompt).startswith("bad")
        reason, error = ("error", "The logits are not finite.") if bad else ("length", None)
        with self._lock:
            self.running -= 1
        yield Step(TOKENIZER.decode(ids[:1]), tuple(tokens[:1]))
        finished = Finished(ids, TOKENIZER.decode(ids), reason, None, error, tokens, None, 0)
        yield Step("", tuple(tokens[1:]), finished)


class RefusedError(Exception):
    """As serving's ApiError."""

    status = 404

    def body(self) -> dict[str, Any]:
        return {"error": {"message": "no such path", "type": "invalid_request_error", "param": None, "code": None}}


def answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
    if url not in ("/v1/completions", "/v1/chat/completions"):
        raise RefusedError
    if "prompt" not in body:
        raise InputError("The field prompt is missing.")
    if body["prompt"] == "crash":
        raise KeyError("a bug")
    return {"object": "text_completion", "prompt": body["prompt"], "usage": {"completion_tokens": 3}}


def plain(engine: ScriptedEngine, **changes: Any) -> PlainPrompts:
    def new_tokens(length: int) -> int:
        if length > 40:
            raise InputError(f"The prompt has {length} tokens, the context 40.")
        return 2

    made = PlainPrompts(engine, SamplingParams(seed=5), frozenset([TOKENIZER.eos_id]), ("stop",), new_tokens, 300)
    return dataclasses.replace(made, **changes)


def request(custom_id: str, prompt: str = "a", url: str = "/v1/completions", **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": prompt}, **changes}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in records))
    return path


def read(path: Path) -> dict[str | int, dict[str, Any]]:
    """The results by custom id or line. There is one for each, on whole lines."""
    text = path.read_text()
    assert text.endswith("\n")
    results = [json.loads(line) for line in text.splitlines()]
    found = {one["custom_id"] if one["custom_id"] is not None else one["line"]: one for one in results}
    assert len(found) == len(results)
    return found


def go(source: Path, target: Path, engine: ScriptedEngine | None = None, **options: Any) -> batch.Summary:
    return answer_file(source, target, answer, plain(engine or ScriptedEngine()), **{"progress": False, **options})


# --- the two formats ---


def test_requests_in_the_format_of_openai(tmp_path: Path) -> None:
    """As OpenAI's documentation of the output file has it: refusals are responses, with the status of HTTP."""
    source = write(tmp_path / "in", request("one", "x"), request("two", url="/v1/models"), request("three", body={}))
    summary = go(source, tmp_path / "out")
    assert (summary.total, summary.before, summary.failed, summary.tokens) == (3, 0, 2, 3)
    found = read(tmp_path / "out")
    for one in found.values():
        assert one.keys() == {"id", "custom_id", "response", "error"}
        assert one["response"].keys() == {"status_code", "request_id", "body"}
        assert one["error"] is None
    assert len({one["id"] for one in found.values()}) == 3
    assert found["one"]["response"]["body"]["prompt"] == "x"
    assert [found[key]["response"]["status_code"] for key in ("one", "two", "three")] == [200, 404, 400]
    assert found["two"]["response"]["body"] == RefusedError().body()
    assert found["three"]["response"]["body"]["error"]["message"] == "The field prompt is missing."


def test_plain_prompts(tmp_path: Path) -> None:
    """Texts, messages and ids become the requests that the engine would get from Python."""
    messages = [{"role": "user", "content": "hi"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [*messages, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = write(
        tmp_path / "in",
        {"prompt": "the text"},
        {"prompt_token_ids": [5, 6, 7], "custom_id": "ids"},
        {"messages": messages},
        {"messages": talk, "tools": tools},
    )
    engine = ScriptedEngine()
    made = plain(engine, logprobs=True, new_tokens=lambda length: 2)
    summary = answer_file(source, tmp_path / "out", answer, made, progress=False, in_flight=1)
    assert (summary.failed, summary.tokens) == (0, 8)
    found = read(tmp_path / "out")
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    understood = [*messages, {"role": "assistant", "tool_calls": calls}, talk[2]]
    prompts = [
        TOKENIZER.encode("the text"),
        [5, 6, 7],
        TOKENIZER.encode_chat(messages),
        TOKENIZER.encode_chat(understood, tools),
    ]
    for i, (key, ids) in enumerate(zip([1, "ids", 3, 4], prompts, strict=True)):
        one = found[key]
        assert one["prompt_token_ids"] == ids
        assert one["token_ids"] == [ids[-1]] * 2
        assert (one["text"], one["finish_reason"]) == (TOKENIZER.decode([ids[-1]] * 2), "length")
        assert (one["logprobs"], one["error"]) == ([-0.5, -0.5], None)
        sent = engine.requests[i]
        assert sent.sampling.seed == 5 + i
        assert sent.ending.stop == ("stop",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "not JSON"),
        ("{}", "found nothing"),
        ('{"prompt": "a", "messages": []}', "one of prompt"),
        ('{"prompt": "a", "temperature": 1}', "unknown keys beside prompt: temperature"),
        ('{"prompt": "a", "custom_id": 5}', "custom_id must be a text, got 5"),
        ('{"prompt": 5}', "prompt must be a text"),
        ('{"prompt": [5]}', "prompt must be a text"),
        ('{"prompt": ""}', "is empty"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt_token_ids": "a"}', "a list of token ids"),
        ('{"prompt_token_ids": [300]}', "must be in [0, 300)"),
        ('{"prompt_token_ids": [1.5]}', "integer"),
        ('{"prompt_token_ids": []}', "empty"),
        ('{"messages": "hi"}', "list of messages"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "king"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "tool 0"),
        (f'{{"prompt": "{"the " * 100}"}}', "the context 40"),
        ('{"prompt": "bad"}', "not finite"),
        ('{"method": "POST", "url": "/v1/completions", "body": {}}', "custom_id is missing"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions"}', "body is missing"),
        ('{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}', "method must be POST"),
        ('{"custom_id": "x", "method": "POST", "url": 1, "body": {}}', "url must be a text"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": []}', "body must be a JSON object"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}', "stream"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {}, "more": 1}', "unknown keys: more"),
    ],
)
def test_a_line_that_fails_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source, target = write(tmp_path / "in", {"prompt": "a"}, line, request("last")), tmp_path / "out"
    assert report(go(source, target), target) == 1
    out, err = capsys.readouterr()
    assert "3 requests: 2 answered, 1 failed" in out
    assert f"{source}, line 2: " in err
    assert message in err
    found = read(target)
    (key,) = found.keys() - {1, "last"}
    assert message in found[key]["error"]["message"]
    assert found[1]["error"] is found["last"]["error"] is None


def test_lines_that_are_not_utf8_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xff"}\n{"prompt": "b"}')
    assert (go(source, tmp_path / "out")).failed == 1
    found = read(tmp_path / "out")
    assert found.keys() == {1, 4, 5}
    assert "UTF-8" in found[4]["error"]["message"]


def test_all_good_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", *({"prompt": "a"} for _ in range(5)))
    assert report(answer_file(source, tmp_path / "out", answer, plain(ScriptedEngine())), tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "5 requests: 5 answered, 0 failed; 10 new tokens" in out
    assert "error" not in err


# --- many at a time ---


@pytest.mark.parametrize(("in_flight", "seconds"), [(1, 0.002), (7, 0.05), (500, 0.5)])
def test_so_many_run_at_a_time_and_no_more(tmp_path: Path, in_flight: int, seconds: float) -> None:
    count = 60
    source = write(tmp_path / "in", *({"prompt": "a"} for _ in range(count)))
    engine = ScriptedEngine(seconds)
    go(source, tmp_path / "out", engine, in_flight=in_flight)
    assert engine.most <= min(in_flight, count)
    assert engine.most > min(in_flight, count) // 2
    assert len(read(tmp_path / "out")) == len(engine.requests) == count


def test_results_are_written_while_others_run(tmp_path: Path) -> None:
    """A slow request delays no other."""
    source = write(tmp_path / "in", request("slow", "slow"), *(request(str(i)) for i in range(20)))
    seen = threading.Event()

    def slow(url: str, body: dict[str, Any]) -> dict[str, Any]:
        if body["prompt"] == "slow":
            assert seen.wait(10)
        return {}

    thread = threading.Thread(
        target=answer_file, args=(source, tmp_path / "out", slow, plain(ScriptedEngine())), kwargs={"progress": False}
    )
    thread.start()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if (tmp_path / "out").exists() and (tmp_path / "out").read_text().count("\n") == 20:
            break
        time.sleep(0.01)
    assert "slow" not in read(tmp_path / "out")
    seen.set()
    thread.join()
    assert len(read(tmp_path / "out")) == 21


# --- faults ---


def test_a_fault_of_the_program_is_a_result_until_everything_fails(tmp_path: Path) -> None:
    """A bug that one request meets costs that request. An engine that has died ends the run, with its own error."""
    records = [request(str(i), "crash" if i % 3 == 0 else "a") for i in range(30)]
    summary = go(write(tmp_path / "in", *records), tmp_path / "out", in_flight=2)
    assert summary.failed == 10
    assert read(tmp_path / "out")["0"]["error"] == {"code": "server_error", "message": "KeyError: 'a bug'"}

    def dead(url: str, body: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("The engine has stopped.")

    with pytest.raises(RuntimeError, match="has stopped"):
        answer_file(tmp_path / "in", tmp_path / "out2", dead, plain(ScriptedEngine()), progress=False)
    assert go(tmp_path / "in", tmp_path / "out2").failed == 10


# --- runs that were interrupted ---


def test_a_second_run_does_nothing_and_failures_are_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"), {"prompt": "b"}, {"prompt": "bad"}, request("c", "crash"), "{")
    assert (go(source, tmp_path / "out")).failed == 3
    first = read(tmp_path / "out")
    engine = ScriptedEngine()
    again = go(source, tmp_path / "out", engine)
    assert (again.before, again.failed, len(engine.requests)) == (2, 3, 1)
    second = read(tmp_path / "out")
    assert second.keys() == first.keys()
    assert all(second[key] == first[key] for key in ("a", 2))
    # The faults are gone.
    write(source, request("a"), {"prompt": "b"}, {"prompt": "good"}, request("c"), '{"prompt": "d"}')
    last = go(source, tmp_path / "out")
    assert (last.before, last.failed) == (2, 0)
    content = (tmp_path / "out").read_bytes()
    assert go(source, tmp_path / "out").before == 5
    assert (tmp_path / "out").read_bytes() == content
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("seed", range(30))
def test_an_output_that_was_cut_anywhere_is_completed(tmp_path: Path, seed: int) -> None:
    """Whole results stay as they are, and only the missing ones are asked for. Also with bytes of zero at the end."""
    rng = random.Random(seed)
    source = write(tmp_path / "in", *(request(f"é{i}") if i % 2 else {"prompt": f"{i}"} for i in range(12)))
    target = tmp_path / "out"
    go(source, target)
    whole = target.read_bytes()
    cut = rng.randrange(len(whole) + 1)
    target.write_bytes(whole[:cut] + b"\0" * rng.choice([0, 0, 50]))
    engine = ScriptedEngine()
    summary = go(source, target, engine)
    assert summary.before == whole[:cut].count(b"\n")
    assert summary.total == 12
    assert target.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1])
    assert len(read(target)) == 12


def test_a_line_that_is_broken_in_the_middle_is_dropped(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(request(str(i)) for i in range(6)))
    go(source, tmp_path / "out")
    lines = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join([lines[0], b"\0\0\n", lines[1][:20] + b"\n", lines[1], lines[2], lines[2]]))
    assert go(source, tmp_path / "out").before == 3
    assert len(read(tmp_path / "out")) == 6


KILLED = """
import sys, time
from pathlib import Path
from qwen_jax.cli.batch import answer_file
def answer(url, body):
    time.sleep(0.002)
    return {"text": "x" * 3000}
answer_file(Path(sys.argv[1]), Path(sys.argv[2]), answer, lambda i, record: {}, in_flight=4, progress=False)
"""


def test_a_run_that_is_killed_loses_what_was_in_flight(tmp_path: Path) -> None:
    """SIGKILL again and again: every result that was whole is kept, and in the end there is one for each request."""
    source = write(tmp_path / "in", *(request(str(i)) for i in range(1500)))
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, source, target]
    seen: dict[str | int, Any] = {}
    for _ in range(3):
        size = target.stat().st_size if target.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT)
        end = time.monotonic() + 30
        while (target.stat().st_size if target.exists() else 0) < size + 300_000 and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = target.read_bytes().rsplit(b"\n", 1)[0].split(b"\n")
        results = {one["custom_id"]: one for one in map(json.loads, whole)}
        assert all(results[key] == one for key, one in seen.items())
        assert len(results) > len(seen)
        seen = results
    assert len(seen) < 1500
    assert go(source, target).before == len(seen)
    final = read(target)
    assert len(final) == 1500
    assert all(final[key] == one for key, one in seen.items())


# --- files that cannot be used ---


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good, out = write(tmp_path / "in", request("a")), tmp_path / "out"
    cases = [
        (tmp_path / "missing", out, "does not exist"),
        (tmp_path, out, "is not a file"),
        (write(tmp_path / "empty"), out, "is empty"),
        (write(tmp_path / "blank", "", " "), out, "is empty"),
        (write(tmp_path / "twice", request("a"), request("b"), request("a")), out, "lines 1 and 3 both have"),
        (good, good, "both the input and the output"),
        (good, good / "out", "Cannot make"),
        (good, tmp_path, "is not a file"),
        (good, Path("/dev/null"), "is not a file"),
    ]
    for source, target, message in cases:
        with pytest.raises(InputError, match=message):
            go(source, target)
    assert not out.exists()
    with pytest.raises(InputError, match="in flight"):
        go(good, out, in_flight=0)
    go(good, tmp_path / "new" / "folder" / "out")
    assert set(read(tmp_path / "new" / "folder" / "out")) == {"a"}


@pytest.mark.parametrize(
    "line", ['{"custom_id": "z", "error": null}', '{"line": 2, "error": null}', "{}", '"text"', "5"]
)
def test_results_of_other_requests_are_not_mixed_in_nor_overwritten(tmp_path: Path, line: str) -> None:
    source, target = write(tmp_path / "in", request("a")), write(tmp_path / "out", line)
    with pytest.raises(InputError, match="Give another output"):
        go(source, target)
    assert target.read_text() == line + "\n"


@pytest.mark.parametrize("plain_prompt", [True, False])
def test_results_of_a_request_that_has_changed_are_refused(tmp_path: Path, plain_prompt: bool) -> None:
    """Also those of other settings. The output stays as it was, and what is the same goes on."""

    def records(*prompts: str) -> list[dict[str, Any]]:
        return [{"prompt": one} if plain_prompt else request(str(i), one) for i, one in enumerate(prompts)]

    source, target = write(tmp_path / "in", *records("a", "b")), tmp_path / "out"
    go(source, target, settings="one model")
    before = target.read_bytes()
    with pytest.raises(InputError, match="another request, model or options"):
        go(source, target, settings="another model")
    write(source, *records("a", "c"))
    with pytest.raises(InputError, match="another request, model or options"):
        go(source, target, settings="one model")
    assert target.read_bytes() == before
    write(source, *records("a", "b", "c"))
    assert go(source, target, settings="one model").before == 2
    assert target.read_bytes().startswith(before)


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    with target.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another run"):
            go(source, target)
    assert go(source, target).failed == 0


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line explains the error (`failures.explain`); the run after it goes on."""
    source, target = write(tmp_path / "in", *(request(str(i)) for i in range(9))), tmp_path / "out"
    append, written = batch.append, []

    def full(file: Any, result: Any) -> None:
        if len(written) == 5:
            file.write(b'{"id": "batch_r')
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(result)
        append(file, result)

    monkeypatch.setattr(batch, "append", full)
    with pytest.raises(OSError, match="No space"):
        go(source, target)
    monkeypatch.undo()
    assert go(source, target).before == 5
    assert len(read(target)) == 9
