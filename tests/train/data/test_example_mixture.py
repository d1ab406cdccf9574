"""Mixtures of example sets: exact shares of rows, examples once an epoch of their set, the same on any hosts."""

import dataclasses
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.conversations import chat_tokenizer
from tests.helpers.runs import print_seed
from train.data.example_batches import PackedExamples, PackedPairs, PackedSequences, RowConfig
from train.data.example_mixture import MixedExamples
from train.data.example_store import ExampleStore, open_store
from train.pretrain import PretrainConfig
from train.tune_config import TuneConfig, TuneStage

ROWS = RowConfig(length=48, batch_size=6, seed=5)
SIZES = {"a": 40, "b": 25, "c": 9}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, ExampleStore]]:
    """Of each kind, three sets of different sizes whose examples are all different."""
    rng, tokenizer, folder = print_seed(), chat_tokenizer(), tmp_path_factory.mktemp("mixture")

    def text() -> str:
        return "".join(rng.choice(list("abcdefgh \n"), rng.integers(1, 12)).tolist())

    found: dict[str, dict[str, ExampleStore]] = {"sft": {}, "pairs": {}}
    for name, count in SIZES.items():
        prompts = [f"{name}{n}: " for n in range(count)]
        records: dict[str, list[dict[str, str]]] = {
            "sft": [{"prompt": prompt, "completion": text()} for prompt in prompts],
            "pairs": [{"prompt": p, "chosen": "+" + text(), "rejected": "-" + text()} for p in prompts],
        }
        for kind, lines in records.items():
            path = folder / f"{name}-{kind}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            found[kind][name] = open_store([path], tokenizer, folder / "stores")
    return found


def mixed(stores: dict[str, dict[str, ExampleStore]], kind: str, weights: dict[str, Any]) -> MixedExamples[Any]:
    def packed(store: ExampleStore) -> PackedExamples[Any]:
        return PackedPairs(store, ROWS) if kind == "pairs" else PackedSequences(store, ROWS)

    return MixedExamples({name: packed(store) for name, store in stores[kind].items()}, weights)


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_rows_have_the_shares_of_the_weights(stores: dict[str, dict[str, ExampleStore]], kind: str) -> None:
    """After any number of steps to within one row; and rows are those of the sets, each example once in its epoch."""
    mixture = mixed(stores, kind, {"a": 0.5, "b": "1/3", "c": "1/6"})
    shares, drawn = {"a": Fraction(1, 2), "b": Fraction(1, 3), "c": Fraction(1, 6)}, Counter[str]()
    read: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(40):
        assert mixture.draws(step) == {name: drawn[name] for name in shares}
        rows, whole = mixture.rows(step), mixture.batch(step)
        for i, (name, number) in enumerate(rows):
            source = mixture.sources[name]
            assert number == drawn[name]
            drawn[name] += 1
            assert equal(jax.tree.map(lambda x, i=i: x[i : i + 1], whole), source.assemble([source.row(number)]))
            read[name] += source.selection.units[source.row(number)].tolist()
        for name, share in shares.items():
            assert abs(drawn[name] - share * 6 * (step + 1)) < 1
    for name, units in read.items():
        used = sorted(mixture.sources[name].selection.units.tolist())
        epochs = len(units) // len(used)
        assert name != "c" or epochs > 2
        for epoch in range(epochs):
            assert sorted(units[epoch * len(used) : (epoch + 1) * len(used)]) == used


def test_batches_do_not_depend_on_hosts_or_on_sets_without_weight(
    stores: dict[str, dict[str, ExampleStore]],
) -> None:
    mixture, without = (mixed(stores, "sft", {"a": 2, "c": 1, **more}) for more in ({}, {"b": 0}))
    assert mixture.record() == without.record()
    for step in (0, 3, 17):
        parts = [mixture.batch(step, i, 3) for i in range(3)]
        assert equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), mixture.batch(step))
        assert equal(without.batch(step), mixture.batch(step))
    # An epoch of the mixture has as many rows as its sets fill.
    assert mixture.rows_per_epoch == sum(mixture.sources[name].rows_per_epoch for name in "ac")
    assert "a: 66.7% of the rows" in mixture.describe()


def test_resume_is_refused_where_batches_would_differ(stores: dict[str, dict[str, ExampleStore]]) -> None:
    mixture = mixed(stores, "sft", {"a": 2, "c": 1})
    saved = json.loads(json.dumps(mixture.record()))
    mixture.check_resume(saved, 9)
    mixed(stores, "sft", {"a": 4, "c": 2}).check_resume(saved, 9)
    other = mixed(stores, "sft", {"a": 1, "c": 2})
    other.check_resume(saved, 0)
    with pytest.raises(InputError, match=r"with other shares of its data: .*'2/3'"):
        other.check_resume(saved, 9)
    with pytest.raises(InputError, match="other shares of its data: none"):
        mixture.check_resume(mixture.sources["a"].record(), 9)
    with pytest.raises(InputError, match="the fingerprint of files"):
        mixture.check_resume(
            {**saved, "sources": {**saved["sources"], "c": {**saved["sources"]["c"], "store": "x"}}}, 9
        )


def test_mistakes_are_told(stores: dict[str, dict[str, ExampleStore]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names 'd', which is not there"):
        mixed(stores, "sft", {"a": 1, "d": 2})
    with pytest.raises(InputError, match="add up to nothing"):
        mixed(stores, "sft", {"a": 0})
    sources = {name: PackedSequences(stores["sft"][name], ROWS) for name in "ab"}
    shorter = PackedSequences(stores["sft"]["b"], dataclasses.replace(ROWS, length=40))
    with pytest.raises(InputError, match="rows of one length"):
        MixedExamples({**sources, "b": shorter}, {"a": 1, "b": 1})
    stage = TuneStage(mixture={"a": 1, "b": 2})
    config = TuneConfig(str(tmp_path), "model", {"a": "x", "b": "y", "c": "z"}, PretrainConfig(), (stage,))
    assert config.data_of(0) == {"a": "x", "b": "y"}
    with pytest.raises(InputError, match=r"stages\.0\.mixture names 'd'"):
        dataclasses.replace(config, stages=(TuneStage(mixture={"d": 1}),))
    with pytest.raises(InputError, match="data or a mixture"):
        TuneStage(data=("a",), mixture={"a": 1})
    with pytest.raises(InputError, match="at least 0"):
        TuneStage(mixture={"a": -1})
