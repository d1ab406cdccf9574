"""Quantising one layer: its inputs are collected, its matrices rounded, and its outputs computed with them."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from convert.quantize.awq import awq, search_scales
from convert.quantize.folding import fold_into_norm, fold_into_up, fold_into_v, shared_by_heads
from convert.quantize.forward import BoundLayer, Forward
from convert.quantize.gptq import gptq
from convert.quantize.grid import Grid, Rounded, relative_error, to_codes
from convert.quantize.layer import STAGES, Layer, Matrix
from convert.quantize.recipe import Recipe
from convert.quantize.rtn import rtn
from convert.quantize.statistics import Statistics
from convert.quantized import pack
from qwen_jax.errors import InputError

_log = logging.getLogger(__name__)

# Queries and keys multiply each other: AWQ leaves their ranges whole.
_NOT_CLIPPED = ("attention.q.weight", "attention.k.weight")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A quantised matrix.

    Attributes:
      module: its Hugging Face name.
      outputs, inputs: its size.
      error: norm of the change of its outputs over the norm of its outputs, on the calibration rows; without a text,
        of its weights.
      nearest_error: the same by rounding to nearest, on the same grid.
      rows: calibration rows that it saw; 0 without a text.
      all_rows: an expert was sent fewer rows than it has inputs, and was given the rows of all experts.
      damping: of GPTQ, if that was used.
      alpha: of AWQ's scales, if they were used.
    """

    module: str
    outputs: int
    inputs: int
    error: float
    nearest_error: float
    rows: int = 0
    all_rows: bool = False
    damping: float | None = None
    alpha: float | None = None


