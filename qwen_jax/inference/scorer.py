"""Scores texts with a reward model, in packed rows."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.prompts import Ids, check_ids
from qwen_jax.inference.row_packing import RowPacker
from qwen_jax.kernels import Implementation, packed_mask
from qwen_jax.options import Options
from qwen_jax.parallel.placing import place
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind


def check_scores(config: ModelConfig) -> None:
    """Raises InputError for a language model, which has no score head."""
    if config.score is None:
        raise InputError(
            "This is a language model, which has no score head. Give a reward model (config.json names "
            "Qwen2ForSequenceClassification or Qwen2ForRewardModel); `qwen-jax train reward` makes one."
        )


class Scorer:
    """A reward model on a mesh, ready to score.

    Texts share rows as segments that do not see one another, and a text's score is that at its own last token, which
    is known by its place: token ids play no part, and padding may have any.
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
    ):
        """
        Args:
          config: the architecture, with a score head.
          params: on the mesh, stacked or not; not changed.
          mesh: from `make_mesh`, without a context axis.
          dtype: compute dtype: bfloat16, float32 or float16.
          attention: which kernel; see `kernels.attention`.
          tokens_per_batch: tokens of all rows that are run at a time; a longer text is a batch of its own.

        Raises:
          InputError: a language model, or a mesh that does not fit the model.
        """
        check_scores(config)
        if tokens_per_batch < 1:
            raise InputError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
        self.config, self.params, self.mesh, self.tokens_per_batch = config, params, mesh, tokens_per_batch
        self._sharding = Sharding.for_inference(config, mesh)
        stacked = not isinstance(params["layers"], (list, tuple))
        self._options = Options(stacked=stacked, dtype=dtype, attention=attention)

    def score(self, texts: Sequence[Ids], *, stopped: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Scores texts.

        Args:
          texts: token ids of each, such as a whole conversation with its last `<|im_end|>`.
          stopped: asked before each batch; once it is true, the rest is not read.

        Returns:
          Float32 [texts], in order. A score does not depend on the other texts, up to rounding.

        Raises:
          InputError: a text without tokens, longer than the model's context, or with an id out of range; or a score
            that is not finite.
          concurrent.futures.CancelledError: `stopped` became true.
        """
        ids = [np.asarray(check_ids(x, f"text {i}", self.config.vocab_size), np.int32) for i, x in enumerate(texts)]
        for i, x in enumerate(ids):
            if not 0 < len(x) <= self.config.context_length:
                raise InputError(
                    f"Text {i} has {len(x)} tokens; expected 1 to {self.config.context_length}, the model's context."
                )
        scores = np.zeros(len(ids), np.float32)
        # Dual-chunk attention scales the queries of a row by its longest text: there a row has one text.
        alone, shards = self.config.dual_chunk is not None, self._sharding.batch_shards
        for rows, length in RowPacker(list(map(len, ids)), shards=shards, tokens=self.tokens_per_batch, alone=alone):
            if stopped():
                raise CancelledError
            for i, score in self._run(ids, rows, length):
                if not np.isfinite(score):
                    raise InputError(
                        f"The score of text {i} is not finite. The weights hold NaN or infinity, or a number "
                        "overflowed float16: check the checkpoint (qwen-jax verify), or use bfloat16 or float32."
                    )
                scores[i] = score
        return scores

    def _run(self, ids: list[np.ndarray], rows: list[list[int]], length: int) -> list[tuple[int, float]]:
        """The index and the score of each text of a batch."""
        tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
        last: list[tuple[int, int, int]] = []
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row, 1):
                where = r, slice(at, at + len(ids[i]))
                tokens[where], positions[where], segments[where] = ids[i], np.arange(len(ids[i])), number
                at += len(ids[i])
                last.append((i, r, at - 1))
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(self._precision):
            on_mesh = NamedSharding(self.mesh, self._sharding.tokens)
            placed = place((tokens, positions, segments), on_mesh)
            scores_BT = np.asarray(_scores(self.config, self._sharding, self._options, self.params, *placed))
        return [(i, float(scores_BT[r, t])) for i, r, t in last]

    @property
    def _precision(self) -> str:
        """Products in float32 are exact, also on hardware that would round their operands."""
        return "highest" if self._options.dtype == "float32" else "default"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
    config: ModelConfig,
    sharding: Sharding,
    options: Options,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """Float32 scores [B, T] at every token, on every device."""
    arrays = tokens_BT, positions_BT, packed_mask(segment_ids_BT), segment_ids_BT > 0
    tokens, positions, mask, valid = jax.tree.map(lambda x: jax.reshard(x, sharding.tokens), arrays)
    model = bind(config, params, sharding, options)
    return jax.reshard(model.scores(model(tokens, positions, mask, valid_BT=valid).hidden), P())
