"""Lowered programs on disk, so that an engine that starts again does not lower its programs again.

JAX's compilation cache finds what XLA has compiled by the lowered program, so that a start with a full cache still
traces and lowers every program. That is Python: the attention kernel of a program takes about a second, and an engine
has a hundred programs. `jax.export` writes lowered programs as StableHLO, without pickle. They are read in
milliseconds.
"""

import functools
import hashlib
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export
from jax.sharding import Mesh

import qwen_jax
from qwen_jax.files import write_atomic
from qwen_jax.inference.row_sampling import Rules
from qwen_jax.inference.runner_programs import Pages
from qwen_jax.kernels import QuantizedRows

_log = logging.getLogger(__name__)

# Their form may change with the version of JAX, which is a part of a program's name.
_KERNELS = "mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton", "triton_kernel_call"

export.register_namedtuple_serialization(Pages, serialized_name="qwen_jax.Pages")
export.register_namedtuple_serialization(Rules, serialized_name="qwen_jax.Rules")
export.register_pytree_node_serialization(
    QuantizedRows,
    serialized_name="qwen_jax.QuantizedRows",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


def folder(mesh: Mesh) -> Path | None:
    """Where lowered programs are kept, or None where they are not.

    They are kept beside the compiled ones, if those are kept in a local folder, for accelerators of one process. CPUs
    run no kernels that take long to lower, and several processes would have to find the same programs.
    """
    compiled: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    platform = mesh.devices.flat[0].platform
    if not compiled or "://" in compiled or jax.process_count() > 1 or platform == "cpu":
        return None
    # Of devices that are only described, programs are compiled once.
    return Path(compiled) / "lowered" if platform == jax.default_backend() else None


def load_or_export(
    folder: Path, function: Callable[..., Any], args: tuple[Any, ...], settings: tuple[Any, ...], mesh: Mesh
) -> Callable[..., Any]:
    """A function that does the same as the given one and is not traced: it is read from the folder, or written there.

    Args:
      folder: of lowered programs.
      function: to be compiled.
      args: shapes, dtypes and shardings of its arguments.
      settings: all that the function depends on besides `args` and the source of this package. Equal settings have
        equal `repr`, and only those.
      mesh: that is set.

    Returns:
      The function; `function` itself if it cannot be exported, which is logged.
    """
    leaves, structure = jax.tree.flatten(args)
    file = folder / _name(leaves, structure, settings, mesh)
    if (exported := _load(file)) is None:

        def flat(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves))

        checks = [export.DisabledSafetyCheck.custom_call(kernel) for kernel in _KERNELS]
        platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
        try:
            exported = export.export(jax.jit(flat), platforms=[platform], disabled_checks=checks)(*leaves)
            data = bytes(exported.serialize())
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, hashlib.sha256(data).digest() + data)
        except (ValueError, NotImplementedError, OSError) as error:
            _log.warning("A lowered program is not kept for the next start: %s", error)
            return function
    elif mesh.devices.flat[0].platform == "gpu":
        # Tells XLA where the library is that it links kernels with. Tracing a kernel would have done that.
        importlib.import_module("jax.experimental.mosaic.gpu")

    def call(*args: Any) -> Any:
        return exported.call(*jax.tree.leaves(args))

    return call


def _name(leaves: list[Any], structure: Any, settings: tuple[Any, ...], mesh: Mesh) -> str:
    """The digest of everything that a lowered program depends on."""
    device = mesh.devices.flat[0]
    versions = jax.__version__, jaxlib.__version__, device.client.platform_version, device.device_kind
    # Where compiled programs are kept does not matter.
    options = {key: value for key, value in jax.config.values.items() if key != "jax_compilation_cache_dir"}
    shapes = [(x.shape, str(x.dtype), str(x.sharding.spec)) for x in leaves]
    axes = mesh.axis_names, mesh.devices.shape, mesh.axis_types
    parts = _source(), versions, sorted(options.items()), axes, settings, shapes, str(structure)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """The digest of the source of this package."""
    root, digest = Path(qwen_jax.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _load(file: Path) -> export.Exported | None:
    """What was written to a file; None without one, or with a damaged one, which is logged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("A lowered program cannot be read: %s", error)
        return None
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        _log.warning("%s is damaged. It is written again.", file)
        return None
    return export.deserialize(bytearray(data))
