"""The architecture of a model: `ModelConfig` and its parts."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen_jax import hf_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, why_unusable
from qwen_jax.gguf.header import Header, is_gguf, read_header
from qwen_jax.quantization import Quantization

DTYPES = ("bfloat16", "float32", "float16")
Score = Literal["linear", "mlp"]
"""The head of a reward model; see `qwen_jax.score`."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), as the Qwen documentation configures it.

    Attributes:
      factor: ratio of the extended context length to the original one.
      original_max_position_embeddings: the context length, in tokens, that the model was trained with.
      attention_factor: multiplies cos and sin; None means the paper's 0.1 ln(factor) + 1.
      beta_fast: frequencies with more rotations than this over the original context are kept.
      beta_slow: frequencies with fewer rotations than this over the original context are interpolated.
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
    """Dual-chunk attention, as the 1M-token checkpoints use it; see `qwen_jax.attention.dual_chunk`.

    Up to `chunk_len` tokens dual-chunk attention is exactly plain RoPE attention.

    Attributes:
      chunk_size: the largest relative position.
      local_size: relative positions up to this are exact, if it is at most half of `chunk_size`.
      original_max_position_embeddings: length of training in tokens; longer texts get a factor on the logits.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size or self.original_max_position_embeddings < 1:
            raise InputError(
                "Dual-chunk attention needs 0 < local_size < chunk_size and a positive "
                f"original_max_position_embeddings; got local_size {self.local_size}, chunk_size {self.chunk_size}, "
                f"original_max_position_embeddings {self.original_max_position_embeddings}."
            )

    @property
    def chunk_len(self) -> int:
        """Tokens in one chunk."""
        return self.chunk_size - self.local_size


@dataclasses.dataclass(frozen=True)
class MoE:
    """Mixture-of-experts layers in place of feed-forward layers: routed experts, and one shared by all tokens.

    Attributes:
      num_experts: routed experts of a layer.
      num_experts_per_tok: routed experts per token (top-k).
      intermediate_size: SwiGLU width of a routed expert.
      shared_intermediate_size: SwiGLU width of the shared expert, whose output is multiplied by a sigmoid gate.
      norm_topk_prob: whether the weights of a token's experts are normalised to sum to 1.
      decoder_sparse_step: every layer whose number, counted from 1, is a multiple of this has experts.
      mlp_only_layers: layers without experts in spite of that, counted from 0.
      router_aux_loss_coef: coefficient of the load-balancing loss in training.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        names = ("num_experts", "num_experts_per_tok", "intermediate_size", "shared_intermediate_size")
        for name in (*names, "decoder_sparse_step"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} of a mixture of experts must be a positive integer, got {value!r}.")
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts ({self.num_experts}): a "
                "token is routed to different experts."
            )
        if not isinstance(self.mlp_only_layers, tuple) or not all(isinstance(i, int) for i in self.mlp_only_layers):
            raise InputError(f"mlp_only_layers must be a tuple of numbers of layers, got {self.mlp_only_layers!r}.")
        if not self.router_aux_loss_coef >= 0:
            raise InputError(f"router_aux_loss_coef must be at least 0, got {self.router_aux_loss_coef}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Qwen2.5 model, dense or with a mixture of experts.

    `rms_norm_eps`, `max_position_embeddings` and `eos_token_ids` differ between the base and the instruct checkpoint
    of one size; see `published`.

    Attributes:
      vocab_size: rows of the embedding. The published models have more rows than the tokenizer has ids; the rest is
        padding that is never sampled.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU feed-forward layer, in layers without experts.
      num_layers: transformer blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head.
      tie_word_embeddings: whether the output head shares its weight with the embedding.
      rms_norm_eps: added to the mean square in every RMSNorm.
      rope_theta: RoPE base.
      max_position_embeddings: context length in tokens.
      yarn: context extension, or None.
      dual_chunk: dual-chunk attention, or None.
      moe: experts, or None for a dense model.
      score: the head of a reward model, in place of the output head; None for a language model.
      quantization: how the checkpoint quantises its projections; None if it does not.
      bos_token_id: recorded for other tools; nothing is prepended to a prompt.
      eos_token_ids: ids that end a text, such as (tokenizer.eos_id,) for a model with a tokenizer of its own.
      initializer_range: standard deviation of the initial weights.
      dtype: in which the checkpoint stores its weights: bfloat16, float32 or float16.
      use_sliding_window, sliding_window, max_window_layers: kept for other tools. A window that any layer would use
        (`use_sliding_window` and `max_window_layers < num_layers`) is refused.
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
    moe: MoE | None = None
    score: Score | None = None
    quantization: Quantization | None = None
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
            raise InputError(f"head_dim must be even, because RoPE rotates pairs; got {self.head_dim}.")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise InputError(
                f"rms_norm_eps and rope_theta must be positive, got {self.rms_norm_eps} and {self.rope_theta}."
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.score not in (None, "linear", "mlp"):
            raise InputError(f"score must be linear, mlp or null, got {self.score!r}.")
        if self.moe is not None:
            beyond = [i for i in self.moe.mlp_only_layers if not 0 <= i < self.num_layers]
            if beyond:
                raise InputError(f"mlp_only_layers names layers {beyond}; there are layers 0 to {self.num_layers - 1}.")
            if not self.sparse_layers:
                raise InputError(
                    f"No layer has experts: decoder_sparse_step is {self.moe.decoder_sparse_step} and mlp_only_layers "
                    f"{list(self.moe.mlp_only_layers)}, with {self.num_layers} layers."
                )
            if self.use_sliding_window:
                raise InputError("use_sliding_window=true is not supported with experts; no published model has it.")
        if self.yarn is not None and self.dual_chunk is not None:
            raise InputError(
                "YaRN frequencies and dual-chunk attention together are not defined: dual-chunk attention keeps RoPE's "
                "frequencies and takes only the temperature from YaRN, by itself. Remove rope_scaling or "
                "dual_chunk_attention_config."
            )
        first_layer = self.num_layers if self.max_window_layers is None else self.max_window_layers
        if self.use_sliding_window and self.sliding_window is not None and first_layer < self.num_layers:
            raise InputError(
                f"This checkpoint uses a sliding window of {self.sliding_window} tokens in layers "
                f"{first_layer} to {self.num_layers - 1}, which is not supported. Every published Qwen2.5 "
                "checkpoint has use_sliding_window=false; set that in config.json if full attention is what you want."
            )

    @property
    def has_lm_head(self) -> bool:
        """Whether there is an output head with a weight of its own."""
        return not self.tie_word_embeddings and self.score is None

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts, counted from 0."""
        if self.moe is None:
            return ()
        step, without = self.moe.decoder_sparse_step, self.moe.mlp_only_layers
        return tuple(i for i in range(self.num_layers) if (i + 1) % step == 0 and i not in without)

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens: max_position_embeddings, or more where YaRN extends it."""
        extended = int(self.yarn.original_max_position_embeddings * self.yarn.factor) if self.yarn else 0
        return max(self.max_position_embeddings, extended)

    def with_rope_scaling(self, setting: str, trained_length: int | None = None) -> "ModelConfig":
        """The config with RoPE scaling, for texts longer than those of training.

        Args:
          setting: "yarn:FACTOR", such as "yarn:4" for YaRN up to four times the length of training.
          trained_length: length of training in tokens, by default `max_position_embeddings`.

        Raises:
          InputError: another setting, or the context of this model is extended already.
        """
        kind, _, text = setting.partition(":")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if kind != "yarn" or not math.isfinite(factor):
            raise InputError(f"Expected a RoPE scaling such as yarn:4, got {setting!r}.")
        trained = self._trained_length(f"RoPE scaling {setting}", trained_length)
        return dataclasses.replace(self, yarn=Yarn(factor, trained), max_position_embeddings=int(factor * trained))

    def with_dual_chunk(self, factor: int = 4, trained_length: int | None = None) -> "ModelConfig":
        """The config with dual-chunk attention, for texts up to `factor` times as long as those of training.

        The length of a chunk is that of training, of which 1/32 is local, as in the 1M-token checkpoints.

        Args:
          factor: of the length.
          trained_length: length of training in tokens, by default `max_position_embeddings`.

        Raises:
          InputError: the context of this model is extended already.
        """
        trained = self._trained_length("Dual-chunk attention", trained_length)
        chunks = DualChunk(trained, max(trained // 32, 1), trained)
        return dataclasses.replace(self, dual_chunk=chunks, max_position_embeddings=factor * trained)

    def with_w8a8(self) -> "ModelConfig":
        """The config with rounded activations in steps of many tokens; see `Quantization.with_w8a8`.

        Raises:
          InputError: the model is not quantised, or not in a way that has such products.
        """
        if self.quantization is None:
            raise InputError(
                "Rounded activations (w8a8) need int8 or float8 weights; this model is not quantised. Leave w8a8 out, "
                "or quantise the model first: qwen-jax quantize --method int8, or fp8."
            )
        return dataclasses.replace(self, quantization=self.quantization.with_w8a8())

    def _trained_length(self, extension: str, given: int | None) -> int:
        has = "YaRN" if self.yarn else "dual-chunk attention" if self.dual_chunk else None
        if has:
            raise InputError(
                f"{extension} cannot be added: this model has {has} already, up to {self.context_length} tokens."
            )
        if given is not None and not 1 <= given <= self.max_position_embeddings:
            raise InputError(
                f"The length of training must be from 1 to max_position_embeddings, {self.max_position_embeddings}; "
                f"got {given}."
            )
        return self.max_position_embeddings if given is None else given

    def num_params(self) -> dict[str, int]:
        """Exact parameter counts.

        Returns:
          `embedding`, `layers`, `norm`, `lm_head` (0 when tied), `score` (0 for a language model), `total`,
          `non_embedding` (without embedding and head), and `active`: parameters that one token is multiplied with, the
          head among them; without the embedding and the experts that the token is not routed to.
        """
        d = self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = q * d + q + 2 * (kv * d + kv) + d * q + 2 * d
        sparse = len(self.sparse_layers)
        layers = self.num_layers * attention + (self.num_layers - sparse) * 3 * d * self.intermediate_size
        idle = 0
        if self.moe is not None:
            expert = 3 * d * self.moe.intermediate_size
            router_and_gate = (self.moe.num_experts + 1) * d
            shared = 3 * d * self.moe.shared_intermediate_size
            layers += sparse * (self.moe.num_experts * expert + shared + router_and_gate)
            idle = sparse * (self.moe.num_experts - self.moe.num_experts_per_tok) * expert
        embedding = self.vocab_size * d
        lm_head = embedding if self.has_lm_head else 0
        score = {None: 0, "linear": d, "mlp": d * d + d + d + 1}[self.score]
        total = embedding + layers + d + lm_head + score
        return {
            "embedding": embedding,
            "layers": layers,
            "norm": d,
            "lm_head": lm_head,
            "score": score,
            "total": total,
            "non_embedding": total - embedding - lm_head - score,
            "active": layers - idle + d + (score or embedding),
        }

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of one token in the key/value cache.

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
        return cls._of(hf_config.read(hf))

    @classmethod
    def from_gguf(cls, header: Header) -> "ModelConfig":
        """Reads the metadata of a GGUF file.

        Args:
          header: of the file.

        Raises:
          InputError: as `from_hf`.
        """
        from qwen_jax.gguf import metadata

        return cls._of(metadata.read(header))

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> "ModelConfig":
        for name, kind in (("yarn", Yarn), ("dual_chunk", DualChunk), ("moe", MoE)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4.x and 5.x both read (and vLLM, SGLang, llama.cpp)."""
        return hf_config.write(dataclasses.asdict(self))


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder, or the metadata of a GGUF file.

    Raises:
      InputError: no such folder or file, an adapter without its base model, or an unsupported model.
    """
    path = Path(folder)
    if is_gguf(path) and not path.is_dir():
        return ModelConfig.from_gguf(read_header(path))
    if not path.is_dir():
        raise InputError(f"{path} is not a folder. Expected a checkpoint folder with config.json in it.")
    file = path / "config.json"
    if not file.exists() and not file.is_symlink():
        problem = adapter_problem(path)
        raise InputError(
            problem or f"{path} has no config.json. Expected a Hugging Face or qwen_jax checkpoint folder."
        )
    hf = read_json(file)
    if (path / "generation_config.json").is_file():  # Then nobody reads the generation settings in config.json.
        hf = {key: value for key, value in hf.items() if key not in hf_config.GENERATION_DEFAULTS}
    return ModelConfig.from_hf(hf)


def adapter_problem(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter (LoRA and the like, as PEFT saves them); None if it holds none."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    settings = {} if why_unusable(file) else read_json(file)
    kind, base = settings.get("peft_type") or "PEFT", settings.get("base_model_name_or_path")
    scores = settings.get("task_type") == "SEQ_CLS"  # What scores takes no adapter.
    return (
        f"{folder} holds a {kind} adapter (adapter_config.json), not a model"
        + (f"; its base model is {base}" if base else "")
        + (". Merge" if scores else f". Give the base model and --adapter {folder}; or merge")
        + f" the two first, with qwen-jax convert --merge-adapter {folder} MODEL OUT, or PEFT's merge_and_unload()."
    )
