"""Structured output: what may be sampled under the masks is exactly what the grammar asks for."""

import importlib.util
import json
import random
import re
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference import matching, structured
from qwen_jax.inference.matching import Together
from qwen_jax.inference.structured import Grammars
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, parse_tool_calls
from tests.helpers.grammars import VOCAB, allowed, check_accepts, ends, grammars, pieces, sample, small
from tests.helpers.json_schemas import problem, random_document, random_schema

pytest.importorskip("llguidance")

# --- the laws ---


@pytest.mark.parametrize("part", range(5))
def test_what_is_sampled_parses_and_validates(part: int) -> None:
    """500 random schemas: any way to sample under the masks gives JSON that the schema accepts."""
    for seed in range(100 * part, 100 * (part + 1)):
        rng = random.Random(seed)
        schema = random_schema(rng)
        text = sample(grammars().json_schema(schema), rng)
        assert "\ufffd" not in text
        found = problem(json.loads(text), schema, schema)
        assert found is None, (seed, schema, text, found)


@pytest.mark.parametrize("part", range(3))
def test_valid_documents_are_accepted_however_they_are_split(part: int) -> None:
    """No mask excludes a token that a valid text goes on with, whether the tokenizer would choose it or not."""
    for seed in range(100 * part, 100 * (part + 1)):
        rng = random.Random(seed)
        schema = random_schema(rng)
        document = random_document(rng, schema, schema)
        assert problem(document, schema, schema) is None, "the test itself"
        indent, separators = rng.choice([(None, None), (None, (",", ":")), (2, None)])
        text = json.dumps(document, indent=indent, separators=separators, ensure_ascii=False)
        grammar = grammars().json_schema(schema)
        check_accepts(grammar, small().encode(text, parse_special=False))
        check_accepts(grammar, pieces(text, rng, small()))


def test_documents_that_a_schema_refuses_are_refused() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"]}
    for text in ('{"a": 6}', '{"a": "x"}', "{}", "[]", '{"a": 5', '{"a": 5}x', ' {"a": 5}'):
        with pytest.raises((InputError, AssertionError)):
            check_accepts(grammars().json_schema(schema), small().encode(text))


def test_any_object() -> None:
    rng = random.Random(0)
    for _ in range(20):
        assert isinstance(json.loads(sample(grammars().json_object(), rng)), dict)
    check_accepts(
        grammars().json_object(), small().encode('{"a": [1, {"b": null}], "c": "<tool_call>"}', parse_special=False)
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]+@[a-z]+\.(com|org)",
        r"(0|[1-9][0-9]{0,3})(\.[0-9]+)?",
        r"a/b\\c\"d",
        "ü+|日本{2,3}|\n\t",
        r"^abc$",
        r"(?i)yes|no",
        r"[^x]{3}",
        "",
        "x y # not a comment // nor this",
    ],
)
def test_regular_expressions(pattern: str) -> None:
    rng = random.Random(0)
    grammar = grammars().regex(pattern)
    for _ in range(20):
        text = sample(grammar, rng, patience=20)
        assert re.fullmatch(pattern, text), text


def test_choices() -> None:
    """Also where one is the beginning of another, and with anything in them."""
    choices = ["a", "ab", 'say "hi"', "back\\slash / | (x)", "日本\n語", "😀", "", "<|im_start|>", "\x00"]
    rng = random.Random(0)
    grammar = grammars().choice(choices)
    assert {sample(grammar, rng) for _ in range(400)} == {*choices}
    for text in choices:
        check_accepts(grammar, pieces(text, rng, small()))
    assert sample(grammars().choice(["only"] * 3), rng) == "only"


def test_grammars_in_both_notations() -> None:
    """Sums in brackets, in Lark's notation and in GBNF."""
    lark = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"  // "<x>" is text\nNUMBER: /[0-9]{1,3}/'
    gbnf = 'root ::= sum\nsum ::= term ("+" term)*\nterm ::= [0-9] [0-9]? [0-9]? | "(" sum ")"'
    for text in (lark, gbnf):
        grammar, rng = grammars().ebnf(text), random.Random(0)
        for _ in range(20):
            found = sample(grammar, rng, patience=15)
            assert set(found) <= set("0123456789+()")
            eval(re.sub(r"\b0+(?=\d)", "", found))
        check_accepts(grammar, small().encode("(1+23)+((456))"))
    check_accepts(
        grammars().ebnf('start: "<|im_start|>" %json {"type": "integer"}'), pieces("<|im_start|>-5", rng, small())
    )


