"""Runs the kernels for quantised weights in the interpreter of Mosaic GPU, which needs jax 0.11, and PTX in Python."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels.decode import layer_gpu_quantized
from qwen_jax.kernels.matmul import quantized_gpu, quantized_gpu_few, quantized_gpu_many, quantized_gpu_tiling
from qwen_jax.kernels.matmul import quantized_gpu_digits as digits
from qwen_jax.kernels.matmul.quantized_gpu_tiles import permuted

CAN_INTERPRET = jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu"


@contextlib.contextmanager
def interpreted(multiprocessors: int, columns: int = 64) -> Iterator[None]:
    """Interprets the kernels on a device of few multiprocessors, where even small matrices are split.

    Replaces what the interpreter cannot run: products whose left operand is in registers, and inline code, which are
    the conversion of codes, loads of single numbers of 4 bits, and the stores. Kernels do not overlap.

    Args:
      multiprocessors: of the device.
      columns: of a tile of many rows.
    """
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import params
    from jax._src.state import primitives as state

    def multiply(acc: Any, a: jax.Array, b: Any) -> None:
        so_far, b = state.ref_get(acc, ()), b[...]
        a = a if isinstance(a, jax.Array) else a[...]
        state.ref_set(acc, (), so_far + jnp.matmul(a, b, preferred_element_type=so_far.dtype))

    def eight_bits(codes: jax.Array, start: int) -> jax.Array:
        return digits.permuted(codes[:, start : start + 128].astype(jnp.int8) * 16, codes.dtype)

    def store_digits(refs: Any, factors: Any, words: jax.Array, factor: jax.Array, codes: Any, _: Any) -> None:
        for c, ref in enumerate(refs):
            ref[...] = digits.permuted((words >> 8 * c).astype(jnp.int8), codes)
        factors[...] = jax.lax.bitcast_convert_type(factor[: factors.shape[0]], jnp.float32)

    def operand(codes: jax.Array, start: int, width: int, zeros: jax.Array | None = None) -> jax.Array:
        w = codes[:, start : start + width].astype(jnp.float32)
        w = w if zeros is None else w - zeros[:, None]
        return permuted(w.astype(jnp.bfloat16), codes.dtype)

    def store_transposed(ref: Any, x: jax.Array, count_ref: Any = None) -> None:
        there = x.T[: ref.shape[0]]
        if count_ref is not None:
            # What is not there is undefined.
            there = jnp.where(jnp.arange(len(there))[:, None] < count_ref[0], there, jnp.nan)
        ref[...] = there

    def store_in_order(ref: Any, x: jax.Array, codes: Any, _: Any) -> None:
        ref[...] = permuted(x, codes)

    how = params.InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
    layer = layer_gpu_quantized.layer_tail.clear_cache, layer_gpu_quantized.norm_product.clear_cache
    caches = quantized_gpu_tiling.choose_tiling.cache_clear, quantized_gpu.matmul.clear_cache
    caches += (quantized_gpu.grouped_matmul.clear_cache, *layer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(params.force_gpu_interpret_mode(how))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # What is traced here must not be used elsewhere, nor the reverse.
        for clear in caches:
            clear()
            stack.callback(clear)
        patch.setattr(core.WGMMAAbstractAccumulatorRef, "_getitem", lambda self, ref, _: state.ref_get(ref, ()))
        patch.setattr(plgpu, "wgmma", multiply)
        for module in (quantized_gpu_tiling, quantized_gpu_many):
            patch.setattr(module, "MULTIPROCESSORS", multiprocessors)
        patch.setattr(digits, "operand", eight_bits)
        patch.setattr(digits, "ones", lambda: jnp.ones((64, 128), jnp.int8))
        patch.setattr(digits, "store", store_digits)
        for module in (quantized_gpu_few, quantized_gpu_many):
            patch.setattr(module, "operand", operand)
            patch.setattr(module, "load_column", lambda ref, row, group: ref[pl.ds(row, 64), group])
            patch.setattr(module, "as_float32", lambda column, *_: column.astype(jnp.float32))
            patch.setattr(module, "store_transposed", store_transposed)
        for module in (quantized_gpu_few, layer_gpu_quantized):
            patch.setattr(module, "wait_for_previous_kernel", lambda: None)
            patch.setattr(module, "allow_next_kernel", lambda: None)
        patch.setattr(layer_gpu_quantized, "store_in_order", store_in_order)
        patch.setattr(quantized_gpu_tiling, "_PARTS_BYTES", 0)
        patch.setattr(quantized_gpu_many, "COLUMNS", columns)
        yield


def run_ptx(code: str, *operands: np.ndarray) -> np.ndarray:
    """Runs straight-line PTX on arrays of 32-bit registers; the result is $0 and the operands are $1 and following."""
    values = {f"${i}": x.astype(np.uint32) for i, x in enumerate(operands, 1)}

    def value(name: str) -> np.ndarray:
        return values[name] if name in values else np.full_like(values["$1"], int(name, 0))

    def halves(x: np.ndarray) -> np.ndarray:
        return x.view(jnp.bfloat16).reshape(*x.shape, 2)

    def prmt(a: np.ndarray, b: np.ndarray, select: np.ndarray) -> np.ndarray:
        both = np.stack([a, b], axis=-1).view(np.uint8)
        assert not (select & 0x8888).any()
        return np.stack([both[..., int(select.flat[0]) >> 4 * i & 7] for i in range(4)], -1).view(np.uint32)[..., 0]

    def arithmetic(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x).view(np.uint32)[..., 0]

    def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        assert int(table.flat[0]) == (0xF0 & 0xCC) ^ 0xAA
        return a & b ^ c

    run = {
        "prmt.b32": prmt,
        "lop3.b32": lop3,
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, n: a >> n,
        "sub.bf16x2": lambda a, b: arithmetic(halves(a) - halves(b)),
        "mul.bf16x2": lambda a, b: arithmetic(halves(a) * halves(b)),
    }
    for line in filter(None, (x.strip() for x in code.split(";"))):
        name, rest = line.split(maxsplit=1)
        if name == ".reg":
            continue
        to, *names = re.split(r",\s*", rest)
        values[to] = run[name](*map(value, names))
    return values["$0"]
