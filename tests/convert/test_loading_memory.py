"""Loading a quantised checkpoint never holds more on the host than its files and one shard of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import tests.convert.loading_memory_run as child
from convert.names import leaves, projections
from convert.quantized.gptq import Gptq, write_config
from qwen_jax.published import published
from tests.helpers.runs import print_seed

GROUP, LAYERS_A_SHARD = 128, 8


def write(folder: Path, layers: int) -> None:
    """A checkpoint of GPTQ with random codes. As in published ones a shard is many times as large as a matrix."""
    rng, sizes = print_seed(), {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "num_kv_heads": 16}
    config = dataclasses.replace(published("tiny-untied"), num_layers=layers, head_dim=64, **sizes)
    folder.mkdir()
    info = Gptq(codes="int4", group=GROUP)
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "quantization_config": write_config(info)}))
    # The tensors by layers.
    matrices, shards = projections(config), [dict[str, np.ndarray]() for _ in range(1 + layers // LAYERS_A_SHARD + 1)]

    def shard(name: str) -> dict[str, np.ndarray]:
        return shards[1 + int(name.split(".")[2]) // LAYERS_A_SHARD if "layers." in name else 0]

    for leaf in leaves(config):
        for name in leaf.names:
            if name.removesuffix(".weight") not in matrices:
                shard(name)[name] = np.ones(leaf.hf_shape, np.float16)
    for name, (outputs, inputs) in matrices.items():
        words = np.frombuffer(rng.bytes(inputs * outputs // 2), np.int32).reshape(inputs // 8, outputs)
        shard(name)[f"{name}.qweight"] = words
        shard(name)[f"{name}.qzeros"] = np.full((inputs // GROUP, outputs // 8), 0x77777777, np.int32)
        shard(name)[f"{name}.scales"] = np.full((inputs // GROUP, outputs), 0.01, np.float16)
        shard(name)[f"{name}.g_idx"] = np.arange(inputs, dtype=np.int32) // GROUP
    places = {}
    for number, tensors in enumerate(filter(None, shards)):
        save_file(tensors, folder / f"model-{number}.safetensors")
        places |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_the_host_never_holds_more_than_the_files_and_one_shard(tmp_path: Path) -> None:
    """On an accelerator, which takes each matrix, no more than one shard. The files have 280 MB, shards 70 MB."""
    write(tmp_path / "small", 1)
    write(tmp_path / "large", 4 * LAYERS_A_SHARD)
    sizes = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(child.__file__), str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(tmp_path / "large")
    assert done.returncode == 0, done.stderr
    leaving, staying = map(int, done.stdout.split())
    print(f"needed {leaving / 1e6:.0f} and {staying / 1e6:.0f} MB for {sum(sizes) / 1e6:.0f} MB of files")
    assert leaving <= max(sizes)
    assert staying <= sum(sizes) + max(sizes)
