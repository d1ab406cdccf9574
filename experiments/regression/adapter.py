"""What the recorder asks of the project. Only this module knows the project's modules and classes.

To compare with a commit whose interfaces differ, write these functions for that commit. Parameters are trees of NumPy
arrays with stacked layers, as `init_params` gives them. A batch is a dict of the NumPy arrays tokens, positions,
segment_ids and loss_weights, [rows, length] each. Models are named.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 50  # Steps of a training curve.
TOTAL = 10  # Steps of a run of the command.
# Compilation takes most of the time, and LLVM's optimisations are not what is compared.
QUICK: Any = {"xla_backend_optimization_level": "0"}


def next_tokens(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What each position predicts, and the weight of that: 1 within a document, 0 at its end and in padding."""
    following = lambda x: np.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    segments = batch["segment_ids"]
    same = (following(segments) == segments) & (segments > 0)
    return following(batch["tokens"]), same.astype(np.float32)


def mean_cross_entropy(logits: Any, targets: Any, weights: Any) -> Any:
    """Of float32 logits [B, T, V]."""
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    log_p = jnp.sum(jax.nn.log_softmax(logits) * one_hot, axis=-1)
    return -jnp.sum(log_p * weights) / jnp.sum(weights)


def model(name: str) -> Any:
    """The configuration of a model: one of the package's own tiny ones, or a variant of them."""
    import dataclasses

    from qwen_jax.config import MoE
    from qwen_jax.published import published

    narrow: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8)
    run: dict[str, Any] = dict(vocab_size=1024, rope_theta=1e4)
    tiny = published("tiny")
    variants: dict[str, Callable[[], Any]] = {
        # Every other layer has experts.
        "mixed-every-other": lambda: dataclasses.replace(
            tiny, num_layers=4, moe=MoE(8, 2, 32, 64, decoder_sparse_step=2)
        ),
        # All but the first and the third.
        "mixed-some-dense": lambda: dataclasses.replace(
            tiny, num_layers=4, moe=MoE(8, 2, 32, 64, norm_topk_prob=True, mlp_only_layers=(0, 2))
        ),
        "narrow": lambda: dataclasses.replace(tiny, **narrow),
        "narrow-moe": lambda: dataclasses.replace(
            tiny, **narrow, num_layers=3, moe=MoE(8, 2, 16, 32, mlp_only_layers=(0,))
        ),
        "run": lambda: dataclasses.replace(tiny, **run, num_layers=1),
        "run-moe": lambda: dataclasses.replace(
            tiny, **run, num_layers=2, moe=MoE(4, 2, 64, 128, norm_topk_prob=True, mlp_only_layers=(0,))
        ),
    }
    return variants[name]() if name in variants else published(name)


@functools.cache
def initial_params(name: str) -> Any:
    """What `init_params` draws from key 0."""
    from qwen_jax.parallel.sharding import make_mesh
    from qwen_jax.params import init_params

    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(init_params(model(name), jax.random.key(0), mesh))


def on_mesh(name: str, params: Any, mesh: Any) -> Any:
    """Parameters where the training of a model wants them."""
    from qwen_jax.parallel.sharding import Sharding
    from qwen_jax.params import param_specs

    specs = param_specs(model(name), Sharding.for_training(model(name), mesh))
    return jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, specs)


def forward(name: str, dtype: str, stacked: bool) -> Callable[..., tuple[Any, Any]]:
    """A function of parameters, batch and `causal`: float32 logits, and the gradients of the mean cross-entropy.

    With `causal`, rows are single documents, and the mask is made without segment ids.
    """
    from qwen_jax import kernels
    from qwen_jax.options import Options
    from qwen_jax.parallel.sharding import Sharding, make_mesh
    from qwen_jax.params import bind
    from qwen_jax.stack import unstack

    config, mesh = model(name), make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_inference(config, mesh)

    def loss(params: Any, tokens: Any, positions: Any, mask: Any, targets: Any, weights: Any) -> tuple[Any, Any]:
        bound = bind(config, params, sharding, Options(stacked=stacked, dtype=dtype))
        logits = bound.logits(bound(tokens, positions, mask).hidden)
        return mean_cross_entropy(logits, targets, weights), logits

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)

    def run(params: Any, batch: Mapping[str, np.ndarray], causal: bool = False) -> tuple[Any, Any]:
        with jax.set_mesh(mesh):
            params = on_mesh(name, params, mesh)
            if not stacked:
                params = {**params, "layers": unstack(params["layers"], jnp.float32, config.sparse_layers)}
            arrays = [batch["tokens"], batch["positions"], *next_tokens(batch)]
            put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, sharding.tokens))  # noqa: E731
            tokens, positions, targets, weights = map(put, arrays)
            segments = put(batch["segment_ids"])
            mask = kernels.causal_mask(*segments.shape) if causal else kernels.packed_mask(segments)
            (_, logits), gradients = compute(params, tokens, positions, jax.tree.map(put, mask), targets, weights)
            return jax.device_get((logits, gradients))

    return run


