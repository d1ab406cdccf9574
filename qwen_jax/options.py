"""How the parameters of a model are laid out, and how it is run."""

import dataclasses

from qwen_jax import kernels
from qwen_jax.kernels.matmul.grouped import Implementation as Grouped


@dataclasses.dataclass(frozen=True)
class Options:
    """How a set of parameters is laid out and run.

    Attributes:
      stacked: layers are one tree with a leading layer axis, run by a scan (training); otherwise a list of trees, run
        one after the other (inference).
      fused: the inference layout of the projections; see `fuse`.
      dtype: compute dtype.
      attention: which kernel; see `kernels.attention`.
      grouped: which kernel multiplies the rows of experts; see `kernels.grouped`.
      capacity_factor: 0 loses no token. Otherwise each expert has room for this many times the rows that a device would
        send it if all got as many; others pass it by, and are counted.
    """

    stacked: bool = True
    fused: bool = False
    dtype: str = "float32"
    attention: kernels.Implementation = "auto"
    grouped: Grouped = "auto"
    capacity_factor: float = 0.0
