"""Connected components: right on chains, stars and random graphs, also when memory holds a small part of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as oracle

from tests.helpers.runs import print_seed
from train.curate.components import connected_components
from train.curate.engine import Engine
from train.curate.passes import Tables

NODES = 10_000


def edges_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Edges [edges, 2] of a graph of 10,000 nodes."""
    if kind == "chain":
        return np.stack([np.arange(NODES - 1), np.arange(1, NODES)], 1)
    if kind == "star":
        return np.stack([np.zeros(NODES - 1, int), np.arange(1, NODES)], 1)
    if kind == "two chains and a bridge":
        odd = np.stack([np.arange(NODES - 2), np.arange(2, NODES)], 1)
        return np.concatenate([odd, [[NODES // 2, NODES // 2 + 1]]])
    return rng.integers(0, NODES, (int(NODES * 0.55), 2))


@pytest.mark.parametrize(
    ("kind", "mixed", "rows_at_once"),
    [
        ("chain", True, 10**9),
        ("chain", False, 10**9),
        ("star", True, 10**9),
        ("two chains and a bridge", False, 10**9),
        ("random", True, 10**9),
        ("random", True, 2000),
    ],
)
def test_components_are_those_of_scipy(kind: str, mixed: bool, rows_at_once: int, tmp_path: Path) -> None:
    """Each node has the least node of its component. Rounds grow with the logarithm of the length of a chain."""
    rng = print_seed()
    edges = edges_of(kind, rng)
    number, label = oracle(coo_matrix((np.ones(len(edges)), edges.T), (NODES, NODES)), directed=False)
    # Node numbers that use all 64 bits.
    ids = np.sort(rng.integers(0, 2**64, NODES, dtype=np.uint64, endpoint=False))
    ids = rng.permutation(ids) if mixed else ids
    pairs = np.sort(ids[edges[edges[:, 0] != edges[:, 1]]], 1)
    # Edges may come twice, and in several files.
    pairs = rng.permutation(np.concatenate([pairs, pairs[::3]]))
    files = []
    for part, rows in enumerate(np.array_split(pairs, 3)):
        files.append(str(tmp_path / f"{part}.parquet"))
        pq.write_table(pa.table({"node": rows[:, 1], "least": rows[:, 0]}), files[-1])
    _ = Engine().daft
    found = connected_components(files, Tables(tmp_path / "tables", {}), rows_at_once)
    stars = pa.concat_tables([pq.read_table(file) for file in found.stars])
    least = np.full(number, np.iinfo(np.uint64).max)
    np.minimum.at(least, label, ids)
    expected = {int(node): int(one) for node, one in zip(ids, least[label], strict=True) if node != one}
    assert dict(zip(stars["node"].to_pylist(), stars["least"].to_pylist(), strict=True)) == expected
    assert len(stars) == len(expected)
    assert found.rounds <= 17


def test_no_edge_is_no_component(tmp_path: Path) -> None:
    pq.write_table(pa.table({name: pa.array([], pa.uint64()) for name in ("node", "least")}), tmp_path / "a.parquet")
    _ = Engine().daft
    found = connected_components([str(tmp_path / "a.parquet")], Tables(tmp_path / "tables", {}), 10)
    assert sum(len(pq.read_table(file)) for file in found.stars) == 0
