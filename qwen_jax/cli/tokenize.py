"""`qwen-jax tokenize`: text to token ids and back."""

import dataclasses
import json
import sys

from qwen_jax.cli.common import ModelOption, ModelPosition, model_name
from qwen_jax.cli.lines import read_lines
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Turn lines of standard input into JSON arrays of token ids, or back.

    Args:
        folder: Folder with a tokenizer, or Hub id.
        model: The same, as an option.
        decode: Read JSON arrays, write texts.
        plain: Treat control tokens in the text as plain text.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    decode: bool = False
    plain: bool = False

    def run(self) -> int:
        name = model_name(self.folder, self.model)
        from qwen_jax.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(name)
        for number, line in enumerate(read_lines(sys.stdin.buffer, "Standard input"), 1):
            if not self.decode:
                print(json.dumps(tokenizer.encode(line, parse_special=not self.plain), separators=(",", ":")))
                continue
            try:
                ids = json.loads(line)
            except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits.
                ids = None
            if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise InputError(f"Standard input, line {number}: expected a JSON array of ids, got {line[:60]!r}.")
            print(tokenizer.decode(ids))
        return 0
