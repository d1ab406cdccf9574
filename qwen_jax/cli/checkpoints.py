"""`qwen-jax info`, `convert`, `upcycle` and `verify`: the shape of a checkpoint, its conversion and its comparison."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, DType, Seed, sibling
from qwen_jax.cli.failures import complain, explain
from qwen_jax.units import binary_size, count

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig

# The keys of `convert.gguf.RECIPES`.
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]


@dataclasses.dataclass(frozen=True)
class Info:
    """Print a model's shape, exact parameter counts, memory by dtype, and cache size. No weights are read.

    Args:
        model: A published name (Qwen2.5-7B-Instruct), a checkpoint folder, a GGUF file, or a Hub id, of which
            config.json is downloaded.
        json: Print one JSON object.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_DIR")]
    json: bool = False

    def run(self) -> int:
        from qwen_jax.files import to_json

        config, folder = _config(self.model)
        params = config.num_params()
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        report = {
            "model": self.model,
            "parameters": params,
            "weights_bytes": {dtype: params["total"] * size for dtype, size in sizes.items()},
            "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(size) for dtype, size in sizes.items()},
            "context_length": config.context_length,
            "config": config.to_hf(),
        }
        types = _gguf_types(self.model)
        if types is not None:
            report["tensor_types"] = types
        quantization = None if folder is None else _quantization(folder)
        if quantization is not None:
            report["quantization"] = quantization
        if self.json:
            print(to_json(report))
            return 0
        print(self.model)
        rows = _rows(config)
        if types is not None:
            size = types.pop("bytes")
            counts = ", ".join(f"{number} {name}" for name, number in types.items())
            rows.append(("tensors", f"{counts}; {binary_size(size)}"))
        if quantization is not None:
            group, size = quantization["group_size"], quantization["weights_bytes"]
            text = f"{quantization['method']}, {quantization['bits']} bits"
            text += f", groups of {group}" if group else ", one scale for each output or matrix"
            rows.append(("quantised", text + (f", {binary_size(size)} of files" if size else "")))
        for name, value in rows:
            print(f"  {name:24s} {value}")
        return 0


def _config(model: str) -> tuple["ModelConfig", Path | None]:
    """The config of a folder, a GGUF file, a published name or a Hub model; and the folder if there is one."""
    from qwen_jax.config import load_config
    from qwen_jax.gguf.header import is_gguf
    from qwen_jax.hub import CONFIG, is_hub_id, resolve
    from qwen_jax.published import PUBLISHED, published

    known = model.lower().removeprefix("qwen/") in PUBLISHED
    if os.path.isdir(model) or is_gguf(model) or (not known and (is_hub_id(model) or "/" in model)):
        found = resolve(model, CONFIG)
        return load_config(found), found if found.is_dir() else None
    return published(model), None


