"""The two loops of the learning comparison are one experiment: in float32 they agree step by step."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.learning import compare, data, low_precision, small
from experiments.moe import learning
from qwen_jax.errors import InputError
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import print_seed
from train.config import Stage
from train.loop import LoopConfig
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.step import StepConfig


@pytest.mark.slow
def test_both_loops_agree_in_float32(tmp_path):
    """The same weights, rows, optimizer and schedule, on packed rows with padding: 20 steps and the held-out loss.

    The tolerance is for float32 sums in another order, which Adam's division lets grow from step to step.
    """
    from experiments.learning.ours import save_initial
    from experiments.learning.torch_loop import train
    from train.run import pretrain

    rng = np.random.default_rng()
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer")
    for name in ("train", "held-out"):
        make_rows(tmp_path / name, rng, 11, 32, shards=2, tokenizer=tokenizer.fingerprint())
    run = small.config(str(tmp_path), seed=int(rng.integers(2**31)))
    run = dataclasses.replace(
        run,
        output=str(tmp_path / "ours-0"),
        model=dataclasses.replace(published("tiny"), vocab_size=1024, rope_theta=1e4),
        stages=(Stage(Schedule(20, 3e-3, warmup_steps=4), 32, 4, {"text": 1}),),
        step=StepConfig(dtype="float32", remat="none"),
        loop=LoopConfig(evaluate_every=10),
    )
    save_initial(run)
    assert not pretrain(run)
    assert train(run, tmp_path / "ours-0" / "initial", tmp_path / "torch-0")
    ours, torch = (read_log(tmp_path / name / "metrics.jsonl") for name in ("ours-0", "torch-0"))
    # Ours also says where the time went, and the loss over all held-out sets together.
    ours = [record for record in ours if "seconds_step" not in record]
    assert [record["step"] for record in ours] == [record["step"] for record in torch]
    assert sum("loss" in record for record in ours) == 20
    assert sum("held_out_text_loss" in record for record in ours) == 3
    for a, b in zip(ours, torch, strict=True):
        assert a.keys() - {"skipped", "seconds", "held_out_loss"} == b.keys() - {"seconds"}
        tolerances = {"loss": 2e-5, "held_out_text_loss": 2e-5, "grad_norm": 5e-4, "learning_rate": 1e-6, "weight": 0}
        for name in tolerances.keys() & b.keys():
            np.testing.assert_allclose(b[name], a[name], rtol=tolerances[name], err_msg=f"{name} of step {a['step']}")


def write_logs(folder, shift):
    """Logs of two loops and three seeds whose final losses differ by 0.02 from seed to seed, and by `shift`."""
    for loop in ("ours", "torch"):
        for seed in range(3):
            log = [{"step": 0, "held_out_text_loss": 9.0}]
            for step in range(1, 41):
                log.append({"step": step, "loss": 9.0 / step, "tokens_per_second": 1e3})
            log.append({"step": 40, "held_out_text_loss": 3.0 + 0.02 * seed + shift * (loop == "ours")})
            (folder / f"{loop}-{seed}").mkdir(parents=True)
            (folder / f"{loop}-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))


@pytest.mark.parametrize(
    ("shift", "within"), [(0.0, True), (0.019, True), (-0.019, True), (0.021, False), (-0.021, False)]
)
def test_verdict_is_the_stated_rule(tmp_path, shift, within):
    """Three seeds 0.02 apart deviate by 0.02."""
    write_logs(tmp_path, shift)
    result = compare.compare(tmp_path)
    assert result["within_noise"] is within
    np.testing.assert_allclose([result["mean_difference"], result["seed_deviation"]], [shift, 0.02], atol=1e-9)
    assert json.loads((tmp_path / "learning.json").read_text())["steps"] == 40
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_and_missing_runs_are_no_verdict(tmp_path):
    write_logs(tmp_path, 0.0)
    path = tmp_path / "torch-1" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    with pytest.raises(InputError, match="equally far"):
        compare.compare(tmp_path)
    path.unlink()
    (tmp_path / "ours-2" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="at least two seeds"):
        compare.compare(tmp_path)


# Mixtures


@pytest.mark.parametrize("size", learning.SIZES)
def test_a_mixture_is_compared_with_a_dense_model_of_as_many_active_parameters(size):
    dense, moe, scratch, upcycled = (learning.config(kind, "run", size=size).model for kind in learning.RUNS)
    router_and_gate = moe.num_layers * (moe.moe.num_experts + 1) * moe.hidden_size
    assert moe.num_params()["active"] == dense.num_params()["active"] + router_and_gate
    assert scratch == upcycled
    assert scratch.moe.shared_intermediate_size == dense.intermediate_size
    assert dense.intermediate_size % scratch.moe.intermediate_size == 0


@pytest.mark.parametrize(("gain", "expected"), [(0.021, True), (0.019, False), (-0.1, False)])
def test_the_verdict_on_mixtures_is_the_stated_rule(tmp_path, gain, expected):
    """Three seeds 0.02 apart deviate by 0.02; the last one of the mixture has not come as far and does not count."""
    for kind in learning.RUNS:
        for seed in range(4):
            end = 30 if (kind, seed) == ("moe", 3) else 40
            log = [{"step": step, "loss": 9.0 / step} for step in range(1, end + 1)]
            log[-1:] = [{"step": end, "held_out_text_loss": 3.0 + 0.02 * seed - gain * (kind in ("moe", "upcycled"))}]
            log[0] |= dict.fromkeys(("load_entropy", "load_max", "router_entropy"), 0.5)
            (tmp_path / f"{kind}-{seed}").mkdir()
            (tmp_path / f"{kind}-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    result = learning.judge(tmp_path)
    verdict = result["moe_minus_dense"]
    assert verdict["as_expected"] is expected
    np.testing.assert_allclose(verdict["seeds"], [-gain] * 3, atol=1e-9)
    np.testing.assert_allclose(verdict["seed_deviation"], 0.02, atol=1e-9)
    assert len(result["upcycled_minus_scratch"]["seeds"]) == 4
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


# Products of 8 bits


def test_low_precision_learns_and_is_judged(tmp_path):
    """The whole experiment at its tiny size, one seed: text, runs, a table without a verdict, and a picture."""
    source = tmp_path / "source"
    source.mkdir()
    rng = print_seed()
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(400)]
    for i in range(40):
        (source / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    data.make(tmp_path, 1, [str(source)], 1, low_precision.TINY_VOCABULARY, low_precision.TINY_LENGTH)
    with pytest.raises(InputError, match="has a run of bfloat16 and of each other kind"):
        low_precision.judge(tmp_path)
    low_precision.run(tmp_path, list(low_precision.KINDS), [13], steps=8, size="tiny", changes=[], limit=300)
    result = low_precision.judge(tmp_path)
    assert result["steps"] == 8
    assert result["skipped_steps"] == dict.fromkeys(low_precision.KINDS, 0)
    print(result["final_held_out_loss"])
    losses = [of[13] for of in result["final_held_out_loss"].values()]
    assert len(set(losses)) > 1, "rounding changes the losses"
    assert max(losses) < np.log(low_precision.TINY_VOCABULARY)
    assert result["fp8_minus_bfloat16"]["within_noise"] is None
    assert (
        json.loads((tmp_path / "low_precision.json").read_text())["data"]["vocab_size"] == low_precision.TINY_VOCABULARY
    )
    assert (tmp_path / "low_precision.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("gap", "within"), [(0.019, True), (0.021, False), (-0.5, True)])
def test_the_verdict_on_low_precision_is_the_stated_rule(gap, within):
    """Three seeds 0.02 apart deviate by 0.02; only more loss than that is out of the noise."""
    base = {seed: 3 + 0.02 * seed for seed in range(3)}
    result = low_precision.verdict(
        {kind: {s: loss + gap * (kind == "fp8") for s, loss in base.items()} for kind in low_precision.COLORS}
    )
    np.testing.assert_allclose(
        [result["seed_deviation_of_bfloat16"], result["fp8_minus_bfloat16"]["mean"]], [0.02, gap]
    )
    assert result["fp8_minus_bfloat16"]["within_noise"] is within
    assert result["fp8-blocks_minus_bfloat16"]["within_noise"] is True
