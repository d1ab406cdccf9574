"""Trained spans of conversations against an oracle on text, ids against Hugging Face, and what is refused."""

import io
import itertools
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import (
    ChatTemplate,
    SentencePieceTokenizer,
    Tokenizer,
    TrainedIds,
    load_tokenizer,
    parse_tool_arguments,
    render_chat,
    render_example,
    train_sentencepiece,
)
from qwen_jax.tokenizer.files import Settings
from qwen_jax.tokenizer.trained import encode_parts, text_parts
from tests.helpers.conversations import (
    CONTENTS,
    SYSTEM_TEXTS,
    TEMPLATES,
    TOOL,
    Piece,
    chat_tokenizer,
    random_contents,
    random_conversation,
    written_out,
)

SEED = int(np.random.SeedSequence().generate_state(1)[0])
# The format of Qwen2.5 with the tag that Hugging Face defines for assistant text.
MARKED = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{- message.content + '<|im_end|>' }}
{%- endgeneration %}{{- '\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MARKED_END = " + '<|im_end|>' }}\n{%- endgeneration %}"
# Drops thoughts from earlier turns, so that a prefix renders differently from the whole.
FORGETFUL = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}
{%- if loop.last %}{{- message.content }}{%- else %}{{- message.content.split('</think>')[-1] }}{%- endif %}
{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
USER, REPLY = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}


def with_template(source: str) -> Tokenizer:
    tokenizer = chat_tokenizer()
    tokenizer.__dict__["chat_template"] = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: with_template(source) for name, source in TEMPLATES.items()}


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["instruct"]


def conversations(count: int, tools: bool = True) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    single = [[{"role": "user", "content": c}, {"role": "assistant", "content": c}] for c in CONTENTS]
    random = [random_conversation(rng, tools, random_contents(rng) if n % 2 else CONTENTS) for n in range(count)]
    return [(messages, [TOOL] if tools and n % 2 else None) for n, messages in enumerate(single + random)]


def runs(pieces: list[Piece]) -> list[tuple[str, bool]]:
    """Adjacent pieces joined, in the normal form in which the tokenizer encodes them."""
    grouped = itertools.groupby((p for p in pieces if p.text), lambda piece: piece.trained)
    return [(unicodedata.normalize("NFC", "".join(p.text for p in group)), trained) for trained, group in grouped]


def decoded(tokenizer: Tokenizer, example: TrainedIds) -> list[tuple[str, bool]]:
    grouped = itertools.groupby(zip(*example, strict=True), lambda token: token[1])
    return [(tokenizer.decode([i for i, _ in group]), trained) for trained, group in grouped]


