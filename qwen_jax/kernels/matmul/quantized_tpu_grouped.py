"""Products of bundles of few rows with the quantised matrices of their groups on TPUs, for mixtures of experts.

The program is that of `quantized_tpu` for few rows. A tile of outputs goes through all bundles, whose matrices are
sorted, so that a tile of a matrix is copied once for all its bundles; matrices without rows are not copied.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import quantized_tpu
from qwen_jax.kernels.tpu import device
from qwen_jax.kernels.tpu.device import LANES, SUBLANES, cache_tile_bytes
from qwen_jax.kernels.types import Ref


def bundle_rows(rows: int) -> int:
    """The rows C of a bundle in the arrays of `grouped_matmul`, of which about `rows` are there."""
    return -(-rows // SUBLANES) * SUBLANES


def supports_bundles(K: int, G: int) -> bool:
    """Whether a bundle of `quantized_tpu.FEW_ROWS` rows can be multiplied by codes, so that sums are scaled."""
    return quantized_tpu.FEW_ROWS * quantized_tpu.groups_of_chunk(K, G, LANES) <= quantized_tpu.EXPANDED


# Jitted so that a model of many layers lowers each shape once.
@jax.jit
def grouped_matmul(
    x_TCK: jax.Array,
    group_T: jax.Array,
    used: jax.Array,
    weight_ENK: jax.Array,
    scales_ENG: jax.Array,
    zeros_ENG: jax.Array | None = None,
    mins_ENG: jax.Array | None = None,
) -> jax.Array:
    """Multiplies bundles of a few rows by one of several quantised matrices each, x W^T. Runs on local arrays.

    Only codes of matrices that have rows are read, once for bundles that follow each other. The numerics are those of
    `quantized_tpu.matmul` up to `quantized_tpu.FEW_ROWS` rows.

    Args:
      x_TCK: bfloat16, the rows of each bundle; C is from `bundle_rows`, at most `quantized_tpu.FEW_ROWS`.
      group_T: int32, the matrix of each bundle; those of bundles that are not used may be any.
      used: int32, the number of bundles; those that are used come first.
      weight_ENK, scales_ENG, zeros_ENG, mins_ENG: of each matrix, as for `quantized_tpu.matmul`.

    Returns:
      float32 [T, C, N]; undefined for bundles that are not used.

    Raises:
      InputError: arguments that `quantized_tpu.needs` rejects, too many rows, or a row of the matrix too long for VMEM.
    """
    (T, C, K), (_, N, _), G = x_TCK.shape, weight_ENK.shape, scales_ENG.shape[-1]
    needed = quantized_tpu.needs(x_TCK[0], weight_ENK[0], scales_ENG[0])
    needed[f"bundles of a multiple of {SUBLANES} rows"] = C % SUBLANES == 0
    needed[f"at most {quantized_tpu.FEW_ROWS} rows in each"] = C <= quantized_tpu.FEW_ROWS
    needed["groups of at least 32 inputs"] = supports_bundles(K, G)
    if missing := [need for need, met in needed.items() if not met]:
        raise InputError(
            f"Expected {' and '.join(missing)}; got rows {x_TCK.dtype} {x_TCK.shape}, codes {weight_ENK.dtype} "
            f"{weight_ENK.shape}, scales {scales_ENG.dtype} {scales_ENG.shape}. Use implementation='plain'."
        )
    bits = 4 if weight_ENK.dtype == jnp.int4 else 8
    tiles = quantized_tpu.choose_tiling(C, N, K, G, bits, device.core(), cache_tile_bytes())
    if not tiles.few:
        raise InputError(
            f"Expected matrices of which {LANES} outputs fit in VMEM beside {C} rows; got {K} inputs. Use "
            "implementation='plain', or shard the inputs over devices."
        )
    # Bundles that are not used stay at the last matrix, so that no other one is copied.
    last = jnp.maximum(used - 1, 0)
    group_T = group_T[jnp.minimum(jnp.arange(T), last)]

    def of_bundles(x_ENG: jax.Array) -> jax.Array:
        return x_ENG[group_T].astype(jnp.float32).swapaxes(1, 2)

    scales_TGN = of_bundles(scales_ENG)
    offsets_TGN = None
    if zeros_ENG is not None:
        offsets_TGN = scales_TGN * of_bundles(zeros_ENG)
    if mins_ENG is not None:
        mins_TGN = of_bundles(mins_ENG)
        offsets_TGN = mins_TGN if offsets_TGN is None else offsets_TGN + mins_TGN
    wide = jax.vmap(lambda x: quantized_tpu.expanded(x, G, tiles.chunk))(x_TCK)
    columns = pl.BlockSpec((None, G, tiles.outputs), lambda n, t, *_: (t, 0, n))
    arrays = [wide, weight_ENK, scales_TGN]
    specs = [
        pl.BlockSpec((None, *wide.shape[1:]), lambda n, t, *_: (t, 0, 0, 0)),
        pl.BlockSpec((None, tiles.outputs, K), lambda n, t, group, _: (group[t], n, 0)),
        columns,
    ]
    if offsets_TGN is not None:
        arrays += [x_TCK.astype(jnp.float32).reshape(T, C, G, -1).sum(-1), offsets_TGN]
        specs += [pl.BlockSpec((None, C, G), lambda n, t, *_: (t, 0, 0)), columns]

    def program(group_ref: Ref, used_ref: Ref, *refs: Ref) -> None:
        del group_ref

        @pl.when(pl.program_id(1) < used_ref[0])
        def _() -> None:
            quantized_tpu.few_program(*refs, K=K, G=G, tiles=tiles)

    with jax.named_scope("quantized_grouped"):
        out: jax.Array = pl.pallas_call(
            program,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(-(-N // tiles.outputs), T),
                in_specs=specs,
                out_specs=pl.BlockSpec((None, C, tiles.outputs), lambda n, t, *_: (t, 0, n)),
            ),
            out_shape=jax.ShapeDtypeStruct((T, C, N), jnp.float32),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * T * C * N * K,
                bytes_accessed=T * (N * K * bits // 8 + 4 * N * G + 2 * C * K + 4 * C * N),
                transcendentals=0,
            ),
            name="quantized_grouped",
        )(group_T, used[None], *arrays)
    return out
