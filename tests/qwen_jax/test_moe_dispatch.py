"""Dispatch and combine: every row meets its own expert once and returns to its own token, whatever the layout."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax.config import MoE
from qwen_jax.kernels.matmul.quantized import quantize_rows, rounded_rows
from qwen_jax.moe import dispatch as dropless
from qwen_jax.moe.capacity import CapacityInfo, dispatch_with_capacity
from qwen_jax.moe.dispatch import (
    DroplessInfo,
    FewRowsInfo,
    RowOrder,
    dispatch_dropless,
    gather_rows,
    multiply_up,
    sum_assignments,
)
from qwen_jax.moe.exchange import plan_exchange
from qwen_jax.moe.experts import sum_partial_results
from qwen_jax.moe.gathered import GatheredInfo, dispatch_gathered
from qwen_jax.moe.router import MoEContext, RouterOutput
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published

E, K, D = 8, 3, 16


def context(axes: dict[str, int], training: bool, capacity_factor: float = 0.0) -> tuple[MoEContext, jax.sharding.Mesh]:
    mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    sharding = (Sharding.for_training if training else Sharding.for_inference)(published("tiny-moe"), mesh)
    return MoEContext(MoE(E, K, 24, 40), sharding, 1e-6, capacity_factor, "auto", keep_dots=False), mesh


def scaled_by_experts(
    context: MoEContext,
    mesh: jax.sharding.Mesh,
    x_ND: np.ndarray,
    ids_Nk: np.ndarray,
    valid_N: np.ndarray | None,
    dispatch: Any = dispatch_dropless,
) -> tuple[np.ndarray, list[Any]]:
    """Dispatches tokens, multiplies each with its expert's matrix, which is the expert's id + 1 times the identity, and
    combines. Also returns the infos that dispatch made."""
    infos: list[Any] = []

    def local(x_ND: jax.Array, ids_Nk: jax.Array, valid_N: jax.Array | None, matrices: jax.Array) -> jax.Array:
        masked = ids_Nk if valid_N is None else jnp.where(valid_N[:, None], ids_Nk, E)
        routed = RouterOutput(x_ND, jnp.ones(ids_Nk.shape), ids_Nk, masked, jnp.zeros((len(x_ND), E)), valid_N)
        rows, _, _, info = dispatch(context, routed)
        infos.append(info)
        return sum_partial_results(context.sharding, info.combine(context, multiply_up(context, info, rows, matrices)))

    rows = context.sharding.rows
    run = jax.jit(
        jax.shard_map(
            local,
            in_specs=(rows, rows, None if valid_N is None else rows, P("expert")),
            out_specs=rows,
            check_vma=False,
        )
    )
    matrices = np.arange(1, E + 1)[:, None, None] * np.eye(D)
    with jax.set_mesh(mesh):
        put = lambda x, spec: None if x is None else jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
        args = put(x_ND, rows), put(ids_Nk, rows), put(valid_N, rows), put(matrices.astype(np.float32), P("expert"))
        return np.asarray(run(*args)), infos


@pytest.mark.parametrize("training", [True, False], ids=["rows split", "same rows"])
@pytest.mark.parametrize("axes", [{}, {"expert": 2}, {"expert": 8}, {"data": 2, "expert": 4}], ids=str)
@pytest.mark.parametrize("capacity_factor", [0.0, E / K])
def test_every_row_meets_its_expert_and_returns_to_its_token(
    capacity_factor: float, axes: dict[str, int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for all rows in one exchange. Padding meets no expert."""
    monkeypatch.setattr(dropless, "ROOM", 100.0)
    rng = np.random.default_rng()
    x_ND = rng.integers(-9, 10, (64, D)).astype(np.float32)
    ids_Nk = np.stack([rng.permutation(E)[:K] for _ in x_ND]).astype(np.int32)
    ids_Nk[:20] = ids_Nk[0]  # Uneven loads, and experts without rows on some devices.
    valid_N = rng.random(64) < 0.8
    dispatch = dispatch_with_capacity if capacity_factor else dispatch_dropless
    got, infos = scaled_by_experts(*context(axes, training, capacity_factor), x_ND, ids_Nk, valid_N, dispatch)
    assert {type(info) for info in infos} == {CapacityInfo if capacity_factor else DroplessInfo}
    np.testing.assert_array_equal(got, x_ND * (ids_Nk + 1).sum(1, keepdims=True) * valid_N[:, None])


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("capacity_factor", [0.0, E / K])
def test_rows_are_rounded_with_one_scale_a_token(
    tokens: int, dtype: str, capacity_factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are those of the rounded rows, and the gradient passes the rounding unchanged.

    Programs divide by the scale with different rounding, so a quotient halfway between two codes may have either.
    """
    monkeypatch.setattr(dropless, "ROOM", 100.0)
    rng = np.random.default_rng()
    x_ND = (rng.normal(size=(tokens, D)) * rng.lognormal(size=(tokens, 1))).astype(np.float32)
    ids_Nk = np.stack([rng.permutation(E)[:K] for _ in x_ND]).astype(np.int32)
    plain, mesh = context({}, training=False, capacity_factor=capacity_factor)
    rounding = dataclasses.replace(plain, gate_up_activations=dtype)  # type: ignore[arg-type]
    dispatch = dispatch_with_capacity if capacity_factor else dispatch_dropless
    scales = np.asarray(quantize_rows(jnp.asarray(x_ND), dtype)[1])
    top = np.abs(x_ND).max(1, keepdims=True) / scales

    def products(factor: float) -> np.ndarray:
        """Of rows whose quotients are moved away from 0 by a factor before they are rounded."""
        quotients = (x_ND / scales * np.float32(factor)).clip(-top, top)
        codes = jnp.asarray(quotients.round() if dtype == "int8" else quotients).astype(dtype)
        return scaled_by_experts(plain, mesh, np.asarray(codes.astype(jnp.float32) * scales), ids_Nk, None, dispatch)[0]

    bounds = products(1 - 1e-6), products(1 + 1e-6)
    got, _ = scaled_by_experts(rounding, mesh, x_ND, ids_Nk, None, dispatch)
    # Rounding is monotone: only at a tie the bounds are two codes.
    np.testing.assert_allclose(
        got, got.clip(np.minimum(*bounds), np.maximum(*bounds)), rtol=1e-5, atol=1e-6 * np.abs(got).max()
    )
    assert (got != scaled_by_experts(plain, mesh, x_ND, ids_Nk, None, dispatch)[0]).any()
    dy = rng.normal(size=x_ND.shape).astype(np.float32)
    gradients = [
        jax.grad(lambda x: (rounded_rows(x, dtype)[0] * rounded_rows(x, dtype)[1] * dy).sum())(jnp.asarray(x_ND)), dy
    ]  # fmt: skip
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_a_row_has_the_same_codes_on_every_mesh() -> None:
    rng = np.random.default_rng()
    x = jnp.asarray(rng.normal(size=(6, 64)) * rng.lognormal(size=(6, 1)), jnp.float32)
    for dtype in ("int8", "float8_e4m3fn"):
        mesh = make_mesh({"tensor": 4}, jax.devices()[:4])
        with jax.set_mesh(mesh):
            shards = jax.device_put(x, jax.NamedSharding(mesh, P(None, "tensor")))
            run = functools.partial(rounded_rows, dtype=dtype, axis="tensor")
            codes, scales = jax.jit(jax.shard_map(run, out_specs=(P(None, "tensor"), P())))(shards)
        want_codes, want_scales = rounded_rows(x, dtype)
        np.testing.assert_array_equal(np.asarray(codes), want_codes)
        np.testing.assert_array_equal(np.asarray(scales), want_scales)


@pytest.mark.parametrize("axes", [{"expert": 2}, {"expert": 8}, {"data": 2, "expert": 4}], ids=str)
@pytest.mark.parametrize("room", [1.0, 100.0])
def test_gathered_rows_meet_their_experts(axes: dict[str, int], room: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, by gathering. With less room, a token gets the sum over the rows that come first on each device."""
    monkeypatch.setattr(dropless, "ROOM", room)
    rng = np.random.default_rng()
    x_ND = rng.integers(-9, 10, (64, D)).astype(np.float32)
    ids_Nk = np.stack([rng.permutation(E)[:K] for _ in x_ND]).astype(np.int32)
    ids_Nk[:20] = ids_Nk[0]
    valid_N = rng.random(64) < 0.8
    got, (info,) = scaled_by_experts(*context(axes, training=True), x_ND, ids_Nk, valid_N, dispatch_gathered)
    assert type(info) is GatheredInfo
    # The first rows in the order of (expert, token) of each device of each group of an expert axis are there.
    fits = np.zeros(ids_Nk.shape, bool)
    n, groups = axes["expert"], axes.get("data", 1)
    for group in np.split(np.arange(64), groups):
        for own in np.split(np.arange(E), n):
            rows = [(i, t, j) for t in group for j, i in enumerate(ids_Nk[t]) if i in own and valid_N[t]]
            for _, t, j in sorted(rows)[: math.ceil(room * len(group) // n * K)]:
                fits[t, j] = True
    assert fits.sum() == valid_N.sum() * K or room == 1.0
    np.testing.assert_array_equal(got, x_ND * ((ids_Nk + 1) * fits).sum(1, keepdims=True))


@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_few_rows_are_not_sorted(tokens: int) -> None:
    """At most 16 rows, on one device and without padding, take the direct path, with the same result."""
    rng = np.random.default_rng()
    x_ND = rng.integers(-9, 10, (tokens, D)).astype(np.float32)
    ids_Nk = np.stack([rng.permutation(E)[:K] for _ in x_ND]).astype(np.int32)
    want = x_ND * (ids_Nk + 1).sum(1, keepdims=True)
    for valid_N, kind in (
        (None, FewRowsInfo if tokens * K <= 16 else DroplessInfo),
        (np.ones(tokens, bool), DroplessInfo),
    ):
        got, infos = scaled_by_experts(*context({}, training=False), x_ND, ids_Nk, valid_N)
        assert [type(info) for info in infos] == [kind]
        np.testing.assert_array_equal(got, want)


def test_gather_rows_and_sum_assignments_are_transposes() -> None:
    """Each has the other as its gradient; autodiff of the plain definitions says the same."""
    rng = np.random.default_rng()
    N = 10
    x_ND, y_AD = (jnp.asarray(rng.normal(size=(rows, D)), jnp.float32) for rows in (N, N * K))
    order_A = rng.permutation(N * K)
    order = RowOrder(jnp.asarray(order_A), jnp.asarray(np.argsort(order_A)))
    tokens_A = jnp.asarray(order_A // K)

    rows, pull = jax.vjp(lambda x: gather_rows(x, order, K), x_ND)
    plain_rows, plain_pull = jax.vjp(lambda x: x[tokens_A], x_ND)
    np.testing.assert_array_equal(rows, plain_rows)
    np.testing.assert_allclose(pull(y_AD)[0], plain_pull(y_AD)[0], rtol=1e-6, atol=1e-6)

    sums, pull = jax.vjp(lambda y: sum_assignments(y, order, K), y_AD)
    plain_sums, plain_pull = jax.vjp(lambda y: jnp.zeros((N, D)).at[tokens_A].add(y), y_AD)
    np.testing.assert_allclose(sums, plain_sums, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pull(x_ND)[0], plain_pull(x_ND)[0])


def test_a_partial_order_leaves_missing_rows_out() -> None:
    """Gathering rows and summing them are transposes of each other if some assignments have no row, too."""
    rng = np.random.default_rng()
    N, R = 10, 12
    chosen = rng.permutation(N * K)[:R]
    inverse_A = np.full(N * K, R)
    inverse_A[chosen] = np.arange(R)
    order = RowOrder(jnp.asarray(chosen), jnp.asarray(inverse_A), partial=True)
    x_ND, y_RD = (jnp.asarray(rng.integers(-9, 10, (rows, D)), jnp.float32) for rows in (N, R))
    rows, pull = jax.vjp(lambda x: gather_rows(x, order, K), x_ND)
    np.testing.assert_array_equal(rows, x_ND[chosen // K])
    want = jnp.zeros((N, D)).at[chosen // K].add(y_RD)
    np.testing.assert_array_equal(sum_assignments(y_RD, order, K), want)
    np.testing.assert_array_equal(pull(y_RD)[0], want)
    np.testing.assert_array_equal(jax.vjp(lambda y: sum_assignments(y, order, K), y_RD)[1](x_ND)[0], rows)


def test_windows_of_an_exchange_cover_every_row_once() -> None:
    """Rounds of any size together send what one exchange would, and what is sent is what the other side receives."""
    rng = np.random.default_rng()
    n, e, size = 4, 2, int(rng.integers(1, 30))
    sizes = rng.integers(0, 12, (n, n * e)).astype(np.int32)
    rounds = -(-int(sizes.reshape(n, n, e).sum((0, 2)).max()) // size)

    def local(sizes: jax.Array) -> Any:
        plan = plan_exchange(sizes[0], n)
        windows = [plan.window(i * size, size) for i in range(rounds)]
        return jax.tree.map(lambda *x: jnp.stack(x)[None], plan, *windows)

    mesh = jax.make_mesh((n,), ("expert",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,))
    run = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    plans = jax.device_get(jax.jit(run(local))(sizes))
    sent, received = plans.sent_ne, plans.received_ne  # [device, whole or round, other device, expert]
    np.testing.assert_array_equal(sent[:, 0], sizes.reshape(n, n, e))
    np.testing.assert_array_equal(sent[:, 1:].sum(1), sent[:, 0])
    np.testing.assert_array_equal(sent, received.transpose(2, 1, 0, 3))
    assert received[:, 1:].sum((2, 3)).max() <= size
    ends = plans.places_ne + received
    assert ends[:, 1:].max() <= size
    # A piece continues in the next round where it ended in this one.
    starts = plans.starts_ne[:, 1:]
    np.testing.assert_array_equal(starts, plans.starts_ne[:, :1] + np.cumsum(sent[:, 1:], 1) - sent[:, 1:])
