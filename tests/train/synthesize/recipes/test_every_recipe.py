"""Every recipe with a model that has learned nothing: nothing breaks, hardly anything stays, and it says why."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli.synthesize import load_engine
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.engine_protocol import EngineLike
from qwen_jax.serving.settings import Service
from tests.helpers.scripted import edit_json, make_words
from tests.helpers.serving import Running
from train.synthesize.engine_generator import EngineGenerator
from train.synthesize.generator import Answer, Request
from train.synthesize.loading import RECIPES, load_recipe
from train.synthesize.openai_client import OpenAIGenerator
from train.synthesize.run import RunOptions, run

ISOLATION = "bubblewrap" if shutil.which("bwrap") else "none"
LONG = " ".join(f"In the year {1700 + i} the town of {chr(65 + i % 26)}burg had {i * 37} boats." for i in range(60))


def brief(request: Request) -> Request:
    """The same with an answer of a few tokens."""
    return dataclasses.replace(request, max_tokens=min(request.max_tokens, 6))


class BriefServer(OpenAIGenerator):
    """A server, with answers of a few tokens."""

    async def ask(self, request: Request) -> Answer:
        return await super().ask(brief(request))


class Brief(EngineGenerator):
    """The engine in this process, with answers of a few tokens."""

    async def ask(self, request: Request) -> Answer:
        return await super().ask(brief(request))

    async def close(self) -> None:
        """The engine is used by the next recipe."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineLike, GenerationDefaults]]:
    folder = make_words(tmp_path_factory.mktemp("model"))
    edit_json(folder / "generation_config.json", do_sample=True)
    edit_json(folder / "config.json", max_position_embeddings=4096)
    engine, found = load_engine(str(folder), 4)
    yield engine, found
    engine.close()


@pytest.fixture(scope="module")
def generator(loaded: tuple[EngineLike, GenerationDefaults]) -> Brief:
    return Brief(loaded[0], "tiny", 4, defaults=loaded[1])


@pytest.fixture(scope="module")
def url(loaded: tuple[EngineLike, GenerationDefaults]) -> Iterator[str]:
    """Of `qwen-jax serve` with the same engine."""
    server = Running(Service(*loaded), served_names=("tiny",))
    yield f"{server.url}/v1"
    server.context.abort()
    server.stop()
    server.join()


def arguments(name: str, folder: Path) -> dict[str, Any]:
    """Small arguments of a recipe, with the files that it needs."""

    def write(*rows: dict[str, Any]) -> tuple[str, ...]:
        path = folder / "input.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return (str(path),)

    question = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "there"}]
    if name == "mathematics":
        return {"problems": write({"problem": "What is 2 + 3?", "answer": "5"}), "samples": 2, "guided": 1}
    if name == "logic":
        return {"puzzles": 2, "samples": 1, "rounds": 1}
    if name == "code":
        return {"tasks": 2, "languages": ("python",), "samples": 1, "agree": 1, "isolation": ISOLATION}
    if name == "instructions":
        seeds = write({"instruction": "Use the word river at least twice in it."})[0]
        queries = str(folder / "queries.jsonl")
        Path(queries).write_text(json.dumps({"query": "Tell me about the rivers of the world, please."}) + "\n")
        small = {"seeds": (seeds,), "built_in": 1, "augment": 1, "new": 1, "functions": 4, "samples": 1}
        return {"queries": (queries,), **small, "isolation": ISOLATION}
    if name == "structured_data":
        return {"tables": 2, "each": 1, "samples": 1}
    if name == "cross_lingual":
        return {"files": write({"messages": question}), "languages": ("de",), "translations": 1, "embeddings": False}
    if name == "system_prompts":
        return {"prompts": 2, "conversations": 1, "samples": 1}
    if name == "long_responses":
        return {"corpus": write({"text": LONG}), "least_words": 100}
    if name == "knowledge":
        return {"corpus": write({"text": LONG[:300]}), "least_words": 20, "forms": ("textbook",)}
    if name == "filtering":
        return {"examples": write({"messages": question})}
    assert name == "preferences"
    return {"prompts": write({"prompt": "hello"}), "answerers": ("a", "b"), "temperatures": (1.0,)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_has_learned_nothing_breaks_nothing(name: str, generator: Brief, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "What is in a test?", "answer": "this"}) + "\n")
    ends = {"decontaminate": (f"test={tmp_path / 'test.jsonl'}",), "near_duplicates": 0.8}
    pipeline = load_recipe(name)(**arguments(name, tmp_path), **ends)
    assert [stage.name for stage in pipeline.stages[-2:]] == ["evaluation sets", "near duplicates"]
    summary = run(
        pipeline, dict.fromkeys(pipeline.models, generator), tmp_path / "out", RunOptions(part_items=8, workers=2)
    )
    assert summary["finished"]
    assert all((tmp_path / "out" / f"{output['name']}.jsonl").exists() for output in summary["outputs"])
    asked = sum(spent["requests"] for spent in summary["spent"].values())
    assert asked > 0
    # Whatever stayed out is counted under a reason.
    for stage in summary["stages"]:
        assert sum(stage["rejected"].values()) > 0 or stage["out"] > 0 or stage["in"] == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 500


@pytest.mark.draw(2)
@pytest.mark.parametrize("name", RECIPES)
def test_a_server_gives_what_the_engine_in_this_process_gives(
    name: str, generator: Brief, url: str, tmp_path: Path
) -> None:
    made = []
    for folder in ("server", "engine"):
        pipeline = load_recipe(name)(**arguments(name, tmp_path))
        # Each model of the recipe has a client of its own.
        clients = {model: BriefServer(url, concurrency=4, key="") for model in pipeline.models}
        given = clients if folder == "server" else dict.fromkeys(pipeline.models, generator)
        summary = run(pipeline, given, tmp_path / folder, RunOptions(part_items=8, workers=2))
        assert summary["finished"]
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.jsonl")}
        assert len(files) == len(summary["outputs"])
        made.append((files, summary["stages"], summary["spent"]))
    assert made[0][2]["tiny"]["requests"] > 0
    assert made[0] == made[1]
