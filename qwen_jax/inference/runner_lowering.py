"""Which programs a runner has, and how each is lowered, for devices that are here or only described."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.quantized_cache import cache_dtype, in_8_bits
from qwen_jax.inference import exported
from qwen_jax.inference import runner_programs as functions
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.row_sampling import FIELDS, VARIANTS, WITH_MASKS, Rules, Variant
from qwen_jax.inference.runner_programs import CLEARED, MAX_SEGMENTS, Pages, State, StaticArgs
from qwen_jax.kernels import QuantizedRows
from qwen_jax.parallel.placing import place
from qwen_jax.params import Params

_RULES_DTYPES = "uint16", "bool", "float32"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and its sizes.

    Attributes:
      kind: decode, verify, prefill, sample, sample verified, read texts, score texts, set rules, clear.
      rows: number of rows; of a prefill, the most chunks in its row.
      tokens: of a row of chunks or of whole texts.
      slots: that the page table covers.
      variant: of sampling.
      masks: that a variant with masks takes; 0 for one for each row.
    """

    kind: str
    rows: int = 0
    tokens: int = 0
    slots: int = 0
    variant: Variant = "plain"
    masks: int = 0

    @property
    def name(self) -> str:
        """For people, such as "prefill 512 tokens of 16 chunks, 1024 slots"."""
        sizes = {
            "prefill": f" {self.tokens} tokens of {self.rows} chunks, {self.slots} slots",
            "read texts": f" of {self.tokens} tokens",
            "score texts": f" of {self.tokens} tokens",
        }
        if self.kind in ("decode", "verify"):
            return f"{self.kind} {self.rows} rows, {self.slots} slots"
        if self.kind in ("sample", "sample verified"):
            masks = f" with {self.masks} masks" if self.masks else ""
            return f"{self.kind} {self.rows} rows, {self.variant}{masks}"
        return self.kind + sizes.get(self.kind, "")


def all_programs(settings: RunnerConfig, buckets: Buckets) -> list[Program]:
    """Every program of a runner.

    Args:
      settings: the sizes of its state.
      buckets: the sizes of its programs.
    """
    programs = [Program("prefill", r, t, s) for r, t in buckets.prefill for s in buckets.prefill_slots_of(t)]
    programs += [Program("decode", r, slots=s) for r in buckets.rows for s in buckets.slots]
    sampled = dict.fromkeys([*buckets.rows, *(r for r, _ in buckets.prefill)])
    programs += [program for r in sampled for program in sampling_programs("sample", r, buckets)]
    if settings.speculate:
        programs += [Program("verify", r, slots=s) for r in buckets.rows for s in buckets.slots]
        programs += [program for r in buckets.rows for program in sampling_programs("sample verified", r, buckets)]
    programs += [Program(kind, tokens=t) for t in buckets.texts for kind in ("read texts", "score texts")]
    return [*programs, *([Program("set rules")] if settings.rules else []), Program("clear")]


def sampling_programs(kind: str, rows: int, buckets: Buckets) -> list[Program]:
    """The programs that sample so many rows: of each variant, and with each number of masks.

    Args:
      kind: "sample" or "sample verified".
      rows: of the programs.
      buckets: the sizes of a runner's programs.
    """
    found = []
    for variant in VARIANTS:
        sizes = buckets.masks_of(rows, variant) if variant in WITH_MASKS else (0,)
        found += [Program(kind, rows, variant=variant, masks=size) for size in sizes]
    return found


def abstract_state(static: StaticArgs, mesh: Mesh) -> tuple[Pages, State]:
    """Shapes, dtypes and shardings of the device's state.

    Args:
      static: settings that are compiled in.
      mesh: of the parameters.
    """
    config, settings, sharding = static.config, static.settings, static.sharding

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    page = settings.num_pages, sharding.kv_heads, settings.page_size, config.head_dim
    dtype = cache_dtype(settings.kv_dtype, static.options.dtype)
    keys: Any = array(page, dtype, sharding.cache)
    values = keys
    if in_8_bits(dtype):
        values = QuantizedRows(keys, array(page[:3], "float32", P(*sharding.cache[:3])))  # type: ignore[arg-type]
        channels: Any = array((page[1], page[3]), "float32", P(sharding.cache[1], None))
        keys = dataclasses.replace(values, channels_Kd=channels)
    S, V = settings.max_seqs + 1, config.vocab_size
    tokens_S: Any = array((S,), "int32", P(None))
    rules_SV: list[Any] = [array((S, V), dtype, functions.logits_spec(2)) for dtype in _RULES_DTYPES]
    pages = Pages((keys,) * config.num_layers, (values,) * config.num_layers)
    return pages, State(tokens_S, Rules(*rules_SV) if settings.rules else None)


