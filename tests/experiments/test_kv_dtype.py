"""The comparison of losses with keys and values in 8 bits."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from experiments.long_context.kv_dtype import compare
from qwen_jax.options import Options
from qwen_jax.published import published
from tests.helpers.forward import logits, random_unstacked
from tests.helpers.runs import print_seed


def test_losses_beside_those_of_a_bfloat16_cache(mesh: Mesh) -> None:
    """The first is that of the whole forward pass, up to bfloat16; the others are close and not the same."""
    rng = print_seed()
    config = dataclasses.replace(published("tiny"), vocab_size=96, num_layers=1)
    params, tokens = random_unstacked(config, mesh, rng), rng.integers(0, 96, (2, 24)).astype(np.int32)
    plain, *in_8_bits = compare(config, params, mesh, tokens, chunk=16)
    whole = np.asarray(logits(config, params, mesh, tokens, Options(stacked=False)), np.float64)
    total = np.log(np.exp(whole).sum(-1))[:, :-1]
    want = (total - np.take_along_axis(whole[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]).mean()
    assert abs(plain["loss"] - want) < 0.05
    assert [r["kv_dtype"] for r in (plain, *in_8_bits)] == ["bfloat16", "int8", "float8_e4m3fn"]
    assert plain["change"] == 0
    for record in in_8_bits:
        assert 0 < record["standard_error"] < 0.05
        assert record["tokens"] == 48
