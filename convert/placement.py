"""Loading parameters directly onto their shards: a process holds at most about one tensor on the host."""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from convert.names import Leaf, leaves
from convert.source import BLOCK_BYTES, Source, cast, check_storable, dtype_of, parse_dtype, rows_at_a_time, run_all
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, param_specs
from qwen_jax.units import binary_size

Range = tuple[int, int]


def place(source: Source, mesh: Mesh, dtype: DTypeLike | None = None, options: Options = Options()) -> Params:
    """Loads parameters onto a mesh, tensor by tensor.

    Args:
      source: the parameters.
      mesh: from `make_mesh`.
      dtype: of the parameters; by default as stored.
      options: `stacked` decides the layout; `fused` must be False, parameters are fused after loading.

    Returns:
      The tree of `abstract_params(config, sharding, options)`.

    Raises:
      InputError: a dimension is not divisible by its mesh axis, or there is not enough memory.
    """
    if options.fused:
        raise ValueError("Parameters are loaded unfused; load with Options(fused=False) and fuse them then.")
    config = source.config
    target = None if dtype is None else parse_dtype(dtype)
    check_storable(source, target)
    # Stacked is the layout of training, which may use a context axis.
    of_run = Sharding.for_training if options.stacked else Sharding.for_inference
    sharding, layout = of_run(config, mesh), Options(stacked=options.stacked)
    shapes, specs = abstract_params(config, sharding, layout), param_specs(config, sharding, layout)
    placed = [
        _Placed(*_with_shape(source, leaf, _of(shapes, leaf)), NamedSharding(mesh, _of(specs, leaf)))
        for leaf in leaves(config)
    ]
    _check_memory(placed, target, options.stacked)
    params: Params = {"layers": {} if options.stacked else [{} for _ in range(config.num_layers)]}
    with jax.set_mesh(mesh):
        for (layers, _), group in itertools.groupby(placed, key=lambda entry: _matrix(entry.leaf)):
            together = [(*entry, dtype_of(entry.leaf, target, entry.source.dtype(entry.leaf))) for entry in group]
            if layers and not options.stacked:
                # The arrays of one quantised matrix follow each other, because its source unpacks them together.
                for i, layer in enumerate(layers):
                    for part, leaf, one, leaf_dtype in together:
                        array = _load(part, leaf, slice(i, i + 1), one, leaf_dtype, squeeze=True)
                        _put(params["layers"][layer], leaf.path[1:], array)
                continue
            for part, leaf, one, leaf_dtype in together:
                if layers:
                    _put(params, leaf.path, _load_stacked(part, leaf, one, leaf_dtype))
                else:
                    _put(params, leaf.path, _load(part, leaf, slice(0, 1), one, leaf_dtype, squeeze=True))
    return params


