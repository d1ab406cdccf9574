"""`qwen-jax info`, `convert` and `verify`: what a checkpoint is, and how it moves."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_jax.cli.common import DType, sibling
from qwen_jax.cli.failures import complain, explain


@dataclasses.dataclass(frozen=True)
class Info:
    """Print a model's shape, exact parameter counts, memory by dtype, and cache size.

    Args:
        model: A published name (Qwen2.5-7B-Instruct) or a checkpoint folder.
        json: Print one JSON object.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_DIR")]
    json: bool = False

    def run(self) -> int:
        from qwen_jax.config import load_config
        from qwen_jax.published import published

        config = load_config(self.model) if Path(self.model).is_dir() else published(self.model)
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
        if self.json:
            print(json.dumps(report))
            return 0
        cache, moe, experts = config.kv_bytes_per_token(), config.moe, []
        if moe is not None:
            sparse = len(config.sparse_layers)
            experts = [
                ("active parameters", f"{params['active']:,} for a token, the head among them and the embedding not"),
                ("experts", f"{moe.num_experts} in {sparse} layers, {moe.intermediate_size:,} wide"),
                ("  to a token", f"{moe.num_experts_per_tok}, and a shared one of {moe.shared_intermediate_size:,}"),
            ]
        rows = [
            ("parameters", f"{params['total']:,} ({params['non_embedding']:,} without embedding and head)"),
            ("  embedding", f"{params['embedding']:,}" + (" (is the head too)" if not params["lm_head"] else "")),
            ("  layers", f"{params['layers']:,} in {config.num_layers}"),
            ("  head", f"{params['lm_head']:,}" if params["lm_head"] else "tied to the embedding"),
            ("hidden / feed-forward", f"{config.hidden_size:,} / {config.intermediate_size:,}"),
            *experts,
            ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, {config.head_dim} wide"),
            ("vocabulary", f"{config.vocab_size:,} rows"),
            ("RoPE base, norm epsilon", f"{config.rope_theta:,.0f}, {config.rms_norm_eps:g}"),
            ("context", f"{config.context_length:,} tokens"),
            ("weights", f"{params['total'] * 2 / 2**30:.2f} GiB bfloat16, {params['total'] * 4 / 2**30:.2f} float32"),
            ("cache", f"{cache / 1024:g} KiB a token, {cache * config.context_length / 2**30:.2f} GiB a full context"),
        ]
        print(self.model)
        for name, value in rows:
            print(f"  {name:24s} {value}")
        return 0


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between Hugging Face safetensors and Orbax, tensor by tensor.

    The new folder appears whole or not at all. Tokenizer, generation config and config.json travel along.

    Args:
        src: Checkpoint folder, or a Hub id such as Qwen/Qwen2.5-0.5B.
        dst: The new folder.
        to: Format to write; by default the one that SRC does not have.
        dtype: Of the written weights; by default as stored, every tensor byte for byte.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    to: Literal["hf", "orbax"] | None = None
    dtype: DType | None = None

    def run(self) -> int:
        sibling("convert").convert(self.src, self.dst, self.to, self.dtype, progress=True)
        print(self.dst)
        return 0


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Make a mixture of experts of a dense checkpoint, by the recipe of Qwen's own models (docs/moe.md).

    The feed-forward layers are replicated, their neurons shuffled and cut into experts; the router is new. With
    `--reinit 0` and the defaults the new model computes what the old one does, and `qwen-jax verify` can tell.

    Args:
        src: Dense checkpoint folder, or a Hub id such as Qwen/Qwen2.5-0.5B.
        dst: The new folder.
        num_experts: Routed experts of each layer.
        top_k: Experts that a token takes.
        width: Of a routed expert; by default a token's experts are together as wide as the dense layer.
        shared_width: Of the shared expert; by default as wide as the dense layer.
        norm_topk_prob: Weights of a token's experts sum to 1.
        reinit: Fraction of each expert's neurons that are drawn anew.
        seed: Of all that is drawn.
        to: Format to write; by default that of SRC.
        dtype: Of the written weights; by default as stored.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    num_experts: int = 64
    top_k: int = 8
    width: int | None = None
    shared_width: int | None = None
    norm_topk_prob: bool = True
    reinit: float = 0.5
    seed: int = 0
    to: Literal["hf", "orbax"] | None = None
    dtype: DType | None = None

    def run(self) -> int:
        from qwen_jax.config import MoE
        from qwen_jax.errors import InputError

        upcycling, folder = sibling("convert.upcycle"), sibling("convert")
        dense = folder.open_source(self.src).config.intermediate_size
        if self.width is None and (self.top_k < 1 or dense % self.top_k):
            raise InputError(
                f"The dense layer ({dense}) is not cut evenly into {self.top_k} experts, those of a token. Give "
                "--width, or a --top-k that divides it."
            )
        width = dense // self.top_k if self.width is None else self.width
        shared = dense if self.shared_width is None else self.shared_width
        moe = MoE(self.num_experts, self.top_k, width, shared, norm_topk_prob=self.norm_topk_prob)
        recipe = upcycling.Recipe(moe, self.reinit, self.seed)
        made = upcycling.upcycle(self.src, self.dst, recipe, self.to, self.dtype, progress=True)
        params = made.config.num_params()
        print(
            f"{self.dst}: {params['total'] / 1e9:.2f}B parameters, {params['active'] / 1e9:.2f}B active; it "
            + ("computes what the dense model does" if made.preserves else "does not compute what the dense model does")
            + (", up to the rounding of scaled weights" if made.preserves and made.rounds else "")
        )
        if width % 128:
            print(
                f"experts are {width} wide: the fast kernels want a multiple of 128 on TPUs"
                + (" and of 64 on GPUs" if width % 64 else "")
                + ", so training will be slow there; --width chooses another"
            )
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints of any format by their logits; exit 0 pass, 1 fail, 2 could not compare.

    Args:
        a: Checkpoint folder or Hub id; the yardstick.
        b: The other checkpoint.
        against: Instead of B, run A in transformers as the yardstick.
        json: Print one JSON object.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    against: Literal["transformers"] | None = None
    json: bool = False

    def run(self) -> int:
        verify = sibling("convert.verify")
        try:
            report = verify.verify(self.a, self.b, against=self.against)
        except Exception as error:
            # Whatever it was, nothing was compared; status 1 would say that the weights differ.
            problem = explain(error) or str(error)
            if self.json:
                print(json.dumps({"passed": None, "error": problem}))
            complain(problem)
            return 2
        print(report.to_json() if self.json else report)
        return int(report.exit_code)
