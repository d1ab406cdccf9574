"""Reading and writing Hugging Face checkpoint folders: safetensors and config.json."""

import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from convert.names import (
    EMBED,
    HEADS,
    LM_HEAD,
    Leaf,
    check_names,
    in_fused,
    is_ignored,
    leaves,
    score_head,
    standard_names,
)
from convert.safetensors import DTYPES, Entry, Writer, read_folder, read_rows, row_offset
from convert.source import Source, Span, blocks
from convert.write import write_checkpoint
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.params import Params

_log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5e9  # The default of `save_pretrained` in transformers.


class SafetensorsSource:
    """A Hugging Face folder as a `Source`; all of it is checked before any weights are read."""

    workers = min(4, os.cpu_count() or 1)

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """
        Args:
          folder: with config.json and safetensors.
          config: by default that of the folder.

        Raises:
          InputError: files that are missing, damaged, or do not hold the tensors that the config describes.
        """
        self.folder: Path | None = Path(folder)
        self.config = config or load_config(folder)
        self._entries = self._find(Path(folder))
        self._check_head(Path(folder), given=config is not None)
        self._leaves = self._stored_leaves()
        if self.config.moe is not None:
            self._split_fused_experts(self._entries)
        self._check(Path(folder))
        self._files = _Files()
        if self.config.tie_word_embeddings and LM_HEAD in self._entries:
            self._compare_head()
        self._dtypes = {leaf: self._common_dtype(leaf) for leaf in self._leaves}

    def _find(self, folder: Path) -> dict[str, Entry]:
        """The tensors by their standard names."""
        tied = {EMBED, LM_HEAD} if self.config.tie_word_embeddings else set()

        def optional(name: str) -> bool:
            # A tied model may be saved with the embedding, with the head, or with both.
            full = name if name.startswith(("model.", *HEADS)) else f"model.{name}"
            return full in tied or is_ignored(full)

        found = read_folder(folder, optional)
        standard = standard_names(folder, found)
        entries = {standard[name]: entry for name, entry in found.items()}
        if tied and EMBED not in entries and LM_HEAD in entries:
            entries[EMBED] = entries.pop(LM_HEAD)
        return entries

    def _stored_leaves(self) -> tuple[Leaf, ...]:
        """The leaves whose tensors are in the files as they are."""
        return leaves(self.config)

    def _check_head(self, folder: Path, given: bool) -> None:
        """Tells the head of a reward model by its tensors, and leaves out an output head that it does not use.

        Args:
          folder: for messages.
          given: whether the caller gave the config, which then must be that of the weights.

        Raises:
          InputError: a reward model without its head, a head for several labels, or a head of another kind.
        """
        found, expected = score_head(self._entries), self.config.score
        if found is None and expected is not None:
            raise InputError(
                f"{folder} has no score head (score.weight, or score.0.weight to score.2.bias), which a reward model "
                "needs. Give a reward model; `qwen-jax train reward` makes one of a language model."
            )
        if found != expected and given:
            raise InputError(
                f"{folder} has {'a' if found == 'linear' else 'an'} {found} score head (ModelConfig.score), expected "
                f"{expected or 'a language model'}. Give another checkpoint, or the config of this one."
            )
        self.config = dataclasses.replace(self.config, score=found)
        if found is None:
            return
        last = self._entries.get("score.weight" if found == "linear" else "score.2.weight")
        if last is not None and last.shape[:1] != (1,):
            raise InputError(
                f"{folder} has a score head of {last.shape[0] if last.shape else 0} labels; expected one: a reward "
                "model gives one score. Classifiers and process reward models cannot be loaded."
            )
        if self._entries.pop(LM_HEAD, None) is not None:
            _log.warning("%s has an %s, which a reward model does not use; it is left out.", folder, LM_HEAD)

    def _split_fused_experts(self, entries: dict[str, Entry]) -> None:
        """Replaces tensors that hold all experts of a layer by the tensors of the single experts."""
        assert self.config.moe is not None
        moe, D = self.config.moe, self.config.hidden_size
        fused: set[str] = set()
        for name in [name for leaf in self._leaves for name in leaf.names if name not in entries]:
            found = in_fused(name)
            entry = entries.get(found[0]) if found else None
            if found is None or entry is None:
                continue
            expert, part, parts = found[1]
            rows, columns = (moe.intermediate_size, D) if parts == 2 else (D, moe.intermediate_size)
            if entry.shape != (moe.num_experts, parts * rows, columns):
                raise InputError(
                    f"{entry.file}: {found[0]} has shape {list(entry.shape)}, config.json asks for "
                    f"{[moe.num_experts, parts * rows, columns]}. Check that config.json belongs to these weights."
                )
            _check_dtype(found[0], entry)
            fused.add(found[0])
            entries[name] = entry.part((expert * parts + part) * rows, rows)
        for name in fused:
            del entries[name]

    def _check(self, folder: Path) -> None:
        """Compares names, shapes and dtypes with what the config describes."""
        expected = {name: leaf for leaf in self._leaves for name in leaf.names}
        # Buffers, and tensors without elements, hold nothing that the model needs.
        found = {
            name: entry
            for name, entry in self._entries.items()
            if name in expected or not (is_ignored(name) or 0 in entry.shape)
        }
        missing = [name for name in expected if name not in found]
        if missing == [LM_HEAD]:
            raise InputError(
                f"{folder} has no {LM_HEAD}, and config.json says tie_word_embeddings=false. If the head of this model "
                "is its embedding, set tie_word_embeddings to true in config.json; otherwise the checkpoint is "
                "incomplete."
            )
        tied_head = {LM_HEAD} if self.config.tie_word_embeddings else set()
        unknown = [name for name in found if name not in expected and name not in tied_head]
        check_names(folder, missing, unknown, self.config)
        shapes = {name: leaf.hf_shape for name, leaf in expected.items()}
        if tied_head & found.keys():
            shapes[LM_HEAD] = (self.config.vocab_size, self.config.hidden_size)
        empty = [name for name in shapes if 0 in found[name].shape]
        if empty:
            raise InputError(
                f"{folder} holds {len(empty)} tensors without elements where weights are expected: "
                f"{', '.join(empty[:3])}. DeepSpeed ZeRO-3 writes such files if the weights are not gathered: set "
                "stage3_gather_16bit_weights_on_model_save, or run its zero_to_fp32.py."
            )
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise InputError(
                    f"{found[name].file}: {name} has shape {list(found[name].shape)}, config.json asks for "
                    f"{list(shape)}. Check that config.json belongs to these weights."
                )
            _check_dtype(name, found[name])

    def _common_dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype of a leaf: the narrowest that holds the values of all of its tensors exactly."""
        by_dtype: dict[np.dtype, list[str]] = {}
        for name in leaf.names:
            by_dtype.setdefault(self._entries[name].dtype, []).append(name)
        if len(by_dtype) == 1:
            return next(iter(by_dtype))
        widest = np.dtype(np.float64 if np.dtype(np.float64) in by_dtype else np.float32)
        fewest = min(by_dtype, key=lambda dtype: (len(by_dtype[dtype]), -dtype.itemsize))
        _log.warning(
            "%s stores %s in %s, which differs from other layers; all layers of %s are read as %s.",
            self.folder, ", ".join(by_dtype[fewest][:3]), fewest.name, ".".join(leaf.path), widest.name,
        )  # fmt: skip
        return widest

    def _compare_head(self) -> None:
        """Refuses a tied checkpoint with a head of its own that differs from the embedding.

        transformers 4 and transformers 5 compute different logits with it.
        """
        embed = self._leaves[0]
        head = Leaf(("lm_head", "weight"), (LM_HEAD,), (), (), embed.shape, embed.hf_shape)
        # Where the two are stored in different dtypes, they need to agree after rounding only.
        coarsest = min((self._entries[name].dtype for name in (EMBED, LM_HEAD)), key=lambda dtype: dtype.itemsize)
        self._dtypes = {leaf: self._entries[leaf.names[0]].dtype for leaf in (embed, head)}
        for block in blocks(embed, coarsest.itemsize):
            ours, theirs = (self.read(leaf, *block).astype(coarsest, copy=False) for leaf in (embed, head))
            if ours.tobytes() != theirs.tobytes():
                raise InputError(
                    f"{self.folder} has tie_word_embeddings=true and an {LM_HEAD} that differs from {EMBED}: "
                    "transformers 4 computes logits with the embedding, transformers 5 with the head. Set "
                    "tie_word_embeddings to false in config.json to use the head, or remove it from the weights."
                )

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._dtypes[leaf]

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        names = leaf.names[tensors]
        out = np.empty((len(names), rows.stop - rows.start, *leaf.shape[1:]), self.dtype(leaf))
        hf_rows = _hf_rows(leaf, rows)
        for name, part in zip(names, out, strict=True):
            entry = self._entries[name]
            descriptor = self._files.descriptor(entry)
            if entry.dtype == out.dtype:
                read_rows(descriptor, entry, hf_rows, part)
            else:
                stored = np.empty(part.shape, entry.dtype)
                read_rows(descriptor, entry, hf_rows, stored)
                part[...] = stored
        return out

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        hf_rows = _hf_rows(leaf, rows)
        found = []
        for name in leaf.names[tensors]:
            entry = self._entries[name]
            if entry.dtype != self.dtype(leaf):
                return None
            start, stop = row_offset(entry, hf_rows.start), row_offset(entry, hf_rows.stop)
            found.append(Span(entry.file, start, stop - start))
        return found


def _check_dtype(name: str, entry: Entry) -> None:
    """Refuses a weight in a dtype that weights are not read from."""
    if entry.code not in DTYPES:
        raise InputError(
            f"{entry.file}: tensor {name} has dtype {entry.code!r}; expected one of {', '.join(DTYPES)}. If the "
            "weights are quantised, config.json lacks their quantization_config; fetch it from where they came from."
        )


def _hf_rows(leaf: Leaf, rows: slice) -> slice:
    """Rows of the Hugging Face tensor that hold given rows of the parameter: head_dim times as many for heads."""
    per_row = leaf.hf_shape[0] // leaf.shape[0]
    return slice(rows.start * per_row, rows.stop * per_row)


class _Files:
    """File descriptors, opened at first use and closed with this object."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._open)

    def descriptor(self, entry: Entry) -> int:
        if entry.file not in self._open:
            # Two threads may both open it: the first descriptor is kept, the other is closed.
            descriptor = os.open(entry.file, os.O_RDONLY)
            if self._open.setdefault(entry.file, descriptor) != descriptor:
                os.close(descriptor)
        return self._open[entry.file]


