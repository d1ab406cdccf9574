"""Reading the architecture of a model from the metadata of a GGUF file: the inverse of `convert.gguf.metadata`."""

import math
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.gguf.header import Header
from qwen_jax.tokenizer.control import END_OF_TEXT, TURN_END

ARCHITECTURES = ("qwen2", "qwen2moe")
EMBED, HEAD, NORM = "token_embd.weight", "output.weight", "output_norm.weight"
# Ids that end a text: of a text, of a turn, of a message.
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
BOS_KEY = "tokenizer.ggml.bos_token_id"
_READ = frozenset(
    """
    block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon attention.causal rope.freq_base
    rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.attn_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    expert_count expert_used_count expert_feed_forward_length expert_shared_feed_forward_length expert_weights_norm
    vocab_size
    """.split()
)
# Notes that change no result. llama.cpp gives these models no window, whatever the file says.
_INERT = frozenset("rope.scaling.finetuned tensor_data_layout attention.sliding_window".split())
# The dtype in which a file's matrices keep their values exactly.
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


class _Values:
    """The metadata of one architecture, by the rest of their keys."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._header, self._prefix = header, f"{architecture}."
        self.keys = {key.removeprefix(self._prefix) for key in header.metadata if key.startswith(self._prefix)}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of a kind: int (positive), float (positive and finite), bool or str; `default` if it is absent.

        Raises:
          InputError: it is absent and there is no default, or it is of another kind.
        """
        value = self._header.metadata.get(self._prefix + key, default)
        if value is None:
            raise InputError(
                f"{self._header.path} lacks {self._prefix}{key} in its metadata. Convert the model again with a "
                "current llama.cpp, or with `qwen-jax convert`."
            )
        right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or value is not True)
        if not right or (kind in (int, float) and (not math.isfinite(value) or value <= 0)):
            names = {int: "a positive integer", float: "a positive number", bool: "true or false", str: "a text"}
            raise InputError(
                f"{self._header.path} has {self._prefix}{key}={value!r:.80} in its metadata; expected {names[kind]}."
            )
        # A float32 stands for the shortest decimal number that rounds to it: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value))) if kind is float and isinstance(value, float) else value


def read(header: Header) -> dict[str, Any]:
    """Reads the architecture of a model from a GGUF file.

    Args:
      header: of the file.

    Returns:
      The fields of a `ModelConfig`; `yarn` and `moe` as dictionaries of their fields. The dtype is that of the
      matrices, and bfloat16 if they are quantised.

    Raises:
      InputError: another architecture, metadata that are missing or wrong, or a key that is not known: guessing would
        give wrong logits.
    """
    path, architecture = header.path, header.metadata.get("general.architecture")
    kind = header.metadata.get("general.type", "model")
    if architecture not in ARCHITECTURES or kind != "model":
        raise InputError(
            f"{path} holds {'a model' if kind == 'model' else kind!r} of architecture {architecture!r:.80}; expected a "
            f"model of architecture {' or '.join(ARCHITECTURES)} (Qwen1.5 to Qwen2.5, dense or with experts)."
        )
    values = _Values(header, architecture)
    unknown = sorted(values.keys - _READ - _INERT)
    if unknown:
        raise InputError(
            f"{path} has metadata of {architecture} that are not known here: {', '.join(unknown)}. They may change "
            "what the model computes."
        )
    if not values.get("attention.causal", bool, True):
        raise InputError(f"{path} has attention that is not causal, as models of embeddings have; it is not supported.")
    missing = [name for name in (EMBED, NORM) if name not in header.tensors]
    if missing:
        raise InputError(f"{path} lacks the tensors {', '.join(missing)}. The file is incomplete; fetch it again.")
    embed = header.tensors[EMBED]

    # Sizes.
    hidden, num_heads = values.get("embedding_length", int), values.get("attention.head_count", int)
    default = hidden // num_heads if hidden % num_heads == 0 else None
    head_dim = values.get("attention.key_length", int, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, int, head_dim) != head_dim:
            raise InputError(
                f"{path} has heads of {head_dim}, and {architecture}.{key} is {values.get(key, int)}; only equal ones "
                "are supported, as in Qwen2.5."
            )
    vocab_size = values.get("vocab_size", int, embed.shape[0])
    moe = None
    if architecture == "qwen2moe":
        # Older files leave their widths to the tensors.
        widths = {name: header.tensors.get(f"blk.0.ffn_down_{name}.weight") for name in ("exps", "shexp")}
        width, shared = (tensor and tensor.shape[-1] for tensor in widths.values())
        moe = dict(
            num_experts=values.get("expert_count", int),
            num_experts_per_tok=values.get("expert_used_count", int),
            intermediate_size=values.get("expert_feed_forward_length", int, width),
            shared_intermediate_size=values.get("expert_shared_feed_forward_length", int, shared),
            norm_topk_prob=values.get("expert_weights_norm", bool, False),
        )
    # Vectors and routers are float32 in any file; quantised models compute in bfloat16.
    matrices = {tensor.type.name for tensor in header.tensors.values() if len(tensor.shape) > 1} - {"F32"}
    dtype = _DTYPES.get(next(iter(matrices)), "bfloat16") if len(matrices) == 1 else "bfloat16"
    bos = header.metadata.get(BOS_KEY)
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=values.get("feed_forward_length", int),
        num_layers=values.get("block_count", int),
        num_heads=num_heads,
        num_kv_heads=values.get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        tie_word_embeddings=HEAD not in header.tensors,
        rms_norm_eps=values.get("attention.layer_norm_rms_epsilon", float),
        rope_theta=values.get("rope.freq_base", float),
        max_position_embeddings=values.get("context_length", int),
        yarn=_read_yarn(header, values),
        moe=moe,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=_read_ends(header, vocab_size),
        dtype=dtype if matrices else "float32",
    )


def _read_yarn(header: Header, values: _Values) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", str, "none")
    if kind == "none" or (kind == "linear" and values.get("rope.scaling.factor", float, 1.0) == 1):
        return None
    if kind != "yarn":
        raise InputError(f"{header.path} has RoPE scaling of type {kind!r}; Qwen2.5 uses none or 'yarn'.")
    factor = values.get("rope.scaling.factor", float)
    # llama.cpp multiplies the paper's temperature by this.
    attention = values.get("rope.scaling.yarn_attn_factor", float, values.get("rope.scaling.attn_factor", float, 1.0))
    return dict(
        factor=factor,
        original_max_position_embeddings=values.get(
            "rope.scaling.original_context_length", int, values.get("context_length", int)
        ),
        attention_factor=None if attention == 1 else attention * (0.1 * math.log(factor) + 1.0),
        beta_fast=values.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=values.get("rope.scaling.yarn_beta_slow", float, 1.0),
    )


def _read_ends(header: Header, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text."""
    found = {key: header.metadata[key] for key in END_KEYS if key in header.metadata}
    for key, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise InputError(
                f"{header.path} has {key}={value!r:.80} in its metadata; expected an id below {vocab_size}, the rows "
                "of its embedding."
            )
    ids = list(found.values())
    # llama.cpp ends a text at both tokens, as generation_config.json of the instruct models asks for; files that it
    # made name only one of them.
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if list(found) == [END_KEYS[0]] and isinstance(tokens, list) and tokens[ids[0] : ids[0] + 1] == [TURN_END]:
        ids += [tokens.index(END_OF_TEXT)] if END_OF_TEXT in tokens else []
    return tuple(dict.fromkeys(ids))
