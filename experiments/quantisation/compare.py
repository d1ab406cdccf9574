"""What quantisation costs: held-out loss and bytes of a small model, by method, bits and group.

    qwen-jax quickstart --output quantisation-run --steps 400
    python -m experiments.quantisation.compare --folder quantisation-run

The first command trains a model on the sources of Python's standard library. The second one rounds it to bfloat16 and
quantises that by every method, calibrated on documents that it was trained on, and measures the loss on those that were
held out, with the weights that the files stand for, in float32. CPU, some minutes. Leaves `quantisation.json` in the
folder, and prints a Markdown table. Cases that are there already are not run again.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import convert
from convert.names import Leaf, leaves
from convert.placement import place
from convert.quantize import CalibrationText, Recipe, quantize
from convert.quantized import read_format, unpack
from convert.safetensors import Entry, read_folder
from qwen_jax import kernels
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind
from qwen_jax.tokenizer import load_tokenizer
from train.data.text import find_files, read_documents, split_documents, standard_library

RESULTS = "quantisation.json"
_HELD_OUT_BYTES = 100_000  # Of the quickstart.


def cases(groups: tuple[int, ...]) -> dict[str, Recipe]:
    """What is compared, by name."""
    found: dict[str, Recipe] = {}
    for group in groups:
        common: dict[str, Any] = {"bits": 4, "group": group}
        found |= {
            f"rtn 4 bits, group {group}": Recipe("rtn", **common),
            f"gptq 4 bits, group {group}": Recipe("gptq", **common),
            f"gptq desc_act 4 bits, group {group}": Recipe("gptq", desc_act=True, **common),
            f"rtn asym 4 bits, group {group}": Recipe("rtn", symmetric=False, **common),
            f"gptq asym 4 bits, group {group}": Recipe("gptq", symmetric=False, **common),
            f"awq asym 4 bits, group {group}": Recipe("awq", **common),
        }
    return found | {
        "rtn 8 bits, group 128": Recipe("rtn", bits=8, group=128),
        "gptq 8 bits, group 128": Recipe("gptq", bits=8, group=128),
        "int8": Recipe("int8"),
        "fp8": Recipe("fp8"),
    }


def documents(folder: Path) -> tuple[list[str], list[str]]:
    """The documents that the quickstart trained on and held out: the same choice, from its own options."""
    options = read_json(folder / "summary.json")["options"]
    files = find_files(options["text"]) if options["text"] else standard_library()
    order = np.random.default_rng(options["seed"]).permutation(len(files))
    texts = read_documents([files[i] for i in order], int(options["max_megabytes"] * 1e6)).texts
    return split_documents(texts, min(0.1, _HELD_OUT_BYTES / sum(map(len, texts))), options["seed"])


class Written:
    """A folder of quantised weights as a `convert.source.Source` of the values that they stand for, float32."""

    workers = 1

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder: Path | None = folder
        self.config, self._entries = config, read_folder(folder)
        self._info = read_format(folder, read_json(folder / "config.json").get("quantization_config"), self._entries)

    def dtype(self, leaf: Leaf) -> np.dtype:
        return np.dtype(np.float32)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        return np.stack([self._tensor(name).reshape(leaf.shape)[rows] for name in leaf.names[tensors]])

    def _tensor(self, name: str) -> np.ndarray:
        module = name.rpartition(".")[0]
        if self._info is None or self._info.of(module) is None or name.endswith(".bias"):
            return _array(self._entries[name]).astype(np.float32)
        own = [entry for entry in self._entries if entry.startswith(f"{module}.") and not entry.endswith(".bias")]
        return unpack({entry: _array(self._entries[entry]) for entry in own}, self._info, module).dequantize()


def _array(entry: Entry) -> np.ndarray:
    return np.fromfile(entry.file, entry.dtype, math.prod(entry.shape), offset=entry.offset).reshape(entry.shape)


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _losses(params: Params, tokens_BT: jax.Array, config: ModelConfig, sharding: Sharding) -> jax.Array:
    model = bind(config, params, sharding, Options())
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    positions, mask = jax.tree.map(
        lambda x: jax.reshard(x, sharding.tokens), (positions, kernels.causal_mask(*tokens_BT.shape))
    )
    log_p = jax.nn.log_softmax(model.logits(model(tokens_BT, positions, mask).hidden)[:, :-1])
    # A sum with a one-hot matrix, because the vocabulary is a sharded axis.
    return -(log_p * jax.nn.one_hot(tokens_BT[:, 1:], config.vocab_size)).sum(-1)


def held_out_loss(folder: Path, config: ModelConfig, tokens_RT: np.ndarray, mesh: Mesh, batch: int = 32) -> np.ndarray:
    """Mean loss of each row in nats a token, [R], float64."""
    config = dataclasses.replace(config, dtype="float32")
    sharding = Sharding.for_inference(config, mesh)
    params = place(Written(folder, config), mesh, "float32", Options())
    found = []
    with jax.set_mesh(mesh):
        for start in range(0, len(tokens_RT) // batch * batch, batch):
            tokens = jax.device_put(tokens_RT[start : start + batch], NamedSharding(mesh, sharding.tokens))
            found.append(np.asarray(_losses(params, tokens, config, sharding), np.float64).mean(1))
    return np.concatenate(found)


def layer_bits(folder: Path, config: ModelConfig) -> float:
    """Bits in the file for each weight of a projection: codes, scales, zeros and order."""
    projections = {name for leaf in leaves(config) for name in leaf.names if "_proj.weight" in name}
    weights = sum(leaf.size for leaf in leaves(config) if leaf.names[0] in projections)
    modules = tuple(f"{name.removesuffix('.weight')}." for name in projections)
    stored = sum(
        math.prod(entry.shape) * entry.dtype.itemsize
        for name, entry in read_folder(folder).items()
        if name.startswith(modules) and not name.endswith(".bias")
    )
    return 8 * stored / weights


def table(results: dict[str, Any]) -> str:
    """The results as Markdown; the change of the loss with its standard error over held-out rows."""
    lines = ["| weights | held-out loss | change | bits a weight | weights in bytes |", "|---|---|---|---|---|"]
    base = np.array(results["cases"]["bfloat16"]["losses"])
    for name, case in results["cases"].items():
        change = np.array(case["losses"]) - base
        error = change.std(ddof=1) / math.sqrt(len(change))
        shown = "" if name == "bfloat16" else f"{change.mean():+.4f} +- {error:.4f}"
        mean = np.mean(case["losses"])
        lines.append(f"| {name} | {mean:.4f} | {shown} | {case['bits']:.2f} | {case['bytes']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("quantisation-run"), help="of qwen-jax quickstart")
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 128 tokens")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name begins so")
    args = parser.parse_args()
    folder: Path = args.folder
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model. Make it first: qwen-jax quickstart --output {folder}")

    # Texts.
    tokenizer = load_tokenizer(folder / "model")
    training, held_out = documents(folder)
    text = folder / "calibration.jsonl"
    shuffled = np.random.default_rng(1).permutation(len(training))
    text.write_text("".join(json.dumps({"text": training[i]}) + "\n" for i in shuffled), encoding="utf-8")
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in tokenizer.encode_documents(held_out)])
    tokens_RT = ids[: len(ids) // 128 * 128].reshape(-1, 128)

    # The model in bfloat16.
    base = folder / "bfloat16"
    if not base.is_dir():
        convert.convert(folder / "model", base, "hf", "bfloat16")
    config, mesh = convert.open_source(base).config, make_mesh({}, jax.devices()[:1])

    # Cases.
    file = folder / RESULTS
    results: dict[str, Any] = read_json(file) if file.is_file() else {"cases": {}}
    results["machine"] = {"platform": platform.platform(), "device": jax.devices()[0].device_kind}
    results["date"] = time.strftime("%Y-%m-%d")
    results["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    for name, recipe in {"bfloat16": None, **cases(tuple(args.groups))}.items():
        if name in results["cases"] or (recipe and args.only and not name.startswith(tuple(args.only))):
            continue
        began, made = time.perf_counter(), base
        if recipe is not None:
            made = folder / "quantised"
            shutil.rmtree(made, ignore_errors=True)
            quantize(base, made, recipe, CalibrationText(text, args.rows, 128), batch=64)
        results["cases"][name] = {
            "losses": held_out_loss(made, config, tokens_RT, mesh).tolist(),
            "bits": layer_bits(made, config),
            "bytes": sum(path.stat().st_size for path in made.glob("*.safetensors")),
            "seconds": time.perf_counter() - began,
        }
        file.write_text(to_json(results) + "\n", encoding="utf-8")
        print(f"{name}: {np.mean(results['cases'][name]['losses']):.4f}, {results['cases'][name]['seconds']:.0f} s")
    print(table(results))


if __name__ == "__main__":
    main()
