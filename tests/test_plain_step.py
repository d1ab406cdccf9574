"""The yardstick of the training benchmark computes what the real step computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import plain_step
from qwen_jax.config import published
from train.data.batch import Batch, place
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import PretrainConfig, init_state, make_train_step


def plain_params(params):
    """The real parameters in the yardstick's layout: [in, out], heads not apart."""
    layers, attention = params["layers"], params["layers"]["attention"]
    L, D = layers["input_norm"]["weight"].shape
    plain = {name: np.swapaxes(attention[name]["weight"].reshape(L, -1, D), 1, 2) for name in "qkv"}
    plain |= {f"{name}_bias": attention[name]["bias"].reshape(L, -1) for name in "qkv"}
    plain |= {name: np.swapaxes(layers["mlp"][name]["weight"], 1, 2) for name in ("gate", "up", "down")}
    plain["o"] = np.swapaxes(attention["o"]["weight"].reshape(L, D, -1), 1, 2)
    plain["norm1"], plain["norm2"] = layers["input_norm"]["weight"], layers["post_attention_norm"]["weight"]
    head = {} if "lm_head" not in params else {"head": params["lm_head"]["weight"]}
    return {"embed": params["embed"]["weight"], "layers": plain, "norm": params["norm"]["weight"], **head}


@pytest.mark.parametrize(("model", "policy"), [("tiny", "none"), ("tiny-untied", "dots"), ("tiny", "full")])
def test_plain_step_is_the_real_step(mesh, model, policy):
    """Loss and gradient norm of four steps from the same weights: the later ones hold only if the updates agree too."""
    rng = np.random.default_rng()
    B, T = 4, 33
    config = dataclasses.replace(published(model), vocab_size=int(rng.integers(100, 200)), rope_theta=1e4)
    optimizer = OptimizerConfig(Schedule(100, 3e-3, schedule="wsd"))
    real = PretrainConfig(config, optimizer, dtype="float32", remat=policy, loss_chunk=16)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T))
    start, plain_step_ = plain_step.make(config, 3e-3, policy, chunk=32, unroll=2, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        state = init_state(real, int(rng.integers(2**31)), mesh)
        # Biases and norms that are not zero and one, or a mistake with them would not show.
        noisy = jax.tree.map(
            lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(state.params)
        )
        state = dataclasses.replace(
            state, params=jax.device_put(noisy, jax.tree.map(lambda x: x.sharding, state.params))
        )
        step = make_train_step(real, mesh)
    plain = jax.device_put(plain_params(noisy)), start(jax.random.key(0))[1]
    for _ in range(4):
        tokens = rng.integers(0, config.vocab_size, (B, T), dtype=np.int32)
        batch = Batch(tokens, positions, ones.astype(np.int32), ones.astype(np.float32))
        with jax.set_mesh(mesh):
            state, numbers = step(state, place(batch, mesh))
        plain, plain_numbers = plain_step_(plain, tokens)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(plain_numbers[name], numbers[name], rtol=2e-5, err_msg=name)
