"""Tokenizers: byte-level BPE and SentencePiece, chat templates, streaming decoding. See docs/tokenizer.md."""

from qwen_jax.tokenizer.base import StreamDecoder, Tokenizer
from qwen_jax.tokenizer.bpe import ByteLevelBPE, train_bpe
from qwen_jax.tokenizer.chat import (
    ChatTemplate,
    ParsedReply,
    check_messages,
    check_tools,
    parse_tool_arguments,
    parse_tool_calls,
    render_chat,
)
from qwen_jax.tokenizer.control import CONTROL_TOKENS, ControlToken
from qwen_jax.tokenizer.files import default_chat_template
from qwen_jax.tokenizer.load import load_tokenizer
from qwen_jax.tokenizer.spm import SentencePieceTokenizer, train_sentencepiece
from qwen_jax.tokenizer.trained import TrainedIds, render_example

__all__ = [
    "CONTROL_TOKENS",
    "ByteLevelBPE",
    "ChatTemplate",
    "ControlToken",
    "ParsedReply",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "TrainedIds",
    "check_messages",
    "check_tools",
    "default_chat_template",
    "load_tokenizer",
    "parse_tool_arguments",
    "parse_tool_calls",
    "render_chat",
    "render_example",
    "train_bpe",
    "train_sentencepiece",
]