def _close_all(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class _Sink:
    """Writes blocks to their places in safetensors files."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        # The kernel serialises writes to a file anyway; a thread that waits here does not spin.
        self._lock = threading.Lock()

    def write(self, leaf: Leaf, tensors: slice, rows: slice, data: np.ndarray) -> None:
        with self._lock:
            for name, part in zip(leaf.names[tensors], data, strict=True):
                self._writer.write(name, rows.start * part[:1].nbytes, part)

    def receive(self, leaf: Leaf, tensors: slice, rows: slice, spans: list[Span]) -> None:
        with self._lock:
            for name, span in zip(leaf.names[tensors], spans, strict=True):
                descriptor, start = self._writer.place(name)
                span.copy_to(descriptor, start + rows.start * (span.nbytes // (rows.stop - rows.start)))


def export(
    params: Params | Source,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    extra_files_from: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers 4 and 5 load. After a failure nothing is left.

    Args:
      params: a parameter tree, stacked or not, on any mesh; or a `Source`. Where several processes hold the shards,
        all of them must call this; process 0 writes.
      config: the architecture.
      folder: the new folder; must not exist or be empty.
      dtype: of the written weights; by default that of the parameters.
      max_shard_bytes: a larger model is written in several files with an index.
      extra_files_from: folder from which tokenizer, generation config and config.json are copied; by default that of
        the source.
      progress: called with the number of bytes of each block written.

    Raises:
      InputError: the destination exists, the disk is too small, or the parameters do not fit the config.
    """

    @contextlib.contextmanager
    def open_sink(source: Source, target: np.dtype | None, temporary: Path) -> Iterator[_Sink]:
        named = ((name, leaf) for leaf in leaves(config) for name in leaf.names)
        tensors = {
            name: (target or source.dtype(leaf), leaf.hf_shape)
            for name, leaf in sorted(named, key=lambda x: name_order(x[0]))
        }
        with Writer(temporary, tensors, max_shard_bytes) as writer:
            yield _Sink(writer)

    write_checkpoint(params, config, folder, dtype, extra_files_from, progress, open_sink, both_dialects=True)


def name_order(name: str) -> tuple[int, int]:
    """Sorts tensors as the model runs: embedding, layers, norm, head."""
    parts = name.split(".")
    if parts[1] == "layers":
        return 1, int(parts[2])
    return (0, 0) if parts[1] == "embed_tokens" else (2, 0)
