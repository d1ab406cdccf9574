"""The parameters and the state of all sequences on the device, and the programs that change them."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.quantized_cache import channels_of_keys
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.prompts import check_generates
from qwen_jax.inference.row_sampling import WITH_MASKS
from qwen_jax.inference.runner_compilation import Programs, Report
from qwen_jax.inference.runner_lowering import Program, abstract_state
from qwen_jax.inference.runner_programs import Pages, State, StaticArgs, sampled_state
from qwen_jax.kernels import QuantizedRows
from qwen_jax.options import Options
from qwen_jax.parallel.placing import place
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params


class RunnerState:
    """What a runner has on the device. Every change of it is a program with arrays of the host.

    So the processes of a mesh agree if they run the same programs with the same arrays in the same order.

    Attributes:
      params: in the inference layout.
      buckets: the sizes of the programs.
      static: the settings that are compiled in.
      on_program: called with each program and its arrays, to have other processes run it, too. The program is started
        in the context that it returns.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        options: Options,
        vocab_limit: int,
        settings: RunnerConfig,
    ):
        """Makes the state. Programs are compiled by `compile`, or when they are first used.

        Args:
          config: the architecture.
          params: in the inference layout; see `qwen_jax.inference.weights.fuse`. With `options.adapter_ranks`, together
            with the factors of `qwen_jax.inference.adapters.place_factors`.
          mesh: of the parameters; only its tensor and expert axes may be larger than 1.
          options: layout of the parameters and compute dtype.
          vocab_limit: ids from here on are padding and never sampled.
          settings: sizes, and the dtype of pages.

        Raises:
          InputError: a reward model, or a mesh that does not fit.
        """
        check_generates(config)
        split = [axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1]
        if split:
            raise InputError(
                f"The runner shards models over the tensor and expert axes alone; the {split[0]} axis is "
                f"{mesh.shape[split[0]]}, make it 1. Start one process for each replica instead."
            )
        if options.stacked or not options.fused or options.capacity_factor:
            raise ValueError("The runner needs Options(stacked=False, fused=True) without a capacity factor.")
        self.config, self.params, self.mesh, self.settings = config, params, mesh, settings
        fewest_rows = 4 if mesh.devices.flat[0].platform == "tpu" else 1
        self.buckets = settings.buckets or Buckets.of(settings, fewest_rows)
        self.static = StaticArgs(config, Sharding.for_inference(config, mesh), options, vocab_limit, settings)
        self.on_program: Callable[[Program, Sequence[np.ndarray]], AbstractContextManager[None]] | None = None
        self._programs = Programs(self.static, self.buckets, mesh)
        self._one_at_a_time = threading.Lock()
        self._everywhere = NamedSharding(mesh, P())
        # For steps of variants with masks in which no row has one, by shape.
        self._no_masks: dict[tuple[int, ...], jax.Array] = {}
        self._pages, self._state = self._make_state()
        # In a process that repeats programs of another: what the last one gave that read tokens.
        self._read: jax.Array | None = None

    def _make_state(self) -> tuple[Pages, State]:
        shapes = abstract_state(self.static, self.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)

        def empty(params: Params) -> tuple[Pages, State]:
            pages, state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            if not isinstance(pages.keys[0], QuantizedRows):
                return pages, state
            # These factors stay when the weights change: they only say how finely keys are rounded.
            channels = channels_of_keys(params, self.config, self.static.sharding)
            keys = [dataclasses.replace(x, channels_Kd=y) for x, y in zip(pages.keys, channels, strict=True)]
            return pages._replace(keys=tuple(keys)), state

        with jax.set_mesh(self.mesh):
            return jax.jit(empty, out_shardings=shardings)(self.params)

    # --- programs ---

    def programs(self) -> list[str]:
        """The names of all programs."""
        return self._programs.names

    def compile(self, report: Report | None = None) -> None:
        """Compiles all programs; nothing is compiled afterwards.

        Args:
          report: called in this thread after each program.
        """
        self._programs.compile(self.params, report)

    def apply(self, program: Program, *arrays: np.ndarray, read: jax.Array | None = None) -> Any:
        """Runs a program on the parameters, the state and arrays of the host. Safe for several threads.

        Args:
          program: which one.
          *arrays: what it takes beside.
          read: logits or hidden states of an earlier program, for those that go on with them. With several processes
            these must be of the last one that gave any.

        Returns:
          What it gives beside the new state.
        """
        with self._one_at_a_time:
            if self.on_program is None:
                return self._apply(program, arrays, read)
            with self.on_program(program, arrays):
                return self._apply(program, arrays, read)

    def _apply(self, program: Program, arrays: Sequence[np.ndarray], read: jax.Array | None) -> Any:
        placed = [self._place(x) for x in arrays]
        match program.kind:
            case "prefill":
                found, self._pages = self._run(program, self.params, self._pages, *placed)
            case "decode" | "verify":
                found, self._pages = self._run(program, self.params, self._pages, self._state.tokens_S, *placed)
            case "sample" | "sample verified":
                state = sampled_state(self._state, program.variant)
                if program.variant in WITH_MASKS and len(placed) == 1:
                    placed.append(self._unread_masks(program))
                found, tokens_S, counts_SV = self._run(program, read, *state, *placed)
                self._state = self._state._replace(tokens_S=tokens_S)
                if self._state.rules is not None and counts_SV is not None:
                    self._state = self._state._replace(rules=self._state.rules._replace(counts_BV=counts_SV))
            case "read texts":
                found = self._run(program, self.params, *placed)
            case "score texts":
                found = self._run(program, self.params, read, *placed)
            case "set rules":
                found, rules = None, self._run(program, self._state.rules, *placed)
                self._state = self._state._replace(rules=rules)
            case "clear":
                found, self._pages = None, self._run(program, self._pages, *placed)
        return found

    def _unread_masks(self, program: Program) -> jax.Array:
        """Masks for a program that takes some, in a step in which no row has one. They are on the device already."""
        each = (1 + self.settings.speculate,) if program.kind == "sample verified" else ()
        shape = program.masks or program.rows, *each, self.static.words
        if shape not in self._no_masks:
            self._no_masks[shape] = place(np.zeros(shape, np.int32), self._everywhere)
        return self._no_masks[shape]

    def repeat(self, program: Program, arrays: Sequence[np.ndarray]) -> None:
        """Runs a program that another process of the mesh has run; see `on_program`."""
        reads = program.kind in ("prefill", "decode", "verify", "read texts")
        if reads:
            self._read = None  # Frees it before the program takes memory for the next one.
        found = self.apply(program, *arrays, read=self._read)
        if reads:
            self._read = found[0] if program.kind == "read texts" else found

    def _run(self, program: Program, *args: Any) -> Any:
        return self._programs.get(program, self.params)(*args)

    def _place(self, x: np.ndarray) -> np.ndarray | jax.Array:
        """An array of the host as programs take it.

        The call of a program sends arrays of the host to a single device itself: a small one takes a hundredth of the
        time that `device_put` takes.
        """
        if self.mesh.size == 1:
            return x
        placed: jax.Array = place(x, self._everywhere)
        return placed

    def update_weights(self, params: Params) -> None:
        """Runs with other parameters from the next call on. Nothing is copied or compiled.

        What was written to pages is of the old parameters.

        Args:
          params: of the same structure, shapes, dtypes and shardings.

        Raises:
          ValueError: they differ.
        """
        (old, before), (new, after) = jax.tree.flatten(self.params), jax.tree.flatten(params)
        if before != after:  # type: ignore[operator]
            raise ValueError("The new parameters have another structure than the old ones.")
        for number, (was, now) in enumerate(zip(old, new, strict=True)):
            same = was.shape == now.shape and was.dtype == now.dtype
            # Whether shardings are equal is known sooner than whether they are equivalent.
            if not same or not (was.sharding == now.sharding or was.sharding.is_equivalent_to(now.sharding, was.ndim)):
                path, _ = jax.tree.leaves_with_path(self.params)[number]
                raise ValueError(
                    f"Expected {jax.tree_util.keystr(path)} as {was.dtype} {was.shape} with {was.sharding}; got "
                    f"{now.dtype} {now.shape} with {now.sharding}."
                )
        self.params = params
