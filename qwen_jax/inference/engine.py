"""The inference engine: prompts to text, with buckets, warm-up, batching, streaming and stop strings."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax.attention.pooled_blocks import BLOCK
from qwen_jax.attention.quantized_cache import KVDtype, cache_dtype, check_kv_dtype, kv_bytes_per_token
from qwen_jax.attention.sparse import Diagnostics, PooledBlocks, SparsePrefill, VerticalSlash, summarise
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import chunked_prefill
from qwen_jax.inference.chunked_prefill import PrefillState, Progress
from qwen_jax.inference.completion import Completion, Ending, Piece, Row
from qwen_jax.inference.document import Document
from qwen_jax.inference.programs import DecodeState, StaticArgs, decoder, prefill
from qwen_jax.inference.prompts import (
    Ids,
    Prompt,
    as_prompts,
    check_generates,
    check_ids,
    check_lengths,
    check_stop,
    default_eos,
    encode,
    vocab_limit,
)
from qwen_jax.inference.sampling import SamplingMode, SamplingParams, SamplingValues, as_int
from qwen_jax.inference.weights import fuse
from qwen_jax.kernels import Implementation
from qwen_jax.options import Options
from qwen_jax.parallel.placing import place, read
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer

Chunks = Generator[tuple[np.ndarray, np.ndarray | None], None, None]
"""New tokens int32 [batch, n] as they are generated, and their log-probabilities, if asked for."""

_log = logging.getLogger(__name__)
# Chunks of sparse prefill are a multiple of this: tiles of at most so many queries.
_SPARSE_TILE = 128


class Engine:
    """A model on a mesh, ready to generate. Not safe for calls from several threads at a time.

    Attributes:
      eos_token_ids: ids that end a text, unless a call gives others.
      skipped: what sparse attention left out of the last prompt that it read, chunk by chunk; see `sparse.Diagnostics`.
      on_chunk: called after each chunk of a prompt that is read in chunks, with the tokens read and all its tokens.
    """

    on_chunk: Progress | None = None

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str = "bfloat16",
        chunk: int = 16,
        prefill_chunk: int = 32_768,
        attention: Implementation = "auto",
        kv_dtype: KVDtype = "auto",
        sparse: VerticalSlash | PooledBlocks | None = None,
        sparse_from: int = 65_536,
        eos_token_ids: Ids | None = None,
    ):
        """Brings the parameters into the inference layout; they are consumed.

        Args:
          config: the architecture.
          params: unstacked, from `convert.load`, which also merges a LoRA adapter into them; consumed.
          mesh: the mesh that the parameters are on.
          tokenizer: for text and stop strings, and to know which ids are padding.
          dtype: compute dtype, and that of the cache: bfloat16, float32 or float16.
          chunk: decode steps that run on the device before the host reads the tokens.
          prefill_chunk: longer prompts are read this many tokens at a time, which bounds the memory of activations.
          attention: which kernel; see `kernels.attention`.
          kv_dtype: "int8" and "fp8" hold keys and values in 8 bits, half the memory of bfloat16; "auto" in `dtype`.
          sparse: which keys long prompts attend to; None for all. Decoding attends to all keys.
          sparse_from: the length of prompts, in tokens, from which `sparse` is used.
          eos_token_ids: ids that end a text. By default those of the config, to which `convert.load` adds those of
            generation_config.json, and the tokenizer's end-of-text token.

        Raises:
          InputError: a reward model, a tokenizer with more tokens than the model, ids out of range, or a mesh that does
            not fit the model.
        """
        check_generates(config)
        self.config, self.mesh, self.tokenizer, self.chunk = config, mesh, tokenizer, as_int(chunk, "chunk")
        self.prefill_chunk = as_int(prefill_chunk, "prefill_chunk")
        self.sharding = Sharding.for_inference(config, mesh)
        self.options = Options(stacked=False, fused=True, dtype=dtype, attention=attention)
        for name in ("chunk", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_kv_dtype(kv_dtype)
        self.kv_dtype = kv_dtype
        self.sparse_from = as_int(sparse_from, "sparse_from")
        self.sparsity: SparsePrefill | None = None
        self.skipped: list[Diagnostics] = []
        if sparse is not None:
            self.use_sparse(sparse)
        self.vocab_limit = vocab_limit(config, tokenizer)
        if eos_token_ids is None:
            self.eos_token_ids = default_eos(config, tokenizer)
        else:
            self.eos_token_ids = check_ids(eos_token_ids, "eos_token_ids", config.vocab_size)
        with jax.set_mesh(mesh):
            self.params = fuse(params, config, self.sharding)

    def use_sparse(self, pattern: VerticalSlash | PooledBlocks, max_columns: int | None = None) -> None:
        """Reads long prompts by another pattern from now on. Other budgets of vertical-slash compile nothing.

        Args:
          pattern: which keys to visit.
          max_columns: room for larger budgets of columns, with which this is called later.

        Raises:
          InputError: budgets for another model, or chunks that are not whole tiles.
        """
        if isinstance(pattern, VerticalSlash):
            pattern.check(self.config)
        if self.prefill_chunk % _SPARSE_TILE:
            raise InputError(
                f"Sparse attention needs a prefill_chunk that is a multiple of {_SPARSE_TILE}, got "
                f"{self.prefill_chunk}."
            )
        self.sparsity = SparsePrefill.of(pattern, max_columns)

    # --- generating ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams = SamplingParams(),
        *,
        max_new_tokens: int = 256,
        eos_token_ids: Ids | None = None,
        stop: str | Sequence[str] = (),
        document: Document | None = None,
    ) -> list[Completion]:
        """Completes a batch of prompts of any lengths.

        Args:
          prompts: texts or lists of token ids; a single one counts as a list of one. The completion of a prompt does
            not depend on the others.
          sampling: how tokens are sampled.
          max_new_tokens: at most this many for each prompt.
          eos_token_ids: ids that end a text; by default the engine's. An empty list: nothing but length and `stop`.
          stop: strings that end a text and are cut off. One that contains a special token is found too.
          document: from `read`; each prompt continues it, one after the other, and it is not read again.

        Returns:
          A completion for each prompt, in order. A row whose logits are not finite has `finish_reason` "error".

        Raises:
          InputError: an empty prompt, ids out of range, more tokens than the context has, a cache larger than memory,
            stop strings without a tokenizer.
        """
        rows = self._rows(as_prompts(prompts), sampling, max_new_tokens, eos_token_ids, stop)
        # Prompts that continue a document share its cache, one after the other; others are one batch.
        batches = [rows] if document is None else [[row] for row in rows]
        for first, batch in enumerate(batches):
            ids = [row.prompt for row in batch]
            if document is None:
                chunks = self.token_chunks(ids, sampling, max_new_tokens)
            else:
                seeded = dataclasses.replace(sampling, seed=(sampling.seed + first) % 2**32)
                chunks = self._continue(document, ids[0], seeded, max_new_tokens)
            with contextlib.closing(chunks):
                for tokens, logprobs in chunks:
                    for i, row in enumerate(batch):
                        row.add(tokens[i], None if logprobs is None else logprobs[i])
                    if all(row.finish_reason for row in batch):
                        break
        return [row.completion() for row in rows]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams = SamplingParams(),
        *,
        max_new_tokens: int = 256,
        eos_token_ids: Ids | None = None,
        stop: str | Sequence[str] = (),
        document: Document | None = None,
    ) -> Iterator[Piece]:
        """Completes one prompt and yields its text in pieces: after the first token, then after each chunk.

        The arguments and errors are those of `generate`; errors are raised by the call, before the first piece. The
        pieces join to the text of `generate`.
        """
        if self.tokenizer is None:
            raise InputError("Streaming text needs a tokenizer.")
        (row,) = self._rows([prompt], sampling, max_new_tokens, eos_token_ids, stop, incremental=True)
        if document is not None:
            return self._pieces(row, self._continue(document, row.prompt, sampling, max_new_tokens))
        return self._pieces(row, self.token_chunks([row.prompt], sampling, max_new_tokens))

    def read(self, prompt: Prompt, *, room: int = 4096) -> Document:
        """Reads a document once, for several calls of `generate` or `stream` that continue it.

        Args:
          prompt: text or token ids.
          room: tokens that a continuation and its completion may have together.

        Raises:
          InputError: as `generate`, or a mesh that divides the rows of a batch.
        """
        if (shards := self.sharding.batch_shards) > 1:
            raise InputError(
                f"A document is one row, and this mesh divides rows over {shards} devices. Use a mesh with a tensor "
                "axis alone."
            )
        ids = encode(prompt, 0, self.tokenizer, self.vocab_limit)
        check_lengths(self.config, len(ids), as_int(room, "room"))
        slots = self._slots_for_chunks(len(ids), room)
        self._check_memory(1, slots, len(ids))
        static = self._static(SamplingParams(temperature=0).mode, slots)
        state = self._read_chunks([ids], np.asarray([len(ids)], np.int32), static)
        return Document(ids, slots, room, state.cache)

    def _continue(self, document: Document, ids: list[int], sampling: SamplingParams, max_new_tokens: int) -> Chunks:
        """`token_chunks` of a prompt that continues a document."""
        length, max_new_tokens = len(document.tokens) + len(ids), as_int(max_new_tokens, "max_new_tokens")
        check_lengths(self.config, length, max_new_tokens)
        if len(ids) + max_new_tokens > document.room:
            raise InputError(
                f"A prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the room of "
                f"{document.room} tokens after the document. Call read with more room."
            )
        document.check_free()
        return self._after_document(document, ids, length, sampling, max_new_tokens)

    def _after_document(
        self, document: Document, ids: list[int], length: int, sampling: SamplingParams, max_new_tokens: int
    ) -> Chunks:
        static, values = self._static(sampling.mode, document.slots), SamplingValues.of(sampling)
        chunk = self._chunk_of(len(ids))
        with jax.set_mesh(self.mesh):
            state = chunked_prefill.resume(document.take(), document.tokens, static=static)
        lengths_B = np.asarray([length], np.int32)
        state, _ = chunked_prefill.read(self.params, state, [ids], lengths_B, chunk, self.mesh, static)
        yield from self._run(static, self._begin(static, state, sampling), values, max_new_tokens, document)

    def _pieces(self, row: Row, chunks: Chunks) -> Iterator[Piece]:
        with contextlib.closing(chunks):
            for tokens, logprobs in chunks:
                row.add(tokens[0], None if logprobs is None else logprobs[0])
                if row.finish_reason:
                    break
                if text := row.new_text():
                    yield Piece(text)
        completion = row.completion()
        yield Piece(row.rest(completion.text), completion)

    def warm_up(
        self,
        *,
        batch_size: int = 1,
        prompt_length: int = 64,
        max_new_tokens: int = 256,
        sampling: SamplingParams = SamplingParams(),
    ) -> float:
        """Compiles the programs for calls of this size; later calls in the same buckets compile nothing.

        Returns:
          Seconds taken.
        """
        start = time.perf_counter()
        prompts = [[0] * prompt_length] * batch_size
        for tokens, _ in self.token_chunks(prompts, sampling, max_new_tokens):
            if tokens.shape[1] > 1:
                break
        return time.perf_counter() - start

    def cache_slots(self, prompt_length: int, max_new_tokens: int) -> int:
        """Length of the cache for the longest prompt of a batch."""
        return _bucket(prompt_length + max_new_tokens, smallest=256)

    # --- the device side ---

    def token_chunks(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, max_new_tokens: int) -> Chunks:
        """Yields new tokens as they are generated: the first of each row, then chunk after chunk.

        Rows are not cut where a text ends; stop iterating when all of them have ended.

        Args:
          prompts: token ids.
          sampling: how tokens are sampled.
          max_new_tokens: the last chunk may go beyond it.

        Returns:
          An iterator of int32 tokens [batch, n] and float32 log-probabilities [batch, n], or None if not asked for.
          The batch is padded to its bucket. A token is `sampling.NOT_FINITE` where the logits are not finite.

        Raises:
          InputError: more tokens than the context has, or a cache larger than memory.
        """
        longest, max_new_tokens = max(map(len, prompts)), as_int(max_new_tokens, "max_new_tokens")
        check_lengths(self.config, longest, max_new_tokens)
        in_chunks = longest > self.prefill_chunk or self._is_sparse(longest)
        room = self._slots_for_chunks(longest, max_new_tokens) if in_chunks else 0
        slots = room or self.cache_slots(longest, max_new_tokens)
        batch = self._batch_bucket(len(prompts))
        self._check_memory(batch, slots, longest)
        static = self._static(sampling.mode, slots)
        padded = [*prompts, *([[0]] * (batch - len(prompts)))]
        lengths_B = np.asarray(list(map(len, padded)), np.int32)
        values = SamplingValues.of(sampling)
        if in_chunks:
            state = self._read_chunks(padded, lengths_B, static)
            return self._run(static, self._begin(static, state, sampling), values, max_new_tokens)
        tokens_BT = np.zeros((batch, min(_bucket(longest, smallest=64), slots)), np.int32)
        for row, prompt in zip(tokens_BT, padded, strict=True):
            row[: len(prompt)] = prompt
        with jax.set_mesh(self.mesh):
            tokens = place(tokens_BT, NamedSharding(self.mesh, self.sharding.tokens))
            lengths, seeds = place((lengths_B, _seeds(sampling, batch)), NamedSharding(self.mesh, self.sharding.rows))
            begun = prefill(self.params, tokens, lengths, seeds, values, static=static)
        return self._run(static, begun, values, max_new_tokens)

    def _static(self, mode: SamplingMode, slots: int) -> StaticArgs:
        return StaticArgs(self.config, self.sharding, self.options, mode, slots, self.vocab_limit, self.kv_dtype)

    def _is_sparse(self, longest: int) -> bool:
        return self.sparsity is not None and longest >= self.sparse_from

    def _read_chunks(self, prompts: Sequence[Sequence[int]], lengths_B: np.ndarray, static: StaticArgs) -> PrefillState:
        """Reads whole prompts in chunks."""
        longest = int(lengths_B.max())
        sparsity = self.sparsity if self._is_sparse(longest) else None
        state, self.skipped = chunked_prefill.read(
            self.params,
            self._empty(lengths_B, static),
            *(prompts, lengths_B, self._chunk_of(longest), self.mesh, static, self.on_chunk, sparsity),
        )
        if self.skipped:
            recall_LH, density, cut = summarise(self.skipped)
            _log.log(
                logging.WARNING if cut else logging.INFO,
                "sparse prefill of %d tokens: density %.2f%%, recall %.4f, lowest head %.4f; %d pieces or columns cut",
                *(longest, 100 * density, recall_LH.mean(), recall_LH.min(), cut),
            )
        return state

    def _empty(self, lengths_B: Sequence[int] | np.ndarray, static: StaticArgs) -> PrefillState:
        """A state for prompts of these lengths that end at one slot."""
        starts = np.max(lengths_B) - np.asarray(lengths_B, np.int32)
        with jax.set_mesh(self.mesh):
            rows = place(starts, NamedSharding(self.mesh, self.sharding.rows))
            return chunked_prefill.empty_state(self.params, rows, static=static)

    def _begin(
        self, static: StaticArgs, state: PrefillState, sampling: SamplingParams
    ) -> tuple[DecodeState, jax.Array, jax.Array | None]:
        with jax.set_mesh(self.mesh):
            seeds = place(_seeds(sampling, len(state.hidden_BD)), NamedSharding(self.mesh, self.sharding.rows))
            values = SamplingValues.of(sampling)
            parts = state.cache, state.hidden_BD, state.seen_BV
            return chunked_prefill.begin_text(self.params, *parts, seeds, values, static=static)

    def _run(
        self,
        static: StaticArgs,
        begun: tuple[DecodeState, jax.Array, jax.Array | None],
        values: SamplingValues,
        max_new_tokens: int,
        document: Document | None = None,
    ) -> Chunks:
        state: DecodeState
        state, *newest = begun
        started = 1
        try:
            while newest:
                upcoming: list[jax.Array | None] = []
                if started < max_new_tokens:
                    # The next chunk starts before the host reads this one: the device never waits for the host.
                    with jax.set_mesh(self.mesh):
                        state, *upcoming = decoder(static, state)(
                            self.params, state, values, static=static, steps=self.chunk
                        )
                    started += self.chunk
                tokens_BN, logprobs_BN = newest
                assert tokens_BN is not None
                yield read(tokens_BN), None if logprobs_BN is None else read(logprobs_BN)
                newest = upcoming
        finally:
            if document is not None:
                document.give_back(state.cache)

    def _batch_bucket(self, size: int) -> int:
        """The next power of two, rounded up to a multiple of the batch shards: few programs serve all batch sizes."""
        shards = self.sharding.batch_shards
        return -(-(1 << (size - 1).bit_length()) // shards) * shards

    def _chunk_of(self, tokens: int) -> int:
        """How many of a prompt's tokens are read at a time: no more than it has, but for whole tiles."""
        return min(_bucket(tokens, smallest=_SPARSE_TILE), self.prefill_chunk)

    def _slots_for_chunks(self, longest: int, room: int) -> int:
        """Length of the cache for prompts that are read in chunks and `room` tokens after them."""
        chunk = self._chunk_of(longest)
        whole = -(-longest // chunk) * chunk
        # What follows a document is read in chunks, too.
        return _bucket(max(whole, longest + _bucket(room, smallest=64)), smallest=256)

    def _check_memory(self, batch: int, slots: int, longest: int) -> None:
        """Raises InputError if the cache does not fit into memory, where the device reports its memory.

        The means of pooled blocks, which are beside the cache while the longest prompt is read, are counted with it.
        """
        stats = self.mesh.local_devices[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return
        shards = self.sharding.batch_shards * self.sharding.tensor
        copies = self.sharding.kv_heads // self.config.num_kv_heads
        a_block = BLOCK * kv_bytes_per_token(self.config, cache_dtype(self.kv_dtype, self.options.dtype))
        if self._is_sparse(longest) and self.sparsity is not None and isinstance(self.sparsity.pattern, PooledBlocks):
            a_block += self.config.kv_bytes_per_token(jnp.dtype(self.options.dtype).itemsize)
        a_block *= copies * batch
        needed = a_block * slots // (BLOCK * shards)
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        if needed > free:
            fits = free * BLOCK * shards // a_block
            raise InputError(
                f"The cache for {batch} rows of {slots} tokens needs {needed / 2**30:.1f} GiB on each device, "
                f"{free / 2**30:.1f} GiB are free: room for {fits} tokens a row. Use shorter or fewer prompts, fewer "
                "max_new_tokens, an 8-bit cache (kv_dtype), or a larger tensor axis."
            )

    # --- the host side ---

    def _rows(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        max_new_tokens: int,
        eos_token_ids: Ids | None,
        stop: str | Sequence[str],
        incremental: bool = False,
    ) -> list[Row]:
        if not len(prompts):
            raise InputError("Expected at least one prompt, got none.")
        eos = self.eos_token_ids
        if eos_token_ids is not None:
            eos = check_ids(eos_token_ids, "eos_token_ids", self.config.vocab_size)
        ending = Ending(frozenset(eos), check_stop(stop, self.tokenizer), as_int(max_new_tokens, "max_new_tokens"))
        return [
            Row(
                encode(prompt, i, self.tokenizer, self.vocab_limit),
                ending,
                self.tokenizer,
                logprobs=sampling.logprobs,
                incremental=incremental,
                dtype=self.options.dtype,
            )
            for i, prompt in enumerate(prompts)
        ]


def _bucket(size: int, smallest: int) -> int:
    """The next length that programs are compiled for: powers of two, and above 512 quarter steps between them."""
    power = max(smallest, 1 << (size - 1).bit_length())
    if power <= 512:
        return power
    step = power // 8
    return -(-size // step) * step


def _seeds(sampling: SamplingParams, batch: int) -> np.ndarray:
    """uint32 [batch], the seed of each row."""
    return ((np.arange(batch, dtype=np.uint64) + sampling.seed) % 2**32).astype(np.uint32)