def pretrain_config(name: str, moe: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """How a model is trained, for as many steps as a curve has: objective, optimiser and step."""
    from train.moe import MoETraining
    from train.optimizer import OptimizerConfig, Schedule
    from train.pretrain import NextToken, PretrainConfig
    from train.step import StepConfig

    optimizer = OptimizerConfig(Schedule(STEPS, 1e-2, warmup_steps=5))
    of_objective = {k: settings.pop(k) for k in ("loss_chunk", "z_loss") if k in settings}
    objective = NextToken(model(name), PretrainConfig(**of_objective, moe=MoETraining(**(moe or {}))))
    return objective, optimizer, StepConfig(**{"remat": "none", **settings})


def training_gradient(name: str, **settings: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function of parameters and batch: the gradient of the training step, and its other numbers by name."""
    from qwen_jax.parallel.sharding import Sharding, make_mesh
    from train.data.batch import Batch, place
    from train.step import batch_gradient

    objective, _, config = pretrain_config(name, **settings)
    mesh = make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_training(objective.model, mesh)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def compute(params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        found = batch_gradient(objective, config, sharding, params, batch)
        numbers = {"loss": found.means.loss, "cross_entropy": found.means.reported, "weight": found.denominator}
        if found.statistics is not None:
            numbers |= {f"routing.{key}": value for key, value in vars(found.statistics).items()}
        return found.gradient, numbers

    def run(params: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        with jax.set_mesh(mesh):
            found: tuple[Any, dict[str, Any]] = jax.device_get(
                compute(on_mesh(name, params, mesh), place(Batch(**batch), mesh))
            )
            return found

    return run


def training_batches(documents: Sequence[np.ndarray], length: int, rows: int, count: int) -> list[dict[str, Any]]:
    """Documents packed into rows, and the first batches of them in the order of seed 0."""
    from train.data.loader import batches
    from train.data.packing import pack

    data = batches(pack(documents, length), rows, seed=0)
    return [{key: np.asarray(value) for key, value in vars(data[i]).items()} for i in range(count)]


def curve(
    name: str, params: Any, batches: Sequence[Mapping[str, Any]], axes: Mapping[str, int], **settings: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Trains on the batches; gives the metrics of each step, and the whole state at the end."""
    from qwen_jax.parallel.sharding import make_mesh
    from train.data.batch import Batch, place
    from train.state import fresh_state
    from train.step import make_train_step

    (objective, optimizer, config), mesh = pretrain_config(name, **settings), make_mesh(axes)
    with jax.set_mesh(mesh):
        state = fresh_state(optimizer, on_mesh(name, params, mesh), mesh)
        lowered = make_train_step(objective, optimizer, config, mesh).lower(state, place(Batch(**batches[0]), mesh))  # type: ignore[attr-defined]
        step, metrics = lowered.compile(compiler_options=QUICK), []
        for batch in batches:
            state, numbers = step(state, place(Batch(**batch), mesh))
            # Each is waited for: too many programs in the queue of a fake device lock one another.
            metrics.append(jax.device_get(jax.block_until_ready(numbers)))
        return metrics, jax.device_get({"params": state.params, "opt_state": state.opt_state, "guard": state.guard})


def engine(folder: Path, axes: Mapping[str, int], dtype: str) -> Callable[..., list[dict[str, Any]]]:
    """A function of prompts, settings of sampling and a number of tokens: what is generated with a checkpoint."""
    import convert
    from qwen_jax.inference import Engine, SamplingParams
    from qwen_jax.options import Options
    from qwen_jax.parallel.sharding import make_mesh

    mesh = make_mesh(axes) if axes else make_mesh({}, jax.devices()[:1])
    config, params = convert.load(folder, mesh, dtype, Options(stacked=False))
    made = Engine(config, params, mesh, dtype=dtype, chunk=8)

    def generate(prompts: list[list[int]], sampling: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        found = made.generate(prompts, SamplingParams(**sampling, logprobs=True), max_new_tokens=count)
        return [{"tokens": c.token_ids, "logprobs": c.logprobs, "finish": c.finish_reason} for c in found]

    return generate


def convert_checkpoint(source: Path, target: Path, dtype: str | None) -> None:
    """To the other format."""
    import convert

    convert.convert(source, target, dtype=dtype)


def upcycle_checkpoint(source: Path, target: Path) -> None:
    """A dense checkpoint to one with experts, with half of the neurons drawn anew."""
    from convert.upcycle import Recipe, upcycle
    from qwen_jax.config import MoE

    upcycle(source, target, Recipe(MoE(8, 2, 48, 96, norm_topk_prob=True), reinit=0.5, seed=3))


def load_checkpoint(folder: Path) -> Any:
    """The parameters of a checkpoint of either format, as stored, layers stacked."""
    import convert
    from qwen_jax.options import Options
    from qwen_jax.parallel.sharding import make_mesh

    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(convert.load(folder, mesh, options=Options(stacked=True))[1])


def make_tokenizer(texts: Sequence[str], size: int, folder: Path) -> str:
    """Trains a tokenizer and saves it; gives its fingerprint."""
    from qwen_jax.tokenizer import train_bpe

    tokenizer = train_bpe(list(texts), size)
    tokenizer.save(folder)
    return tokenizer.fingerprint()


def make_data_set(folder: Path, documents: Sequence[Sequence[int]], length: int, tokenizer: str) -> None:
    """A data set of token ids below 1,000, as `data build` would write it."""
    from train.data.shards import MANIFEST, Manifest, ShardWriter, write_json

    folder.mkdir(parents=True)
    with ShardWriter(folder, "shard-00000", length) as writer:
        writer.add(documents)
        shard = writer.finish()
    assert shard is not None
    counts: dict[str, Any] = dict(rows=shard.rows, tokens=shard.tokens, documents=shard.documents, empty=0, bad=0)
    units: dict[str, Any] = dict(max_document_bytes=1, unit_bytes=1, inputs=(), shards=(shard,))
    padding = 1 - shard.tokens / (shard.rows * length)
    ids: dict[str, Any] = dict(tokenizer=tokenizer, vocab_size=1000, end_of_text=0, field="text")
    manifest = Manifest(domain=folder.name, length=length, padding=padding, **ids, **counts, **units)
    write_json(folder / MANIFEST, manifest.to_json())


# What `run_file` writes. Two stages; the second has longer rows, another rotary base, and accumulates.
_RUN_FILE = '''\
"""A small pre-training run in two stages; written by the recorder."""

import dataclasses

from qwen_jax.config import MoE
from qwen_jax.published import published
from train.config import RunConfig, Stage
from train.loop import CheckpointConfig, LoopConfig
from train.moe import MoETraining
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.step import StepConfig


def config():
    return RunConfig(
        output={output!r},
        model=dataclasses.replace(published("tiny"), vocab_size=1024, rope_theta=1e4, {model}),
        tokenizer={tokenizer!r},
        data={data!r},
        held_out={held_out!r},
        stages=(
            Stage(Schedule({first}, 1e-2, warmup_steps=2), 16, 4, {{"a": 1, "b": 3}}),
            Stage(Schedule({second}, 1e-3, schedule="wsd"), 32, 4, {{"long": 1}}, rope_theta=1e6, accumulation=2),
        ),
        step=StepConfig(dtype="float32", remat="none"),
        objective=PretrainConfig(z_loss=1e-4, moe=MoETraining(router_z_loss=1e-3)),
        loop=LoopConfig(evaluate_every=5),
        checkpoints=CheckpointConfig(every=3, keep_last=3),
        export={export!r},
    )
'''


def run_file(kind: str, material: Path, output: Path, export: Path) -> str:
    """The Python file that `train pretrain --config` takes, for a run of 10 steps: "dense" or "moe".

    The dense run is stopped at the end of its first stage, the one with experts in the middle of its second.
    """
    moe = "num_layers=2, moe=MoE(4, 2, 64, 128, norm_topk_prob=True, mlp_only_layers=(0,))"
    first = {"dense": 6, "moe": 4}[kind]
    return _RUN_FILE.format(
        output=str(output),
        export=str(export),
        model={"dense": "num_layers=1", "moe": moe}[kind],
        tokenizer=str(material / "tokenizer"),
        data={name: str(material / name) for name in ("a", "b", "long")},
        held_out={"held": str(material / "held")},
        first=first,
        second=TOTAL - first,
    )


def pretrain(file: Path, stop: int | None = None) -> int:
    """The command `qwen-jax train pretrain`; gives its status.

    Args:
      file: the configuration.
      stop: number of the step after which it sees a SIGTERM.
    """
    from unittest import mock

    from qwen_jax.cli import main
    from train import interrupt

    stopping = mock.patch.object(interrupt.Interruption, "_asked", lambda self, step: 15 if step == stop else 0)
    with stopping if stop is not None else contextlib.nullcontext():
        return main(["train", "pretrain", "--config", str(file)])


def build_data(files: Sequence[Path], tokenizer: Path, length: int, output: Path) -> int:
    """The command `qwen-jax data build` in one process; gives its status."""
    from qwen_jax.cli import main

    named = ["--tokenizer", str(tokenizer), "--length", str(length), "--output", str(output), "--workers", "1"]
    return main(["data", "build", "--input", *map(str, files), *named])
