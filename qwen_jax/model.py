"""The Qwen2.5 decoder: embedding, blocks, norm, and logits, or the scores of a reward model.

`qwen_jax.params.bind` makes a model of existing parameters, for one forward pass.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention.block import Attention
from qwen_jax.attention.cache import Cache, ContiguousLayer, LayerCache
from qwen_jax.attention.dual_chunk import rope_and_masks
from qwen_jax.attention.rope import Rope
from qwen_jax.attention.sparse import Diagnostics
from qwen_jax.attention.sparse_block import SparseChunk, attend_sparsely
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.matmul import few_rows
from qwen_jax.linear import Embedding, Linear, RMSNorm, add_adapters, add_lora, initializers, set_products
from qwen_jax.moe.block import MoE
from qwen_jax.moe.router import RouterStats
from qwen_jax.options import Options
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding, padded_width
from qwen_jax.quantized import quantize_projections
from qwen_jax.remat import Remat, recompute_piece, run_piece
from qwen_jax.score import make_score_head
from qwen_jax.stack import layer_kinds, run_layers, stacked_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
      hidden: normalised hidden state [B, T, D] in the compute dtype; `Qwen2.logits` or `Qwen2.scores` takes it.
      cache: the cache with the new tokens in it, if there was one.
      routing: statistics of every layer with experts, with a leading axis over these layers, if they were asked for.
    """

    hidden: jax.Array
    cache: Any = None
    routing: RouterStats | None = None


class LayerOutput(NamedTuple):
    """The residual stream after a layer, the layer's cache, statistics of its router, and what attention left out."""

    x_BTD: jax.Array
    cache: LayerCache | None = None
    routing: RouterStats | None = None
    skipped: Diagnostics | None = None


