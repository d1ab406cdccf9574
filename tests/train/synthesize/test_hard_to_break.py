"""What goes wrong around a run ends it with a message, loses no answer, and leaves data that can be gone on with."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.cli.synthesize import synthesize
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.scripted_model import ScriptedGenerator
from train.synthesize.context import Context
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.parts import OTHER_REASONS
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.run import RunOptions, run


async def ask(item: Item, context: Context) -> Result:
    (found,) = await context.ask(item["text"])
    return item.update(answer=found.text)


def pipeline_of(*stages: Stage | Together, items: int = 40) -> Pipeline:
    source = [make_item({"text": f"{i} {'x' * 50}"}) for i in range(items)]
    output = Output("all", lambda item: [{"prompt": item["text"], "completion": item["answer"]}])
    return Pipeline("small", lambda: iter(source), stages, [output])


def generator() -> ScriptedGenerator:
    return ScriptedGenerator(lambda request: "fine", concurrency=4, delay=lambda request: 0.001)


def keys(*asked: ScriptedGenerator) -> list[str]:
    return [request.key("scripted") for one in asked for request in one.asked]


def test_a_part_that_others_changed_is_made_again_without_asking(tmp_path: Path) -> None:
    rng = print_seed()
    once = Together("once", lambda items: ((item, item) for item in items))
    stages = [Stage("ask", ask), once, Stage("again", ask)]
    run(pipeline_of(*stages), {"generator": generator()}, tmp_path, RunOptions(8))
    files = sorted(path for path in tmp_path.glob("parts/*/*") if path.stat().st_size)
    before = {path: path.read_bytes() for path in [*files, tmp_path / "all.jsonl"]}
    for change in ("cut", "edit", "remove", "manifest"):
        path = files[int(rng.integers(len(files)))]
        content = path.read_bytes()
        if change == "remove":
            path.unlink()
        elif change == "edit":
            path.write_bytes(content.replace(b"fine", b"evil"))
        else:
            path.write_bytes(b"[]" if change == "manifest" else content[: int(rng.integers(len(content)))])
        second = generator()
        run(pipeline_of(*stages), {"generator": second}, tmp_path, RunOptions(8))
        assert not second.asked
        assert {known: known.read_bytes() for known in before} == before


@pytest.mark.parametrize("kind", ["noise", "cut", "another program's"])
def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers.sqlite"
    if kind == "another program's":
        sqlite3.connect(path).execute("CREATE TABLE answers (id INTEGER)").connection.close()
    elif kind == "noise":
        path.write_bytes(random.randbytes(9000))
    else:
        run(pipeline_of(Stage("ask", ask), items=400), {"generator": generator()}, tmp_path)
        path.write_bytes(path.read_bytes()[:20_000])
    content, one = path.read_bytes(), generator()
    with pytest.raises(InputError, match=r"answers.sqlite cannot be used"):
        run(pipeline_of(Stage("ask", ask, version=2), items=400), {"generator": one}, tmp_path)
    assert not one.asked
    assert path.read_bytes()[:16] == content[:16]


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.train.synthesize.test_hard_to_break import ask, generator, pipeline_of
from train.synthesize.pipeline import Stage
from train.synthesize.run import RunOptions, run
from qwen_jax.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    run(pipeline_of(Stage("ask", ask), items=300), {"generator": generator()}, Path(sys.argv[1]), RunOptions(150))
except InputError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_ends_the_run_which_goes_on_later(tmp_path: Path) -> None:
    stage, options, whole = Stage("ask", ask), RunOptions(150), tmp_path / "whole"
    run(pipeline_of(stage, items=300), {"generator": generator()}, whole, options)
    # What no longer fits: answers; a part; the output. What is there already is read, not written.
    for most, there in ((100_000, ()), (50_000, ("answers.sqlite",)), (100_000, ("answers.sqlite", "parts"))):
        folder = tmp_path / str(len(there))
        folder.mkdir()
        subprocess.run(["cp", "-r", *(whole / name for name in there), folder], check=bool(there), capture_output=True)
        command = [sys.executable, "-c", FULL, str(folder), str(most)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60)
        assert ended.returncode == 1
        assert "Make room" in ended.stderr
        assert "Traceback" not in ended.stderr
        with sqlite3.connect(folder / "answers.sqlite") as file:
            kept = file.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        second = generator()
        run(pipeline_of(stage, items=300), {"generator": second}, folder, options)
        assert len(second.asked) == 300 - kept
        assert (folder / "all.jsonl").read_bytes() == (whole / "all.jsonl").read_bytes()
        assert not list(folder.rglob("*.tmp"))


def test_a_source_that_breaks_off_loses_no_answer(tmp_path: Path) -> None:
    whole = pipeline_of(Stage("ask", ask))

    def broken() -> Iterator[Item]:
        for number, item in enumerate(whole.source()):
            if number == 30:
                raise InputError("line 31 is not JSON")
            yield item

    first = generator()
    with pytest.raises(InputError, match="line 31"):
        run(Pipeline("small", broken, whole.stages, whole.outputs), {"generator": first}, tmp_path, RunOptions(4))
    with sqlite3.connect(tmp_path / "answers.sqlite") as file:
        assert file.execute("SELECT COUNT(*) FROM answers").fetchone()[0] == len(first.asked) > 0
    second = generator()
    run(whole, {"generator": second}, tmp_path, RunOptions(4))
    assert len(keys(first, second)) == len(set(keys(first, second))) == 40


def test_reasons_without_number_are_counted_together(tmp_path: Path) -> None:
    async def lose(item: Item, context: Context) -> Result:
        found = [item.update(number=i, answer="") for i in range(400)] if item["text"][0] == "1" else item
        return found if context.stage == "split" else Rejected(f"{item['number']} \ud800 {item.id} " + "y" * 9000)

    stages = [Stage("split", lose), Stage("lose", lose)]
    source = [make_item({"text": f"1{i}"}) for i in range(5)]
    pipeline = Pipeline("many", lambda: iter(source), stages, [Output("all", lambda item: [])])
    for size in (2, 5):
        summary = run(pipeline, {"generator": generator()}, tmp_path, RunOptions(size))
        reasons = summary["stages"][1]["rejected"]
        assert sum(reasons.values()) == 2000
        assert len(reasons) == 101
        assert OTHER_REASONS in reasons
        for path in (tmp_path / "summary.json", tmp_path / "report.html", *tmp_path.glob("parts/*/??????.json")):
            assert path.stat().st_size < 300_000
            path.read_text(encoding="utf-8")
    details = [json.loads(line) for path in tmp_path.glob("parts/*/*.rejected.jsonl") for line in path.open()]
    assert len({one["reason"] for one in details}) == 2000


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "stage odd must give .* got a NoneType"),
        ("text", "stage odd must give .* got a str"),
        (Rejected(7), "stage odd gave Rejected without texts"),  # type: ignore[arg-type]
        (Item("a", {"x": {1, 2}}), "stage odd gave an item a that is no JSON"),
        (SystemExit(3), "stage odd failed on the item .* (RuntimeError: )?SystemExit: 3"),
        (OSError("no"), "stage odd failed on the item .* OSError: no"),
    ],
)
def test_a_stage_that_gives_something_else_is_named(tmp_path: Path, result: object, message: str) -> None:
    async def odd(item: Item, context: Context) -> Result:
        if isinstance(result, SystemExit):
            await context.check("exit", item["text"], lambda: sys.exit(3))
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[return-value]

    with pytest.raises(InputError, match=message):
        run(pipeline_of(Stage("odd", odd)), {"generator": generator()}, tmp_path)
    assert "Not finished" in (tmp_path / "report.html").read_text()


def test_an_output_that_fails_is_named_and_costs_nothing(tmp_path: Path) -> None:
    whole, first, second = pipeline_of(Stage("ask", ask)), generator(), generator()
    (tmp_path / ".all.jsonl.1.tmp").write_text("left by a killed run")
    bad = Pipeline("small", whole.source, whole.stages, [Output("all", lambda item: [{"x": item["absent"]}])])
    with pytest.raises(InputError, match=r"The output all failed on the item .*KeyError"):
        run(bad, {"generator": first}, tmp_path)
    run(whole, {"generator": second}, tmp_path)
    assert len(first.asked) == 40
    assert not second.asked
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(InputError, match="name of an output"):
        Pipeline("small", whole.source, whole.stages, [Output("a/b", lambda item: [])])


def test_a_limit_of_cost_needs_a_price(tmp_path: Path) -> None:
    one = generator()
    with pytest.raises(InputError, match="price"):
        run(pipeline_of(Stage("ask", ask)), {"generator": one}, tmp_path, RunOptions(max_cost=1.0))
    assert not one.asked


def test_texts_of_models_are_inert_on_the_page(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\x00\ud800<img src=x onerror=alert(1)>" + "A" * 1_000_000

    async def lose(item: Item, context: Context) -> Result:
        (found,) = await context.ask(item["text"])
        number = int(item["text"].split()[0])
        return Rejected(found.text[:90], found.text) if number % 2 else item.update(answer=found.text)

    run(pipeline_of(Stage("lose", lose), items=4), {"generator": ScriptedGenerator(lambda _: evil)}, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert len(page) < 100_000
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").open()]
    assert [row["completion"] for row in rows] == [evil, evil]


HANGING = """
import sys, time
from pathlib import Path
from tests.train.synthesize.test_hard_to_break import generator, pipeline_of
from train.synthesize.pipeline import Stage
from train.synthesize.run import run

