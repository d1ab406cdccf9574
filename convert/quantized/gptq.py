"""GPTQ files, as AutoGPTQ and GPTQModel write them.

A matrix of O outputs and I inputs with b bits and groups of g inputs is stored as

| tensor  | dtype, shape                      | packed along |
|---------|-----------------------------------|--------------|
| qweight | int32 [ceil(I b / 32), O]         | inputs       |
| qzeros  | int32 [ceil(I / g), ceil(O b / 32)] | outputs    |
| scales  | float [ceil(I / g), O]            |              |
| g_idx   | int32 [I]                         |              |

and stands for W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]). Files of the format "gptq" store z - 1, those
of "gptq_v2" store z. Where z is 0, AutoGPTQ adds the 1 to each code modulo 2^b; GPTQModel adds it to all codes of a
word in one addition, whose carries run into the codes above. What GPTQModel wrote is therefore read its way.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

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
    expression,
    full_name,
    group_size,
    integer,
    matrix,
    of_module,
    place,
    strings,
)
from convert.quantized.order import groups_of, sorted_by_group
from qwen_jax.errors import InputError

_HINT = "Check bits, group_size and sym of the quantisation config, and that the download is complete."
# The 1 that v1 files subtract from every zero point of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq(FormatInfo):
    """The configuration of a GPTQ checkpoint, or of one of its matrices.

    Attributes:
      desc_act: the inputs were quantised in the order of their activations.
      static_groups: with desc_act, groups are nevertheless consecutive inputs.
      version: "gptq" stores zero points minus 1, "gptq_v2" as they are.
      quantizer: the programs that wrote the file, as "gptqmodel:2.0.0".
      lm_head: whether the head is quantised.
      dynamic: rules for modules, the first that matches counts: a regular expression for the start of the name, and
        the keys of the configuration that it changes, or None if it leaves the modules out.
      blocks: the ends of the names of the quantised modules of a layer; None if all projections are.
    """

    method: ClassVar[str] = "gptq"
    desc_act: bool = False
    static_groups: bool = False
    version: Literal["gptq", "gptq_v2"] = "gptq"
    quantizer: tuple[str, ...] = ()
    lm_head: bool = False
    dynamic: tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...] = ()
    blocks: tuple[str, ...] | None = None

    @property
    def ordered(self) -> bool:
        """Whether the inputs are sorted by group in memory."""
        return self.desc_act and not self.static_groups and self.group > 0

    @property
    def in_words(self) -> bool:
        """Whether the 1 was subtracted from whole words of zero points."""
        return any(program.startswith("gptqmodel") for program in self.quantizer)

    def of(self, module: str) -> Self | None:
        """How one module is quantised; see `FormatInfo.of`."""
        if not can_be_quantized(module) or module.endswith("embed_tokens"):
            return None
        if module == "lm_head":
            if not self.lm_head:
                return None
        elif self.blocks is not None and not any(f".{module}".endswith(f".{name}") for name in self.blocks):
            return None
        resolved = dataclasses.replace(self, dynamic=(), blocks=None)
        for pattern, changes in self.dynamic:
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
                return None if changes is None else dataclasses.replace(resolved, **_fields(dict(changes)))
        return resolved


def _fields(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a configuration as fields of `Gptq`."""
    fields: dict[str, Any] = {key: changes[key] for key in ("desc_act", "static_groups") if key in changes}
    if "bits" in changes:
        fields["codes"] = f"int{changes['bits']}"
    if "group_size" in changes:
        fields["group"] = max(changes["group_size"], 0)
    if "sym" in changes:
        fields["offset"] = "none" if changes["sym"] else "zero"
    return fields


def read_config(where: Path, config: Mapping[str, Any]) -> Gptq:
    """Reads `quantization_config` of config.json, or quantize_config.json.

    Args:
      where: the file, for messages.
      config: its content.

    Raises:
      InputError: a value that is missing or wrong, or a layout that is not supported.
    """
    if config.get("is_marlin_format") or config.get("is_bitblas_format"):
        raise InputError(f"{where}: the weights were repacked for Marlin or BitBLAS. {_LAYOUTS}")
    versions = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key) is not None}
    if len(versions) > 1:
        raise InputError(f"{where}: checkpoint_format and format contradict each other: {', '.join(sorted(versions))}.")
    version = versions.pop() if versions else "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise InputError(f"{where}: checkpoint_format {version!r} is not supported. {_LAYOUTS}")
    if config.get("pack_dtype", "int32") not in ("int32", None):
        raise InputError(f"{where}: pack_dtype {config['pack_dtype']!r} is not supported; expected int32. {_LAYOUTS}")
    meta = config.get("meta") or {}
    if not isinstance(meta, dict):
        raise InputError(f"{where}: expected an object as meta of the quantisation, got {meta!r}.")
    quantizer = meta.get("quantizer") or []
    quantizer = strings(where, {"quantizer": [quantizer] if isinstance(quantizer, str) else quantizer}, "quantizer")
    settings = _settings(where, config)
    return Gptq(
        **_fields({"desc_act": False, "sym": True, **settings}),
        version="gptq" if version == "gptq" else "gptq_v2",
        quantizer=tuple(item.lower() for item in quantizer),
        static_groups=boolean(where, {**meta, **config}, "static_groups", False),
        lm_head=boolean(where, config, "lm_head", False),
        dynamic=_dynamic(where, config.get("dynamic") or {}),
        blocks=_blocks(where, config.get("modules_in_block_to_quantize")),
    )


