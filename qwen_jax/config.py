"""Model configuration: every published Qwen2.5 size, and Hugging Face `config.json` in and out."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError

DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), as the Qwen documentation configures it.

    Attributes:
      factor: how many times longer the context becomes.
      original_max_position_embeddings: the context length, in tokens, that the model was trained with.
      attention_factor: multiplies cos and sin; None means the paper's 0.1 ln(factor) + 1.
      beta_fast, beta_slow: rotations over the original context above which a frequency is kept, below which it is
        interpolated.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise InputError(f"YaRN factor must be at least 1, got {self.factor}.")
        if self.original_max_position_embeddings < 1:
            raise InputError(
                f"YaRN original_max_position_embeddings must be positive, got {self.original_max_position_embeddings}."
            )

    @property
    def scale(self) -> float:
        """The factor on cos and sin."""
        return self.attention_factor if self.attention_factor is not None else 0.1 * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """Dual-chunk attention settings of the 1M-context checkpoints (An et al. 2024, arXiv:2402.17463).

    Up to `chunk_len` tokens dual-chunk attention is plain RoPE attention, exactly.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int

    @property
    def chunk_len(self) -> int:
        """Tokens in one chunk."""
        return self.chunk_size - self.local_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a dense Qwen2.5 model.

    `rms_norm_eps`, `max_position_embeddings` and `eos_token_ids` differ between the base and the instruct checkpoint
    of one size; see `published`.

    Attributes:
      vocab_size: rows of the embedding. More than the tokenizer has: the rest is padding that is never sampled.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU feed-forward layer.
      num_layers: transformer blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head.
      tie_word_embeddings: whether the output head is the embedding.
      rms_norm_eps: added to the mean square in every RMSNorm.
      rope_theta: RoPE base.
      max_position_embeddings: context length in tokens.
      yarn: context extension, or None.
      dual_chunk: dual-chunk attention, or None.
      bos_token_id: recorded for other tools; nothing is prepended to a prompt.
      eos_token_ids: ids that end a text.
      initializer_range: standard deviation of the initial weights.
      dtype: what the checkpoint stores: bfloat16, float32 or float16.
      use_sliding_window, sliding_window, max_window_layers: carried for other tools. A window that any layer would
        use (`use_sliding_window` and `max_window_layers < num_layers`) is refused.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 32768
    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    bos_token_id: int | None = 151643
    eos_token_ids: tuple[int, ...] = (151643,)
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): "
                "each key/value head serves an equal group of query heads."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even, RoPE rotates pairs; got {self.head_dim}.")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise InputError(
                f"rms_norm_eps and rope_theta must be positive, got {self.rms_norm_eps} and {self.rope_theta}."
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        layers_without = self.num_layers if self.max_window_layers is None else self.max_window_layers
        if self.use_sliding_window and self.sliding_window is not None and layers_without < self.num_layers:
            raise InputError(
                f"This checkpoint uses a sliding window of {self.sliding_window} tokens in layers "
                f"{layers_without} to {self.num_layers - 1}, which is not supported. Every published Qwen2.5 "
                "checkpoint has use_sliding_window=false; set that in config.json if full attention is what you want."
            )

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, that this implementation runs exactly."""
        extended = int(self.yarn.original_max_position_embeddings * self.yarn.factor) if self.yarn else 0
        length = max(self.max_position_embeddings, extended)
        return min(length, self.dual_chunk.chunk_len) if self.dual_chunk else length

    def num_params(self) -> dict[str, int]:
        """Exact parameter counts: `embedding`, `layers`, `norm`, `lm_head` (0 when tied), `total`, `non_embedding`."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = q * d + q + 2 * (kv * d + kv) + d * q + 3 * d * f + 2 * d
        embedding = self.vocab_size * d
        lm_head = 0 if self.tie_word_embeddings else embedding
        total = embedding + self.num_layers * layer + d + lm_head
        return {
            "embedding": embedding,
            "layers": self.num_layers * layer,
            "norm": d,
            "lm_head": lm_head,
            "total": total,
            "non_embedding": total - embedding - lm_head,
        }

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that one token occupies in the key/value cache.

        Args:
          itemsize: bytes of one cache element.
        """
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    # --- config.json ---------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads the content of a Hugging Face `config.json`, in the dialect of transformers 4.x or 5.x.

        Args:
          hf: the parsed JSON object.

        Raises:
          InputError: another architecture, a setting that changes the computation and is not supported, or a key that
            is not known: guessing would give wrong logits.
        """
        hf = dict(hf)
        _check_kinds(hf)
        if hf.get("model_type") != "qwen2":
            raise InputError(
                f"Expected a config.json with model_type 'qwen2', got {hf.get('model_type')!r}. "
                "Only the dense Qwen2 and Qwen2.5 architecture can be loaded."
            )
        architectures = hf.get("architectures") or ["Qwen2ForCausalLM"]
        if architectures != ["Qwen2ForCausalLM"]:
            raise InputError(f"Expected architecture Qwen2ForCausalLM, got {architectures}.")
        unknown = sorted(set(hf) - _KNOWN_KEYS)
        if unknown:
            raise InputError(
                f"config.json has keys that are not known here: {', '.join(unknown)}. They may change what the model "
                "computes. Remove them from config.json if you are sure that they do not."
            )
        for key, expected in _REQUIRED_VALUES.items():
            if hf.get(key, expected) != expected:
                raise InputError(f"config.json has {key}={hf[key]!r}; only {expected!r} is supported, as in Qwen2.5.")
        missing = [key for key in _SHAPE_KEYS if hf.get(key) is None]
        if missing:
            raise InputError(f"config.json lacks {', '.join(missing)}.")
        num_layers, num_heads = int(hf["num_hidden_layers"]), int(hf["num_attention_heads"])
        if not hf.get("head_dim") and int(hf["hidden_size"]) % num_heads:
            raise InputError(
                f"config.json has no head_dim, and hidden_size ({hf['hidden_size']}) is not a multiple of "
                f"num_attention_heads ({num_heads})."
            )
        layer_types = hf.get("layer_types")
        if layer_types is not None and set(layer_types) != {"full_attention"}:
            raise InputError(
                f"config.json has layer_types {sorted(set(layer_types))}; only full_attention is supported."
            )
        if layer_types is not None and len(layer_types) != num_layers:
            raise InputError(f"config.json has {len(layer_types)} layer_types for {num_layers} layers.")
        rope_theta, yarn = _read_rope(hf)
        eos = hf.get("eos_token_id")
        dual_chunk = hf.get("dual_chunk_attention_config")
        if dual_chunk is not None:
            try:
                dual_chunk = DualChunk(**dual_chunk)
            except TypeError as error:
                raise InputError(f"dual_chunk_attention_config of config.json: {error}.") from None
        return cls(
            vocab_size=int(hf["vocab_size"]),
            hidden_size=int(hf["hidden_size"]),
            intermediate_size=int(hf["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
            head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // num_heads),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            rms_norm_eps=float(hf.get("rms_norm_eps") or 1e-6),
            rope_theta=rope_theta,
            max_position_embeddings=int(hf.get("max_position_embeddings") or 32768),
            yarn=yarn,
            dual_chunk=dual_chunk,
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            initializer_range=float(hf.get("initializer_range") or 0.02),
            dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
            use_sliding_window=bool(hf.get("use_sliding_window", False)),
            sliding_window=hf.get("sliding_window"),
            max_window_layers=hf.get("max_window_layers"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4.x and 5.x both read (and vLLM, SGLang, llama.cpp)."""
        eos: Any = list(self.eos_token_ids)
        hf: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen2",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "use_sliding_window": self.use_sliding_window,
            "vocab_size": self.vocab_size,
        }
        if self.max_window_layers is not None:
            hf["max_window_layers"] = self.max_window_layers
        if self.head_dim * self.num_heads != self.hidden_size:
            hf["head_dim"] = self.head_dim
        if self.yarn:
            yarn = {key: value for key, value in dataclasses.asdict(self.yarn).items() if value is not None}
            # `type` is what tools older than transformers 4.43 read.
            hf["rope_scaling"] = {"rope_type": "yarn", "type": "yarn", **yarn}
        if self.dual_chunk:
            hf["dual_chunk_attention_config"] = dataclasses.asdict(self.dual_chunk)
        return hf


_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Settings that change the computation and that Qwen2.5 has at one value only.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_mrope": False,
    "quantization_config": None,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}

# Everything else that may stand in a config.json without changing the forward pass.
_KNOWN_KEYS = {*_SHAPE_KEYS, *_REQUIRED_VALUES} | set(
    """
    architectures model_type num_key_value_heads head_dim tie_word_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters max_position_embeddings dual_chunk_attention_config bos_token_id eos_token_id
    pad_token_id initializer_range torch_dtype dtype use_sliding_window sliding_window max_window_layers
    layer_types use_cache transformers_version _name_or_path _commit_hash _attn_implementation_autoset
    attn_implementation seq_length return_dict output_attentions output_hidden_states chunk_size_feed_forward
    id2label label2id problem_type unsloth_version unsloth_fixed
    """.split()
)


def _check_kinds(hf: Mapping[str, Any]) -> None:
    """Refuses values that are not of the kind their key needs; null stands for an absent key."""
    integers = (*_SHAPE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in (*integers, "rms_norm_eps", "rope_theta", "initializer_range"):
        value = hf.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not number or (key in integers and value != int(value)):
            kind = "integer" if key in integers else "number"
            raise InputError(f"config.json has {key}={value!r}; expected a positive {kind}.")
    for key in ("rope_scaling", "rope_parameters", "dual_chunk_attention_config"):
        if not isinstance(hf.get(key) or {}, Mapping):
            raise InputError(f"config.json has {key}={hf[key]!r}; expected an object.")
    eos = hf.get("eos_token_id")
    if not all(isinstance(i, int) and i >= 0 for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        raise InputError(f"config.json has eos_token_id={eos!r}; expected an id or a list of ids.")
    if not isinstance(hf.get("layer_types") or [], list):
        raise InputError(f"config.json has layer_types={hf['layer_types']!r}; expected a list.")


_YARN_KEYS = {field.name for field in dataclasses.fields(Yarn)}


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """RoPE base and scaling from either dialect: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    scaling: dict[str, Any] = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = scaling.pop("rope_theta", None)
    if theta is not None and hf.get("rope_theta") not in (None, theta):
        raise InputError(
            f"config.json gives two RoPE bases: rope_theta={hf['rope_theta']} and {theta} inside the RoPE parameters. "
            "Remove the wrong one."
        )
    theta = theta if theta is not None else hf.get("rope_theta")
    if theta is None:
        raise InputError("config.json has no rope_theta, neither at the top level nor in rope_parameters.")
    names = {scaling.pop(key) for key in ("rope_type", "type") if key in scaling}
    if len(names) > 1:
        raise InputError(f"config.json names two RoPE types, {sorted(names)}. Keep one.")
    rope_type = names.pop() if names else "default"
    if rope_type == "default":
        return float(theta), None
    if rope_type != "yarn":
        raise InputError(f"RoPE type {rope_type!r} is not supported; Qwen2.5 uses 'default' or 'yarn'.")
    if scaling.pop("truncate", True) is not True:
        raise InputError("YaRN with truncate=false is not supported.")
    unknown = sorted(set(scaling) - _YARN_KEYS)
    if unknown or "factor" not in scaling:
        raise InputError(
            f"YaRN needs `factor` and knows {', '.join(sorted(_YARN_KEYS))}; config.json has {sorted(scaling)}."
        )
    # Older files leave the original length to max_position_embeddings.
    original = int(scaling.pop("original_max_position_embeddings", None) or hf.get("max_position_embeddings", 32768))
    return float(theta), Yarn(original_max_position_embeddings=original, **scaling)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      InputError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, it holds a {type(value).__name__}.")
    return value


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder.

    Raises:
      InputError: no such folder or file, or an unsupported model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder. Expected a checkpoint folder with config.json in it.")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json. Expected a Hugging Face or qwen_jax checkpoint folder.")
    return ModelConfig.from_hf(read_json(path / "config.json"))


# --- published sizes -------------------------------------------------------------------------------------------------
# Facts from the published config.json files. hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, tied.
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 128, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 128, 152064, False),
}
# Fields of the shapes that carry a window nobody uses; they only have to survive a round trip.
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
    return configs


PUBLISHED: dict[str, ModelConfig] = _published()


def published(name: str) -> ModelConfig:
    """The configuration of a published model.

    Args:
      name: such as "Qwen2.5-7B-Instruct", in any case, with or without the "Qwen/" in front.

    Raises:
      InputError: no such model; the message lists the names.
    """
    key = name.lower().removeprefix("qwen/")
    if key not in PUBLISHED:
        raise InputError(f"Unknown model {name!r}. Known: {', '.join(sorted(PUBLISHED))}.")
    return PUBLISHED[key]
