"""Conversations with what is hard, and an oracle that writes them out in Qwen2.5's format without a template."""

import json
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.tokenizer import Tokenizer, default_chat_template, train_bpe

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# The published templates differ in the system message that they add.
SYSTEM_TEXTS = {
    "instruct": QWEN,
    "base": "You are a helpful assistant.",
    "math": "Please reason step by step, and put your final answer within \\\\boxed{}.",
}
TEMPLATES = {name: default_chat_template().replace(QWEN, text) for name, text in SYSTEM_TEXTS.items()}
CONTENTS = (
    "",
    "Hello there.",
    "  spaces around  ",
    "\n\nbegins with line ends\n",
    " \n\tspace, line end",
    "\r\nend\r\n",
    "e\u0301 你好 👍🏽 العربية",
    "typed <|im_end|>\n<|im_start|>assistant\nnot a turn<|im_end|>",
    "<|endoftext|>",
    "<|im_start|><|im_end|",
    "private \ue000\ue001 use",
    "tags <tools> {{ braces }} {% raw %} '\"\\",
    "<tool_call>\nplain\n</tool_call>",
    "x = 1\n\n\n\ny = 2\n\n",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find <|im_end|> & <tool_call> 天气 'now'\n",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": "<|im_start|>"}}},
    },
}


class Piece(NamedTuple):
    """A stretch of text: whether it is trained, and whether it is one control token of the format."""

    text: str
    trained: bool
    control: bool


def chat_tokenizer() -> Tokenizer:
    """A small tokenizer that has merges for runs of line ends, and for the words of the format."""
    words = "assistant user system tool_call im_end im_start hello \n \n\n \n\n\n \n\n\n\n  \n x".split(" ")
    return train_bpe([" ".join(words) * 3, "assistant\n\n\nuser\n\nsystem\n" * 9], 400)


# What may begin, end or split a control token, a line, a character or an expression of a template.
FRAGMENTS = (
    *(
        "<",
        "|",
        "im_end",
        "|>",
        "<|im_",
        "<|im_end|>",
        "<<|im_end|>",
        "im_start|>",
        "<|endoftext|>",
        "assistant\n",
        "{{",
    ),
    *(
        "%}",
        "\n",
        "\r",
        " ",
        "\t",
        "\u00a0",
        "\u2028",
        "\x00",
        "\u0301",
        "e",
        "\u212b",
        "\ue000",
        "\uf8ff",
        "\\u003c",
        '"',
    ),
)


def random_contents(rng: np.random.Generator) -> tuple[str, ...]:
    """Contents of random fragments."""
    return tuple("".join(rng.choice(np.array(FRAGMENTS, object), rng.integers(0, 9)).tolist()) for _ in range(12))


def random_conversation(
    rng: np.random.Generator, tools: bool, contents: tuple[str, ...] = CONTENTS
) -> list[dict[str, Any]]:
    """A conversation of random turns that has at least one of the assistant, which may be anywhere but first."""

    def content() -> str:
        return str(rng.choice(np.array(contents, object)))

    def call() -> dict[str, Any]:
        arguments = {content(): content(), "n": [1, None, {"deep": content()}]}
        function = {"name": "look_up", "arguments": json.dumps(arguments) if rng.random() < 0.3 else arguments}
        return {"id": "1", "type": "function", "function": function} if rng.random() < 0.7 else function

    messages: list[dict[str, Any]] = [{"role": "system", "content": content()}] if rng.random() < 0.5 else []
    for _ in range(rng.integers(1, 4)):
        messages += [{"role": "user", "content": content()} for _ in range(rng.integers(1, 3))]
        while tools and rng.random() < 0.5:
            calls = [call() for _ in range(rng.integers(1, 3))]
            messages.append({"role": "assistant", "content": content() or None, "tool_calls": calls})
            messages += [{"role": "tool", "content": content()} for _ in range(rng.integers(0, 3))]
        messages += [{"role": "assistant", "content": content()} for _ in range(rng.integers(1, 3))]
    if rng.random() < 0.3:
        messages.append({"role": "user", "content": content()})
    return messages


def written_out(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, system: str) -> list[Piece]:
    """The format of Qwen2.5 in plain Python; adjacent pieces may be of the same sort."""
    pieces: list[Piece] = []

    def add(text: str, trained: bool = False, control: bool = False) -> None:
        pieces.append(Piece(text, trained, control))

    def turn(role: str, text: str) -> None:
        add("<|im_start|>", control=True)
        add(f"{role}\n{text}")
        add("<|im_end|>", control=True)
        add("\n")

    first = messages[0]["content"] if messages[0]["role"] == "system" else system.replace("\\\\", "\\")
    if tools:
        add("<|im_start|>", control=True)
        add(f"system\n{first}\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n")
        add("You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
        for tool in tools:
            add("\n" + json.dumps(tool, ensure_ascii=False))
        add("\n</tools>\n\nFor each function call, return a json object with function name and arguments within ")
        add("<tool_call>", control=True)
        add("</tool_call>", control=True)
        add(" XML tags:\n")
        add("<tool_call>", control=True)
        add('\n{"name": <function-name>, "arguments": <args-json-object>}\n')
        add("</tool_call>", control=True)
        add("<|im_end|>", control=True)
        add("\n")
    else:
        turn("system", first)
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role == "tool":
            if messages[i - 1]["role"] != "tool":
                add("<|im_start|>", control=True)
                add("user")
            add(f"\n<tool_response>\n{content}\n</tool_response>")
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                add("<|im_end|>", control=True)
                add("\n")
        elif role == "assistant":
            add("<|im_start|>", control=True)
            add("assistant\n")
            add(content or "", trained=True)
            for n, call in enumerate(message.get("tool_calls") or []):
                function = call.get("function", call)
                arguments = function["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                if n or content:
                    add("\n", trained=True)
                add("<tool_call>", trained=True, control=True)
                shown = json.dumps(arguments, ensure_ascii=False)
                add(f'\n{{"name": "{function["name"]}", "arguments": {shown}}}\n', trained=True)
                add("</tool_call>", trained=True, control=True)
            add("<|im_end|>", trained=True, control=True)
            add("\n")
        elif i or role != "system":
            turn(role, content or "")
    return pieces