def test_an_end_id_that_is_also_text_is_never_text() -> None:
    """A token of letters that ends texts is allowed where the text is complete, and not within a string."""
    a, b = small().encode("a")[0], small().encode("b")[0]
    grammar = Grammars(small(), VOCAB, [a]).regex("b[ab]*")
    matcher = grammar.matcher()
    assert a not in allowed(matcher)
    matcher.accept(b)
    assert a in allowed(matcher)
    matcher.accept(a)
    assert matcher.ended


def test_without_end_ids_the_matcher_tells_the_end() -> None:
    matcher = Grammars(small(), VOCAB, []).choice(["ab", "abc"]).matcher()
    for token in pieces("ab", random.Random(0), small()):
        assert not matcher.ended
        matcher.accept(token)
    assert matcher.complete
    assert allowed(matcher).tolist() == small().encode("c")
    matcher.accept(small().encode("c")[0])
    assert matcher.ended
    assert not len(allowed(matcher))


# --- tools ---

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS: list[tuple[str, dict[str, Any]]] = [
    ("weather", WEATHER),
    ('odd "name"/é', {}),
    ("none", {"properties": {}, "additionalProperties": False}),
]


def without_tags(folder: Path) -> Tokenizer:
    """A tokenizer whose vocabulary ends before <tool_call>."""
    small().save(folder)
    first = small().token_to_id("<tool_call>")
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        values = json.loads((folder / name).read_text())
        if isinstance(values[key], list):
            values[key] = [token for token in values[key] if token["id"] < first]
        else:
            values[key] = {i: token for i, token in values[key].items() if int(i) < first}
        (folder / name).write_text(json.dumps(values))
    return load_tokenizer(folder)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("named", [None, "weather", "none"])
def test_calls_of_tools(named: str | None, parallel: bool) -> None:
    """What is sampled is read back as calls of the tools, with arguments that their schemas accept."""
    grammar, rng = grammars().tool_calls(TOOLS, named, parallel), random.Random(0)
    tags = [small().control_ids[tag] for tag in ("<tool_call>", "</tool_call>")]
    counts = set()
    for _ in range(15):
        text = sample(grammar, rng, patience=60, may=tags)
        content, calls, problems = parse_tool_calls(text)
        assert (content, problems) == ("", [])
        counts.add(len(calls))
        for call in calls:
            name, schema = call["function"]["name"], dict(TOOLS)[call["function"]["name"]]
            assert named in (None, name)
            assert problem(call["function"]["arguments"], {"type": "object", **schema}, schema) is None
    assert (max(counts) > 1) == parallel
    assert min(counts) == 1


def test_calls_are_written_as_the_template_writes_them(tmp_path: Path) -> None:
    """With control tokens where the vocabulary has them, with text where it has not; also with a tag in a string."""
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>", "unit": "C"}}\n</tool_call>'
    tags = [small().control_ids[tag] for tag in ("<tool_call>", "</tool_call>")]
    body = small().encode(text[len("<tool_call>") : -len("</tool_call>")], parse_special=False)
    call = [tags[0], *body, tags[1]]
    newline = small().encode("\n")
    check_accepts(grammars().tool_calls(TOOLS, None, False), call)
    check_accepts(grammars().tool_calls(TOOLS, "weather", True), [*call, *newline, *call])
    with pytest.raises(AssertionError):
        check_accepts(grammars().tool_calls(TOOLS, None, True), pieces(text, random.Random(0), small()))
    with pytest.raises(AssertionError):
        check_accepts(grammars().tool_calls(TOOLS, "none", True), call)
    plain = without_tags(tmp_path)
    assert "<tool_call>" not in plain.control_ids
    grammar = Grammars(plain, VOCAB, [plain.eos_id]).tool_calls(TOOLS, None, True)
    check_accepts(grammar, plain.encode(text + "\n" + text), end=plain.eos_id)


# --- sharing ---


def test_a_grammar_is_compiled_once_and_kept_by_its_content() -> None:
    made = Grammars(small(), VOCAB, ends())
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    one = made.json_schema(schema)
    assert made.json_schema(json.loads(json.dumps(schema))) is one
    assert made.json_schema(json.dumps(schema)) is one
    assert made.json_schema({"type": "object", "properties": {"a": {}, "b": {}}}) is not one, "the order counts"
    assert made.regex("a") is made.regex("a")
    for i in range(300):
        made.regex(f"a{i}")
    assert len(made._cache) <= 256
    assert made.json_schema(schema) is not one, "the oldest is forgotten"


