"""AWQ files with the layout "gemm", as AutoAWQ writes them.

A matrix of O outputs and I inputs with 4 bits and groups of g inputs is stored as qweight int32 [I, O / 8] and qzeros
int32 [ceil(I / g), O / 8], both packed along the outputs, and scales [ceil(I / g), O]. Bits 4 i to 4 i + 3 of word c
belong to output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. It stands for
W[o, i] = scales[i // g, o] * (q[i, o] - z[i // g, o]).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from convert.quantized import words
from convert.quantized.codes import Codes, cut, joined
from convert.quantized.info import (
    FLOATS,
    INT32,
    FormatInfo,
    Stored,
    boolean,
    can_be_quantized,
    check_finite,
    check_form,
    check_shape,
    check_tensors,
    full_name,
    group_size,
    integer,
    is_listed,
    matrix,
    of_module,
    place,
    strings,
)
from qwen_jax.errors import InputError

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # The output of a word that each group of four bits belongs to.
_HINT = "Check group_size and zero_point of the quantisation config, and that the download is complete."
_LAYOUTS = "Supported is the version gemm with 4 bits; take that version of the model, or a GPTQ version."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(FormatInfo):
    """The configuration of an AWQ checkpoint, or of one of its matrices.

    Attributes:
      skipped: parts of the names of modules that are not quantised (modules_to_not_convert).
    """

    method: ClassVar[str] = "awq"
    skipped: tuple[str, ...] = ()

    def of(self, module: str) -> Self | None:
        """How one module is quantised; see `FormatInfo.of`."""
        plain = module == "lm_head" or module.endswith("embed_tokens") or not can_be_quantized(module)
        if plain or is_listed(module, self.skipped):
            return None
        return dataclasses.replace(self, skipped=())


def read_config(where: Path, config: Mapping[str, Any]) -> Awq:
    """Reads `quantization_config` of config.json.

    Args:
      where: the file, for messages.
      config: its content.

    Raises:
      InputError: a value that is missing or wrong, or a layout that is not supported.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    if version != "gemm":
        raise InputError(f"{where}: the AWQ version {version!r} is not supported. {_LAYOUTS}")
    bits = integer(where, config, "bits" if "bits" in config else "w_bit")
    if bits != 4:
        raise InputError(f"{where}: {bits} bits are not supported for AWQ. {_LAYOUTS}")
    return Awq(
        codes="int4",
        group=group_size(where, config, "group_size" if "group_size" in config else "q_group_size"),
        offset="zero" if boolean(where, config, "zero_point", True) else "none",
        skipped=strings(where, config, "modules_to_not_convert"),
    )


def write_config(info: Awq) -> dict[str, Any]:
    """The configuration that `read_config` reads as `info`."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": info.group or -1,
        "zero_point": info.offset == "zero",
        "version": "gemm",
        "modules_to_not_convert": list(info.skipped) or None,
    }


def tensor_names(module: str, shape: tuple[int, int], info: Awq) -> dict[str, Stored]:
    """The tensors of one matrix.

    Args:
      module: such as "model.layers.0.mlp.up_proj"; "" for names without one.
      shape: outputs and inputs.
      info: from `read_config`.

    Raises:
      InputError: outputs that words cannot hold.
    """
    info = of_module(info, module)
    outputs, inputs = shape
    _check_outputs(outputs, module)
    groups = -(-inputs // info.file_group(inputs))
    tensors = {
        "qweight": Stored((INT32,), ((inputs, outputs // 8),)),
        "qzeros": Stored((INT32,), ((groups, outputs // 8),)),
        "scales": Stored(FLOATS, ((groups, outputs),)),
    }
    return {full_name(module, name): stored for name, stored in tensors.items()}


def unpack(
    tensors: Mapping[str, np.ndarray], info: Awq, module: str = "", shape: tuple[int, int] | None = None
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
    qweight = matrix(tensors, module, "qweight", _HINT)
    found = (8 * qweight.shape[1], qweight.shape[0])
    check_tensors(tensors, tensor_names(module, found, info), module, _HINT)
    check_shape(module, found, shape)
    inputs, group = found[1], info.file_group(found[1])
    scales = tensors[full_name(module, "scales")]
    check_finite(full_name(module, "scales"), scales)
    zeros = _unpack(tensors[full_name(module, "qzeros")])
    if info.offset == "none" and words.integers(zeros).any():
        raise InputError(
            f"{place(module)}: the config says zero_point=false, so that all zero points are 8; qzeros has others. "
            "If the weights were quantised with zero points, the config must say zero_point=true."
        )
    return Codes(
        _unpack(qweight),
        cut(words.transposed(scales), inputs, group),
        None if info.offset == "none" else cut(zeros, inputs, group),
    )


def pack(codes: Codes, info: Awq, module: str = "") -> dict[str, np.ndarray]:
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
    _check_outputs(outputs, module)
    scales = joined(codes.scales, inputs, group, "scales")
    if codes.zeros is None:
        zeros = np.zeros(scales.shape, words.INT4)
    else:
        zeros = joined(codes.zeros, inputs, group, "zero points")
    tensors = {"qweight": _pack(codes.codes), "qzeros": _pack(zeros), "scales": words.transposed(scales)}
    return {full_name(module, name): tensor for name, tensor in tensors.items()}


def _check_outputs(outputs: int, module: str) -> None:
    if outputs % 8:
        raise InputError(f"{place(module)} has {outputs} outputs; AWQ files hold multiples of 8. Write GPTQ.")


def _unpack(packed: np.ndarray) -> np.ndarray:
    """int32 [I, O / 8] to int4 codes [O, I]."""
    data = words.transposed(packed).view(np.uint32) ^ np.uint32(0x88888888)
    columns, inputs = data.shape
    pairs = data.view(np.uint8).reshape(columns, inputs, 4)
    codes = np.empty((columns, 8, inputs), np.uint8)
    for i, output in enumerate(_ORDER):
        if i % 2:
            np.right_shift(pairs[:, :, i // 2], 4, out=codes[:, output])
        else:
            np.bitwise_and(pairs[:, :, i // 2], 15, out=codes[:, output])
    return codes.reshape(8 * columns, inputs).view(words.INT4)


def _pack(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_unpack`."""
    values = words.unsigned(codes).reshape(-1, 8, codes.shape[1])
    pairs = np.empty((values.shape[0], codes.shape[1], 4), np.uint8)
    for i in range(4):
        pairs[:, :, i] = values[:, _ORDER[2 * i]] | values[:, _ORDER[2 * i + 1]] << 4
    return words.transposed(pairs.view(np.int32)[:, :, 0])