_LAYOUTS = "Supported are gptq and gptq_v2 in int32 words with 4 or 8 bits; take that version of the model."


def _settings(where: Path, config: Mapping[str, Any], rule: bool = False) -> dict[str, Any]:
    """The checked keys that rules may change; a rule may lack all of them, and has others that made the file."""
    found: dict[str, Any] = {}
    if not rule or "bits" in config:
        found["bits"] = integer(where, config, "bits")
        if found["bits"] not in (4, 8):
            raise InputError(f"{where}: {found['bits']} bits are not supported for GPTQ. {_LAYOUTS}")
    if not rule or "group_size" in config:
        found["group_size"] = group_size(where, config) or -1
    for key in ("desc_act", "sym", *(("static_groups",) if rule else ())):
        if config.get(key) is not None:
            found[key] = boolean(where, config, key)
    return found


def _dynamic(where: Path, rules: Any) -> tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]:
    """The rules for modules in their order."""
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) or rule is False for rule in rules.values()):
        raise InputError(f"{where}: expected an object of objects as dynamic of the quantisation, got {rules!r}.")
    result: list[tuple[str, tuple[tuple[str, Any], ...] | None]] = []
    for pattern, rule in rules.items():
        expression(where, "dynamic", pattern.removeprefix("+:").removeprefix("-:"))
        if pattern.startswith("-:") or rule is False:
            result.append((pattern, None))
            continue
        other = sorted({"method", "quant_method", "format", "checkpoint_format", "pack_dtype"} & set(rule))
        if other:
            raise InputError(f"{where}: the rule {pattern!r} of dynamic changes {', '.join(other)}. {_LAYOUTS}")
        result.append((pattern, tuple(_settings(where, rule, rule=True).items())))
    return tuple(result)


def _blocks(where: Path, value: Any) -> tuple[str, ...] | None:
    """The modules of a layer that are quantised, from a list of lists."""
    if value is None:
        return None
    names = [name for part in value for name in (part if isinstance(part, list) else [part])] if value else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: expected lists of names as modules_in_block_to_quantize, got {value!r}.")
    return tuple(names)


