"""The inference engine: prompts to text, with buckets, warm-up, batching, streaming and stop strings."""

import time
from collections.abc import Iterator, Sequence
from typing import SupportsIndex, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.completion import Completion, Ending, Piece, Row
from qwen_jax.inference.programs import DecodeState, StaticArgs, decoder, prefill
from qwen_jax.inference.sampling import SamplingParams, SamplingValues, as_int
from qwen_jax.inference.weights import fuse
from qwen_jax.kernels import Implementation
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer

# Rows of the published embeddings; ids from 151,665 on were never trained.
_PUBLISHED_VOCABS, _PUBLISHED_TOKENS = (151936, 152064), 151665

Prompt = str | bytes | Sequence[SupportsIndex] | np.ndarray | jax.Array
"""Text, or token ids."""
Ids = Sequence[SupportsIndex] | np.ndarray | SupportsIndex
"""Token ids, or a single one."""


class Engine:
    """A model on a mesh, ready to generate. Not safe for calls from several threads at a time.

    Attributes:
      eos_token_ids: ids that end a text, unless a call gives others.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str = "bfloat16",
        chunk: int = 16,
        attention: Implementation = "auto",
        eos_token_ids: Ids | None = None,
    ):
        """Brings the parameters into the inference layout; they are consumed.

        Args:
          config: the architecture.
          params: unstacked, from `convert.load`; consumed.
          mesh: the mesh that the parameters are on.
          tokenizer: for text and stop strings, and to know which ids are padding.
          dtype: compute and cache dtype: bfloat16, float32 or float16.
          chunk: decode steps that run on the device before the host reads the tokens.
          attention: which kernel; see `kernels.attention`.
          eos_token_ids: ids that end a text. By default those of the config, to which `convert.load` adds those of
            generation_config.json, and the tokenizer's end-of-text token.

        Raises:
          InputError: a tokenizer with more tokens than the model, ids out of range, or a mesh that does not fit the
            model.
        """
        self.config, self.mesh, self.tokenizer, self.chunk = config, mesh, tokenizer, as_int(chunk, "chunk")
        self.sharding = Sharding.for_inference(config, mesh)
        self.options = Options(stacked=False, fused=True, dtype=dtype, attention=attention)
        if self.chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}.")
        self.vocab_limit = vocab_limit(config, tokenizer)
        if eos_token_ids is None:
            self.eos_token_ids = default_eos(config, tokenizer)
        else:
            self.eos_token_ids = check_ids(eos_token_ids, "eos_token_ids", config.vocab_size)
        with jax.set_mesh(mesh):
            self.params = fuse(params, config, self.sharding)

    # --- generating ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams = SamplingParams(),
        *,
        max_new_tokens: int = 256,
        eos_token_ids: Ids | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """Completes a batch of prompts of any lengths.

        Args:
          prompts: texts or lists of token ids; a single one counts as a list of one. The completion of a prompt does
            not depend on the others.
          sampling: how tokens are sampled.
          max_new_tokens: at most this many for each prompt.
          eos_token_ids: ids that end a text; by default the engine's. An empty list: nothing but length and `stop`.
          stop: strings that end a text and are cut off. One that contains a special token is found too.

        Returns:
          A completion for each prompt, in order. A row whose logits are not finite has `finish_reason` "error".

        Raises:
          InputError: an empty prompt, ids out of range, more tokens than the context has, a cache larger than memory,
            stop strings without a tokenizer.
        """
        rows = self._rows(as_prompts(prompts), sampling, max_new_tokens, eos_token_ids, stop)
        for tokens, logprobs in self.token_chunks([row.prompt for row in rows], sampling, max_new_tokens):
            for i, row in enumerate(rows):
                row.add(tokens[i], None if logprobs is None else logprobs[i])
            if all(row.finish_reason for row in rows):
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
    ) -> Iterator[Piece]:
        """Completes one prompt and yields its text in pieces: after the first token, then after each chunk.

        The arguments and errors are those of `generate`; errors are raised by the call, before the first piece. The
        pieces join to the text of `generate`.
        """
        if self.tokenizer is None:
            raise InputError("Streaming text needs a tokenizer.")
        (row,) = self._rows([prompt], sampling, max_new_tokens, eos_token_ids, stop, incremental=True)
        return self._pieces(row, self.token_chunks([row.prompt], sampling, max_new_tokens))

    def _pieces(self, row: Row, chunks: Iterator[tuple[np.ndarray, np.ndarray | None]]) -> Iterator[Piece]:
        given = 0
        for tokens, logprobs in chunks:
            row.add(tokens[0], None if logprobs is None else logprobs[0])
            if row.finish_reason:
                break
            ready = row.ready_text()
            if len(ready) > given:
                yield Piece(ready[given:])
                given = len(ready)
        completion = row.completion()
        yield Piece((completion.text or "")[given:], completion)

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

    def token_chunks(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, max_new_tokens: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
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
        slots = self.cache_slots(longest, max_new_tokens)
        batch = self._batch_bucket(len(prompts))
        self._check_memory(batch, slots)
        static = StaticArgs(self.config, self.sharding, self.options, sampling.mode, slots, self.vocab_limit)
        tokens_BT = np.zeros((batch, min(_bucket(longest, smallest=64), slots)), np.int32)
        lengths_B = np.ones(batch, np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)] = prompt
            lengths_B[i] = len(prompt)
        seeds_B = ((np.arange(batch, dtype=np.uint64) + sampling.seed) % 2**32).astype(np.uint32)
        return self._run(static, tokens_BT, lengths_B, seeds_B, SamplingValues.of(sampling), max_new_tokens)

    def _run(
        self,
        static: StaticArgs,
        tokens_BT: np.ndarray,
        lengths_B: np.ndarray,
        seeds_B: np.ndarray,
        values: SamplingValues,
        max_new_tokens: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        rows = NamedSharding(self.mesh, self.sharding.rows)
        with jax.set_mesh(self.mesh):
            tokens = jax.device_put(tokens_BT, NamedSharding(self.mesh, self.sharding.tokens))
            lengths, seeds = jax.device_put((lengths_B, seeds_B), rows)
            state: DecodeState
            state, *newest = prefill(self.params, tokens, lengths, seeds, values, static=static)
        started = 1
        while newest:
            upcoming: list[jax.Array | None] = []
            if started < max_new_tokens:
                # The next chunk starts before the host reads this one, so that the device never waits for the host.
                with jax.set_mesh(self.mesh):
                    state, *upcoming = decoder(static, state)(
                        self.params, state, values, static=static, steps=self.chunk
                    )
                started += self.chunk
            tokens_BN, logprobs_BN = newest
            yield np.asarray(tokens_BN), None if logprobs_BN is None else np.asarray(logprobs_BN)
            newest = upcoming

    def _batch_bucket(self, size: int) -> int:
        """The next power of two, rounded up to a multiple of the batch shards: few programs serve all batch sizes."""
        shards = self.sharding.batch_shards
        return -(-(1 << (size - 1).bit_length()) // shards) * shards

    def _check_memory(self, batch: int, slots: int) -> None:
        """Raises InputError if the cache does not fit into memory, where the device reports its memory."""
        stats = self.mesh.devices.flat[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return
        shards = self.sharding.batch_shards * self.sharding.tensor
        copies = self.sharding.kv_heads // self.config.num_kv_heads
        a_token = self.config.kv_bytes_per_token(jnp.dtype(self.options.dtype).itemsize) * copies
        needed = a_token * batch * slots // shards
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        if needed > free:
            raise InputError(
                f"The cache for {batch} rows of {slots} tokens needs {needed / 2**30:.1f} GiB on each device, "
                f"{free / 2**30:.1f} GiB are free. Use fewer prompts, fewer max_new_tokens, or a larger tensor axis."
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


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Returns a list of prompts; a single text or a single list of ids becomes a list of one."""
    if isinstance(prompts, (str, bytes)) or getattr(prompts, "ndim", 2) == 1:
        return [cast(Prompt, prompts)]
    if not hasattr(prompts, "__iter__"):
        raise InputError(f"Expected prompts as texts or lists of token ids, got {prompts!r}.")
    items = list(cast(Sequence[Prompt], prompts))
    if items and all(hasattr(item, "__index__") and not getattr(item, "ndim", 0) for item in items):
        return [cast(Sequence[SupportsIndex], items)]
    return items


