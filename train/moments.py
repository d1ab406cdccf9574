"""Moments of Adam that take fewer bits between steps. In a step they are float32.

`bfloat16`: both moments are rounded to the nearest.

`8bit`, 2 bytes a weight for both: the root of the second moment is kept as a logarithm, the code c for
`clip_norm * 2 ** ((c - 255) / 8)`, 0 for zero. That is 32 octaves in steps of 9%, and clipping keeps the root below its
top. The first moment is kept as its ratio to this root, in float8_e4m3fn: the ratio is at most 1.2 with the default
betas, whatever the scale of the gradient. So there are no scales, and shapes and shardings are those of the weights.

In 8 bits numbers are rounded up or down at random, so that the expectation is right: that of the logarithm, and that of
the ratio. A moment that is rounded to the nearest would never decay, because one step changes it by less than half of
the distance between two codes. Under random gradients the roots that are stored scatter about those of float32 by 11%
with beta2 0.95 and by 15% with 0.999, and updates are 1% smaller. The random numbers depend on the weight's name and
the count of steps, not on the mesh.
"""

import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from train.merging import uniform_like

Moments = Literal["float32", "bfloat16", "8bit"]
MOMENTS: tuple[Moments, ...] = ("float32", "bfloat16", "8bit")

Part = tuple[jax.Array, ...]

_TOP, _STEPS = 255, 8
"""The largest code of a root, and the codes of an octave."""
_LEAST = 2.0 ** (-_TOP / _STEPS)
"""The smallest divisor of a ratio, in units of the largest root."""
LEAST_ROOT = 2.0 ** ((1 - _TOP) / _STEPS)
"""The smallest root but zero, in units of the largest."""
_RATIO = jnp.float8_e4m3fn
# Of float8_e4m3fn: bits behind the leading one, the exponent of the smallest normal number, and the largest number.
_BITS, _NORMAL, _LARGEST = 3, -6, 448.0


def store_moments(adam: optax.GradientTransformation, moments: Moments, largest: float) -> optax.GradientTransformation:
    """Adam whose moments are rounded between steps. The update is computed before the new moments are rounded.

    Args:
      adam: of `optax.scale_by_adam`.
      moments: how they are kept.
      largest: the root of a second moment is at most this.
    """
    if moments == "float32":
        return adam
    return _in_bfloat16(adam) if moments == "bfloat16" else _in_8_bits(adam, largest)


def _in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(state: optax.ScaleByAdamState, dtype: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda x: x.astype(dtype), moment) for moment in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def init(params: optax.Params) -> optax.OptState:
        return cast(adam.init(params), jnp.bfloat16)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(init, update)


def _in_8_bits(adam: optax.GradientTransformation, largest: float) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.OptState:
        state = adam.init(params)
        mu = jax.tree.map(lambda x: x.astype(_RATIO), state.mu)
        nu = jax.tree.map(lambda x: x.astype(jnp.uint8), state.nu)
        return state._replace(mu=mu, nu=nu)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        def step(key: jax.Array, gradient: jax.Array, ratio: jax.Array, codes: jax.Array) -> Part:
            root = _root(codes, largest)
            before = state._replace(mu=ratio.astype(jnp.float32) * _divisor(root, largest), nu=jnp.square(root))
            found, after = adam.update(gradient, before)
            return found, *pack(after.mu, after.nu, key, largest)

        def weight(path: Any, *part: jax.Array) -> Part:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            key = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), state.count)
            if not name.startswith("layers.") or part[0].ndim < 2:
                return step(key, *part)

            # Layer by layer and in place: float32 moments and random numbers exist for one layer at a time.
            def layer(i: jax.Array, part: Part) -> Part:
                old = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in part)
                new = step(jax.random.fold_in(key, i), *old)
                return tuple(jax.lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(part, new, strict=True))

            return jax.lax.fori_loop(0, part[0].shape[0], layer, part)

        parts = jax.tree_util.tree_map_with_path(weight, updates, state.mu, state.nu)
        found, mu, nu = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0, 0, 0)), parts)
        return found, state._replace(count=optax.safe_increment(state.count), mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def pack(mu: jax.Array, nu: jax.Array, key: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """Rounds the two moments of a weight at random.

    Args:
      mu, nu: float32.
      key: of the random numbers.
      largest: the root of nu is at most this.

    Returns:
      float8_e4m3fn, the ratio of mu to the rounded root of nu; uint8, the code of this root.
    """
    up, away = (uniform_like(k, mu, layers=False) for k in jax.random.split(key))
    level = _TOP + _STEPS * jnp.log2(jnp.sqrt(nu) / largest)
    codes = jnp.clip(jnp.floor(level + up), 0, _TOP).astype(jnp.uint8)
    ratio = mu / _divisor(_root(codes, largest), largest)
    exponent = jnp.maximum(jnp.frexp(ratio)[1] - 1, _NORMAL)
    spacing = jnp.exp2((exponent - _BITS).astype(jnp.float32))
    rounded = jnp.floor(ratio / spacing + away) * spacing
    return jnp.clip(rounded, -_LARGEST, _LARGEST).astype(_RATIO), codes


def _root(codes: jax.Array, largest: float) -> jax.Array:
    steps = (codes.astype(jnp.float32) - _TOP) / _STEPS
    return jnp.where(codes > 0, largest * jnp.exp2(steps), 0.0)


def _divisor(root: jax.Array, largest: float) -> jax.Array:
    return jnp.maximum(root, largest * _LEAST)
