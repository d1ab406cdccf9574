"""Connected components of a graph that does not fit in memory, by an engine: alternating large-star and small-star."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from train.curate.passes import Tables, count_rows, load_daft, part, passes_for

# The number of rounds grows with the logarithm of the longest chain: a million million documents take fewer.
_MOST_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class Components:
    """The components of a graph.

    Attributes:
      stars: Parquet files with the columns node and least, uint64: a row for each node that is not the least of its
        component, with the least node of that component.
      rounds: of the two operations, including the last one, which changed nothing.
    """

    stars: list[str]
    rounds: int


def connected_components(edges: Sequence[str], tables: Tables, rows_at_once: int) -> Components:
    """Finds the least node of each connected component.

    Kiveris, Lattanzi, Mirrokni, Rastogi and Vassilvitskii 2014, "Connected components in MapReduce and beyond". An edge
    is a node and a lesser one. Small-star connects a node and its lesser neighbours to the least of them; large-star
    connects the greater neighbours of a node to the least in its neighbourhood. Both keep the components, and where
    neither changes an edge each component is a star around its least node. The result depends on the graph alone.

    Args:
      edges: Parquet files with the columns node and least, uint64, node > least; an edge may come repeatedly.
      tables: of this computation.
      rows_at_once: rows that a pass holds in memory.

    Raises:
      RuntimeError: it does not converge, which is a fault of this program.
    """
    daft = load_daft()
    col = daft.col

    def small_star(files: Sequence[str], number: int, passes: int) -> Any:
        read = daft.read_parquet(list(files)).where(part("node", number, passes))
        least = col("least").min().over(daft.Window().partition_by("node"))
        # The node itself and each lesser neighbour is connected with the least, which is no end of an edge to itself.
        ends = read.with_column("found", least).with_column("end", daft.functions.to_list(col("node"), col("least")))
        ends = ends.explode("end").where(col("end") != col("found"))
        moved = col("moved") | (col("least") != col("found"))
        ends = ends.select(col("end").alias("node"), col("found").alias("least"), moved.alias("moved"))
        return ends.groupby("node", "least").agg(col("moved").bool_or().alias("moved"))

    def large_star(files: Sequence[str], number: int, passes: int) -> Any:
        # Each edge is seen from its lesser end, whose greater neighbour is to be moved, and from its greater end, which
        # knows a lesser neighbour.
        read = daft.read_parquet(list(files)).select("node", "least")
        ends = read.with_column("end", daft.functions.to_list(col("node"), col("least"))).explode("end")
        ends = ends.where(part("end", number, passes))
        lesser = daft.functions.when(col("end") == col("node"), col("least")).otherwise(col("end"))
        ends = ends.with_column("lesser", lesser)
        ends = ends.with_column("found", col("lesser").min().over(daft.Window().partition_by("end")))
        ends = ends.where(col("end") == col("least"))
        return ends.select("node", col("found").alias("least"), (col("found") != col("least")).alias("moved"))

    def start(number: int, passes: int) -> Any:
        read = daft.read_parquet(list(edges)).select("node", "least").where(part("node", number, passes))
        return read.distinct().with_column("moved", daft.lit(False))

    count = count_rows(edges)
    current = tables.make("edges", start, passes_for(count, rows_at_once))
    for round_ in range(1, _MOST_ROUNDS + 1):
        # Two rows of large-star for each edge.
        passes = passes_for(2 * count_rows(current), rows_at_once)
        large = tables.make(f"large-{round_:03d}", functools.partial(large_star, current), passes)
        passes = passes_for(count_rows(large), rows_at_once)
        current = tables.make(f"small-{round_:03d}", functools.partial(small_star, large), passes)
        if not count_rows(current, "moved"):
            return Components(current, round_)
    raise RuntimeError(f"The components of {count} edges did not converge in {_MOST_ROUNDS} rounds.")
