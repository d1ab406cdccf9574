"""The attention block: projections, RoPE, cache, and one call to a kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import sequence as context
from qwen_jax.attention.rope import rotate
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import on_mesh
from qwen_jax.linear import Projection, product
from qwen_jax.parallel.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of every layer.

    Attributes:
      keys, values: one [B, K, S, d] buffer for each layer. Separate buffers, not one stacked array: a device loop
        updates them in place.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        """Length S of the buffers."""
        return self.keys[0].shape[2]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("slot", "shift_B"), meta_fields=("fresh",))
@dataclasses.dataclass(frozen=True)
class CacheWrite:
    """Where new keys and values go, and what the queries look at.

    Attributes:
      slot: int32 scalar, the cache slot of the first new token, the same for every row.
      shift_B: int32 [B] or None. Row b's new tokens are first rolled right by shift_B[b] slots, so that right-padded
        prompts of unequal length all end at the same slot.
      fresh: the cache is empty: queries look at the new keys (and the mask counts those); otherwise they look at the
        whole cache (and the mask counts cache slots).
    """

    slot: jax.Array
    shift_B: jax.Array | None = None
    fresh: bool = False


class Attention(nnx.Module):
    """Grouped-query attention with bias on q, k and v, and RoPE.

    In the training layout the three projections are separate; in the inference layout (`fused`) they are one matrix
    for each tensor shard, [shards, heads of q, k, v, head_dim, hidden_size].
    """

    def __init__(
        self,
        config: ModelConfig,
        sharding: Sharding,
        rngs: nnx.Rngs,
        fused: bool = False,
        attention_impl: kernels.Implementation = "auto",
    ):
        self.config, self.sharding, self.fused, self.impl = config, sharding, fused, attention_impl
        H, K, d, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        normal = nnx.initializers.normal(config.initializer_range)
        # Residual branches start smaller, so that the stream's variance does not grow with depth (GPT-2, section 2.3).
        residual = nnx.initializers.normal(config.initializer_range / (2 * config.num_layers) ** 0.5)
        if fused:
            shape = (sharding.tensor, (H + 2 * sharding.kv_heads) // sharding.tensor, d)
            self.qkv = Projection(jnp.zeros((*shape, D)), jnp.zeros(shape))
        else:
            self.q = Projection(normal(rngs.params(), (H, d, D)), jnp.zeros((H, d)))
            self.k = Projection(normal(rngs.params(), (K, d, D)), jnp.zeros((K, d)))
            self.v = Projection(normal(rngs.params(), (K, d, D)), jnp.zeros((K, d)))
        self.o = Projection(residual(rngs.params(), (D, H, d)))

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: kernels.Mask,
        cache: tuple[jax.Array, jax.Array] | None = None,
        write: CacheWrite | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns the block's output [B, T, D] and the cache with the new tokens in it.

        Args:
          x_BTD: normalised input.
          rope: tables of `rope_tables`.
          mask: intervals over the new keys, or over cache slots when attending to a cache.
          cache: this layer's keys and values [B, K, S, d], or None.
          write: where the new ones go; needed with a cache.
        """
        spec, n, scale = self.sharding, self.sharding.tensor, self.config.head_dim**-0.5
        heads = self.config.num_heads // n, spec.kv_heads // n
        takes = functools.partial(kernels.supports_decode_step, self.impl, x_BTD.dtype, x_BTD.shape[1], *heads)
        if cache is not None and write is not None and self.fused and not write.fresh and takes(cache[0]):
            with jax.named_scope("qkv"):
                qkv, bias = self._project_fused(x_BTD), self.qkv.bias[...].astype(x_BTD.dtype)
            with jax.named_scope("attend"):
                start_B1, slot = mask.k_start_BT, write.slot
                out, cache = on_mesh.attend_step(qkv, bias, rope, start_B1, cache, slot, scale=scale, sharding=spec)
        else:
            q, k, v = self.queries_keys_values(x_BTD, rope)
            out, cache = self.attend(q, k, v, mask, cache, write)
        return self.output(out), cache

    def queries_keys_values(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Projections of the normalised input, q and k rotated: [B, T, H, d], and [B, T, K, d] twice."""
        with jax.named_scope("qkv"):
            q, k, v = self._project(x_BTD)
            return rotate(q, rope), rotate(k, rope), v

    def output(self, heads_BTHd: jax.Array) -> jax.Array:
        """The output projection, [B, T, D]."""
        spec = self.sharding
        with jax.named_scope("o"):
            return product("BTHd,DHd->BTD", heads_BTHd, self.o.weight[...], spec.heads, spec.o, spec.hidden)

    def _project_fused(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, shards, heads of q, k, v, head_dim], before the bias."""
        spec = self.sharding
        w_nRdD, out_spec = self.qkv.weight[...], P(*spec.heads, None)
        return product("BTD,nRdD->BTnRd", x_BTD, w_nRdD, spec.hidden, spec.fused_qkv, out_spec)

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        spec, dtype = self.sharding, x_BTD.dtype
        if self.fused:
            n, rows = spec.tensor, self.config.num_heads // spec.tensor
            qkv = self._project_fused(x_BTD) + self.qkv.bias[...].astype(dtype)
            q, k, v = jnp.split(qkv, [rows, rows + spec.kv_heads // n], axis=3)
            q, k, v = (y.reshape(*y.shape[:2], -1, y.shape[-1], out_sharding=spec.heads) for y in (q, k, v))
            return q, k, v

        def project(p: Projection, w_spec: P, heads: P) -> jax.Array:
            y = product("BTD,HdD->BTHd", x_BTD, p.weight[...], spec.hidden, w_spec, heads)
            return y + p.bias[...].astype(dtype)

        q = project(self.q, spec.q, spec.heads)
        repeat = spec.kv_heads // self.config.num_kv_heads
        if repeat == 1:
            return q, project(self.k, spec.kv, spec.heads), project(self.v, spec.kv, spec.heads)
        k, v = (
            jax.reshard(jnp.repeat(project(p, spec.kv, spec.all_kv_heads), repeat, axis=2), spec.heads)
            for p in (self.k, self.v)
        )
        return q, k, v

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: kernels.Mask,
        cache: tuple[jax.Array, jax.Array] | None = None,
        write: CacheWrite | None = None,
        recompute: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Cache update and kernel, on each shard's own rows and heads; `recompute`: see `kernels.attention`."""
        spec, scale = self.sharding, self.config.head_dim**-0.5
        how: Any = {"scale": scale, "implementation": self.impl}

        def local(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            mask: kernels.Mask,
            cache: tuple[jax.Array, jax.Array] | None,
            write: CacheWrite | None,
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
            if cache is None or write is None:
                return context.attention(q, k, v, mask, spec.context, ring=spec.ring, recompute=recompute, **how), None
            cache = _store(cache[0], k, write), _store(cache[1], v, write)
            if write.fresh:
                return kernels.attention(q, k, v, mask, **how), cache
            return kernels.decode_attention(q, *cache, mask, **how)[0], cache

        mask_spec = jax.tree.map(lambda _: spec.tokens, mask)
        cache_spec = None if cache is None else (spec.cache, spec.cache)
        write_spec = jax.tree.map(lambda leaf: spec.rows if leaf.ndim else P(), write)
        cached = write is not None and not write.fresh
        chosen = kernels.select_attention(self.impl, q, mask, return_lse=cached, cache=cached)
        run = jax.shard_map(
            local,
            in_specs=(spec.heads, spec.heads, spec.heads, mask_spec, cache_spec, write_spec),
            out_specs=(spec.heads, cache_spec),
            check_vma=not (kernels.is_pallas(chosen) or spec.ring),
        )
        with jax.named_scope("attend"):
            return run(q, k, v, mask, cache, write)


def _store(cache_BKSd: jax.Array, new_BTKd: jax.Array, write: CacheWrite) -> jax.Array:
    """Puts the new tokens of every row into the cache, from `write.slot` on."""
    if write.shift_B is not None:
        new_BTKd = jax.vmap(functools.partial(jnp.roll, axis=0))(new_BTKd, write.shift_B)
    new_BKTd = new_BTKd.swapaxes(1, 2).astype(cache_BKSd.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache_BKSd, new_BKTd, write.slot, axis=2)
