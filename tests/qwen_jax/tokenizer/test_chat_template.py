"""Chat templates against Hugging Face's rendering, the sandbox, message checks, and tool calls read back."""

import datetime
import hashlib
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import (
    ChatTemplate,
    Tokenizer,
    default_chat_template,
    load_tokenizer,
    parse_tool_arguments,
    parse_tool_calls,
    render_chat,
    train_bpe,
)

TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für eine Stadt <b>& \"Umgebung\"</b> 天气 'now'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: Any, wrapped: bool = True) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function} if wrapped else function


SYSTEM = {"role": "system", "content": "Du bist höflich. 你好 <|im_end|>"}
USER = {"role": "user", "content": "How warm is it in Köln & Paris? 👍🏽\n\n  "}
REPLY = {"role": "assistant", "content": "It is warm."}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("get_weather", {"city": "Köln", "days": 2}), call("clock", {}, wrapped=False)],
}
CALL_WITH_TEXT = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [call("get_weather", {"city": "<Paris> \"x\" 'y'", "n": [1, 2.5, None, True]})],
}
CALL_AS_STRING: dict[str, Any] = {"role": "assistant", "tool_calls": [call("get_weather", '{"city": "Köln"}')]}
RESULT = {"role": "tool", "content": '{"temperature": "21°"}', "tool_call_id": "call_1"}
OTHER_RESULT = {"role": "tool", "content": "12:00"}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM],
    [SYSTEM, USER],
    [USER, REPLY],
    [SYSTEM, USER, REPLY, USER],
    [USER, SYSTEM, USER],
    [USER, {**REPLY, "tool_calls": []}],
    [USER, {**REPLY, "tool_calls": None}, USER],
    [USER, CALLS],
    [SYSTEM, USER, CALLS, RESULT, OTHER_RESULT],
    [USER, CALLS, RESULT, OTHER_RESULT, REPLY, USER, CALL_WITH_TEXT, RESULT],
    [USER, CALL_WITH_TEXT, RESULT, REPLY],
    [USER, CALL_AS_STRING, RESULT],
    [USER, {**CALLS, "content": ""}, RESULT, USER, OTHER_RESULT],
    [RESULT, RESULT, USER],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
]
TOOLS = [None, [], [WEATHER], [WEATHER, CLOCK]]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe([], 278)._engine)


def test_default_template_is_the_published_one() -> None:
    """Hash of the template in the Qwen2.5 instruct checkpoints."""
    source = default_chat_template().encode()
    assert len(source) == 2507
    assert hashlib.sha256(source).hexdigest() == "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f"


@pytest.mark.parametrize("conversation", range(len(CONVERSATIONS)))
def test_grid_equals_hugging_face(oracle: PreTrainedTokenizerFast, conversation: int) -> None:
    messages = CONVERSATIONS[conversation]
    for tools, prompt in itertools.product(TOOLS, [False, True]):
        expected = oracle.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=default_chat_template(),
        )
        assert render_chat(messages, tools, add_generation_prompt=prompt) == expected


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
tool_call = st.builds(call, st.just("f"), st.dictionaries(text, json_value, max_size=3), st.booleans())
message = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "tool"]), text
    ),
    st.builds(lambda content: {"role": "assistant", "content": content}, text),
    st.builds(
        lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls},
        st.none() | text,
        st.lists(tool_call, min_size=1, max_size=3),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(message, min_size=1, max_size=6), st.sampled_from(TOOLS), st.booleans())
def test_random_conversations_equal_hugging_face(
    oracle: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any, prompt: bool
) -> None:
    expected = oracle.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=default_chat_template()
    )
    assert render_chat(messages, tools, add_generation_prompt=prompt) == expected


TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
turn = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "tool", "assistant"]),
    text,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(turn, max_size=4), turn, st.sampled_from(TOOLS), st.sampled_from([default_chat_template(), TRIMMED]))
def test_going_on_with_the_final_message_equals_hugging_face(
    oracle: PreTrainedTokenizerFast, before: list[dict[str, Any]], final: dict[str, Any], tools: Any, source: str
) -> None:
    expected = oracle.apply_chat_template(
        [*before, final], tools=tools, tokenize=False, continue_final_message=True, chat_template=source
    )
    assert ChatTemplate(source).render_open([*before, final], tools) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(message, min_size=1, max_size=4), text, st.sampled_from(TOOLS))
