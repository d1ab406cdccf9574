"""The numbers of the layer kernels for one row, in the interpreter of Mosaic GPU, which needs jax 0.11."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen_jax.kernels.decode import layer_gpu
from qwen_jax.kernels.decode.layer_gpu_products import CHUNK, Memory, Product, Share
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted
from tests.helpers.layer_cases import EPS, error, plain_feed_forward, plain_next, plain_tail, times

pytestmark = pytest.mark.skipif(not CAN_INTERPRET, reason="the interpreter of Mosaic GPU needs a CPU and jax 0.11")

D, F, I, N = 256, 384, 256, 64
"""Hidden size, feed-forward size, heads x head_dim, and outputs of the last product."""


def _multiply(product: Product, own: Share, out_ref: Any, n: jax.Array, memory: Memory, shift: jax.Array) -> jax.Array:
    """`layer_gpu_products.multiply` without tensor cores, which the interpreter does not run on registers in a loop."""
    (count, item), stages = own, memory.w_smem.shape[0]

    def one_item(i: jax.Array, n: jax.Array) -> jax.Array:
        row, part, start, steps = item(i)

        def one_step(j: jax.Array, accs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x = memory.x_smem[pl.ds((start + j) * CHUNK - shift, CHUNK)].astype(jnp.float32)
            added = []
            for g, acc in enumerate(accs):
                slot = lax.rem(n + j * product.gates + g, jnp.int32(stages))
                plgpu.barrier_wait(memory.full.at[slot])
                w = memory.w_smem[slot, pl.ds(0, product.tile)].astype(jnp.float32)
                added.append(acc + jnp.sum(w * x[None, :], axis=1))
                plgpu.barrier_arrive(memory.empty.at[slot])
            return tuple(added)

        accs = lax.fori_loop(0, steps, one_step, (jnp.zeros(product.tile, jnp.float32),) * product.gates)
        y = accs[0] if product.gates == 1 else accs[0] / (1 + jnp.exp(-accs[0])) * accs[1]
        out_ref.at[pl.ds(part * product.outputs + row, product.tile)][...] = y.astype(out_ref.dtype)
        return n + steps * product.gates

    return lax.fori_loop(0, count, one_item, n)


@pytest.fixture
def without_barriers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of one block, or of one product: nothing waits for another block."""
    functions = layer_gpu.layer_tail, layer_gpu.norm_product, layer_gpu.output_product, layer_gpu.feed_forward
    for name in ("wait_for_previous_kernel", "allow_next_kernel", "record_round", "grid_barrier"):
        monkeypatch.setattr(layer_gpu, name, lambda *_: None)
    monkeypatch.setattr(layer_gpu, "multiply", _multiply)
    with interpreted(1):
        for traced in functions:
            traced.clear_cache()
        yield
        for traced in functions:
            traced.clear_cache()


@pytest.mark.usefixtures("without_barriers")
def test_kernels_equal_plain_functions() -> None:
    """Of one device, and the three of a tensor shard; products of one kernel alone also on several blocks."""
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.bfloat16)

    heads, stream, counter = normal(I), normal(D), jnp.zeros((1,), jnp.int32)
    mid, norm = (1 + normal(D, scale=0.1) for _ in range(2))
    w_o, w_down, w_next = (normal(*shape, scale=0.1) for shape in ((D, I), (D, F), (N, D)))
    w_gate_up, added = normal(2, F, D, scale=0.1), jnp.asarray(rng.standard_normal(D), jnp.float32)
    one: dict[str, Any] = {"eps": EPS, "blocks": 1}
    tail = heads, stream, w_o, mid, w_gate_up, w_down, norm, w_next, counter
    inner = stream, added, mid, w_gate_up, w_down, counter
    pairs = [
        (layer_gpu.layer_tail(*tail, **one)[:2], plain_tail(*tail)[:2]),
        (layer_gpu.feed_forward(*inner, **one)[:2], plain_feed_forward(*inner)[:2]),
    ]
    after, several = (stream, norm, w_next), {"eps": EPS, "blocks": 3}
    pairs += [
        ([layer_gpu.norm_product(*after, **several)], [plain_next(*after)]),  # type: ignore[list-item]
        (layer_gpu.norm_product(*after, added, **several), plain_next(*after, added)),  # type: ignore[list-item]
        ([layer_gpu.output_product(heads, w_o, blocks=3)], [times(w_o, heads)]),  # type: ignore[list-item]
    ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            # A bfloat16 rounding is an error of 1.7e-3, and there are several.
            assert error(a, b) < 8e-3
