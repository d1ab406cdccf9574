"""The table of `qwen_jax.kernels` is true: what it claims runs and is correct, and everything else is refused."""

import functools
import itertools
import logging
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels, platform
from qwen_jax.cli.model import Kernel
from qwen_jax.errors import InputError
from qwen_jax.kernels import COVERAGE, Mask, causal_mask
from qwen_jax.kernels.select import log_once
from tests.helpers import exact
from tests.helpers.platforms import as_if_on as on

DTYPES, HEAD_DIMS, T = ("float32", "bfloat16", "float16"), (20, 32, 64, 128, 256, 264), 40
KERNEL = {"cudnn": "__cudnn", "gpu": "mosaic_gpu", "tpu": "tpu_custom_call"}
"""What a lowered program contains."""


def intervals() -> Mask:
    """A mask in which one row sees nothing and others one key."""
    i = np.arange(T)
    start = np.where(i < 7, 0, np.where(i == 20, 25, i - 5))
    return Mask(*(jnp.asarray(x[None], jnp.int32) for x in (start, np.where(i == 20, 25, i + 1))))


def inputs(dtype: str, d: int, heads: int = 4, kv_heads: int = 2):
    numbers = np.random.default_rng(d)
    q, k, v = (jnp.asarray(numbers.standard_normal((1, T, n, d)), dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v


def test_the_table_agrees_with_the_code() -> None:
    lines = [line for line in kernels.__doc__.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["implementation", "where", "masks", "dtypes", "head_dim", "lse", "gradient", "caches"]
    said = {row[0]: row[1:] for row in rows}
    assert list(said) == list(COVERAGE)
    for name, coverage in COVERAGE.items():
        dims = coverage.head_dims
        dims = "any" if dims is None else f"{dims[0]}, {dims[1]}" + (f", ... {dims[-1]}" if len(dims) > 2 else "")
        yes = {True: "yes", False: "no"}
        masks = "causal" if coverage.causal_only else "intervals"
        assert said[name] == [
            coverage.where,
            masks,
            ", ".join(coverage.dtypes),
            dims,
            yes[coverage.log_sum_exp],
            "yes",
            yes[coverage.caches],
        ]


@pytest.mark.parametrize("name", COVERAGE)
def test_exactly_the_claimed_combinations_are_supported(name) -> None:
    coverage = COVERAGE[name]
    for dtype, d, causal, lse, cache in itertools.product(
        DTYPES, HEAD_DIMS, (True, False), (True, False), (True, False)
    ):
        q, mask = jnp.zeros((1, T, 4, d), dtype), causal_mask(1, T) if causal else intervals()
        claimed = (
            dtype in coverage.dtypes
            and (coverage.head_dims is None or d in coverage.head_dims)
            and (causal or not coverage.causal_only)
            and (coverage.log_sum_exp or not lse)
            and (coverage.caches or not cache)
        )
        with on(coverage.where):
            if claimed:
                assert kernels.select_attention(name, q, mask, return_lse=lse, cache=cache) == name
            else:
                with pytest.raises(InputError, match=f"Attention by {name} needs .*Use implementation="):
                    kernels.select_attention(name, q, mask, return_lse=lse, cache=cache)


@pytest.mark.parametrize("name", [n for n, coverage in COVERAGE.items() if coverage.where != "anywhere"])
def test_an_error_names_the_platform_without_the_kernel(name) -> None:
    message = rf"a {COVERAGE[name].where}.*on cpu. Use implementation='reference'"
    with on("CPU"), pytest.raises(InputError, match=message):
        kernels.select_attention(name, inputs(COVERAGE[name].dtypes[0], 64)[0], causal_mask(1, T))


@pytest.mark.parametrize("name", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_runs_here_is_correct(name, causal) -> None:
    """Output, log-sum-exp and gradient of each claimed dtype agree with float64."""
    coverage = COVERAGE[name]
    for dtype, d in itertools.product(coverage.dtypes, coverage.head_dims or (20, 64)):
        q, k, v = inputs(dtype, d)
        mask, dout = causal_mask(1, T) if causal else intervals(), jnp.ones_like(q)
        scale, sees = d**-0.5, np.asarray(mask.k_start_BT < mask.k_end_BT)[:, None]
        want = exact.attention(q, k, v, mask.k_start_BT, mask.k_end_BT, scale, dout)

        def run(q, k, v, mask=mask, scale=scale, coverage=coverage):
            return kernels.attention(q, k, v, mask, scale=scale, implementation=name, return_lse=coverage.log_sum_exp)

        with on(coverage.where):
            got, pull = jax.vjp(run, q, k, v)
            out, lse = got if coverage.log_sum_exp else (got, None)
            grads = pull((dout, jnp.zeros_like(lse)) if coverage.log_sum_exp else dout)
        tolerance = 1e-5 if dtype == "float32" else 1.2e-2
        assert exact.relative(out, want.out) < tolerance
        assert not np.asarray(out, np.float32)[~sees[:, 0]].any()
        for g, w in zip(grads, want[2:], strict=True):
            assert exact.relative(g, w) < tolerance
        if lse is not None:
            np.testing.assert_allclose(
                np.where(sees, lse, 0), np.where(sees, want.lse, 0), atol=2e-5 if dtype == "float32" else 2e-3
            )


@pytest.mark.parametrize("name", ["cudnn", "gpu", "tpu"])
def test_what_cannot_run_here_lowers_to_its_kernel(name) -> None:
    coverage = COVERAGE[name]
    for dtype, d in itertools.product(coverage.dtypes, (64, 128)):
        q, k, v = inputs(dtype, d)
        mask = causal_mask(1, T) if coverage.causal_only else intervals()

        def loss(q, k, v, mask=mask, d=d):
            out = kernels.attention(q, k, v, mask, scale=d**-0.5, implementation=name)
            return out.astype(jnp.float32).sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(platform, "platform", lambda: "tpu" if name == "tpu" else "gpu")
            patch.setattr(platform, "on_hopper", lambda: True)
            if name == "cudnn":
                from jax._src.cudnn import fused_attention_stablehlo as cudnn

                patch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
                patch.setattr(cudnn, "check_compute_capability", lambda _: True)
            target = "tpu" if name == "tpu" else "cuda"
            traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v)
            assert KERNEL[name] in traced.lower(lowering_platforms=(target,)).as_text()


@pytest.mark.parametrize("name", ["reference", "tpu"])
@pytest.mark.parametrize("tokens", [1, 3, T])
def test_contiguous_and_paged_caches(name, tokens) -> None:
    """For one token, a few, and a chunk, both caches give the result of attention over the same keys."""
    q, k, v = inputs("bfloat16", 64, heads=8)
    q, whole = q[:, :tokens], intervals()
    mask = Mask(whole.k_start_BT[:, -tokens:], whole.k_end_BT[:, -tokens:])
    want = exact.attention(q, k, v, mask.k_start_BT, mask.k_end_BT, 0.125)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pages = [jnp.zeros((5, 2, 16, 64), x.dtype) for x in (k, v)]
    table = jnp.asarray([[3, 0, 4]], jnp.int32)
    filled = [jnp.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0))).reshape(2, 3, 16, 64).swapaxes(0, 1) for x in (k, v)]
    pages = [p.at[table[0]].set(f) for p, f in zip(pages, filled, strict=True)]
    with on(COVERAGE[name].where):
        results = (
            kernels.decode_attention(q, k, v, mask, scale=0.125, implementation=name),
            kernels.paged_attention(q, *pages, table, mask, scale=0.125, implementation=name),
        )
    for out, lse in results:
        assert exact.relative(out, want.out) < 1e-2
        sees = np.isfinite(want.lse)
        np.testing.assert_allclose(np.where(sees, lse, 0), np.where(sees, want.lse, 0), atol=2e-3)


