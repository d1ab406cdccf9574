"""The configurations of the published models, by name."""

import dataclasses
from typing import Any

from qwen_jax.config import DualChunk, ModelConfig, MoE
from qwen_jax.errors import InputError

# From the published config.json files: hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, tied.
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 128, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 128, 152064, False),
}
# First layer of a sliding window that no published model switches on; kept so that config.json round-trips.
_BASE_WINDOW_LAYERS = {"0.5b": 24, "1.5b": 28, "3b": 36, "7b": 28, "14b": 48, "32b": 64, "72b": 80}
_INSTRUCT_WINDOW_LAYERS = {"0.5b": 21, "1.5b": 21, "3b": 70, "7b": 28, "14b": 70, "32b": 70, "72b": 70}
_ENDOFTEXT, _IM_END = 151643, 151645


def _shape(size: str) -> dict[str, Any]:
    keys = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    *numbers, tied = _SHAPES[size]
    return {**dict(zip(keys, numbers, strict=True)), "tie_word_embeddings": tied}


def _base(size: str) -> ModelConfig:
    context = 32768 if size in ("0.5b", "3b") else 131072
    return ModelConfig(
        **_shape(size),
        rms_norm_eps=1e-5 if size in ("14b", "32b", "72b") else 1e-6,
        max_position_embeddings=context,
        eos_token_ids=(_ENDOFTEXT,),
        sliding_window=context,
        max_window_layers=_BASE_WINDOW_LAYERS[size],
    )


def _instruct(size: str) -> ModelConfig:
    return ModelConfig(
        **_shape(size),
        eos_token_ids=(_IM_END,),
        sliding_window=32768 if size in ("0.5b", "1.5b", "3b") else 131072,
        max_window_layers=_INSTRUCT_WINDOW_LAYERS[size],
    )


def _published() -> dict[str, ModelConfig]:
    configs = {}
    for size in _SHAPES:
        base, instruct = _base(size), _instruct(size)
        configs[f"qwen2.5-{size}"] = base
        configs[f"qwen2.5-{size}-instruct"] = instruct
        if size != "72b":  # Coder: the shapes and epsilons of the general models, always at 32,768 tokens.
            coder: dict[str, Any] = {"max_position_embeddings": 32768}
            configs[f"qwen2.5-coder-{size}"] = dataclasses.replace(base, **coder)
            configs[f"qwen2.5-coder-{size}-instruct"] = dataclasses.replace(instruct, **coder)
        if size in ("1.5b", "7b"):  # Math: RoPE base 10,000 and 4,096 tokens.
            math_: dict[str, Any] = {"rope_theta": 10_000.0, "max_position_embeddings": 4096, "sliding_window": 4096}
            configs[f"qwen2.5-math-{size}"] = dataclasses.replace(base, **math_)
            configs[f"qwen2.5-math-{size}-instruct"] = dataclasses.replace(instruct, **math_)
        if size in ("7b", "14b"):
            configs[f"qwen2.5-{size}-instruct-1m"] = dataclasses.replace(
                instruct,
                rms_norm_eps=1e-5,
                rope_theta=10_000_000.0,
                max_position_embeddings=1_010_000,
                dual_chunk=DualChunk(262144, 8192, 262144),
                sliding_window=32768,
                max_window_layers=base.max_window_layers,
            )
    configs |= _mixtures()
    # Not published: small enough for tests and for a first training run on a laptop.
    tiny = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(0,),
        dtype="float32",
    )
    configs["tiny"] = tiny
    configs["tiny-untied"] = dataclasses.replace(tiny, tie_word_embeddings=False)
    configs["tiny-moe"] = dataclasses.replace(tiny, moe=MoE(8, 2, 32, 64))
    return configs


def _mixtures() -> dict[str, ModelConfig]:
    """The two published models with experts, and three of our own with narrower experts."""
    small: dict[str, Any] = dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_layers=24, num_heads=16, num_kv_heads=16,
        head_dim=128, tie_word_embeddings=False, moe=MoE(60, 4, 1408, 5632), max_window_layers=21,
    )  # fmt: skip
    large: dict[str, Any] = dict(
        vocab_size=151936, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
        head_dim=128, tie_word_embeddings=False, moe=MoE(64, 8, 2560, 20480), max_window_layers=28,
    )  # fmt: skip
    chat = (_IM_END,)
    window: dict[str, Any] = {"max_position_embeddings": 32768, "sliding_window": 32768}
    published = {
        "qwen1.5-moe-a2.7b": ModelConfig(**small, max_position_embeddings=8192, sliding_window=32768),
        "qwen1.5-moe-a2.7b-chat": ModelConfig(**small, **window, eos_token_ids=chat),
        "qwen2-57b-a14b": ModelConfig(**large, max_position_embeddings=131072, sliding_window=131072),
        "qwen2-57b-a14b-instruct": ModelConfig(**large, **window, eos_token_ids=chat),
    }
    # Our own, after the report's description of Qwen2.5-Turbo, for which it gives no sizes: many narrow experts, eight
    # per token, and a shared one as wide as two of them, with attention and embedding of a dense model.
    fine = {
        "fine-3b-a0.6b": ("0.5b", MoE(64, 8, 640, 1280, norm_topk_prob=True)),
        "fine-23b-a2.4b": ("3b", MoE(128, 8, 768, 1536, norm_topk_prob=True)),
        "fine-91b-a4.9b": ("7b", MoE(256, 8, 1152, 2304, norm_topk_prob=True)),
    }
    return published | {name: ModelConfig(**_shape(size), moe=moe) for name, (size, moe) in fine.items()}


PUBLISHED: dict[str, ModelConfig] = _published()


def published(name: str) -> ModelConfig:
    """Looks up the configuration of a published model.

    Args:
      name: such as "Qwen2.5-7B-Instruct", in any case, with or without the "Qwen/" in front.

    Raises:
      InputError: there is no such model; the message lists the names.
    """
    key = name.lower().removeprefix("qwen/")
    if key not in PUBLISHED:
        raise InputError(f"Unknown model {name!r}. Known: {', '.join(sorted(PUBLISHED))}.")
    return PUBLISHED[key]
