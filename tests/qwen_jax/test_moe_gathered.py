"""The exchange by gathering: one MoE layer on an expert axis is the layer on one device, with all its gradients."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.moe.exchange import layer_step, main
from experiments.moe.overlap import meanwhile
from qwen_jax.config import MoE
from qwen_jax.moe import dispatch, exchange, traffic
from qwen_jax.moe.exchange import ExpertExchange, select_exchange
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from tests.helpers.tpu_compiler import needs_libtpu
from train.plan.programs import collectives
from train.plan.topology import mesh_of, target

E, K, D, B, T = 8, 3, 32, 8, 16
CONFIG = dataclasses.replace(
    published("tiny-moe"), hidden_size=D, head_dim=8, num_heads=4, num_kv_heads=2, moe=MoE(E, K, 24, 40)
)

NORM = np.linspace(0.5, 1.5, D, dtype=np.float32)

Result = dict[str, Any]
"""Output, statistics of the router, and the gradients of a loss that uses both."""


def draw() -> dict[str, Any]:
    """Weights and tokens of a layer: random ones, and routers that no rounding error can change.

    The first component of a token decides between groups of experts, if the router's weight says so; see `skewed`.
    """
    rng = np.random.default_rng()
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes, _ = layer_step(CONFIG, Sharding.for_training(CONFIG, mesh), Options(), keep_dots=False)
    weights = jax.tree.map(lambda x: (rng.normal(size=x.shape) / math.sqrt(x.shape[-1])).astype(np.float32), shapes)
    router = weights["router"]["weight"]
    router[:, 0] = 0.0
    # Of two experts with nearly the same probability, another order of sums may choose the other one.
    x_ND = np.zeros((0, D), np.float32)
    while len(x_ND) < B * T:
        more = rng.normal(size=(4 * B * T, D)).astype(np.float32)
        more[:, 0] = 2.0
        logits = np.sort(NORM * more / np.sqrt(np.square(more).mean(1, keepdims=True)) @ router.T, axis=1)
        x_ND = np.concatenate([x_ND, more[np.diff(logits, axis=1).min(1) > 1e-3]])
    x_BTD = x_ND[: B * T].reshape(B, T, D)
    cotangent = rng.normal(size=(B, T, D)).astype(np.float32)
    return {"weights": weights, "x": x_BTD, "valid": rng.random((B, T)) < 0.8, "cotangent": cotangent}


def skewed(inputs: dict[str, Any], experts: list[int]) -> dict[str, Any]:
    """The same with a router that sends all tokens to some experts before all others."""
    router = inputs["weights"]["router"]["weight"].copy()
    router[experts, 0] = 20.0
    return {**inputs, "weights": {**inputs["weights"], "router": {"weight": router}}}


@functools.cache
def layer_on(
    axes: tuple[tuple[str, int], ...], room: float, keep_dots: bool, how: ExpertExchange = "gathered"
) -> Callable[..., Result]:
    """The layer, compiled once, as a function of what `draw` gives."""
    sizes = dict(axes)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    sharding, options = Sharding.for_training(CONFIG, mesh), Options(expert_exchange=how)
    with jax.set_mesh(mesh):
        shapes, step = layer_step(CONFIG, sharding, options, keep_dots)
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731

    def run(inputs: dict[str, Any]) -> Result:
        with jax.set_mesh(mesh):
            weights = jax.tree.map(lambda x, shape: put(x, shape.sharding.spec), inputs["weights"], shapes)
            norm = put(NORM, sharding.norm)
            arrays = put(inputs["x"], sharding.hidden), put(inputs["valid"], sharding.tokens)
            value, gradients = jax.device_get(step(weights, norm, *arrays, put(inputs["cotangent"], sharding.hidden)))
        assert step._cache_size() == 1, "Another routing must not compile the layer again."
        return {"out": value[1][0], "stats": value[1][1], "gradients": gradients}

    return run


ONE_DEVICE: tuple[tuple[str, int], ...] = ()


def agree(got: Result, want: Result) -> None:
    """Sums of some hundreds of float32 terms in another order: 1e-4 of the largest element bounds their difference."""
    np.testing.assert_array_equal(got["stats"].load_E, want["stats"].load_E)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-6)


@pytest.mark.draw(3)
@pytest.mark.parametrize("room", [0.4, 1.5, 4.0])
@pytest.mark.parametrize("keep_dots", [False, True], ids=["all kept", "dots kept"])
@pytest.mark.parametrize(
    "axes",
    [
        {"expert": 2},
        {"expert": 4},
        {"expert": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "expert": 2, "context": 2},
        {"expert": 8},
    ],
    ids=str,
)
def test_the_layer_is_that_of_one_device(axes: dict[str, int], keep_dots: bool, room: float, monkeypatch: Any) -> None:
    """Output, statistics and every gradient: with even loads, and with all tokens at one device, in further rounds."""
    monkeypatch.setattr(dispatch, "ROOM", room)
    run, single = layer_on(tuple(axes.items()), room, keep_dots), layer_on(ONE_DEVICE, 0.0, False)
    inputs = draw()
    e = E // axes["expert"]
    for case in (inputs, skewed(inputs, list(range(e))), skewed(inputs, list(range(E - e, E)))):
        agree(run(case), single(case))
    nothing = {**inputs, "valid": np.zeros((B, T), bool)}
    assert not run(nothing)["stats"].load_E.any()


@pytest.mark.draw(1)
@pytest.mark.parametrize("room", [0.7, 4.0])
def test_tokens_do_not_depend_on_their_places(room: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that change places, between devices too, take their outputs and gradients with them."""
    monkeypatch.setattr(dispatch, "ROOM", room)
    run, inputs = layer_on((("expert", 4),), room, False), draw()
    places = np.random.default_rng().permutation(B * T)
    move = lambda x: x.reshape(B * T, -1)[places].reshape(x.shape)  # noqa: E731
    want = run(inputs)
    got = run({"weights": inputs["weights"], **{name: move(inputs[name]) for name in ("x", "valid", "cotangent")}})
    weights, norm, x = want["gradients"]
    agree(got, {**want, "out": move(want["out"]), "gradients": (weights, norm, move(x))})


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are not valid are sent to no expert: whatever they are, all others get the same bits."""
    monkeypatch.setattr(dispatch, "ROOM", 1.5)
    run, inputs = layer_on((("expert", 4),), 1.5, False), draw()
    valid = inputs["valid"]
    other = np.where(
        valid[..., None], inputs["x"], np.random.default_rng().permutation(inputs["x"].reshape(-1)).reshape(B, T, D)
    )
    want, got = run(inputs), run({**inputs, "x": other})
    np.testing.assert_array_equal(got["out"][valid], want["out"][valid])
    np.testing.assert_array_equal(got["gradients"][2][valid], want["gradients"][2][valid])


@pytest.mark.parametrize(
    ("platform", "asked", "axis", "want"),
    [
        ("gpu", "auto", 2, "gathered"),
        ("gpu", "auto", K, "gathered"),
        ("gpu", "auto", K + 1, "rows"),
        ("gpu", "rows", 2, "rows"),
        ("tpu", "auto", 2, "rows"),
        ("cpu", "auto", 2, "rows"),
        ("tpu", "gathered", 8, "gathered"),
    ],
)
def test_choice_of_the_exchange(
    platform: str, asked: Any, axis: int, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange.platform, "platform", lambda: platform)
    assert select_exchange(asked, axis, K) == want


# --- bytes -----------------------------------------------------------------------------------------------------------


def sent(mesh: Any, config: Any, how: ExpertExchange, keep_dots: bool, dtype: str, tokens: int) -> dict[str, float]:
    """Bytes that a device sends in the compiled layer, by kind of collective; `tokens` are those of a device."""
    sharding = Sharding.for_training(config, mesh)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    with jax.set_mesh(mesh):
        weights, step = layer_step(config, sharding, Options(expert_exchange=how), keep_dots)
        shape = lambda shape, dtype, spec: jax.ShapeDtypeStruct(  # noqa: E731
            shape, dtype, sharding=jax.NamedSharding(mesh, spec)
        )
        x = shape((mesh.size, tokens, config.hidden_size), dtype, sharding.hidden)
        valid = shape(x.shape[:2], bool, sharding.tokens)
        traced = step.trace(weights, shape(x.shape[2:], "float32", sharding.norm), x, valid, x)
        lowered = traced.lower(lowering_platforms=("tpu",)) if on_tpu else traced.lower()
        compiled = lowered.compile(None if on_tpu else {"xla_backend_optimization_level": "0"})
    found: dict[str, float] = collections.defaultdict(float)
    for collective in collectives(compiled.as_text(), mesh.size):
        if how == "gathered" or not collective.shape.startswith("s32"):
            found[collective.kind] += collective.bytes * collective.times
    return found


@pytest.mark.draw(2)
@pytest.mark.parametrize("axis", [2, 4, 8])
@pytest.mark.parametrize("keep_dots", [False, True], ids=["all kept", "dots kept"])
def test_bytes_of_gathering_are_those_of_the_compiled_layer(axis: int, keep_dots: bool) -> None:
    """Exactly, on CPUs. All-gathers and all-to-alls are the exchange's alone; sums of gradients are all-reduces."""
    rng = np.random.default_rng()
    moe = MoE(E, int(rng.integers(1, E)), 24, 40)
    tokens = int(rng.integers(8, 40))
    mesh = make_mesh({"expert": axis}, jax.devices()[:axis])
    found = sent(mesh, dataclasses.replace(CONFIG, moe=moe), "gathered", keep_dots, "float32", tokens)
    want = traffic.gathered(moe, axis, tokens, D, 4)
    assert found["all-gather"] + found["all-to-all"] == want.total - (0 if keep_dots else want.recomputed)


