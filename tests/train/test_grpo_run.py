"""GRPO runs from the command line to a model that has learned: exact resume, the order of prompts, and mistakes."""

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.huggingface import export
from convert.quantized.export import export as quantised_export
from convert.quantized.gptq import Gptq
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.cli.train import _Formats
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import init_params
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.processes import ProcessError, run
from tests.helpers.quantized import random_quantized
from tests.helpers.runs import losses, print_seed, saved_steps, stop_after
from train import grpo_command, grpo_data
from train.data.prompts import order_by_variance, read_scores
from train.episodes import read_episode, write_episode
from train.grpo_config import GrpoRunConfig, RewardUse
from train.grpo_run import train_grpo
from train.judge import Judge
from train.observe.metrics import MetricsLog, read_log
from train.rewards import BUILT_IN

SMALL = [
    "step.dtype=float32", "queries=4", "sampling.group_size=4", "sampling.max_new_tokens=6", "prompt_length=160",
    "engine.compile_first=false", "episodes=4", "learning_rate=3e-3", "objective.kl_weight=0.01",
    "checkpoints.every=100",
]  # fmt: skip

METRICS = {
    "reward/mean", "reward/std", "reward/missing", "reward/letters", "reward/letters_std", "reward/letters_missing",
    "groups/without_variance", "kl/k1", "kl/k3", "entropy", "ratio/mean", "ratio/min", "ratio/max", "clip/low",
    "clip/high", "clip/dual", "sampler_gap/mean", "sampler_gap/max", "sampler_gap/perplexity_ratio",
    "response/tokens", "response/shortest", "response/longest", "response/unfinished", "response/failed_tools",
    "response/turns", "grad_norm", "staleness", "rollouts/tokens_per_second", "rollouts/empty",
    "rollouts/preemptions", "tokens_per_second", "seconds", "seconds/rollouts", "seconds/rewards",
    "seconds/hand_over", "held_out_reward", "held_out_held_reward/missing",
}  # fmt: skip