@pytest.mark.parametrize(
    ("where", "dtype", "d", "causal", "expected"),
    [
        ("anywhere", "float32", 32, True, "reference"),
        ("GPU", "bfloat16", 64, True, "cudnn"),
        ("GPU", "bfloat16", 64, False, "reference"),
        ("Hopper GPU", "bfloat16", 128, True, "gpu"),
        ("Hopper GPU", "bfloat16", 32, True, "cudnn"),
        ("Hopper GPU", "bfloat16", 128, False, "gpu"),
        ("Hopper GPU", "float32", 128, False, "reference"),
        ("TPU", "bfloat16", 128, True, "tpu"),
        ("TPU", "float32", 64, False, "tpu"),
        ("TPU", "bfloat16", 32, False, "reference"),
    ],
)
def test_auto_logs_its_choice_once_and_warns_if_it_is_slow(caplog, where, dtype, d, causal, expected) -> None:
    log_once.cache_clear()
    mask = causal_mask(1, T) if causal else intervals()
    with on(where), caplog.at_level(logging.INFO, "qwen_jax.kernels"):
        for _ in range(2):
            assert kernels.select_attention("auto", inputs(dtype, d)[0], mask) == expected
    [record] = caplog.records
    assert record.getMessage().split(": ")[1].startswith(expected)
    slow = expected == "reference" and where != "anywhere"
    assert record.levelname == ("WARNING" if slow else "INFO")


