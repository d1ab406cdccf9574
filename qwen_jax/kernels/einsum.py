"""An einsum with float32 accumulation."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array, out_sharding: P | None = None) -> jax.Array:
    """An einsum of two arrays of any float dtype that accumulates in float32 and returns float32.

    Args:
      subscripts: such as "BTD,VD->BTV".
      a, b: the operands.
      out_sharding: of the result, on a mesh.
    """
    if jax.default_backend() == "cpu":
        # XLA:CPU has no product of bfloat16 operands with a float32 result. Widening first gives the same numbers.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, out_sharding=out_sharding)