def write_config(info: Gptq) -> dict[str, Any]:
    """The configuration that `read_config` reads as `info`; for config.json and for quantize_config.json."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": info.bits,
        "group_size": info.group or -1,
        "desc_act": info.desc_act,
        "static_groups": info.static_groups,
        "sym": info.offset == "none",
        "lm_head": info.lm_head,
        "checkpoint_format": info.version,
        "pack_dtype": "int32",
    }
    if info.quantizer:
        config["meta"] = {"quantizer": list(info.quantizer)}
    if info.dynamic:
        config["dynamic"] = {pattern: dict(changes or ()) for pattern, changes in info.dynamic}
        for pattern, changes in info.dynamic:
            if changes is None and not pattern.startswith("-:"):
                config["dynamic"][pattern] = False
    if info.blocks is not None:
        config["modules_in_block_to_quantize"] = [[name] for name in info.blocks]
    return config


def tensor_names(module: str, shape: tuple[int, int], info: Gptq) -> dict[str, Stored]:
    """The tensors of one matrix.

    Args:
      module: such as "model.layers.0.mlp.up_proj"; "" for names without one.
      shape: outputs and inputs.
      info: from `read_config`.
    """
    info = of_module(info, module)
    outputs, inputs = shape
    groups = -(-inputs // info.file_group(inputs))
    tensors = {
        "qweight": Stored((INT32,), ((words.count(inputs, info.bits), outputs),)),
        "qzeros": Stored((INT32,), ((groups, words.count(outputs, info.bits)),)),
        "scales": Stored(FLOATS, ((groups, outputs),)),
        "g_idx": Stored((INT32,), ((inputs,),), optional=not info.ordered),
    }
    return {full_name(module, name): stored for name, stored in tensors.items()}


def unpack(
    tensors: Mapping[str, np.ndarray], info: Gptq, module: str = "", shape: tuple[int, int] | None = None
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
    # The sizes, which the tensors give themselves.
    qweight, scales = (matrix(tensors, module, name, _HINT) for name in ("qweight", "scales"))
    g_idx = tensors.get(full_name(module, "g_idx"))
    found = (scales.shape[1], qweight.shape[0] * 32 // info.bits if g_idx is None else g_idx.size)
    check_tensors(tensors, tensor_names(module, found, info), module, _HINT)
    check_shape(module, found, shape)
    outputs, inputs = found
    group = info.file_group(inputs)
    check_finite(full_name(module, "scales"), scales)
    # Codes, zero points and the order of the inputs.
    order = _order(g_idx, inputs, group, info, module)
    codes = words.unpack_columns(qweight, info.bits, inputs, order)
    zeros = words.transposed(_zeros(tensors[full_name(module, "qzeros")], outputs, info))
    if info.offset == "none":
        _check_symmetric(zeros, info, module)
    return Codes(
        codes,
        cut(words.transposed(scales), inputs, group),
        None if info.offset == "none" else cut(zeros, inputs, group),
        order=order,
    )


def _zeros(qzeros: np.ndarray, outputs: int, info: Gptq) -> np.ndarray:
    """The zero points [groups, outputs], shifted as the codes are."""
    if info.version == "gptq" and info.in_words:
        qzeros = (qzeros.view(np.uint32) + np.uint32(_ONES[info.bits])).view(np.int32)
    zeros = words.unpack(np.ascontiguousarray(qzeros), info.bits, outputs)
    if info.version == "gptq" and not info.in_words:
        zeros = words.from_integers(words.integers(zeros) + np.int8(1), info.bits)
    return zeros


def _check_symmetric(zeros: np.ndarray, info: Gptq, module: str) -> None:
    """Raises InputError if zero points, which symmetric quantisation has in the middle, are elsewhere."""
    values = words.integers(zeros)
    if values.any():
        middle = 1 << (info.bits - 1)
        found = int(values[values != 0][0]) + middle
        other = "gptq_v2" if info.version == "gptq" else "gptq"
        raise InputError(
            f"{place(module)}: the config says sym=true, so that all zero points are {middle}; qzeros has {found}. "
            + (f"Check whether checkpoint_format should be {other!r}." if found == middle + 1 else "")
            + (f"Check whether checkpoint_format should be {other!r}." if found == middle - 1 else "")
            + " If the weights were quantised without symmetry, the config must say sym=false."
        )


def _order(g_idx: np.ndarray | None, inputs: int, group: int, info: Gptq, module: str) -> np.ndarray | None:
    """Which input each place holds when the inputs are sorted by group; None if they are in their own order."""
    if g_idx is None:
        return None
    name = full_name(module, "g_idx")
    if info.ordered:
        return sorted_by_group(g_idx, group, name, _HINT)
    if not np.array_equal(g_idx, groups_of(None, inputs, group)):
        raise InputError(
            f"{name} is not input // {group}, which the config promises (desc_act={str(info.desc_act).lower()}, "
            f"static_groups={str(info.static_groups).lower()}). Set desc_act to true and static_groups to false in the "
            "config if the file was quantised so."
        )
    return None


def pack(codes: Codes, info: Gptq, module: str = "") -> dict[str, np.ndarray]:
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
    group = info.file_group(inputs)
    # Zero points. Where there are none, they are in the middle.
    scales = joined(codes.scales, inputs, group, "scales")
    if codes.zeros is None:
        zeros = np.zeros(scales.shape, codes.codes.dtype)
    else:
        zeros = joined(codes.zeros, inputs, group, "zero points")
    if info.version == "gptq" and not info.in_words:
        zeros = words.from_integers(words.integers(zeros) - np.int8(1), info.bits)
    qzeros = words.pack(words.transposed(zeros))
    if info.version == "gptq" and info.in_words:
        qzeros = (qzeros.view(np.uint32) - np.uint32(_ONES[info.bits])).view(np.int32)
    tensors = {
        "qweight": words.pack_columns(codes.codes, codes.order),
        "qzeros": qzeros,
        "scales": words.transposed(scales),
        "g_idx": groups_of(codes.order, inputs, group),
    }
    return {full_name(module, name): tensor for name, tensor in tensors.items()}