def test_an_answer_that_goes_on_is_the_opening_of_one_and_its_text(
    messages: list[dict[str, Any]], content: str, tools: Any
) -> None:
    template = ChatTemplate(default_chat_template())
    opened = template.render_open([*messages, {"role": "assistant", "content": content}], tools)
    assert opened == template.render(messages, tools, add_generation_prompt=True) + content


def test_spaces_of_a_template_behind_a_text_are_no_spaces_of_the_text() -> None:
    """Where the template takes those of the text away."""
    spaced = ChatTemplate("{% for m in messages %}[{{ m.content | trim }} ]{% endfor %}")
    assert spaced.render_open([USER, {**REPLY, "content": "It is "}]) == f"[{USER['content'].strip()} ][It is"
    kept = ChatTemplate("{% for m in messages %}[{{ m.content }} ]{% endfor %}")
    assert kept.render_open([{**REPLY, "content": "It is "}]) == "[It is "


@pytest.mark.parametrize(
    ("final", "source", "words"),
    [
        (CALLS, default_chat_template(), "message 1: to go on"),
        (CALL_WITH_TEXT, default_chat_template(), "message 1: to go on"),
        (REPLY, "{{ messages[0].content }}", "renders the text of the final message 0 times"),
        (REPLY, "{{ messages[-1].content * 2 }}", "renders the text of the final message 2 times"),
    ],
)
def test_what_cannot_go_on_is_an_error(final: dict[str, Any], source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ChatTemplate(source).render_open([USER, final])


def test_a_template_tells_what_it_reads() -> None:
    """Neither what each template is given nor what Jinja and Hugging Face define."""
    assert ChatTemplate(default_chat_template()).variables() == set()
    source = (
        "{% set ns = namespace(a=1) %}{% for m in messages %}{{ loop.index }}{{ m.x }}{% endfor %}{{ range(thinking) }}"
        "{{ strftime_now('%Y') }}{% if self_check is defined and tools and documents %}{{ bos_token }}{% endif %}"
        "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    )
    assert ChatTemplate(source).variables() == {"thinking", "self_check", "bos_token"}
    both = ChatTemplate({"default": "{{ a }}", "tool_use": "{{ b }}"})
    assert (both.variables(), both.variables([CLOCK])) == ({"a"}, {"b"})
    with pytest.raises(InputError, match="not valid Jinja"):
        ChatTemplate({"default": "{% if"}).variables()


def test_hermes_format_written_out() -> None:
    assert render_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A", "tool_calls": [call("clock", {"z": "é"}), call("clock", {})]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert render_chat(messages, [CLOCK], add_generation_prompt=False) == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        '<|im_start|>assistant\nA\n<tool_call>\n{"name": "clock", "arguments": {"z": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


FEATURES = [
    "{{ messages | tojson }}|{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{{ 'é<&>' | tojson }}{{ 'é<&>' | tojson(ensure_ascii=true) }}{{ {'b': 1} | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}\n  {% if true %}\n    {{ m['role'] }}\n  {% endif %}\n{% endfor %}\n",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ nothing }}{{ extra.a[0] }}",
    "{{ messages[0].content.strip().split(' ') | join('-') | upper }}{{ messages[-1]['missing'] is defined }}",
]


