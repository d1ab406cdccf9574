"""The yardsticks of the training benchmark compute what the real step computes, and what it prints is so."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import benchmark, kernels, plain_step
from qwen_jax.errors import InputError
from qwen_jax.published import published
from train.data.batch import Batch, place
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import init_state
from train.step import StepConfig, make_train_step


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


@pytest.mark.slow
@pytest.mark.parametrize(("model", "policy"), [("tiny", "full"), ("tiny-untied", "dots")])
def test_plain_step_is_the_real_step(mesh, model, policy):
    """Loss and gradient norm of four steps from the same weights: the later ones hold only if the updates agree too."""
    rng = np.random.default_rng()
    B, T = 4, 33
    config = dataclasses.replace(published(model), vocab_size=int(rng.integers(100, 200)), rope_theta=1e4)
    # Adam divides by a gradient's size: with the usual eps, a gradient of nothing but rounding errors moves its weight
    # as far as any other, and float32 trajectories part.
    optimizer = OptimizerConfig(Schedule(100, 3e-3, schedule="wsd"), AdamW(eps=1e-4))
    objective, real = NextToken(config, PretrainConfig(loss_chunk=16)), StepConfig("float32", policy)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T))
    start, plain_step_ = plain_step.make(config, 3e-3, policy, chunk=32, unroll=2, dtype=jnp.float32, eps=1e-4)
    with jax.set_mesh(mesh):
        state = init_state(config, optimizer, int(rng.integers(2**31)), mesh)
        # Biases and norms that are not zero and one, or a mistake with them would not show.
        noisy = jax.tree.map(
            lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(state.params)
        )
        state = dataclasses.replace(
            state, params=jax.device_put(noisy, jax.tree.map(lambda x: x.sharding, state.params))
        )
        step = make_train_step(objective, optimizer, real, mesh)
    plain = jax.device_put(plain_params(noisy)), start(jax.random.key(0))[1]
    for _ in range(4):
        tokens = rng.integers(0, config.vocab_size, (B, T), dtype=np.int32)
        batch = Batch(tokens, positions, ones.astype(np.int32), ones.astype(np.float32))
        with jax.set_mesh(mesh):
            state, numbers = step(state, place(batch, mesh))
        plain, plain_numbers = plain_step_(plain, tokens)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(plain_numbers[name], numbers[name], rtol=2e-6, err_msg=name)


def test_transformers_step_is_transformers_own_loss():
    """The loss by chunks, causal without a mask, of weights far from the beginning; bfloat16 products."""
    import torch

    from experiments.train import torch_step
    from tests.helpers.hf import randomise

    args = benchmark.parse(
        ["transformers", "--model", "tiny", "--compile", "none", "--remat", "full", "--loss-chunk", "20"]
    )
    model, optimizer = torch_step.make(args, benchmark.architecture(args), torch.device("cpu"))
    randomise(model, seed=int(np.random.default_rng().integers(2**31)))
    ids = torch.randint(0, 512, (2, 34))
    with torch.no_grad():
        # transformers shifts the labels itself.
        expected = float(model(input_ids=ids, labels=ids).loss)
    before = [p.detach().clone() for p in model.parameters()]
    step = torch_step.make_step(torch_step.Loss(args, model, torch.bfloat16), optimizer)
    loss = float(step(ids)["loss"])
    np.testing.assert_allclose(loss, expected, rtol=2e-2)
    assert abs(expected - np.log(512)) > 0.2
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_a_measurement_reports_what_it_did(capsys):
    """Donated memory, and tokens a second and model FLOPs that fit the time of a step."""
    benchmark.run_ours(
        benchmark.parse(
            "ours --model tiny --batch 2 --length 32 --loss-chunk 64 --steps 2 --warmup 1 --no-matmul".split(" ")
        )
    )
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["donated"] is True
    np.testing.assert_allclose(line["tokens_per_s"], 64 / line["step_ms"] * 1e3, rtol=2e-3)
    config = published("tiny")
    weights = config.num_params()["layers"] + config.num_params()["embedding"]
    # 6 for each weight (the few of norms and biases too), and attention.
    flops = 6 * weights + 6 * config.num_layers * config.num_heads * config.head_dim * 32
    np.testing.assert_allclose(line["tflop_per_s"] * 1e12 / line["tokens_per_s"], flops, rtol=2e-2)
    params = 4 * config.num_params()["total"]
    np.testing.assert_allclose(line["state_gb"] * 1e9, 3 * params, rtol=2e-3)


def test_a_mixture_and_the_dense_model_beside_it(capsys):
    """As many active parameters, but for router and gate; transformers' own mixture takes the same loss."""
    from experiments.train import torch_step

    tiny = "--model tiny-moe --layers 1"
    mixture, dense = (benchmark.parse(f"ours {tiny} {more}".split()) for more in ("", "--dense"))
    active = [benchmark.architecture(args).num_params()["active"] for args in (mixture, dense)]
    assert active[0] - active[1] == (8 + 1) * 64
    assert benchmark.architecture(mixture).num_layers == 1
    with pytest.raises(InputError, match="plain step has no experts"):
        benchmark.run_plain(benchmark.parse(f"plain {tiny}".split()))
    benchmark.run_ours(
        benchmark.parse(f"ours {tiny} --batch 2 --length 32 --loss-chunk 64 --steps 2 --warmup 1 --no-matmul".split())
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == "tiny-moe, 1 layers"
    import torch

    args = benchmark.parse(f"transformers {tiny} --compile none --loss-chunk 20 --weights bfloat16".split())
    model, optimizer = torch_step.make(args, benchmark.architecture(args), torch.device("cpu"))
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    ids = torch.randint(0, 512, (2, 34))
    loss = torch_step.make_step(torch_step.Loss(args, model, None), optimizer)(ids)["loss"]
    assert 6.0 < float(loss) < 6.5, "that of 512 equally likely tokens is 6.24"


def test_products_of_fp8_are_measured_and_named(capsys):
    """A line that says so, on the CPU by emulation; the table compares with the bfloat16 of the same kind."""
    small = "--model tiny --layers 1 --batch 2 --length 32 --loss-chunk 64 --steps 2 --warmup 1 --no-matmul"
    benchmark.run_ours(benchmark.parse(f"ours {small} --products fp8".split()))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["what"] == "ours, fp8"
    assert 6.0 < line["loss"] < 6.5
    records = [{**line, "what": what, "tokens_per_s": rate, "try": "ours/tiny/"} for what, rate in
               (("ours", 100.0), ("ours, fp8", 150.0), ("transformers, fp8", 120.0))]  # fmt: skip
    benchmark._print_table(records)
    rows = [row for row in capsys.readouterr().out.splitlines() if "| ours, fp8 |" in row]
    assert rows[0].endswith("| - | - | 1.25 | 1.50 |")


def test_a_mesh_is_measured_for_each_gpu(capsys):
    """On two devices, each with half of the weights and of 8-bit moments; compared with one device, GPU by GPU."""
    small = "--model tiny --layers 1 --batch 2 --length 32 --loss-chunk 64 --steps 2 --warmup 1 --no-matmul"
    benchmark.run_ours(benchmark.parse(f"ours {small} --moments 8bit --mesh fsdp=2".split()))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["what"], line["devices"]) == ("ours, 8bit, fsdp=2", 2)
    assert line["donated"] is True
    np.testing.assert_allclose(line["tokens_per_s_device"], line["tokens_per_s"] / 2, rtol=2e-3)
    np.testing.assert_allclose(line["mfu"], line["tflop_per_s"] * 1e12 / benchmark.PEAK / 2, rtol=2e-2)
    # Of a weight 4 bytes and 2 of moments; what has few elements keeps float32 moments on all devices.
    params = dataclasses.replace(published("tiny"), num_layers=1, max_window_layers=1).num_params()["total"]
    assert 3 * params < line["state_gb"] * 1e9 < 4 * params
    two = {**line, "tokens_per_s_device": 90.0, "tokens_per_s": 180.0, "try": "ours/tiny/mesh=fsdp=2"}
    others = [("ours", 100.0, ""), ("transformers", 60.0, ""), ("transformers, fsdp=2", 50.0, "fsdp=2")]
    one = [
        {**line, "model": two["model"], "what": what, "tokens_per_s": rate, "tokens_per_s_device": rate, "mesh": mesh,
         "try": "a/b/"} for what, rate, mesh in others
    ]  # fmt: skip
    benchmark._print_table([two, *one])
    (row,) = [row for row in capsys.readouterr().out.splitlines() if "| ours, 8bit, fsdp=2 |" in row]
    assert row.endswith("| - | 1.80 | - | 0.90 |")


