"""Tools that a policy calls: what they answer is what the template writes, as plain text."""

import dataclasses
import enum
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import ChatTemplate
from tests.helpers.conversations import CONTENTS, chat_tokenizer
from tests.helpers.runs import print_seed
from train.environments import (
    FileSearchTool,
    Observation,
    PythonTool,
    ToolEnvironment,
    ToolUnavailableError,
    observation_ids,
    shortened,
)
from train.sampler import Prompt

PROMPT = Prompt(0, [1])


class Outcome(enum.Enum):
    PASS, FAIL, ERROR = range(3)


@dataclasses.dataclass(frozen=True)
class Result:
    outcome: Outcome
    stdout: bytes = b""
    stderr: bytes = b""
    killed_by: str | None = None
    reason: str | None = None


class FakeSandbox:
    """Gives results by program."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        self.results = results

    def run(self, language: str, source: str) -> Result:
        assert language == "python"
        return self.results[source]


SANDBOX = FakeSandbox(
    {
        "good": Result(Outcome.PASS, b"3\n"),
        "silent": Result(Outcome.PASS),
        "bad": Result(Outcome.FAIL, b"1\n", b"NameError: x\n"),
        "slow": Result(Outcome.FAIL, b"", b"", "time"),
        "long": Result(Outcome.PASS, b"a" * 500 + b"z" * 500),
        "lost": Result(Outcome.ERROR, reason="no namespace"),
    }
)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def step(environment: ToolEnvironment, *calls: str) -> tuple[str, ...]:
    found = environment.step(environment.reset(PROMPT), "I try.\n" + "\n".join(calls), [1])
    assert found is not None
    assert found.role == "tool"
    return found.texts


def test_answers_are_what_the_template_writes() -> None:
    """The policy's turns and the answers together are the rendered conversation, whatever the texts; control tokens in
    answers are plain text, and an end id that the policy did not write is not missing."""
    tokenizer, rng = chat_tokenizer(), print_seed()
    im_end = tokenizer.control_ids["<|im_end|>"]
    for count in (1, 1, 2, 3):
        texts = tuple(rng.choice(CONTENTS, count).tolist())
        messages = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Let me see."},
            *({"role": "tool", "content": text} for text in texts),
        ]
        begin = tokenizer.encode_chat(messages[:1]) + tokenizer.encode("Let me see.", add_special_tokens=False)
        for last in (im_end, tokenizer.control_ids["<|endoftext|>"]):
            between = observation_ids(tokenizer, Observation(texts), last)
            whole = begin + ([im_end] if last == im_end else []) + between
            # The tokenizer reads texts in Unicode's composed form.
            want = unicodedata.normalize("NFC", tokenizer.chat_template.render(messages))
            assert tokenizer.decode(whole) == want
            # An end of the policy's turn, one of the answer, and the next turn begins: nothing else is a control token.
            ends = [i for i in whole[len(begin) :] if i in (im_end, tokenizer.control_ids["<|im_start|>"])]
            assert len(ends) == 4
    assert tokenizer.control_ids["<|endoftext|>"] not in observation_ids(tokenizer, Observation(("<|endoftext|>",)), 0)


def test_a_template_that_changes_answers_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InputError, match="role tool"):
        observation_ids(tokenizer, Observation(("x",)), 0)


def test_a_turn_without_a_call_ends_and_so_does_the_last_one() -> None:
    environment = ToolEnvironment([PythonTool(SANDBOX)], max_turns=3)
    state = environment.reset(PROMPT)
    again = call("python", '{"code": "good"}')
    assert environment.step(state, again, [1]) == Observation(("3",))
    assert environment.step(state, again, [1]) == Observation(("3",))
    assert environment.step(state, again, [1]) is None
    assert environment.step(environment.reset(PROMPT), "The answer is 3.", [1]) is None
    assert environment.step(environment.reset(PROMPT), "<tool_call>\nnot a call\n</tool_call>", [1]) is None


def test_python_gives_what_it_prints_and_a_failed_sandbox_is_no_answer() -> None:
    environment = ToolEnvironment([PythonTool(SANDBOX)], max_characters=100)
    codes = ("good", "silent", "bad", "slow")
    texts = step(environment, *(call("python", f'{{"code": "{code}"}}') for code in codes))
    assert texts[:3] == ("3", "The program printed nothing.", "1\nNameError: x")
    assert "limit of time" in texts[3]
    (long,) = step(environment, call("python", '{"code": "long"}'))
    assert long == "a" * 50 + "\n[900 characters left out]\n" + "z" * 50
    with pytest.raises(ToolUnavailableError, match="no namespace"):
        step(environment, call("python", '{"code": "lost"}'))


def test_wrong_calls_are_told_to_the_policy() -> None:
    environment = ToolEnvironment([PythonTool(SANDBOX)], max_calls=2)
    texts = step(environment, call("pyhton", "{}"), call("python", '{"code": 3}'), call("python", '{"code": "good"}'))
    assert texts[0] == "Error: there is no tool pyhton; the tools are python."
    assert texts[1] == "Error: the argument code must be a text."
    assert texts[2] == "Error: a turn may have 2 calls."
    (nested,) = step(environment, call("python", '{"code": ' + '{"a": ' * 5000 + "1" + "}" * 5001))
    assert nested.startswith("Error: ")


def test_a_tool_that_is_set_up_wrongly_ends_the_run() -> None:
    class Wrong(PythonTool):
        def __call__(self, arguments: Mapping[str, Any]) -> str:
            raise InputError("no such folder")

    with pytest.raises(InputError, match="no such folder"):
        step(ToolEnvironment([Wrong(SANDBOX)]), call("python", '{"code": "good"}'))


def test_search_ranks_paragraphs_by_rare_words_and_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("a secret walrus")
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "a.txt").write_text("The sea is wide and the sea is deep.\n\nA walrus swims in the sea.\n\nNothing here.")
    (folder / "deep" / "b.md").write_text("The Walrus\nand the carpenter.")
    (folder / "c.bin").write_bytes(b"walrus \xff")
    (folder / "d.txt").write_bytes(b"\xff\xfe kelp")
    search = FileSearchTool(folder, results=2)
    assert search({"query": "walrus sea"}).startswith("a.txt:\nA walrus swims")
    found = search({"query": "WALRUS"})
    assert found.count("alrus") == 2
    assert "secret" not in found
    assert "deep/b.md:\nThe Walrus\nand the carpenter." in found
    assert "kelp" in search({"query": "kelp"})
    assert search({"query": "zebra"}) == "Nothing was found."
    assert step(ToolEnvironment([search]), call("search", '{"query": "carpenter"}'))[0].startswith("deep/b.md")


def test_bad_tools_are_refused(tmp_path: Path) -> None:
    python = PythonTool(SANDBOX)
    with pytest.raises(InputError, match="different names"):
        ToolEnvironment([python, python])
    with pytest.raises(InputError, match="max_turns"):
        ToolEnvironment([python], max_turns=0)
    with pytest.raises(InputError, match="not a folder"):
        FileSearchTool(tmp_path / "missing")
    with pytest.raises(InputError, match="no text"):
        FileSearchTool(tmp_path)
    assert shortened("abc", 3) == "abc"
    assert [schema["function"]["name"] for schema in ToolEnvironment([python]).schemas] == ["python"]
