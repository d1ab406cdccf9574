"""What the configuration of a quantised checkpoint says, and the checks that all formats share."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import ml_dtypes
import numpy as np

from convert.quantized.codes import Codes
from qwen_jax.errors import InputError

CodeType = Literal["int4", "int8", "float8_e4m3fn"]
Activations = Literal["none", "int8", "float8_e4m3fn"]
FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
INT32 = np.dtype(np.int32)

# Modules whose weights are no projections; no format quantises them.
_PLAIN = re.compile(r"(?:^|\.)(?:norm|input_layernorm|post_attention_layernorm|mlp\.gate|shared_expert_gate)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """How a checkpoint, or one matrix of it, is quantised. Each format adds what else its files need.

    Attributes:
      codes: dtype of the codes in memory.
      group: inputs that share a scale, as the file counts them: the last group may be shorter. 0 if all inputs of an
        output share one.
      offset: "zero" if a group has a zero point, "none" if that is 0.
      activations: dtype that the activations are rounded to, with one scale for each token.
    """

    method: ClassVar[str]
    codes: CodeType
    group: int = 0
    offset: Literal["none", "zero"] = "none"
    activations: Activations = "none"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.codes == "int4" else 8

    @property
    def ordered(self) -> bool:
        """Whether the inputs are sorted by group in memory."""
        return False

    @property
    def scheme_group(self) -> int:
        """Inputs that share a scale, as `Scheme` counts them; 0 if all inputs of an output share one."""
        return self.group

    def file_group(self, inputs: int) -> int:
        """Inputs of a group in the file."""
        return self.group or max(inputs, 1)

    def group_of(self, inputs: int) -> int:
        """Inputs of a group in memory, where all groups have the same size: see `codes.cut`."""
        return math.gcd(self.file_group(inputs), inputs)

    def of(self, module: str) -> Self | None:
        """How one module is quantised.

        Args:
          module: its name in the file, such as "model.layers.0.self_attn.q_proj".

        Returns:
          What `unpack` and `pack` of the format need, without the rules for other modules; None if the module is not
          quantised.
        """
        raise NotImplementedError


def can_be_quantized(module: str) -> bool:
    """Whether a module is a projection, the embedding or the head, by its name in the file."""
    return _PLAIN.search(module) is None


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a file stores one tensor of a quantised matrix.

    Attributes:
      dtypes: any of them.
      shapes: any of them.
      optional: whether the file may lack it.
    """

    dtypes: tuple[np.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


def full_name(module: str, name: str) -> str:
    """The name in the file of a tensor of a module; without a module the tensor's own name."""
    return f"{module}.{name}" if module else name


class Shaped(Protocol):
    """An array, or the entry of one in the header of a file."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_tensors(tensors: Mapping[str, Shaped], expected: Mapping[str, Stored], module: str, hint: str) -> None:
    """Compares the tensors of a matrix with what its format has.

    Args:
      tensors: by name; arrays, or what the header of a file says of them.
      expected: by name.
      module: for messages.
      hint: what to check if a shape or dtype does not fit.

    Raises:
      InputError: a missing or unexpected tensor, or a shape or dtype that does not fit.
    """
    missing = [name for name, stored in expected.items() if name not in tensors and not stored.optional]
    if missing:
        raise InputError(f"{place(module)} has no {', '.join(missing)}. {hint}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise InputError(f"{place(module)} has tensors that this format does not: {', '.join(unknown)}. {hint}")
    for name, array in tensors.items():
        stored = expected[name]
        if array.dtype not in stored.dtypes or array.shape not in stored.shapes:
            dtypes = " or ".join(str(dtype) for dtype in stored.dtypes)
            shapes = " or ".join(str(list(shape)) for shape in stored.shapes)
            raise InputError(f"{name}: expected {dtypes} {shapes}, got {array.dtype} {list(array.shape)}. {hint}")


def matrix(tensors: Mapping[str, np.ndarray], module: str, name: str, hint: str) -> np.ndarray:
    """A tensor that gives the sizes of a matrix; InputError if it is missing, empty, or has not two axes."""
    full = full_name(module, name)
    if full not in tensors:
        raise InputError(f"{place(module)} has no {full}. {hint}")
    if tensors[full].ndim != 2:
        raise InputError(f"{full}: expected two axes, got {tensors[full].dtype} {list(tensors[full].shape)}. {hint}")
    if tensors[full].size == 0:
        raise InputError(f"{full} has no elements, its shape is {list(tensors[full].shape)}. {hint}")
    return tensors[full]


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises InputError if scales hold infinities or NaN."""
    finite = np.isfinite(array)
    if not finite.all():
        raise InputError(
            f"{name} holds {array.size - int(finite.sum())} values that are infinite or not a number, of {array.size}. "
            "The file is damaged, or its quantisation overflowed; fetch it again or take another."
        )


def check_codes(name: str, weight: np.ndarray) -> None:
    """Raises InputError if float8 codes are not a number."""
    # A part at a time: whole matrices of intermediate results cost more than the comparison.
    data = weight.view(np.uint8)
    count = sum(int(np.count_nonzero(data[start : start + 64] & 127 == 127)) for start in range(0, len(data), 64))
    if count:
        raise InputError(f"{name} holds {count} values that are not a number. The file is damaged; fetch it again.")


def check_form(codes: Codes, info: FormatInfo, module: str) -> None:
    """Raises InputError if a file of this configuration cannot hold a matrix."""
    problems = []
    if str(codes.codes.dtype) != info.codes:
        problems.append(f"its codes are {codes.codes.dtype}, not {info.codes}")
    if (codes.zeros is not None) != (info.offset == "zero"):
        problems.append("it has no zero points" if codes.zeros is None else "it has zero points")
    if codes.mins is not None:
        problems.append("it has minima")
    if codes.order is not None and not info.ordered:
        problems.append("its inputs are sorted by group")
    if problems:
        raise InputError(
            f"{place(module)} does not fit the {info.method} configuration: {', '.join(problems)}. "
            "Quantise it for this format, or write another one."
        )


def check_shape(module: str, found: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Raises InputError if a matrix does not have the shape [outputs, inputs] that the model needs."""
    if expected is not None and found != tuple(expected):
        raise InputError(
            f"{place(module)} is {list(found)} (outputs, inputs), the model needs {list(expected)}. Check that "
            "config.json belongs to these weights, and the bits of its quantisation."
        )


def place(module: str) -> str:
    """How messages name a matrix."""
    return module or "The matrix"


def of_module(info: FormatInfo, module: str) -> Any:
    """`info.of(module)`, which must not be None; without a module the info itself."""
    found = info.of(module) if module else info
    if found is None:
        raise InputError(f"{module} is not quantised by the configuration ({info.method}).")
    return found


def is_listed(module: str, names: Collection[str]) -> bool:
    """Whether a list of modules to skip names a module.

    Such lists hold whole names, ends of names, parts of them, or regular expressions, which some tools mark with "re:".
    Parts match whole components only: "mlp.gate" is not "mlp.gate_proj", "layers.1" not "layers.11".
    """
    for name in names:
        if name.startswith("re:"):
            if re.match(name.removeprefix("re:"), module):
                return True
        elif f".{name}." in f".{module}." or re.match(rf"(?:{name})(?=\.|$)", module):
            return True
    return False


def integer(where: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Reads an integer of a configuration; InputError if it is none, or is missing without a default."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: expected an integer as {key} of the quantisation, got {value!r}.")
    return value


def boolean(where: Path, config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """Reads a boolean of a configuration; InputError if it is none, or is missing without a default."""
    value = config.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: expected true or false as {key} of the quantisation, got {value!r}.")
    return value


def strings(where: Path, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Reads a list of strings of a configuration, () if there is none, and checks those that are expressions."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{where}: expected a list of names as {key} of the quantisation, got {value!r}.")
    for item in value:
        expression(where, key, item.removeprefix("re:"))
    return tuple(value)


def expression(where: Path, key: str, text: str) -> str:
    """Checks a regular expression of a configuration."""
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"{where}: {text!r} in {key} is not a regular expression: {error}.") from None
    return text


def group_size(where: Path, config: Mapping[str, Any], key: str = "group_size") -> int:
    """Reads the size of groups: 0 for -1, which stands for all inputs."""
    value = integer(where, config, key)
    if value != -1 and value < 1:
        raise InputError(f"{where}: expected a positive {key}, or -1 for all inputs of an output, got {value}.")
    return max(value, 0)