def without_nothing(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without keys whose value is None, which transformers leaves out itself from version 5.23 on."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@pytest.mark.parametrize("source", FEATURES)
def test_other_templates_equal_hugging_face(oracle: PreTrainedTokenizerFast, source: str) -> None:
    """A key whose value is None is one that is missing, also where the installed transformers prints "None" for it."""
    messages: list[dict[str, Any]] = [SYSTEM, USER, CALLS, RESULT]
    extra = {"a": ["é", 1]}
    asked = messages if TRANSFORMERS >= (5, 23) else without_nothing(messages)
    expected = oracle.apply_chat_template(asked, tokenize=False, chat_template=source, extra=extra)
    assert ChatTemplate(source).render(messages, add_generation_prompt=False, extra=extra) == expected


def folder_of_templates(folder: Path, **config: Any) -> tuple[Tokenizer, Any]:
    """A tokenizer with changes to tokenizer_config.json, loaded here and by transformers."""
    if not (folder / "tokenizer_config.json").exists():
        train_bpe([], 278).save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "{{ messages[0].content + eos_token + pad_token }}",
        "{{ bos_token is defined }}{{ sep_token is defined }}{{ unk_token is defined }}{{ own_token }}{{ eos_token }}",
        "{{ [bos_token, eos_token, pad_token, mask_token] | tojson }}",
    ],
)
def test_templates_know_the_special_tokens(source: str, tmp_path: Path) -> None:
    bos = {"content": "<|im_start|>", "special": True, "__type": "AddedToken"}
    tokenizer, hf = folder_of_templates(
        tmp_path,
        chat_template=source,
        bos_token=bos,
        eos_token="<|im_end|>",
        own_token="<|box_end|>",
        mask_token="<|box_start|>",
    )
    expected = hf.apply_chat_template([USER], tokenize=False)
    assert render_chat([USER], template=tokenizer.chat_template) == expected
    assert tokenizer.decode(tokenizer.encode_chat([USER])) == expected
    with_other = hf.apply_chat_template([USER], tokenize=False, eos_token="!")
    assert tokenizer.chat_template.render([USER], add_generation_prompt=False, eos_token="!") == with_other


NAMED = [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]


