"""Training of MoE models: layouts agree, the balance is that of the whole batch, and failures are named."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from convert import load_params
from qwen_jax.config import MoE, load_config
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.grouped import grouped_matmul
from qwen_jax.moe import dispatch as moe
from qwen_jax.moe import exchange
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, init_params, param_specs
from qwen_jax.published import published
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.processes import run
from tests.train.test_train_layouts import rows
from train.data.batch import Batch, place
from train.data.loader import batches
from train.loop import ByStep, Diagnosis, LoopConfig, Monitor, fit
from train.moe import LoadLog, MoETraining, balance_loss, read_loads
from train.observe.metrics import flops_per_token
from train.observe.plots import plot_experts
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import fresh_state
from train.step import BatchGradient, StepConfig, batch_gradient, eval_step, make_train_step

STEPS = 30
MODEL = dataclasses.replace(
    published("tiny-moe"),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    head_dim=8,
    num_layers=3,
    moe=MoE(8, 2, 16, 32, mlp_only_layers=(0,)),
)
BALANCE = MoETraining(balance_loss=0.05, router_z_loss=1e-3)
GATHERED = dataclasses.replace(BALANCE, expert_exchange="gathered")
# float32 sums in another order may send a token that is between two experts to the other one.
TOLERANCE = 5e-3


OPTIMIZER = OptimizerConfig(Schedule(STEPS, 1e-2, warmup_steps=5))


def config(moe: MoETraining = BALANCE, **changes: Any) -> tuple[NextToken, StepConfig]:
    objective = NextToken(MODEL, PretrainConfig(loss_chunk=64, moe=moe))
    return objective, StepConfig(**{"dtype": "float32", "remat": "none", **changes})


@functools.cache
def weights() -> Any:
    mesh = make_mesh({}, jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(init_params(MODEL, jax.random.key(0), mesh))


def on_mesh(params: Any, mesh: Any) -> Params:
    specs = param_specs(MODEL, Sharding.for_training(MODEL, mesh))
    placed: Params = jax.tree.map(
        lambda x, spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda i: x[i]),
        params,
        specs,
    )
    return placed


def curve(axes: dict[str, int], params: Any, **changes: Any) -> dict[str, np.ndarray]:
    """Metrics of each step."""
    (objective, settings), mesh, data = config(**changes), make_mesh(axes), batches(rows(), 32, seed=0)
    with jax.set_mesh(mesh):
        state = fresh_state(OPTIMIZER, on_mesh(params, mesh), mesh)
        step = make_train_step(objective, OPTIMIZER, settings, mesh)
        lowered = step.lower(state, place(data[0], mesh))  # type: ignore[attr-defined]
        step = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
        found = []
        for i in range(STEPS):
            state, numbers = step(state, place(data[i], mesh))
            found.append(jax.device_get(numbers))  # Which also waits: see test_train_layouts.
        return {name: np.array([numbers[name] for numbers in found]) for name in found[0]}


@functools.cache
def one_device() -> dict[str, np.ndarray]:
    return curve({}, weights())


def agree(got: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    want = one_device()
    for name in ("loss", "grad_norm", "balance_loss", "router_z_loss"):
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(got["expert_load"][0], want["expert_load"][0], rtol=1e-6)


def test_the_curve_that_all_are_compared_with_learns() -> None:
    want = one_device()
    assert want["loss"][0] > 4
    assert want["loss"][-1] < 2.5
    assert not want["dropped"].any()
    np.testing.assert_allclose(want["expert_load"].sum(2), 8.0, rtol=1e-5)


@pytest.mark.draw(2)
@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ({"expert": 2}, {"accumulation": 4}),
        ({"expert": 4}, {"remat": "dots"}),
        ({"expert": 8}, {"remat": "full"}),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, {"remat": "dots", "scan_layers": False}),
        ({"expert": 2, "context": 4}, {}),
        ({"data": 2, "expert": 2, "context": 2}, {"accumulation": 2, "ring": True}),
        ({"fsdp": 4, "tensor": 2}, {"scan_layers": False, "remat": "full"}),
        ({}, {"accumulation": 8, "remat": "dots"}),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, {"remat": "dots", "moe": GATHERED}),
        ({"data": 2, "expert": 2, "context": 2}, {"remat": "full", "moe": GATHERED, "accumulation": 2}),
        # Room for all tokens in each expert: nothing is dropped.
        ({"expert": 4}, {"remat": "dots", "moe": dataclasses.replace(BALANCE, capacity_factor=4.0)}),
        ({"expert": 2, "tensor": 2}, {"remat": "full", "moe": dataclasses.replace(BALANCE, capacity_factor=4.0)}),
    ],
    ids=str,
)
def test_layouts_agree(axes: dict[str, int], changes: dict[str, Any]) -> None:
    agree(curve(axes, weights(), **changes))


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ({"expert": 2, "fsdp": 2, "tensor": 2}, {"remat": "none"}),
        ({"expert": 4}, {"remat": "dots", "accumulation": 2}),
        ({"expert": 8}, {"remat": "full"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("room", [0.3, 1.0])
@pytest.mark.parametrize("moe_training", [BALANCE, GATHERED], ids=["rows", "gathered"])
def test_rows_that_find_no_room_come_in_further_rounds(
    monkeypatch: pytest.MonkeyPatch,
    axes: dict[str, int],
    changes: dict[str, Any],
    room: float,
    moe_training: MoETraining,
) -> None:
    """However few rows a device has room for at one time, no token is dropped, and the curve is that of one device."""
    monkeypatch.setattr(moe, "ROOM", room)
    agree(curve(axes, weights(), moe=moe_training, **changes))


@pytest.mark.draw(1)
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("moe_training", [BALANCE, GATHERED], ids=["rows", "gathered"])
def test_what_is_beyond_the_rows_that_come_is_never_read(
    monkeypatch: pytest.MonkeyPatch, moe_training: MoETraining, remat: str
) -> None:
    """Buffers have room for the worst case; with NaN in all unused rows, a curve stays bit-identical."""
    axes = {"data": 2, "expert": 4}
    monkeypatch.setattr(moe, "ROOM", 0.8)  # A second round is not full.
    want = curve(axes, weights(), moe=moe_training, remat=remat)
    spoiled = 0

    def spoil(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], x, jnp.nan)

    spoil_both_ways = jax.custom_vjp(spoil)
    spoil_both_ways.defvjp(lambda x, sizes: (spoil(x, sizes), sizes), lambda sizes, by: (spoil(by, sizes), None))

    def grouped(x: jax.Array, w: jax.Array, sizes_G: jax.Array, *, fill: bool, **options: Any) -> jax.Array:
        nonlocal spoiled
        assert not fill
        spoiled += 1
        y = grouped_matmul(spoil_both_ways(x, sizes_G), w, sizes_G, fill=fill, **options)
        return spoil_both_ways(y, sizes_G)

    monkeypatch.setattr(moe, "grouped_matmul", grouped)
    got = curve(axes, weights(), moe=moe_training, remat=remat)
    assert spoiled
    for name, numbers in want.items():
        np.testing.assert_array_equal(got[name], numbers, err_msg=name)


def test_pieces_for_the_collective_are_what_is_exchanged_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulation of `ragged_all_to_all` by its documentation moves rows as our fallback does, there and back."""
    n, e, M, size = 4, 3, 40, 100
    numbers = np.random.default_rng()
    sizes = np.stack([numbers.multinomial(numbers.integers(M + 1), [1 / 12] * 12) for _ in range(n)]).astype(np.int32)
    sizes[1, 3:9], sizes[2] = 0, 0
    sizes[3] = [0] * 11 + [M]

    def ragged(rows: Any, room: Any, starts: Any, sent: Any, there: Any, received: Any, axis_name: str) -> Any:
        """The pseudo-code of its documentation, all devices' arguments gathered."""
        rows, starts, sent, there = (jax.lax.all_gather(x, axis_name) for x in (rows, starts, sent, there))
        me, place = jax.lax.axis_index(axis_name), jnp.arange(room.shape[0])
        for origin in range(n):
            for i in range(e):
                piece = me * e + i
                within = place - there[origin, piece]
                is_here = (within >= 0) & (within < sent[origin, piece])
                at = jnp.clip(starts[origin, piece] + within, 0, rows.shape[1] - 1)
                room = jnp.where(is_here[:, None], rows[origin, at], room)
        return room

    def there_and_back(rows: Any, sizes: Any) -> Any:
        p = exchange.plan_exchange(sizes[0], n)
        there = exchange.send(rows, p, size)
        used = jnp.arange(size)[:, None] < p.sizes_e.sum()
        there = jnp.where(used, there, 0)
        number = exchange.send_scalars(rows[:, 0], p, size)
        return there, p.received_ne[None], p.sent_ne[None], number, exchange.send_back(there, p, M)

    mesh = jax.make_mesh((n,), ("expert",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.asarray(numbers.integers(1, 1000, (n * M, 2)), jnp.float32)
    results = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(exchange.platform, "platform", lambda platform=platform: platform)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
        run = jax.shard_map(there_and_back, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
        results.append(jax.device_get(jax.jit(run)(rows, sizes)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    there, received, sent, number, back = results[0]
    np.testing.assert_array_equal(received, sizes.reshape(n, n, e).swapaxes(0, 1))
    np.testing.assert_array_equal(sent, sizes.reshape(n, n, e))
    np.testing.assert_array_equal(number, there[:, 0])
    by_device = np.asarray(rows).reshape(n, M, 2)
    for device in range(n):
        # By expert, then by origin: as if the rows of all devices were sorted by expert together.
        pieces = [
            by_device[origin, sizes[origin, :expert].sum() :][: sizes[origin, expert]]
            for expert in range(device * e, device * e + e)
            for origin in range(n)
        ]
        want = np.concatenate(pieces)
        np.testing.assert_array_equal(there[device * size :][: len(want)], want)
        used = sizes[device].sum()
        np.testing.assert_array_equal(back[device * M :][:used], by_device[device, :used])
        assert not back[device * M + used : (device + 1) * M].any()


def on_eight(params: Any) -> dict[str, np.ndarray]:
    """In one of several processes: rows go from one to the other."""
    return curve({"data": 2, "expert": 4}, params)


def test_two_processes_of_four_devices_are_one() -> None:
    first, second = run(on_eight, weights(), processes=2, devices=4)
    np.testing.assert_array_equal(first["loss"], second["loss"])
    agree(first)


# --- balance ---------------------------------------------------------------------------------------------------------


def gradient(batch: Batch, **changes: Any) -> tuple[Any, Any, Any]:
    """The gradient, the sums over the denominator, and the routing."""
    (objective, settings), mesh = config(**changes), make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_training(MODEL, mesh)
    with jax.set_mesh(mesh):
        params = on_mesh(weights(), mesh)
        compute = jax.jit(functools.partial(batch_gradient, objective, settings, sharding))
        found: BatchGradient[Any] = jax.device_get(compute(params, place(batch, mesh)))
        return found.gradient, found.means, found.statistics


def test_balance_is_the_plain_formula_and_that_of_any_split() -> None:
    """Loss and gradient of a batch of unlike micro-batches: equal if counted ahead, different if counted so far."""
    batch = batches(rows(), 16, seed=1)[0]
    order = np.argsort(batch.tokens.mean(1))  # Parts take every fourth row: make these unlike each other.
    order = order.reshape(4, 4).T.reshape(-1)
    batch = jax.tree.map(lambda x: x[order], batch)
    moe = MoETraining(balance_loss=10.0)
    whole, means, routing = gradient(batch, moe=moe)
    E, tokens = 8, (batch.segment_ids > 0).sum()
    assert routing.tokens[0] == tokens
    plain = np.mean(
        [
            E * sum(f / tokens * p / tokens for f, p in zip(*layer, strict=True))
            for layer in zip(routing.load_E, routing.probability_E, strict=True)
        ]
    )
    np.testing.assert_allclose(means.loss - means.reported, 10 * plain, rtol=1e-4)
    np.testing.assert_allclose(balance_loss(routing.load_E, routing.probability_E, tokens), plain, rtol=1e-5)

    parts, part_means, part_routing = gradient(batch, moe=moe, accumulation=4)
    np.testing.assert_allclose(part_means.loss, means.loss, rtol=1e-5)
    np.testing.assert_array_equal(part_routing.load_E, routing.load_E)
    router = lambda tree: tree["layers"]["moe"]["router"]["weight"]  # noqa: E731
    scale = np.abs(router(whole)).max()
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7)
    so_far, _, _ = gradient(batch, moe=dataclasses.replace(moe, count_ahead=False), accumulation=4)
    assert np.abs(router(so_far) - router(whole)).max() > 1e-3 * scale


@functools.cache
def router_gradient(balance: float, z: float, remat: str = "none", scan_layers: bool = True) -> np.ndarray:
    """All targets have weight 0, so that only the two router losses contribute."""
    batch = batches(rows(), 8, seed=2)[0]
    silent = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    moe = MoETraining(balance_loss=balance, router_z_loss=z)
    got, _, _ = gradient(silent, moe=moe, remat=remat, scan_layers=scan_layers)
    layers = got["layers"]
    found = layers["moe"] if scan_layers else jax.tree.map(lambda *x: np.stack(x), *(x["moe"] for x in layers[1:]))
    return np.asarray(found["router"]["weight"])


def test_both_losses_reach_the_gradient_of_every_router() -> None:
    assert not router_gradient(0.0, 0.0).any()
    both, balance, z = router_gradient(1.0, 1.0), router_gradient(1.0, 0.0), router_gradient(0.0, 1.0)
    assert min(np.abs(balance[i]).max() for i in range(2)) > 1e-4
    assert min(np.abs(z[i]).max() for i in range(2)) > 1e-4
    np.testing.assert_allclose(both, balance + z, atol=1e-6)


@pytest.mark.parametrize(
    ("remat", "scan_layers"), [("dots", True), ("full", True), ("none", False), ("dots", False), ("full", False)]
)
def test_they_reach_it_whatever_is_recomputed(remat: str, scan_layers: bool) -> None:
    want = router_gradient(1.0, 1.0)
    np.testing.assert_allclose(router_gradient(1.0, 1.0, remat, scan_layers), want, atol=1e-5 * np.abs(want).max())


def test_their_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """With one layer, for which transformers' pooled loss equals ours, without padding; to 1e-4 of the largest."""
    model = make_hf_checkpoint(tmp_path, moe=True, num_hidden_layers=1)
    ids = np.random.default_rng(8).integers(0, 160, (2, 24)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[1, 15:] = 0
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    batch = Batch(ids, positions, segments, np.zeros(ids.shape, np.float32))
    mask = torch.as_tensor(segments > 0)
    logits = model(torch.as_tensor(ids).long(), attention_mask=mask, output_router_logits=True).router_logits
    loss = 3.0 * load_balancing_loss_func(logits, 8, 3, mask)
    loss = loss + 0.5 * torch.logsumexp(logits[0][mask.reshape(-1)], -1).square().mean()
    loss.backward()
    of = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    mesh, architecture = make_mesh({}, jax.devices()[:1]), load_config(tmp_path)
    objective, settings = config(moe=MoETraining(3.0, 0.5))
    objective = dataclasses.replace(objective, model=architecture)
    sharding = Sharding.for_training(architecture, mesh)
    with jax.set_mesh(mesh):
        params = load_params(tmp_path, architecture, mesh)
        compute = jax.jit(functools.partial(batch_gradient, objective, settings, sharding))
        found = compute(params, place(batch, mesh))
    got = found.gradient
    np.testing.assert_allclose(found.means.loss, loss.item(), rtol=1e-5)
    pairs = [
        (got["layers"]["moe"]["router"]["weight"][0], "model.layers.0.mlp.gate.weight"),
        (got["layers"]["attention"]["o"]["weight"][0].reshape(64, 64), "model.layers.0.self_attn.o_proj.weight"),
        (got["embed"]["weight"], "model.embed_tokens.weight"),
    ]
    for mine, name in pairs:
        np.testing.assert_allclose(mine, of[name], atol=1e-4 * np.abs(of[name]).max(), err_msg=name)


def test_evaluation_loses_no_token_and_adds_no_loss() -> None:
    batch, mesh = batches(rows(), 8, seed=4)[0], make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_training(MODEL, mesh)
    found = []
    with jax.set_mesh(mesh):
        params = on_mesh(weights(), mesh)
        for moe in (MoETraining(), MoETraining(balance_loss=9.0, capacity_factor=0.25)):
            sums, _ = eval_step(*config(moe=moe), sharding, params, place(batch, mesh))
            found.append((float(sums.loss), float(sums.reported)))
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]


def test_a_tight_capacity_drops_and_says_so() -> None:
    _, _, routing = gradient(batches(rows(), 8, seed=5)[0], moe=MoETraining(capacity_factor=0.5))
    assert (routing.dropped > 0).all()
    assert (routing.dropped <= routing.load_E.sum(1)).all()


# --- watching --------------------------------------------------------------------------------------------------------


def test_a_router_that_is_not_finite_is_named() -> None:
    mesh, broken = make_mesh({}, jax.devices()[:1]), jax.tree.map(np.array, weights())
    broken["layers"]["moe"]["router"]["weight"][1] = np.nan
    with jax.set_mesh(mesh):
        objective, settings = config()
        state = fresh_state(OPTIMIZER, on_mesh(broken, mesh), mesh)
        data = ByStep(batches(rows(), 8, seed=6))
        step = make_train_step(objective, OPTIMIZER, settings, mesh)
        loop, diagnosis = LoopConfig(max_skipped=2), Diagnosis[Batch](objective.explain)
        with pytest.raises(InputError, match=r"router of layer 3 \(counted from 1\) gives logits that are not finite"):
            fit(9, state, step, data, mesh=mesh, config=loop, diagnosis=diagnosis)


def test_loads_are_logged_and_drawn(tmp_path: Path) -> None:
    mesh, log = make_mesh({}, jax.devices()[:1]), LoadLog(tmp_path / "experts.jsonl", MODEL.sparse_layers, steps=6)
    with jax.set_mesh(mesh):
        objective, settings = config()
        state = fresh_state(OPTIMIZER, on_mesh(weights(), mesh), mesh)
        step = make_train_step(objective, OPTIMIZER, settings, mesh)
        fit(6, state, step, ByStep(batches(rows(), 8, seed=7)), mesh=mesh, monitor=Monitor(arrays=log.write))
    steps, loads, layers = read_loads(tmp_path / "experts.jsonl")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert loads.shape == (6, 2, 8)
    np.testing.assert_allclose(loads.mean(2), 1.0, atol=1e-3)
    plot_experts(steps, loads, layers, tmp_path / "experts.png", "a run")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    # A run that resumes from step 3 writes 4 to 6 again; a line that was cut is dropped.
    with (tmp_path / "experts.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    LoadLog(tmp_path / "experts.jsonl", MODEL.sparse_layers, steps=6, resume_step=3)
    assert [json.loads(line)["step"] for line in (tmp_path / "experts.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_flops_count_the_experts_that_a_token_takes() -> None:
    """6 FLOPs for each active weight of a matrix product, without attention."""
    for name in ("qwen2-57b-a14b", "qwen1.5-moe-a2.7b"):
        model = published(name)
        small = model.num_layers * (2 + 2 * model.num_kv_heads + model.num_heads) * 10_000  # norms and biases, about
        got = flops_per_token(model, 0)
        assert 0 <= 6 * model.num_params()["active"] - got < 6 * small


@pytest.mark.parametrize(
    "changes", [{"balance_loss": -1.0}, {"router_z_loss": float("nan")}, {"capacity_factor": -0.5}]
)
def test_odd_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} must be at least 0"):
        MoETraining(**changes)  # type: ignore[arg-type]
