"""What each implementation of attention supports, how one is selected, and which arguments are valid."""

import dataclasses
import math
from typing import Literal

import jax

from qwen_jax import platform
from qwen_jax.errors import InputError
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.select import Candidate, select, unmet

Implementation = Literal["auto", "gpu", "cudnn", "tpu", "xla", "reference"]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What an implementation supports: a row of the table in `qwen_jax.kernels`."""

    where: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] | None = None
    causal_only: bool = False
    log_sum_exp: bool = True
    caches: bool = True


_HALF, _ALL = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
COVERAGE = {
    "gpu": Coverage("Hopper GPU", _HALF, (64, 128)),
    "cudnn": Coverage("GPU", _HALF, tuple(range(8, 257, 8)), causal_only=True, log_sum_exp=False, caches=False),
    "tpu": Coverage("TPU", ("bfloat16", "float32"), (64, 128)),
    "xla": Coverage("anywhere", _ALL, log_sum_exp=False, caches=False),
    "reference": Coverage("anywhere", _ALL),
}
"""In the order in which "auto" tries them; "auto" skips xla."""


def is_pallas(implementation: str) -> bool:
    """Whether an implementation is a Pallas kernel.

    Pallas kernels do not state over which mesh axes their results vary: `jax.shard_map` needs `check_vma=False`.
    """
    return implementation in ("gpu", "tpu")


def select_attention(
    implementation: str, q: jax.Array, mask: Mask, *, return_lse: bool = False, cache: bool = False
) -> str:
    """Returns the name of the implementation of attention that runs; see `select`.

    Args:
      implementation: "auto" or a name.
      q: queries, [B, T, H, d].
      mask: of the queries.
      return_lse: whether the log-sum-exp is needed.
      cache: whether keys and values are a contiguous or paged cache.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    on = platform.platform()
    present = {"anywhere": True, "GPU": on == "gpu", "Hopper GPU": platform.on_hopper(), "TPU": on == "tpu"}
    candidates = [
        Candidate(
            name,
            unmet({
                f"a {row.where}": present[row.where],
                " or ".join(row.dtypes): q.dtype.name in row.dtypes,
                f"head_dim {_listed(row.head_dims)}": row.head_dims is None or q.shape[-1] in row.head_dims,
                "a plain causal mask": mask.is_causal or not row.causal_only,
                "return_lse=False": row.log_sum_exp or not return_lse,
                "keys and values that are not a cache": row.caches or not cache,
            }),
            automatic=name != "xla",
            slow=name == "reference",
        )
        for name, row in COVERAGE.items()
    ]  # fmt: skip
    masks = "a cache" if cache else "causal" if mask.is_causal else "intervals"
    return select(candidates, implementation, "attention", f"{q.dtype}, head_dim {q.shape[-1]}, {masks}")


def _listed(numbers: tuple[int, ...] | None) -> str:
    if numbers is None or len(numbers) < 4:
        return " or ".join(map(str, numbers or ()))
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"


def check_arguments(
    q: jax.Array,
    k: jax.Array | jax.ShapeDtypeStruct,
    v: jax.Array | jax.ShapeDtypeStruct,
    mask: Mask,
    scale: float,
    layout: str,
) -> float:
    """Checks that the arguments of attention fit together, and returns the scale as a Python float.

    Args:
      q, k, v: as the caller gave them.
      mask: of the queries.
      scale: of the logits.
      layout: dimensions of k and v, "[B, S, K, d]" or "[B, K, S, d]".

    Raises:
      InputError: shapes, dtypes, the mask or the scale are wrong.
    """
    scale = check_arrays(q, k, v, mask, scale, layout)
    mask.check(k.shape[layout.split(", ").index("S")])
    return scale


def check_arrays(
    q: jax.Array,
    k: jax.Array | jax.ShapeDtypeStruct,
    v: jax.Array | jax.ShapeDtypeStruct,
    mask: Mask,
    scale: float,
    layout: str,
) -> float:
    """`check_arguments` without the values of the mask. The layout has K, or J for columns, where the heads are."""
    letter = "J" if "J" in layout else "K"
    heads = layout.split(", ").index(letter)
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and 0 not in (*q.shape, *k.shape)
        and q.shape[2] % k.shape[heads] == 0
    )
    if not fits:
        raise InputError(
            f"Attention needs q [B, T, H, d], k and v {layout} with H a multiple of {letter}, and no dimension of size "
            f"0; got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"Attention needs q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if mask.k_start_BT.shape != q.shape[:2] or mask.k_end_BT.shape != q.shape[:2]:
        raise InputError(
            f"Attention needs mask intervals for the query rows {q.shape[:2]}; got intervals for "
            f"{mask.k_start_BT.shape} and {mask.k_end_BT.shape}."
        )
    if isinstance(scale, jax.core.Tracer) or not (math.isfinite(scale) and scale > 0):
        raise InputError(
            f"Attention needs a positive, finite number as its scale, known while tracing; got {scale}. "
            "The usual scale is head_dim ** -0.5."
        )
    return float(scale)