def test_of_several_templates_tools_choose_as_in_transformers(tmp_path: Path) -> None:
    """In tokenizer_config.json, in files of their own, and in files that win over tokenizer_config.json."""
    tokenizer, hf = folder_of_templates(tmp_path, chat_template=NAMED)
    tokenizer.save(tmp_path / "again")
    hf.save_pretrained(tmp_path / "files")
    assert (tmp_path / "files" / "additional_chat_templates").is_dir()
    folder_of_templates(tmp_path / "files", chat_template="not this one")
    folder_of_templates(tmp_path / "more", chat_template="overridden")
    (tmp_path / "more" / "chat_template.jinja").write_text("from the file{{ eos_token }}")
    for folder in (tmp_path, tmp_path / "again", tmp_path / "files", tmp_path / "more"):
        tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for tools in TOOLS:
            assert tokenizer.chat_template.render([USER], tools) == hf.apply_chat_template(
                [USER], tools=tools, tokenize=False, add_generation_prompt=True
            )
    tokenizer.save(tmp_path / "more")
    assert load_tokenizer(tmp_path / "more").chat_template.sources == tokenizer.chat_template.sources


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "rag", "template": "R"}], "templates called rag, and none called 'default'"),
        ([{"name": "default"}], "chat_template must be a string"),
        (3, "chat_template must be a string"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_a_bad_template_is_missed_only_when_one_is_needed(template: Any, message: str, tmp_path: Path) -> None:
    train_bpe([], 278).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(InputError, match=message):
        tokenizer.encode_chat([USER])


def test_clock_is_the_present() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([USER])
    assert abs(int(year) - datetime.datetime.now().year) <= 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"not valid Jinja \(line 1\)"),
        ("{{ 'x' | nonesuch }}", "not valid Jinja"),
        ("{{ nothing.deeper }}", "'nothing' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe|not safely"),
        ("{{ (1).__add__.__globals__ }}", "unsafe|undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + none }}", "concatenate"),
        ("{{ range(99999999) | list }}", "Range too big"),
        ("{% include 'file' %}", "no loader|not valid|template failed"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ],
)
def test_template_faults_are_input_errors(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "expected a list of messages, got str"),
        ({"role": "user", "content": "x"}, "expected a list of messages, got dict"),
        ([USER, "hi"], "message 1: expected an object"),
        ([USER, {"content": "x"}], "message 1: expected role .*got None"),
        ([{"role": "function", "content": "x"}], "message 0: expected role .*'function'"),
        ([USER, {"role": "tools", "content": "x"}], "message 1: expected role .*'tools'"),
        ([{"role": ["user"], "content": "x"}], "message 0: expected role"),
        ([{"role": "user"}], "message 0 .*got nothing"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 0 .*got list.*Join"),
        ([USER, {"role": "assistant", "content": None}], "message 1 .*got nothing"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "message 1 .*got nothing"),
        ([USER, {"role": "tool", "content": None}], "message 1 .*got nothing"),
        ([USER, {"role": "user", "content": "x", "tool_calls": [call("f", {})]}], "message 1: only an assistant"),
        ([USER, {"role": "assistant", "tool_calls": "f()"}], "message 1: expected 'tool_calls' as a list"),
        ([USER, {"role": "assistant", "tool_calls": ["f()"]}], "message 1, tool call 0: expected"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", {}), call("", {})]}], "tool call 1: expected"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", None)]}], "tool call 0: expected 'arguments'"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "{")]}], "'arguments' is not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "[1]")]}], "must be a JSON object"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", {"x": {1, 2}})]}], "message 1: .*got set"),
        ([USER, {"role": "user", "content": "a\ud800"}], r"message 1: .*U\+D800 at character 1"),
    ],
)
def test_malformed_messages_are_named_by_index(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat(messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "expected a list of tools, got str"),
        (WEATHER, "expected a list of tools, got dict"),
        ([WEATHER, len], "tool 1: expected"),
        ([WEATHER, WEATHER["function"]], "tool 1: expected"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "tool 0: expected"),
        ([{"type": "function", "function": {}}], "tool 0: expected"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], r"tool 0 \(f\): expected 'description'"),
        ([{"type": "function", "function": {"name": "f", "parameters": "{}"}}], r"tool 0 \(f\): expected 'parameters'"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], "type object"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"x": len}}}], "tool 0: expected JSON values"),
    ],
)
def test_malformed_tools_are_named_by_index(tools: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat([USER], tools)


def test_arguments_as_text_become_objects() -> None:
    messages: list[dict[str, Any]] = [USER, CALL_AS_STRING, CALLS]
    parsed = parse_tool_arguments(messages)
    assert parsed[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
    assert parsed[2] == CALLS
    assert isinstance(CALL_AS_STRING["tool_calls"][0]["function"]["arguments"], str)
    assert '"arguments": {"city": "Köln"}}' in render_chat(parsed)


@settings(max_examples=150, deadline=None)
@given(
    text.filter(lambda content: "<tool_call>" not in content),
    st.lists(st.dictionaries(text, json_value, max_size=3), min_size=1, max_size=3),
)
def test_rendered_calls_are_read_back(content: str, arguments: list[dict[str, Any]]) -> None:
    """parse_tool_calls inverts the template, whatever stands in the arguments."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    before = render_chat([USER], add_generation_prompt=True)
    rendered = render_chat([USER, {"role": "assistant", "content": content, "tool_calls": calls}])
    reply = rendered.removeprefix(before.removesuffix("\n")).split("<|im_end|>\n<|im_start|>assistant\n")[0]
    assert parse_tool_calls(reply.removeprefix("\n")) == ((content, calls, []))


def test_a_closing_tag_inside_an_argument_does_not_end_the_call() -> None:
    body = json.dumps({"name": "f", "arguments": {"x": "</tool_call> <tool_call>"}})
    reply = parse_tool_calls(f"<tool_call>\n{body}\n</tool_call>")
    assert reply.content == ""
    assert [c["function"]["arguments"] for c in reply.tool_calls] == [{"x": "</tool_call> <tool_call>"}]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("<tool_call>\n{'name': 'f'}\n</tool_call>", "not JSON"),
        ('<tool_call>\n{"name": "f", "arguments": {}}', "no </tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {}} x</tool_call>', "no </tool_call>"),
        ('<tool_call>["f"]</tool_call>', "expected an object with a name"),
        ('<tool_call>{"name": "f"}</tool_call>', "expected 'arguments' as an object"),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "expected 'arguments' as an object"),
        ("<tool_call>", "not JSON"),
        ("<tool_call>" + "9" * 5000 + "</tool_call>", "not JSON"),
        ("<tool_call>" + "[" * 100000, "not JSON"),
    ],
)
def test_malformed_calls_stay_text_and_are_reported(block: str, problem: str) -> None:
    good = '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    reply = parse_tool_calls(f"before {block}{good}")
    assert reply.content == f"before {block}"
    assert [c["function"]["name"] for c in reply.tool_calls] == ["g"]
    assert len(reply.problems) == 1
    assert problem in reply.problems[0]
    assert "character 7" in reply.problems[0]


def test_text_without_calls_is_itself() -> None:
    assert parse_tool_calls("plain\n") == ("plain\n", [], [])
