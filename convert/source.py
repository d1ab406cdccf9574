"""Parameters that are read and written block by block: the interface between the formats."""

import dataclasses
import errno
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from convert.names import Leaf, leaves
from convert.safetensors import begin_writeback
from qwen_jax.config import DTYPES, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.params import Params

BLOCK_BYTES = 32 * 2**20
Block = tuple[slice, slice]


class Source(Protocol):
    """Parameters that can be read in parts.

    Attributes:
      config: the architecture.
      workers: how many threads may read at the same time.
      folder: of the checkpoint; None for parameters in memory.
    """

    config: ModelConfig
    workers: int
    folder: Path | None

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype in which a leaf is stored; all of its tensors have it."""

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        """Reads a range of rows (first axis) of each of a range of tensors of a leaf: [tensors, rows, ...].

        The dtype is that of `dtype`, or float32 where the values are computed; `cast` rounds them.
        """

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list["Span"] | None:
        """Where the same bytes are in files, one span per tensor; None if they are not stored like that."""


class Sink(Protocol):
    """Receives the blocks of a source, from several threads."""

    def write(self, leaf: Leaf, tensors: slice, rows: slice, data: np.ndarray) -> None:
        """Writes a block from memory, [tensors, rows, ...]."""

    def receive(self, leaf: Leaf, tensors: slice, rows: slice, spans: list["Span"]) -> None:
        """Copies a block from files, one span per tensor."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A range of bytes of a file."""

    file: Path
    offset: int
    nbytes: int

    def copy_to(self, descriptor: int, offset: int) -> None:
        """Copies the bytes into an open file, inside the kernel where that is possible.

        Raises:
          InputError: the file is missing or ends early.
        """
        try:
            source = os.open(self.file, os.O_RDONLY)
        except FileNotFoundError:
            raise InputError(f"{self.file} is missing; the checkpoint is damaged or incomplete.") from None
        try:
            done = 0
            while done < self.nbytes:
                count = _copy_some(source, self.offset + done, descriptor, offset + done, self.nbytes - done)
                if count == 0:
                    raise InputError(f"{self.file} ends too early; the checkpoint is damaged or incomplete.")
                done += count
            begin_writeback(descriptor, offset, self.nbytes)
        finally:
            os.close(source)


