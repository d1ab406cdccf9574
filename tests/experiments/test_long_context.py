"""The whole path of `train_and_extend` at toy size: two stages of training, readings, resume, table."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.long_context import rows as rows_of
from experiments.long_context import sizes
from experiments.long_context import train_and_extend as experiment
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.inference.chunked_prefill import read_layer
from tests.helpers.runs import print_seed
from train.observe.metrics import read_log

TOY = sizes.Setup(
    length=64,
    layers=1,
    hidden=64,
    steps=3,
    batch=8,
    continue_steps=2,
    megabytes=1.0,
    ratios=(1, 2),
    continued_ratios=(4,),
    samples=1,
    depths=(0, 50, 100),
    windows=2,
)


@pytest.fixture
def texts(tmp_path):
    """A folder with a few documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i} says that {i} is a number. " * 20)
    return [str(folder)]


@pytest.fixture
def quick_compilation():
    """Programs run once here: compiling them takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_whole_path(tmp_path, texts):
    folder = tmp_path / "run" / "0"

    def run(setup, schemes, attentions, passkey=None):
        experiment.run(setup, [0], schemes, attentions, folder.parent, texts, passkey, "int8")
        return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]

    compiled = read_layer._cache_size()
    run(TOY, ["rope", "yarn"], ["dense"])
    *records, first, second, third = run(TOY, ["rope"], ["dense", "pooled"], passkey=300)
    # Each model is read by each scheme and attention at each length, once.
    of = {(r["model"], r["scheme"], r["attention"], r["length"]): r for r in records}
    lengths = {"trained": (64, 128), "continued": (256,)}
    ways = ("rope", "dense"), ("yarn", "dense"), ("rope", "pooled")
    assert len(records) == len(of)
    assert set(of) == {(model, *way, n) for model in lengths for way in ways for n in lengths[model]}
    for (_, _, attention, length), record in of.items():
        assert 0 <= record["passkey"] <= 1
        if attention == "dense":
            assert sum(bucket["tokens"] for bucket in record["buckets"]) == 2 * (length - 1)
            continue
        # Sink and window are longer than these prompts: nothing is left out.
        assert "loss" not in record
        for task in ("passkey", "needle"):
            assert record["sparse"][task]["density"] == 1
            assert record["sparse"][task]["recall_lowest_head"] == pytest.approx(1, abs=1e-5)
    # Up to the length of the last stage YaRN is nothing else; beyond it, it is.
    for model, length, same in (("trained", 64, True), ("trained", 128, False), ("continued", 256, True)):
        rope, yarn = (of[model, scheme, "dense", length]["loss"] for scheme in ("rope", "yarn"))
        assert (rope == yarn) == same
    for long, depth in zip((first, second, third), TOY.depths, strict=True):
        assert {"task": "passkey", "model": "continued", "length": 300, "depth": depth}.items() <= long.items()
    # Programs of the chunks: pooled, one for both lengths of a model; 256 tokens, dense; the long passkey.
    assert read_layer._cache_size() - compiled == 4
    # Training continues from the weights of the first stage: two steps of AdamW move a weight by twice the rate or so.
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "model-continued"))
    moved = max(np.abs(before[name] - after[name]).max() for name in before)
    assert 1e-4 < moved < 2 * TOY.learning_rate
    assert load_config(folder / "model-continued").rope_theta == 1e6
    # The same command has nothing to do. Without the last line, it reads one prompt, and finds the same.
    results = folder / "results.jsonl"
    complete = results.read_bytes()
    run(TOY, ["rope"], ["pooled", "dense"], passkey=300)
    assert results.read_bytes() == complete
    results.write_bytes(b"".join(complete.splitlines(keepends=True)[:-1]))
    *same, again = run(TOY, ["rope"], ["pooled", "dense"], passkey=300)
    assert same == [*records, first, second]
    assert {**again, "seconds": 0} == {**third, "seconds": 0}
    shown = experiment.table_of(folder.parent)
    assert "| trained, rope, dense | " in shown
    found = sum(long["found"] for long in (first, second, third))
    assert f"| 300 | continued | 0 | int8 | {found} of 3 | " in shown
    with pytest.raises(InputError, match="steps was 3, is 4"):
        run(dataclasses.replace(TOY, steps=4), ["rope"], ["dense"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_stopped_training_goes_on(tmp_path, texts, monkeypatch, capsys):
    """SIGTERM in the middle of a stage: the same command ends with the same weights and log, bit for bit."""
    seed, at = int(print_seed().integers(2**31)), []
    batch_of = rows_of.MixedLengths.__getitem__

    def batch(self, step):
        if at and step == at[0]:
            at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(self, step)

    monkeypatch.setattr(rows_of.MixedLengths, "__getitem__", batch)
    setup = dataclasses.replace(TOY, continue_steps=0)
    experiment.run(setup, [seed], [], [], tmp_path / "whole", texts)
    at.append(1)
    experiment.run(setup, [seed], [], [], tmp_path / "stopped", texts)
    assert f"Seed {seed}: stopped and saved after step 2 of 3 of the trained model." in capsys.readouterr().out
    assert not (tmp_path / "stopped" / str(seed) / "model").exists()
    experiment.run(setup, [seed], [], [], tmp_path / "stopped", texts)
    weights, logs, names = [], [], []
    for name in ("whole", "stopped"):
        folder = tmp_path / name / str(seed)
        weights.append(load_file(folder / "model" / "model.safetensors"))
        logs.append([(r["step"], r.get("loss"), r.get("held_out_text_loss")) for r in read_log(folder / "train.jsonl")])
        names.append(sorted(path.name for path in folder.iterdir()))
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [r for r in logs[0] if r[1] is not None] == [r for r in logs[1] if r[1] is not None]
    assert names[0] == names[1] == ["model", "settings.json", "train.jsonl"]


def test_a_batch_is_a_function_of_seed_and_step():
    """Repetitions and needles weigh as much as text."""
    rng = print_seed()
    text = rng.integers(0, 256, 5000).astype(np.uint8)
    seed = int(rng.integers(2**31))
    a, b = (rows_of.MixedLengths(64, 8, text, seed)[5] for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert not np.array_equal(a.tokens, rows_of.MixedLengths(64, 8, text, seed)[6].tokens)
    assert a.tokens.shape == (8, 64)
    np.testing.assert_allclose(a.loss_weights.sum(axis=1), 64, rtol=1e-6)


def test_rows_of_two_lengths():
    """40% of the tokens are in rows of one document, 60% in rows of four that do not see each other."""
    rng = print_seed()
    text = rng.integers(0, 256, 5000).astype(np.uint8)
    count, begin = int(rng.choice([2, 3, 4, 16])), int(rng.integers(100))
    data = rows_of.MixedLengths(256, count, text, int(rng.integers(2**31)))
    batches = [data[step] for step in range(begin, begin + 5)]
    assert {batch.shape for batch in batches} == {(count, 256)}
    rows = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    packed = rows.segment_ids[:, -1] == 4
    assert packed.mean() == pytest.approx(0.6)
    assert (rows.segment_ids[~packed] == 1).all()
    assert (rows.segment_ids[packed] == np.repeat([1, 2, 3, 4], 64)).all()
    assert (rows.positions[~packed] == np.arange(256)).all()
    assert (rows.positions[packed] == np.tile(np.arange(64), 4)).all()
    assert rows.segment_ids.dtype == rows.positions.dtype == np.int32


def test_shares_of_the_mixture_over_eight_rows():
    """A quarter repeats, three eighths have needles, also where a step has fewer rows than eight."""
    rng = print_seed()
    mixture = rows_of.Mixture(64, rng.integers(0, 256, 5000).astype(np.uint8))
    first, cut = int(rng.integers(100)), int(rng.integers(9))
    parts = [mixture.rows(rng, first, cut), mixture.rows(rng, first + cut, 8 - cut)]
    tokens = np.concatenate([part.tokens for part in parts])
    needles = (tokens == sizes.LAYOUT.needle).any(axis=1)
    # A row that repeats has no bytes and no markers.
    repetitions = np.isin(tokens, sizes.LAYOUT.content).all(axis=1)
    assert (repetitions.sum(), needles.sum(), len(tokens)) == (2, 3, 8)


def test_a_batch_that_cannot_be_continued():
    with pytest.raises(InputError, match="multiple of 4, got 6"):
        sizes.Setup(batch=6)
    assert len(sizes.Setup(batch=6, continue_steps=0).stages()) == 1


@pytest.mark.parametrize("length", [1024, 8192])
def test_schemes(length):
    setup = sizes.Setup()
    model = setup.model(setup.stages()[0])
    assert 10e6 < model.num_params()["total"] < 60e6
    rope, yarn, dca, scaled = (experiment.extended(model, name, 1024, length) for name in experiment.SCHEMES)
    assert rope.context_length == yarn.context_length == length
    assert (yarn.yarn is None) == (length == 1024)
    assert dca.dual_chunk.chunk_size == scaled.dual_chunk.chunk_size == 1024
    assert dca.dual_chunk.local_size == 32
    assert dca.dual_chunk.original_max_position_embeddings > 2**20
    assert scaled.dual_chunk.original_max_position_embeddings == 1024


def test_the_table_has_means_over_seeds():
    base = {"model": "trained", "scheme": "dca", "attention": "dense", "ratio": 4}
    records = [
        {**base, "seed": s, "passkey": p, "needle": 1.0, "loss": 2.0, "last_loss": 1.5} for s, p in ((0, 0.5), (1, 1))
    ]
    refused = {**base, "seed": 0, "scheme": "rope", "refused": "too long"}
    long = {"task": "passkey", "length": 1_000_000, "model": "continued", "seed": 0, "cache_dtype": "int8"}
    found = ((0, 90.0, 0.02, True), (50, 2.0, 0.02, False), (100, 2.5, 0.03, True))
    prompts = [{**long, "depth": p, "seconds": s, "density": d, "found": f} for p, s, d, f in found]
    shown = experiment.table([*records, refused, {**prompts[0], "refused": "no memory"}, *prompts]).splitlines()
    assert shown[2].startswith("| trained, dca, dense | 0.75 ± 0.35 | 1.00 ± 0.00 | 2.000 ± 0.000 |")
    assert shown[3].startswith("| trained, rope, dense | refused |")
    assert shown[-1] == "| 1,000,000 | continued | 0 | int8 | 2 of 3 | 2.5 | 2.0% |"


def test_the_table_says_where_seeds_differ(tmp_path):
    for seed, steps in (("0", 2000), ("1", 4000)):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "settings.json").write_text(json.dumps({"steps": steps, "layers": 8}))
        record = {"seed": int(seed), "model": "trained", "scheme": "dca", "attention": "dense", "ratio": 4}
        (tmp_path / seed / "results.jsonl").write_text(json.dumps({**record, "passkey": int(seed)}) + "\n")
    lines = experiment.table_of(tmp_path).splitlines()
    assert "| trained, dca, dense | 0.50 ± 0.71 |" in lines[2]
    assert lines[3:] == ["", "steps: 2000 (seed 0), 4000 (seed 1)"]