BAD = {
    "shapes that do not match": (lambda q, k, v, m: (q, k[:, :-1], v, m, 1.0), "k and v .B, S, K, d."),
    "heads that are no multiple": (lambda q, k, v, m: (q[:, :, :3], k, v, m, 1.0), "H a multiple of K"),
    "a mask of another batch": (lambda q, k, v, m: (q, k, v, causal_mask(2, T), 1.0), r"for \(2, 40\)"),
    "a scale that is not finite": (
        lambda q, k, v, m: (q, k, v, m, float("nan")),
        "finite number as its scale.*nan",
    ),
    "a negative scale": (lambda q, k, v, m: (q, k, v, m, -0.1), "positive, finite number as its scale.*got -0.1"),
    "nothing": (lambda q, k, v, m: (q[:, :0], k, v, causal_mask(1, 0), 1.0), "no dimension of size 0"),
    "two dtypes": (lambda q, k, v, m: (q, k.astype(jnp.float16), v, m, 1.0), "one dtype; got float32, float16"),
    "a mask of another dtype": (lambda q, k, v, m: (q, k, v, Mask(m.k_start_BT * 1.0, m.k_end_BT), 1.0), "int32"),
    "a negative interval": (lambda q, k, v, m: (q, k, v, Mask(m.k_start_BT - 1, m.k_end_BT), 1.0), "a start of -1"),
    "an interval past the keys": (lambda q, k, v, m: (q, k, v, Mask(m.k_start_BT, m.k_end_BT + 1), 1.0), "end of 41"),
    "a crossed interval": (
        lambda q, k, v, m: (q, k, v, Mask(m.k_start_BT.at[0, 2].set(9), m.k_end_BT), 1.0),
        "row 0, query 2 sees keys 9 to 3",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_name_the_bad_argument(what) -> None:
    change, words = BAD[what]
    q, k, v, mask, scale = change(*inputs("float32", 64), causal_mask(1, T))
    with pytest.raises(InputError, match=words):
        kernels.attention(q, k, v, mask, scale=scale)


def test_the_command_line_offers_all_implementations() -> None:
    assert get_args(Kernel) == get_args(kernels.Implementation) == ("auto", *COVERAGE)


@pytest.mark.parametrize("where", ["TPU", "Hopper GPU"])
def test_a_gradient_of_a_decode_kernel_is_refused(where) -> None:
    q, k, v = inputs("bfloat16", 64)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    with on(where), pytest.raises(InputError, match="has no gradient"):
        jax.grad(lambda q: kernels.decode_attention(q, k, v, causal_mask(1, 1), scale=1.0)[0].sum())(q[:, :1])


def test_merging_parts_of_the_keys_is_attention_over_all_keys() -> None:
    """Output, log-sum-exp and gradient, where a row may see nothing of a part."""
    q, k, v = inputs("float32", 64)
    mask, half = intervals(), T // 2
    ends = mask.k_start_BT, mask.k_end_BT
    low, high = (Mask(*(jnp.clip(x - first, 0, half) for x in ends)) for first in (0, half))

    def merged(q, k, v):
        run = functools.partial(kernels.attention, scale=0.125, return_lse=True)
        return kernels.merge([run(q, k[:, :half], v[:, :half], low), run(q, k[:, half:], v[:, half:], high)])

    (out, lse), pull = jax.vjp(merged, q, k, v)
    want = exact.attention(q, k, v, *ends, 0.125, jnp.ones_like(q))
    sees = np.isfinite(want.lse)
    assert (np.isfinite(lse) == sees).all()
    np.testing.assert_allclose(np.where(sees, lse, 0), np.where(sees, want.lse, 0), atol=1e-5)
    for a, b in zip((out, *pull((jnp.ones_like(q), jnp.zeros_like(lse)))), (want.out, *want[2:]), strict=True):
        assert exact.relative(a, b) < 1e-5


@pytest.mark.parametrize("name", ["reference", "tpu"])
def test_gradients_over_parts_of_the_keys_sum_to_the_gradient(name) -> None:
    """Given output and log-sum-exp over all keys. Numbers of rows and keys are not multiples of a tile."""
    q, k, v = inputs("float32", 64)
    mask, half = intervals(), 24
    ends, dout = (
        (mask.k_start_BT, mask.k_end_BT),
        jnp.asarray(np.random.default_rng(5).standard_normal(q.shape), q.dtype),
    )
    want = exact.attention(q, k, v, *ends, 0.125, dout)
    out, lse = kernels.attention(q, k, v, mask, scale=0.125, implementation="reference", return_lse=True)
    with on(COVERAGE[name].where):
        parts = [
            kernels.attention_gradient(
                q, k[:, at], v[:, at], Mask(*(jnp.clip(x - at.start, 0, at.stop - at.start) for x in ends)),
                out, lse, dout, scale=0.125, implementation=name,
            )
            for at in (slice(0, half), slice(half, T))
        ]  # fmt: skip
    (dq, dk, dv), (dq_more, dk_more, dv_more) = parts
    got = dq + dq_more, jnp.concatenate([dk, dk_more], axis=1), jnp.concatenate([dv, dv_more], axis=1)
    for a, b in zip(got, want[2:], strict=True):
        assert exact.relative(a, b) < 1e-5
    with pytest.raises(InputError, match=r"a log-sum-exp \(1, 4, 40\); got"):
        kernels.attention_gradient(q, k, v, mask, out, lse[:, :1], dout, scale=0.125)


def test_bad_caches_are_refused() -> None:
    q, k, v = inputs("float32", 64)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    with pytest.raises(InputError, match="end of 40"):
        kernels.decode_attention(q, k[:, :, :30], v[:, :, :30], causal_mask(1, T), scale=1.0)
    table = jnp.zeros((1, 3), jnp.int32)
    for change in ((q, k, v, table[:0]), (q[0], k, v, table), (q, k, v[:, :, :1], table), (q, k, v, table * 1.0)):
        with pytest.raises(InputError, match=r"integer page table \[B, M\]"):
            kernels.paged_attention(*change, causal_mask(1, T), scale=1.0)
    with pytest.raises(InputError, match=r"k and v \[B, K, S, d\].*got .* k \(1, 2, 40, 64\), v \(1, 2, 39, 64\)"):
        kernels.decode_attention(q, k, v[:, :, 1:], causal_mask(1, T), scale=1.0)
    with pytest.raises(InputError, match="Unknown attention implementation 'flash'"):
        kernels.decode_attention(q, k, v, causal_mask(1, T), scale=1.0, implementation="flash")


def test_masks_of_windows_and_chunks() -> None:
    """A window keeps the last keys that a row sees. Chunks of a cache at an offset are rows of the whole mask."""
    whole = causal_mask(2, 12, window=5)
    start = jnp.array([0, 3], jnp.int32)
    parts = [kernels.cache_mask(start, jnp.int32(at), 4, window=5) for at in (0, 4, 8)]
    starts = np.concatenate([p.k_start_BT for p in parts], axis=1)
    np.testing.assert_array_equal(starts, np.maximum(whole.k_start_BT, start[:, None]))
    np.testing.assert_array_equal(np.concatenate([p.k_end_BT for p in parts], axis=1), whole.k_end_BT)
    packed = kernels.packed_mask(jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]]), window=2)
    assert packed.k_start_BT[0].tolist() == [0, 0, 1, 2, 4, 4, 5, 7]
    with pytest.raises(InputError, match="at least one key"):
        causal_mask(1, 4, window=0)
