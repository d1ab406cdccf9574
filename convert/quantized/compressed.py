"""Files of compressed-tensors, the format of LLM Compressor and vLLM: integers of 4 and 8 bits, and float8.

A matrix of O outputs and I inputs with b bits is stored, by the format of its group, as

| format                             | codes                                          | zero points            |
|------------------------------------|------------------------------------------------|------------------------|
| pack-quantized                     | weight_packed int32 [O, ceil(I b / 32)],       | weight_zero_point int32 |
|                                    | weight_shape int64 [2]                         | [ceil(O b / 32), G]    |
| int-quantized, naive-quantized     | weight int8 [O, I]                             | weight_zero_point int8 [O, G] |
| float-quantized, naive-quantized   | weight float8_e4m3fn [O, I]                    |                        |

with weight_scale [O, G] and W[o, i] = (q[o, i] - z[o, g(i)]) * weight_scale[o, g(i)]. G is the number of groups of
inputs, or 1 for one scale an output ("channel"); "tensor" has one scale in all, "block" one for each block of outputs
and inputs. Packed integers are without sign, q + 2^(b - 1), low bits first. With actorder "group", weight_g_idx int32
[I] says to which group an input belongs, as g_idx of GPTQ; otherwise g(i) = i // group_size.
"""

from collections.abc import Mapping

import numpy as np

from convert.quantized import words
from convert.quantized.codes import Codes, cut
from convert.quantized.compressed_config import Compressed, read_config, write_config
from convert.quantized.info import (
    FLOATS,
    INT32,
    Stored,
    check_codes,
    check_finite,
    check_form,
    check_shape,
    check_tensors,
    full_name,
    matrix,
    of_module,
    place,
)
from convert.quantized.order import groups_of, sorted_by_group
from convert.quantized.scales import folded, scale_shapes, spread
from qwen_jax.errors import InputError

__all__ = ["Compressed", "pack", "read_config", "tensor_names", "unpack", "write_config"]

_HINT = "Check config_groups of the quantisation config, and that the download is complete."
_DTYPES = {"int4": words.INT8, "int8": words.INT8, "float8_e4m3fn": words.FLOAT8}
# Scales of activations that calibration found. They are not needed: each token gets its own scale.
_STATIC = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def tensor_names(module: str, shape: tuple[int, int], info: Compressed) -> dict[str, Stored]:
    """The tensors of one matrix.

    Args:
      module: such as "model.layers.0.mlp.up_proj"; "" for names without one.
      shape: outputs and inputs.
      info: from `read_config`.
    """
    info = of_module(info, module)
    outputs, inputs = shape
    scales = scale_shapes(info.strategy, shape, info.file_group(inputs), info.block)
    tensors = {"weight_scale": Stored(FLOATS, scales)}
    int64 = np.dtype(np.int64)
    if info.format == "pack-quantized":
        tensors["weight_packed"] = Stored((INT32,), ((outputs, words.count(inputs, info.bits)),))
        tensors["weight_shape"] = Stored((int64, INT32), ((2,),))
    else:
        tensors["weight"] = Stored((_DTYPES[info.codes],), ((outputs, inputs),))
    # Zero points. Symmetric files of old versions have some, which are 0.
    if _packs_zeros(info) and info.offset == "zero":
        packed_zeros = (words.count(outputs, info.bits), scales[0][1])
        tensors["weight_zero_point"] = Stored((INT32,), (packed_zeros,))
    else:
        tensors["weight_zero_point"] = Stored((_DTYPES[info.codes],), scales, optional=info.offset == "none")
    if info.act_order:
        tensors["weight_g_idx"] = Stored((INT32,), ((inputs,),))
    for name in _STATIC:
        tensors[name] = Stored((*FLOATS, words.INT8, words.FLOAT8), ((), (1,)), optional=True)
    return {full_name(module, name): stored for name, stored in tensors.items()}


def _packs_zeros(info: Compressed) -> bool:
    return info.format == "pack-quantized" and info.strategy in ("channel", "group")