class Quantizer:
    """Quantises layers of one model, one after the other."""

    def __init__(
        self, recipe: Recipe, grid: Grid, forward: Forward | None, batch: int, advance: Callable[[], None]
    ) -> None:
        """
        Args:
          recipe: the method and the format.
          grid: of the weights.
          forward: runs parts of layers; None without a calibration text.
          batch: calibration rows that are run together.
          advance: called after each matrix.
        """
        self._recipe, self._grid, self._forward, self._batch, self._advance = recipe, grid, forward, batch, advance
        self._info = recipe.info()

    def quantize(self, layer: Layer, x_RTD: np.ndarray | None) -> tuple[dict[str, np.ndarray], list[Outcome]]:
        """Quantises a layer.

        Args:
          layer: the layer, whose weights are replaced by the quantised ones.
          x_RTD: float32, its inputs on all calibration rows; replaced by its outputs. None without a text.

        Returns:
          The tensors of the layer as the file has them, and how well each matrix was rounded.

        Raises:
          InputError: weights or activations that are infinite or not a number.
        """
        tensors: dict[str, np.ndarray] = {}
        outcomes: list[Outcome] = []
        rounding = self._by_awq if self._recipe.method == "awq" else self._in_turn
        for matrix, rounded, outcome in rounding(layer, x_RTD):
            if not np.isfinite(outcome.error):
                raise InputError(
                    f"{matrix.module} has weights or inputs that are infinite or not a number, or that float32 cannot "
                    "square. Check the checkpoint with qwen-jax verify."
                )
            tensors.update(pack(to_codes(rounded, self._grid), self._info, matrix.module))
            outcomes.append(outcome)
            self._advance()
        return {**layer.plain_tensors(), **tensors}, outcomes

    def _in_turn(self, layer: Layer, x_RTD: np.ndarray | None) -> Iterator[tuple[Matrix, Rounded, Outcome]]:
        """Rounds the matrices in the order in which the layer computes them: each sees what those before it give."""
        few: frozenset[int] = frozenset()
        for stage in STAGES:
            found: dict[str, Statistics] = {}
            if self._forward is not None and x_RTD is not None:
                found = self._collect(self._forward.bind(layer), (stage,), x_RTD, few, before=False)
                few = self._few(layer, found) if stage == "gate_up" else few
            for matrix in layer.matrices:
                if matrix.stage == stage:
                    statistics = found.get(matrix.inputs)
                    if matrix.expert in few and stage == "gate_up":
                        statistics = found["gate_up"]
                    rounded, outcome = self._round(layer.weight(matrix), matrix, statistics)
                    layer.set_weight(matrix, rounded.values_OI)
                    yield matrix, rounded, dataclasses.replace(outcome, all_rows=matrix.expert in few)
            if stage == "o" and self._forward is not None and x_RTD is not None:
                self._replace(x_RTD, self._forward.bind(layer).after_attention)
        if self._forward is not None and x_RTD is not None:
            self._replace(x_RTD, self._forward.bind(layer).output)

    def _round(self, weight_OI: jax.Array, matrix: Matrix, statistics: Statistics | None) -> tuple[Rounded, Outcome]:
        """Rounds a matrix by GPTQ or to nearest."""
        nearest = rtn(weight_OI, self._grid)
        if statistics is None:
            norm = float(np.linalg.norm(weight_OI))
            error = float(np.linalg.norm(nearest.values_OI - weight_OI)) / max(norm, 1e-30)
            return nearest, Outcome(matrix.module, *matrix.shape, error, error)
        hessian = statistics.hessian_II
        before = float(relative_error(weight_OI, nearest.values_OI, hessian))
        outcome = Outcome(matrix.module, *matrix.shape, before, before, statistics.rows)
        if self._recipe.method != "gptq":
            return nearest, outcome
        try:
            rounded, damping = gptq(
                weight_OI, hessian, self._grid, damping=self._recipe.damping, act_order=self._recipe.desc_act
            )
        except FloatingPointError as error:
            raise InputError(f"{matrix.module}: {error} Check the weights, or give another calibration text.") from None
        if damping != self._recipe.damping:
            _log.warning("%s needed a damping of %g.", matrix.module, damping)
        after = float(relative_error(weight_OI, rounded.values_OI, hessian))
        return rounded, dataclasses.replace(outcome, error=after, damping=damping)

    def _by_awq(self, layer: Layer, x_RTD: np.ndarray | None) -> Iterator[tuple[Matrix, Rounded, Outcome]]:
        """Scales the inputs of all matrices, and rounds them then."""
        assert self._forward is not None
        assert x_RTD is not None
        bound = self._forward.bind(layer)
        found = self._collect(bound, STAGES, x_RTD, frozenset(), before=True)
        few = self._few(layer, found)
        if few:
            every = self._collect(bound, ("down",), x_RTD, few, before=True)
            for expert in few:
                found[f"experts.gate_up.{expert}"] = found["gate_up"]
                found[f"experts.down.{expert}"] = every[f"experts.down.{expert}"]
        del bound
        nearest: dict[str, float] = {}
        for matrix in layer.matrices:
            weight, hessian = layer.weight(matrix), found[matrix.inputs].hessian_II
            nearest[matrix.module] = float(relative_error(weight, rtn(weight, self._grid).values_OI, hessian))
        scales: dict[str, tuple[jax.Array, float]] = {}
        for together in _shared_inputs(layer):
            shared = self._scale(layer, together, found)
            scales.update({matrix.module: shared for matrix in together})
        for matrix in layer.matrices:
            s_I, alpha = scales[matrix.module]
            weight, hessian = layer.weight(matrix), found[matrix.inputs].hessian_II / s_I / s_I[:, None]
            clip = self._recipe.clip and matrix.path not in _NOT_CLIPPED
            rounded = awq(weight, hessian, self._grid, clip)
            layer.set_weight(matrix, rounded.values_OI)
            error = float(relative_error(weight, rounded.values_OI, hessian))
            rows, all_rows = found[matrix.inputs].rows, matrix.expert in few
            before = nearest[matrix.module]
            yield matrix, rounded, Outcome(matrix.module, *matrix.shape, error, before, rows, all_rows, alpha=alpha)
        del found
        bound = self._forward.bind(layer)
        self._replace(x_RTD, lambda x: bound.output(bound.after_attention(x)))

    def _scale(self, layer: Layer, matrices: list[Matrix], found: dict[str, Statistics]) -> tuple[jax.Array, float]:
        """Finds the scales of the inputs that matrices share, and folds them in.

        Returns:
          What the weights were multiplied by, and alpha.
        """
        assert self._forward is not None
        config, stage = self._forward.config, matrices[0].stage
        # All experts have the same inputs; `found` has those of all tokens under the stage's own name.
        activity = np.asarray(found[stage if stage == "gate_up" else matrices[0].inputs].activity_I)
        if stage == "o":
            activity = shared_by_heads(activity, config.num_heads, config.num_kv_heads)
        weights = [layer.weight(matrix) for matrix in matrices]
        # An error counts as often as there are rows.
        hessians = [found[matrix.inputs].squares_II for matrix in matrices]
        scales, alpha = search_scales(weights, hessians, jax.numpy.asarray(activity), self._grid)
        del weights, hessians
        used = np.asarray(scales)
        if stage in ("qkv", "gate_up"):
            used = fold_into_norm(layer, stage, used)
        elif stage == "o":
            fold_into_v(layer, used)
        else:
            fold_into_up(layer, matrices[0], used)
        return jax.device_put(used, may_alias=False), alpha

    def _collect(
        self, bound: BoundLayer, stages: tuple[str, ...], x_RTD: np.ndarray, everything: frozenset[int], before: bool
    ) -> dict[str, Statistics]:
        """Sums over the inputs of stages, by `Matrix.inputs`.

        Args:
          bound: the layer.
          stages: some of `STAGES`.
          x_RTD: the residual stream.
          everything: experts that are given all rows.
          before: x_RTD is the stream before the layer for all stages; otherwise for "gate_up" and "down" that after
            attention.
        """
        found: dict[str, Statistics] = {}

        def add(name: str, x_NI: jax.Array, rows: int | None = None) -> None:
            found[name] = (found.get(name) or Statistics.empty(x_NI.shape[1])).plus(x_NI, rows)

        for x in self._batches(x_RTD):
            later = bound.after_attention(x) if before else x
            h_ND: jax.Array | None = None
            for stage in stages:
                add(stage, bound.inputs(stage, x if stage in ("qkv", "o") else later))
                if bound.has_experts and stage in ("gate_up", "down"):
                    h_ND = bound.inputs("gate_up", later) if h_ND is None else h_ND
                    for expert, rows, count in bound.expert_inputs(stage, h_ND, everything):
                        add(f"experts.{stage}.{expert}", rows, count)
        return found

    def _few(self, layer: Layer, found: dict[str, Statistics]) -> frozenset[int]:
        """Experts that were sent fewer rows than they have inputs: their Hessian alone says too little."""
        needed = {matrix.expert: matrix.shape[1] for matrix in layer.matrices if matrix.stage == "gate_up"}
        none = Statistics.empty(1)
        few = frozenset(
            expert
            for expert, inputs in needed.items()
            if expert is not None and found.get(f"experts.gate_up.{expert}", none).rows < inputs
        )
        if few:
            _log.warning(
                "Layer %d: %d of %d experts were sent fewer calibration tokens than they have inputs; all tokens are "
                "used for them. More --calibration-rows help. They are marked all_rows in the report.",
                *(layer.number, len(few), len(needed) - (None in needed)),
            )
        return few

    def _batches(self, x_RTD: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(x_RTD), self._batch):
            yield x_RTD[start : start + self._batch]

    def _replace(self, x_RTD: np.ndarray, function: Callable[[np.ndarray], Any]) -> None:
        for batch in self._batches(x_RTD):
            batch[...] = function(batch)


def _shared_inputs(layer: Layer) -> list[list[Matrix]]:
    """Matrices whose inputs are scaled together: q, k, v; o; all gates and ups; each down by itself."""
    together: dict[str, list[Matrix]] = {}
    for matrix in layer.matrices:
        together.setdefault(matrix.module if matrix.stage == "down" else matrix.stage, []).append(matrix)
    return list(together.values())
