"""Log-probabilities of texts after others, in packed rows that read a common beginning once."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.prompts import check_generates
from qwen_jax.inference.row_packing import RowPacker
from qwen_jax.inference.shared_prefixes import Block, blocks
from qwen_jax.kernels import Implementation, Mask, packed_mask
from qwen_jax.options import Options
from qwen_jax.output_head import HeadContext, gathered_head, head_of, log_totals_of, over_chunks
from qwen_jax.parallel.placing import place
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind

# Logits of one device that exist at one time, at most: 1 GiB in float32.
_MAX_LOGITS = 2**28
# Rows are so long if there is enough text. Attention on CPUs computes all pairs of tokens of a row.
_ROW, _ROW_ON_CPU = 8192, 1024
# The fewest targets of a row that a program takes, and how many times more the next one takes.
_FEWEST_TARGETS, _TARGETS_STEP = 64, 4


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
      logprob: log-probability of its tokens, in nats.
      greedy: whether each of its tokens is the most likely one.
      tokens: how many they are.
    """

    logprob: float
    greedy: bool
    tokens: int


Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, at least one each."""


class LikelihoodScorer:
    """A language model on a mesh, ready to give log-probabilities of continuations.

    Pairs share rows as segments that do not see one another. Pairs whose tokens begin alike, such as the answers to a
    question or questions after the same solved examples, are read as one prefix and its continuations: these see the
    prefix and themselves. The output head sees the continuations' tokens alone, a chunk at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        dtype: str = "bfloat16",
        attention: Implementation = "auto",
        tokens_per_batch: int = 16_384,
        share_prefixes: bool = True,
    ):
        """
        Args:
          config: the architecture, with an output head.
          params: on the mesh, stacked or not, or in the layout of an engine; not changed.
          mesh: from `make_mesh`, without a context axis.
          dtype: compute dtype: bfloat16, float32 or float16.
          attention: which kernel; see `kernels.attention`.
          tokens_per_batch: tokens of all rows that are run at a time; a longer text is a batch of its own.
          share_prefixes: whether a common beginning is read once.

        Raises:
          InputError: a reward model, or a mesh that does not fit the model.
        """
        check_generates(config)
        if tokens_per_batch < 1:
            raise InputError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
        self.config, self.params, self.mesh, self.tokens_per_batch = config, params, mesh, tokens_per_batch
        self._sharding = Sharding.for_inference(config, mesh)
        layers = params["layers"]
        stacked = not isinstance(layers, (list, tuple))
        fused = not stacked and "qkv" in layers[0]["attention"]
        self._options = Options(stacked=stacked, fused=fused, dtype=dtype, attention=attention)
        # Dual-chunk attention scales the queries of a row by its longest text: there a row has one text.
        self._alone = config.dual_chunk is not None
        self._share = share_prefixes and not self._alone
        most = _MAX_LOGITS * self._sharding.tensor // config.vocab_size
        self._context = HeadContext(self._sharding, chunk=1 << max(most.bit_length() - 1, 0))
        row = _ROW_ON_CPU if mesh.devices.flat[0].platform == "cpu" else _ROW
        self._row = 1 << max(min(row, tokens_per_batch // self._sharding.batch_shards), 1).bit_length() - 1

    def score(self, pairs: Sequence[Pair], done: Callable[[int, Likelihood], None] | None = None) -> list[Likelihood]:
        """Log-probabilities of continuations.

        Args:
          pairs: token ids of contexts and continuations. The last token of a continuation is not read, so that both
            may have one token more than the model's context.
          done: called with the index of each pair and its result, as soon as it is there; the longest come first.

        Returns:
          For each pair, in order. A result does not depend on the other pairs, up to rounding.

        Raises:
          InputError: an empty context or continuation, ids out of range, more tokens than the model's context; or a
            log-probability that is not finite.
        """
        reads, targets = self._reads(pairs)
        found = blocks(reads, self._row) if self._share else [Block(0, [i], len(x)) for i, x in enumerate(reads)]
        shared = any(block.prefix for block in found)
        results: list[Likelihood | None] = [None] * len(pairs)

        def finish(batch: _Batch, scored: Any) -> None:
            log_probs_BN, greedy_BN = (np.asarray(x) for x in scored)
            for i, row, first in batch.places:
                at = slice(first, first + len(pairs[i][1]))
                logprob = float(log_probs_BN[row, at].sum(dtype=np.float64))
                if not np.isfinite(logprob):
                    raise InputError(
                        f"The log-probability of pair {i} is not finite. The weights hold NaN or infinity, or a number "
                        "overflowed float16: check the checkpoint (qwen-jax verify), or use bfloat16 or float32."
                    )
                result = Likelihood(logprob, bool(greedy_BN[row, at].all()), len(pairs[i][1]))
                results[i] = result
                if done is not None:
                    done(i, result)

        # The next batch is packed while the device runs this one.
        waiting: tuple[_Batch, Any] | None = None
        packer = RowPacker(
            [block.size for block in found],
            shards=self._sharding.batch_shards,
            tokens=self.tokens_per_batch,
            row=0 if self._alone else self._row,
            alone=self._alone,
        )
        for rows, length in packer:
            batch = _packed(reads, targets, [[found[i] for i in row] for row in rows], length, shared)
            started = batch, self._start(batch)
            if waiting is not None:
                finish(*waiting)
            waiting = started
        if waiting is not None:
            finish(*waiting)
        return [result for result in results if result is not None]

    def _reads(self, pairs: Sequence[Pair]) -> tuple[list[np.ndarray], list[list["_Target"]]]:
        """The different texts that are read, and which tokens of which pairs are looked up after each."""
        reads: list[np.ndarray] = []
        targets: list[list[_Target]] = []
        known: dict[bytes, int] = {}
        limit, longest = self.config.vocab_size, self.config.context_length
        for i, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise InputError(
                    f"Pair {i} has {len(context)} tokens of context and {len(continuation)} of continuation; expected "
                    "at least one each. Give the end-of-text token as an empty context."
                )
            ids = np.concatenate([np.asarray(context), np.asarray(continuation)])
            if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= limit:
                raise InputError(f"Pair {i} has something else than token ids in [0, {limit}).")
            if len(ids) > longest + 1:
                raise InputError(
                    f"Pair {i} has {len(ids)} tokens; expected at most {longest + 1}, the model's context and the last "
                    "token, which is not read. Cut the context from the left."
                )
            ids = ids.astype(np.int32)
            read = known.setdefault(ids[:-1].tobytes(), len(reads))
            if read == len(reads):
                reads.append(ids[:-1])
                targets.append([])
            targets[read].append(_Target(i, len(context) - 1, ids[len(context) :]))
        return reads, targets

    def _start(self, batch: "_Batch") -> Any:
        """Starts a batch: log-probabilities and whether they are the highest, [B, N] on every device."""
        exact = self._options.dtype == "float32"
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest" if exact else "default"):
            placed = place(batch.arrays, NamedSharding(self.mesh, self._sharding.tokens))
            return _likelihoods(self.config, self._context, self._options, self.params, *placed)


@dataclasses.dataclass(frozen=True)
class _Target:
    """Tokens of a pair whose log-probability is wanted: the first one after the token at `position` of a text."""

    pair: int
    position: int
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Packed rows.

    Attributes:
      arrays: int32 [B, T] each: ids, positions, segments, and with shared prefixes where the prefix of each token's
        segment begins and ends; then in a tuple [B, N] each: the places of the tokens that are followed by targets,
        -1 for none, and the targets.
      places: of each pair: its index, its row, and its first target in the row.
    """

    arrays: tuple[Any, ...]
    places: list[tuple[int, int, int]]


def _packed(
    reads: Sequence[np.ndarray],
    targets: Sequence[Sequence[_Target]],
    rows: Sequence[Sequence[Block]],
    length: int,
    shared: bool,
) -> _Batch:
    """Writes blocks into rows."""
    packed_KBT = np.zeros((5 if shared else 3, len(rows), length), np.int32)
    found = [list(_written(reads, targets, row, packed_KBT[:, r])) for r, row in enumerate(rows)]
    counts = [sum(len(target.tokens) for target, _ in row) for row in found]
    most = _FEWEST_TARGETS
    while most < max(counts):
        most *= _TARGETS_STEP
    index_BN, targets_BN = np.full((len(rows), most), -1, np.int32), np.zeros((len(rows), most), np.int32)
    places = []
    for r, row in enumerate(found):
        first = 0
        for target, where in row:
            at = slice(first, first + len(where))
            index_BN[r, at], targets_BN[r, at] = where, target.tokens
            places.append((target.pair, r, first))
            first = at.stop
    return _Batch((tuple(packed_KBT), index_BN, targets_BN), places)


def _written(
    reads: Sequence[np.ndarray], targets: Sequence[Sequence[_Target]], row: Sequence[Block], packed_KT: np.ndarray
) -> Iterator[tuple[_Target, np.ndarray]]:
    """Writes the blocks of a row, and yields each target with the places of the tokens that it follows."""
    at = segment = 0

    def write(ids: np.ndarray, position: int, prefix: tuple[int, int]) -> None:
        nonlocal at, segment
        segment += 1
        part_KT = packed_KT[:, at : at + len(ids)]
        part_KT[0], part_KT[1], part_KT[2] = ids, np.arange(position, position + len(ids)), segment
        if len(packed_KT) > 3:
            part_KT[3], part_KT[4] = prefix
        at += len(ids)

    for block in row:
        begin, shared = at, block.prefix
        if shared:
            write(reads[block.texts[0]][:shared], 0, (0, 0))
        for i in block.texts:
            first = at
            write(reads[i][shared:], shared, (begin, begin + shared))
            for target in targets[i]:
                positions = target.position + np.arange(len(target.tokens))
                yield target, np.where(positions < shared, begin + positions, first + positions - shared)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _likelihoods(
    config: ModelConfig,
    context: HeadContext,
    options: Options,
    params: Params,
    packed: tuple[jax.Array, ...],
    index_BN: jax.Array,
    targets_BN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets and whether each is the most likely token, [B, N], on every device."""
    s = context.sharding
    tokens_BT, positions_BT, segments_BT, *prefix = packed
    own = packed_mask(segments_BT)
    mask = jax.tree.map(lambda x: jax.reshard(x, s.tokens), (own, Mask(prefix[0], prefix[1])) if prefix else (own,))
    model = bind(config, params, s, options)
    hidden_BTD = model(tokens_BT, positions_BT, mask if prefix else mask[0], valid_BT=segments_BT > 0).hidden

    @jax.shard_map(in_specs=(s.hidden, s.vocab, s.tokens, s.tokens), out_specs=(s.tokens, s.tokens), check_vma=False)
    def local(
        hidden_BTD: jax.Array, head_vD: jax.Array, index_BN: jax.Array, targets_BN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        w_vD = gathered_head(head_vD, hidden_BTD.dtype)
        x_BND = jnp.take_along_axis(hidden_BTD, jnp.maximum(index_BN, 0)[:, :, None], axis=1)

        def body(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x_cD, targets_c = inputs
            _, _, log_total_c, picked_c, _, highest_c = log_totals_of(context, x_cD, w_vD, targets_c)
            return None, (picked_c - log_total_c, picked_c >= highest_c)

        _, found = over_chunks(body, None, (x_BND, targets_BN), context.chunk, index_BN >= 0)
        result: tuple[jax.Array, jax.Array] = found
        return result

    with jax.named_scope("likelihoods"):
        log_probs_BN, greedy_BN = local(hidden_BTD, head_of(model), index_BN, targets_BN)
        return jax.reshard(log_probs_BN, P()), jax.reshard(greedy_BN, P())