def _gguf_types(model: str) -> dict[str, int] | None:
    """How many tensors of each type a GGUF file has, and their bytes; None for another kind of model."""
    from collections import Counter

    from qwen_jax.gguf.header import is_gguf, read_header

    if not is_gguf(model) or os.path.isdir(model):
        return None
    tensors = read_header(model).tensors.values()
    return {**Counter(tensor.type.name for tensor in tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}


def _quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights of a folder are quantised, by its configuration; None if they are not."""
    given = sibling("convert.quantized.source").quantization_config(folder)
    info = sibling("convert.quantized.formats").read_format(folder, given)
    if info is None:
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"method": info.method, "bits": info.bits, "group_size": info.group, "weights_bytes": size or None}


def _rows(config: "ModelConfig") -> list[tuple[str, str]]:
    """The table that `info` prints."""
    params, cache, moe, experts = config.num_params(), config.kv_bytes_per_token(), config.moe, []
    if moe is not None:
        sparse = len(config.sparse_layers)
        experts = [
            ("active parameters", f"{params['active']:,} per token, with the head and without the embedding"),
            ("experts", f"{moe.num_experts} in {sparse} layers, {moe.intermediate_size:,} wide"),
            ("  per token", f"{moe.num_experts_per_tok}, and a shared one of {moe.shared_intermediate_size:,}"),
        ]
    shared = config.score is None and config.tie_word_embeddings
    head = f"{params['lm_head']:,}" if config.score is None else f"{params['score']:,}, a {config.score} score head"
    return [
        ("parameters", f"{params['total']:,} ({params['non_embedding']:,} without embedding and head)"),
        ("  embedding", f"{params['embedding']:,}" + (" (is the head too)" if shared else "")),
        ("  layers", f"{params['layers']:,} in {config.num_layers}"),
        ("  head", "tied to the embedding" if shared else head),
        ("hidden / feed-forward", f"{config.hidden_size:,} / {config.intermediate_size:,}"),
        *experts,
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, {config.head_dim} wide"),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("RoPE base, norm epsilon", f"{config.rope_theta:,.0f}, {config.rms_norm_eps:g}"),
        ("context", f"{config.context_length:,} tokens"),
        ("weights", f"{binary_size(2 * params['total'])} bfloat16, {binary_size(4 * params['total'])} float32"),
        ("cache", f"{binary_size(cache)} a token, {binary_size(cache * config.context_length)} a full context"),
    ]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between Hugging Face safetensors, Orbax and GGUF, tensor by tensor.

    The new folder or file appears when it is complete; after a failure nothing is left. Tokenizer, generation config
    and config.json are copied too. Quantised weights are dequantised (--dtype), or go to another quantised format
    (--quantization) with the same codes.

    Args:
        src: Checkpoint folder, GGUF file, or a Hub id such as Qwen/Qwen2.5-0.5B.
        dst: The new folder; or the new file, NAME.gguf.
        to: Format of a new folder; by default the one that SRC does not have.
        dtype: Dtype of the written weights; by default as stored, every tensor byte for byte. Quantised weights of a
            GGUF file are then written in float32.
        type: Type of the matrices in a GGUF file; by default as stored. Other than the float types, output head and
            some layers get finer ones, by the rules of llama.cpp.
        merge_adapter: LoRA folder of PEFT, or Hub id, to merge into the weights, summed in float32 and then rounded.
            The format is then that of SRC.
        quantization: Format of quantised weights to write; SRC must be quantised already.
        intermediate_size: Of the written model, where SRC has rows of padding. By default the quantised 72B models
            (29696) get their own size (29568) with --dtype, and keep the padding otherwise.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    to: Literal["hf", "orbax"] | None = None
    dtype: DType | None = None
    type: GGUFType | None = None
    merge_adapter: Annotated[str | None, tyro.conf.arg(metavar="ADAPTER")] = None
    quantization: Literal["gptq", "awq", "compressed-tensors", "fp8"] | None = None
    intermediate_size: Count = None

    def run(self) -> int:
        sibling("convert").convert(
            self.src,
            self.dst,
            self.to,
            self.dtype,
            progress=True,
            adapter=self.merge_adapter,
            recipe=self.type,
            quantization=self.quantization,
            intermediate_size=self.intermediate_size,
        )
        print(self.dst)
        return 0


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Turn a dense checkpoint into a mixture of experts, by the recipe of Qwen's own models (docs/moe.md).

    The feed-forward layers are replicated, their neurons shuffled and cut into experts; the router is new. With
    `--reinit 0` and the defaults the new model computes what the dense one does, which `qwen-jax verify` confirms.

    Args:
        src: Dense checkpoint folder, or a Hub id such as Qwen/Qwen2.5-0.5B.
        dst: The new folder.
        num_experts: Routed experts of each layer.
        top_k: Experts per token.
        width: Width of a routed expert; by default a token's experts together are as wide as the dense layer.
        shared_width: Width of the shared expert; by default that of the dense layer.
        norm_topk_prob: Normalise the weights of a token's experts to sum to 1.
        reinit: Fraction of each expert's neurons that are initialised anew.
        seed: Seed of everything random.
        to: Format to write; by default that of SRC.
        dtype: Dtype of the written weights; by default as stored.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    num_experts: int = 64
    top_k: int = 8
    width: int | None = None
    shared_width: int | None = None
    norm_topk_prob: bool = True
    reinit: float = 0.5
    seed: Seed = 0
    to: Literal["hf", "orbax"] | None = None
    dtype: DType | None = None

    def run(self) -> int:
        from qwen_jax.config import MoE, load_config
        from qwen_jax.errors import InputError
        from qwen_jax.hub import CONFIG, resolve

        upcycling = sibling("convert.upcycle")
        # Check the options before the config is downloaded; widths that are not given depend on it.
        sibling("convert").check_options(self.dst, self.to, self.dtype)
        widths = 1 if self.width is None else self.width, 1 if self.shared_width is None else self.shared_width
        moe = MoE(self.num_experts, self.top_k, widths[0], widths[1], norm_topk_prob=self.norm_topk_prob)
        recipe = upcycling.Recipe(moe, self.reinit, self.seed)
        dense = load_config(resolve(self.src, CONFIG)).intermediate_size
        if self.width is None and dense % self.top_k:
            raise InputError(
                f"The dense layer is {dense} wide, which is not divisible by the {self.top_k} experts of a token. Give "
                "--width, or a --top-k that divides it."
            )
        width = dense // self.top_k if self.width is None else self.width
        shared = dense if self.shared_width is None else self.shared_width
        moe = dataclasses.replace(moe, intermediate_size=width, shared_intermediate_size=shared)
        recipe = dataclasses.replace(recipe, moe=moe)
        made = upcycling.upcycle(self.src, self.dst, recipe, self.to, self.dtype, progress=True)
        params = made.config.num_params()
        print(
            f"{self.dst}: {count(params['total'])} parameters, {count(params['active'])} active; it "
            + ("computes what the dense model does" if made.preserves else "does not compute what the dense model does")
            + (", up to the rounding of scaled weights" if made.preserves and made.rounds else "")
        )
        if width % 128:
            print(
                f"Experts are {width} wide: the fast kernels need a multiple of 128 on TPUs"
                + (" and of 64 on GPUs" if width % 64 else "")
                + ", so training will be slow there; --width chooses another width."
            )
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints of any format by their logits; exit 0 pass, 1 fail, 2 could not compare.

    Args:
        a: Checkpoint folder, GGUF file or Hub id; the reference.
        b: The other checkpoint.
        against: Instead of B, run A in transformers as the reference; or in NumPy, which also has dual-chunk attention.
        json: Print one JSON object.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    against: Literal["transformers", "numpy"] | None = None
    json: bool = False

    def run(self) -> int:
        from qwen_jax.files import to_json

        verify = sibling("convert.verify")
        try:
            report = verify.verify(self.a, self.b, against=self.against)
        except Exception as error:
            # Whatever it was, nothing was compared; status 1 would say that the weights differ.
            problem = explain(error) or str(error)
            if self.json:
                print(to_json({"passed": None, "error": problem}))
            complain(problem)
            return 2
        print(report.to_json() if self.json else report)
        return int(report.exit_code)