def test_float8_of_torchao_needs_torchao(monkeypatch):
    import sys

    import torch

    from experiments.train import torch_step

    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    args = benchmark.parse("transformers --model tiny --layers 1 --products fp8".split())
    with pytest.raises(InputError, match=r"needs torchao.*pip install torchao"):
        torch_step.make(args, benchmark.architecture(args), torch.device("cpu"))


def test_kernels_are_put_to_the_parts_of_the_model(tmp_path, capsys):
    """Of a product within each of two scopes, both are found, and the shares add up."""

    @jax.jit
    def program(x):
        with jax.named_scope("mlp"):
            x = jnp.tanh(x @ x)
        with jax.named_scope("attention"), jax.named_scope("attend"):
            return jnp.sin(x @ x)

    x = jnp.ones((700, 700))
    compiled = program.lower(x).compile()
    compiled(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            compiled(x).block_until_ready()
    (tmp_path / "step.hlo.txt").write_text(compiled.as_text())
    (tmp_path / "steps.json").write_text(json.dumps({"steps": 2}))
    kernels.print_kernels(tmp_path, top=50)
    out = capsys.readouterr().out
    parts = out.split("| kind |")[0]
    assert "| mlp | forward |" in parts
    assert "| attend | forward |" in parts
    np.testing.assert_allclose(sum(map(float, re.findall(r"([\d.]+)% \|", parts))), 100, atol=1)


def test_names_of_operations_say_part_and_pass():
    line = (
        '  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_type="add" op_name="jit(train_step)/PATH/add"}\n'
    )
    body = "transpose(jvp())/while/body/closed_call/checkpoint"
    for path, expected in {
        "jvp()/while/body/closed_call/mlp/BTD,FD->BTF": ("mlp", "forward"),
        f"{body}/attention/qkv/BTD,HdD->BTHd": ("qkv", "backward"),
        f"{body}/rematted_computation/attention/attend": ("attend", "again"),
        "optimizer": ("optimizer", ""),
        "transpose(jvp(norm))": ("norm", "backward"),
        "iota": ("other", "forward"),
    }.items():
        assert kernels.scopes(line.replace("PATH", path)) == {"fusion.1": expected}
    sliced = '  ROOT %ds = f32[2]{0} dynamic-slice(%a), metadata={op_name="jit(f)/jvp()/while/body/dynamic_slice"}\n'
    assert kernels.scopes(sliced) == {"ds": ("stacking", "forward")}