def default_eos(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end a text: those of the config, and the tokenizer's end-of-text token."""
    own = () if tokenizer is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys([*config.eos_token_ids, *own]))


def check_ids(ids: Ids, name: str, limit: int) -> tuple[int, ...]:
    """Returns ids as integers; a single id becomes a tuple of one.

    Args:
      ids: of Python, NumPy or JAX.
      name: of the argument, for errors.
      limit: ids must be below it.

    Raises:
      InputError: something else than integers in [0, limit).
    """
    single = not hasattr(ids, "__iter__") or getattr(ids, "ndim", 1) == 0
    values = tuple(as_int(i, name) for i in ([ids] if single else cast(Sequence[SupportsIndex], ids)))
    wrong = [i for i in values if not 0 <= i < limit]
    if wrong:
        raise InputError(f"{name} has {wrong[0]}; ids must be in [0, {limit}).")
    return values


def vocab_limit(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """The number of ids that are tokens. Ids from there to the end of the embedding are padding.

    Raises:
      InputError: a tokenizer with more tokens than the model.
    """
    if tokenizer is None:
        return _PUBLISHED_TOKENS if config.vocab_size in _PUBLISHED_VOCABS else config.vocab_size
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model an embedding of {config.vocab_size}: "
            "they do not belong together."
        )
    return tokenizer.vocab_size


