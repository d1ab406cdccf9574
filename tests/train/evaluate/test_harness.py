"""lm-eval's tasks score the same on our models as on its own backend, request by request."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.likelihood import LikelihoodScorer
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.helpers.evaluated import Sums, write_sums
from tests.helpers.harness_tasks import TASKS, sentence, write_tasks
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed
from train.evaluate import harness, token_model
from train.evaluate.compare import compare
from train.evaluate.encoding import RequestEncoder
from train.evaluate.evaluation import Names, _scale, evaluate, sort_names
from train.evaluate.harness import HarnessTask, Settings
from train.evaluate.harness_lm import generate_request
from train.evaluate.run import RunOptions
from train.evaluate.statistics import wilson
from train.evaluate.task import Generate, Loglikelihood, Request, Response, Rolling
from train.evaluate.token_model import Done, TokenModel

pytest.importorskip("lm_eval")

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, tasks and data."""
    root, rng = tmp_path_factory.mktemp("harness"), print_seed()
    texts = [sentence(rng, 30) + "\n\nQ: A. B.\nA: Answer:" for _ in range(40)]
    tokenizer = train_bpe(texts, 330)
    tokenizer.save(root / "model")
    # No id without a text: an engine never samples such, and transformers does.
    sizes = {"vocab_size": 330, "eos_token_id": tokenizer.eos_id, "max_position_embeddings": CONTEXT}
    make_hf_checkpoint(root / "model", seed=int(rng.integers(1000)), **sizes)
    write_tasks(root / "tasks", root / "data", rng)
    return root


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def model(folder: Path, tokenizer: Tokenizer) -> TokenModel:
    mesh, eight = make_mesh(), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config, params = convert.load(folder / "model", mesh, "float32", Options(stacked=False))
    scorer = LikelihoodScorer(
        config, convert.load(folder / "model", eight, "float32")[1], eight, dtype="float32", tokens_per_batch=512
    )
    engine = ContinuousEngine(
        config, params, mesh, tokenizer=tokenizer, dtype="float32", max_seqs=4, max_batched_tokens=256, num_pages=64
    )
    return TokenModel("tiny", RequestEncoder(tokenizer, CONTEXT), scorer, engine)


