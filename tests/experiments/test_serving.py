"""The benchmark of serving measures what it says it does; at toy sizes, so that its figures mean nothing here."""

import asyncio
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.serving import benchmark, cases, host_cost, lengths, load, models, padding, same_text, soak
from experiments.serving.floors import Ceilings, decode_seconds, prefill_seconds
from experiments.serving.host_times import HostTimes
from experiments.serving.sizes import SIZES
from qwen_jax.inference.active import Active
from qwen_jax.inference.runner import Sampled
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.runs import print_seed

SMALL = {"dtype": "float32", "max_seqs": 4, "max_length": 64, "max_batched_tokens": 64}


@pytest.fixture(scope="module")
def engine():
    with models.make_engine(published("tiny"), **SMALL) as engine:
        yield engine


def test_the_file_of_lengths_is_the_one_that_is_made_and_has_its_means():
    assert lengths.FILE.read_text() == lengths.text(lengths.make())
    found = lengths.read()
    for name, values in found._asdict().items():
        assert len(values) == lengths.COUNT
        assert min(values) >= lengths.SHORTEST
        assert max(values) <= lengths.LONGEST
        assert abs(np.mean(values) - lengths.MEANS[name]) < 0.1
    # The two are independent: their logarithms' correlation has a deviation of 512 ** -0.5.
    assert abs(np.corrcoef(np.log(found.input), np.log(found.output))[0, 1]) < 4 * 512**-0.5


def test_floors_count_bytes_and_flops():
    """One row: a step moves the weights and its cache. Many rows: their FLOPs are more than a step's bytes."""
    config, rates = published("qwen2.5-7b"), Ceilings(4e12, 7e14)
    params = config.num_params()
    weights = 2 * (params["total"] - params["embedding"])
    cache = config.kv_bytes_per_token()
    np.testing.assert_allclose(decode_seconds(config, rates, [(100, 2)], 1), (weights + 101 * cache) / 4e12)
    # Two tokens after the first: 101 and 102 tokens are in the cache.
    np.testing.assert_allclose(decode_seconds(config, rates, [(100, 3)], 1), (2 * weights + 203 * cache) / 4e12)
    # Four rows, at most two at a time, need two steps.
    np.testing.assert_allclose(decode_seconds(config, rates, [(0, 2)] * 4, 2), (2 * weights + 4 * cache) / 4e12)
    many = decode_seconds(config, rates, [(0, 2)] * 4096, 4096)
    assert many > (weights + 4096 * cache) / 4e12
    whole = prefill_seconds(config, rates, [1000])
    assert whole > 2 * 1000 * params["layers"] / 7e14
    assert prefill_seconds(config, rates, [1000], cached=900) < whole / 9


def test_a_cyclic_model_repeats_itself(engine):
    rng = print_seed()
    period = int(rng.integers(3, 12))
    with models.make_engine(published("tiny-untied"), period=period, **SMALL) as cyclic:
        start = int(rng.integers(0, cyclic.vocab_limit - period))
        found = cyclic.generate(load.make_requests([(start,)], [2 * period]))[0].token_ids
    first = start // period * period
    assert found == [first + (start - first + 1 + i) % period for i in range(2 * period)]
    with pytest.raises(ValueError, match="output head of its own"):
        models.make_engine(published("tiny"), period=3, **SMALL)


def test_prompts_share_their_beginnings(engine):
    prompts = models.random_prompts(engine, [20, 30, 10], shared=15)
    assert [len(p) for p in prompts] == [20, 30, 10]
    assert prompts[0][:15] == prompts[1][:15]
    assert prompts[0][:10] == prompts[2]
    assert prompts[0][15:] != prompts[1][15:20]


def test_requests_are_driven_and_timed(engine):
    """All at once, a few at a time, and as they are due; tokens and times are those of the streams."""
    requests = load.make_requests(models.random_prompts(engine, [5] * 6), [3, 4, 5, 6, 7, 8])
    for how in ({}, {"concurrency": 2}, {"at": load.poisson(6, 200.0)}, {"incremental": False}):
        before = time.monotonic()
        timings = load.drive(engine, requests, **how)
        assert [t.tokens for t in timings] == [3, 4, 5, 6, 7, 8]
        assert all(before <= t.due <= t.first <= t.last <= time.monotonic() for t in timings)
        if "concurrency" in how:
            # A request that waits for a place is due when it gets it.
            most = max(sum(o.due <= t.due < o.last for o in timings) for t in timings)
            assert most <= 2
    timings = [load.Timing(1.0, 1.5, 2.5, 11), load.Timing(2.0, 2.25, 3.0, 4)]
    found = load.summary(timings)
    assert (found["output_tokens_per_s"], found["requests_per_s"]) == (7.5, 1.0)
    np.testing.assert_allclose([found["ttft_median_ms"], found["tpot_median_ms"]], [375, 175])


