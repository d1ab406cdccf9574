"""Pipelines: what comes out depends on nothing but the pipeline, survives kills, and is counted."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from tests.train.synthesize import killed_run
from tests.train.synthesize.killed_run import answer
from train.data.examples import read_examples
from train.synthesize.context import Context
from train.synthesize.generator import Answer, Request
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.run import RunOptions, run

ROOT = Path(__file__).parents[3]


def made(folder: Path) -> dict[str, bytes]:
    """What a run has made: outputs and parts, by name."""
    files = [*folder.glob("*.jsonl"), *folder.glob("parts/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    generator = ScriptedGenerator(answer)
    summary = run(killed_run.pipeline(), {"generator": generator}, folder, RunOptions(part_items=16))
    assert summary["finished"]
    assert len({request.key("scripted") for request in generator.asked}) == len(generator.asked)
    return folder


def test_what_is_made_does_not_depend_on_order_or_parts(whole: Path, tmp_path: Path) -> None:
    rng = print_seed()
    delays = {}

    def delay(request: Request) -> float:
        return delays.setdefault(request.key(""), float(rng.random() / 500))

    for number, options in enumerate((RunOptions(16, 7, 3), RunOptions(int(rng.integers(1, 60)), 1, 1))):
        generator = ScriptedGenerator(answer, concurrency=int(rng.integers(1, 40)), delay=delay)
        run(killed_run.pipeline(), {"generator": generator}, tmp_path / str(number), options)
        assert generator.most_at_once <= generator.concurrency
        assert (tmp_path / str(number) / "sft.jsonl").read_bytes() == (whole / "sft.jsonl").read_bytes()
    assert made(tmp_path / "0") == made(whole)


def test_another_seed_makes_other_data(whole: Path, tmp_path: Path) -> None:
    run(killed_run.pipeline(seed=1), {"generator": ScriptedGenerator(answer)}, tmp_path)
    assert (tmp_path / "sft.jsonl").read_bytes() != (whole / "sft.jsonl").read_bytes()


def test_a_run_that_is_killed_goes_on_and_asks_nothing_again(
    whole: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    rng, log, kills = print_seed(), tmp_path / "log", 20 if pytestconfig.getoption("--all-cases") else 5
    command = [sys.executable, "-m", "tests.train.synthesize.killed_run", str(tmp_path / "run"), str(log), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed = 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        before = log.stat().st_size if log.exists() else 0
        if killed < kills:
            # The clock starts at the first request: before it only modules are read.
            while process.poll() is None and (not log.exists() or log.stat().st_size == before):
                time.sleep(0.002)
            time.sleep(float(rng.random()) * 0.15)
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert made(tmp_path / "run") == made(whole)
    kept, sent = set(), 0
    for line in log.read_text().splitlines():
        what, key = line.split()
        if what == "kept":
            kept.add(key)
        else:
            sent += 1
            assert key not in kept, "a request that was answered has been sent again"
    # What was in flight when the process was killed was sent again, and nothing else.
    assert sent <= len(kept) + killed * 8


def test_sigterm_keeps_what_was_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.train.synthesize.killed_run", str(tmp_path / "run"), str(log), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while process.poll() is None and (not log.exists() or not log.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    lines = log.read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("sent")} == {
        line.split()[1] for line in lines if line.startswith("kept")
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["stopped_by"]) == (False, signal.SIGTERM)


def test_every_example_says_where_it_comes_from(whole: Path) -> None:
    for line in (whole / "sft.jsonl").read_text().splitlines():
        row = json.loads(line)
        known = row["provenance"]
        asked, *checks, comment = known["steps"][0], *known["steps"][1:]
        a, b = row["prompt"].split("+")
        assert known["sources"] == [f"line {a}"]
        assert (known["pipeline"], known["seed"], known["id"][-2:-1]) == ("sums", 0, "/") or "/" not in known["id"]
        assert asked["model"] == comment["model"] == "scripted"
        assert asked["messages"] == [{"role": "user", "content": f"{a}+{b}"}]
        assert len(set(asked["seeds"])) == 3
        assert {check["check"] for check in checks} == {"sum"}
        assert any(check["verdict"] for check in checks)
    assert len(list(read_examples([whole / "sft.jsonl"]))) == len((whole / "sft.jsonl").read_text().splitlines())


def test_counts_add_up(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert stages["sample"]["in"] == killed_run.ITEMS
    names = list(stages)
    for name, following in itertools.pairwise(names):
        assert stages[name]["out"] == stages[following]["in"]
    assert stages["comment"]["out"] == summary["outputs"][0]["rows"]
    assert sum(stages["once"]["rejected"].values()) == stages["once"]["in"] - stages["once"]["out"]
    lost = [json.loads(line) for path in sorted(whole.glob("parts/*/*.rejected.jsonl")) for line in path.open()]
    assert len(lost) == sum(sum(stage["rejected"].values()) for stage in stages.values())
    page = (whole / "report.html").read_text()
    assert all(name in page for name in names)
    assert "the same sum" in page


def test_a_budget_ends_a_run_that_a_larger_one_finishes(whole: Path, tmp_path: Path) -> None:
    first = ScriptedGenerator(answer)
    with pytest.raises(InputError, match="budget"):
        run(killed_run.pipeline(), {"generator": first}, tmp_path, RunOptions(16, max_tokens=300))
    assert not (tmp_path / "sft.jsonl").exists()
    assert "budget" in (tmp_path / "report.html").read_text()
    spent = sum(2 for _ in first.asked)
    assert 300 <= spent <= 300 + 2 * first.concurrency
    second = ScriptedGenerator(answer)
    run(killed_run.pipeline(), {"generator": second}, tmp_path, RunOptions(16))
    assert made(tmp_path) == made(whole)
    keys = [request.key("scripted") for request in (*first.asked, *second.asked)]
    assert len(set(keys)) == len(keys)


def test_a_generator_that_goes_down_loses_nothing(whole: Path, tmp_path: Path) -> None:
    first = ScriptedGenerator(answer, down_after=random.randrange(1, 300))
    with pytest.raises(InputError, match=r"is down.*run the same command again"):
        run(killed_run.pipeline(), {"generator": first}, tmp_path, RunOptions(16))
    second = ScriptedGenerator(answer)
    run(killed_run.pipeline(), {"generator": second}, tmp_path, RunOptions(16))
    assert made(tmp_path) == made(whole)
    assert not {r.key("scripted") for r in first.asked} & {r.key("scripted") for r in second.asked}


def pipeline_of(*stages: Stage | Together, items: int = 40) -> Pipeline:
    source = [make_item({"text": str(i)}) for i in range(items)]
    output = Output("all", lambda item: [{"messages": [{"role": "user", "content": item["text"]}]}])
    return Pipeline("small", lambda: iter(source), stages, [output])


def test_a_stage_that_fails_is_named(tmp_path: Path) -> None:
    async def fail(item: Item, context: Context) -> Result:
        return item.update(text=1 / (int(item["text"]) - 7))

    with pytest.raises(InputError, match=r"The stage half failed on the item .*ZeroDivisionError"):
        run(pipeline_of(Stage("half", fail)), {"generator": ScriptedGenerator(answer)}, tmp_path)


def test_a_check_that_lets_everything_pass_is_found(tmp_path: Path) -> None:
    def stage(check: bool) -> Stage:
        async def verify(item: Item, context: Context) -> Result:
            context.audit("numbers", False, check)
            context.audit("numbers", True, True)
            return item

        return Stage("verify", verify, version=1 + check)

    with pytest.raises(InputError, match=r"The check numbers cannot be trusted: it passed .* known to be wrong"):
        run(pipeline_of(stage(True)), {"generator": ScriptedGenerator(answer)}, tmp_path, RunOptions(8))
    summary = run(pipeline_of(stage(False)), {"generator": ScriptedGenerator(answer)}, tmp_path, RunOptions(8))
    assert summary["audits"] == {"numbers": {"wrong": [40, 0], "right": [40, 40]}}


def test_what_can_never_be_answered_is_asked_once(tmp_path: Path) -> None:
    async def ask(item: Item, context: Context) -> Result:
        (found,) = await context.ask("the same for all", temperature=0.0, max_tokens=5)
        return Rejected("refused", found.refused or "")

    generator = ScriptedGenerator(lambda request: Answer("", refused="too long"))
    for _ in range(2):
        summary = run(pipeline_of(Stage("ask", ask)), {"generator": generator}, tmp_path)
        assert summary["stages"][0]["rejected"] == {"refused": 40}
        assert not (tmp_path / "all.jsonl").read_bytes()
    assert len(generator.asked) == 40
    # A server that has been mended: what it refused is asked again where that is wanted, and once.
    mended = ScriptedGenerator(lambda request: "fine")
    for _ in range(2):
        run(pipeline_of(Stage("ask", ask)), {"generator": mended}, tmp_path, RunOptions(retry_refused=True))
    assert len(mended.asked) == 40


def test_a_model_that_refuses_everything_ends_the_run(tmp_path: Path) -> None:
    async def ask(item: Item, context: Context) -> Result:
        (found,) = await context.ask(item["text"])
        return Rejected("refused", found.refused or "")

    generator = ScriptedGenerator(lambda request: Answer("", refused="seed is not supported"), concurrency=4)
    with pytest.raises(InputError, match=r"has refused the first 50 requests .* seed is not supported"):
        run(pipeline_of(Stage("ask", ask), items=400), {"generator": generator}, tmp_path)
    assert len(generator.asked) < 60


def test_a_finished_run_needs_no_budget(whole: Path, tmp_path: Path) -> None:
    for most in (None, 1):
        generator = ScriptedGenerator(answer)
        run(killed_run.pipeline(), {"generator": generator}, tmp_path, RunOptions(16, max_tokens=most))
    assert not generator.asked
    assert made(tmp_path) == made(whole)


def test_equal_requests_at_the_same_time_are_sent_once(tmp_path: Path) -> None:
    async def check(item: Item, context: Context) -> Result:
        calls = []
        for _ in range(3):
            await context.check("slow", int(item["text"]) % 4, lambda: calls.append(time.sleep(0.002)) or True)
        assert len(calls) <= 1
        return item.update(calls=len(calls))

    run(pipeline_of(Stage("check", check)), {"generator": ScriptedGenerator(answer)}, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "parts/00/000000.jsonl").open()]
    assert sum(row["data"]["calls"] for row in rows) == 4


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    async def other(item: Item, context: Context) -> Result:
        return item

    def nested(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        run(pipeline_of(Stage("other", other)), {"generator": ScriptedGenerator(answer)}, tmp_path)
        yield from ()

    with pytest.raises(InputError, match="lock"):
        run(pipeline_of(Together("nested", nested)), {"generator": ScriptedGenerator(answer)}, tmp_path)


def test_cheap_stages_take_at_least_two_hundred_items_a_second(tmp_path: Path) -> None:
    async def ask(item: Item, context: Context) -> Result:
        found = await context.ask(f"{item['text']}+1", samples=2)
        return item.update(answers=[one.text for one in found])

    made, models = pipeline_of(Stage("ask", ask), items=2000), {"generator": ScriptedGenerator(answer)}
    assert best_rate(2000, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200) > 200


@pytest.mark.parametrize("ends", ["finished", "fault"])
def test_what_stages_hold_ends_with_each_run(ends: str, tmp_path: Path) -> None:
    held = list[str]()

    async def work(item: Item, context: Context) -> Result:
        assert held[-1:] != ["closed"] or ends == "fault"
        held.append("used")
        return item.update(text=str(1 / (ends == "finished")))

    pipeline = dataclasses.replace(
        pipeline_of(Stage("work", work), items=3),
        measures=lambda: {"used": held.count("used")},
        close=lambda: held.append("closed"),
    )
    for _ in range(2):
        held.clear()
        if ends == "fault":
            with pytest.raises(InputError, match="ZeroDivisionError"):
                run(pipeline, {"generator": ScriptedGenerator(answer)}, tmp_path)
        else:
            summary = run(pipeline, {"generator": ScriptedGenerator(answer)}, tmp_path)
            assert summary["measures"] == {"used": held.count("used")}
        assert held.count("closed") == 1
        assert held[-1] == "closed"