def settings(folder: Path, **more: Any) -> Settings:
    return Settings(data_root=folder / "data", include=(folder / "tasks",), **more)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """What lm-eval gives with its own backend."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from train.evaluate.harness_data import LocalData

    with LocalData(folder / "data").used():
        lm = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=3)
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        found: dict[str, Any] = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return found


def test_ten_tasks_score_as_with_the_hf_backend_request_by_request(
    folder: Path, tokenizer: Tokenizer, model: TokenModel, theirs: dict[str, Any], tmp_path: Path
) -> None:
    assert len(TASKS) == 10
    tasks = [HarnessTask(name) for name in TASKS]
    ours = harness.run(model, tokenizer, tasks, tmp_path, settings(folder))
    assert model.encoder.truncated > 0
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in ours["records"]:
        by_task.setdefault(record["task"], []).append(record)
    for name in TASKS:
        samples, records = theirs["samples"][name], by_task[name]
        assert len(samples) == len(records) >= 3
        for sample, record in zip(samples, records, strict=True):
            assert record["hash"]["prompt"] == sample["prompt_hash"]
            for got, want in zip(record["responses"], sample["resps"], strict=True):
                _same(got, want, name)
        for metric, found in ours["tasks"][name]["metrics"].items():
            key = metric if "," in metric else f"{metric},none"
            # Perplexities are exponentials of the sums above.
            assert found["value"] == pytest.approx(theirs["results"][name][key], rel=1e-3), (name, metric)
    acc = ours["tasks"]["tiny_letters"]["metrics"]["acc"]
    assert acc["stderr"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 2) ** 0.5)
    # All of it is written, with what decides it.
    written = json.loads((tmp_path / harness.RESULTS).read_text())
    assert written["harness"]["version"]
    assert set(written["files"]) == {"tiny/train.jsonl", "tiny/test.jsonl"}
    assert all(len(x["template"]) == 64 and x["items"] == 3 for x in written["tasks"].values())
    assert written["tasks"]["tiny_letters"]["shots"] == 2
    assert len((tmp_path / harness.RECORDS).read_text().splitlines()) == len(ours["records"])


def _same(got: Sequence[Any], want: Sequence[Any], name: str) -> None:
    for a, b in zip(got, want, strict=True):
        if isinstance(b, str):
            assert a == b, name
        elif isinstance(b, float):
            assert a == pytest.approx(b, abs=2e-4, rel=1e-5), name
        else:
            assert a[0] == pytest.approx(b[0], abs=2e-4, rel=1e-5), name
            assert a[1] == b[1], name


class Recorded:
    """A model that answers from a rule, and remembers what it was asked; it may die after some answers."""

    name, context_length = "recorded", None

    def __init__(self, dies_after: int | None = None):
        self.asked: list[Request] = []
        self._dies_after = dies_after

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        for i in reversed(range(len(requests))):
            if self._dies_after is not None and len(self.asked) >= self._dies_after:
                raise KeyboardInterrupt
            request = requests[i]
            self.asked.append(request)
            if isinstance(request, Generate):
                done(i, Response(text=str(request.prompt)[-9:], tokens=3))
            else:
                text = request.text if isinstance(request, Rolling) else request.context + request.continuation
                done(i, Response(logprob=-float(len(text)), tokens=len(text)))


NAMES = "tiny_letters", "tiny_generate", "tiny_rolling"


def test_a_killed_run_repeats_no_request_and_a_repeated_one_is_byte_identical(folder: Path, tmp_path: Path) -> None:
    tasks = [HarnessTask(name) for name in NAMES]
    whole = Recorded()
    first = harness.run(whole, None, tasks, tmp_path / "whole", settings(folder))
    assert len(set(map(repr, whole.asked))) == len(whole.asked) == 3 * 3 + 3 + 3
    killed, resumed = Recorded(dies_after=7), Recorded()
    with pytest.raises(KeyboardInterrupt):
        harness.run(killed, None, tasks, tmp_path / "killed", settings(folder))
    second = harness.run(resumed, None, tasks, tmp_path / "killed", settings(folder))
    assert len(killed.asked) == 7
    assert sorted(map(repr, killed.asked + resumed.asked)) == sorted(map(repr, whole.asked))
    assert first["tasks"] == second["tasks"]
    for name in (harness.RESULTS, harness.RECORDS):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    # Another model shares no responses.
    other = Recorded()
    other.name = "other"
    harness.run(other, None, tasks[1:2], tmp_path / "whole", settings(folder, limit=2))
    assert len(other.asked) == 2


def test_bad_input_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks as lm_eval_tasks

    # Reading all of lm-eval's tasks takes long.
    manager = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **x: manager(**{**x, "include_defaults": False}))
    model = Recorded()
    with pytest.raises(InputError, match=r"tiny_leters is neither .* tiny_letters"):
        harness.run(model, None, [HarnessTask("tiny_leters")], None, settings(folder))
    with pytest.raises(InputError, match="neither a file nor one below --data-root"):
        harness.run(model, None, [HarnessTask("tiny_letters")], None, Settings(include=(folder / "tasks",)))
    (tmp_path / "hub.yaml").write_text(
        json.dumps({"task": "hub", "dataset_path": "someone/set", "dataset_name": "part", "test_split": "test"})
    )
    hub = Settings(include=(tmp_path,), data_root=tmp_path / "data")
    with pytest.raises(InputError, match=r"someone/set is not here.*--local-dir"):
        harness.run(model, None, [HarnessTask("hub")], None, hub)
    with pytest.raises(InputError, match="is no folder"):
        harness.run(model, None, [HarnessTask("hub")], None, Settings(include=(tmp_path / "none",)))

    class Failing(Recorded):
        def answer(self, requests: Sequence[Request], done: Done) -> None:
            for i in range(len(requests)):
                done(i, Response(error="too long"))

    with pytest.raises(InputError, match=r"3 of 3 requests have no answer.*tiny_generate, item 0: too long"):
        harness.run(Failing(), None, [HarnessTask("tiny_generate")], tmp_path, settings(folder))


def test_data_lies_as_on_the_hub(tmp_path: Path) -> None:
    """Under the data set's name, with a folder for each configuration; what was read is hashed."""
    root = tmp_path / "data"
    for split in ("train", "test"):
        path = root / "someone" / "set" / "part" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"q": f"{split} {i} is", "a": " good"}) + "\n" for i in range(4)))
    task = {
        "task": "local",
        "dataset_path": "someone/set",
        "dataset_name": "part",
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    model = Recorded()
    found = harness.run(model, None, [HarnessTask("local", 2)], None, Settings(root, (tmp_path,)))
    assert set(found["files"]) == {f"someone/set/part/{split}.jsonl" for split in ("train", "test")}
    assert found["tasks"]["local"]["shots"] == 2
    assert found["tasks"]["local"]["items"] == 4
    assert all(x.context.count("train") == 2 for x in model.asked if isinstance(x, Loglikelihood))


def test_generation_arguments_become_requests() -> None:
    assert generate_request("p", {}, 7) == Generate("p", 256)
    asked = {"until": ["a", ""], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7, "top_p": 0.5}
    assert generate_request("p", asked, 7) == Generate("p", 9, ("a",))
    asked = {"until": "a", "max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_p": 0.5}
    assert generate_request("p", asked, 7) == Generate("p", 9, ("a",), 0.7, 0.5, 7)
    with pytest.raises(InputError, match="with num_beams"):
        generate_request("p", {"num_beams": 3}, 7)


def test_texts_are_encoded_as_a_whole(tokenizer: Tokenizer) -> None:
    """Remembered pieces give the ids of the whole text, prepared or not; continuations are what is left of it."""
    rng = print_seed()
    encoder, prepared = RequestEncoder(tokenizer, 100), RequestEncoder(tokenizer, 100)
    parts = [
        "\n\n",
        "\n",
        " ",
        "  ",
        "A b",
        "Word word",
        "é",
        "e\u0301 x",
        "'s it",
        "1 2",
        "<|im_end|>",
        ".\n\nQ: is A x",
    ]
    for _ in range(300):
        text = "".join(rng.choice(np.array(parts, object), rng.integers(1, 14)).tolist())
        assert encoder.text(text) == tokenizer.encode(text)
        # The second continuation finds the context remembered.
        for _ in range(2):
            context, after = text.rstrip(), "".join(rng.choice(np.array(parts, object), 2).tolist()) + "."
            before = tokenizer.encode(context)
            whole = tokenizer.encode(context + after)
            if context and len(whole) > len(before) and len(whole) < 100:
                assert encoder.pair(context, after) == (before, whole[len(before) :])
                prepared.prepare([(context, after), (context, "."), ("", after)])
                assert prepared.pair(context, after) == (before, whole[len(before) :])
    assert encoder.pair("a question ", "word") == encoder.pair("a question", " word")
    assert encoder.pair("", "word")[0] == [tokenizer.eos_id] == encoder.pair("  ", "word")[0]
    before, after = encoder.pair("word " * 300, "and")
    assert len(before) + len(after) == 101
    assert encoder.truncated == 1
    with pytest.raises(InputError, match="has 0 tokens"):
        encoder.pair("a", "")
    with pytest.raises(InputError, match="leaves no room"):
        encoder.prompt("a", 100)


def test_a_text_that_is_no_unicode_is_the_error_of_its_request_alone(model: TokenModel) -> None:
    """JSON may have half a surrogate pair."""
    found: dict[int, Response] = {}
    bad = Loglikelihood("the answer", " is \ud800"), Loglikelihood("half a \ud800 pair", " is bad")
    good = Loglikelihood("the answer", " is 4")
    model.answer([*bad, good], found.__setitem__)
    assert all("surrogate" in (found[i].error or "") for i in (0, 1))
    model.answer([good], lambda i, response: found.update({3: response}))
    assert found[2].error is None
    assert found[2].logprob == pytest.approx(found[3].logprob)


def test_conversations_are_formatted_by_the_template(tokenizer: Tokenizer) -> None:
    from train.evaluate.harness_lm import HarnessLM

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is "}]
    lm = HarnessLM(Recorded(), tokenizer)
    assert lm.apply_chat_template(messages[:1]).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert lm.apply_chat_template(messages, add_generation_prompt=False).endswith("assistant\nThe answer is ")
    assert lm.tokenizer_name != HarnessLM(Recorded()).tokenizer_name
    # A model that formats conversations itself gets the messages.
    model = Recorded()
    lm = HarnessLM(model)
    from lm_eval.api.instance import Instance

    lm.generate_until([Instance("generate_until", {}, (lm.apply_chat_template(messages[:1]), {}), 0)])
    assert model.asked == [Generate(tuple(messages[:1]), 256)]


def test_an_evaluation_finds_what_is_missing_first_and_loses_no_other_task(folder: Path, tmp_path: Path) -> None:
    """Data of lm-eval is looked for before ours is asked; a task without answers takes no other with it; a group, which
    has no records of its own, can be compared."""
    group = {
        "group": "tiny_group",
        "task": ["tiny_letters"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "group.yaml").write_text(json.dumps(group))
    write_sums(tmp_path / "data", print_seed())
    options = RunOptions(tmp_path / "data", limit=4)

    class Partly(Recorded):
        def answer(self, requests: Sequence[Request], done: Done) -> None:
            for i, request in enumerate(requests):
                if isinstance(request, Rolling):
                    done(i, Response(error="too long"))
                else:
                    super().answer([request], lambda _, found, i=i: done(i, found))  # type: ignore[misc]

    def names(*theirs: str) -> Names:
        return Names((Sums(),), tuple(map(HarnessTask, theirs)))

    how = settings(folder, limit=2)
    how = dataclasses.replace(how, include=(*how.include, tmp_path / "more"))
    model = Partly()
    with pytest.raises(InputError, match="neither a file nor one below --data-root"):
        evaluate(model, names("tiny_letters"), tmp_path / "a", options, dataclasses.replace(how, data_root=None))
    assert model.asked == []
    for out in ("a", "b"):
        summary = evaluate(model, names("tiny_group", "tiny_rolling"), tmp_path / out, options, how)
        assert {"sums", "tiny_group", "tiny_letters"} <= set(summary["tasks"])
        # A share of items has the same interval as one of our tasks, and none that leaves 0 to 1.
        acc = summary["tasks"]["tiny_letters"]["metrics"]["acc"]
        assert (acc["low"], acc["high"]) == wilson(acc["value"], 2)
        assert "too long" in summary["left_out"]["tiny_rolling"]
        assert summary["harness"]["failed"].keys() == {"tiny_rolling"}
    # An evaluation that is killed between the two kinds of tasks leaves no summary.
    with pytest.raises(KeyboardInterrupt):
        evaluate(Recorded(dies_after=13), names("tiny_letters"), tmp_path / "killed", options, how)
    assert (tmp_path / "killed" / "sums.jsonl").is_file()
    assert not (tmp_path / "killed" / "summary.json").exists()
    compared = compare(tmp_path / "a", tmp_path / "b")["tasks"]
    assert compared["tiny_letters"]["metrics"]["acc"]["items"] == 2
    assert compared["tiny_group"]["metrics"]["acc"]["items"] == 0


@pytest.mark.parametrize(
    ("name", "value", "scale"),
    [
        ("acc", 0.5, 100),
        ("exact_match,strict-match", 1.0, 100),
        ("bleu_acc", 0.2, 100),
        ("mcc", -0.1, 100),
        ("word_perplexity", 9.0, 1),
        ("bits_per_byte", 0.9, 1),
        ("bleu", 34.0, 1),
        ("chrf", 0.4, 1),
        ("rougeL_max", 20.0, 1),
        ("ter", 0.9, 1),
        ("anything", 12.0, 1),
    ],
)
def test_only_shares_are_shown_in_percent(name: str, value: float, scale: float) -> None:
    assert _scale(name, value) == scale


def test_scores_of_numpy_are_numbers() -> None:
    assert all(map(harness.is_number, (1, 0.5, True, np.float32(1), np.int64(1), np.bool_(True))))
    assert not any(map(harness.is_number, ("1", (1.0, 2.0), None, np.zeros(2))))


def test_a_task_is_named_once() -> None:
    with pytest.raises(InputError, match="each once; got piqa twice"):
        sort_names(["piqa", "gsm8k", "lm-eval:piqa"])
    assert len(sort_names(["gsm8k", "lm-eval:gsm8k"]).harness) == 1


def test_many_requests_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, under its own index."""
    monkeypatch.setattr(token_model, "_PART", 3)
    model = TokenModel.__new__(TokenModel)
    monkeypatch.setattr(model, "_exchange", None, raising=False)
    sizes = []

    def answer(requests: Sequence[tuple[int, Request]], done: Done) -> None:
        sizes.append(len(requests))
        for i, request in requests:
            done(i, Response(str(request)))

    monkeypatch.setattr(model, "_score", answer)
    monkeypatch.setattr(model, "_generate", answer)
    requests = [Generate(str(i)) if i % 3 else Rolling(str(i)) for i in range(11)]
    found: dict[int, Response] = {}
    model.answer(requests, found.__setitem__)
    assert sizes == [3, 1, 3, 3, 1]
    assert [found[i].text for i in range(11)] == [str(request) for request in requests]