def test_arrivals_have_the_rate_that_is_asked_for():
    times = load.poisson(4000, 20.0, seed=int(print_seed().integers(1 << 30)))
    # The mean of 4,000 gaps deviates by 1/63 of itself.
    np.testing.assert_allclose(times[-1], 200.0, rtol=0.1)
    assert times == sorted(times)


def test_the_host_is_measured_and_the_engine_is_as_before(engine):
    methods = {name: vars(kind).get(name) for kind, name in ((Sampled, "read"), (Active, "take"), (Active, "give"))}
    requests = load.make_requests(models.random_prompts(engine, [5] * 4), [9] * 4)
    load.drive(engine, requests)
    times = HostTimes()
    begin = time.perf_counter()
    with times.of(engine, detail=True):
        load.drive(engine, requests)
    wall = time.perf_counter() - begin
    assert times.decode_rows == 4 * 8
    assert times.prefill_tokens == 4 * 5
    assert times.calls["take"] == 4 * 9
    assert all(seconds >= 0 for seconds in times.seconds.values())
    assert sum(times.seconds.values()) <= wall
    record = times.record()
    np.testing.assert_allclose(
        sum(record["parts_ms"].values()) - record["parts_ms"]["wait_for_work"],
        record["host_ms"] + record["wait_ms"],
        rtol=1e-2,
    )
    assert "plan" not in vars(engine._scheduler)
    assert "decode_slots" not in vars(engine._runner)
    for (kind, name), method in zip(
        ((Sampled, "read"), (Active, "take"), (Active, "give")), methods.values(), strict=True
    ):
        assert vars(kind).get(name) is method


def test_the_host_alone_is_measured_without_programs():
    found = host_cost.measure(4, 10, 20, incremental=True, text=True, read=True)
    assert found["mean_decode_rows"] == 4
    assert found["host_ms"] > 0


def test_the_host_is_measured_with_texts_of_a_grammar():
    """All of them go on to the end of the measurement, with the tokens that the grammar allows."""
    pytest.importorskip("llguidance")
    tokenizer = train_bpe(["hello world, hello there"] * 4, 280)
    found = host_cost.measure(3, 10, 400, incremental=True, text=True, tokenizer=tokenizer, constrained=True)
    assert (found["mean_decode_rows"], found["ended"]) == (3, 0)


def test_padding_is_counted():
    """All prompts are read once, and all tokens but the first of each text come from decode steps."""
    found = padding.count(256, 4, requests=5)
    both = lengths.read()
    assert found["prompt_tokens"] == sum(both.input[:5])
    assert found["padded_prompt_tokens"] >= found["prompt_tokens"]
    assert found["decode_padding"] >= 1
    # A text that has ended is in one more step, which was started before that was known.
    rows = found["mean_decode_rows"] * found["decode_steps"]
    assert 0 <= rows - sum(o - 1 for o in both.output[:5]) <= 5


def test_parts_run_and_compare(monkeypatch, capsys, tmp_path):
    """Cases in this process. Of what is not installed, a line says that it is not measured."""

    def here(case, argv, seconds, cache):
        capsys.readouterr()
        cases.run(case, benchmark.parse([*argv, "--here", case]))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setattr(benchmark, "attempt", here)
    argv = ["a", "--size", "tiny", "--no-peer", "--loop-steps", "4", "--warm", "run", "--folder", str(tmp_path)]
    args = benchmark.parse(argv)
    results = benchmark.Results(args.folder, {"card": "none"})
    benchmark.run_part("a", args, argv, results)
    engine, loop = results.find("a-engine/engine greedy"), results.find("a-loop/fixed-batch")
    pairs = cases.file_lengths(SIZES["tiny"], 6)
    assert engine["output_tokens"] == sum(o for _, o in pairs)
    assert engine["compiled_meanwhile"] == 0
    assert loop["rows"] == round(engine["mean_decode_rows"])
    lines = [json.loads(line) for line in (tmp_path / "serving-a.jsonl").read_text().splitlines()]
    assert {line["card"] for line in lines} == {"none"}
    ratio = next(line for line in lines if line.get("target") == 0.8)
    expected = engine["output_tokens_per_s"] / loop["output_tokens_per_s"]
    np.testing.assert_allclose(ratio["ratio"], expected, atol=1e-4)


def test_the_mean_of_what_a_row_attends_to():
    # 10 and 11, and 20: the first tokens come from the prefill.
    assert cases.mean_live([(9, 3), (19, 2), (5, 1)]) == (10 + 11 + 20) / 3


def test_ratios_are_of_equal_concurrency():
    results = benchmark.Results(None, {})
    for concurrency in (1, 64):
        for what, rate in (("engine, free", 100.0), ("engine, JSON schema", 99.0 - concurrency)):
            results.add("f", "f-engine", {"what": what, "concurrency": concurrency, "output_tokens_per_s": rate})
    benchmark.compare(
        "f", "f-engine/engine, JSON schema", "f-engine/engine, free", "output_tokens_per_s", 0.95, results
    )
    found = {r["concurrency"]: r for r in results.records["compare"]}
    assert (found[1]["ratio"], found[1]["met"]) == (0.98, True)
    assert (found[64]["ratio"], found[64]["met"]) == (0.35, False)


