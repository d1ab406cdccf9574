"""The Qwen2.5 decoder: embedding, a scan over blocks, a norm; logits are a separate call.

Modules are made of existing parameters by `qwen_jax.params.bind`, for one forward pass.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention.block import Attention, CacheWrite, KVCache
from qwen_jax.attention.rope import rope_tables
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import on_mesh
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.linear import Projection, RMSNorm, product
from qwen_jax.moe.block import MoE
from qwen_jax.moe.router import Routing
from qwen_jax.options import Options
from qwen_jax.parallel.collectives import look_up
from qwen_jax.parallel.sharding import Sharding, gathered
from qwen_jax.remat import Remat, recompute
from qwen_jax.stack import index_of


class MLP(nnx.Module):
    """SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202). `fused`: gate and up are one matrix a shard."""

    def __init__(
        self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, fused: bool = False, width: int | None = None
    ):
        self.sharding, self.fused = sharding, fused
        D, F, n = config.hidden_size, width or config.intermediate_size, sharding.tensor
        normal = nnx.initializers.normal(config.initializer_range)
        residual = nnx.initializers.normal(config.initializer_range / (2 * config.num_layers) ** 0.5)
        if fused:
            self.gate_up = Projection(jnp.zeros((n, 2, F // n, D)))
        else:
            self.gate = Projection(normal(rngs.params(), (F, D)))
            self.up = Projection(normal(rngs.params(), (F, D)))
        self.down = Projection(residual(rngs.params(), (D, F)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if not self.fused:
            return self.down_swiglu(*self.gate_and_up(x_BTD))
        spec = self.sharding
        gate_up, (_, _, f, D) = self.gate_up.weight[...], self.gate_up.weight.shape
        if on_mesh.takes(x_BTD, spec.batch_shards, 2 * f, D):
            return self._down(on_mesh.swiglu(x_BTD, gate_up, spec))
        both_spec = P(*spec.feed_forward, None, None)
        both = product("BTD,nxfD->BTnxf", x_BTD, gate_up, spec.hidden, spec.fused_gate_up, both_spec)
        h = jax.nn.silu(both[:, :, :, 0]) * both[:, :, :, 1]
        return self._down(h.reshape(*x_BTD.shape[:2], -1, out_sharding=spec.feed_forward))

    def gate_and_up(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two products before the nonlinearity, [B, T, F] each."""
        spec = self.sharding
        weights = self.gate.weight[...], self.up.weight[...]
        gate, up = (product("BTD,FD->BTF", x_BTD, w, spec.hidden, spec.gate_up, spec.feed_forward) for w in weights)
        return gate, up

    def down_swiglu(self, gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
        """All that follows them."""
        return self._down(jax.nn.silu(gate_BTF) * up_BTF)

    def _down(self, h_BTF: jax.Array) -> jax.Array:
        spec = self.sharding
        return product("BTF,DF->BTD", h_BTF, self.down.weight[...], spec.feed_forward, spec.down, spec.hidden)


class Block(nnx.Module):
    """One transformer layer: pre-norm attention and pre-norm feed-forward, each added to the stream.

    `kinds`: what its feed-forward part is: "mlp", or "moe" with experts; both only to lay out parameters.
    """

    def __init__(
        self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options, kinds: Collection[str]
    ):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, sharding, rngs, options.fused, options.attention)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if "mlp" in kinds:
            self.mlp = MLP(config, sharding, rngs, options.fused)
        if "moe" in kinds and config.moe is not None:
            shared = MLP(config, sharding, rngs, options.fused, config.moe.shared_intermediate_size)
            self.moe = MoE(config, sharding, rngs, options, shared)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: kernels.Mask,
        cache: tuple[jax.Array, jax.Array] | None = None,
        write: CacheWrite | None = None,
        valid_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, Routing | None]:
        with jax.named_scope("attention"):
            out, cache = self.attention(self.input_norm(x_BTD), rope, mask, cache, write)
            x_BTD = x_BTD + out
        if not hasattr(self, "moe"):
            with jax.named_scope("mlp"):
                return x_BTD + self.mlp(self.post_attention_norm(x_BTD)), cache, None
        with jax.named_scope("moe"):
            h_BTD = self.post_attention_norm(x_BTD)
            out, routing = self.moe(x_BTD, h_BTD, self.post_attention_norm.weight[...], valid_BT)
            return x_BTD + out, cache, routing

    def keeping_dots(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], mask: kernels.Mask, valid_BT: jax.Array | None
    ) -> tuple[jax.Array, Routing | None]:
        """The same without a cache; the backward pass keeps the results of products and of attention, and no more."""

        def again(f: Callable[..., Any], modules: tuple[nnx.Module, ...], *inputs: Any, constants: Any = ()) -> Any:
            graphdef, params = nnx.split(modules)
            call = lambda params, *args: f(*nnx.merge(graphdef, params), *args)  # noqa: E731
            return recompute(call, params, *inputs, constants=constants)

        with jax.named_scope("attention"):
            q, k, v = again(
                lambda norm, attention, x, *rope: attention.queries_keys_values(norm(x), rope),
                *((self.input_norm, self.attention), x_BTD),
                constants=rope,
            )
            out = self.attention.attend(q, k, v, mask, recompute=True)[0]
            x_BTD = again(lambda attention, x, out: x + attention.output(out), (self.attention,), x_BTD, out)
        norm = self.post_attention_norm
        if not hasattr(self, "moe"):
            with jax.named_scope("mlp"):
                gate, up = again(lambda norm, mlp, x: mlp.gate_and_up(norm(x)), (norm, self.mlp), x_BTD)
                return again(lambda mlp, x, *h: x + mlp.down_swiglu(*h), (self.mlp,), x_BTD, gate, up), None
        with jax.named_scope("moe"):
            gate, up = again(lambda norm, mlp, x: mlp.gate_and_up(norm(x)), (norm, self.moe.shared), x_BTD)
            shared = again(lambda mlp, *h: mlp.down_swiglu(*h), (self.moe.shared,), gate, up)
            gated = again(lambda norm, moe, x, y: moe.gated(norm(x), y), (norm, self.moe), x_BTD, shared)
            out, routing = self.moe.routed(x_BTD, norm.weight[...], valid_BT, gated, keep_dots=True)
            return x_BTD + out, routing


