"""The attention block: projections, RoPE, and one call to a kernel, with or without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import sequence
from qwen_jax.attention.cache import LayerCache
from qwen_jax.attention.rope import rotate
from qwen_jax.config import ModelConfig
from qwen_jax.linear import Linear, initializers
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding


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

    def queries_keys_values(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Projections of the normalised input, q and k rotated: [B, T, H, d], and [B, T, K, d] twice."""
        with jax.named_scope("qkv"):
            q, k, v = self._split(self.qkv(x_BTD)) if self.options.fused else self._project(x_BTD)
            return rotate(q, rope), rotate(k, rope), v

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
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: kernels.Mask,
        cache: LayerCache | None = None,
        recompute: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The heads' outputs [B, T, H, d], and the cache with the new tokens in it.

        Args:
          q, k, v: of `queries_keys_values`.
          mask: intervals over the new keys, or over the slots of a cache that is not fresh.
          cache: of this layer.
          recompute: as for `kernels.attention`.
        """
        spec, options = self.sharding, self.options
        how: dict[str, Any] = {"scale": self.config.head_dim**-0.5, "implementation": options.attention}
        cached = cache is not None and not cache.fresh
        chosen = kernels.select_attention(options.attention, q, mask, return_lse=cached, cache=cached)

        @jax.shard_map(
            in_specs=(spec.heads, spec.heads, spec.heads, spec.tokens, None if cache is None else cache.specs(spec)),
            out_specs=(spec.heads, None if cache is None else cache.specs(spec)),
            check_vma=not (kernels.is_pallas(chosen) or options.ring),
        )
        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, mask: kernels.Mask, cache: LayerCache | None
        ) -> tuple[jax.Array, LayerCache | None]:
            if cache is None:
                ring, n = options.ring, spec.context
                return sequence.attention(q, k, v, mask, n, ring=ring, recompute=recompute, **how), None
            cache = cache.write(k, v)
            # A prompt in an empty cache attends to its own keys.
            return kernels.attention(q, k, v, mask, **how) if cache.fresh else cache.attend(q, mask, **how), cache

        with jax.named_scope("attend"):
            return local(q, k, v, mask, cache)

    def attend_cached(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], mask: kernels.Mask, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache | None]:
        """Projections and attention of new tokens, with a cache. One kernel may do all that follows the projection."""
        s, n = self.sharding, self.sharding.tensor
        heads = self.config.num_heads // n, s.kv_heads // n
        if not self.options.fused or not cache.supports_step(self.options.attention, x_BTD, *heads):
            return self.attend(*self.queries_keys_values(x_BTD, rope), mask, cache)
        with jax.named_scope("qkv"):
            qkv_BTnRd, bias_nRd = self.qkv.product(x_BTD), self.qkv.bias[...].astype(x_BTD.dtype)

        @jax.shard_map(
            in_specs=(P(*s.heads, None), s.fused_qkv_bias, P(*s.tokens, None, None), s.tokens, cache.specs(s)),
            out_specs=(s.heads, cache.specs(s)),
            check_vma=False,
        )
        def local(
            qkv: jax.Array, bias: jax.Array, rope: tuple[jax.Array, jax.Array], start: jax.Array, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache]:
            cos, sin = (table[:, 0, 0] for table in rope)
            scale = self.config.head_dim**-0.5
            out, cache = cache.step(qkv[:, 0, 0], bias[0], (cos, sin), start[:, 0], scale=scale)
            return out[:, None], cache

        with jax.named_scope("attend"):
            return local(qkv_BTnRd, bias_nRd, rope, mask.k_start_BT, cache)

    def output(self, heads_BTHd: jax.Array) -> jax.Array:
        """The output projection, [B, T, D]."""
        with jax.named_scope("o"):
            return self.o(heads_BTHd)
