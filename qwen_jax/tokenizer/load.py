"""Loading a tokenizer from a folder, a file or the Hugging Face Hub."""

from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.gguf.header import is_gguf, read_header
from qwen_jax.hub import TOKENIZER, is_hub_id, resolve
from qwen_jax.tokenizer import bpe, spm
from qwen_jax.tokenizer.base import Tokenizer
from qwen_jax.tokenizer.files import read_settings
from qwen_jax.tokenizer.gguf import from_gguf
from qwen_jax.tokenizer.vocabulary import read_tiktoken, read_vocab_and_merges

FORMS = "tokenizer.model (SentencePiece), tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model.

    The first form that the folder has is loaded: tokenizer.model (SentencePiece), tokenizer.json, vocab.json with
    merges.txt, qwen.tiktoken. tokenizer_config.json and chat templates, where present, give eos, pad, control tokens
    and chat template; without them those of Qwen2.5 are used (eos and pad `<|endoftext|>`).

    Args:
        path: a folder, one of these files, a GGUF file, or a Hub id, of which only the tokenizer's files are
            downloaded.

    Raises:
        InputError: there is nothing to load, the download failed, or a file is damaged or contradicts another.
    """
    given = Path(path)
    if given.is_dir() or is_hub_id(path):
        given = resolve(path, TOKENIZER)
    if is_gguf(given):
        return from_gguf(read_header(given))
    if not given.exists():
        raise InputError(f"no tokenizer at {given}: expected a folder with {FORMS}. Check the path.")
    folder, only = (given, None) if given.is_dir() else (given.parent, given.name)

    def has(name: str) -> bool:
        # A dangling link counts: reading it says what is wrong.
        return only == name if only is not None else (folder / name).is_file() or (folder / name).is_symlink()

    settings = read_settings(folder)
    if has("tokenizer.model"):
        return spm.from_model_file(folder / "tokenizer.model", settings)
    if has("tokenizer.json"):
        return bpe.from_tokenizer_json(folder / "tokenizer.json", settings)
    if has("vocab.json") or has("merges.txt"):
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}: vocab.json and merges.txt belong together. Fetch both.")
        vocab, merges = read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
        return bpe.from_vocab_and_merges(vocab, merges, settings, folder / "vocab.json")
    if has("qwen.tiktoken"):
        vocab, merges = read_tiktoken(folder / "qwen.tiktoken")
        return bpe.from_vocab_and_merges(vocab, merges, settings, folder / "qwen.tiktoken")
    raise InputError(f"no tokenizer in {given}: expected {FORMS}.")
