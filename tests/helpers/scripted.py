"""Small checkpoints with a tokenizer; in one of them the next token is a function of the last one."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_jax.tokenizer import train_bpe
from tests.helpers.hf import make_hf_checkpoint

# Ids of the tokenizer in such a folder: bytes, then control tokens.
A, B, C = 64, 65, 66
END_OF_TEXT, TURN_END = 256, 258


def make_scripted(folder: Path, script: dict[int, int], **config: Any) -> Path:
    """Writes a checkpoint with a byte-level tokenizer of 278 ids.

    Args:
      folder: a new one.
      script: token to next token, whatever came before.
      config: changes to config.json's names; the end id is `END_OF_TEXT`.
    """
    torch.manual_seed(0)
    width, vocab = 128, 320
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": END_OF_TEXT,
        "bos_token_id": None,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **config}))
    with torch.no_grad():
        # Layers add nothing, so the last hidden state is the normalised embedding of the last token.
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(vocab, width), dim=1)
        head = torch.zeros(vocab, width)
        for token, following in script.items():
            head[following] += 4 * embedding[token]
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    train_bpe(["abc"], 278).save(folder)
    return folder


def make_words(folder: Path) -> Path:
    """Writes a checkpoint with random weights and a tokenizer of some words, whose end id both know."""
    tokenizer = train_bpe(["hello world, hello there user assistant system\n"] * 8, 330)
    make_hf_checkpoint(folder, vocab_size=384, eos_token_id=tokenizer.eos_id, num_key_value_heads=2)
    tokenizer.save(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object in a file, which is made if need be."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}))
