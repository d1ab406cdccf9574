"""Random quantised models, and the same weights in full precision."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert import open_source
from convert.dequantize import DequantizedSource
from convert.names import leaves
from convert.placement import place
from convert.source import TreeSource
from qwen_jax.config import ModelConfig
from qwen_jax.options import Options
from qwen_jax.params import Params, abstract_params

_JOINED = {"k": "q", "v": "q", "up": "gate"}


def random_quantized(config: ModelConfig, rng: np.random.Generator) -> Params:
    """Random parameters of a quantised model on the host, in the layout of a list of layers.

    Projections of the same input have the same order of it.
    """
    orders: dict[tuple[Any, ...], np.ndarray] = {}

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
        name, dtype = str(keys[-1]), np.dtype(leaf.dtype)
        if name.endswith("order"):
            # [I], or one order for each expert.
            where = tuple(_JOINED.get(str(key), key) for key in keys)
            if where not in orders:
                flat = np.stack([rng.permutation(leaf.shape[-1]) for _ in range(int(np.prod(leaf.shape[:-1])))])
                orders[where] = flat.reshape(leaf.shape).astype(np.int32)
            return orders[where]
        if dtype in (np.dtype(jnp.int4), np.dtype(np.int8)):
            bits = 4 if dtype == np.dtype(jnp.int4) else 8
            return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), leaf.shape).astype(dtype)
        if name.endswith(("scales", "mins")):
            wide = 0.3 if dtype.itemsize == 1 else 0.02
            return (wide * rng.random(leaf.shape)).astype(dtype)
        return (0.2 * rng.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, options=Options(stacked=False)))


def dequantized(params: Params, config: ModelConfig, mesh: Mesh, stacked: bool = False) -> tuple[ModelConfig, Params]:
    """The model with the values of the codes as its weights, on a mesh."""
    source = DequantizedSource(TreeSource(params, config))
    return source.config, place(source, mesh, config.dtype, Options(stacked=stacked))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The matrices of a quantised folder as we read them, by their names in it: float32 [outputs, inputs]."""
    source = DequantizedSource(open_source(folder))
    found = {}
    for leaf in leaves(source.config):
        if len(leaf.hf_shape) == 2:
            read = source.read(leaf, slice(0, len(leaf.names)), slice(0, leaf.shape[0]))
            found |= {n: x.astype(np.float32).reshape(leaf.hf_shape) for n, x in zip(leaf.names, read, strict=True)}
    return found


def with_quantization(config: ModelConfig, quantization: Any) -> ModelConfig:
    return dataclasses.replace(config, quantization=quantization, dtype="float32")
