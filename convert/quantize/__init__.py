"""Quantising checkpoints: rounding to nearest, GPTQ, AWQ, int8 and float8, layer by layer."""

from convert.quantize.calibration import CalibrationText
from convert.quantize.quantizer import Outcome
from convert.quantize.recipe import Recipe
from convert.quantize.run import REPORT, Report, quantize

__all__ = ["REPORT", "CalibrationText", "Outcome", "Recipe", "Report", "quantize"]