def lower(program: Program, static: StaticArgs, mesh: Mesh, params: Params) -> jax.stages.Lowered:
    """Traces and lowers a program. Compiled, it is called with arrays in the order of its function's arguments.

    Args:
      program: which one.
      static: settings that are compiled in.
      mesh: of the parameters; its devices may be descriptions of devices.
      params: arrays, or their shapes and shardings.
    """
    return prepare(program, static, mesh, params)[1]


def prepare(
    program: Program, static: StaticArgs, mesh: Mesh, params: Params, folder: Path | None = None
) -> tuple[Callable[..., Any], jax.stages.Lowered]:
    """The jitted function of a program, and what `lower` returns; compiling the latter compiles the former.

    Args:
      program, static, mesh, params: as for `lower`.
      folder: of lowered programs, where this one is read or written; see `exported`. None to trace it.
    """
    function, donated, args = _function_and_arguments(program, static, mesh, params)
    with jax.set_mesh(mesh):
        if folder is not None:
            function = exported.load_or_export(folder, function, args, (program, static), mesh)
        options = None
        if program.kind == "decode":
            options = functions.decode_options(static, args[1], program.rows, program.slots)
        jitted = jax.jit(function, donate_argnums=donated, compiler_options=options)
        return jitted, jitted.lower(*args)


def caller(jitted: Callable[..., Any], compiled: jax.stages.Compiled, mesh: Mesh, params: Params) -> Callable[..., Any]:
    """How a compiled program is called.

    A compiled program refuses arrays of int4 that are on a mesh: they state another layout than the one that it was
    compiled for, although it is the same (jax 0.10.2). The jitted function takes them, and compiles nothing again.

    Args:
      jitted, compiled: of the program; see `prepare`.
      mesh: of the parameters.
      params: arrays, or their shapes.
    """
    if all(x.dtype != jnp.int4 for x in jax.tree.leaves(params)):
        return compiled

    everywhere = NamedSharding(mesh, P())

    def call(*args: Any) -> Any:
        # With arrays of the host it would be compiled again, for arrays that are on no mesh.
        placed = [place(x, everywhere) if isinstance(x, np.ndarray) else x for x in args]
        with jax.set_mesh(mesh):
            return jitted(*placed)

    call.compiled = compiled  # type: ignore[attr-defined]  # It lives as long as the jitted function needs it.
    return call


def _function_and_arguments(
    program: Program, static: StaticArgs, mesh: Mesh, params: Params
) -> tuple[Any, tuple[int, ...], tuple[Any, ...]]:
    """The function of a program, which of its arguments are donated, and the shapes of all of them."""
    pages, state = abstract_state(static, mesh)
    settings, V, B, T = static.settings, static.config.vocab_size, program.rows, program.tokens
    k = settings.speculate if program.kind in ("verify", "sample verified") else 0
    partial = functools.partial

    def array(*shape: int, dtype: Any = "int32", spec: P | None = None) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, P(*(None,) * len(shape)) if spec is None else spec)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    table, adapter = -(-program.slots // settings.page_size), int(bool(static.options.adapter_ranks))
    match program.kind:
        case "decode" | "verify":
            packed = array(B, 3 + k + table + adapter)
            return partial(functions.decode, static, proposed=k), (1,), (params, pages, state.tokens_S, packed)
        case "prefill":
            read = partial(functions.prefill, static, chunks=B)
            return read, (1,), (params, pages, array(4 + adapter, T), array(B + table))
        case "sample" | "sample verified":
            each = (B, 1 + k) if k else (B,)
            choose = partial(functions.sample, static, variant=program.variant, proposed=k)
            sampled = functions.sampled_state(state, program.variant)
            logits = array(*each, V, dtype="float32", spec=functions.logits_spec(len(each) + 1))
            masks = [array(program.masks or B, *each[1:], static.words)] if program.variant in WITH_MASKS else []
            return choose, (1, 2), (logits, *sampled, array(B, FIELDS + k), *masks)
        case "read texts":
            return partial(functions.read_texts, static), (), (params, array(3 + adapter, T), array(MAX_SEGMENTS))
        case "score texts":
            hidden = jax.ShapeDtypeStruct(
                (1, T, static.config.hidden_size),
                jnp.dtype(static.options.dtype),
                sharding=NamedSharding(mesh, static.sharding.hidden),
            )
            return partial(functions.score_texts, static), (), (params, hidden, array(3 + adapter, T))
        case "set rules":
            return functions.set_rules, (0,), (state.rules, array(1), *(array(V, dtype=x) for x in _RULES_DTYPES))
        case "clear":
            return partial(functions.clear_pages, static), (0,), (pages, array(CLEARED))
    raise ValueError(f"Unknown program {program.kind!r}.")