def unpack(
    tensors: Mapping[str, np.ndarray], info: Compressed, module: str = "", shape: tuple[int, int] | None = None
) -> Codes:
    """Reads one matrix.

    Args:
      tensors: by the names of `tensor_names`.
      info: from `read_config`.
      module: as for `tensor_names`.
      shape: outputs and inputs that the matrix must have; None takes those of the tensors.

    Raises:
      InputError: tensors that are missing, do not fit together or the configuration, or hold values that cannot be.
    """
    info = of_module(info, module)
    packed = info.format == "pack-quantized"
    weight = matrix(tensors, module, "weight_packed" if packed else "weight", _HINT)
    found = (weight.shape[0], weight.shape[1])
    if packed:
        found = _packed_shape(tensors, module, found, info)
    check_tensors(tensors, tensor_names(module, found, info), module, _HINT)
    check_shape(module, found, shape)
    inputs, group = found[1], info.file_group(found[1])
    # The codes.
    if packed:
        codes = words.unpack(np.ascontiguousarray(weight), info.bits, inputs)
    elif info.codes == "float8_e4m3fn":
        check_codes(full_name(module, "weight"), weight)
        codes = weight
    else:
        codes = _narrow(weight, full_name(module, "weight"), info)
    # Scales and zero points.
    scales = tensors[full_name(module, "weight_scale")]
    check_finite(full_name(module, "weight_scale"), scales)
    zeros = tensors.get(full_name(module, "weight_zero_point"))
    if zeros is not None and info.offset == "none":
        if zeros.any():
            raise InputError(
                f"{full_name(module, 'weight_zero_point')} is not 0, but the config says symmetric=true. {_HINT}"
            )
        zeros = None
    if zeros is not None:
        if _packs_zeros(info):
            zeros = words.transposed(words.unpack(words.transposed(zeros), info.bits, found[0]))
        else:
            zeros = _narrow(zeros, full_name(module, "weight_zero_point"), info)
        zeros = cut(spread(zeros, found[0], info.block), inputs, group)
    order = None
    if info.act_order:
        name = full_name(module, "weight_g_idx")
        order = sorted_by_group(tensors[name], group, name, _HINT)
    return Codes(
        codes if order is None else np.take(codes, order, axis=1),
        cut(spread(scales, found[0], info.block), inputs, group),
        zeros,
        order=order,
    )


def _packed_shape(
    tensors: Mapping[str, np.ndarray], module: str, packed: tuple[int, int], info: Compressed
) -> tuple[int, int]:
    """The shape of a packed matrix, as weight_shape gives it."""
    name = full_name(module, "weight_shape")
    given = tensors.get(name)
    if given is None or given.shape != (2,) or given.dtype.kind != "i":
        raise InputError(f"{place(module)} needs {name}, two integers. {_HINT}")
    outputs, inputs = (int(size) for size in given)
    if (outputs, words.count(inputs, info.bits)) != packed or inputs < 1:
        raise InputError(
            f"{name} says {[outputs, inputs]}, but weight_packed is {list(packed)} with {info.bits} bits. {_HINT}"
        )
    return outputs, inputs


def _narrow(values: np.ndarray, name: str, info: Compressed) -> np.ndarray:
    """int8 values of a file as codes, which may have fewer bits."""
    if info.bits == 4 and values.size and (values.min() < -8 or values.max() > 7):
        raise InputError(f"{name}: expected values of 4 bits, -8 to 7, got {values.min()} to {values.max()}. {_HINT}")
    return words.from_integers(values, info.bits)


def pack(codes: Codes, info: Compressed, module: str = "") -> dict[str, np.ndarray]:
    """Writes one matrix; the inverse of `unpack`, byte for byte.

    Args:
      codes: the matrix.
      info: from `read_config`, or made for a new file.
      module: as for `tensor_names`.

    Returns:
      The tensors by the names of `tensor_names`.

    Raises:
      InputError: the format cannot hold these codes.
    """
    info = of_module(info, module)
    check_form(codes, info, module)
    outputs, inputs = codes.codes.shape
    group = info.file_group(inputs)
    # The codes.
    own = codes.in_own_order()
    tensors: dict[str, np.ndarray] = {}
    if info.format == "pack-quantized":
        tensors["weight_packed"] = words.pack(own)
        tensors["weight_shape"] = np.array([outputs, inputs], np.int64)
    else:
        tensors["weight"] = own if info.bits == 8 else words.integers(own)
    # Scales and zero points.
    tensors["weight_scale"] = folded(codes.scales, inputs, group, info.strategy, info.block, "scales")
    if codes.zeros is not None:
        zeros = folded(codes.zeros, inputs, group, info.strategy, info.block, "zero points")
        if _packs_zeros(info):
            tensors["weight_zero_point"] = words.transposed(words.pack(words.transposed(zeros)))
        else:
            tensors["weight_zero_point"] = words.integers(zeros)
    if info.act_order:
        tensors["weight_g_idx"] = groups_of(codes.order, inputs, group)
    return {full_name(module, name): tensor for name, tensor in tensors.items()}
