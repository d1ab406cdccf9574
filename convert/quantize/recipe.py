"""What a quantised model is to be: method, bits, groups and file format, checked before anything is read."""

import dataclasses
from typing import Literal, get_args

from convert.quantize.fp8 import fp8_grid
from convert.quantize.grid import Grid
from convert.quantize.int8 import int8_grid
from convert.quantize.layer import Matrix, matrices
from convert.quantized import FormatInfo, tensor_names
from convert.quantized.awq import Awq
from convert.quantized.compressed import Compressed
from convert.quantized.compressed_config import NOT_PROJECTIONS
from convert.quantized.gptq import Gptq
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

Method = Literal["gptq", "awq", "rtn", "fp8", "int8"]
FileFormat = Literal["gptq", "awq", "compressed-tensors"]
_CALIBRATED = ("gptq", "awq")
_SIZES = (128, 64, 32, 16)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantised.

    Attributes:
      method: "gptq", "awq", "rtn" (round to nearest), "fp8" or "int8".
      bits: 4 or 8; by default 4 for gptq, awq and rtn, 8 for the others.
      group: inputs that share a scale, 0 for all inputs of an output; by default 128 for gptq, awq and rtn, else 0.
      symmetric: no zero points; by default True except for awq.
      desc_act: GPTQ rounds the inputs in the order of their size, and groups follow this order.
      format: of the files; by default gptq for gptq and rtn, awq for awq, compressed-tensors for fp8 and int8.
      damping: of GPTQ's Hessian, in units of its mean diagonal.
      clip: whether AWQ searches how much of each group's range is kept.

    Raises:
      InputError: choices that do not fit together.
    """

    method: Method
    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    format: FileFormat | None = None
    damping: float = 0.01
    clip: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"Unknown method {self.method!r}; expected one of {', '.join(get_args(Method))}.")
        by_weights = self.method in ("gptq", "awq", "rtn")
        defaults = {
            "bits": 4 if by_weights else 8,
            "group": 128 if by_weights else 0,
            "symmetric": self.method != "awq",
            "format": {"gptq": "gptq", "rtn": "gptq", "awq": "awq"}.get(self.method, "compressed-tensors"),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.format not in get_args(FileFormat):
            raise InputError(f"Unknown format {self.format!r}; expected one of {', '.join(get_args(FileFormat))}.")
        if self.bits not in (4, 8):
            raise InputError(f"Expected 4 or 8 bits, got {self.bits}.")
        if self.group is None or self.group < 0:
            raise InputError(f"Expected a positive group, or 0 for all inputs of an output; got {self.group}.")
        if not 0 < self.damping < float("inf"):
            raise InputError(f"The damping of GPTQ must be positive, got {self.damping}.")
        self._check_together()

    def _check_together(self) -> None:
        """Refuses what no file can hold."""
        if self.method not in ("gptq", "awq", "rtn") and (self.bits != 8 or not self.symmetric):
            raise InputError(f"{self.method} has 8 bits and no zero points. For other codes use gptq, awq or rtn.")
        if self.method == "fp8" and self.group:
            raise InputError("fp8 has one scale for each output. Leave out the group, or use int8, gptq, awq or rtn.")
        if self.method in ("fp8", "int8") and self.format != "compressed-tensors":
            raise InputError(f"{self.method} is written as compressed-tensors, not as {self.format}.")
        if self.method == "awq" and self.bits != 4:
            raise InputError("AWQ has 4 bits. For 8 bits use gptq, rtn, int8 or fp8.")
        if self.format == "awq" and self.bits != 4:
            raise InputError("Files of the format awq have 4 bits. Use the format gptq or compressed-tensors.")
        if self.desc_act and self.method != "gptq":
            raise InputError(f"desc_act is an order in which GPTQ rounds; {self.method} has none. Use the method gptq.")
        if self.desc_act and self.format == "awq":
            raise InputError("Files of the format awq have no order of inputs. Use the format gptq for desc_act.")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method computes with the activations of a text."""
        return self.method in _CALIBRATED

    def grid(self, stored: str) -> Grid:
        """The grid of the weights.

        Args:
          stored: dtype of the checkpoint. Scales of packed integers in compressed-tensors files have it, where it is
            bfloat16 or float16: vLLM rounds them to it. With W8A8 they are float32, in GPTQ and AWQ files float16.
        """
        assert self.group is not None
        assert self.symmetric is not None
        if self.format != "compressed-tensors":
            scales = "float16"
        else:
            packed = self.group or self.method not in ("fp8", "int8")
            scales = stored if packed and stored in ("bfloat16", "float16") else "float32"
        if self.method == "fp8":
            return fp8_grid(scales)
        if self.method == "int8":
            return int8_grid(self.group, scales)[0]
        return Grid("int4" if self.bits == 4 else "int8", self.group, self.symmetric, scales)

    def info(self) -> FormatInfo:
        """The configuration of the files."""
        grid = self.grid("bfloat16")
        common = {"codes": grid.codes, "group": grid.group, "offset": "none" if grid.symmetric else "zero"}
        if self.format == "awq":
            return Awq(**common)  # type: ignore[arg-type]
        if self.format == "gptq":
            # Zero points minus 1, as the first version has them, wrap around where one is 0.
            version = "gptq" if grid.symmetric else "gptq_v2"
            return Gptq(**common, desc_act=self.desc_act, version=version)  # type: ignore[arg-type]
        activations: Literal["none", "int8", "float8_e4m3fn"] = "none"
        layout = "pack-quantized"
        if self.method == "fp8":
            activations, layout = "float8_e4m3fn", "float-quantized"
        if self.method == "int8":
            activations = int8_grid(grid.group)[1]
            layout = "pack-quantized" if activations == "none" else "int-quantized"
        return Compressed(
            **common,  # type: ignore[arg-type]
            activations=activations,
            format=layout,  # type: ignore[arg-type]
            strategy="group" if grid.group else "channel",
            act_order=self.desc_act and grid.group > 0,
            ignore=NOT_PROJECTIONS,
        )

    def check(self, config: ModelConfig) -> None:
        """Checks that the matrices of a model can be quantised so.

        Raises:
          InputError: groups that do not divide the inputs of a matrix, or sizes that the format cannot hold.
        """
        found: dict[tuple[int, int], Matrix] = {}
        for number in range(config.num_layers):
            for matrix in matrices(config, number):
                found.setdefault(matrix.shape, matrix)
        group = self.group or 1
        uneven = [matrix for matrix in found.values() if matrix.shape[1] % group]
        if uneven:
            sizes = [size for size in _SIZES if all(matrix.shape[1] % size == 0 for matrix in found.values())]
            work = "".join(f"--group {size}, " for size in sizes)
            raise InputError(
                f"Groups of {group} inputs do not divide the {uneven[0].shape[1]} inputs of {uneven[0].module}. "
                f"For this model works: {work}--group 0 (all inputs of an output)."
            )
        info = self.info()
        for matrix in found.values():
            tensor_names(matrix.module, matrix.shape, info)