REWARD = '''
def letters(prompts, completions, wanted):
    """The share of characters that are the wanted one."""
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wanted)]

def places(completions):
    """Differs within each group, whatever the policy writes."""
    return [float(i % 4) for i in range(len(completions))]

def never(completions):
    return [None] * len(completions)

def broken(completions):
    raise ZeroDivisionError("here")
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat tokenizer, prompts as messages and as text, and reward functions."""
    folder, rng = tmp_path_factory.mktemp("grpo"), print_seed()
    tokenizer = train_bpe(["red blue green grey which colour system user assistant\n" * 9], 320)
    config = dataclasses.replace(published("tiny"), vocab_size=384, num_layers=1, eos_token_ids=(tokenizer.eos_id,))
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        export(init_params(config, jax.random.key(int(rng.integers(2**31))), mesh), config, folder / "model")
    tokenizer.save(folder / "model")
    for name, count in (("prompts", 10), ("held", 3)):
        rows = [
            {"prompt": [{"role": "user", "content": f"which colour {rng.integers(100)}"}], "wanted": "r"}
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def arguments(files: Path, output: Path, *changes: str, reward: str = "letters") -> list[str]:
    given = ["--model", str(files / "model"), "--prompts", str(files / "prompts.jsonl"), "--output", str(output)]
    rewards = ["--reward", f"{files / 'reward.py'}:{reward}", "--held-out", str(files / "held.jsonl")]
    return [*given, *rewards, "--set", *SMALL, "loop.evaluate_every=2", *changes]


def configuration(
    files: Path, output: Path, *changes: str, reward: str = "letters", lora: bool = False
) -> GrpoRunConfig:
    return grpo_command.configuration(
        argparse.Namespace(
            model=str(files / "model"),
            prompts=[str(files / "prompts.jsonl")],
            reward=[f"{files / 'reward.py'}:{reward}"],
            output=str(output),
            held_out=[],
            order=None,
            lora=lora,
            config=None,
            set=[*SMALL, *changes],
        )
    )


def test_the_command_learns_and_exports(files: Path, tmp_path: Path) -> None:
    """The policy writes more of what is rewarded, on held-out prompts too; what it wrote is kept."""
    output = tmp_path / "run"
    more = ["episodes=12", "queries=8", "objective.kl_weight=0", "learning_rate=1e-2", "loop.evaluate_every=12"]
    assert main(["train", "grpo", *arguments(files, output, *more)]) == 0
    records = read_log(output / "metrics.jsonl")
    rewards = [r["reward/mean"] for r in records if "reward/mean" in r]
    held_out = [r["held_out_reward"] for r in records if "held_out_reward" in r]
    assert len(rewards) == 12
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    assert held_out[-1] > held_out[0]
    steps = [r for r in records if "loss" in r]
    # On-policy, ratios are 1, and sampler and trainer agree.
    assert all(r["ratio/max"] == r["ratio/min"] == 1 for r in steps)
    assert all(r["sampler_gap/max"] < 1e-4 for r in steps)
    # The tables.
    episode = read_episode(output / "rollouts" / "00000003.parquet")
    assert (episode.number, episode.version, len(episode.rollouts)) == (3, 3, 32)
    texts = [rollout.text or "" for rollout in episode.rollouts]
    assert episode.rewards == pytest.approx([text.count("r") / max(len(text), 1) for text in texts])
    tokens = np.array([rollout.trained.sum() for rollout in episode.rollouts])
    assert (episode.gaps * tokens).sum() / tokens.sum() == pytest.approx(steps[3]["sampler_gap/mean"], rel=1e-4)
    assert main(["generate", str(output / "model"), "--prompt", "red", "--max-new-tokens", "2"]) == 0
    assert main(["train", "grpo", *arguments(files, output, *more)]) == 0


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("updates=2", "objective.old=trainer", "resample=1"),
        ("engine.devices=2", "objective.importance_cap=2.0"),
        ("engine.devices=1", "updates=2", "objective.old=trainer", "objective.importance_mask=3.0"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    changes: tuple[str, ...], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of an episode of two updates, and with rollouts in flight."""
    straight, stopped = (configuration(files, tmp_path / name, *changes) for name in ("straight", "stopped"))
    train_grpo(straight, _Formats())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train_grpo(stopped, _Formats())
    with pytest.raises(InputError, match="with other sampling"):
        train_grpo(dataclasses.replace(stopped, sampling=dataclasses.replace(stopped.sampling, seed=1)), _Formats())
    assert not train_grpo(stopped, _Formats())
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    # The tables, too, with the gaps of all their rollouts.
    for table in sorted((tmp_path / "straight" / "rollouts").glob("*.parquet")):
        assert table.read_bytes() == (tmp_path / "stopped" / "rollouts" / table.name).read_bytes()
        assert np.isfinite(read_episode(table).gaps).all()
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "stopped"))
    assert a == b
    stale = [r["staleness"] for r in read_log(tmp_path / "straight" / "metrics.jsonl") if "staleness" in r]
    late = 0 if not changes or not changes[0].startswith("engine") else 2 if "updates=2" in changes else 1
    assert stale == [0, late, late, late]


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("responses", "call", "failure", "message"),
    [
        (16, 3, "values.pop()", "letters returned 15 values; expected a list of 16"),
        (3, 2, "raise SystemExit(7)", r"letters raised SystemExit \(.*reward.py, line 10\): 7"),
    ],
    ids=["an episode", "an evaluation"],
)
def test_a_reward_that_fails_loses_no_step(
    responses: int, call: int, failure: str, message: str, files: Path, tmp_path: Path
) -> None:
    """The steps before it are saved, though no checkpoint was due. With the reward mended the run is as if unbroken."""
    reward, fails = tmp_path / "reward.py", tmp_path / "fails"
    reward.write_text(f"""
import os

calls = []

def letters(completions):
    calls.append(len(completions))
    values = [text.count("r") / max(len(text), 1) for text in completions]
    if calls.count({responses}) == {call} and os.path.exists({str(fails)!r}):
        {failure}
    return values
""")

    def launch(name: str) -> None:
        config = configuration(files, tmp_path / name, "loop.evaluate_every=2")
        rewards, held_out = (RewardUse(f"{reward}:letters"),), {"held": str(files / "held.jsonl")}
        train_grpo(dataclasses.replace(config, rewards=rewards, held_out=held_out), _Formats())

    launch("straight")
    # The log has everything that one needs to see what goes wrong.
    assert {key for record in read_log(tmp_path / "straight" / "metrics.jsonl") for key in record} >= METRICS
    fails.touch()
    with pytest.raises(InputError, match=message):
        launch("broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")[:2]
    assert (tmp_path / "broken" / "checkpoints" / "2").is_dir()
    fails.unlink()
    launch("broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


SLOW_REWARD = """
import os, signal, time

calls = []

def letters(completions):
    calls.append(0)
    if os.path.exists({fails!r}) and len(calls) == {call}:
        # Of an episode that is sampled ahead, while the step before it is taken and saved.
        while not os.path.isdir({saved!r}):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL) if {killed} else completions.pop()
    return [text.count("r") / max(len(text), 1) for text in completions]
"""


def launch_with_slow_reward(files: Path, output: Path, reward: Path, *changes: str) -> None:
    config = configuration(files, output, *changes)
    train_grpo(dataclasses.replace(config, rewards=(RewardUse(f"{reward}:letters"),)), _Formats())


@pytest.mark.draw(1)
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("updates", [1, 2])
def test_what_was_sampled_ahead_is_only_judged_again(updates: int, killed: bool, files: Path, tmp_path: Path) -> None:
    """A run whose process is killed in a reward, or whose reward fails, goes on bit for bit."""
    changes = ("engine.devices=2", "objective.importance_cap=2.0", "checkpoints.every=1", f"updates={updates}")
    changes += ("objective.old=trainer",) if updates > 1 else ()
    reward, fails, broken = tmp_path / "reward.py", tmp_path / "fails", tmp_path / "broken"
    # The third episode is sampled with the weights after the first step of the second, and judged after one more.
    saved = broken / "checkpoints" / str(updates + 1)
    reward.write_text(SLOW_REWARD.format(fails=str(fails), call=3, saved=str(saved), killed=killed))
    launch_with_slow_reward(files, tmp_path / "straight", reward, *changes)
    fails.touch()
    if killed:
        with pytest.raises(ProcessError, match="-9"):
            run(launch_with_slow_reward, files, broken, reward, *changes, processes=1, devices=jax.device_count())
    else:
        with pytest.raises(InputError, match="letters returned 15 values"):
            launch_with_slow_reward(files, broken, reward, *changes)
    assert saved_steps(broken)[-1] in ((updates + 1, 2 * updates) if killed else (2 * updates,))
    assert not read_episode(broken / "rollouts" / "00000002.parquet").has_signal
    for options in ([], ["--html", str(tmp_path / "page.html")]):
        assert main(["data", "rollouts", str(broken), *options]) == 0
    fails.unlink()
    launch_with_slow_reward(files, broken, reward, *changes)
    assert losses(tmp_path / "straight") == losses(broken)
    for table in sorted((tmp_path / "straight" / "rollouts").glob("*.parquet")):
        assert table.read_bytes() == (broken / "rollouts" / table.name).read_bytes()
    a, b = ((folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "straight", broken))
    assert a == b


def stopped_and_resumed(files: Path, output: Path, *changes: str) -> None:
    """In one of several processes: a run that is stopped after a step, and goes on."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert train_grpo(configuration(files, output, *changes), _Formats())
    assert not train_grpo(configuration(files, output, *changes), _Formats())


def failed_and_resumed(
    files: Path, output: Path, *changes: str, what: str = "rollouts", fails: Callable[..., bool], saved: int
) -> None:
    """In one of several processes: an error of process 0 that no other has ends all, after they have saved a step."""
    write, log = write_episode, MetricsLog.write

    def failing(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_fail(at: Any, content: Any) -> None:
            if fails(content):
                (output / "failed").touch()
                raise OSError("the disk is full")
            write(at, content)

        return write_or_fail

    own, message = (InputError, f"Writing {what} failed in process 0") if jax.process_index() else (OSError, "is full")
    with pytest.MonkeyPatch.context() as patch:
        if what == "rollouts":
            patch.setattr(grpo_data, "write_episode", failing(write))
        else:
            patch.setattr(MetricsLog, "write", failing(log))
        with pytest.raises(own, match=message):
            train_grpo(configuration(files, output, *changes), _Formats())
    # Nobody waits for the others for long.
    assert time.time() - (output / "failed").stat().st_mtime < 60
    assert saved_steps(output) == [saved]
    assert not train_grpo(configuration(files, output, *changes), _Formats())


def failed_in_a_table(*args: Any) -> None:
    failed_and_resumed(*args, fails=lambda episode: episode.number == 1, saved=1)


def failed_in_gaps(*args: Any) -> None:
    """The gaps of a step are written after the next step has begun; that one is saved, too."""
    failed_and_resumed(*args, fails=lambda episode: np.isfinite(episode.gaps).any(), saved=2)


def failed_in_the_log(*args: Any) -> None:
    """The numbers of an episode."""
    failed_and_resumed(*args, what="the log", fails=lambda x: x["step"] == 2 and "staleness" in x, saved=1)


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("ended", "devices", "changes"),
    [
        (stopped_and_resumed, 1, ("updates=2", "objective.old=trainer", "queries=4")),
        (stopped_and_resumed, 2, ("engine.devices=2", "objective.importance_cap=2.0", "queries=3")),
        (failed_in_a_table, 1, ("queries=3",)),
        (failed_in_gaps, 2, ("engine.devices=2", "objective.importance_cap=2.0", "queries=3")),
        (failed_in_the_log, 1, ("queries=3",)),
    ],
    ids=["in turn", "apart", "failed in a table", "failed in gaps", "failed in the log"],
)
def test_two_processes_are_one(
    ended: Callable[..., None], devices: int, changes: tuple[str, ...], files: Path, tmp_path: Path
) -> None:
    """The rollouts, rewards and losses of one process with the same mesh, also for a run that was stopped or failed."""
    changes = (*changes, "mesh.fsdp=2", "episodes=2", "objective.kl_weight=0")
    run(ended, files, tmp_path / "two", *changes, processes=2, devices=devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[: 2 * devices])
        train_grpo(configuration(files, tmp_path / "one", *changes), _Formats())
    for number in range(2):
        a, b = (read_episode(tmp_path / name / "rollouts" / f"{number:08d}.parquet") for name in ("one", "two"))
        assert [r.ids for r in a.rollouts] == [r.ids for r in b.rollouts]
        np.testing.assert_array_equal(a.rewards, b.rewards)
    np.testing.assert_array_equal(losses(tmp_path / "one"), losses(tmp_path / "two"))


def test_the_mesh_does_not_change_rollouts(files: Path, tmp_path: Path) -> None:
    """With a learning rate of almost 0 the policy samples the same on one device and on a mesh with several engines."""
    tiny = ("learning_rate=1e-30", "episodes=2")
    train_grpo(configuration(files, tmp_path / "one", *tiny), _Formats())
    train_grpo(
        configuration(files, tmp_path / "mesh", *tiny, "mesh.fsdp=2", "mesh.tensor=2", "engine.tensor=2"), _Formats()
    )
    for number in range(2):
        a, b = (read_episode(tmp_path / name / "rollouts" / f"{number:08d}.parquet") for name in ("one", "mesh"))
        assert [r.ids for r in a.rollouts] == [r.ids for r in b.rollouts]
        np.testing.assert_array_equal(a.rewards, b.rewards)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "mesh"), atol=1e-5)


def test_prompts_are_ordered_by_the_variance_of_their_scores(files: Path, tmp_path: Path) -> None:
    """Scores are the rewards that a run would begin with, and those of its configuration file are the same."""
    scores, again = tmp_path / "scores" / "one.jsonl", tmp_path / "two.jsonl"
    given = ["--model", str(files / "model"), "--prompts", str(files / "prompts.jsonl")]
    given += ["--reward", f"{files / 'reward.py'}:letters", "--samples", "5", "--set", *SMALL]
    assert main(["score", *given, "--output", str(scores)]) == 0
    assert os.listdir(scores.parent) == [scores.name]
    written = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [row["number"] for row in written] == list(range(10))
    assert all(len(row["scores"]) == 5 for row in written)
    run = configuration(files, tmp_path / "run", "episodes=1", "sampling.group_size=5")
    ordered = dataclasses.replace(run, order=str(scores), held_out={"none": str(tmp_path / "missing.jsonl")})
    (tmp_path / "config.py").write_text(
        f"import pickle\ndef config():\n    return pickle.loads({pickle.dumps(ordered)!r})\n"
    )
    assert main(["score", "--config", str(tmp_path / "config.py"), "--output", str(again)]) == 0
    assert again.read_bytes() == scores.read_bytes()
    assert not (tmp_path / "run").exists()
    train_grpo(dataclasses.replace(ordered, held_out={}), _Formats())
    episode = read_episode(tmp_path / "run" / "rollouts" / "00000000.parquet")
    assert [p.number for p in episode.prompts] == order_by_variance({r["number"]: r["scores"] for r in written})[:4]
    for prompt, rewards in zip(episode.prompts, episode.grouped_rewards, strict=True):
        assert rewards.tolist() == written[prompt.number]["scores"]


def test_the_order_is_a_pure_function_of_the_scores(tmp_path: Path) -> None:
    """It has the highest exact variance first, ties by number, whatever the order of lines and of scores in them."""
    rng = print_seed()
    count, size, shift = int(rng.integers(2, 40)), int(rng.integers(1, 9)), float(rng.random())
    # Few values, so that there are many ties; and a prompt may have the scores of another one in another order.
    values = rng.integers(0, 3, (count, size)) / int(rng.integers(1, 11)) + shift
    values[count // 2 :] = rng.permuted(values[: count - count // 2], axis=1)
    scores = {n: [None if rng.random() < 0.1 else float(x) for x in row] for n, row in enumerate(values)}

    def variance(row: list[float | None]) -> Fraction:
        known = [Fraction(x) for x in row if x is not None]
        mean = sum(known) / max(len(known), 1)
        return sum((x - mean) ** 2 for x in known) / max(len(known), 1)

    # Variances that are the same as floats are ties, too.
    expected = sorted(scores, key=lambda n: (-float(variance(scores[n])), n))
    assert order_by_variance(scores) == expected
    for _ in range(3):
        lines = [json.dumps({"number": n, "scores": rng.permutation(np.array(scores[n])).tolist()}) for n in scores]
        rng.shuffle(lines)
        (tmp_path / "scores.jsonl").write_text("\n".join(lines) + "\n")
        assert order_by_variance(read_scores(tmp_path / "scores.jsonl")) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--reward": None}, "--reward is missing. Give --model, --prompts and --reward, or --config"),
        ({"--prompts": None}, "--prompts is missing"),
        ({"--output": None}, "--output is missing"),
        ({"--samples": "1"}, "--samples must be at least 2, got 1"),
        ({"--input": "talks.jsonl"}, "--input has conversations that a reward model scores, --prompts belongs to"),
        ({"--config": "file.py"}, "--config has the whole run. Leave out --model, --prompts, --reward"),
        ({"--output": "."}, "is a folder"),
        ({"--prompts": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_mistakes_in_scoring(
    changes: dict[str, str | None], message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--prompts": str(files / "prompts.jsonl"), "--reward": "length", "--model": str(files / "model")}
    options = {**given, "--output": str(tmp_path / "scores.jsonl"), **changes}
    assert main(["score", *(x for name, value in options.items() if value is not None for x in (name, value))]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_names_both_uses_of_scoring(capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (([], ["--input", "--prompts", "--reward"]), (["--prompts", "x"], ["--samples", "--order"])):
        with pytest.raises(SystemExit, match="0"):
            main(["score", *options, "--help"])
        told = capsys.readouterr().out
        assert all(name in told for name in named)


def test_adapters_learn_beside_frozen_weights(files: Path, tmp_path: Path) -> None:
    config = configuration(files, tmp_path / "run", "episodes=3", "step.lora.rank=4", reward="places", lora=True)
    train_grpo(config, _Formats())
    steps = [r for r in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert all(r["sampler_gap/max"] < 1e-4 for r in steps)
    # At the beginning the policy is the reference.
    assert steps[0]["kl/k3"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl/k3"] > 1e-6
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_tools_are_described_to_the_policy(files: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("Colours are red.")
    (tmp_path / "own.py").write_text(
        "class Echo:\n    schemas = None\n    def reset(self, prompt): return None\n"
        "    def step(self, state, text, ids): return None\ndef echo(): return Echo()\ndef nothing(): return 3\n"
    )
    changes = "prompt_length=2000", "episodes=1"
    tools = dataclasses.replace(configuration(files, tmp_path / "a", *changes), tools=(f"search:{tmp_path}",))
    train_grpo(tools, _Formats())
    (prompt, *_) = read_episode(tmp_path / "a" / "rollouts" / "00000000.parquet").prompts
    text = load_tokenizer(files / "model").decode(prompt.ids)
    assert '"name": "search"' in text
    # Rewards know them too.
    assert prompt.columns["tools"][0]["function"]["name"] == "search"
    own = dataclasses.replace(configuration(files, tmp_path / "b", *changes), environment=f"{tmp_path}/own.py:echo")
    train_grpo(own, _Formats())
    with pytest.raises(InputError, match="with reset and step, got int"):
        train_grpo(dataclasses.replace(own, environment=f"{tmp_path}/own.py:nothing"), _Formats())
    with pytest.raises(InputError, match="'python' or 'search:FOLDER', got 'perl'"):
        dataclasses.replace(tools, tools=("perl",))


def test_an_episode_is_kept_exactly(files: Path, tmp_path: Path) -> None:
    config = configuration(files, tmp_path / "run", "episodes=1")
    train_grpo(config, _Formats())
    path = tmp_path / "run" / "rollouts" / "00000000.parquet"
    episode = read_episode(path)
    write_episode(tmp_path / "again.parquet", episode)
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()
    # The page to browse it shows texts as text.
    assert main(["data", "rollouts", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [r["completion"] for r in shown[0]["rollouts"]] == [r.text for r in episode.rollouts]
    assert page.count("</script>") == 2
    assert main(["data", "rollouts", str(tmp_path / "run"), "--json"]) == 0
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="no table of rollouts"):
        read_episode(tmp_path / "bad.parquet")


def test_a_program_has_one_verdict_also_over_a_resume(files: Path, tmp_path: Path) -> None:
    """Of programs that print at random, a resumed run would otherwise learn from other rewards."""
    reward = RewardUse("code", settings={"isolation": "none", "workers": 2})
    config = dataclasses.replace(configuration(files, tmp_path / "run"), rewards=(reward,))
    programs = [f"```python\nimport secrets\nprint(secrets.randbelow(2))  # {i}\n```" for i in range(12)]

    def rewards() -> list[float | None]:
        with contextlib.closing(Judge(config, _Formats(), make_mesh({}, jax.devices()[:1]), None)) as judge:  # type: ignore[arg-type]
            return judge.functions["code"](
                completions=programs, finished=[True] * 12, tests=[[{"stdin": "", "expected_stdout": "0"}]] * 12
            )

    first = rewards()
    assert None not in first
    assert rewards() == first
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["verdicts-code.jsonl"]


@pytest.mark.parametrize(
    ("changes", "reward", "message"),
    [
        ((), "never", "no reward function gave a signal for any of 16 responses"),
        ((), "broken", r"broken raised ZeroDivisionError \(.*reward.py, line 14\): here"),
        ((), "missing", "has no function missing"),
        (("prompt_length=3",), "letters", "have more than 3 tokens"),
        (("engine.num_pages=1",), "letters", r"engine.num_pages=1 pages of 32 tokens .* to at least \d+"),
        (('tools=["python"]',), "letters", "bubblewrap .* is needed to run untrusted programs and not installed"),
        (("queries=11",), "letters", "An episode needs 11 different prompts"),
        (("sampling.group_size=1",), "letters", "must be at least 2"),
        (("updates=2",), "letters", "set objective.old=trainer"),
        (("sampling.temperature=0.5",), "letters", "temperature must be the same"),
        (("row_length=165",), "letters", "row_length must hold"),
        (("engine.devices=8", "objective.old=sampler"), "letters", "leaves none of 8 devices"),
        (("objective.kl=k1",), "letters", "k1"),
        (("engine.devices=2",), "letters", "rollouts are older than the weights"),
    ],
)
def test_mistakes(
    changes: tuple[str, ...], reward: str, message: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # Without bubblewrap.
    with pytest.raises(InputError, match=message):
        train_grpo(configuration(files, tmp_path / "run", *changes, reward=reward), _Formats())
    assert not any((tmp_path / "run").rglob("*.parquet"))


def test_prompts_that_cannot_be_read(files: Path, tmp_path: Path) -> None:
    def run(*rows: dict[str, Any]) -> None:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = configuration(files, tmp_path / "run")
        train_grpo(dataclasses.replace(config, prompts={"bad": str(tmp_path / "bad.jsonl")}), _Formats())

    good = {"prompt": "which colour", "wanted": "r"}
    for row, message in (
        ({"wanted": "r"}, "line 2: Expected a column 'prompt'"),
        ({"prompt": 3, "wanted": "r"}, "got int"),
        ({"prompt": "", "wanted": "r"}, "is empty"),
        ({"prompt": "x"}, "'wanted' is in some rows only"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "wanted": "r"}, "ends with an answer"),
        ({"prompt": [{"role": "nobody", "content": "x"}], "wanted": "r"}, "line 2: "),
    ):
        with pytest.raises(InputError, match=message):
            run(good, row)


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        ("letters", {}, "Prompt 0: The reward letters asks for wanted"),
        ("broken", {"finished": True}, "Prompt 0: The prompt file has the column finished"),
        ("math", {}, "Prompt 0: The reward math: expected the right answers in the column answer"),
        ("instructions", {"instruction_id_list": ["no:such"], "kwargs": [{}]}, "Prompt 1: The reward instructions: "),
        ("json_schema", {"schema": '{"type": 3}'}, "Prompt 1: The reward json_schema: "),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_columns_are_checked_before_anything_is_sampled(
    reward: str, columns: dict[str, Any], message: str, held_out: bool, files: Path, tmp_path: Path
) -> None:
    """Of all prompts, also of those to evaluate on. The first prompt of a file can be judged in the later cases."""
    rows: list[dict[str, Any]] = [{"prompt": "which colour", **columns}]
    if "Prompt 1" in message:
        rows.insert(0, {"prompt": "which", **dict.fromkeys(columns)})
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(files, tmp_path / "run", "queries=1", reward=reward)
    spec = reward if reward in BUILT_IN else config.rewards[0].spec
    good = {"prompt": "which", "wanted": "r", "answer": "1", **dict.fromkeys(columns.keys() - {"finished"})}
    (tmp_path / "good.jsonl").write_text(json.dumps(good) + "\n")
    bad = {"bad": str(tmp_path / "bad.jsonl")}
    prompts = {"prompts": {"good": str(tmp_path / "good.jsonl")}, "held_out": bad} if held_out else {"prompts": bad}
    message = ("held out, bad: " if held_out else "^") + message
    with pytest.raises(InputError, match=message):
        train_grpo(dataclasses.replace(config, rewards=(RewardUse(spec),), **prompts), _Formats())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_quantised_base_is_refused_before_anything_is_sampled(files: Path, tmp_path: Path) -> None:
    """Also with LoRA, whose update the engines would need in the codes."""
    config = load_config(files / "model")
    config = dataclasses.replace(config, quantization=Quantization(Scheme("int4", 32)))
    source = TreeSource(random_quantized(config, print_seed()), config)
    quantised_export(source, Gptq(codes="int4", group=32), tmp_path / "model", extra_files_from=files / "model")
    for lora in (True, False):
        run = configuration(files, tmp_path / "run", lora=lora)
        with pytest.raises(InputError, match=r"got quantised weights.*Convert the model first"):
            train_grpo(dataclasses.replace(run, model=str(tmp_path / "model")), _Formats())
        assert not (tmp_path / "run").exists()
