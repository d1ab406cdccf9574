"""Faults of answers: what has none can be trained on."""

import random

from qwen_jax.tokenizer import render_example
from tests.helpers.conversations import chat_tokenizer
from tests.helpers.runs import print_seed
from train.synthesize.checks import fault
from train.synthesize.generator import Answer

PIECES = (
    "hello ", "world", "\n", "<tool_call>", "</tool_call>", '\n{"name": "f", "arguments": {}}\n', "<|im_end|>", "```",
    "<|object_ref_start|>", "<tool_call", "\u00e9", "</s>", "<think>", "I am here. ",
)  # fmt: skip


def test_what_has_no_fault_can_be_trained_on() -> None:
    rng, tokenizer = random.Random(int(print_seed().integers(1 << 30))), chat_tokenizer()
    good = 0
    for _ in range(400):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 7)))
        if fault(Answer(text)) is None:
            good += 1
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
            assert any(render_example(tokenizer, messages).trained)
    assert good > 20
    assert fault(Answer("a <tool_call> b")) == fault(Answer("</tool_call> <tool_call>")) == "an open tool call"
    assert fault(Answer("<tool_call>\n{}\n</tool_call>")) is None
