"""The configuration of compressed-tensors files."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from convert.quantized.info import (
    Activations,
    FormatInfo,
    boolean,
    can_be_quantized,
    group_size,
    integer,
    is_listed,
    strings,
)
from convert.quantized.scales import Strategy
from qwen_jax.errors import InputError

_log = logging.getLogger(__name__)

# `ignore` of files that are written: the linear layers of other programs that are no projections.
NOT_PROJECTIONS = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")

Format = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]
_FORMATS = {
    "int": ("pack-quantized", "int-quantized", "naive-quantized"),
    "float": ("float-quantized", "naive-quantized"),
}
_STRATEGIES = ("tensor", "channel", "group", "block")
_LAYOUTS = (
    "Supported of compressed-tensors are pack-quantized and int-quantized with 4 or 8 bits and float-quantized with 8; "
    "take such a version of the model, or a GPTQ, AWQ or bfloat16 one."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed(FormatInfo):
    """The configuration of a compressed-tensors checkpoint, or of one of its matrices.

    Attributes:
      format: how codes are stored.
      strategy: what shares a scale.
      block: outputs and inputs of a block, with the strategy "block".
      act_order: groups are not consecutive inputs (actorder "group").
      ignore: modules that are not quantised: names, classes, or regular expressions after "re:".
      groups: targets, as in `ignore`, and the configuration of the modules that match; () if it is this one for all
        linear layers.
    """

    method: ClassVar[str] = "compressed-tensors"
    format: Format
    strategy: Strategy
    block: tuple[int, int] | None = None
    act_order: bool = False
    ignore: tuple[str, ...] = ()
    groups: tuple[tuple[tuple[str, ...], "Compressed"], ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether the inputs are sorted by group in memory."""
        return self.act_order

    @property
    def scheme_group(self) -> int:
        """Inputs that share a scale, as `Scheme` counts them."""
        return self.block[1] if self.block else self.group

    def file_group(self, inputs: int) -> int:
        """Inputs of a group in the file."""
        return self.block[1] if self.block else super().file_group(inputs)

    def of(self, module: str) -> "Compressed | None":
        """How one module is quantised; see `FormatInfo.of`."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        if not can_be_quantized(module) or kind in self.ignore or _matches(module, self.ignore):
            return None
        # A whole name counts before an expression, and that before the class.
        groups = self.groups or ((("Linear",), self),)
        for match in (
            lambda targets: module in targets,
            lambda targets: _matches(module, targets),
            lambda targets: kind in targets,
        ):
            for targets, group in groups:
                if match(targets):
                    return dataclasses.replace(group, ignore=(), groups=())
        return None


def _matches(module: str, names: tuple[str, ...]) -> bool:
    return module in names or is_listed(module, [name for name in names if name.startswith("re:")])


def read_config(where: Path, config: Mapping[str, Any]) -> Compressed:
    """Reads `quantization_config` of config.json.

    Args:
      where: the file, for messages.
      config: its content.

    Raises:
      InputError: a value that is missing or wrong, or a layout that is not supported.
    """
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (isinstance(value, dict) and (value.get("format") == "dense" or not any(value.values()))):
            raise InputError(f"{where}: {key} of compressed-tensors is not supported. {_LAYOUTS}")
    if config.get("kv_cache_scheme"):
        _log.warning("%s: kv_cache_scheme is for the cache of the maker's server; it is not used.", where)
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise InputError(f"{where}: expected weights with the quantization_status 'compressed', got {status!r}.")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{where}: expected config_groups of compressed-tensors, an object, got {groups!r}.")
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise InputError(f"{where}: expected an object as {name} of config_groups, got {group!r}.")
        targets = strings(where, group, "targets")
        if not targets:
            raise InputError(f"{where}: {name} of config_groups has no targets.")
        found.append((targets, _group(where, name, group, config.get("format"))))
    ignore = strings(where, config, "ignore")
    uniform = len(found) == 1 and found[0][0] == ("Linear",)
    return dataclasses.replace(found[0][1], ignore=ignore, groups=() if uniform else tuple(found))


def _group(where: Path, name: str, group: Mapping[str, Any], common_format: Any) -> Compressed:
    """One group of the configuration."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InputError(f"{where}: {name} of config_groups does not say how weights are quantised. {_LAYOUTS}")
    bits, kind = integer(where, weights, "num_bits", 8), str(weights.get("type", "int")).lower()
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise InputError(f"{where}: weights of type {kind!r} with {bits} bits ({name}) are not supported. {_LAYOUTS}")
    activations = _activations(where, name, group.get("input_activations"), kind, bits)
    # The layout.
    stored = group.get("format") or common_format
    if stored is None:
        packed = kind == "int" and not group.get("input_activations")
        stored = "pack-quantized" if packed else f"{kind}-quantized"
    if stored not in _FORMATS[kind]:
        raise InputError(f"{where}: the format {stored!r} for {kind} weights ({name}) is not supported. {_LAYOUTS}")
    # What shares a scale.
    size = None if weights.get("group_size") is None else group_size(where, weights)
    strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size else "channel")
    strategy = str(strategy).lower()
    if strategy not in _STRATEGIES:
        raise InputError(f"{where}: the strategy {strategy!r} of weights ({name}) is not supported. {_LAYOUTS}")
    if (strategy == "group") != bool(size):
        raise InputError(f"{where}: the strategy {strategy!r} and group_size {size} of {name} contradict each other.")
    symmetric = boolean(where, weights, "symmetric", True)
    ordered = _act_order(where, weights.get("actorder"))
    if kind == "float" and (not symmetric or ordered):
        raise InputError(f"{where}: float8 weights with zero points or actorder ({name}) are not supported. {_LAYOUTS}")
    if ordered and strategy != "group":
        raise InputError(f"{where}: actorder 'group' needs the strategy 'group', {name} has {strategy!r}.")
    return Compressed(
        codes="float8_e4m3fn" if kind == "float" else "int4" if bits == 4 else "int8",
        group=size or 0,
        offset="none" if symmetric else "zero",
        activations=activations,
        format=stored,
        strategy=strategy,  # type: ignore[arg-type]
        block=_block(where, name, weights.get("block_structure")) if strategy == "block" else None,
        act_order=ordered,
    )


