"""Products of few rows on Hopper: tiling and lowering anywhere, numerics where an interpreter or a GPU can run them."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import few_rows_gpu
from qwen_jax.kernels.matmul.few_rows_gpu import MAX_ROWS, choose_tiling, skinny_matmul, skinny_swiglu

# (N, K, gates) of every product of Qwen2.5 from 0.5B to 72B, before sharding.
_MODELS = [
    (hidden, feed_forward, qkv, vocabulary)
    for hidden, feed_forward, qkv, vocabulary in (
        (896, 4864, 1152, 151936),
        (1536, 8960, 2048, 151936),
        (2048, 11008, 2560, 151936),
        (3584, 18944, 4608, 152064),
        (5120, 13824, 7168, 152064),
        (5120, 27648, 7168, 152064),
        (8192, 29568, 10240, 152064),
    )
]
SHAPES = [
    shape for D, F, N, V in _MODELS for shape in ((N, D, 1), (D, D, 1), (F, D, 2), (D, F, 1), (V, D, 1), (2 * F, D, 1))
]
SHARDS = [
    (n // a, k // b, gates) for n, k, gates in SHAPES for a, b in ((2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8))
]


@pytest.mark.parametrize("rows", [1, 8, 33, 64, 128])
def test_tiling_covers_the_product_and_fits_in_shared_memory(rows: int) -> None:
    """Every row tile and part of K is computed in one place, and the shared memory of a block holds its pipeline."""
    for n, k, gates in SHAPES + [s for s in SHARDS if s[0] % 8 == 0 and s[1] % 64 == 0]:
        p = choose_tiling(rows, n, k, gates)
        tiles, steps = -(-n // p.tile), -(-k // p.chunk)
        assert p.tile % 8 == 0
        assert p.tile * gates <= 256
        assert p.blocks == min(tiles * p.splits, 132)
        assert p.splits == 1 or p.blocks == tiles * p.splits
        assert 2 <= p.stages <= min(32, steps // p.splits)  # one barrier for each stage; never more loads than steps
        x_rows, m = -(-rows // 8) * 8, -(-rows // 64) * 64
        stage = (gates * p.tile + x_rows) * p.chunk * 2
        out = m * p.tile * (4 if gates == 1 else 2)
        assert p.stages * stage + (m - x_rows) * p.chunk * 2 + out + 2048 <= 227 * 1024, (n, k, p)


def test_large_products_are_balanced_over_the_blocks() -> None:
    """In each product of 7B the longest queue is at most 10% longer than an equal share."""
    for n, k, gates in [s for s in SHAPES if 3584 in s[:2]]:
        for rows in (1, 64):
            p = choose_tiling(rows, n, k, gates)
            tiles = -(-n // p.tile) * p.splits
            queue = -(-tiles // p.blocks) * p.tile / p.splits
            assert queue * 132 <= 1.1 * n, (n, k, rows, p)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (4608, 3584)), (5, (3584, 3584)), (64, (2, 18944, 3584)), (64, (896, 4864)), (33, (1152, 448))],
)
def test_lowers_to_one_kernel_without_copies_of_the_weight(rows: int, shape: tuple[int, ...]) -> None:
    """The program for CUDA is one kernel over x and w themselves; nothing of the size of w is created."""
    f = skinny_matmul if len(shape) == 2 else skinny_swiglu
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, shape[-1]), shape))
    text = jax.jit(f).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    flat = f"{np.prod(shape[:-1])}x{shape[-1]}xbf16"
    makers = {m[1] for m in re.finditer(rf"= (\S+) .*-> tensor<(?:{'x'.join(map(str, shape))}xbf16|{flat})>", text)}
    assert makers <= {"stablehlo.reshape", "stablehlo.broadcast_in_dim"}, makers
    assert not re.search(r"stablehlo\.(transpose|dot)", text)


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        ((129, 256), (64, 256), "1 to 128 rows"),
        ((1, 96), (64, 96), "K a multiple of 64"),
        ((1, 256), (60, 256), "multiple of 8"),
        ((1, 256), (64, 128), "x \\[B, K\\]"),
        ((1, 256), (3, 64, 256), "2, N"),
    ],
)
def test_unsupported_shapes_are_refused(x: tuple[int, ...], w: tuple[int, ...], why: str) -> None:
    f = skinny_matmul if len(w) == 2 else skinny_swiglu
    with pytest.raises(InputError, match=why):
        f(jnp.ones(x, jnp.bfloat16), jnp.ones(w, jnp.bfloat16))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        skinny_matmul(jnp.ones((1, 256)), jnp.ones((64, 256), jnp.bfloat16))


def relative_error(rows: int, shape: tuple[int, ...]) -> float:
    """Relative error of the kernel against float64, on fresh inputs."""
    numbers = np.random.default_rng()
    x = jnp.asarray(numbers.standard_normal((rows, shape[-1])), jnp.bfloat16)
    w = jnp.asarray(numbers.standard_normal(shape) * shape[-1] ** -0.5, jnp.bfloat16)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    if len(shape) == 2:
        got, want = np.asarray(skinny_matmul(x, w), np.float64).sum(0), x64 @ w64.T
    else:
        got = np.asarray(skinny_swiglu(x, w), np.float64)
        gate, up = x64 @ w64[0].T, x64 @ w64[1].T
        want = gate / (1 + np.exp(-gate)) * up
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def limit(shape: tuple[int, ...]) -> float:
    """Tolerance: float32 sums of exact products; SwiGLU rounds its result to bfloat16 (1.6e-3 on average)."""
    return 2e-5 if len(shape) == 2 else 3e-3


# jax 0.10's interpreter of Mosaic GPU cannot read a transposed operand of wgmma; that of 0.11 can.
_CAN_INTERPRET = jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu"

if _CAN_INTERPRET:
    from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params

    # (multiprocessors, rows, shape): several tiles per block, uneven parts of K, odd ends in N and K, one row.
    @pytest.mark.parametrize(
        ("sms", "rows", "shape"),
        [
            (2, 8, (96, 256)),
            (2, 3, (40, 192)),
            (1, 1, (1000, 192)),
            (2, 33, (56, 448)),
            (9, 16, (32, 1088)),
            (8, 65, (32, 640)),
            (2, 12, (2, 40, 192)),
            (1, 64, (2, 200, 320)),
        ],
    )
    def test_numerics_in_the_interpreter(
        sms: int, rows: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Equal to float64 with memory that starts as NaN, on a device with few multiprocessors."""
        monkeypatch.setattr(few_rows_gpu, "MULTIPROCESSORS", sms)
        monkeypatch.setattr(few_rows_gpu, "_SPLIT_BYTES", 0)  # so that even small matrices are split
        choose_tiling.cache_clear()
        how = interpret_params.InterpretGPUParams(out_of_bounds_reads="uninitialized")
        with contextlib.ExitStack() as stack:
            stack.callback(choose_tiling.cache_clear)
            stack.enter_context(interpret_params.force_gpu_interpret_mode(how))
            assert relative_error(rows, shape) < limit(shape)


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize("rows", [1, 3, 8, 33, 64, MAX_ROWS])
    @pytest.mark.parametrize(
        "shape", [(1152, 896), (896, 4864), (2, 4864, 896), (896, 448), (1000, 192), (2, 200, 320)]
    )
    def test_numerics_on_the_gpu(rows: int, shape: tuple[int, ...]) -> None:
        assert relative_error(rows, shape) < limit(shape)