@pytest.mark.draw(1)
@needs_libtpu
@pytest.mark.parametrize("how", ["rows", "gathered"])
def test_bytes_are_those_of_the_layer_compiled_for_tpus(how: ExpertExchange) -> None:
    """Both exchanges in bfloat16, for 4 chips of v5p. Ragged exchanges count as for even loads, and the numbers of rows
    are left out: there are few of them, and the compiler may exchange them in another way."""
    moe, tokens = MoE(8, 2, 128, 256), 256
    config = dataclasses.replace(CONFIG, hidden_size=256, head_dim=64, moe=moe)
    found = sent(mesh_of(target("v5p:2x2x1"), {"expert": 4}), config, how, True, "bfloat16", tokens)
    kinds = "all-gather", "all-to-all", "ragged-all-to-all"
    assert bool(found["ragged-all-to-all"]) == (how == "rows")
    want = getattr(traffic, how)(moe, 4, tokens, 256, 2).total
    if how == "rows":
        want -= 3 * 8 * 4
    assert sum(found[kind] for kind in kinds) == want


def test_no_exchange_sends_fewer_bytes_than_the_least() -> None:
    """The least is that of an exact count over random experts; each exchange sends at least as many bytes."""
    rng = np.random.default_rng()
    axis, tokens, hidden = int(rng.choice([2, 4, 8])), 4000, int(rng.integers(8, 100))
    moe = MoE(E, int(rng.integers(1, E)), 24, 40)
    least = traffic.least(moe, axis, tokens, hidden, 2)
    for how in (traffic.rows, traffic.gathered):
        other = how(moe, axis, tokens, hidden, 2)
        assert other.forward > least.forward
        assert other.backward > least.backward
    # Over all sets of experts: the mean number of devices but one that have an expert of the set.
    sets = list(itertools.combinations(range(E), moe.num_experts_per_tok))
    devices = np.mean([len({i * axis // E for i in chosen} - {0}) for chosen in sets])
    np.testing.assert_allclose(least.forward, 2 * devices * tokens * hidden * 2, rtol=1e-12)


def test_bytes_in_the_documentation_are_those_of_the_formulas() -> None:
    text = (Path(__file__).parents[2] / "docs" / "moe.md").read_text()
    found = re.findall(r"^ +\| (Qwen\S+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(found) == 6
    for name, axis, *numbers in found:
        model = published(name.lower())
        assert model.moe is not None
        assert model.moe.num_experts % int(axis) == 0
        shape = model.moe, int(axis), 1, model.hidden_size, 2
        one_way = (
            traffic.rows(*shape).recomputed,
            traffic.gathered(*shape).recomputed,
            traffic.least(*shape).forward / 2,
        )
        assert [round(n) for n in one_way] == [int(number.replace(",", "")) for number in numbers]


# --- the experiment --------------------------------------------------------------------------------------------------


def test_the_experiment_measures_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Two records with the same loss, since all layouts compute the same, and a table that has them."""
    begin = dispatch.ROOM
    main("--size tiny --devices 2 --parts layer --kinds gathered fsdp --steps 1 --warmup 1".split())
    assert begin == dispatch.ROOM
    lines = capsys.readouterr().out.splitlines()
    about, gathered, fsdp = (json.loads(line) for line in lines[:3])
    assert about["devices"] == gathered["devices"] == 2
    assert (gathered["kind"], fsdp["kind"]) == ("gathered", "fsdp")
    np.testing.assert_allclose(gathered["loss"], fsdp["loss"], rtol=1e-3)
    assert gathered["least_mb"] < gathered["formula_mb"] < gathered["sent_mb"]
    for record, row in zip((gathered, fsdp), lines[-2:], strict=True):
        assert f"| {record['part']} | {record['kind']} | {record['ms']:.2f} | " in row


def test_the_experiment_steps_a_training_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = "--size tiny --devices 2 --layers 1 --parts step --kinds gathered --steps 1 --warmup 1 --profile"
    main([*settings.split(), str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[1])
    folder = tmp_path / "step-gathered"
    assert json.loads((folder / "steps.json").read_text())["steps"] == 1
    assert "ENTRY" in (folder / "step.hlo.txt").read_text()
    assert list(folder.rglob("*.xplane.pb"))
    assert 4 < record["loss"] < 8
    assert record["formula_mb"] > record["least_mb"]


def test_products_under_way_of_an_exchange_are_those_between_its_start_and_its_end() -> None:
    """Of a program as the GPU compiler writes it: small exchanges, other computations and copies do not count."""
    hlo = """
%fused (p: bf16[4,4]) -> bf16[4,4] {
  %all-gather-start.9 = ((bf16[900,900]{1,0}), bf16[1800,900]{1,0}) all-gather-start(%p)
}

ENTRY %main (x: bf16[900,900]) -> bf16[900,900] {
  %x = bf16[900,900]{1,0} parameter(0)
  %before = bf16[9,9]{1,0} fusion(%x), kind=kCustom, metadata={op_name="jit(f)/A,AB->B/dot_general"}
  %all-gather-start.1 = ((bf16[900,900]{1,0}), bf16[1800,900]{1,0}) all-gather-start(%x), metadata={op_name="jit(f)/g"}
  %all-gather-start.2 = ((bf16[9,9]{1,0}), bf16[18,9]{1,0}) all-gather-start(%before), metadata={op_name="jit(f)/g"}
  %view = bf16[81]{0} bitcast(%before), metadata={op_name="jit(f)/A,AB->B/dot_general"}
  %one = bf16[9,9]{1,0} fusion(%x), kind=kCustom, metadata={op_name="jit(f)/BTD,FD->BTF/dot_general"}
  %all-gather-done.2 = bf16[18,9]{1,0} all-gather-done(%all-gather-start.2)
  %two = bf16[9,9]{1,0} custom-call(%x), metadata={op_name="jit(f)/grouped_product/call"}
  %all-gather-done.1 = bf16[1800,900]{1,0} all-gather-done(%all-gather-start.1)
  %all-to-all-start = ((bf16[900,900]{1,0}), bf16[900,900]{1,0}) all-to-all-start(%x), metadata={op_name="transpose(g)"}
  ROOT %all-to-all-done = bf16[900,900]{1,0} all-to-all-done(%all-to-all-start)
}
"""
    assert list(meanwhile(hlo)) == [
        {"exchange": "all-gather", "pass": "forward", "products": ["BTD,FD->BTF", "grouped_product"]},
        {"exchange": "all-to-all", "pass": "backward", "products": []},
    ]