def encode(prompt: Prompt, i: int, tokenizer: Tokenizer | None, limit: int) -> list[int]:
    """Returns the token ids of prompt number i.

    Args:
      prompt: text, to which the tokenizer adds its own BOS token if it has one; or ids.
      i: its number, for errors.
      tokenizer: for text.
      limit: ids must be below it.

    Raises:
      InputError: empty, text without a tokenizer, or ids that are not integers below the limit.
    """
    if isinstance(prompt, (str, bytes)):
        if tokenizer is None:
            raise InputError(f"Prompt {i} is text, but there is no tokenizer. Give token ids.")
        ids = tokenizer.encode(prompt)
    elif hasattr(prompt, "__iter__"):
        ids = [as_int(token, f"A token id of prompt {i}") for token in prompt]
    else:
        raise InputError(f"Prompt {i} must be text or a list of token ids, got {prompt!r}.")
    if not ids:
        raise InputError(f"Prompt {i} is empty. Give at least one token.")
    wrong = [token for token in ids if not 0 <= token < limit]
    if wrong:
        raise InputError(f"Prompt {i} has token id {wrong[0]}; ids must be in [0, {limit}).")
    return ids


def check_lengths(config: ModelConfig, longest_prompt: int, max_new_tokens: int) -> None:
    """Raises InputError if prompt and new tokens do not fit the model's context."""
    max_new_tokens = as_int(max_new_tokens, "max_new_tokens")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if longest_prompt + max_new_tokens > config.context_length:
        raise InputError(
            f"A prompt of {longest_prompt} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{config.context_length} tokens. Shorten the prompt or lower max_new_tokens."
        )


def check_stop(stop: str | Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Returns the stop strings; a single one becomes a tuple of one.

    Raises:
      InputError: no tokenizer, an empty stop string, or something else than strings.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if texts and tokenizer is None:
        raise InputError("Stop strings need a tokenizer.")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"A stop string must be a string, got {text!r}. Ids belong to eos_token_ids.")
        if not text:
            raise InputError("A stop string must not be empty.")
    return texts


def _bucket(size: int, smallest: int) -> int:
    """The next length that programs are compiled for: powers of two, and above 512 quarter steps between them."""
    power = max(smallest, 1 << (size - 1).bit_length())
    if power <= 512:
        return power
    step = power // 8
    return -(-size // step) * step