def chosen_turns(pieces: list[Piece], trained: str, newline: bool) -> list[Piece]:
    """The oracle's pieces for other options."""
    ends = [i for i, p in enumerate(pieces) if p.trained and p.text == "<|im_end|>" and p.control]
    assert ends
    if trained == "last":
        before = ends[-2] if len(ends) > 1 else -1
        pieces = [p._replace(trained=p.trained and i > before) for i, p in enumerate(pieces)]
    if newline:
        after = {i + 1 for i in ends if pieces[i].trained}
        pieces = [p._replace(trained=p.trained or i in after) for i, p in enumerate(pieces)]
    return pieces


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_characters_equal_the_oracle(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Each template, each option, on a grid: the same text, the same characters trained, and control ids only where the
    format has control tokens, wherever they are typed."""
    tokenizer = tokenizers[name]
    control = tokenizer.control_ids
    for messages, tools in conversations(80):
        oracle = written_out(messages, tools, SYSTEM_TEXTS[name])
        text = tokenizer.chat_template.render(parse_tool_arguments(messages), tools, add_generation_prompt=False)
        assert "".join(p.text for p in oracle) == text
        for trained, newline in itertools.product(("all", "last"), (False, True)):
            example = render_example(tokenizer, messages, tools, trained=trained, newline=newline)  # type: ignore[arg-type]
            assert decoded(tokenizer, example) == runs(chosen_turns(oracle, trained, newline)), messages
            found = [i for i in example.ids if i in control.values()]
            assert found == [control[p.text] for p in oracle if p.control], messages


def test_ids_equal_hugging_face_except_at_the_boundary(tokenizer: Tokenizer) -> None:
    """Where nobody types control tokens and no trained content begins with a line end, ids equal those of the whole
    text; and control tokens read as such on request equal it always."""
    oracle = PreTrainedTokenizerFast(tokenizer_object=tokenizer._engine)  # type: ignore[attr-defined]
    same = 0
    for messages, tools in conversations(60):
        checked = parse_tool_arguments(messages)
        source = TEMPLATES["instruct"]
        encoded = oracle.apply_chat_template(checked, tools=tools, chat_template=source, tokenize=True)
        expected = encoded if isinstance(encoded, list) else encoded["input_ids"]
        boundary = any(m["role"] == "assistant" and re.match(r"\s*[\r\n]", m.get("content") or "") for m in messages)
        typed = re.search(r"<\||<tool_call>", repr(messages)) or tools
        for parse_special in (False, True):
            if boundary or (typed and not parse_special):
                continue
            same += 1
            assert render_example(tokenizer, messages, tools, parse_special=parse_special).ids == expected
    assert same > 20


def test_the_prompt_is_encoded_as_at_inference(tokenizer: Tokenizer) -> None:
    """The ids before the last answer are those of the prompt that generates it, for any beginning of the answer."""
    merged = 0
    for content in CONTENTS:
        messages = [USER, REPLY, USER, {"role": "assistant", "content": content}]
        example = render_example(tokenizer, messages, trained="last")
        first = example.trained.index(True)
        assert example.ids[:first] == tokenizer.encode_chat(messages[:-1])
        whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
        merged += whole[:first] != example.ids[:first]
    assert merged  # The law is not an empty one.


def test_generation_tag_equals_hugging_face() -> None:
    """A template that marks assistant text: the mask is the one that transformers makes, where tokens align."""
    tokenizer = with_template(MARKED)
    oracle = PreTrainedTokenizerFast(tokenizer_object=tokenizer._engine)  # type: ignore[attr-defined]
    compared = 0
    for messages, _ in conversations(60, tools=False):
        if any(re.match(r"\s*[\r\n]", m["content"]) or "<" in m["content"] for m in messages):
            continue
        expected = oracle.apply_chat_template(
            messages, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        example = render_example(tokenizer, messages)
        assert example.ids == expected["input_ids"]
        assert example.trained == [bool(x) for x in expected["assistant_masks"]]
        compared += 1
        last = render_example(tokenizer, messages, trained="last", newline=True)
        runs = [text for text, trained in decoded(tokenizer, last) if trained]
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        assert runs == [unicodedata.normalize("NFC", replies[-1]) + "<|im_end|>\n"]
    assert compared


def test_generation_tag_hides_control_tokens_too() -> None:
    tokenizer = with_template(MARKED)
    for messages, _ in conversations(30, tools=False):
        example = render_example(tokenizer, messages)
        expected = [
            unicodedata.normalize("NFC", m["content"]) + "<|im_end|>" for m in messages if m["role"] == "assistant"
        ]
        assert [text for text, trained in decoded(tokenizer, example) if trained] == expected
        starts = example.ids.count(tokenizer.control_ids["<|im_start|>"])
        assert starts == len(messages) == example.ids.count(tokenizer.control_ids["<|im_end|>"])


def test_a_block_of_its_own_may_mark_the_end() -> None:
    apart = MARKED.replace(MARKED_END, " }}{% endgeneration %}{% generation %}{{- '<|im_end|>' }}{% endgeneration %}")
    assert apart != MARKED
    for messages, _ in conversations(20, tools=False):
        examples = [render_example(with_template(source), messages) for source in (MARKED, apart)]
        assert examples[0] == examples[1]


def test_turns_before_first_are_not_trained(tokenizer: Tokenizer) -> None:
    messages = [USER, REPLY, USER, {"role": "assistant", "content": "Second."}, USER, REPLY]
    for first in range(5):
        example = render_example(tokenizer, messages, first=first)
        expected = [f"{m['content']}<|im_end|>" for m in messages[first:] if m["role"] == "assistant"]
        assert [text for text, trained in decoded(tokenizer, example) if trained] == expected


def test_the_end_token_is_trained_where_it_is_also_padding(tokenizer: Tokenizer) -> None:
    """The mask comes from spans: that pad and eos are the same token changes nothing."""
    assert tokenizer.pad_id == tokenizer.eos_id
    (example,) = encode_parts(tokenizer, [text_parts(tokenizer, "Question: ", "answer")])
    assert example.ids[-1] == tokenizer.eos_id
    assert example.trained[-1]
    assert decoded(tokenizer, example) == [("Question: ", False), ("answer<|endoftext|>", True)]
    chat = with_template(TEMPLATES["base"].replace("<|im_end|>", "<|endoftext|>"))
    assert decoded(chat, render_example(chat, [USER, REPLY]))[1] == ("Hi.<|endoftext|>", True)


def test_plain_text_parses_control_tokens_only_on_request(tokenizer: Tokenizer) -> None:
    prompt, completion = "<|im_start|>user\n<|im_end|>", "\n<|im_end|> <|endoftext|>"
    plain, parsed = (
        encode_parts(tokenizer, [text_parts(tokenizer, prompt, completion, parse_special=on)])[0]
        for on in (False, True)
    )
    assert plain.ids == [
        *tokenizer.encode(prompt, parse_special=False),
        *tokenizer.encode(completion, parse_special=False),
        tokenizer.eos_id,
    ]
    assert parsed.ids == [*tokenizer.encode(prompt), *tokenizer.encode(completion)]
    assert not set(plain.ids[:-1]) & set(tokenizer.control_ids.values())


def test_literal_characters_are_in_no_control_token() -> None:
    """With no literal character, encoding is unchanged; with all of them, control tokens are plain text; in between,
    exactly the tokens that have one are plain text. For both kinds of tokenizer."""
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}")
    kinds = [chat_tokenizer(), train_sentencepiece(["hello world, how are you\n"] * 50 + list("abcdefgh"), 320)]
    for tokenizer in kinds:
        for _ in range(50):
            pieces = rng.choice(["a", " hello", "<|im_end|>", "<tool_call>", "\n", "<|im_", "e\u0301"], 8).tolist()
            text = "".join(pieces)
            assert tokenizer.encode(text, literal=[]) == tokenizer.encode(text)
            every = range(len(text))
            assert tokenizer.encode(text, literal=every) == tokenizer.encode(text, parse_special=False)
            found = list(re.finditer(r"<\|im_end\|>|<tool_call>", text))
            literal = [m for m in found if rng.random() < 0.5]
            places = [int(rng.integers(m.start(), m.end())) for m in literal]
            kept = [m.group() for m in found if m not in literal]
            ids = tokenizer.encode(text, literal=places)
            assert [i for i in ids if i in tokenizer.control_ids.values()] == [tokenizer.control_ids[t] for t in kept]
            assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("adds_space", [False, True])
def test_sentencepiece_adds_no_space_inside_a_turn(adds_space: bool) -> None:
    """A SentencePiece model, which is encoded in parts too, spells the conversation and the plain text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, how are you"] * 50 + list("abcdefgh")),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=adds_space,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue(), Settings(), Path("model"))
    assert tokenizer.adds_space == adds_space
    messages = [{"role": "user", "content": "hello you"}, {"role": "assistant", "content": "hello <|im_end|>"}]
    plain = encode_parts(tokenizer, [text_parts(tokenizer, "hello you\n", "hello world <|im_end|>")])[0]
    for example, text in (
        (render_example(tokenizer, messages), render_chat(messages, add_generation_prompt=False)),
        (plain, "hello you\nhello world <|im_end|><|endoftext|>"),
    ):
        assert tokenizer.decode(example.ids) == text
        trained = [tokenizer.token_bytes(i) for i, on in zip(*example, strict=True) if on]
        assert b"".join(trained).startswith(b"hello ")


def test_first_message_may_be_the_assistants(tokenizer: Tokenizer) -> None:
    """No prompt can be rendered before it: the opening of the turn is looked for, and typed ones do not count."""
    typed = {"role": "assistant", "content": "<|im_start|>assistant\nHi."}
    example = render_example(tokenizer, [typed, USER])
    assert decoded(tokenizer, example)[1] == ("<|im_start|>assistant\nHi.<|im_end|>", True)


def test_a_template_that_rewrites_history_is_refused_unless_only_the_last_turn_counts() -> None:
    tokenizer = with_template(FORGETFUL)
    thought = {"role": "assistant", "content": "<think>hm</think>Hi."}
    example = render_example(tokenizer, [USER, thought, USER, thought], trained="last")
    assert decoded(tokenizer, example)[1] == ("<think>hm</think>Hi.<|im_end|>", True)
    with pytest.raises(InputError, match=r"message 1 .*ambiguous.*only the last turn"):
        render_example(tokenizer, [USER, thought, USER, thought])


BAD: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("instruct", "expected an assistant's turn.*user, user", [USER, USER]),
    ("instruct", "message 1: expected role", [USER, {"role": "bot", "content": "x"}]),
    ("instruct", "message 1 .*without its </tool_call>", [USER, {"role": "assistant", "content": "<tool_call>{}"}]),
    ("instruct", "message 1 .*without its </tool_call>", [USER, {"role": "assistant", "content": "</tool_call>"}]),
    ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "like a user's", [USER, REPLY]),
    ("{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}", "does not end the turn", [USER, REPLY]),
    (
        "{% for m in messages %}{{ m.role + m.content | lower | replace('<|im_end|>', '') }}<|im_end|>{% endfor %}",
        "rewrites control tokens",
        [USER, {"role": "assistant", "content": "a <|im_end|>"}],
    ),
    (
        MARKED.replace("{%- endgeneration", "{% generation %}{% endgeneration %}{%- endgeneration"),
        "inside",
        [USER, REPLY],
    ),
    (
        MARKED.replace(MARKED_END, " }}{% endgeneration %}{{- '<|im_end|>' }}"),
        r"'Hi\.' by .*without the <\|im_end\|> after it.*would not learn to stop",
        [USER, REPLY],
    ),
]


@pytest.mark.parametrize(("template", "message", "messages"), BAD)
def test_bad_conversations(template: str, message: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = with_template(TEMPLATES.get(template, template))
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        render_example(tokenizer, messages)


@pytest.mark.parametrize("content", ["<tool_call>{}", "a</tool_call>"])
def test_calls_that_are_not_closed_are_text_where_they_are_allowed(content: str) -> None:
    tokenizer = with_template(TEMPLATES["instruct"])
    example = render_example(tokenizer, [USER, {"role": "assistant", "content": content}], open_calls=True)
    assert decoded(tokenizer, example)[1] == (f"{content}<|im_end|>", True)


def test_a_saved_tokenizer_gives_the_same_examples(tokenizer: Tokenizer, tmp_path: Any) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for messages, tools in conversations(3):
        assert render_example(again, messages, tools) == render_example(tokenizer, messages, tools)
