"""A model behind a URL is asked by OpenAI's completions, and what it cannot say is an error, never a number."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import TokenInfo
from qwen_jax.serving.logprobs import CompletionLogprobs
from qwen_jax.tokenizer import train_bpe
from tests.helpers.evaluated import Sums, adds, write_sums
from tests.helpers.runs import print_seed
from tests.helpers.scripted_server import Fault, scripted_server
from train.evaluate.run import RunOptions, run
from train.evaluate.server import ServerModel, _echoed
from train.evaluate.store import Store
from train.evaluate.task import Generate, Loglikelihood, Rolling


def echoed(prompt: str) -> bytes:
    """A completion that echoes a prompt, a token for each character; a capital letter is not the most likely one."""
    tokens = [*prompt, "!"]
    logprobs = [None, *(-float(ord(c)) / 10 for c in tokens[1:])]
    pairs = zip(tokens[1:], logprobs[1:], strict=True)
    tops = [None, *({c: p, "x": 0.0} if c.isupper() else {c: p} for c, p in pairs)]
    found = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": [*range(len(tokens))]}
    choice = {"text": prompt + "!", "finish_reason": "length", "logprobs": found}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}}).encode()


def completion(body: dict[str, Any]) -> Fault:
    if body.get("echo"):
        return Fault(body=echoed(body["prompt"]))
    text = adds(Generate(body["prompt"])).text
    choice = {"text": text, "finish_reason": "stop"}
    return Fault(body=json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}}).encode())


def test_requests_of_all_kinds() -> None:
    """Spaces at the end of a context count; conversations are chat completions, texts completions."""

    def answer(body: dict[str, Any]) -> "str | Fault":
        return "chat" if "messages" in body else completion(body)

    requests = [
        Generate(({"role": "user", "content": "hello"},), 7, ("stop",)),
        Generate("2+2=", 8),
        Loglikelihood("ab ", "cd"),
        Loglikelihood("ab", "Cd"),
        Loglikelihood("", "a"),
        Rolling("text"),
    ]
    with scripted_server(answer) as server:
        store = Store(ServerModel(server.url), None)
        found = store(requests)
        bodies = [one.body for one in server.received if one.method == "POST"]
    assert [found[0].text, found[1].text] == ["chat", "4"]
    assert found[2].logprob == pytest.approx(-sum(map(ord, " cd")) / 10)
    assert (found[2].tokens, found[2].greedy, found[3].greedy) == (3, True, False)
    assert "first token" in str(found[4].error)
    assert "--model" in str(found[5].error)
    chat = next(body for body in bodies if "messages" in body)
    assert (chat["max_tokens"], chat["stop"], chat["temperature"]) == (7, ["stop"], 0)


def test_a_server_without_log_probabilities_gives_no_score(tmp_path: Path) -> None:
    """Each item says why it has none."""

    def answer(body: dict[str, Any]) -> "str | Fault":
        choice = {"text": "1", "finish_reason": "stop"}
        return Fault(body=json.dumps({"choices": [choice]}).encode())

    write_sums(tmp_path / "data", print_seed(), 6)
    with scripted_server(answer) as server:
        found = run(ServerModel(server.url), [Sums()], tmp_path / "out", RunOptions(tmp_path / "data"))
    accuracy = found["tasks"]["sums"]["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["unscored"]) == (None, 6)
    (problem,) = found["tasks"]["sums"]["problems"]
    assert "gives no log-probabilities" in problem


def test_a_server_that_is_down_ends_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    write_sums(tmp_path / "data", print_seed(), 12)
    options, down = RunOptions(tmp_path / "data"), [False]

    def answer(body: dict[str, Any]) -> "str | Fault":
        if body.get("echo"):
            down[0] = True
        return Fault(status=500) if down[0] else completion(body)

    gone = pytest.raises(InputError, match=r"has not answered for .* Responses so far are kept")
    with scripted_server(answer) as server, gone:
        run(ServerModel(server.url, give_up_after=0.5), [Sums()], tmp_path / "out", options)
    kept = len((tmp_path / "out" / "responses.jsonl").read_text().splitlines())
    assert kept >= 11
    with scripted_server(completion) as server:
        found = run(ServerModel(server.url), [Sums()], tmp_path / "out", options)
        asked = [one.body for one in server.received if one.method == "POST"]
    # The first round is not asked again.
    assert not any(str(body.get("prompt")).endswith("=") and not body.get("echo") for body in asked)
    assert found["tasks"]["sums"]["metrics"]["accuracy"]["items"] >= 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_logprobs": None}, "most likely"),
        ({"top_logprobs": [None] * 5}, "most likely"),
        ({"token_logprobs": [None, -1.0, float("-inf"), -1.0, -1.0]}, "no log-probability of a token"),
        ({"token_logprobs": [None, -1.0, "-1.0", -1.0, -1.0]}, "no log-probability of a token"),
        ({"text_offset": [0, 1]}, "no log-probabilities of a prompt"),
    ],
)
def test_log_probabilities_that_say_too_little_are_no_answer(change: dict[str, Any], said: str) -> None:
    """Without the most likely tokens nothing is greedy, and what is not finite is no number."""
    whole = json.loads(echoed("abcd"))
    assert _echoed(json.dumps(whole).encode(), 2, 4).greedy
    whole["choices"][0]["logprobs"] |= change
    found = _echoed(json.dumps(whole).encode(), 2, 4)
    assert (found.logprob, found.greedy) == (None, False)
    assert said in str(found.error)


def test_parts_of_characters_count_where_their_character_is() -> None:
    """Their names are longer than they are. Offsets that do not fit the prompt give no number."""
    tokenizer = train_bpe(["plain text"], 280)
    context, continuation = "ab\U0001f98a\nA:", " \u4e16c"
    ids = tokenizer.encode(context + continuation)
    own = len(tokenizer.encode(continuation))
    infos = [None, *(TokenInfo(id, -float(2**i), ()) for i, id in enumerate(ids[1:]))]
    infos.append(TokenInfo(ids[0], -0.5, ()))
    made = CompletionLogprobs(tokenizer, 1).piece(infos, [*ids, ids[0]])
    assert any(name.startswith("bytes:") for name in made["tokens"])
    data = json.dumps({"choices": [{"text": "", "logprobs": made}]}).encode()
    begin, end = len(context), len(context + continuation)
    found = _echoed(data, begin, end)
    assert (found.tokens, found.error) == (own, None)
    assert found.logprob == -sum(float(2**i) for i in range(len(ids) - 1 - own, len(ids) - 1))
    made["text_offset"] = [offset + 3 for offset in made["text_offset"]]
    moved = json.dumps({"choices": [{"text": "", "logprobs": made}]}).encode()
    assert "offsets" in str(_echoed(moved, begin, end).error)
