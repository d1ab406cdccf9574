"""The benchmark of tensor-parallel decoding; at toy sizes, so that its rates mean nothing here."""

import dataclasses
import json

import jax
import pytest

from experiments.decode import tensor
from qwen_jax.errors import InputError
from qwen_jax.inference import SamplingParams
from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.inference.row_sampling import VARIANTS, Variant
from qwen_jax.inference.runner_lowering import Program, lower
from qwen_jax.inference.runner_programs import StaticArgs
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.plan.programs import collectives

CONFIG = published("tiny")


def test_reports_the_floor_and_what_is_exchanged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device sends the sums of two products a layer and of the embedding, and at most 2 KB a row for sampling.

    The floor is every weight but the embedding table, which is the head here, and the cache in the middle of the run.
    """
    monkeypatch.setattr(tensor, "median_seconds", lambda run: jax.block_until_ready(run()) and 0.5)
    batch, steps = 3, 2
    command = ["--model", "tiny", "--devices", "2", "--batch", str(batch), "--prompt", "8", "--steps", str(steps)]
    tensor.main([*command, "--bandwidth", "1e-6", "--json"])
    for how, line in zip(("greedy", "sampled"), capsys.readouterr().out.splitlines(), strict=True):
        found = json.loads(line)
        assert (found["devices"], found["batch"], found["sampling"]) == (2, batch, how)
        assert found["step_ms"] == 500 / steps
        assert found["tokens_per_s"] == batch / (0.5 / steps)
        halved, whole = _split_parameters()
        cache = batch * (8 + steps // 2) * CONFIG.kv_bytes_per_token() / 2
        assert found["floor_ms"] == pytest.approx(1e3 * (halved + 2 * whole + cache) / 1e6)
        # On a CPU a product of bfloat16 is added up in float32 or bfloat16.
        sums = batch * CONFIG.hidden_size * (2 * CONFIG.num_layers + 1)
        sampling = 1e3 * found["collective_kb"] - 2 * sums
        assert 0 < sampling <= 2 * sums + 2048 * batch, found


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.draw(3)
def test_sampling_of_the_runner_exchanges_few_bytes(variant: Variant, shards: int) -> None:
    """Candidates and sums: at most 512 bytes a row to each other device; 2 KB more for thresholds over all tokens."""
    rows, mesh = 5, make_mesh({"tensor": shards}, jax.devices()[:shards])
    config = dataclasses.replace(CONFIG, vocab_size=4096, num_heads=8)
    sizes = RunnerConfig(max_seqs=rows, max_length=64, page_size=16, num_pages=8, max_batched_tokens=16)
    options = Options(stacked=False, fused=True)
    static = StaticArgs(config, Sharding.for_inference(config, mesh), options, config.vocab_size, sizes)
    text = lower(Program("sample", rows, variant=variant), static, mesh, {}).compile().as_text()
    sent = sum(c.bytes * c.times for c in collectives(text, shards))
    assert 0 < sent <= rows * (512 * (shards - 1) + 2048 * (variant == "all")), sent


def _split_parameters() -> tuple[int, int]:
    """Parameters that are divided between the two devices, and those that both have: the norms."""
    norms = (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    return CONFIG.num_params()["total"] - norms, norms


@pytest.mark.parametrize("codes", sorted(tensor.SCHEMES))
@pytest.mark.draw(1)
def test_quantised_weights(codes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their codes and scales are the floor; the table has a line for each case."""
    scheme = tensor.SCHEMES[codes]
    monkeypatch.setitem(tensor.SCHEMES, codes, dataclasses.replace(scheme, group=min(scheme.group, 32)))
    monkeypatch.setattr(tensor, "RECOMMENDED", SamplingParams())  # The same program as greedy.
    command = ["--model", "tiny", "--codes", codes, "--devices", "2", "--batch", "1", "--prompt", "8", "--steps", "2"]
    tensor.main([*command, "--bandwidth", "1e-6"])
    *_, greedy, sampled = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in greedy.strip("|").split("|")]
    assert cells[:4] == [f"tiny {codes}", "2", "1", "greedy"]
    assert sampled.split("|")[4].strip() == "sampled"
    # The embedding alone, which is the head, is in bfloat16.
    table, (halved, _) = CONFIG.vocab_size * CONFIG.hidden_size, _split_parameters()
    bits = 4 if codes.startswith("int4") else 8
    assert (table + (halved - table) * bits / 16) / 1e3 < float(cells[6]) < (table + (halved - table)) / 1e3


def test_models_with_experts_are_refused() -> None:
    with pytest.raises(InputError, match="dense"):
        tensor.main(["--model", "tiny-moe", "--devices", "1"])