def test_rows_and_copies_do_not_share_memory() -> None:
    """Matchers of one grammar that go on differently, their masks in rows of one array."""
    grammar, rng = grammars().json_schema(random_schema(random.Random(3))), random.Random(1)
    matchers = [grammar.matcher() for _ in range(6)]
    alone: list[list[int]] = [[] for _ in matchers]
    masks = np.zeros((6, -(-VOCAB // 32)), np.int32)
    for _ in range(40):
        before = masks.copy()
        for row, matcher in enumerate(matchers):
            matcher.fill(masks[row])
            assert (masks[row + 1 :] == before[row + 1 :]).all(), "a row is written by its own matcher only"
            copied = matcher.copy()
            token = rng.choice(allowed(matcher).tolist())
            other = rng.choice(allowed(copied).tolist())
            copied.accept(other)
            replayed = grammar.matcher()
            for past in alone[row]:
                replayed.accept(past)
            assert allowed(replayed).tolist() == allowed(matcher).tolist()
            if not matcher.ended and token not in ends():
                matcher.accept(token)
                alone[row].append(token)


@pytest.mark.parametrize(("threads", "lexers"), [(1, 1), (4, 1), (4, 3)])
def test_texts_go_on_together_as_each_does_alone(threads: int, lexers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and errors of texts with several grammars, one of which gets a token that it does not allow."""
    monkeypatch.setattr(structured, "lexer_count", lambda: lexers)
    monkeypatch.setattr(structured, "_LEXER_SECONDS", 60.0)
    rng, made = random.Random(threads + lexers), Grammars(small(), VOCAB, ends())
    both = [made.json_schema(random_schema(rng)) for _ in range(3)] + [made.regex("[ab]{600}")]
    both += rng.sample([made.tool_calls(TOOLS, None, True), *both, *both], 9)
    together, alone, other = Together(threads), [g.matcher() for g in both], [g.matcher() for g in both]
    masks = np.zeros((len(both) + 1, -(-VOCAB // 32)), np.int32)
    for step in range(30):
        going = [i for i, matcher in enumerate(alone) if not matcher.ended]
        masks[:] = 7
        errors = together.fill([other[i] for i in going], masks[: len(going)])
        assert (masks[len(going) :] == 7).all(), "no more is written"
        want = np.zeros_like(masks)
        for row, i in enumerate(going):
            alone[i].fill(want[row])
        assert errors == [None] * len(going)
        np.testing.assert_array_equal(masks[: len(going)], want[: len(going)])
        bits = np.unpackbits(want[: len(going)].view(np.uint8), axis=1, bitorder="little")
        tokens = [rng.choice(np.flatnonzero(row).tolist()) for row in bits]
        if step == 29:
            tokens[going.index(3)] = VOCAB - 1
        found = together.accept([other[i] for i in going], tokens)
        for i, token, error in zip(going, tokens, found, strict=True):
            problem_alone = matching._error(alone[i].accept, token)
            assert str(error) == str(problem_alone)
            assert (error is not None) == ((step, i) == (29, 3))
            assert error is not None or other[i].ended == alone[i].ended


def test_a_text_that_takes_long_does_not_hold_up_others_of_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a text with another lexer are made meanwhile; with one lexer each waits for one that takes long."""
    monkeypatch.setattr(structured, "lexer_count", lambda: 2)
    monkeypatch.setattr(structured, "_LEXER_SECONDS", 60.0)
    grammar = Grammars(small(), VOCAB, ends()).ebnf('start: e\ne: e e e | e e | "a"')
    slow, quick = grammar.matcher(), grammar.matcher()
    masks, token = np.zeros((2, -(-VOCAB // 32)), np.int32), small().encode("a")[0]
    for _ in range(200):
        slow.accept(token)
    quick.accept(token)
    alone, beside = [], []
    for _ in range(5):
        start = time.perf_counter()
        slow.copy().fill(masks[0])
        alone.append(time.perf_counter() - start)
        thread = threading.Thread(target=slow.copy().fill, args=(masks[0],))
        thread.start()
        time.sleep(0.003)
        start = time.perf_counter()
        quick.copy().fill(masks[1])
        beside.append(time.perf_counter() - start)
        thread.join()
    assert statistics.median(beside) < statistics.median(alone) / 3


def test_texts_that_take_long_together_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a grammar that is too much work meets its budget, and each time it is timed for more tokens."""
    monkeypatch.setattr(matching, "TOKEN_SECONDS", 0.0)
    matchers, together = [grammars().regex("a*").matcher() for _ in range(2)], Together(1)
    masks, token = np.zeros((2, -(-VOCAB // 32)), np.int32), small().encode("a")[0]
    counts = []
    for _ in range(3):
        assert not any(matcher.timed for matcher in matchers)
        together.fill(matchers, masks)
        assert all(matcher.timed for matcher in matchers)
        counts.append(0)
        while matchers[0].timed:
            for matcher in matchers:
                matcher.accept(token)
            counts[-1] += 1
    assert counts[1] == 2 * counts[0]
    assert counts[2] == 2 * counts[1]
    monkeypatch.setattr(matching, "TOKEN_SECONDS", 1e9)
    together.fill(matchers, masks)
    assert not any(matcher.timed for matcher in matchers), "short calls change nothing"


def test_threads_share_grammars() -> None:
    """Eight threads compile and use the same grammars at once, and find what one thread finds."""
    schemas = [random_schema(random.Random(seed)) for seed in range(12)]
    expected = [sample(grammars().json_schema(schema), random.Random(i)) for i, schema in enumerate(schemas)]
    made, failures = Grammars(small(), VOCAB, ends()), []

    def work(order: list[int]) -> None:
        try:
            for i in order:
                assert sample(made.json_schema(schemas[i]), random.Random(i)) == expected[i]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(random.Random(n).sample(range(12), 12),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(32, np.int64),
        np.zeros(31, np.int32),
        np.zeros(64, np.int32)[::2],
        np.zeros((1, 32), np.int32),
        np.broadcast_to(np.int32(0), (32,)),
    ],
)
def test_masks_of_a_wrong_form_are_refused(mask: np.ndarray) -> None:
    """The library writes to an address, so a wrong one must never reach it."""
    with pytest.raises(ValueError, match=r"mask"):
        grammars().json_object().matcher().fill(mask)


def test_a_token_that_is_not_allowed_spoils_the_matcher_only() -> None:
    grammar = grammars().choice(["ab"])
    matcher = grammar.matcher()
    for token in (small().encode("b")[0], small().control_ids["<|im_start|>"], VOCAB - 1, 10**9):
        spoiled = matcher.copy()
        with pytest.raises(InputError, match="cannot go on"):
            spoiled.accept(token)
        with pytest.raises(InputError, match="cannot go on"):
            allowed(spoiled)
        assert not spoiled.ended
    check_accepts(grammar, small().encode("ab"))


def test_the_time_of_copies_counts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals are tried on copies: their work is that of the text, and what a grammar may take grows with it."""
    monkeypatch.setattr(matching, "BURST_SECONDS", 0.05)
    monkeypatch.setattr(matching, "TOKEN_SECONDS", 0.0)
    matcher = grammars().ebnf('start: e\ne: e e e | e e | "a"').matcher()
    token = small().encode("a")[0]

    def go_on() -> None:
        for _ in range(200):
            matcher.copy().fill(np.zeros(-(-VOCAB // 32), np.int32))
            matcher.accept(token)

    with pytest.raises(InputError, match=r"too much work: 0\.\d s after \d+ tokens"):
        go_on()
    # Another text has a budget of its own.
    allowed(grammars().ebnf('start: e\ne: e e e | e e | "a"').matcher())


# --- the published vocabulary ---


def test_the_published_vocabulary() -> None:
    """Its tags are the tokens 151657 and 151658; rows of the embedding beyond its tokens are never allowed."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = load_tokenizer(Path(spec.origin).parent / "resources" / "qwen.tiktoken")
    size, rng = 152064, random.Random(0)
    made = Grammars(tokenizer, size, [151645, 151643])
    control = {*range(151643, size)}
    call = tokenizer.encode(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "unit": "C"}}\n</tool_call>'
    )
    assert (call[0], call[-1]) == (151657, 151658)
    check_accepts(made.tool_calls(TOOLS, None, True), call, size, end=151645)
    for seed in range(20):
        rng = random.Random(seed)
        schema = random_schema(rng)
        text = json.dumps(random_document(rng, schema, schema), ensure_ascii=False)
        grammar = made.json_schema(schema)
        check_accepts(grammar, tokenizer.encode(text, parse_special=False), size, end=151643)
        matcher = grammar.matcher()
        for token in tokenizer.encode(text, parse_special=False):
            assert {*allowed(matcher, size).tolist()} & control <= {151643, 151645}
            matcher.accept(token)
        assert {*allowed(matcher, size).tolist()} & control == {151643, 151645}
