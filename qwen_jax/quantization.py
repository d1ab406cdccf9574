"""What quantised weights stand for: the scheme of a projection, and the schemes of a model."""

import dataclasses
import math
from typing import Literal

from qwen_jax.errors import InputError

CodeType = Literal["int4", "int8", "float8_e4m3fn"]
Activations = Literal["none", "int8", "float8_e4m3fn"]

W8A8_TOKENS = 64
"""Tokens of a step from which activations are rounded where the user asks for it. With fewer, the time is that of
reading the weights, which rounding does not shorten."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a projection is quantised: its arrays, beside each other under the projection's name.

    With I inputs, g of them in a group, and G = I / g groups:

    | name    | shape           | dtype          | what                                                              |
    |---------|-----------------|----------------|-------------------------------------------------------------------|
    | weight  | of the weight   | `codes`        | one code for each weight                                          |
    | scales  | [outputs..., G] | `scales`       |                                                                   |
    | zeros   | [outputs..., G] | `codes`        | zero points, if `offset` is "zero"                                |
    | mins    | [outputs..., G] | float32        | subtracted after scaling, if `offset` is "min"                    |
    | order   | [I]             | int32          | if `ordered`: place j of the inputs of weight holds input order[j] |

    The value of output o and input order[j] is (weight[o, j] - zeros[o, j // g]) * scales[o, j // g] - mins[o, j // g],
    computed in float32.

    Attributes:
      codes: dtype of the codes.
      group: inputs that share a scale; 0 if all inputs of an output share one.
      scales: dtype of the scales.
      offset: what else a group has.
      ordered: whether the inputs are sorted by group (desc_act of GPTQ).
    """

    codes: CodeType
    group: int = 0
    scales: Literal["float16", "bfloat16", "float32"] = "float16"
    offset: Literal["none", "zero", "min"] = "none"
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.group < 0:
            raise InputError(f"The group of quantised weights must be positive, or 0 for whole rows; got {self.group}.")
        if self.codes == "float8_e4m3fn" and (self.offset != "none" or self.ordered):
            raise InputError("float8 weights have neither zero points nor an order of inputs.")

    def __str__(self) -> str:
        what = f"{self.codes} in groups of {self.group}" if self.group else f"{self.codes} by whole rows"
        what += ", ordered by activations" if self.ordered else ""
        return what + {"none": "", "zero": ", with zero points", "min": ", with minima"}[self.offset]

    def groups(self, inputs: int, shards: int = 1) -> int:
        """The number of groups of a projection.

        A group that a shard would split is cut into equal parts, which repeat its scale: values stay the same.

        Args:
          inputs: of the projection.
          shards: parts that the inputs are split into.
        """
        return inputs // math.gcd(self.group or inputs, inputs // shards)

    def arrays(self) -> dict[str, str]:
        """The arrays of a projection that is quantised so, with their dtypes."""
        found: dict[str, str] = {"weight": self.codes, "scales": self.scales}
        if self.offset == "zero":
            found["zeros"] = self.codes
        if self.offset == "min":
            found["mins"] = "float32"
        if self.ordered:
            found["order"] = "int32"
        return found


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which projections of a model are quantised, and how. Embedding, heads, norms and routers never are.

    Attributes:
      scheme: of every projection that is no exception; for experts, of each expert's matrices.
      exceptions: paths of modules, such as "layers.3.mlp.down" or "layers.3.moe.experts.gate_up", with their own
        scheme, or None for those that are not quantised.
      activations: what the inputs of projections are rounded to, with one scale for each token.
      rounded_from: tokens of a step, on all devices, from which they are rounded.
    """

    scheme: Scheme
    exceptions: tuple[tuple[str, Scheme | None], ...] = ()
    activations: Activations = "none"
    rounded_from: int = 1

    def __post_init__(self) -> None:
        if self.activations == "none":
            return
        unfit = self._not_for(self.activations)
        if unfit is not None:
            raise InputError(
                f"Products of {self.activations} activations need weights in {self.activations} with one scale for "
                f"each output; got {unfit}."
            )

    def _not_for(self, activations: str) -> Scheme | None:
        """A scheme of this model that rounded activations cannot be multiplied with."""
        for scheme in (self.scheme, *(scheme for _, scheme in self.exceptions)):
            if scheme is not None and (scheme.codes != activations or scheme.group or scheme.offset != "none"):
                return scheme
        return None

    def rounds(self, tokens: int) -> Activations:
        """What the inputs of projections are rounded to in a step of some tokens on all devices."""
        return self.activations if tokens >= self.rounded_from else "none"

    def with_w8a8(self) -> "Quantization":
        """Rounds activations to the dtype of the weights in steps of many tokens; see `W8A8_TOKENS`.

        Nothing changes where the checkpoint states rounded activations.

        Raises:
          InputError: the weights are not all int8, or all float8, with one scale for each output.
        """
        if self.activations != "none":
            return self
        codes = self.scheme.codes
        unfit = self._not_for(codes)
        if codes == "int4" or unfit is not None:
            raise InputError(
                "Rounded activations (w8a8) need int8 or float8 weights with one scale for each output; got "
                f"{unfit or self.scheme}. Leave w8a8 out, or quantise the model so: qwen-jax quantize --method int8, "
                "or fp8."
            )
        return dataclasses.replace(self, activations=codes, rounded_from=W8A8_TOKENS)

    def of(self, module: str) -> Scheme | None:
        """The scheme of a projection, by its path in the parameter tree; None if it is not quantised."""
        return dict(self.exceptions).get(module, self.scheme)

    def of_layer(self, layer: int | None, num_layers: int) -> "Quantization":
        """The quantisation of one layer, by paths within it, such as "mlp.down".

        Args:
          layer: its number; None for a stack of all layers.
          num_layers: of the model.

        Raises:
          InputError: a stack of layers that are quantised differently.
        """
        kept: dict[int, list[tuple[str, Scheme | None]]] = {i: [] for i in range(num_layers)}
        for path, scheme in self.exceptions:
            _, number, module = path.split(".", 2)
            kept[int(number)].append((module, scheme))
        if layer is None:
            first, *others = (sorted(some, key=lambda pair: pair[0]) for some in kept.values())
            if any(first != other for other in others):
                raise InputError(
                    "The layers of this model are quantised differently, so that they cannot be stacked for training. "
                    "Convert the checkpoint to bfloat16, or quantise it uniformly."
                )
        return dataclasses.replace(self, exceptions=tuple(sorted(kept[layer or 0], key=lambda pair: pair[0])))


def unified(a: Scheme | None, b: Scheme | None) -> Scheme | None:
    """The narrowest scheme that holds the values of two schemes exactly; None if none does, or if one is None."""
    if a == b or a is None or b is None:
        return a if a == b else None
    if (a.codes == "float8_e4m3fn") != (b.codes == "float8_e4m3fn"):
        return None
    offsets = {a.offset, b.offset} - {"none"}
    return Scheme(
        codes=a.codes if a.codes == b.codes else "int8",
        group=math.gcd(a.group, b.group),
        scales=a.scales if a.scales == b.scales else "float32",
        offset="min" if "min" in offsets else "zero" if offsets else "none",
        ordered=a.ordered or b.ordered,
    )
