"""The attention step of decoding over pages: interpreted, lowered, and on a GPU where there is one."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention.paged_cache import PagedLayer
from qwen_jax.errors import InputError
from qwen_jax.kernels.decode import step_gpu
from tests.helpers import decode_cases
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted

_ON_HOPPER = jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")


@pytest.fixture
def numbers() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it if the test fails.
    return np.random.default_rng(seed)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes: rows, heads, head_dim, slots of a page, pages of a row; and the lengths of the first rows.

    The second row begins with pages of the first one, and the last row is padding where there are several.
    """

    B: int
    H: int
    K: int
    d: int
    P: int
    M: int
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "-".join(str(x) for x in (self.B, f"{self.H}/{self.K}", self.d, f"{self.M}x{self.P}"))


CASES = (
    Case(1, 28, 4, 128, 32, 32, (1000,)),  # 7B
    Case(1, 28, 4, 128, 32, 32, (0,)),
    Case(3, 28, 4, 128, 32, 64, (2047, 1024)),
    Case(16, 28, 4, 128, 32, 128, (4095, 64, 63, 65, 0, 31, 32)),
    Case(64, 28, 4, 128, 32, 32, (1023, 512, 0, 1)),
    Case(256, 28, 4, 128, 32, 16, (511, 500)),
    Case(2, 28, 4, 128, 64, 1024, (65535, 3)),  # clusters that XLA merges
    Case(24, 28, 4, 128, 128, 64, (8191, 9)),  # few long rows among short ones
    Case(5, 14, 2, 64, 16, 37, (591, 300, 47, 48)),  # 0.5B; tables that end inside a tile
    Case(9, 40, 8, 128, 48, 11, (527, 100)),  # 14B and 32B
    Case(4, 7, 1, 64, 32, 20, (639, 320)),
    Case(3, 2, 2, 64, 256, 2, (511, 255)),  # no grouping
)