class MLP(nnx.Module):
    """SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

    In the inference layout (`Options.fused`) gate and up are one matrix for each tensor shard.
    """

    def __init__(
        self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options, width: int, path: str = "mlp"
    ):
        s, D, n = sharding, config.hidden_size, sharding.tensor
        self.sharding, self.fused = sharding, options.fused
        normal, residual = initializers(config)
        if self.fused:
            width = padded_width(width, n, config.quantization is not None)
            weight, out = jnp.zeros((n, 2, width // n, D)), P(*s.feed_forward, None, None)
            self.gate_up = Linear("BTD,nxfD->BTnxf", weight, x=s.hidden, w=s.fused_gate_up, out=out)
        else:
            self.gate, self.up = (
                Linear("BTD,FD->BTF", normal(rngs.params(), (width, D)), x=s.hidden, w=s.gate_up, out=s.feed_forward)
                for _ in range(2)
            )
        self.down = Linear("BTF,DF->BTD", residual(rngs.params(), (D, width)), x=s.feed_forward, w=s.down, out=s.hidden)
        quantize_projections(self, path, config.quantization, s, trained=options.lora is not None)
        set_products(self, options.products)
        add_lora(self, options.lora, rngs, options.lora_dropout)
        add_adapters(self, options.adapter_ranks)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_swiglu(*self.gate_and_up(x_BTD))

    def gate_and_up(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        """Gate and up, [B, T, F] each; or their SwiGLU alone, where one kernel computes it."""
        if not self.fused:
            return self.gate(x_BTD), self.up(x_BTD)
        s, (_, _, f, D) = self.sharding, self.gate_up.weight.shape
        rows, plain = x_BTD.shape[0] // s.batch_shards, type(self.gate_up) is Linear and not self.gate_up.lora_scale
        if plain and few_rows.supports(rows, x_BTD.shape[1], x_BTD.dtype, 2 * f, D):

            @jax.shard_map(in_specs=(s.hidden, s.fused_gate_up), out_specs=s.feed_forward, check_vma=False)
            def swiglu(x: jax.Array, w: jax.Array) -> jax.Array:
                return few_rows.swiglu(x, all_gather_weight(w, 3)[0])

            return (swiglu(x_BTD, self.gate_up.weight[...].astype(x_BTD.dtype)),)
        both_BTnxf = self.gate_up(x_BTD)
        return both_BTnxf[:, :, :, 0], both_BTnxf[:, :, :, 1]

    def down_swiglu(self, *gate_up: jax.Array) -> jax.Array:
        """The rest: [B, T, D] from what `gate_and_up` gives."""
        h = gate_up[0] if len(gate_up) == 1 else jax.nn.silu(gate_up[0]) * gate_up[1]
        if h.ndim == 4:  # [B, T, n, f] of the inference layout.
            h = h.reshape(*h.shape[:2], -1, out_sharding=self.sharding.feed_forward)
        return self.down(h)


class Block(nnx.Module):
    """One transformer layer: pre-norm attention and a pre-norm feed-forward part, each added to the residual stream.

    `kinds`: of the feed-forward part, "mlp" or "moe"; both only to describe the parameters of a stack.
    """

    def __init__(
        self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options, kinds: tuple[str, ...]
    ):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, sharding.norm)
        self.attention = Attention(config, sharding, rngs, options)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, sharding.norm)
        if "mlp" in kinds:
            self.mlp = MLP(config, sharding, rngs, options, config.intermediate_size)
        if "moe" in kinds and config.moe is not None:
            shared = MLP(config, sharding, rngs, options, config.moe.shared_intermediate_size, "moe.shared")
            self.moe = MoE(config, sharding, rngs, options, shared)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        masks: tuple[kernels.Mask, ...],
        cache: LayerCache | None = None,
        *,
        remat: Remat = "none",
        valid_BT: jax.Array | None = None,
        sparse: SparseChunk | None = None,
    ) -> LayerOutput:
        """Runs the layer.

        Args:
          x_BTD: the residual stream.
          rope, masks: the rotations, and the masks of the parts of the keys; see `rope_and_masks`.
          cache, valid_BT: as for `Qwen2.__call__`; the cache is that of this layer.
          remat: "dots" runs the layer in pieces, each one product with the elementwise work around it.
          sparse: the tokens are a chunk that is read by sparse attention, with the budgets of this layer; needs a
            contiguous cache.
        """
        dots = remat == "dots"
        run = recompute_piece if dots else run_piece

        def prenorm(norm: RMSNorm, x_BTD: jax.Array) -> tuple[Any, jax.Array]:
            # A piece that is recomputed begins with the norm; otherwise the norm is computed once for all pieces.
            return (norm, x_BTD) if dots else (lambda h: h, norm(x_BTD))

        # Attention.
        with jax.named_scope("attention"):
            norm, h_BTD = prenorm(self.input_norm, x_BTD)
            skipped: Diagnostics | None = None
            if cache is not None and sparse is not None:
                if not isinstance(cache, ContiguousLayer):
                    raise ValueError("Sparse attention reads a contiguous cache, no pages.")
                projected = self.attention.queries_keys_values(h_BTD, rope)
                attention = self.attention.config, self.attention.sharding, self.attention.options.attention
                out, cache, skipped = attend_sparsely(*attention, *projected, masks, cache, sparse)
            elif cache is not None:
                out, cache = self.attention.attend_cached(h_BTD, rope, masks, cache)
            else:
                queries, k, v = run(
                    lambda norm, attention, h, rope: attention.queries_keys_values(norm(h), rope),
                    (norm, self.attention),
                    h_BTD,
                    constants=(rope,),
                )
                out, _ = self.attention.attend(queries, k, v, masks, recompute=dots)
            x_BTD = run(lambda attention, x, out: x + attention.output(out), (self.attention,), x_BTD, out)

        # Feed-forward part: one MLP, or experts beside a shared MLP.
        experts = hasattr(self, "moe")
        with jax.named_scope("moe" if experts else "mlp"):
            mlp = self.moe.shared if experts else self.mlp
            norm, h_BTD = prenorm(self.post_attention_norm, x_BTD)
            gate_up = run(lambda norm, mlp, h: mlp.gate_and_up(norm(h)), (norm, mlp), h_BTD)
            if not experts:
                x_BTD = run(lambda mlp, x, *h: x + mlp.down_swiglu(*h), (mlp,), x_BTD, *gate_up)
                return LayerOutput(x_BTD, cache, skipped=skipped)
            shared = run(lambda mlp, *h: mlp.down_swiglu(*h), (mlp,), *gate_up)
            shared = run(lambda norm, moe, h, y: moe.apply_shared_gate(norm(h), y), (norm, self.moe), h_BTD, shared)
            norm_D = self.post_attention_norm.weight[...]
            out, routing = self.moe.routed(x_BTD, norm_D, valid_BT, shared, keep_dots=dots)
            return LayerOutput(x_BTD + out, cache, routing, skipped)


def _run_block(
    kind: "nnx.GraphDef[Block]",
    params: nnx.State,
    x_BTD: jax.Array,
    rope: Rope,
    masks: tuple[kernels.Mask, ...],
    cache: LayerCache,
) -> LayerOutput:
    return nnx.merge(kind, params)(x_BTD, rope, masks, cache)


