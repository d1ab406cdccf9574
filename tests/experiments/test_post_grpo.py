"""The GRPO experiments: problems with right answers, controls with the same rewards, the whole path, comparisons."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from experiments.post.grpo import benchmark, learning, rewards
from experiments.post.grpo.tasks import TASKS
from experiments.post.qwen2_5 import grpo
from experiments.post.tasks import prompt_of
from experiments.train.benchmark import architecture
from qwen_jax.errors import InputError
from qwen_jax.tokenizer.control import TURN_END
from tests.helpers.runs import print_seed
from train.observe.metrics import read_log
from train.rewards import close_rewards, load_reward
from train.rewards.text import last_code_block

# The first reading is enough.
SMALL = dataclasses.replace(
    learning.TOY, layers=1, examples=40, start_accuracy=0.0, start_steps=4, read_every=2, readings=4, held_out=8,
    episodes=2, evaluate_every=1, max_new_tokens=8,
)  # fmt: skip


def test_a_control_keeps_the_rewards_of_each_group():
    """Each group has the same rewards in another order, a function of the texts; one response keeps its own."""
    rng = print_seed()
    prompts = [[{"role": "user", "content": str(i)}] for i in np.repeat(np.arange(40), 8)]
    texts = [str(x) for x in rng.integers(0, 10, len(prompts))]
    answers = [str(x) for x in rng.integers(0, 10, len(prompts))]
    finished = (rng.random(len(prompts)) < 0.9).tolist()
    true = rewards.exact(texts, finished, answers)
    assert true == [float(f and t == a) for f, t, a in zip(finished, texts, answers, strict=True)]
    given = [None if rng.random() < 0.05 else x + rng.random() for x in true]
    found = rewards.shuffled(given, prompts, texts)
    assert found != given
    assert found == rewards.shuffled(given, prompts, texts)
    for first in range(0, len(prompts), 8):
        group = slice(first, first + 8)
        assert collections.Counter(found[group]) == collections.Counter(given[group])
    assert rewards.shuffled(given[::8], prompts[::8], texts[::8]) == given[::8]


def test_the_order_of_a_control_has_nothing_to_do_with_the_truth():
    rng = print_seed()
    places = []
    for i in range(400):
        texts = [str(x) for x in rng.integers(0, 1000, 4)]
        found = rewards.shuffled([1.0, 0.0, 0.0, 0.0], [[{"role": "user", "content": str(i)}]] * 4, texts)
        places.append(found.index(1.0))
    # 100 are expected; the deviation is below 9.
    assert all(55 < count < 145 for count in np.bincount(places, minlength=4))


def test_answers_are_right_and_no_prompt_is_used_twice(tmp_path):
    seed = int(print_seed().integers(2**31))
    setup = dataclasses.replace(learning.Setup(), examples=300, held_out=50, readings=20, episodes=2, code_episodes=2)
    rng = np.random.default_rng(seed)
    for name, task in TASKS.items():
        for _ in range(50):
            problem = task.make(rng, setup)
            if name == "arithmetic":
                question = problem.prompt.removeprefix("What is ").removesuffix("?")
                assert str(eval(question)) == problem.answer == problem.columns["answer"]
            else:
                space = {}
                exec(last_code_block(problem.answer)[1], space)
                (test,) = problem.columns["tests"]
                exec(test["code"], space)
                assert test["code"].count("assert") == 5
        learning.write_problems(setup, name, seed, tmp_path / name)
        found = {}
        for file in ("held-out", "readings", "prompts", "lessons"):
            lines = [json.loads(line) for line in (tmp_path / name / f"{file}.jsonl").read_text().splitlines()]
            texts = [line.get("prompt", line.get("messages"))[1]["content"] for line in lines]
            found[file] = set(texts)
            assert file == "lessons" or len(found[file]) == len(texts)
        assert sum(map(len, found.values())) == len(set.union(*found.values()))
    with pytest.raises(InputError, match="different problems"):
        learning.write_problems(dataclasses.replace(setup, largest=3), "arithmetic", seed, tmp_path / "few")


@pytest.mark.parametrize("setup", [learning.Setup(), learning.TOY], ids=["gpu", "toy"])
@pytest.mark.parametrize("name", list(TASKS))
def test_a_right_answer_fits_in_a_response(name, setup):
    """With the token that ends it; the tokenizer has bytes alone."""
    rng = np.random.default_rng()
    longest = max(len(TASKS[name].make(rng, setup).answer.encode()) for _ in range(2000))
    assert longest + 1 <= setup.max_new_tokens


def test_right_functions_pass_in_the_sandbox():
    """The answers of the data get 1, others 0; the control has the same rewards in each group."""
    if reason := learning.no_sandbox():
        pytest.skip(reason)
    rng = print_seed()
    problems = [TASKS["code"].make(rng, learning.Setup()) for _ in range(10)]
    texts = [text for x in problems for text in (x.answer, x.answer.replace("return x", "return x + 1"), "x")]
    tests = [x.columns["tests"] for x in problems for _ in range(3)]
    prompts = [prompt_of(x) for x in problems for _ in range(3)]
    code, control = load_reward(TASKS["code"].true.spec), load_reward(TASKS["code"].random.spec)
    try:
        assert code(completions=texts, finished=[True] * 30, tests=tests) == [1.0, 0.0, 0.0] * 10
        found = control(prompts=prompts, completions=texts, finished=[True] * 30, tests=tests)
        assert [sorted(found[i : i + 3]) for i in range(0, 30, 3)] == [[0.0, 0.0, 1.0]] * 10
        assert found != [1.0, 0.0, 0.0] * 10
    finally:
        close_rewards([code, control])


@pytest.mark.slow
def test_the_whole_path(tmp_path, monkeypatch, capsys):
    """Every run once, none again; at learning rate 0 nothing changes, and the control has the accuracy of the truth."""
    monkeypatch.setattr(learning, "no_sandbox", lambda: "bwrap is missing")
    tasks = ["code", "arithmetic"]
    learning.run(SMALL, [3], tasks, ["random", "frozen"], tmp_path)
    assert "code: skipped, the sandbox does not hold here: bwrap is missing" in capsys.readouterr().out
    curves = learning.read_curves(tmp_path)
    assert set(curves) == {("arithmetic", "random", 3), ("arithmetic", "frozen", 3)}
    frozen, random = curves["arithmetic", "frozen", 3], curves["arithmetic", "random", 3]
    assert [step for step, _ in frozen] == [0, 1, 2]
    assert len({accuracy for _, accuracy in frozen}) == 1
    assert random[0] == frozen[0]
    steps = [r for r in read_log(tmp_path / "3" / "arithmetic" / "random" / "metrics.jsonl") if "sampler_gap/max" in r]
    assert all(record["sampler_gap/max"] < 1e-3 for record in steps)
    # Nothing is done again.
    with monkeypatch.context() as patch:
        for name in ("train_grpo", "init_state"):
            patch.setattr(learning, name, None)
        learning.run(SMALL, [3], tasks, ["random", "frozen"], tmp_path)
    learning.draw_curves(curves, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(InputError, match="other settings"):
        learning.run(dataclasses.replace(SMALL, rate=1.0), [3], tasks, ["true"], tmp_path)
    # An accuracy that is not reached is an error.
    hard = dataclasses.replace(SMALL, start_accuracy=0.59, start_steps=2)
    with pytest.raises(InputError, match="Raise --start-steps"):
        learning.run(hard, [0], ["arithmetic"], ["true"], tmp_path / "hard")


def test_the_table_says_which_expectations_are_met():
    def curves(**ends):
        return {("arithmetic", v, s): [(0, 0.3), (9, end)] for v, both in ends.items() for s, end in enumerate(both)}

    text = learning.table(curves(true=(0.6, 0.7), random=(0.2, 0.3), frozen=(0.3, 0.3)))
    assert "| arithmetic | true reward | 2 | 0.300 ± 0.000 | 0.650 ± 0.071 | 0.350 ± 0.071 |" in text
    assert "NOT MET" not in text
    assert text.count(": met") == 4
    assert "learning rate 0: gain +0.005, expected 0 within 0.001: NOT MET" in learning.table(
        curves(frozen=(0.31, 0.3))
    )
    assert learning.table(curves(true=(0.49, 0.49), random=(0.36, 0.36))).count("NOT MET") == 2


def test_the_report_s_setting():
    config = grpo()
    assert (config.sampling.group_size, config.queries, config.updates, config.samples) == (8, 256, 1, 2048)
    assert config.order is not None


# --- the benchmark ---


def parsed(folder, *more):
    return benchmark.parse(["--toy", "--layers", "1", "--folder", str(folder), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("benchmark")
    benchmark.make_folder(parsed(found))
    return found


def test_steps_of_grpo_and_sft_have_the_same_rows(folder, capsys):
    args = parsed(folder)
    packed = benchmark.rollout_batch(args, architecture(args))
    assert packed.batch.tokens.shape == (args.update_rows, args.length)
    assert (packed.batch.segment_ids[:, 0] == 1).all()
    lines = []
    for kind in ("grpo", "sft"):
        benchmark.run_here(parsed(folder), kind)
        lines.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    for name in ("batch", "length", "trained", "padding", "accumulation"):
        assert lines[0][name] == lines[1][name]
    assert [line["what"] for line in lines] == ["grpo", "sft"]
    assert lines[0]["accumulation"] == 2


@pytest.mark.draw(1)
@pytest.mark.parametrize("kind", ["engine", "handover", pytest.param("episode", marks=pytest.mark.slow)])
def test_a_kind_is_measured(kind, folder, capsys):
    args = parsed(folder)
    benchmark.run_here(args, kind)
    line = json.loads([x for x in capsys.readouterr().out.splitlines() if x.startswith('{"what')][-1])
    assert line["what"] == kind
    if kind == "engine":
        assert 0 < line["tokens"] <= 16 * args.new
        np.testing.assert_allclose(line["tokens_per_s"], line["tokens"] / line["seconds"], rtol=2e-3)
    elif kind == "handover":
        params = architecture(args).num_params()["total"]
        np.testing.assert_allclose(line["read_gb"], 4 * params / 1e9, rtol=1e-3)
        assert min(line["handover_s"], line["copy_s"]) > 0
    else:
        phases = line["rollouts_s"] + line["rewards_s"] + line["update_and_handover_s"]
        np.testing.assert_allclose(phases, line["step_s"], rtol=5e-3)
        assert line["update_and_handover_s"] > 0
        assert 0 < line["sampled_tokens"] <= 16 * args.new


def test_texts_of_all_kinds_end_with_the_same_ids(folder):
    """A run ends texts with the turn end and the end of text, whatever else the model's configuration says."""
    args = parsed(folder)
    with benchmark.make_engine(args) as engine:
        tokenizer = engine.tokenizer
        assert set(engine.eos_token_ids) == {tokenizer.control_ids[TURN_END], tokenizer.eos_id}
    written = json.loads((args.folder / "model" / "config.json").read_text())
    assert set(written["eos_token_id"]) == set(engine.eos_token_ids)


def test_comparisons_have_targets():
    found = {
        "episode": {"tokens_per_s": 79.0, "step_s": 10.0, "samples_per_s": 4.0},
        "engine": {"tokens_per_s": 100.0},
        "handover": {"handover_s": 0.09, "copy_s": 0.07},
        "grpo": {"tokens_per_s": 95.0},
        "sft": {"error": "out of memory"},
        "trl": {"samples_per_s": 2.0},
    }
    lines = {line["compare"]: line for line in benchmark.comparisons(found)}
    assert [line["met"] for line in lines.values()] == [False, True, True, True]
    assert "update tokens/s to SFT's" not in lines
    assert "| rollout tokens/s to the engine's | 79 | 100 | 0.790 | at least 0.8 | no |" in benchmark.table(
        list(lines.values())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes", "3"], "at least 4 episodes"),
        (["--length", "100"], "rows of at least --prompt and --new, 640 tokens"),
        (["--micro-rows", "7"], "micro-batches that divide 64 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(options)
    assert message in capsys.readouterr().err