def drawn(case: Case, numbers: np.random.Generator) -> list[jax.Array]:
    """Arguments of `paged_decode_step`: shuffled pages, of which no row may read the NaNs.

    Unused entries of the table are out of range.
    """
    c, R = case, case.H + 2 * case.K

    def normal(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape, np.float32)

    length = numbers.integers(0, c.M * c.P, c.B)
    length[: len(c.lengths)] = c.lengths
    table = numbers.permutation(c.B * c.M + 3)[: c.B * c.M].reshape(c.B, c.M)
    # The second row shares full pages, which it only reads.
    shared = min(length[:2]) // c.P if c.B > 1 else 0
    table[1:2, :shared] = table[:1, :shared]
    pages = normal(2, c.B * c.M + 3, c.K, c.P, c.d)
    held = np.zeros((pages.shape[1], c.P), bool)
    for b in range(c.B):
        j = np.arange(length[b])
        held[table[b, j // c.P], j % c.P] = True
    pages.swapaxes(2, 3)[:, ~held] = np.nan
    table[np.arange(c.M) > length[:, None] // c.P] = 2**30
    new = np.ones(c.B)
    if c.B > 1:
        new[-1], table[-1] = 0, np.where(length[-1:] > 0, table[-1], 2**30)
        # What the padding row would write to.
        if length[-1] == 0:
            table[-1, 0] = 0
    angle = numbers.uniform(0, 2 * np.pi, (c.B, c.d // 2))
    wide = normal(c.B, R, c.d), normal(R, c.d), np.cos(angle), np.sin(angle), *pages
    return [
        *(jnp.asarray(x, jnp.bfloat16) for x in wide),
        *(jnp.asarray(x, jnp.int32) for x in (np.zeros(c.B), length, new, table)),
    ]


def of_row(args: list[jax.Array], b: int) -> tuple[jax.Array, ...]:
    """Arguments of `decode_step` for one row: its pages one after the other, in whole tiles."""
    qkv, bias, cos, sin, *pages = (np.asarray(x) for x in args)
    keys, values, start, length, _, table = pages
    N, K, P, d = keys.shape
    slots = -(-table.shape[1] * P // step_gpu.TILE) * step_gpu.TILE
    here = np.minimum(table[b], N - 1)
    caches = []
    for x in (keys, values):
        cache = np.full((1, K, slots, d), np.nan, x.dtype)
        cache[0, :, : table.shape[1] * P] = x[here].swapaxes(0, 1).reshape(K, -1, d)
        caches.append(cache)
    one = slice(b, b + 1)
    arrays = qkv[one], bias, cos[one], sin[one], *caches, start[one], length[b]
    return tuple(jnp.asarray(x) for x in arrays)


def check_pages(args: list[jax.Array], got: Any, rows: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
    """Each row that is not padding wrote its new key and value [1, K, d], and no other bit of the pages changed."""
    length, new, table = (np.asarray(x) for x in args[7:])
    P = args[4].shape[2]
    for i, pages in enumerate(got):
        pages, before = np.array(pages), np.asarray(args[4 + i])
        for b, written in rows.items():
            if not new[b]:
                continue
            place = table[b, length[b] // P], slice(None), length[b] % P
            np.testing.assert_allclose(pages[place].astype(np.float64), written[i][0], rtol=1e-2, atol=1e-2)
            pages[place] = before[place]
        np.testing.assert_array_equal(pages.view(np.uint16), before.view(np.uint16))


def error(out: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - truth) / np.linalg.norm(truth))


SMALL = (
    Case(4, 7, 1, 128, 32, 6, (63, 64, 191)),
    Case(4, 14, 2, 64, 48, 3, (143, 96, 0)),
    Case(2, 8, 1, 128, 128, 2, (128,)),
)


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_pages_give_the_bits_of_one_array_in_the_interpreter(
    case: Case, numbers: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And these agree with float64. Nothing is written but the new tokens. What the kernel leaves unset is NaN."""
    args, scale, clusters = drawn(case, numbers), case.d**-0.5, int(numbers.integers(1, 4))
    print("clusters", clusters)
    monkeypatch.setattr(step_gpu, "shares", lambda *_, **__: (clusters, 1))
    rows = {}
    with interpreted(2, "nan"):
        out, *pages = jax.device_get(step_gpu.paged_decode_step(*args, scale=scale))
        for b in range(case.B):
            one = of_row(args, b)
            want, *written = jax.device_get(step_gpu.decode_step(*one, scale=scale))
            np.testing.assert_array_equal(out[b].view(np.uint16), want[0].view(np.uint16))
            slot = int(one[7])
            rows[b] = tuple(x[:, :, slot].astype(np.float64) for x in written)
            # Weights and output are rounded.
            assert error(out[b], decode_cases.expected(one, scale)[0][0]) < 4e-3
    check_pages(args, pages, rows)


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
def test_it_equals_the_separate_kernels_in_the_interpreter(
    numbers: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(3, 7, 1, 64, 32, 4, (127, 64))
    args = drawn(case, numbers)
    args[4:6] = [jnp.nan_to_num(x) for x in args[4:6]]
    monkeypatch.setattr(step_gpu, "shares", lambda *_, **__: (1, 1))
    with interpreted(2):
        out, *pages = jax.device_get(step_gpu.paged_decode_step(*args, scale=0.125))
    want, *want_pages = jax.device_get(decode_cases.paged_plain(*args, scale=0.125))
    # Rotation rounds its products there, and weights are rounded here. The last row is padding.
    assert error(out[:-1], want[:-1].astype(np.float64)) < 8e-3
    for got, expected in zip(pages, want_pages, strict=True):
        np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 5, 6, 8)], ids=str)
def test_lowers_for_hopper_to_one_kernel_that_updates_the_pages_in_place(case: Case) -> None:
    """The kernel passes the layout inference of Mosaic GPU, and both arrays of pages are aliased to its outputs."""
    c, R, N = case, case.H + 2 * case.K, case.B * case.M + 3
    halves = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((c.B, R, c.d), (R, c.d), *((c.B, c.d // 2),) * 2)]
    pages = [jax.ShapeDtypeStruct((N, c.K, c.P, c.d), jnp.bfloat16)] * 2
    counts = [jax.ShapeDtypeStruct(s, jnp.int32) for s in (*((c.B,),) * 3, (c.B, c.M))]
    step = jax.jit(lambda *a: step_gpu.paged_decode_step(*a, scale=1.0))
    text = step.trace(*halves, *pages, *counts).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    outputs = 1 + (step_gpu.shares(c.B * c.K, c.M * c.P, uneven=c.B > 1)[0] > 1)
    aliases = re.findall(r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", text)
    assert sorted(aliases) == [(str(outputs), "6"), (str(outputs + 1), "7")]


def test_long_tables_of_uneven_rows_are_split_although_rows_alone_fill_the_chip() -> None:
    """So that one long row does not end long after the others; short tables and single rows are as in `decode_step`."""
    for rows in range(1, 1025):
        for slots in (1024, 2048):
            assert step_gpu.shares(rows, slots, uneven=True) == step_gpu.shares(rows, slots)
        for slots in (32768, 131072, 1_000_064):
            clusters, blocks = step_gpu.shares(rows, slots, uneven=True)
            assert blocks in (2, 4, 8)
            assert clusters == 1 or blocks == 2
            assert clusters * blocks <= slots // step_gpu.TILE
            if rows >= 8:  # others are split as much as they can be
                assert clusters * blocks * rows >= 0.95 * 132
            if rows > 14:
                assert clusters * blocks >= min(8 * 132 / rows, slots // 2048)


def test_it_is_used_for_bfloat16_pages_on_a_hopper_gpu_only() -> None:
    def supports(implementation: kernels.Implementation = "auto", dtype: Any = jnp.bfloat16, page: int = 32) -> bool:
        pages = jax.ShapeDtypeStruct((8, 2, page, 64), dtype)
        layer = PagedLayer(pages, pages, jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, int), jnp.ones(2, int), fresh=False)
        return layer.supports_step(implementation, jax.ShapeDtypeStruct((2, 1, 64), jnp.bfloat16), 14, 2)

    assert supports() == _ON_HOPPER
    assert not supports("reference")
    assert not supports(dtype=jnp.int8)
    assert not supports(page=8)
    assert step_gpu.supports(14, 2, 64, 96, page=32)
    assert not step_gpu.supports(14, 2, 64, 96)
    assert not step_gpu.supports(14, 2, 64, 96, page=24)


def test_unsupported_arguments_are_refused(numbers: np.random.Generator) -> None:
    args = drawn(SMALL[0], numbers)
    with pytest.raises(InputError, match="multiple of 16 slots"):
        step_gpu.paged_decode_step(*args[:4], *(x[:, :, :8] for x in args[4:6]), *args[6:], scale=1.0)
    with pytest.raises(InputError, match="of 4 rows"):
        step_gpu.paged_decode_step(*args[:9], args[9][:3], scale=1.0)


if _ON_HOPPER:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_numerics_on_the_gpu(case: Case, numbers: np.random.Generator) -> None:
        """Against float64, with NaN in what no row sees; a second run gives the same bits, and only tokens change."""
        args, scale = drawn(case, numbers), case.d**-0.5
        first, again = (jax.device_get(step_gpu.paged_decode_step(*args, scale=scale)) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))
        rows = {}
        for b in range(case.B):
            want, *rows[b] = decode_cases.expected(of_row(args, b), scale)
            assert error(first[0][b], want[0]) < 4e-3
        check_pages(args, first[1:], rows)

    @pytest.mark.parametrize("step", [step_gpu.paged_decode_step, decode_cases.paged_plain])
    def test_many_steps_in_a_device_loop_are_the_same_every_time(
        step: Callable[..., Any], numbers: np.random.Generator
    ) -> None:
        """40 tokens across ends of pages and tiles, each step reading what the previous ones wrote."""
        case = Case(3, 28, 4, 128, 32, 8, (100, 190))
        args = drawn(case, numbers)
        length, new, table = args[7:]
        args[4:6] = [jnp.nan_to_num(x) for x in args[4:6]]
        table = jnp.asarray(np.arange(case.B * case.M).reshape(case.B, case.M), jnp.int32)

        def body(carry: Any, _: None) -> Any:
            qkv, keys, values, length = carry
            out, keys, values = step(qkv, *args[1:4], keys, values, args[6], length, new, table, scale=0.1)
            return (jnp.roll(qkv, 1, axis=1) + 0.1 * jnp.mean(out[:-1]), keys, values, length + new), out

        run = jax.jit(lambda c: jax.lax.scan(body, c, length=40)[1])
        out = np.asarray(run((args[0], *args[4:6], length)))
        np.testing.assert_array_equal(out[:, :-1], np.asarray(run((args[0], *args[4:6], length)))[:, :-1])
        assert np.isfinite(out[:, :-1].astype(np.float32)).all()
