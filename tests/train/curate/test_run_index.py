"""The index of runs finds every run that texts and sequences share, and nothing else."""

import random
from pathlib import Path

import numpy as np

from tests.helpers.runs import print_seed
from train.curate.run_index import RunIndex, make_index
from train.data.words import split


def hashes(text: list[str]) -> np.ndarray:
    return split([" ".join(text)]).hashes


def test_lookups_are_those_of_all_comparisons(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for length in (1, 3, 5):
        sequences = [[rng.choice("abcdef") for _ in range(rng.randrange(30))] for _ in range(20)]
        index = make_index([hashes(s) for s in sequences], length)
        index.save(tmp_path / str(length))
        loaded = RunIndex.load(tmp_path / str(length))
        assert loaded.length == length
        text = [rng.choice("abcdefgh") for _ in range(200)]
        flat = [(s, i) for s, sequence in enumerate(sequences) for i in range(len(sequence))]
        expected = sorted(
            (at, s, i)
            for at in range(len(text) - length + 1)
            for s, i in flat
            if sequences[s][i : i + length] == text[at : at + length]
        )
        for one in (index, loaded):
            at, place = one.lookup(hashes(text))
            assert sorted((int(a), *flat[p]) for a, p in zip(at, place, strict=True)) == expected
        assert all(len(index.sequence(s)) == len(sequence) for s, sequence in enumerate(sequences))
        at, place = index.lookup(hashes(text), most=2)
        runs = [tuple(text[i : i + length]) for i in range(len(text) - length + 1)]
        early = {i for i, run in enumerate(runs) if runs[:i].count(run) < 2}
        assert [(int(a), *flat[p]) for a, p in sorted(zip(at, place, strict=True))] == [
            one for one in expected if one[0] in early
        ]
    assert [len(found) for found in make_index([], 5).lookup(hashes(["a"] * 9))] == [0, 0]


def test_frequent_runs_are_left_out_but_not_all_of_a_sequence() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    common = [f"c{i}" for i in range(20)]
    sequences = [[*common, *(f"r{rng.randrange(10**9)}" for _ in range(30))] for _ in range(40)] + [common]
    index = make_index([hashes(s) for s in sequences], 5, frequent=10)
    at, place = index.lookup(hashes(common))
    # All runs of the last sequence are frequent: the first half of them stays. Of the others the rare half does.
    assert sorted(place - index.bounds[40]) == list(range(8))
    assert len(at) == 8
    for number, sequence in enumerate(sequences[:40]):
        _, found = index.lookup(hashes(sequence[20:]))
        assert np.isin(np.arange(26) + index.bounds[number] + 20, found).all()
