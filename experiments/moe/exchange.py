"""Times an expert axis with each exchange of tokens beside fsdp, on the GPUs of one machine.

    python -m experiments.moe.exchange                                   # all GPUs
    python -m experiments.moe.exchange --devices 2 --room 2 --profile traces
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python -m experiments.moe.exchange --size tiny

Measures, in one process and one after the other, on the same tokens: one MoE layer, forward and backward, and a whole
training step of a few layers. `rows` and `gathered` are the exchanges of `qwen_jax.moe` on an expert axis over all
devices, `fsdp` has no expert axis, and `one` is a single device. At the default size a layer is Qwen1.5-MoE-A2.7B's, a
step has 4 of them, and each device has 4 rows of 4,096 tokens. Every line is JSON; a table comes last.

`sent_mb` are the bytes that one device sends in all collectives of the compiled program; ragged exchanges count as for
even loads, and further rounds do not count. `link_ms` is the time that these bytes take on the links at full rate, with
nothing else. `formula_mb` and `least_mb` are those of `qwen_jax.moe.traffic`, for the exchanges alone. `load_max` is
the load of the busiest expert over the mean at the last step. A trace of `--profile` is read by
`python -m experiments.train.benchmark kernels DIR/step-gathered`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.linear import rms_norm
from qwen_jax.model import MLP
from qwen_jax.moe import dispatch, traffic
from qwen_jax.moe.block import MoE
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.data.batch import Batch, place
from train.moe import MoETraining
from train.optimizer import OptimizerConfig, Schedule
from train.plan.programs import collectives
from train.pretrain import NextToken, PretrainConfig
from train.state import init_state
from train.step import StepConfig, make_train_step

KINDS = ("rows", "gathered", "fsdp", "one")
PARTS = ("layer", "step")
LINK = 450.0  # GB/s that an H100 or H200 (SXM) sends over NVLink, by the vendor's datasheet: half of 900.


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      model: with the number of layers of the step.
      rows: of one device.
      length: tokens of a row.
      dtype: of activations and products.
    """

    model: ModelConfig
    rows: int
    length: int
    dtype: str


def size_of(name: str, layers: int) -> Size:
    """The sizes of the command line: "a2.7b" for GPUs, "tiny" for CPUs."""
    if name == "tiny":
        return Size(dataclasses.replace(published("tiny-moe"), num_layers=layers), 2, 32, "float32")
    model = dataclasses.replace(published("qwen1.5-moe-a2.7b"), num_layers=layers, max_window_layers=layers)
    return Size(model, 4, 4096, "bfloat16")


def make_layer(config: ModelConfig, sharding: Sharding, options: Options) -> MoE:
    """The routed experts and the shared expert of one layer."""
    assert config.moe is not None
    shared = MLP(config, sharding, nnx.Rngs(1), options, config.moe.shared_intermediate_size, "moe.shared")
    return MoE(config, sharding, nnx.Rngs(0), options, shared)


