"""Runs packed documents on a mesh, and reads what a model answers to the questions on them."""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.prompts import check_generates, vocab_limit
from qwen_jax.inference.scorer import check_scores
from qwen_jax.inference.weights import fuse, is_fused
from qwen_jax.kernels import Implementation, Mask
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind
from qwen_jax.tokenizer import Tokenizer
from train.curate.scoring.prompt import Prompt
from train.curate.scoring.questions import Question, Reward, check_questions
from train.curate.scoring.rows import Batch, Packer

# Documents that are tokenised together, and batches whose results the host has not read yet.
_TOGETHER, _AHEAD = 256, 16


class NotFiniteError(InputError):
    """The scores of a document are not finite.

    Attributes:
      document: its index.
    """

    def __init__(self, document: int, name: str = ""):
        super().__init__(
            f"The scores of document {name or document} are not finite. The weights hold NaN or infinity, or a number "
            "overflowed float16: check the checkpoint (qwen-jax verify), or use bfloat16 or float32."
        )
        self.document = document


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """How documents are read.

    Attributes:
      max_tokens: tokens of a document that are read; the middle of a longer one is left out.
      row_tokens: length of a row; by default 8,192 on a GPU or TPU and 1,024 on a CPU, or more for long documents.
      batch_tokens: tokens of all rows that are run together; by default 32,768, on a CPU 4,096.
      dtype: to compute in: bfloat16, float32 or float16; by default bfloat16 on a GPU or TPU, float32 on a CPU.
      attention: which kernel; see `qwen_jax.kernels.attention`.

    Raises:
      InputError: a size below 1.
    """

    max_tokens: int = 2048
    row_tokens: int | None = None
    batch_tokens: int | None = None
    dtype: str | None = None
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "row_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    def compute_dtype(self) -> str:
        """The dtype on this machine."""
        return self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


