"""The attention block: projections, RoPE, and one call to a kernel, with or without a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import sequence
from qwen_jax.attention.cache import LayerCache
from qwen_jax.attention.dual_chunk import over_parts
from qwen_jax.attention.rope import Rope, Table, rotate, rotate_queries
from qwen_jax.config import ModelConfig
from qwen_jax.linear import Linear, add_adapters, add_lora, initializers, set_products
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.quantized import quantize_projections


class Attention(nnx.Module):
    """Grouped-query attention with bias on q, k and v, and RoPE.

    In the training layout the three projections are separate. In the inference layout (`Options.fused`) they are one
    matrix for each tensor shard, [shards, heads of q, k and v, head_dim, hidden_size].
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options):
        self.config, self.sharding, self.options = config, sharding, options
        H, K, d, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        s, (normal, residual) = sharding, initializers(config)
        if options.fused:
            shape = s.tensor, (H + 2 * s.kv_heads) // s.tensor, d
            weight, bias, out = jnp.zeros((*shape, D)), jnp.zeros(shape), P(*s.heads, None)
            self.qkv = Linear(
                "BTD,nRdD->BTnRd", weight, x=s.hidden, w=s.fused_qkv, out=out, bias=bias, bias_spec=s.fused_qkv_bias
            )
        else:

            def projection(heads: int, w: P, bias: P, out: P) -> Linear:
                weight, zeros = normal(rngs.params(), (heads, d, D)), jnp.zeros((heads, d))
                return Linear("BTD,HdD->BTHd", weight, x=s.hidden, w=w, out=out, bias=zeros, bias_spec=bias)

            # With more tensor shards than key/value heads every shard computes all of them, and takes its own.
            kv_out = s.heads if s.kv_heads == K else s.all_kv_heads
            self.q = projection(H, s.q, s.q_bias, s.heads)
            self.k = projection(K, s.kv, s.kv_bias, kv_out)
            self.v = projection(K, s.kv, s.kv_bias, kv_out)
        self.o = Linear("BTHd,DHd->BTD", residual(rngs.params(), (D, H, d)), x=s.heads, w=s.o, out=s.hidden)
        quantize_projections(self, "attention", config.quantization, s, trained=options.lora is not None)
        set_products(self, options.products)
        add_lora(self, options.lora, rngs, options.lora_dropout)
        add_adapters(self, options.adapter_ranks)

    def queries_keys_values(self, x_BTD: jax.Array, rope: Rope) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Projections of the normalised input, q and k rotated.

        Returns:
          The queries [B, T, H, d] for each part of the keys (one, or the three of `dual_chunk`); keys and values
          [B, T, K, d].
        """
        with jax.named_scope("qkv"):
            q, k, v = self._split(self.qkv(x_BTD)) if self.options.fused else self._project(x_BTD)
            return rotate_queries(q, rope), rotate(k, rope.keys), v

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        repeat = self.sharding.kv_heads // self.config.num_kv_heads
        if repeat > 1:
            k, v = (jax.reshard(jnp.repeat(y, repeat, axis=2), self.sharding.heads) for y in (k, v))
        return q, k, v

    def _split(self, qkv_BTnRd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, spec = self.sharding.tensor, self.sharding.heads
        heads, kv_heads = self.config.num_heads // n, self.sharding.kv_heads // n
        q, k, v = (
            y.reshape(*y.shape[:2], -1, y.shape[-1], out_sharding=spec)
            for y in jnp.split(qkv_BTnRd, [heads, heads + kv_heads], axis=3)
        )
        return q, k, v

    def attend(
        self,
        queries: tuple[jax.Array, ...],
        k: jax.Array,
        v: jax.Array,
        masks: tuple[kernels.Mask, ...],
        cache: LayerCache | None = None,
        recompute: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The heads' outputs [B, T, H, d], and the cache with the new tokens in it.

        Args:
          queries, k, v: of `queries_keys_values`.
          masks: for each part of the keys: intervals over the new keys, or over the slots of a cache that is not fresh.
          cache: of this layer.
          recompute: as for `kernels.attention`.
        """
        spec, options = self.sharding, self.options
        how: dict[str, Any] = {"scale": self.config.head_dim**-0.5, "implementation": options.attention}
        cached, parts = cache is not None and not cache.fresh, len(masks)
        chosen = kernels.select_attention(
            options.attention, queries[0], masks[0], return_lse=cached or parts > 1, cache=cached
        )

        @jax.shard_map(
            in_specs=(spec.heads, spec.heads, spec.heads, spec.tokens, None if cache is None else cache.specs(spec)),
            out_specs=(spec.heads, None if cache is None else cache.specs(spec)),
            check_vma=not (kernels.is_pallas(chosen) or options.ring),
        )
        def local(
            queries: tuple[jax.Array, ...],
            k: jax.Array,
            v: jax.Array,
            masks: tuple[kernels.Mask, ...],
            cache: LayerCache | None,
        ) -> tuple[jax.Array, LayerCache | None]:
            # The functions below attend to one part of the keys. A log-sum-exp is needed only to merge several.
            several: Any = {"return_lse": parts > 1, **how}
            over = functools.partial(over_parts, queries=queries, masks=masks, one_call=kernels.is_pallas(chosen))
            if cache is None:

                def attend(q: jax.Array, mask: kernels.Mask) -> tuple[jax.Array, jax.Array | None]:
                    context: Any = {"ring": options.ring, "recompute": recompute, **several}
                    result = sequence.attention(q, k, v, mask, spec.context, **context)
                    return result if parts > 1 else (result, None)

                return over(attend), None
            cache = cache.write(k, v)
            if not cache.fresh:
                return over(functools.partial(cache.attend, **how)), cache

            # A prompt in an empty cache attends to its own keys, as the cache holds them.
            own = cache.as_read(k, v)

            def attend_prompt(q: jax.Array, mask: kernels.Mask) -> tuple[jax.Array, jax.Array | None]:
                result: Any = kernels.attention(q, *own, mask, **several)
                return result if parts > 1 else (result, None)

            return over(attend_prompt), cache

        with jax.named_scope("attend"):
            return local(queries, k, v, masks, cache)

    def attend_cached(
        self, x_BTD: jax.Array, rope: Rope, masks: tuple[kernels.Mask, ...], cache: LayerCache
    ) -> tuple[jax.Array, LayerCache | None]:
        """Projections and attention of new tokens, with a cache. One kernel may do all that follows the projection."""
        s, n = self.sharding, self.sharding.tensor
        heads = self.config.num_heads // n, s.kv_heads // n
        one_part = self.options.fused and len(masks) == 1
        if not one_part or not cache.supports_step(self.options.attention, x_BTD, *heads):
            return self.attend(*self.queries_keys_values(x_BTD, rope), masks, cache)
        with jax.named_scope("qkv"):
            qkv_BTnRd, bias_nRd = self.qkv.product(x_BTD), self.qkv.bias[...].astype(x_BTD.dtype)

        @jax.shard_map(
            in_specs=(P(*s.heads, None), s.fused_qkv_bias, P(*s.tokens, None, None), s.tokens, cache.specs(s)),
            out_specs=(s.heads, cache.specs(s)),
            check_vma=False,
        )
        def local(
            qkv: jax.Array, bias: jax.Array, rope: Table, start: jax.Array, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache]:
            cos, sin = (table[:, 0, 0] for table in rope)
            scale = self.config.head_dim**-0.5
            out, cache = cache.step(qkv[:, 0, 0], bias[0], (cos, sin), start[:, 0], scale=scale)
            return out[:, None], cache

        with jax.named_scope("attend"):
            return local(qkv_BTnRd, bias_nRd, rope.keys, masks[0].k_start_BT, cache)

    def output(self, heads_BTHd: jax.Array) -> jax.Array:
        """The output projection, [B, T, D]."""
        with jax.named_scope("o"):
            return self.o(heads_BTHd)
