"""Tool calls are read from a text in the same way however it is cut into pieces."""

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.serving.tools import Call, ToolParser, parse
from qwen_jax.tokenizer import parse_tool_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
LITERAL = '<tool_call>\n{"name": "write", "arguments": {"text": "a </tool_call> <tool_call> \\"{[ b"}}\n</tool_call>'
TEXTS = [
    "",
    "plain",
    "a < b, <tool, <tool_cal",
    "\n",
    CALL,
    f"Let me look.\n{CALL}",
    f"{CALL}\n{CALL}",
    f"{LITERAL}\n{CALL} and more",
    LITERAL,
    "<tool_call>not JSON</tool_call>",
    f'<tool_call>{{"name": "f"}}</tool_call>\n{CALL}',
    f'<tool_call>{{"name": "f", "arguments": {{"x": }}}}</tool_call>{CALL}',
    f'<tool_call>{{"name": "f", "arguments": {{"x": "unterminated</tool_call>\n{CALL}',
    '<tool_call>{"name": "f", "arguments": {}}',
    '<tool_call>{"name": "f", "arguments": {}}\n</tool',
    f'<tool_call>{{"name": "f", "arguments": {{}}}} x</tool_call>{CALL}',
    '<tool_call>\n{"name": "f", "arguments": {"x": "é\\u00e9 \\ud83d\\ude00 日本"}}\n</tool_call>',
    f"<tool_call><tool_call>{CALL}",
    '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>',
]


def in_pieces(text: str, cuts: list[int], truncated: bool = False) -> tuple[str, list[Call]]:
    """What a parser gives for a text that is cut at some places."""
    parser, parts = ToolParser(), []
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        parts += parser.push(text[start:end])
    parts += parser.finish(truncated=truncated)
    assert "" not in parts
    return "".join(x for x in parts if isinstance(x, str)), [x for x in parts if isinstance(x, Call)]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_every_split_gives_the_same_parts(text: str, truncated: bool) -> None:
    """One cut at each place, and a cut at all places."""
    whole = parse(text, truncated=truncated)
    for cut in range(len(text) + 1):
        assert in_pieces(text, [cut], truncated) == whole
    assert in_pieces(text, list(range(len(text))), truncated) == whole


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", CALL, LITERAL, '{"name": "f", "arguments": ', '{"x": "', '"}', "}", "{"),
        *("\n", " ", "text", '\\"', "\\", '"', "[1, 2]", "<", "<tool", "é", "0" * 80),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_random_texts_at_random_splits(text: str, data: st.DataObject) -> None:
    """The whole text, its pieces, and the parser of whole texts agree; nothing of the text is lost."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    truncated = data.draw(st.booleans())
    whole = parse(text, truncated=truncated)
    assert in_pieces(text, cuts, truncated) == whole
    assert in_pieces(text, list(range(len(text))), truncated) == whole
    if not whole[1]:
        assert whole[0] == text
    # The other parser is stricter in two points, which these texts reach at their end or by a line break.
    content, calls, _ = parse_tool_calls(text)
    if len(calls) == len(whole[1]):
        assert content == whole[0]
        functions = [call["function"] for call in calls]
        assert functions == [{"name": x.name, "arguments": json.loads(x.arguments)} for x in whole[1]]


def test_a_closing_tag_inside_a_string_belongs_to_the_string() -> None:
    content, calls = parse(f"ok\n{LITERAL}")
    assert content == "ok"
    assert json.loads(calls[0].arguments) == {"text": 'a </tool_call> <tool_call> "{[ b'}


def test_parallel_calls_come_in_order_and_each_as_soon_as_it_is_whole() -> None:
    parser = ToolParser()
    first = [part for piece in (CALL[:30], CALL[30:]) for part in parser.push(piece)]
    assert first == [Call("f", '{"x": 1}')]
    assert parser.push("\n" + CALL.replace('"f"', '"g"')) == [Call("g", '{"x": 1}')]
    assert parser.finish() == []


def test_text_before_a_call_is_not_held_back() -> None:
    parser = ToolParser()
    assert parser.push("abc <tool") == ["abc "]
    assert parser.push("box") == ["<toolbox"]


def test_a_call_that_was_cut_off_by_its_length_keeps_what_there_is() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"x": "lo'
    assert parse(text, truncated=True) == ("", [Call("f", '{"x": "lo', complete=False)])
    assert parse(text) == (text, [])
    assert parse('<tool_call>\n{"name": "f', truncated=True) == ('<tool_call>\n{"name": "f', [])


def test_what_is_no_call_stays_text() -> None:
    for text in TEXTS[9], TEXTS[18], TEXTS[19], TEXTS[20]:
        assert parse(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{" * 20_000,
        '<tool_call>{"a":' * 20_000,
        '<tool_call>{"' + "<tool_call>" * 20_000,
        '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 300_000,
        "<tool_call>" + '{"a":' * 50_000,
        "<" * 100_000,
    ],
)
def test_the_time_is_linear(text: str) -> None:
    """No text of a model, at the wish of whoever wrote the prompt, stops the event loop."""
    start = time.perf_counter()
    parser = ToolParser()
    for at in range(0, len(text), 5):
        parser.push(text[at : at + 5])
    parser.finish()
    assert time.perf_counter() - start < 10