class Qwen2(nnx.Module):
    """The decoder. Make one with `bind`; it holds parameters and no state."""

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options):
        self.config, self.sharding, self.options = config, sharding, options
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed = Projection(normal(rngs.params(), (config.vocab_size, config.hidden_size)))

        sparse = config.sparse_layers
        kind = ["moe" if i in sparse else "mlp" for i in range(config.num_layers)]

        def block(key: jax.Array, kinds: Collection[str]) -> Block:
            return Block(config, sharding, nnx.Rngs(params=key), options, kinds)

        keys = jax.random.split(rngs.params(), config.num_layers)
        if options.stacked:
            graphdef = nnx.split(nnx.eval_shape(lambda: block(jax.random.key(0), kind)))[0]
            draw = lambda kinds, keys: jax.vmap(lambda key: nnx.split(block(key, kinds))[1])(keys)  # noqa: E731
            # What a layer may lack is drawn for those that have it.
            where = {name: np.array([i for i, of in enumerate(kind) if of == name]) for name in set(kind)}
            parts = {name: draw({name}, keys[layers])[name] for name, layers in where.items()}
            state = nnx.State({**draw((), keys), **parts})
            self.layers = nnx.merge(graphdef, state)
        else:
            self.layers = nnx.List([block(key, {of}) for key, of in zip(keys, kind, strict=True)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(normal(rngs.params(), (config.vocab_size, config.hidden_size)))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask: kernels.Mask,
        *,
        cache: KVCache | None = None,
        write: CacheWrite | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, KVCache | None]:
        """`run` without the routing."""
        return self.run(tokens_BT, positions_BT, mask, cache=cache, write=write, remat=remat)[:2]

    def run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask: kernels.Mask,
        *,
        cache: KVCache | None = None,
        write: CacheWrite | None = None,
        remat: Remat = "none",
        valid_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """Runs the blocks.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 positions within each document.
          mask: which keys each row sees; see `CacheWrite` for what it counts when there is a cache.
          cache, write: for cached decoding; needs unstacked layers.
          remat: what the backward pass recomputes: "none", "full" (everything but block inputs) or "dots" (everything
            but the results of matrix products and of attention).
          valid_BT: bool, which tokens are not padding: experts leave the others alone, and routing is counted.

        Returns:
          The normalised hidden state [B, T, D] in the compute dtype; the cache with the new tokens in it; with
          `valid_BT`, the routing of every layer that has experts, with an axis of these layers in front.
        """
        spec, dtype = self.sharding, jnp.dtype(self.options.dtype)
        tokens_BT, positions_BT, mask, valid_BT = jax.tree.map(
            lambda x: jax.reshard(x, spec.tokens), (tokens_BT, positions_BT, mask, valid_BT)
        )
        with jax.named_scope("embed"):
            x_BTD = look_up(self.embed.weight[...], tokens_BT, dtype, spec)
        rope = rope_tables(self.config, positions_BT, dtype)
        routing: list[Routing] = []
        if cache is not None:
            x_BTD, cache = self._with_cache(x_BTD, rope, mask, cache, write)
        else:

            def layer(graphdef: Any, x_BTD: jax.Array, params: Any) -> tuple[jax.Array, Routing | None]:
                block: Block = nnx.merge(graphdef, params)
                if remat == "dots":
                    return block.keeping_dots(x_BTD, rope, mask, valid_BT)
                return block(x_BTD, rope, mask, valid_BT=valid_BT)[::2]

            if isinstance(self.layers, nnx.List):
                for i, block in enumerate(self.layers):
                    graphdef, params = nnx.split(block)
                    one = functools.partial(layer, graphdef)
                    # Not by jax.checkpoint, which outside a loop would fence the weights too: a copy of each.
                    with jax.named_scope(f"layer{i}"):
                        again = functools.partial(recompute, lambda params, x, one=one: one(x, params))
                        x_BTD, of = again(params, x_BTD) if remat == "full" else one(x_BTD, params)
                    routing += [jax.tree.map(lambda x: x[None], of)] if of is not None else []
            else:
                for graphdef, stacked in self._runs():
                    one = functools.partial(layer, graphdef)
                    body = jax.checkpoint(one) if remat == "full" else one
                    x_BTD, of = jax.lax.scan(body, x_BTD, stacked)
                    routing += [of] if of is not None else []
        with jax.named_scope("norm"):
            every = jax.tree.map(lambda *x: jnp.concatenate(x), *routing) if routing else None
            return self.norm(x_BTD), cache, every

    def _runs(self) -> list[tuple[Any, Any]]:
        """Layers of one kind that follow one another, as graph definition and stacked parameters."""
        graphdef, stacked = nnx.split(self.layers)
        sparse, count = self.config.sparse_layers, self.config.num_layers
        kinds = ["moe" if i in sparse else "mlp" for i in range(count)]
        if len(set(kinds)) == 1:
            return [(graphdef, stacked)]
        runs = []
        first = 0
        while first < count:
            kind = kinds[first]
            last = next((i for i in range(first, count) if kinds[i] != kind), count)
            block = nnx.eval_shape(
                lambda kind=kind: Block(self.config, self.sharding, nnx.Rngs(0), self.options, {kind})
            )
            parts = {}
            for name, part in stacked.items():
                at = index_of(name, first, sparse)
                if at is not None:
                    end = at + last - first
                    parts[name] = jax.tree.map(lambda w, at=at, end=end: w[at:end], part)
            runs.append((nnx.split(block)[0], nnx.State(parts)))
            first = last
        return runs

    def _with_cache(
        self, x_BTD: jax.Array, rope: Any, mask: kernels.Mask, cache: KVCache, write: CacheWrite | None
    ) -> tuple[jax.Array, KVCache]:
        if not isinstance(self.layers, nnx.List):
            raise ValueError("A cache needs unstacked layers: bind with Options(stacked=False).")
        new = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                x_BTD, kv, _ = layer(x_BTD, rope, mask, (cache.keys[i], cache.values[i]), write)
            new.append(kv)
        return x_BTD, KVCache(tuple(kv[0] for kv in new), tuple(kv[1] for kv in new))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states. V counts the padding rows of the embedding."""
        with jax.named_scope("logits"):
            head = self.embed if self.config.tie_word_embeddings else self.lm_head
            w_VD = jax.reshard(head.weight[...].astype(x_BTD.dtype), gathered(self.sharding.vocab))
            return einsum_f32("BTD,VD->BTV", x_BTD, w_VD, self.sharding.logits)
