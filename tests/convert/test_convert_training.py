"""A checkpoint of a training run converts bit for bit and generates text like any other checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

import convert
from convert.names import leaves
from qwen_jax.inference import Engine
from qwen_jax.published import published
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from train.checkpoint import Checkpoints
from train.optimizer import OptimizerConfig, Schedule
from train.state import init_state


def test_a_step_of_a_training_run_converts_bit_for_bit_and_generates(tmp_path: Path, mesh: Mesh) -> None:
    tokenizer = train_bpe(["hello world, hello there"] * 4, 300)
    model = dataclasses.replace(published("tiny-untied"), vocab_size=384, eos_token_ids=(tokenizer.eos_id,))
    optimizer = OptimizerConfig(Schedule(20, 1e-2, warmup_steps=4))
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", model, tokenizer) as checkpoints:
        state = init_state(model, optimizer, 0, mesh)
        checkpoints.save(state, 0)
    for source in (tmp_path / "run", tmp_path / "run/0"):
        folder = tmp_path / f"hf-{source.name}"
        convert.convert(source, folder)
        held = load_file(folder / "model.safetensors")
        for leaf in leaves(model):
            value: Any = state.params
            for key in leaf.path:
                value = value[key]
            for i, name in enumerate(leaf.names):
                array = np.asarray(value[i] if leaf.layers else value)
                assert held.pop(name).tobytes() == array.tobytes(), name
        assert not held
        assert load_tokenizer(folder).fingerprint() == tokenizer.fingerprint()
    told = []
    for source in (tmp_path / "run", tmp_path / "hf-run"):
        config, params = convert.load(source, mesh, "float32")
        engine = Engine(config, params, mesh, tokenizer=load_tokenizer(tmp_path / "hf-run"), dtype="float32")
        told.append(engine.generate(["hello"], max_new_tokens=8))
    assert told[0] == told[1]
    assert told[0][0].text is not None
