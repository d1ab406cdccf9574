"""Low-rank adaptation of the projections (LoRA, Hu et al. 2021, arXiv:2106.09685): its settings.

A projection with a weight W becomes `x W^T + scale (x A^T) B^T`. Only A [rank, in] and B [out, rank] are trained;
`qwen_jax.linear.Linear` holds and multiplies them.
"""

import dataclasses
import math

from qwen_jax.errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections that can be adapted: of attention, of feed-forward layers, and of the shared expert."""
WHOLE = ("embed", "norm", "lm_head", "score")
"""Parts outside of the layers, which can be trained whole beside the adapted projections."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections are adapted, and how.

    Attributes:
      rank: of the update of a weight.
      alpha: the update is multiplied by alpha / rank.
      targets: of `TARGETS`. In a model with experts, "gate", "up" and "down" are those of layers without experts and
        of the shared expert; routed experts are not adapted.
      rank_stabilised: multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
      whole: parts of `WHOLE` whose own weights are trained too (PEFT's `modules_to_save`), such as the head of a reward
        model.

    Raises:
      InputError: a value out of range, or an unknown name.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rank_stabilised: bool = False
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"The rank of LoRA must be a positive integer, got {self.rank!r}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"alpha of LoRA must be positive, got {self.alpha}.")
        for field, known in (("targets", TARGETS), ("whole", WHOLE)):
            names = getattr(self, field)
            unknown = [name for name in names if name not in known]
            if unknown or len(set(names)) < len(names):
                experts = " Routed experts cannot be adapted." if any("expert" in str(name) for name in unknown) else ""
                raise InputError(
                    f"{field} of LoRA must be different names of {', '.join(known)}; got {names}.{experts}"
                )
        if not self.targets:
            raise InputError(f"LoRA needs at least one target of {', '.join(TARGETS)}, got none.")

    @property
    def scale(self) -> float:
        """The factor on the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
