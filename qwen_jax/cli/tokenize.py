"""`qwen-jax tokenize`: text to token ids and back."""

import dataclasses
import json
import sys

from qwen_jax.cli.common import Folder, utf8
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Turn lines of standard input into JSON arrays of token ids, or back.

    Args:
        model: Folder with a tokenizer, or Hub id.
        decode: Read JSON arrays, write texts.
        plain: Treat control tokens in the text as plain text.
    """

    model: Folder
    decode: bool = False
    plain: bool = False

    def run(self) -> int:
        from qwen_jax.hub import TOKENIZER, resolve
        from qwen_jax.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(resolve(self.model, TOKENIZER))
        for number, line in enumerate(sys.stdin.buffer, 1):
            text = utf8(line.removesuffix(b"\n"), f"Standard input, line {number}")
            if not self.decode:
                print(json.dumps(tokenizer.encode(text, parse_special=not self.plain), separators=(",", ":")))
                continue
            try:
                ids = json.loads(text)
            except json.JSONDecodeError:
                ids = None
            if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise InputError(f"Standard input, line {number}: expected a JSON array of ids, got {text[:60]!r}.")
            print(tokenizer.decode(ids))
        return 0