def layer_step(
    config: ModelConfig, sharding: Sharding, options: Options, keep_dots: bool
) -> tuple[dict[str, Any], jax.stages.Wrapped]:
    """The forward and backward pass of one MoE layer with its norm.

    Args:
      config: the architecture.
      sharding: of the current mesh.
      options: such as the exchange.
      keep_dots: the backward pass keeps the results of matrix products and recomputes everything else.

    Returns:
      The weights as `jax.ShapeDtypeStruct` in a nested dict, and a jitted function of weights, norm_D, x_BTD, valid_BT
      and the gradient with respect to the output. It returns ((loss, (output, router's statistics)), gradients with
      respect to weights, norm and x). The loss also has a balance loss and a z-loss.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make_layer(config, sharding, options)))
    treedef, mesh = jax.tree.structure(state), jax.sharding.get_abstract_mesh()

    def abstract(variable: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, variable.get_metadata("spec"))
        return jax.ShapeDtypeStruct(variable.shape, jnp.float32, sharding=where)

    def loss(weights: Any, norm_D: jax.Array, x_BTD: jax.Array, valid_BT: jax.Array, dout_BTD: jax.Array) -> Any:
        layer: MoE = nnx.merge(graphdef, jax.tree.unflatten(treedef, jax.tree.leaves(weights)))
        h_BTD = rms_norm(x_BTD, norm_D, config.rms_norm_eps)
        shared_BTD = layer.apply_shared_gate(h_BTD, layer.shared.down_swiglu(*layer.shared.gate_and_up(h_BTD)))
        out_BTD, stats = layer.routed(x_BTD, norm_D, valid_BT, shared_BTD, keep_dots)
        assert stats is not None
        balance = (jax.lax.stop_gradient(stats.load_E) * stats.probability_E).sum() / jnp.maximum(stats.tokens, 1) ** 2
        total = (out_BTD * dout_BTD).astype(jnp.float32).sum()
        return total + 30 * balance + 0.1 * stats.z, (out_BTD, stats)

    return nnx.to_pure_dict(state, abstract), jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _call(run: Callable[[], Any]) -> Any:
    """Calls a program. Fake CPU devices can deadlock with several in their queues, so they finish it first."""
    result = run()
    return jax.block_until_ready(result) if jax.default_backend() == "cpu" else result


def _time(run: Callable[[], Any], steps: int, warmup: int) -> float:
    """Median seconds between the ends of successive calls. On GPUs the next call is queued before one ends."""
    ends, waiting = [], None
    for _ in range(warmup + steps + 1):
        result = _call(run)
        if waiting is not None:
            jax.block_until_ready(waiting)
            ends.append(time.perf_counter())
        waiting = result
    jax.block_until_ready(waiting)
    return float(np.median(np.diff(ends[warmup - 1 :])))


def prepare_layer(size: Size, mesh: Mesh, kind: str) -> tuple[Any, Callable[[], Any]]:
    """The compiled program of a layer, and a call of it that returns small results."""
    config, sharding = size.model, Sharding.for_training(size.model, mesh)
    weights, step = layer_step(config, sharding, Options(dtype=size.dtype, expert_exchange=_exchange(kind)), True)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(weights)) + 2))

    def normal(shape: tuple[int, ...], where: Any, dtype: str, scale: float) -> jax.Array:
        draw = jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype), out_shardings=where)
        drawn: jax.Array = draw(next(keys))
        return drawn

    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    drawn = jax.tree.map(lambda x: normal(x.shape, NamedSharding(mesh, x.sharding.spec), "float32", 0.02), weights)
    B, T, D = size.rows * mesh.size, size.length, config.hidden_size
    hidden = NamedSharding(mesh, sharding.hidden)
    x, dout = (normal((B, T, D), hidden, size.dtype, 1.0) for _ in range(2))
    valid = put(np.ones((B, T), bool), sharding.tokens)
    args = drawn, put(np.ones(D, np.float32), sharding.norm), x, valid, dout
    compiled = step.lower(*args).compile()
    load = lambda stats: stats.load_E.max() / stats.load_E.mean()  # noqa: E731

    def run() -> dict[str, Any]:
        (value, (_, stats)), _ = compiled(*args)
        return {"loss": value, "load_max": load(stats)}

    return compiled, run


def prepare_step(size: Size, mesh: Mesh, kind: str) -> tuple[Any, Callable[[], Any]]:
    """The compiled program of a training step, and a call of it that returns small results."""
    optimizer = OptimizerConfig(Schedule(10**6, 1e-4, schedule="wsd"))
    objective = NextToken(size.model, PretrainConfig(moe=MoETraining(expert_exchange=_exchange(kind))))
    config = StepConfig(dtype=size.dtype, remat="dots", scan_layers=False)  # type: ignore[arg-type]
    shape = size.rows * mesh.size, size.length
    tokens = np.random.default_rng(0).integers(0, size.model.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(size.length, dtype=np.int32), shape)
    batch = place(Batch(tokens, positions, np.ones(shape, np.int32), np.ones(shape, np.float32)), mesh)
    state = init_state(size.model, optimizer, 0, mesh)
    step = make_train_step(objective, optimizer, config, mesh)
    compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    held = [state]
    del state

    def run() -> dict[str, Any]:
        held[0], metrics = compiled(held[0], batch)
        return {name: metrics[name] for name in ("loss", "load_max")}

    return compiled, run


def _exchange(kind: str) -> Any:
    return kind if kind in ("rows", "gathered") else "auto"


def measure(part: str, kind: str, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """One record.

    Args:
      part: of `PARTS`.
      kind: of `KINDS`.
      size: what is measured.
      args: of the command line.
    """
    count = 1 if kind == "one" else args.devices
    mesh = make_mesh({} if count == 1 else {"fsdp" if kind == "fsdp" else "expert": count}, jax.devices()[:count])
    with jax.set_mesh(mesh):
        compiled, run = (prepare_layer if part == "layer" else prepare_step)(size, mesh, kind)
        text, memory = compiled.as_text(), compiled.memory_analysis()
        seconds = _time(run, args.steps, args.warmup)
        if args.profile:
            folder = Path(args.profile) / f"{part}-{kind}"
            with jax.profiler.trace(str(folder)):
                jax.block_until_ready([_call(run) for _ in range(args.steps)])
            (folder / "step.hlo.txt").write_text(text)
            (folder / "steps.json").write_text(json.dumps({"steps": args.steps, "command": vars(args)}) + "\n")
        last = {name: float(value) for name, value in run().items()}
    sent = sum(c.bytes * c.times for c in collectives(text, count))
    tokens = size.rows * size.length
    record = {
        "part": part,
        "kind": kind,
        "devices": count,
        "ms": seconds * 1e3,
        "tokens_per_s_device": tokens / seconds,
        "sent_mb": sent / 1e6,
        "link_ms": sent / args.link / 1e6,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        **last,
    }
    if kind in ("rows", "gathered"):
        moe = size.model.moe
        assert moe is not None
        layers = 1 if part == "layer" else len(size.model.sparse_layers)
        shape = moe, count, tokens, size.model.hidden_size, jnp.dtype(size.dtype).itemsize
        record["formula_mb"] = layers * getattr(traffic, kind)(*shape).total / 1e6
        record["least_mb"] = layers * traffic.least(*shape).total / 1e6
    return record


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table; the rate is also given relative to fsdp's in the same part."""
    yield "| part | kind | ms | tokens/s a device | to fsdp | sent, MB | on links, ms | by formula, MB | least, MB |"
    yield "|---" * 9 + "|"
    for r in records:
        other = [o for o in records if (o["part"], o["kind"]) == (r["part"], "fsdp")]
        ratio = f"{r['tokens_per_s_device'] / other[0]['tokens_per_s_device']:.2f}" if other else ""
        numbers = [f"{r[name]:,.1f}" if name in r else "" for name in ("sent_mb", "link_ms", "formula_mb", "least_mb")]
        cells = [r["part"], r["kind"], f"{r['ms']:.2f}", f"{r['tokens_per_s_device']:,.0f}", ratio, *numbers]
        yield f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=0, help="how many; by default all")
    parser.add_argument("--size", choices=("a2.7b", "tiny"), default="a2.7b")
    parser.add_argument("--layers", type=int, default=4, help="of the training step")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--room", type=float, default=dispatch.ROOM, help="of a round, in even shares of rows")
    parser.add_argument("--steps", type=int, default=10, help="timed calls")
    parser.add_argument("--warmup", type=int, default=3, help="calls before them, at least 1")
    parser.add_argument("--link", type=float, default=LINK, help="GB/s that a device sends to the others")
    parser.add_argument("--profile", metavar="DIR", help="leave traces there")
    args = parser.parse_args(argv)
    args.devices = args.devices or jax.device_count()
    if not 2 <= args.devices <= jax.device_count() or args.warmup < 1 or args.steps < 1:
        parser.error(
            f"expected 2 to {jax.device_count()} devices, and at least one warm-up call and one timed call; got "
            f"{args.devices}, {args.warmup} and {args.steps}"
        )
    dispatch.ROOM = args.room
    size = size_of(args.size, args.layers)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({**about, "devices": args.devices, "size": args.size, "room": args.room}), flush=True)
    records = []
    for part in args.parts:
        for kind in args.kinds:
            records.append(measure(part, kind, size, args))
            print(json.dumps(records[-1]), flush=True)
    print("\n".join(["", *table(records)]))


if __name__ == "__main__":
    main()
