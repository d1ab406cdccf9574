"""Tool calls are read from a text in the same way however it is cut into pieces."""

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.serving.growing_json import GrowingObject
from qwen_jax.serving.tools import Call, CallArguments, CallEnd, CallStart, Part, ToolParser, collect, parse
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


def in_pieces(text: str, cuts: list[int]) -> tuple[str, list[Call]]:
    """What a parser gives for a text that is cut at some places."""
    parser, parts = ToolParser(), list[Part]()
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        parts += parser.push(text[start:end])
    parts += parser.finish()
    assert not {"", CallArguments("")} & {*parts}
    return collect(parts)


@pytest.mark.parametrize("text", TEXTS)
def test_every_split_gives_the_same_parts(text: str) -> None:
    """One cut at each place, and a cut at all places."""
    whole = parse(text)
    for cut in range(len(text) + 1):
        assert in_pieces(text, [cut]) == whole
    assert in_pieces(text, list(range(len(text)))) == whole


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", CALL, LITERAL, '{"name": "f", "arguments": ', '{"x": "', '"}', "}", "{"),
        *('{"arguments": {}, "name": "g"}', ', "y": -1.5e3', ', "id": 5', "]", "tru", "\\ud83d", "\\ude00", ", "),
        *("\n", " ", "text", '\\"', "\\", '"', "[1, 2]", "<", "<tool", "é", "0" * 80),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_random_texts_at_random_splits(text: str, data: st.DataObject) -> None:
    """The whole text, its pieces, and the parser of whole texts agree; nothing of the text is lost."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    whole = parse(text)
    assert in_pieces(text, cuts) == whole
    assert in_pieces(text, list(range(len(text)))) == whole
    if not whole[1]:
        assert whole[0] == text
    for call in whole[1]:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)
    # The other parser is stricter.
    content, calls, _ = parse_tool_calls(text)
    if len(calls) == len(whole[1]) and all(call.complete for call in whole[1]):
        assert content == whole[0]
        functions = [call["function"] for call in calls]
        assert functions == [{"name": x.name, "arguments": json.loads(x.arguments)} for x in whole[1]]


def test_a_closing_tag_inside_a_string_belongs_to_the_string() -> None:
    content, calls = parse(f"ok\n{LITERAL}")
    assert content == "ok"
    assert json.loads(calls[0].arguments) == {"text": 'a </tool_call> <tool_call> "{[ b'}


def test_calls_come_as_they_are_written() -> None:
    """First the name, then each piece of the arguments as soon as it is certain; the next call begins after its end."""
    parser = ToolParser()
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"x": "a') == [CallStart("f"), CallArguments('{"x": "a')]
    assert parser.push(" </tool_call> b\\") == [CallArguments(" </tool_call> b")]
    assert parser.push('n"') == [CallArguments('\\n"')]
    assert parser.push(', "y": [12') == [CallArguments(', "y": [')]
    assert parser.push("3]}") == [CallArguments("123]}"), CallEnd(complete=True)]
    assert parser.push("}\n</tool_call>") == []
    second = [CallStart("g"), CallArguments('{"x": 1}'), CallEnd(complete=True)]
    assert parser.push("\n" + CALL.replace('"f"', '"g"')) == second
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # Another order: when it is whole. Other members are left out.
        ('a<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>b', "ab", [Call("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {}, "id": [1, "}"]}</tool_call>b', "b", [Call("f", "{}")]),
        # The last brace is missing, or the tag.
        ('<tool_call>{"name": "f", "arguments": {}</tool_call>b', "b", [Call("f", "{}")]),
        (f'<tool_call>{{"name": "g", "arguments": {{}}}}\n{CALL}', "", [Call("g", "{}"), Call("f", '{"x": 1}')]),
        # Arguments that break are as the model wrote them, up to the tag.
        (f'<tool_call>{{"name": "g", "arguments": {{"x": }}}}\n</tool_call>\n{CALL}', "",
         [Call("g", '{"x": }}', complete=False), Call("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "",
         [Call("f", '{"x": NaN}}', complete=False)]),
        # Line breaks in strings are escaped, and spaces are kept.
        ('<tool_call>{"name": "f", "arguments": { "x" : "a\n\tb" }}</tool_call>', "",
         [Call("f", '{ "x" : "a\\n\\tb" }')]),
    ],
)  # fmt: skip
def test_calls_that_models_write(text: str, content: str, calls: list[Call]) -> None:
    assert parse(text) == (content, calls)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.sampled_from([None, 1]), st.data())
def test_what_is_json_is_read_and_what_is_not_breaks(
    value: dict[str, object], ascii_only: bool, indent: int | None, data: st.DataObject
) -> None:
    """Objects of all kinds go through unchanged. With one character changed, it is JSON to both readers or to none."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    growing = GrowingObject()
    assert "".join(growing.push(character)[0] for character in text) == text
    assert growing.state == "complete"
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from('{}[]",:\\0x.-e \n')) + text[at + data.draw(st.integers(0, 1)) :]
    growing = GrowingObject()
    _, rest = growing.push(changed)
    try:
        valid = isinstance(json.loads(changed, strict=False, parse_constant=float), dict)
        json.dumps(json.loads(changed, strict=False), ensure_ascii=False).encode()
    except ValueError:
        valid = False
    assert (growing.state == "complete" and not rest.strip()) == valid


def test_text_before_a_call_is_not_held_back() -> None:
    parser = ToolParser()
    assert parser.push("abc <tool") == ["abc "]
    assert parser.push("box") == ["<toolbox"]


def test_a_call_that_was_cut_off_by_its_length_keeps_what_there_is() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"x": "lo'
    assert parse(text) == ("", [Call("f", '{"x": "lo', complete=False)])
    assert parse('<tool_call>\n{"name": "f') == ('<tool_call>\n{"name": "f', [])


def test_what_is_no_call_stays_text() -> None:
    for text in TEXTS[9], TEXTS[18]:
        assert parse(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{" * 20_000,
        '<tool_call>{"a":' * 20_000,
        '<tool_call>{"' + "<tool_call>" * 20_000,
        '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 300_000,
        "<tool_call>" + '{"a":' * 50_000,
        '<tool_call>{"name": "f", "arguments": {"x": ' * 10_000,
        '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * 300_000,
        '<tool_call>{"name": "f", "arguments": {"x": }' + "</tool_cal" * 30_000,
        '<tool_call>{"name": "f", "arguments": {}' + ', "y": 1' * 30_000,
        "<tool_call>" + " " * 300_000,
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
