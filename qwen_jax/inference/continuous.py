"""The engine of many requests at once: a thread that plans, runs and reads the steps of a model over a paged cache."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.attention.quantized_cache import KVDtype, cache_dtype, check_kv_dtype
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.active import Active
from qwen_jax.inference.adapters import adapter_ranks, check_adapters, place_factors
from qwen_jax.inference.completion import Row
from qwen_jax.inference.engine_thread import EngineThread
from qwen_jax.inference.outputs import Finished, Stats, TokenInfo
from qwen_jax.inference.page_memory import pages_that_fit
from qwen_jax.inference.pages import PagePool
from qwen_jax.inference.prompts import (
    Ids,
    Limits,
    check_generates,
    check_ids,
    check_lengths,
    check_request,
    check_sizes,
    default_eos,
    vocab_limit,
)
from qwen_jax.inference.proposers import Proposer
from qwen_jax.inference.request import MAX_TOP_LOGPROBS, Request
from qwen_jax.inference.runner import Runner, RunnerConfig
from qwen_jax.inference.sampling import as_int
from qwen_jax.inference.scheduler import Scheduler
from qwen_jax.inference.scheduler import Sequence as Scheduled
from qwen_jax.inference.steps import Steps
from qwen_jax.inference.stream import Stream
from qwen_jax.inference.structured import Grammars
from qwen_jax.inference.text_rows import in_groups
from qwen_jax.inference.weights import fuse, is_fused
from qwen_jax.kernels import Implementation
from qwen_jax.lora import AdapterFactors
from qwen_jax.options import Options
from qwen_jax.parallel.multihost import gather_from_processes, in_step
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, union
from qwen_jax.tokenizer import Tokenizer


class ContinuousEngine(EngineThread):
    """A model on a mesh that serves many requests at once. All methods may be called from any thread.

    Requests share the device: a step reads a chunk of prompts, or makes one token for each running request. The keys
    and values of a prompt that begins as an earlier one did are found again (prefix cache). A request's text depends
    on nothing but the request.

    Attributes:
      config, tokenizer, eos_token_ids, vocab_limit: of the model.
      max_length: tokens that a prompt and its text may have together.
      dtype: compute dtype.
      kv_dtype: of keys and values.
      grammars: makes grammars for structured output; None without a tokenizer.
      on_finished: called with each request's times when it ends, for metrics; see `Times`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str = "bfloat16",
        max_seqs: int = 256,
        max_length: int | None = None,
        max_batched_tokens: int = 2048,
        page_size: int = 32,
        num_pages: int | None = None,
        memory_fraction: float = 0.9,
        prefix_cache: bool = True,
        proposer: Proposer | None = None,
        adapters: Mapping[str, AdapterFactors] | None = None,
        attention: Implementation = "auto",
        kv_dtype: KVDtype = "auto",
        eos_token_ids: Ids | None = None,
    ):
        """Brings the parameters into the inference layout; they are consumed. `start` compiles the programs.

        Args:
          config: the architecture.
          params: unstacked, from `convert.load`, or in the inference layout already (`Options(fused=True)`) with the
            shardings of `Sharding.for_inference` and the compute dtype; consumed.
          mesh: the mesh that the parameters are on; its data and fsdp axes must be 1.
          tokenizer: for text, stop strings and grammars, and to know which ids are padding.
          dtype: compute dtype.
          max_seqs: requests that run at the same time.
          max_length: tokens of a prompt and its text together; by default the model's context.
          max_batched_tokens: prompt tokens that one step reads: running texts wait for at most one such step.
          page_size: tokens in a page of the cache, a multiple of 16.
          num_pages: pages of the cache; by default what `memory_fraction` leaves, and where the device does not report
            its memory, room for four texts of `max_length`.
          memory_fraction: of the device's memory that weights, cache and activations may take.
          prefix_cache: whether pages of earlier prompts are found again; never with dual-chunk attention.
          proposer: for speculative decoding, such as `proposers.Ngrams(4, rows=8)`. Texts do not depend on it.
          adapters: LoRA adapters that requests may name, such as from `convert.adapter.load_adapters`. Rows of one step
            may have different ones.
          attention: which kernel; see `kernels.attention`.
          kv_dtype: of keys and values: "auto" is the compute dtype; "int8" and "fp8" take half the memory of bfloat16,
            so that twice the pages fit.
          eos_token_ids: ids that end a text, by default those of the config and the tokenizer.

        Raises:
          InputError: a reward model, a tokenizer with more tokens than the model, sizes out of range, too little
            memory, an unknown kv_dtype, a mesh that does not fit the model, or an adapter that does not.
        """
        super().__init__(mesh)
        check_generates(config)
        sizes = {"max_seqs": max_seqs, "max_batched_tokens": max_batched_tokens, "page_size": page_size}
        check_sizes({**sizes, "max_length": max_length, "num_pages": num_pages}, memory_fraction)
        check_kv_dtype(kv_dtype)
        self.config, self.tokenizer, self.dtype, self.kv_dtype = config, tokenizer, dtype, kv_dtype
        self.max_length = min(max_length or config.context_length, config.context_length)
        self.vocab_limit = vocab_limit(config, tokenizer)
        if eos_token_ids is None:
            self.eos_token_ids = default_eos(config, tokenizer)
        else:
            self.eos_token_ids = check_ids(eos_token_ids, "eos_token_ids", config.vocab_size)
        self.grammars = None if tokenizer is None else Grammars(tokenizer, config.vocab_size, self.eos_token_ids)

        # The device's side: weights, factors of adapters, cache and programs.
        sharding, adapters = Sharding.for_inference(config, mesh), adapters or {}
        check_adapters(adapters, config)
        self._adapters = {name: number for number, name in enumerate(adapters, 1)}
        factors = list(adapters.values())
        options = Options(
            stacked=False, fused=True, dtype=dtype, attention=attention, adapter_ranks=adapter_ranks(factors)
        )
        self._factors = place_factors(factors, config, mesh, options) if adapters else None
        fused = self._in_layout(params)
        settings = RunnerConfig(
            max_seqs=max_seqs,
            max_length=self.max_length,
            page_size=page_size,
            num_pages=1,  # Until it is known how many fit.
            max_batched_tokens=max_batched_tokens,
            speculate=proposer.count if proposer else 0,
            kv_dtype=kv_dtype,
        )
        pages = num_pages or self._least(
            lambda: pages_that_fit(config, settings, sharding, mesh.local_devices[0], dtype, memory_fraction)
        )
        self._runner = Runner(
            config, fused, mesh, options, self.vocab_limit, dataclasses.replace(settings, num_pages=pages)
        )

        # The host's side: pages, plans, and the thread that carries them out.
        self._pool = PagePool(pages, page_size)
        self._scheduler = Scheduler(
            self._pool,
            max_seqs=max_seqs,
            max_batched_tokens=max_batched_tokens,
            max_length=self.max_length,
            max_chunks=self._runner.buckets.prefill[-1][0],
            max_slots=self._runner.buckets.prefill_slots[-1],
            # Keys of a text beyond the trained length depend on its whole length there: others cannot use them.
            prefix_cache=prefix_cache and config.dual_chunk is None,
        )
        self._steps = Steps(
            self._runner,
            self._scheduler,
            self._pool,
            proposer=proposer,
            on_finished=self._report_finished,
        )
        self._ids, self._proposer = itertools.count(), proposer
        if self._hosts is not None:
            for runner in (self._runner, *(proposer.runners if proposer else ())):
                self._hosts.add(runner)
        self._start_thread()

    # --- what callers use ---

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may use."""
        return tuple(self._adapters)

    def start(self, report: Callable[[str, float, int, int], None] | None = None) -> float:
        """Compiles all programs; none is compiled later. Process 0 does it for all.

        Args:
          report: called after each program with its name, its seconds, how many are ready, and how many there are.

        Returns:
          Seconds taken.
        """
        begin = time.perf_counter()
        if not self.leads:
            return 0.0
        if self.grammars is not None:
            with contextlib.suppress(InputError):  # Without llguidance, requests with a grammar are refused.
                self.grammars.prepare()
        self.call(lambda: self._compile(report))
        return time.perf_counter() - begin

    def submit(self, request: Request, *, incremental: bool = True) -> Stream:
        """Queues a request.

        Args:
          request: what is asked for.
          incremental: whether steps come as tokens come; otherwise there is one step, the last.

        Raises:
          InputError: a request that can never run: ids out of range, too long for the model or the cache, stop strings
            or a grammar without a tokenizer, or an adapter that is not there.
        """
        self._check_leads()
        self.check(request)
        number = next(self._ids)
        scheduled = Scheduled(request, number)
        stream = Stream(lambda: self._cancel(number), self._steps.readers)
        row = Row(
            list(request.prompt),
            request.ending,
            self.tokenizer,
            logprobs=False,
            incremental=incremental,
            dtype=self.dtype,
            min_tokens=request.min_tokens,
        )
        active = Active(scheduled, row, stream, incremental, self._number(request.adapter))
        self._submitted[number] = active
        try:
            # A prompt whose log-probabilities are wanted is read whole before it is queued.
            self._post(lambda: self._queue(number), self._work if request.prompt_logprobs else self._commands)
        except RuntimeError:
            self._submitted.pop(number, None)
            raise
        return stream

    def check(self, request: Request) -> None:
        """Raises InputError for a request that can never run here; `submit` says which those are."""
        pages = self._pool.num_pages, self._pool.page_size
        check_request(request, Limits(self.config, self.tokenizer, self.vocab_limit, self.max_length, *pages))
        self._number(request.adapter)

    def generate(self, requests: Sequence[Request]) -> list[Finished]:
        """Runs requests to their ends, and returns their texts, in order. Raises as `submit`, before any runs."""
        for request in requests:
            self.check(request)
        streams = [self.submit(request, incremental=False) for request in requests]
        try:
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    def prompt_logprobs(
        self, prompt: Sequence[int], top: int = 0, adapter: str | None = None
    ) -> list[TokenInfo | None]:
        """Log-probabilities of a text's own tokens, each after those before it; None for the first.

        Args:
          prompt: token ids.
          top: how many of the most likely tokens to return at each place, at most `MAX_TOP_LOGPROBS`.
          adapter: name of an adapter; None for the model itself.

        Raises:
          InputError: ids out of range, a text that is too long, or `top` out of range.
        """
        self._check_leads()
        if not 0 <= as_int(top, "top") <= MAX_TOP_LOGPROBS:
            raise InputError(f"top must be in [0, {MAX_TOP_LOGPROBS}], got {top}.")
        number = self._number(adapter)
        ids = list(check_ids(prompt, "prompt", self.vocab_limit))
        check_lengths(self.config, len(ids), 1)
        return self.call(lambda: self._steps.prompt_logprobs(ids, top, number))

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """Log-probabilities of given completions' tokens after their prompts.

        Args:
          prompts: token ids of each, at least one.
          completions: token ids of each.
          adapter: name of an adapter; None for the model itself.

        Raises:
          InputError: other numbers of prompts and completions, empty prompts, ids out of range, or texts that are too
            long.
        """
        if len(prompts) != len(completions):
            raise InputError(f"Expected a completion for each prompt; got {len(prompts)} and {len(completions)}.")
        scores = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not len(prompt):
                raise InputError(f"Prompt {i} is empty. Give at least one token.")
            infos = self.prompt_logprobs([*prompt, *completion], adapter=adapter)[len(prompt) :]
            scores.append([info.logprob for info in infos if info is not None])
        return scores

    def embed(
        self,
        prompts: Sequence[Sequence[int]],
        pooling: Literal["mean", "last"] = "mean",
        adapter: str | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Pooled hidden states of texts, float32 [texts, hidden_size].

        Args:
          prompts: token ids of each.
          pooling: "mean" over a text's tokens, or "last".
          adapter: name of an adapter; None for the model itself.
          stopped: asked before each group of texts; once it is true, the rest is not read.

        Raises:
          InputError: another pooling, ids out of range, or a text that is empty or too long.
          concurrent.futures.CancelledError: `stopped` became true.
        """
        self._check_leads()
        number = self._number(adapter)
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling must be mean or last, got {pooling!r}.")
        ids = [list(check_ids(prompt, f"prompt {i}", self.vocab_limit)) for i, prompt in enumerate(prompts)]
        for i, prompt in enumerate(ids):
            if not 0 < len(prompt) <= self.config.context_length:
                most = self.config.context_length
                raise InputError(f"Text {i} has {len(prompt)} tokens; expected 1 to {most}, the model's context.")
        found = []
        # Few texts at a time, so that running texts go on between them.
        for group in in_groups(ids, self._runner.settings.max_batched_tokens):
            if stopped():
                raise concurrent.futures.CancelledError
            found.append(
                self.call(lambda group=group: self._runner.embed(group, pooling, [number] * len(group)))  # type: ignore[misc]
            )
        return np.concatenate(found) if found else np.zeros((0, self.config.hidden_size), np.float32)

    def update_weights(self, params: Params | Callable[[], Params]) -> None:
        """Goes on with other weights and the same adapters.

        Keys and values of running texts are computed anew, and no old ones are found. With a mesh of several processes,
        each of them calls this as often as process 0.

        Args:
          params: as for the constructor; consumed. Those in the inference layout are taken as they are. Or a function
            that returns such parameters: the old weights are freed before it is called, in the engine's thread, so that
            the device never holds both. If it fails, the engine has no weights and needs another update before it can
            run requests.

        Raises:
          ValueError: other names, shapes, dtypes or shardings than those of the weights before.
          InputError: another process of the mesh failed to take its weights, or did not call this within its
            `patience`; all go on with the old ones.
          RuntimeError: this process calls too late.
        """
        # With several processes, all programs start in the engine's thread, in the same order everywhere.
        found = None if callable(params) or self._hosts is not None else self._in_layout(params)

        def replace() -> None:
            new = found
            if callable(params):
                kept = {id(factor) for factor in jax.tree.leaves(self._factors)}
                for leaf in jax.tree.leaves(self._runner.params):
                    if id(leaf) not in kept:
                        leaf.delete()
                new = self._in_layout(params())
            elif new is None:
                new = self._in_layout(params)
            self._runner.update_weights(new)

        def replace_together() -> None:
            before = self._runner.params
            try:
                self._take_together(replace)
            except Exception:
                self._runner.params = before
                raise

        def update() -> None:
            self._steps.read_all()
            self._scheduler.preempt_all()
            self._pool.clear()
            self._steps.last_read = None
            if self._hosts is not None:
                self._hosts.tell("update")
            replace_together()

        self.call(update if self.leads else replace_together)

    def stats(self) -> Stats:
        """Counts at this moment. Raises RuntimeError if the engine has stopped."""
        if self._failure is not None:
            raise RuntimeError(f"The engine has stopped: {self._failure}") from self._failure
        scheduler, pool, steps = self._scheduler, self._pool, self._steps
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._submitted),
            free=0 if scheduler.blocked else self._runner.settings.max_seqs - len(scheduler.running),
            pages_used=pool.num_pages - pool.num_free,
            pages=pool.num_pages,
            prompt_tokens=steps.prompt_tokens,
            output_tokens=steps.output_tokens,
            prefix_hits=pool.hits,
            prefix_queries=pool.queries,
            preemptions=scheduler.preemptions,
            steps=steps.count,
            page_size=pool.page_size,
            kv_dtype=cache_dtype(self.kv_dtype, self.dtype).name,
        )

    def _compile(self, report: Callable[[str, float, int, int], None] | None) -> None:
        if self._hosts is not None:
            self._hosts.tell("compile")
        self._runner.compile(report)
        if self._proposer is not None:
            self._proposer.compile(report)

    def _least(self, count: Callable[[], int]) -> int:
        """The least of a number that each process of the mesh counts. Raises in all of them what one raises."""
        if self._hosts is None:
            return count()
        found = 0
        with in_step("Counting the pages of the cache"):
            found = count()
        return int(gather_from_processes(found).min())

    def _number(self, adapter: str | None) -> int:
        """The number of an adapter in the runner; 0 for none."""
        if adapter is None:
            return 0
        if adapter not in self._adapters:
            known = f"expected one of {', '.join(self._adapters)}" if self._adapters else "this engine has none"
            raise InputError(f"There is no adapter {adapter!r}; {known}.")
        return self._adapters[adapter]

    def _in_layout(self, params: Params) -> Params:
        """Parameters in the inference layout, with the factors of adapters. The argument is consumed."""
        if is_fused(params):
            return union(params, self._factors)
        with jax.set_mesh(self.mesh):
            return union(fuse(params, self.config, Sharding.for_inference(self.config, self.mesh)), self._factors)