def test_a_case_that_fails_says_why(monkeypatch):
    def fail(command, **_):
        return SimpleNamespace(returncode=1, stdout='{"what": "x"}\nnoise\n', stderr="first\nlast words")

    monkeypatch.setattr(benchmark.subprocess, "run", fail)
    first, second, _ = benchmark.attempt("b-engine", ["b"], 1.0, "cache")
    assert first == {"what": "x"}
    assert "last words" in second["error"]


def test_transformers_serves_the_same_requests(capsys):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching")
    from experiments.serving import transformers_peer

    transformers_peer.run(benchmark.parse(["a", "--size", "tiny"]))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["output_tokens"] == sum(o for _, o in cases.file_lengths(SIZES["tiny"], 6))


def test_the_soak_ends_well_and_finds_what_is_wrong(capsys):
    settings = {**SMALL, "tokenizer": cases.a_tokenizer(benchmark.parse(["f"]))}
    with models.make_engine(published("tiny"), **settings) as engine:
        clients = soak.EngineClients(engine, int(print_seed().integers(1 << 30)))
        result = soak.soak(engine, clients, 1.5, 4, 0.5)
        assert result["idle"]
        assert not result["unexpected"], result["first_unexpected"]
        # An error that nobody asked for.
        clients.do = dict.fromkeys(clients.do, lambda: clients._follow(None, 1))
        assert not soak.soak(engine, clients, 0.1, 1, 0.05)["ok"]
    assert soak.is_flat([10**9] * 8)
    assert not soak.is_flat([10**9 + i * 10**8 for i in range(8)])


def test_clients_over_http_get_what_they_ask_for_and_a_drain_counts_whole_texts():
    http_client = pytest.importorskip("experiments.serving.http_client")
    from experiments.serving.soak_server import HttpClients, _until_idle

    settings = {**SMALL, "tokenizer": cases.a_tokenizer(benchmark.parse(["f"]))}
    engine = models.make_engine(published("tiny"), **settings)
    with http_client.serve(engine) as port:
        clients = HttpClients(port, engine.vocab_limit, engine.max_length, int(print_seed().integers(1 << 30)), 4)
        for do in clients.do.values():
            asyncio.run(do())
        assert not clients.unexpected, clients.unexpected
        assert _until_idle(port) == {"running": 0, "waiting": 0, "pages_used": 0}
        for status in (0, 1):
            process = SimpleNamespace(send_signal=lambda number: None, wait=lambda seconds, status=status: status)
            found = clients.drain(process)
            assert found["ended_whole"] == 4
            assert not (found["drained"] and status)
        # A request that must be refused, and is not.
        clients._post = lambda *_: asyncio.sleep(0, (200, True))
        asyncio.run(clients.do["bad"]())
        assert clients.unexpected


def test_texts_of_two_meshes_may_part_at_near_ties_only():
    def finished(*tokens):
        infos = [SimpleNamespace(token_id=i, logprob=x) for i, x in tokens]
        return SimpleNamespace(token_ids=tuple(i for i, _ in tokens), tokens=infos)

    texts = [finished((1, -1.0), (2, -2.0), (3, -0.5)) for _ in range(8)]
    found = same_text.compare(texts, texts)
    assert found["ok"]
    assert (found["equal"], found["tokens_compared"], found["most_apart"]) == (8, 24, 0.0)
    # The greedy text of index 2 parts at its second token; what comes after is not compared.
    for other, ok in ((-2.0 - same_text.NEAR / 2, True), (-2.5, False)):
        found = same_text.compare(texts, [*texts[:2], finished((1, -1.25), (4, other), (9, -9.0)), *texts[3:]])
        assert (found["equal"], found["tokens_compared"], found["most_apart"]) == (7, 22, 0.25)
        assert found["greedy_parted_by"] == pytest.approx(-2.0 - other)
        assert found["ok"] is ok
    # Too many part, sampled ones too.
    assert not same_text.compare(texts, [finished((i, -1.0), (2, -2.0), (3, -0.5)) for i in range(8)])["ok"]


def test_the_copy_of_a_cyclic_head_keeps_the_embedding():
    """Each token's output weight is the embedding of the one before it in its cycle; a short last cycle, too."""
    config = published("tiny-untied")
    mesh = models.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = models.random_params(config, mesh)
        embed = np.asarray(params["embed"]["weight"].astype(jnp.float32))
        head = np.asarray(models.cyclic(config, params, 100)["lm_head"]["weight"].astype(jnp.float32))
    np.testing.assert_array_equal(head[1:100], embed[:99])
    np.testing.assert_array_equal(head[0], embed[99])
    np.testing.assert_array_equal(head[500], embed[511])
