"""Files with float8 weights: the method "fp8" of vLLM, AutoFP8 and transformers, and "fbgemm_fp8".

A matrix of O outputs and I inputs is stored as weight float8_e4m3fn [O, I] and a scale, and stands for
W[o, i] = weight[o, i] * scale. The scale is one number (weight_scale, or weight_scale_inv in transformers), one for
each output (weight_scale [O, 1]), or one for each block of outputs and inputs (weight_scale_inv
[ceil(O / rows), ceil(I / columns)]). In spite of its name weight_scale_inv is a factor, not a divisor.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from convert.quantized import words
from convert.quantized.codes import Codes, cut
from convert.quantized.info import (
    FLOATS,
    FormatInfo,
    Stored,
    can_be_quantized,
    check_codes,
    check_finite,
    check_form,
    check_shape,
    check_tensors,
    full_name,
    is_listed,
    matrix,
    of_module,
    place,
    strings,
)
from convert.quantized.scales import Strategy, folded, scale_shapes, spread
from qwen_jax.errors import InputError

_log = logging.getLogger(__name__)

ScaleName = Literal["weight_scale", "weight_scale_inv"]
_NAMES: tuple[ScaleName, ScaleName] = ("weight_scale", "weight_scale_inv")
_HINT = "Check weight_block_size of the quantisation config, and that the download is complete."
_STATIC = ("input_scale", "activation_scale")  # Scales of activations that calibration found; each token gets its own.
_LAYOUTS = "Supported are float8_e4m3fn weights with float scales; take that version of the model, or a bfloat16 one."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(FormatInfo):
    """The configuration of a checkpoint of float8 weights, or of one of its matrices.

    Attributes:
      strategy: what shares a scale in files that are written. A file that is read may also have one for each output
        where this is "tensor".
      block: outputs and inputs of a block, with the strategy "block".
      scale_name: of the tensor of scales in files that are written.
      skipped: parts of the names of modules that are not quantised (ignored_layers, modules_to_not_convert).
    """

    method: ClassVar[str] = "fp8"
    strategy: Strategy = "tensor"
    block: tuple[int, int] | None = None
    scale_name: ScaleName = "weight_scale"
    skipped: tuple[str, ...] = ()

    @property
    def scheme_group(self) -> int:
        """Inputs that share a scale, as `Scheme` counts them."""
        return self.block[1] if self.block else self.group

    def file_group(self, inputs: int) -> int:
        """Inputs of a group in the file."""
        return self.block[1] if self.block else super().file_group(inputs)

    def of(self, module: str) -> Self | None:
        """How one module is quantised; see `FormatInfo.of`."""
        plain = module.endswith("embed_tokens") or not can_be_quantized(module)
        if plain or is_listed(module, self.skipped):
            return None
        return dataclasses.replace(self, skipped=())


def read_config(where: Path, config: Mapping[str, Any]) -> Fp8:
    """Reads `quantization_config` of config.json.

    Args:
      where: the file, for messages.
      config: its content.

    Raises:
      InputError: a value that is missing or wrong, or a layout that is not supported.
    """
    for key, usual in (("fmt", "e4m3"), ("scale_fmt", "float"), ("expert_dtype", "fp8")):
        if config.get(key, usual) not in (usual, None):
            raise InputError(f"{where}: {key} {config[key]!r} is not supported for fp8. {_LAYOUTS}")
    scheme = str(config.get("activation_scheme") or "dynamic").lower()
    if scheme not in ("dynamic", "static"):
        raise InputError(f"{where}: expected activation_scheme 'dynamic' or 'static', got {scheme!r}.")
    if scheme == "static":
        _log.warning("%s: static scales of activations are not used; each token gets its own.", where)
    block = config.get("weight_block_size")
    if block is not None:
        sizes = isinstance(block, (list, tuple)) and all(type(size) is int and size > 0 for size in block)
        if not sizes or len(block) != 2:
            raise InputError(f"{where}: expected weight_block_size of two positive sizes, got {block!r}.")
        block = (block[0], block[1])
    # vLLM and transformers have different names for the list.
    skipped = strings(where, config, "ignored_layers") + strings(where, config, "modules_to_not_convert")
    rows = config.get("quant_method") == "fbgemm_fp8"
    return Fp8(
        codes="float8_e4m3fn",
        activations="float8_e4m3fn",
        strategy="block" if block else "channel" if rows else "tensor",
        block=block,
        scale_name="weight_scale_inv" if block else "weight_scale",
        skipped=tuple(dict.fromkeys(skipped)),
    )


def write_config(info: Fp8) -> dict[str, Any]:
    """The configuration that `read_config` reads as `info`."""
    if info.strategy == "channel":
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": list(info.skipped) or None,
        }
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(info.block) if info.block else None,
        "ignored_layers": list(info.skipped),
        "modules_to_not_convert": list(info.skipped) or None,
    }


def tensor_names(module: str, shape: tuple[int, int], info: Fp8) -> dict[str, Stored]:
    """The tensors of one matrix; it has one of the tensors of scales.

    Args:
      module: such as "model.layers.0.mlp.up_proj"; "" for names without one.
      shape: outputs and inputs.
      info: from `read_config`.
    """
    info = of_module(info, module)
    shapes = scale_shapes(info.strategy, shape, info.file_group(shape[1]), info.block)
    if info.strategy != "block":
        shapes = scale_shapes("tensor", shape, 0, None) + scale_shapes("channel", shape, 0, None)
    tensors: dict[str, Stored] = {"weight": Stored((words.FLOAT8,), (shape,))}
    tensors |= {name: Stored(FLOATS, shapes, optional=True) for name in _NAMES}
    tensors |= {name: Stored(FLOATS, ((), (1,)), optional=True) for name in _STATIC}
    return {full_name(module, name): stored for name, stored in tensors.items()}


def unpack(
    tensors: Mapping[str, np.ndarray], info: Fp8, module: str = "", shape: tuple[int, int] | None = None
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
    weight = matrix(tensors, module, "weight", _HINT)
    found = (weight.shape[0], weight.shape[1])
    check_tensors(tensors, tensor_names(module, found, info), module, _HINT)
    check_shape(module, found, shape)
    held = [full_name(module, name) for name in _NAMES if full_name(module, name) in tensors]
    if len(held) != 1:
        raise InputError(
            f"{place(module)} needs weight_scale or weight_scale_inv, and has {len(held)} of them. {_HINT}"
        )
    scales = tensors[held[0]]
    check_codes(full_name(module, "weight"), weight)
    check_finite(held[0], scales)
    return Codes(weight, cut(spread(scales, found[0], info.block), found[1], info.file_group(found[1])))


def pack(codes: Codes, info: Fp8, module: str = "") -> dict[str, np.ndarray]:
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
    inputs = codes.codes.shape[1]
    scales = folded(codes.scales, inputs, info.file_group(inputs), info.strategy, info.block, "scales")
    tensors = {"weight": codes.codes, info.scale_name: scales}
    return {full_name(module, name): tensor for name, tensor in tensors.items()}