@dataclasses.dataclass
class Work:
    """What was done, in sums.

    Attributes:
      documents: that were scored.
      empty: documents without text, which have no scores.
      cut: documents whose middle was left out.
      tokens: of documents, prompts and questions that were read.
      padding: places in rows that hold no token.
      mass: sum over documents of the probability, among all tokens, of the answers that were offered, the mean over
        questions. Far below 1 a document, the model does not answer what it is asked: it may be a base model.
      seconds: of it all.
    """

    documents: int = 0
    empty: int = 0
    cut: int = 0
    tokens: int = 0
    padding: int = 0
    mass: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Work") -> None:
        """Adds the work of another part."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def to_json(self) -> dict[str, float]:
        """Sums, rates and the share of padding."""
        seconds, slots = max(self.seconds, 1e-9), max(self.tokens + self.padding, 1)
        rates = {"documents_per_second": self.documents / seconds, "tokens_per_second": self.tokens / seconds}
        shares = {"padding_share": self.padding / slots, "answer_mass": self.mass / max(self.documents, 1)}
        return {**dataclasses.asdict(self), **rates, **shares}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answers about documents.

    Attributes:
      values: for each question float32 [documents, answers]: the log-probability of each answer among all tokens; of a
        reward model [documents, 1], the score. NaN for empty documents.
      tokens: int32 [documents], tokens of the document that were read; 0 if it is empty.
      cut: bool [documents], whether its middle was left out.
      work: what was done.
    """

    values: tuple[np.ndarray, ...]
    tokens: np.ndarray
    cut: np.ndarray
    work: Work


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the program depends on besides shapes. `answers`: ids; none for a reward model."""

    config: ModelConfig
    sharding: Sharding
    options: Options
    branches: bool
    answers: tuple[int, ...]


class DocumentReader:
    """An instruct model or a reward model on a mesh that answers questions on documents, without generation.

    An answer depends on its document alone, up to rounding: documents in a row do not see one another. In float32,
    log-probabilities agree within 1e-5, whatever the other documents are.

    Every process of a job must call it with the same documents.

    Attributes:
      prompt: makes ids.
      row_tokens, rows: the shape of a full batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        tokenizer: Tokenizer,
        questions: Sequence[Question],
        options: ScoringOptions = ScoringOptions(),
    ):
        """
        Args:
          config: the architecture.
          params: on the mesh. Unstacked ones are brought into the inference layout and consumed.
          mesh: from `make_mesh`, without a context axis.
          tokenizer: of the model.
          questions: what is asked.
          options: how documents are read.

        Raises:
          InputError: a model of another kind than the questions need, a tokenizer without the answers or a chat
            template, rows that do not hold a document with its questions, or a mesh that does not fit the model.
        """
        self.questions = check_questions(questions)
        rewards = isinstance(self.questions[0], Reward)
        (check_scores if rewards else check_generates)(config)
        vocab_limit(config, tokenizer)
        self.prompt = Prompt(tokenizer, self.questions, options.max_tokens)
        self.row_tokens, batch_tokens = _sizes(options, self.prompt, config)
        # The weights.
        self.mesh, self._sharding = mesh, Sharding.for_inference(config, mesh)
        stacked = not isinstance(params["layers"], (list, tuple))
        if not stacked and not is_fused(params):
            with jax.set_mesh(mesh):
                params = fuse(params, config, self._sharding)
        dtype = options.compute_dtype()
        layout = Options(stacked=stacked, fused=not stacked, dtype=dtype, attention=options.attention)
        self._params, self._precision = params, "highest" if dtype == "float32" else "default"
        # The program.
        ids = tuple(dict.fromkeys(id for answers in self.prompt.answers for id in answers))
        self._columns = [[ids.index(id) for id in answers] or [0] for answers in self.prompt.answers]
        self._static = _Static(config, self._sharding, layout, len(self.questions) > 1, ids)
        shards = self._sharding.batch_shards
        self.rows = max(batch_tokens // self.row_tokens // shards, 1) * shards

    def warm_up(self) -> int:
        """Compiles all programs, so that none is compiled later; returns how many there are."""
        packer = self._packer()
        for size in packer.sizes:
            packed, last = np.zeros((size, 6, self.row_tokens), np.int32), np.zeros((size, packer.answers), np.int32)
            jax.block_until_ready(self._run(packed, last))
        return len(packer.sizes)

    def read(self, texts: Sequence[str | None]) -> Answers:
        """Answers the questions on some documents.

        Args:
          texts: of documents. Those without any text have no answers.

        Raises:
          NotFiniteError: an answer is not finite.
        """
        begin, work = time.perf_counter(), Work()
        values = [np.full((len(texts), len(columns)), np.nan, np.float32) for columns in self._columns]
        tokens, cut = np.zeros(len(texts), np.int32), np.zeros(len(texts), bool)
        pending: collections.deque[tuple[Batch, jax.Array]] = collections.deque()

        # Batches are put into a queue of the device, and results are read some batches later: the host tokenises and
        # packs while the device computes.
        def finish(left: int) -> None:
            while len(pending) > left:
                bad = self._store(*pending.popleft(), values)
                if bad:
                    raise NotFiniteError(self._broken(texts, bad))

        for batch in self._batches(texts, tokens, cut):
            pending.append((batch, self._run(batch.packed, batch.last)))
            work.tokens += batch.tokens
            work.padding += batch.packed.shape[0] * self.row_tokens - batch.tokens
            finish(_AHEAD)
        finish(0)

        work.documents, work.cut = int((tokens > 0).sum()), int(cut.sum())
        work.empty = len(texts) - work.documents
        work.mass = float(work.documents)
        if self._static.answers:
            work.mass = float(np.mean([np.exp(value[tokens > 0].astype(np.float64)).sum() for value in values]))
        work.seconds = time.perf_counter() - begin
        return Answers(tuple(values), tokens, cut, work)

    def _packer(self) -> Packer:
        return Packer(self.prompt, self.row_tokens, self.rows, self._sharding.batch_shards)

    def _batches(self, texts: Sequence[str | None], tokens: np.ndarray, cut: np.ndarray) -> Iterator[Batch]:
        """All batches. Notes how many tokens each document has, and whether it is cut."""
        packer = self._packer()
        there = [i for i, text in enumerate(texts) if text is not None and text.strip()]
        for start in range(0, len(there), _TOGETHER):
            some = there[start : start + _TOGETHER]
            for i, document in zip(some, self.prompt.documents([texts[i] or "" for i in some]), strict=True):
                tokens[i], cut[i] = len(document.ids), document.cut
                yield from packer.add(i, document.ids)
        yield from packer.flush()

    def _run(self, packed_BXT: np.ndarray, last_BM: np.ndarray) -> jax.Array:
        on = self._sharding.rows
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(self._precision):
            placed = [
                jax.device_put(x, NamedSharding(self.mesh, P(*on, *(None,) * (x.ndim - 1))))
                for x in (packed_BXT, last_BM)
            ]
            result: jax.Array = _answer(self._static, self._params, *placed)
        return result

    def _store(self, batch: Batch, result: jax.Array, values: Sequence[np.ndarray]) -> list[int]:
        """Takes the answers of a batch; returns the documents whose answers are not finite."""
        found_BMA = np.asarray(result)
        bad = (batch.document >= 0) & ~np.isfinite(found_BMA).all(axis=2)
        for q, columns in enumerate(self._columns):
            here = (batch.document >= 0) & (batch.question == q)
            values[q][batch.document[here]] = found_BMA[here][:, columns]
        return sorted({int(i) for i in batch.document[bad]})

    def _broken(self, texts: Sequence[str | None], candidates: Sequence[int]) -> int:
        """The first of some documents that has no finite answers by itself.

        Attention multiplies what is not seen by zero, so that NaN spreads to the other documents of a row.
        """
        for i in candidates:
            packer = self._packer()
            list(packer.add(i, self.prompt.documents([texts[i] or ""])[0].ids))
            if any(not np.isfinite(self._run(b.packed, b.last)[0, 0]).all() for b in packer.flush()):
                return i
        return candidates[0]


def _sizes(options: ScoringOptions, prompt: Prompt, config: ModelConfig) -> tuple[int, int]:
    """The length of a row, and the tokens of a batch."""
    cpu = jax.default_backend() == "cpu"
    needed = prompt.longest
    if prompt.longest_text > config.context_length:
        raise InputError(
            f"A document of {options.max_tokens} tokens with the prompt and a question has {prompt.longest_text} "
            f"tokens, and the context of the model is {config.context_length}. Read less of each document (max_tokens)."
        )
    row = options.row_tokens
    if row is None:
        # Rows of several documents have little padding. A CPU computes the attention of whole rows, of all pairs.
        row = 1024 if cpu else 8192
        while row < (needed if cpu else 3 * needed):
            row *= 2
    if row < needed:
        raise InputError(
            f"Rows of {row} tokens do not hold a document of {options.max_tokens} tokens with the prompt and all "
            f"questions, {needed} tokens. Give longer rows (row_tokens), or read less of each document (max_tokens)."
        )
    if config.dual_chunk is not None and row > config.dual_chunk.chunk_len:
        raise InputError(
            f"Rows of {row} tokens are longer than a chunk of dual-chunk attention ({config.dual_chunk.chunk_len}), "
            "which sees a row as one text. Give shorter rows (row_tokens)."
        )
    return row, options.batch_tokens or (4096 if cpu else 32_768)


@functools.partial(jax.jit, static_argnums=0)
def _answer(static: _Static, params: Params, packed_BXT: jax.Array, last_BM: jax.Array) -> jax.Array:
    """Float32 on every device: log-probabilities [B, M, answers], or the scores [B, M, 1] of a reward model."""
    sharding = static.sharding
    model = bind(static.config, params, sharding, static.options)

    # Rows to hidden states.
    tokens, positions, *bounds = (packed_BXT[:, i] for i in range(6))
    shared, own = Mask(bounds[0], bounds[1]), Mask(bounds[2], bounds[3])
    valid_BT = shared.k_start_BT < shared.k_end_BT
    mask = (shared, own) if static.branches else shared
    hidden_BTD = model(tokens, positions, mask, valid_BT=valid_BT).hidden

    # Those that an answer follows.
    wide = P(*sharding.rows, None, None)

    @jax.shard_map(in_specs=(wide, P(*sharding.rows, None)), out_specs=wide)
    def at_last(x_BTD: jax.Array, last_BM: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTD, last_BM[:, :, None], axis=1)

    x_BMD = at_last(hidden_BTD, last_BM)
    if not static.answers:
        return jax.reshard(model.scores(x_BMD), P())[:, :, None]

    @jax.shard_map(in_specs=wide, out_specs=wide)
    def log_probabilities(logits_BMV: jax.Array) -> jax.Array:
        chosen_BMA = logits_BMV[:, :, np.array(static.answers)]
        return chosen_BMA - jax.nn.logsumexp(logits_BMV, axis=2, keepdims=True)

    return jax.reshard(log_probabilities(jax.reshard(model.logits(x_BMD), wide)), P())