def _act_order(where: Path, value: Any) -> bool:
    """Whether the groups are not consecutive inputs."""
    if value in (None, False, "weight", "static"):
        return False
    if value in (True, "group", "dynamic"):
        return True
    raise InputError(f"{where}: expected actorder 'group', 'weight' or null, got {value!r}.")


def _block(where: Path, name: str, value: Any) -> tuple[int, int]:
    """Outputs and inputs of a block, from a list or from "128x128"."""
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() else 0 for part in value.split("x")]
    whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    if not whole or len(value) != 2:
        raise InputError(f"{where}: expected block_structure of two sizes ({name}), got {value!r}.")
    return value[0], value[1]


def _activations(where: Path, name: str, args: Any, kind: str, bits: int) -> Activations:
    """The dtype that activations are rounded to."""
    if not args:
        return "none"
    if not isinstance(args, dict):
        raise InputError(f"{where}: expected an object as input_activations of {name}, got {args!r}.")
    if bits == 4 or (args.get("num_bits", 8), str(args.get("type", "int")).lower()) != (8, kind):
        _log.warning(
            "%s: activations of %s have %s bits (%s); they are kept in bfloat16.",
            *(where, name, args.get("num_bits", 8), args.get("type", "int")),
        )
        return "none"
    if args.get("dynamic") is False:
        _log.warning("%s: static scales of activations (%s) are not used; each token gets its own.", where, name)
    return "int8" if kind == "int" else "float8_e4m3fn"


def write_config(info: Compressed) -> dict[str, Any]:
    """The configuration that `read_config` reads as `info`."""
    groups = info.groups or ((("Linear",), info),)
    formats = {group.format for _, group in groups}
    entries = {f"group_{i}": _written(targets, group) for i, (targets, group) in enumerate(groups)}
    if len(formats) > 1:
        for entry, (_, group) in zip(entries.values(), groups, strict=True):
            entry["format"] = group.format
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(info.ignore),
        "config_groups": entries,
    }


def _written(targets: tuple[str, ...], info: Compressed) -> dict[str, Any]:
    """One entry of config_groups."""
    weights: dict[str, Any] = {
        "num_bits": info.bits,
        "type": "float" if info.codes == "float8_e4m3fn" else "int",
        "symmetric": info.offset == "none",
        "strategy": info.strategy,
        "group_size": info.group or None,
        "dynamic": False,
    }
    if info.block is not None:
        weights["block_structure"] = list(info.block)
    if info.act_order:
        weights["actorder"] = "group"
    activations = None
    if info.activations != "none":
        kind = "int" if info.activations == "int8" else "float"
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