class Qwen2(nnx.Module):
    """The decoder. Make one with `bind`; it holds parameters and no state."""

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options):
        self.config, self.sharding, self.options = config, sharding, options
        normal, _ = initializers(config)
        table = config.vocab_size, config.hidden_size
        self.embed = Embedding(normal(rngs.params(), table), sharding)
        keys_L, kinds = jax.random.split(rngs.params(), config.num_layers), layer_kinds(config)
        if options.stacked:
            self.layers = stacked_layers(self._block, keys_L, kinds)
        else:
            keys_and_kinds = zip(keys_L, kinds, strict=True)
            self.layers = nnx.List([self._block(key, (kind,), i) for i, (key, kind) in enumerate(keys_and_kinds)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, sharding.norm)
        if config.has_lm_head:
            self.lm_head = Embedding(normal(rngs.params(), table), sharding)
        if config.score is not None:
            self.score = make_score_head(config.score, config.hidden_size, sharding, rngs.params())

    def _block(self, key: jax.Array, kinds: tuple[str, ...], layer: int | None = None) -> Block:
        """A layer, by its number; without one, a layer of a stack."""
        config = self.config
        if config.quantization is not None:
            quantization = config.quantization.of_layer(layer, config.num_layers)
            config = dataclasses.replace(config, quantization=quantization)
        return Block(config, self.sharding, nnx.Rngs(params=key), self.options, kinds)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask: kernels.Mask | tuple[kernels.Mask, ...],
        *,
        cache: Cache[Any] | None = None,
        remat: Remat = "none",
        valid_BT: jax.Array | None = None,
        length_BT: jax.Array | None = None,
    ) -> Output:
        """Runs the model up to the last norm.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 positions within each document.
          mask: the keys that each row sees; with a cache, as the cache counts them. Several masks are disjoint parts of
            the keys, whose results are merged; see `rope_and_masks`.
          cache: for generation; needs unstacked layers.
          remat: what the backward pass recomputes: "none"; "full", everything but the inputs of blocks; or "dots",
            everything but the results of matrix products and of attention.
          valid_BT: bool, True where a token is not padding. If given, experts skip padding, and routing statistics
            are returned.
          length_BT: int32 [B, T] or [B, 1], the length of each token's text when it is complete, for the length factor
            of dual-chunk attention. By default the text ends with these tokens; a row of several documents counts as
            its longest.
        """
        longest = positions_BT.shape[1] if cache is None else cache.slots
        x_BTD, rope, masks = self.begin(tokens_BT, positions_BT, mask, longest, length_BT)
        valid_BT = None if valid_BT is None else jax.reshard(valid_BT, self.sharding.tokens)

        # Layers.
        routing: RouterStats | None = None
        if cache is not None:
            x_BTD, cache = self._run_cached(x_BTD, rope, masks, cache)
        else:

            def layer(block: Block, x_BTD: jax.Array) -> tuple[jax.Array, RouterStats | None]:
                output = block(x_BTD, rope, masks, remat=remat, valid_BT=valid_BT)
                return output.x_BTD, output.routing

            x_BTD, routing = run_layers(self.layers, layer, x_BTD, self._block, self.config, remat)

        # Norm.
        with jax.named_scope("norm"):
            return Output(self.norm(x_BTD), cache, routing)

    def begin(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask: kernels.Mask | tuple[kernels.Mask, ...],
        longest: int,
        length_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Rope, tuple[kernels.Mask, ...]]:
        """What the first layer takes: the residual stream, the rotations, and the masks of the parts of the keys.

        Args:
          tokens_BT, positions_BT, mask, length_BT: as for a call.
          longest: tokens that a text may have.
        """
        # Inputs in the sharding of the model.
        dtype = jnp.dtype(self.options.dtype)
        tokens_BT, positions_BT, mask = jax.tree.map(
            lambda x: jax.reshard(x, self.sharding.tokens), (tokens_BT, positions_BT, mask)
        )
        # Embedding and rotary tables.
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT, dtype)
        return x_BTD, *rope_and_masks(self.config, positions_BT, mask, longest, length_BT, dtype)

    def _run_cached(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        masks: tuple[kernels.Mask, ...],
        cache: Cache[Any],
    ) -> tuple[jax.Array, Cache[Any]]:
        if not isinstance(self.layers, nnx.List):
            raise ValueError("A cache needs unstacked layers: bind with Options(stacked=False).")
        outputs: list[LayerOutput] = []
        # Layers of one kind are traced and lowered once: a function that is jitted here is called by each of them, and
        # the compiler inlines the calls. An engine has dozens of such programs, and this is most of their start.
        kinds: list[tuple[Any, Any]] = []
        for block, layer in zip(self.layers, cache.layers, strict=True):
            kind, params = nnx.split(block)
            run = next((known for other, known in kinds if other == kind), None)
            if run is None:
                run = jax.jit(functools.partial(_run_block, kind))
                kinds.append((kind, run))
            outputs.append(run(params, x_BTD, rope, masks, layer))
            x_BTD = outputs[-1].x_BTD
        return x_BTD, cache.with_layers([output.cache for output in outputs])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states. V counts the padding rows of the embedding."""
        with jax.named_scope("logits"):
            return (self.embed if self.config.tie_word_embeddings else self.lm_head).logits(x_BTD)

    def scores(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 scores [B, T] of a reward model, at every position of hidden states."""
        with jax.named_scope("score"):
            return self.score(x_BTD)