async def hang(item, context):
    def check():
        print("hangs", flush=True)
        time.sleep(3600)
    await context.check("hang", item["text"], check)

run(pipeline_of(Stage("hang", hang)), {"generator": generator()}, Path(sys.argv[1]))
"""


def test_a_second_ctrl_c_ends_a_run_whose_check_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    said, end = tmp_path / "said", time.monotonic() + 30
    with said.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3])
    try:
        while process.poll() is None and not said.stat().st_size and time.monotonic() < end:
            time.sleep(0.02)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert process.wait(10) != 0
    finally:
        process.kill()
        process.wait()
    assert said.read_bytes().startswith(b"hangs")
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model: str", "argument model of pipeline is an option of the command already"),
        ("words: list[str] = []", "argument words of pipeline has a default that can be changed"),
        ("word: 'Absent'", "type Absent of the argument word of pipeline cannot be read"),
    ],
)
def test_arguments_that_cannot_be_options_are_named(tmp_path: Path, argument: str, message: str) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"def pipeline(*, {argument}): ...\n")
    with pytest.raises(InputError, match=message):
        synthesize(["--config", str(recipe), "--output", str(tmp_path / "out"), "--model", "http://127.0.0.1:9/v1"])


def test_examples_and_summary_belong_together(tmp_path: Path) -> None:
    def named(*names: str, fails: bool = False) -> Pipeline:
        async def work(item: Item, context: Context) -> Result:
            return item.update(answer=str(1 / (item["text"][0] != "7" or not fails)))

        rows = [Output(name, lambda item: [{"prompt": item["text"], "completion": item["answer"]}]) for name in names]
        return Pipeline("small", pipeline_of(Stage("work", work)).source, [Stage("work", work, 1 + fails)], rows)

    def there() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl") if "parts" not in path.parts}

    run(named("one", "two"), {"generator": generator()}, tmp_path)
    whole = (tmp_path / "one.jsonl").read_bytes()
    assert there() == {"one.jsonl", "two.jsonl"}
    # A run that ends early leaves no examples of an earlier one beside its summary.
    with pytest.raises(InputError, match="ZeroDivisionError"):
        run(named("one", fails=True), {"generator": generator()}, tmp_path)
    assert there() == {"earlier/one.jsonl", "earlier/two.jsonl"}
    assert (tmp_path / "earlier/one.jsonl").read_bytes() == whole
    # Nor does one with other outputs.
    run(named("one", "two"), {"generator": generator()}, tmp_path)
    run(named("two", "three"), {"generator": generator()}, tmp_path)
    assert there() == {"two.jsonl", "three.jsonl", "earlier/one.jsonl", "earlier/two.jsonl"}
    # A summary of others moves nothing outside of the folder.
    (tmp_path / "out").mkdir()
    (tmp_path / "kept.jsonl").write_text("x")
    (tmp_path / "out" / "summary.json").write_text(json.dumps({"outputs": [{"name": "../kept"}, {"name": 3}, {}]}))
    run(named("two"), {"generator": generator()}, tmp_path / "out")
    assert (tmp_path / "kept.jsonl").exists()
