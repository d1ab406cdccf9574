"""Runs attention and the choice of its keys for Hopper GPUs in the interpreter of Mosaic GPU, which needs jax 0.11."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from qwen_jax.kernels.attention import block_scores_gpu, flash_gpu_forward, probe_gpu, probe_lse_gpu, sparse_gpu
from qwen_jax.kernels.decode import flash_decode_gpu, flash_decode_int8_gpu, step_gpu

CAN_INTERPRET = jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu"


@contextlib.contextmanager
def interpreted(multiprocessors: int, uninitialized: Literal["nan", "zero"] = "zero") -> Iterator[None]:
    """Interprets kernels on a device of few multiprocessors, where copies from beyond an array give zeros.

    Replaces what the interpreter cannot run: products whose left operand is in registers are computed when their
    accumulator is read, products are added to an accumulator by `run_state` as two arrays, clusters have one block,
    kernels do not overlap, and the last free slots need not be waited for.

    Args:
      multiprocessors: of the device.
      uninitialized: "nan", or "zero" for kernels that copy from beyond an array.
    """
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import params, shared_memory

    accumulator, wgmma = core.WGMMAAbstractAccumulatorRef, plgpu.wgmma
    read = accumulator._getitem
    # Stored accumulators, each with the operands of the product that is added to it.
    stored: dict[int, list[Any]] = {}

    def setitem(_: Any, ref: Any, index: Any, value: jax.Array) -> None:
        stored[id(ref)] = [value]

    def getitem(self: Any, ref: Any, index: Any) -> jax.Array:
        if id(ref) not in stored:
            return read(self, ref, index)
        so_far, p, v = stored.pop(id(ref))
        return so_far + jnp.matmul(p, v[...], preferred_element_type=jnp.float32)

    def multiply(acc: Any, a: Any, b: Any) -> None:
        if isinstance(acc, list):
            acc.append(jnp.matmul(a[...], b[...], preferred_element_type=jnp.float32))
            return
        in_registers = isinstance(a.aval, jax.core.ShapedArray)
        if id(acc) in stored or in_registers:
            stored.setdefault(id(acc), [0.0]).extend([a, b])
        else:
            wgmma(acc, a, b)

    def run_state(product: Callable[[Any], None]) -> Callable[[Any], jax.Array]:
        def run(terms: Any) -> jax.Array:
            product(terms)
            so_far, added = terms
            return so_far + added

        return run

    def store_at(ref: Any, places: Any, arrays: Any, _: Any) -> None:
        for first, x in zip(places, arrays, strict=True):
            ref.at[pl.ds(first, len(x))][...] = x

    def store_transposed(ref: Any, x: jax.Array) -> None:
        ref[...] = x.T

    def store_to_cluster(x: jax.Array, ref: Any, barrier: Any, **_: Any) -> None:
        ref[...] = x
        plgpu.barrier_arrive(barrier)

    def deallocate(barrier: Any) -> None:
        with barrier.cv:
            barrier.ref_count -= 1

    how = params.InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory=uninitialized)
    with contextlib.ExitStack() as stack:
        stack.enter_context(params.force_gpu_interpret_mode(how))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # What is traced here must not be used elsewhere, nor the reverse.
        attention = flash_gpu_forward.run_forward, sparse_gpu.attention, sparse_gpu.columns
        probes = probe_gpu.line_sums, probe_lse_gpu.rows_lse
        decode = flash_decode_gpu._run, flash_decode_int8_gpu._run, step_gpu.decode_step, step_gpu.paged_decode_step
        for traced in (*attention, *probes, *decode, block_scores_gpu.scores):
            traced.clear_cache()
            stack.callback(traced.clear_cache)
        patch.setattr(accumulator, "_setitem", setitem)
        patch.setattr(accumulator, "_getitem", getitem)
        patch.setattr(plgpu, "wgmma", multiply)
        patch.setattr(plgpu.ACC, "init", lambda value: [value])
        patch.setattr(pl, "run_state", run_state)
        patch.setattr(plgpu, "async_store_smem", store_to_cluster)
        patch.setattr(shared_memory.Barrier, "deallocate", deallocate)
        for module in (flash_gpu_forward, block_scores_gpu):
            patch.setattr(module, "read_accumulator", lambda acc, pending=0: acc[...])
        for module in (probe_gpu, probe_lse_gpu):
            patch.setattr(module, "store_at", store_at)
        for module in (probe_gpu, probe_lse_gpu, flash_decode_gpu, step_gpu):
            patch.setattr(module, "keep_unswizzled", lambda ref: None)
        for module in (flash_decode_gpu, flash_decode_int8_gpu, step_gpu):
            patch.setattr(module, "wait_for_previous_kernel", lambda: None)
            patch.setattr(module, "allow_next_kernel", lambda: None)
        convert = flash_decode_int8_gpu.permuted
        patch.setattr(flash_decode_int8_gpu, "as_bfloat16", lambda tile: tile.astype(jnp.bfloat16))
        patch.setattr(flash_decode_int8_gpu, "_as_operand", lambda tile: convert(tile.astype(jnp.bfloat16)))
        patch.setattr(flash_decode_int8_gpu, "_store_transposed", store_transposed)
        for module in (flash_gpu_forward, block_scores_gpu, probe_gpu, probe_lse_gpu):
            patch.setattr(module, "MULTIPROCESSORS", multiprocessors)
        yield