def _copy_some(source: int, start: int, descriptor: int, offset: int, nbytes: int) -> int:
    if sys.platform == "linux":
        try:
            return os.copy_file_range(source, descriptor, nbytes, start, offset)
        except OSError as error:  # Not supported between these two file systems.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    return os.pwrite(descriptor, os.pread(source, min(nbytes, 2**20), start), offset)


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of a name such as "bfloat16".

    Raises:
      InputError: weights cannot be stored in it.
    """
    try:
        result = np.dtype(jnp.dtype(dtype))
    except TypeError:
        result = np.dtype(object)
    if result.name not in DTYPES:
        raise InputError(f"Expected a dtype of {', '.join(DTYPES)}; got {dtype!r}.")
    return result


def dtype_of(leaf: Leaf, asked: np.dtype | None, stored: np.dtype) -> np.dtype:
    """The dtype that a leaf is moved in.

    Args:
      leaf: which parameter.
      asked: for all parameters that do not keep theirs; None: as stored.
      stored: of the source.
    """
    return stored if leaf.stored is not None or asked is None else asked


def check_storable(source: Source, dtype: np.dtype | None) -> None:
    """Refuses to keep the stored dtype of a source if it is float64, which is neither written nor computed in.

    Args:
      source: the parameters.
      dtype: what they will be cast to, or None if they are kept as stored.

    Raises:
      InputError: `dtype` is None and a parameter is stored in float64.
    """
    free = [leaf for leaf in leaves(source.config) if leaf.stored is None]
    wide = [leaf for leaf in free if dtype is None and source.dtype(leaf).name not in DTYPES]
    if wide:
        raise InputError(
            f"{source.folder or 'The checkpoint'} stores {', '.join(wide[0].names[:2])} in "
            f"{source.dtype(wide[0]).name}, and {len(wide)} of its parameters in such a dtype. Give the dtype to cast "
            f"to: one of {', '.join(DTYPES)} (--dtype float32)."
        )


def cast(data: np.ndarray, dtype: np.dtype, leaf: Leaf) -> np.ndarray:
    """Converts a block, rounding to nearest even.

    Raises:
      InputError: a value that float16 cannot hold.
    """
    if data.dtype == dtype:
        return data
    with np.errstate(over="ignore"):
        result = data.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all() and np.isfinite(data.astype(np.float32)).all():
        raise InputError(f"{'.'.join(leaf.path)} has values beyond the range of float16. Use bfloat16 or float32.")
    return result


def rows_at_a_time(leaf: Leaf, itemsize: int) -> int:
    """The number of rows of one tensor in a block of about `BLOCK_BYTES`."""
    rows = leaf.shape[0]
    pieces = -(-math.prod(leaf.shape) * itemsize // BLOCK_BYTES)
    # Prefer an even split: blocks are also storage chunks, and then none of them is padded.
    even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces)
    return -(-rows // even)


def blocks(leaf: Leaf, itemsize: int) -> Iterator[Block]:
    """The blocks in which a leaf is moved: all of a small leaf, whole small layers or experts, or ranges of rows."""
    for i in range(len(leaf.stack) + 1):
        each = math.prod(leaf.stack[i:])
        if each * math.prod(leaf.shape) * itemsize <= BLOCK_BYTES:
            for start in range(0, len(leaf.names), each):
                yield slice(start, start + each), slice(0, leaf.shape[0])
            return
    step = rows_at_a_time(leaf, itemsize)
    for i in range(len(leaf.names)):
        for start in range(0, leaf.shape[0], step):
            yield slice(i, i + 1), slice(start, min(start + step, leaf.shape[0]))


def run_all(workers: int, tasks: Sequence[Callable[[], None]]) -> None:
    """Runs tasks on threads. The first failure is raised, and no further tasks are started."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def copy(
    source: Source,
    sink: Sink | None,
    dtype: np.dtype | None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Moves every block of a source.

    Args:
      source: the parameters.
      sink: where the blocks go; None only reads, to take part in gathering from several processes.
      dtype: of the blocks; by default as stored.
      progress: called with the number of bytes of each block written.
    """

    def move(leaf: Leaf, block: Block) -> None:
        stored = source.dtype(leaf)
        target = dtype_of(leaf, dtype, stored)
        spans = source.spans(leaf, *block) if target == stored else None
        if spans is None:
            data = cast(source.read(leaf, *block), target, leaf)
            if sink is not None:
                sink.write(leaf, *block, data)
        elif sink is not None:
            sink.receive(leaf, *block, spans)
        if progress is not None:
            tensors, rows = block
            row_bytes = math.prod(leaf.shape[1:]) * target.itemsize
            progress((tensors.stop - tensors.start) * (rows.stop - rows.start) * row_bytes)

    itemsize = {leaf: dtype_of(leaf, dtype, source.dtype(leaf)).itemsize for leaf in leaves(source.config)}
    tasks = [functools.partial(move, leaf, block) for leaf, size in itemsize.items() for block in blocks(leaf, size)]
    run_all(source.workers, tasks)


def nbytes(source: Source, dtype: np.dtype | None) -> int:
    """Bytes of all parameters when written in `dtype`, or as stored if that is None."""
    return sum(leaf.size * dtype_of(leaf, dtype, source.dtype(leaf)).itemsize for leaf in leaves(source.config))


class TreeSource:
    """Parameters in memory as a `Source`: NumPy or JAX arrays, stacked or a list of layers, sharded or not.

    If several processes hold the shards, all of them must read the same blocks in the same order; one tensor at a time
    is gathered.
    """

    workers = 1  # Gathering is a collective: the order must be the same in all processes.
    folder: Path | None = None

    def __init__(self, params: Params, config: ModelConfig) -> None:
        """
        Args:
          params: in the layout of `Options(stacked=True)` or `Options(stacked=False)`, not fused.
          config: the architecture.

        Raises:
          InputError: a parameter is missing or has another shape.
        """
        self.config, self._params = config, params
        self._listed = isinstance(params.get("layers"), (list, tuple))
        if self._listed and len(params["layers"]) != config.num_layers:
            raise InputError(f"Expected {config.num_layers} layers, the parameters have {len(params['layers'])}.")
        self._last: tuple[tuple[tuple[str, ...], int], np.ndarray] | None = None
        known = leaves(config)
        count = sum(len(self._holders(leaf)) for leaf in known)
        if len(jax.tree.leaves(params)) != count:
            raise InputError(f"Expected {count} parameter arrays, got {len(jax.tree.leaves(params))}.")
        for leaf in known:
            shape = leaf.layer_shape if self._listed else leaf.full_shape
            for i in self._holders(leaf):
                # The groups of quantised weights may have been cut into equal parts.
                found = self._array(leaf, i).shape
                recut = leaf.stored is not None and found[:-1] == shape[:-1] and found[-1] % shape[-1] == 0
                if found != shape and not recut:
                    raise InputError(
                        f"Parameter {'.'.join(leaf.path)} must have shape {shape}, it has {self._array(leaf, i).shape}."
                    )

    @property
    def scattered(self) -> bool:
        """Whether other processes hold some of it."""
        return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(self._params))

    def _holders(self, leaf: Leaf) -> range:
        """Indices of the arrays that hold a leaf: one per layer if the layers are a list, otherwise one."""
        return range(len(leaf.layers) if self._listed and leaf.layers else 1)

    def _array(self, leaf: Leaf, layer: int) -> jax.Array | np.ndarray:
        """The array that holds a leaf's layer of that index."""
        value: Any = self._params
        path = leaf.path
        try:
            if self._listed and leaf.layers:
                value, path = value["layers"][leaf.layers[layer]], path[1:]
            for key in path:
                value = value[key]
        except (KeyError, TypeError):
            raise InputError(f"The parameters lack {'.'.join(leaf.path)}.") from None
        return value

    def dtype(self, leaf: Leaf) -> np.dtype:
        dtype = self._array(leaf, 0).dtype
        return np.dtype(dtype) if leaf.stored is not None else parse_dtype(dtype)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        return np.stack([self._tensor(leaf, i)[rows] for i in range(tensors.start, tensors.stop)])

    def _tensor(self, leaf: Leaf, i: int) -> np.ndarray:
        key = leaf.path, i
        if self._last is None or self._last[0] != key:
            self._last = None
            where = tuple(map(int, np.unravel_index(i, leaf.stack))) if leaf.stack else ()
            x, index = self._array(leaf, where[0] if where else 0), where[1:] if self._listed else where
            if index:
                x = _take(x, index) if isinstance(x, jax.Array) else x[index]
            host = to_host(x)
            self._last = key, host[..., :: host.shape[-1] // leaf.shape[-1]] if leaf.stored is not None else host
        return self._last[1]


def as_source(params: Params | Source, config: ModelConfig) -> Source:
    """Wraps parameters in memory as a `Source`; returns a `Source` unchanged."""
    if isinstance(params, dict):
        return TreeSource(params, config)
    return params


@jax.jit
def _take(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """One entry of the leading axes; the axis of the experts may be sharded."""
    sharding = jax.typeof(x).sharding
    lead, rest = sharding.spec[: len(index)], P(*sharding.spec[len(index) :])
    if "expert" not in lead:
        return x[index]
    axis, bits = lead.index("expert"), jnp.dtype(f"uint{8 * x.dtype.itemsize}")

    def local(x: jax.Array, *index: jax.Array) -> jax.Array:
        size = x.shape[axis]
        here = index[axis] - jax.lax.axis_index("expert") * size
        own = x[(*index[:axis], jnp.clip(here, 0, size - 1), *index[axis + 1 :])]
        # Summed as integers: as floats, a negative zero plus zeros would become a positive zero.
        found = jnp.where((here >= 0) & (here < size), jax.lax.bitcast_convert_type(own, bits), 0)
        return jax.lax.bitcast_convert_type(jax.lax.psum(found, "expert"), x.dtype)

    in_specs = (sharding.spec, *(P(),) * len(index))
    result: jax.Array = jax.shard_map(local, mesh=sharding.mesh, in_specs=in_specs, out_specs=rest)(x, *index)
    return result


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array. Where other processes hold some of it, all of them must call this."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        return np.asarray(jax.device_put(x, NamedSharding(x.sharding.mesh, P())).addressable_data(0))
    return np.asarray(x)
