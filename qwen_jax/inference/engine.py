"""From prompts to text: buckets, warm-up, batching, streaming, stop strings."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.programs import DecodeState, Program, decoder, prefill
from qwen_jax.inference.sampling import Knobs, SamplingParams
from qwen_jax.inference.weights import fuse
from qwen_jax.kernels import Implementation
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params
from qwen_jax.tokenizer import StreamDecoder, Tokenizer

# Rows of the published embeddings; ids from 151,665 on were never trained.
_PUBLISHED_VOCABS, _PUBLISHED_TOKENS = (151936, 152064), 151665


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came of one prompt.

    Attributes:
      prompt_token_ids: the prompt as the model saw it.
      token_ids: the new tokens, with the end-of-text token if that ended it.
      text: the new tokens as text, without control tokens that are special and without the stop string; None if the
        engine has no tokenizer.
      finish_reason: "stop" (an end-of-text token or a stop string) or "length".
      logprobs: log-probability of each new token, if asked for.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[float] | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a streamed text: never half a character. The last one has the completion."""

    text: str
    completion: Completion | None = None


class Engine:
    """A model on a mesh, ready to generate. Not for use from several threads at a time."""

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
    ):
        """Takes the parameters over and brings them into the inference layout.

        Args:
          config: the architecture.
          params: unstacked, as `convert.load` gives them; consumed.
          mesh: where they are.
          tokenizer: for text, stop strings, and to know which ids are padding.
          dtype: compute and cache dtype: bfloat16, float32 or float16.
          chunk: decode steps that run on the device between two looks at the tokens.
          attention: which kernel; see `kernels.attention`.

        Raises:
          InputError: a tokenizer with more tokens than the model, or a mesh that does not fit the model.
        """
        self.config, self.mesh, self.tokenizer, self.chunk = config, mesh, tokenizer, chunk
        self.sharding = Sharding.for_model(config, mesh)
        self.options = Options(stacked=False, fused=True, dtype=dtype, attention=attention)
        if chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}.")
        self.vocab_limit = vocab_limit(config, tokenizer)
        with jax.set_mesh(mesh):
            self.params = fuse(params, config, self.sharding)

    # --- generating ---

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams = SamplingParams(),
        *,
        max_new_tokens: int = 256,
        eos_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Completes a batch of prompts of any lengths.

        Args:
          prompts: texts or token ids. The result for a prompt does not depend on the others.
          sampling: how tokens are chosen.
          max_new_tokens: at most this many for each prompt.
          eos_token_ids: ids that end a text; by default the config's.
          stop: strings that end a text; they are cut off.

        Raises:
          InputError: an empty prompt, ids out of range, more tokens than the context has, a cache larger than memory,
            stop strings without a tokenizer.
        """
        rows = self._rows(prompts, sampling, eos_token_ids, stop)
        for tokens, logprobs in self._chunks([row.prompt for row in rows], sampling, max_new_tokens):
            for i, row in enumerate(rows):
                row.add(tokens[i], None if logprobs is None else logprobs[i], max_new_tokens)
            if all(row.finish_reason for row in rows):
                break
        return [row.completion() for row in rows]

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        *,
        max_new_tokens: int = 256,
        eos_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Completes one prompt, giving out text as it comes: after the first token, then chunk by chunk.

        Args and errors are those of `generate`; they are checked before the first piece. The texts of the pieces
        together are the text of `generate`.
        """
        if self.tokenizer is None:
            raise InputError("Streaming text needs a tokenizer.")
        (row,) = self._rows([prompt], sampling, eos_token_ids, stop, incremental=True)
        chunks = self._chunks([row.prompt], sampling, max_new_tokens)
        return self._pieces(row, chunks, max_new_tokens)

    def _pieces(
        self, row: "_Row", chunks: Iterator[tuple[np.ndarray, np.ndarray | None]], max_new_tokens: int
    ) -> Iterator[Piece]:
        given = 0
        for tokens, logprobs in chunks:
            row.add(tokens[0], None if logprobs is None else logprobs[0], max_new_tokens)
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
        """Compiles what a call of this size needs, so that it, and smaller ones of the same buckets, compile nothing.

        Returns:
          Seconds taken.
        """
        start = time.perf_counter()
        prompts = [[0] * prompt_length] * batch_size
        for tokens, _ in self._chunks(prompts, sampling, max_new_tokens):
            if tokens.shape[1] > 1:
                break
        return time.perf_counter() - start

    def cache_slots(self, prompt_length: int, max_new_tokens: int) -> int:
        """Length of the cache for the longest prompt of a batch."""
        return _bucket(prompt_length + max_new_tokens, smallest=256)

    # --- the device side ---

    def _chunks(
        self, prompts: list[list[int]], sampling: SamplingParams, max_new_tokens: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Checks, then yields [batch, n] tokens and log-probabilities: the first token, then chunk after chunk."""
        longest = max(len(prompt) for prompt in prompts)
        check_lengths(self.config, longest, max_new_tokens)
        slots = self.cache_slots(longest, max_new_tokens)
        batch = self._batch_bucket(len(prompts))
        self._check_memory(batch, slots)
        program = Program(self.config, self.sharding, self.options, sampling.plan, slots, self.vocab_limit)
        tokens_BT = np.zeros((batch, min(_bucket(longest, smallest=64), slots)), np.int32)
        lengths_B = np.ones(batch, np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)] = prompt
            lengths_B[i] = len(prompt)
        seeds_B = ((np.arange(batch, dtype=np.uint64) + sampling.seed) % 2**32).astype(np.uint32)
        return self._run(program, tokens_BT, lengths_B, seeds_B, Knobs.of(sampling), max_new_tokens)

    def _run(
        self,
        program: Program,
        tokens_BT: np.ndarray,
        lengths_B: np.ndarray,
        seeds_B: np.ndarray,
        knobs: Knobs,
        max_new_tokens: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        rows = NamedSharding(self.mesh, self.sharding.rows)
        with jax.set_mesh(self.mesh):
            tokens = jax.device_put(tokens_BT, NamedSharding(self.mesh, self.sharding.tokens))
            lengths, seeds = jax.device_put((lengths_B, seeds_B), rows)
            state: DecodeState
            state, *newest = prefill(self.params, tokens, lengths, seeds, knobs, program=program)
        chosen = 1
        while newest:
            upcoming: list[jax.Array | None] = []
            if chosen < max_new_tokens:
                # The next chunk is under way before anyone looks at this one, so the device never waits for the host.
                with jax.set_mesh(self.mesh):
                    state, *upcoming = decoder(program, state)(
                        self.params, state, knobs, program=program, steps=self.chunk
                    )
                chosen += self.chunk
            tokens_BN, logprobs_BN = newest
            yield np.asarray(tokens_BN), None if logprobs_BN is None else np.asarray(logprobs_BN)
            newest = upcoming

    def _batch_bucket(self, size: int) -> int:
        """Next power of two that the batch axes divide: few programs serve all batch sizes."""
        shards = self.sharding.batch_shards
        return -(-(1 << (size - 1).bit_length()) // shards) * shards

    def _check_memory(self, batch: int, slots: int) -> None:
        """Refuses a cache that cannot fit, where the device tells how much it has."""
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
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams,
        eos_token_ids: Sequence[int] | None,
        stop: Sequence[str],
        incremental: bool = False,
    ) -> list["_Row"]:
        if not prompts:
            raise InputError("Expected at least one prompt, got none.")
        check_stop(stop, self.tokenizer)
        eos = frozenset(self.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        rows = []
        for i, prompt in enumerate(prompts):
            ids = encode(prompt, i, self.tokenizer, self.vocab_limit)
            rows.append(_Row(ids, eos, tuple(stop), self.tokenizer, sampling.logprobs, incremental or bool(stop)))
        return rows


class _Row:
    """One prompt's growing completion. Text is decoded token by token only where somebody needs it before the end."""

    def __init__(
        self,
        prompt: list[int],
        eos: frozenset[int],
        stop: tuple[str, ...],
        tokenizer: Tokenizer | None,
        logprobs: bool,
        incremental: bool,
    ):
        self.prompt, self.eos, self.stop, self.tokenizer = prompt, eos, stop, tokenizer
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if logprobs else None
        self.finish_reason = ""
        self.text = ""
        self.cut = False
        self.decoder: StreamDecoder | None = None
        if incremental and tokenizer is not None:
            self.decoder = StreamDecoder(tokenizer, skip_special_tokens=True)

    def add(self, tokens: np.ndarray, logprobs: np.ndarray | None, max_new_tokens: int) -> None:
        """Takes new tokens up to whatever ends the text."""
        for n, token in enumerate(tokens.tolist()):
            if self.finish_reason:
                return
            self.tokens.append(token)
            if self.logprobs is not None and logprobs is not None:
                self.logprobs.append(float(logprobs[n]))
            if token in self.eos or (self.decoder is not None and self._extend(self.decoder.push([token]))):
                self.finish_reason = "stop"
            elif len(self.tokens) == max_new_tokens:
                self.finish_reason = "length"

    def _extend(self, new: str) -> bool:
        """Appends text; cuts it and returns true where a stop string is in it."""
        before = len(self.text)
        self.text += new
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text, self.cut = self.text[: min(found)], True
        return self.cut

    def ready_text(self) -> str:
        """Text that no later token can take back: what might be the beginning of a stop string is held."""
        held = 0
        for stop in self.stop:
            sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
            held = max(held, next((size for size in sizes if self.text.endswith(stop[:size])), 0))
        return self.text[: len(self.text) - held]

    def completion(self) -> Completion:
        """The finished completion."""
        text: str | None = None
        if self.decoder is not None:
            text = self.text if self.cut else self.text + self.decoder.flush()
        elif self.tokenizer is not None:
            body = self.tokens[:-1] if self.tokens[-1] in self.eos else self.tokens
            text = self.tokenizer.decode(body, skip_special_tokens=True)
        return Completion(self.prompt, self.tokens, text, self.finish_reason, self.logprobs)


def vocab_limit(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """The number of ids that are tokens; those from there to the end of the embedding are padding.

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


def encode(prompt: str | Sequence[int], i: int, tokenizer: Tokenizer | None, limit: int) -> list[int]:
    """Token ids of prompt number i.

    Raises:
      InputError: empty, text without a tokenizer, or ids that are not below the limit.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(f"Prompt {i} is text, but there is no tokenizer. Give token ids.")
        ids = tokenizer.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputError(f"Prompt {i} is empty. Give at least one token.")
    wrong = [token for token in ids if not 0 <= token < limit]
    if wrong:
        raise InputError(f"Prompt {i} has token id {wrong[0]}; ids must be in [0, {limit}).")
    return ids


def check_lengths(config: ModelConfig, longest_prompt: int, max_new_tokens: int) -> None:
    """Raises InputError if prompt and new tokens do not fit the model's context."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if longest_prompt + max_new_tokens > config.context_length:
        raise InputError(
            f"A prompt of {longest_prompt} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{config.context_length} tokens. Shorten the prompt or lower max_new_tokens."
        )


def check_stop(stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
    """Raises InputError if stop strings cannot be looked for."""
    if stop and tokenizer is None:
        raise InputError("Stop strings need a tokenizer.")
    if any(not text for text in stop):
        raise InputError("A stop string must not be empty.")


def _bucket(size: int, smallest: int) -> int:
    """The next length that programs are compiled for: powers of two, and from 512 on quarter steps between them."""
    power = max(smallest, 1 << (size - 1).bit_length())
    if power <= 512:
        return power
    step = power // 8
    return -(-size // step) * step