def _matrix(leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """What the arrays of one quantised matrix have in common: their layers, and the name of its first tensor."""
    return leaf.layers, leaf.names[0].rpartition(".")[0] if leaf.stored is not None else leaf.names[0]


class _Placed(NamedTuple):
    """A leaf, where it is read from, and its sharding: of the stack of its layers, or of each layer."""

    source: Source
    leaf: Leaf
    sharding: NamedSharding


class _Recut:
    """Scales of quantised weights as a `Source`, whose groups are cut into parts that repeat them."""

    def __init__(self, source: Source, leaf: Leaf, parts: int) -> None:
        self.config, self.workers, self.folder = source.config, source.workers, source.folder
        self._source, self._leaf, self._parts = source, leaf, parts

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._source.dtype(self._leaf)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        return np.repeat(self._source.read(self._leaf, tensors, rows), self._parts, axis=-1)


def _with_shape(source: Source, leaf: Leaf, target: jax.ShapeDtypeStruct) -> tuple[Source, Leaf]:
    """A source of a leaf whose last axis is that of the parameter, and that leaf."""
    size, wanted = leaf.shape[-1], target.shape[-1]
    if size == wanted:
        return source, leaf
    return _Recut(source, leaf, wanted // size), dataclasses.replace(leaf, shape=(*leaf.shape[:-1], wanted))


def _load_stacked(source: Source, leaf: Leaf, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    if leaf.size * dtype.itemsize <= BLOCK_BYTES or _on_host(sharding):
        return _load(source, leaf, slice(0, len(leaf.layers)), sharding, dtype, squeeze=False)
    one = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    stacked = jnp.zeros(leaf.full_shape, dtype, device=sharding)
    for i in range(len(leaf.layers)):
        stacked = _set_layer(stacked, _load(source, leaf, slice(i, i + 1), one, dtype, squeeze=True), i)
    return stacked


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, axis=0)


def _on_host(sharding: NamedSharding) -> bool:
    """Whether all devices are CPUs, which use aligned host arrays without a copy: loading by layers saves nothing."""
    devices: set[jax.Device] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def _load(
    source: Source, leaf: Leaf, layers: slice, sharding: NamedSharding, dtype: np.dtype, squeeze: bool
) -> jax.Array:
    """Loads a range of layers of a leaf as one array; each process reads the rows that its devices hold, once.

    Args:
      source: the parameters.
      leaf: which parameter.
      layers: range of the leaf's layers; 0 to 1 if it has no layer axis.
      sharding: of the result.
      dtype: of the result.
      squeeze: load one layer, without a layer axis.
    """
    # Which devices hold which part.
    count, per_layer, inner_stack = layers.stop - layers.start, leaf.per_layer, leaf.stack[1:]
    shape = leaf.layer_shape if squeeze else (count, *leaf.layer_shape)
    shards: dict[tuple[Range, ...], list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        shards[spans if squeeze else spans[1:]].append(device)
    bits = np.dtype(f"u{dtype.itemsize}")  # NumPy copies these faster than bfloat16.
    buffers = {spans: _aligned((count, *(stop - start for start, stop in spans)), bits) for spans in shards}
    axis = len(inner_stack)  # That of the rows.
    by_rows: dict[Range, list[tuple[Range, ...]]] = defaultdict(list)
    for spans in shards:
        by_rows[spans[axis]].append(spans)

    # Read each block once, and copy it into every buffer that needs some of it.
    def read(part: slice, start: int, stop: int, first: int, wanted: list[tuple[Range, ...]]) -> None:
        data = cast(source.read(leaf, part, slice(start, stop)), dtype, leaf).view(bits)
        region = leaf.region(part)
        if region:
            data = data.reshape(*(s.stop - s.start for s in region), *data.shape[1:])
        layer_index = [slice(s.start - layers.start, s.stop - layers.start) for s in region[:1]] or [slice(0, 1)]
        for spans in wanted:
            target, source_index = list(layer_index), [slice(None)]
            for s, (low, high) in zip(region[1:], spans[:axis], strict=True):
                a = max(s.start, low)
                b = max(a, min(s.stop, high))
                target.append(slice(a - low, b - low))
                source_index.append(slice(a - s.start, b - s.start))
            inner = [slice(None), *(slice(a, b) for a, b in spans[axis + 1 :])]
            buffers[spans][(*target, slice(start - first, stop - first))] = data[(*source_index, *inner)]

    itemsize = source.dtype(leaf).itemsize
    step = rows_at_a_time(leaf, itemsize)

    def parts(wanted: list[tuple[Range, ...]]) -> Iterator[slice]:
        """Ranges of tensors to read: whole layers if these are small, otherwise single tensors that a device needs."""
        if leaf.size * itemsize <= BLOCK_BYTES:
            yield slice(layers.start * per_layer, layers.stop * per_layer)
            return
        each = per_layer if per_layer * math.prod(leaf.shape) * itemsize <= BLOCK_BYTES else 1
        for tensors in range(layers.start * per_layer, layers.stop * per_layer, each):
            within = np.unravel_index(tensors % per_layer, inner_stack) if inner_stack else ()
            needed = any(
                all(low <= i < high for i, (low, high) in zip(within, spans, strict=False)) for spans in wanted
            )
            if each > 1 or needed:
                yield slice(tensors, tensors + each)

    tasks = [
        functools.partial(read, part, start, min(start + step, last), first, wanted)
        for (first, last), wanted in by_rows.items()
        for part in parts(wanted)
        for start in range(first, last, step)
    ]
    run_all(source.workers, tasks)
    # To the devices.
    arrays = []
    for spans, devices in shards.items():
        host = buffers.pop(spans).view(dtype)
        arrays += [jax.device_put(host[0] if squeeze else host, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that JAX's CPU devices can use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _of(tree: Params, leaf: Leaf) -> Any:
    """What a tree has for a leaf; with a list of layers, what it has for one of them."""
    value: Any = tree
    for key in leaf.path:
        if isinstance(value, list):
            value = value[leaf.layers[0]]
        value = value[key]
    return value


def _put(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _check_memory(placed: list[_Placed], dtype: np.dtype | None, stacked: bool) -> None:
    """Raises InputError if the parameters alone do not fit into the memory of the devices."""
    needed = 0
    for source, leaf, sharding in placed:
        stored, each = dtype_of(leaf, dtype, source.dtype(leaf)), 1 if stacked else max(len(leaf.layers), 1)
        shape = leaf.full_shape if stacked else leaf.layer_shape if leaf.layers else leaf.shape
        size = math.prod(sharding.shard_shape(shape)) * each
        # Accelerators keep two codes of 4 bits in a byte.
        packed = stored == jnp.int4 and not _on_host(sharding)
        needed += size // 2 if packed else size * stored.itemsize
    local = [device for device in placed[0].sharding.mesh.devices.flat if device in jax.local_devices()]
    for device in local:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free, where = stats["bytes_limit"] - stats.get("bytes_in_use", 0), str(device)
        else:
            free, where = _available_host_bytes() // len(local), "this machine"
        if needed > free:
            raise InputError(
                f"The parameters need {binary_size(needed)} a device, {where} has {binary_size(free)} for each. "
                "Use a smaller dtype, or a mesh with a larger tensor or fsdp axis."
            )


def _available_host_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # Not Linux: let the allocation itself fail.
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
