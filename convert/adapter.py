"""LoRA adapters in PEFT's format: reading, writing, and merging into the weights of a checkpoint.

The format (huggingface.co/docs/peft, "PEFT checkpoint format"): `adapter_config.json`, and `adapter_model.safetensors`
with `base_model.model.NAME.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] for each adapted `NAME.weight`
[out, in]. Modules that are trained whole have `base_model.model.NAME.weight`. Beside them we write, and read where it
is, a `generation_config.json` with the ids that end a text: a base model does not end where the turns of a chat do.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.folder import new_folder
from convert.names import EMBED, LM_HEAD, Leaf, leaves, score_head
from convert.safetensors import DTYPES, SINGLE, Entry, Writer, read_header, read_rows
from convert.source import Source, Span, to_host
from qwen_jax import hub
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference.settings import add_end_ids
from qwen_jax.lora import TARGETS, WHOLE, AdapterFactors, LoRA, check_whole
from qwen_jax.params import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]*)=(.+)")
_MATRIX = re.compile(r"(.+)\.lora_([AB])(\.default)?\.weight")
# Settings of PEFT that change what an adapter computes, with the only values that are supported.
_FIXED: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices"), (None, [], {})),
    "alora_invocation_tokens": (None, []),
    **dict.fromkeys(("velora_config", "kasa_config", "monteclora_config", "arrow_config"), (None,)),
}
# Initialisations that change the base weights too, so that the adapter does not fit the original ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Attributes:
      folder: where it is stored.
      config: the architecture of the model with it: that of the base, with a score head if the adapter has one, and
        with the end ids of the adapter's generation_config.json before its own.
      lora: its settings. `whole` lists only the parts that training can train whole.
      matrices: A and B in their files, by the Hugging Face name of the weight.
      whole: tensors that replace those of the model, by name.
    """

    folder: Path
    config: ModelConfig
    lora: LoRA
    matrices: Mapping[str, tuple[Entry, Entry]]
    whole: Mapping[str, Entry]


def read_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Opens an adapter folder of PEFT and checks it against a model, without reading the matrices.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors, or a Hub id.
      config: of the base model. A language model becomes a reward model if the adapter has a score head.

    Raises:
      InputError: no such folder, a failed download, a damaged file, another kind of adapter than plain LoRA, or modules
        or shapes that the model does not have.
    """
    folder = hub.adapter_folder(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Expected an adapter folder with {CONFIG} and {WEIGHTS}.")
    settings = read_json(folder / CONFIG)
    _check_settings(folder / CONFIG, settings)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when loaded; it is not read. Save it with "
            "PEFT where you trust it: model.save_pretrained(..., safe_serialization=True)."
        )
    base = settings.get("base_model_name_or_path")
    where = f"{folder / WEIGHTS} (an adapter of {base})" if base else str(folder / WEIGHTS)
    # Sort the tensors into matrices and whole modules.
    found: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    tensors = dict(read_header(folder / WEIGHTS))
    if config.score is None:
        config = dataclasses.replace(config, score=score_head([key.removeprefix(_PREFIX) for key in tensors]))
    # What the adapter was trained to end texts with comes first.
    own = add_end_ids(dataclasses.replace(config, eos_token_ids=()), folder).eos_token_ids
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys([*own, *config.eos_token_ids])))
    adapted, everything = _adapted(config), {name: leaf for leaf in leaves(config) for name in leaf.names}
    if config.tie_word_embeddings and config.score is None:
        _check_tied(where, settings, tensors)
    for key, entry in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _MATRIX.fullmatch(name)
        weight = f"{match[1]}.weight" if match else name
        if key == name or (weight not in adapted if match else name not in everything):
            raise InputError(
                f"{where}: {key} is no tensor of an adapter for this model, which has {config.num_layers} layers. "
                + (
                    "Routed experts cannot have LoRA; adapt attention and the shared expert."
                    if ".experts." in name
                    else f"Only {', '.join(TARGETS)} projections, and whole modules, can be adapted."
                )
                + " Check that the adapter belongs to this base model; if it does, merge it with PEFT "
                "(merge_and_unload) and use the merged model."
            )
        if entry.code not in DTYPES:
            raise InputError(f"{where}: {key} has dtype {entry.code}; expected one of {', '.join(DTYPES)}.")
        if match:
            found.setdefault(weight, {})[match[2]] = entry
        else:
            whole[name] = entry
    # Shapes.
    rank = settings["r"]
    for weight, pair in found.items():
        out, inputs = adapted[weight].hf_shape
        for part, shape in (("A", (rank, inputs)), ("B", (out, rank))):
            if part not in pair:
                raise InputError(f"{where} lacks lora_{part} of {weight}. The adapter is incomplete; save it again.")
            _check_shape(where, f"lora_{part} of {weight}", pair[part], shape)
    for name, entry in whole.items():
        _check_shape(where, name, entry, everything[name].hf_shape)
    if not found:
        raise InputError(f"{where} holds no LoRA matrices. Expected {_PREFIX}model.layers.0.*.lora_A.weight.")
    _check_complete(where, settings, found, adapted)
    lora = LoRA(
        rank,
        float(settings["lora_alpha"]),
        tuple(name for name in TARGETS if any(adapted[weight].path[-2] == name for weight in found)),
        bool(settings.get("use_rslora")),
        tuple(dict.fromkeys(everything[name].path[0] for name in whole if not everything[name].layers)),
    )
    return Adapter(folder, config, lora, {weight: (pair["A"], pair["B"]) for weight, pair in found.items()}, whole)


def _adapted(config: ModelConfig) -> dict[str, Leaf]:
    """The weights that can have LoRA, by their Hugging Face names."""
    return {
        name: leaf
        for leaf in leaves(config)
        if leaf.layers and leaf.path[-1] == "weight" and leaf.path[-2] in TARGETS
        for name in leaf.names
    }


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuses what is not plain LoRA."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file} has peft_type {kind!r}; only 'LORA' adapters can be read.")
    for name, allowed in _FIXED.items():
        if settings.get(name) not in allowed:
            raise InputError(
                f"{file} has {name}={settings[name]!r}, which is not supported; expected {allowed[0]!r}. Merge the "
                "adapter with PEFT (merge_and_unload) and use the merged model."
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{file} has init_lora_weights={start!r}: training changed the base weights too. Convert it to plain LoRA "
            "with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{file} has r={rank!r}; expected the rank, a positive integer.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"{file} has lora_alpha={alpha!r}; expected a positive number.")


def _check_tied(where: str, settings: Mapping[str, Any], tensors: dict[str, Entry]) -> None:
    """Refuses an adapter that unties the head from the embedding, and drops the head of one that keeps them equal.

    PEFT copies a module that it trains whole: if the embedding is one, the head stays what it was, unless
    `ensure_weight_tying` gives it the copy too. Both are then in the file.
    """
    embed, head = f"{_PREFIX}{EMBED}", f"{_PREFIX}{LM_HEAD}"
    if embed not in tensors and head not in tensors:
        return
    if not (settings.get("ensure_weight_tying") and embed in tensors):
        only = "head" if embed not in tensors else "embedding"
        raise InputError(
            f"{where} replaces the {only} (modules_to_save) of a model whose head is its embedding "
            "(tie_word_embeddings), which gives them different weights. Expected the same for both: train the adapter "
            "with ensure_weight_tying=True in PEFT's LoraConfig."
        )
    tensors.pop(head, None)


def _check_shape(where: str, what: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise InputError(
            f"{where}: {what} has shape {list(entry.shape)}, the model and adapter_config.json need {list(shape)}. The "
            "adapter is for another base model."
        )


def _check_complete(
    where: str, settings: Mapping[str, Any], found: Mapping[str, Any], adapted: Mapping[str, Leaf]
) -> None:
    """Refuses an adapter that lacks a module that its settings name."""
    targets = settings.get("target_modules")
    some_layers = settings.get("layers_to_transform") not in (None, [])
    if not isinstance(targets, list) or some_layers or settings.get("exclude_modules"):
        return
    for weight in adapted:
        module = weight.removesuffix(".weight")
        named = any(module == target or module.endswith(f".{target}") for target in targets)
        if named and weight not in found:
            raise InputError(f"{where} lacks the matrices of {module}, which target_modules names. Save it again.")


def _read(entry: Entry) -> np.ndarray:
    """A tensor, as float32."""
    out = np.empty(entry.shape, entry.dtype)
    with entry.file.open("rb") as file:
        read_rows(file.fileno(), entry, slice(0, entry.shape[0]), out)
    return out.astype(np.float32)


class MergedSource:
    """A checkpoint with an adapter merged into its weights, as a `Source`.

    `read` gives the sum W + scale B A in float32, which the reader rounds to the dtype that it wants: by default
    that of W, and for a new score head that of the embedding.
    """

    def __init__(self, source: Source, adapter: Adapter) -> None:
        """
        Args:
          source: the base model.
          adapter: of `read_adapter`, for the config of the source.
        """
        self.config, self.workers, self.folder = adapter.config, source.workers, source.folder
        self._source, self._adapter = source, adapter
        self._changed = adapter.matrices.keys() | adapter.whole.keys()
        self._new_head = source.config.score is None and adapter.config.score is not None

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._source.dtype(leaves(self.config)[0] if self._is_new(leaf) else leaf)

    def _is_new(self, leaf: Leaf) -> bool:
        """Whether the source lacks a leaf."""
        return self._new_head and leaf.path[0] == "score"

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return None if self._changed & set(leaf.names[tensors]) else self._source.spans(leaf, tensors, rows)

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        if self._is_new(leaf):
            data = np.empty((len(leaf.names[tensors]), rows.stop - rows.start, *leaf.shape[1:]), np.float32)
        else:
            data = self._source.read(leaf, tensors, rows)
        if not self._changed & set(leaf.names[tensors]):
            return data
        data, per_row = data.astype(np.float32), leaf.hf_shape[0] // leaf.shape[0]
        hf_rows = slice(rows.start * per_row, rows.stop * per_row)
        for name, part in zip(leaf.names[tensors], data, strict=True):
            if name in self._adapter.whole:
                part[...] = _read(self._adapter.whole[name])[hf_rows].reshape(part.shape)
            elif name in self._adapter.matrices:
                a, b = map(_read, self._adapter.matrices[name])
                part += (np.float32(self._adapter.lora.scale) * (b[hf_rows] @ a)).reshape(part.shape)
        return data


def adapter_params(adapter: Adapter) -> Params:
    """What an adapter trains, as float32 NumPy arrays in the tree of trained parameters (stacked layers).

    Args:
      adapter: of `read_adapter`.

    Raises:
      InputError: it adapts a projection in some layers only, or replaces a module of a layer.
    """
    params: Params = {}
    for leaf in leaves(adapter.config):
        if leaf.layers and (replaced := [name for name in leaf.names if name in adapter.whole]):
            raise InputError(
                f"{adapter.folder} replaces {replaced[0]} as a whole (modules_to_save). Such an adapter can be merged, "
                f"but not trained further: of modules, only {', '.join(WHOLE)} can be trained whole."
            )
        if any(name in adapter.whole for name in leaf.names):
            _put(params, leaf.path, _read(adapter.whole[leaf.names[0]]).reshape(leaf.shape))
        if not any(name in adapter.matrices for name in leaf.names):
            continue
        missing = [name for name in leaf.names if name not in adapter.matrices]
        if missing:
            raise InputError(
                f"{adapter.folder} adapts {leaf.names[0].split('.')[-2]} in some layers only; it lacks {missing[0]}. "
                "Such an adapter can be merged, but not trained further."
            )
        pairs = [tuple(map(_read, adapter.matrices[name])) for name in leaf.names]
        for name, part in (("lora_a", 0), ("lora_b", 1)):
            _put(
                params,
                (*leaf.path[:-1], name),
                np.stack([pair[part].reshape(_shapes(leaf, adapter.lora.rank)[part]) for pair in pairs]),
            )
    return params


def load_factors(folder: str | os.PathLike[str], config: ModelConfig) -> AdapterFactors:
    """Reads the matrices of an adapter for an engine in which each request chooses its adapter.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      config: of the base model.

    Raises:
      InputError: as `read_adapter`, or an adapter with modules that are trained whole.
    """
    adapter = read_adapter(folder, config)
    if adapter.whole:
        raise InputError(
            f"{folder} replaces {next(iter(adapter.whole))} as a whole (modules_to_save), which single requests "
            f"cannot. Merge it instead: qwen-jax convert --merge-adapter {folder} MODEL OUT."
        )
    layers: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    adapted = _adapted(config)
    for name, matrices in adapter.matrices.items():
        leaf, (a, b) = adapted[name], map(_read, matrices)
        shape_a, shape_b = _shapes(leaf, adapter.lora.rank)
        scaled = np.float32(adapter.lora.scale) * b
        layer = layers.setdefault(leaf.layers[leaf.names.index(name)], {})
        layer[leaf.path[-2]] = a.reshape(shape_a), scaled.reshape(shape_b)
    return AdapterFactors(adapter.lora.rank, layers)


def adapter_folders(pairs: Sequence[str]) -> dict[str, Path]:
    """The folders of adapters by name, from the texts of a command line.

    Args:
      pairs: NAME=DIR of each, such as "french=runs/french/model"; a Hub id is downloaded.

    Raises:
      InputError: not of that form, a name that is given twice, no such folder, or a failed download.
    """
    folders: dict[str, Path] = {}
    for pair in pairs:
        match = _PAIR.fullmatch(pair)
        if match is None:
            raise InputError(
                "Expected an adapter as NAME=DIR, such as french=runs/french/model, with a name of letters, digits and "
                f"any of . _ / -; got {pair!r}."
            )
        name, folder = match[1], hub.adapter_folder(match[2])
        if name in folders:
            raise InputError(f"Two adapters have the name {name!r}. Give each a name of its own.")
        if not folder.is_dir():
            raise InputError(f"The adapter folder {folder} does not exist.")
        folders[name] = folder
    return folders


def load_adapters(folders: Mapping[str, Path], config: ModelConfig) -> dict[str, AdapterFactors]:
    """Reads adapters, for `ContinuousEngine`.

    Args:
      folders: by the name that requests give, such as from `adapter_folders`.
      config: of the base model.

    Raises:
      InputError: as `load_factors`.
    """
    return {name: load_factors(folder, config) for name, folder in folders.items()}


def _put(tree: Params, path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _shapes(leaf: Leaf, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of one layer as parameters: heads are an axis of their own."""
    outputs = 1
    while math.prod(leaf.shape[:outputs]) < leaf.hf_shape[0]:
        outputs += 1
    return (rank, *leaf.shape[outputs:]), (*leaf.shape[:outputs], rank)


def write_adapter(
    folder: str | os.PathLike[str],
    params: Params,
    config: ModelConfig,
    lora: LoRA,
    base: str | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Writes an adapter folder that PEFT loads. After a failure nothing is left of it.

    Args:
      folder: the new folder; must not exist or be empty.
      params: what was trained, stacked, on any mesh: `TrainState.params` of a run with LoRA. Where several processes
        hold the shards, all of them must call this; process 0 writes.
      config: of the base model.
      lora: its settings.
      base: the folder or Hub id of the base model, which PEFT loads it with.
      end_ids: ids that end a text, which go into generation_config.json; by default the adapter does not say.

    Raises:
      InputError: the destination exists, the disk is too small, parameters are missing, or the model lacks a part that
        is trained whole.
    """
    check_whole(lora, config)
    tied = config.tie_word_embeddings and config.score is None
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for leaf in leaves(config):
        value: Any = params
        for key in leaf.path[:-1]:
            value = value.get(key, {})
        module_names = [name.removesuffix(".weight") for name in leaf.names]
        if leaf.path[0] in lora.whole:
            if leaf.path[-1] not in value:
                raise InputError(f"The parameters lack {'.'.join(leaf.path)}, which LoRA's `whole` names.")
            tensors[_PREFIX + leaf.names[0]] = to_host(value[leaf.path[-1]]).reshape(leaf.hf_shape)
            if leaf.path[0] == "embed" and tied:  # PEFT wants the head too.
                tensors[_PREFIX + LM_HEAD] = tensors[_PREFIX + leaf.names[0]]
        if leaf.path[-1] != "weight" or "lora_a" not in value:
            continue
        out, inputs = leaf.hf_shape
        a, b = (to_host(value[name]) for name in ("lora_a", "lora_b"))
        for i, module in enumerate(module_names):
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a[i].reshape(lora.rank, inputs)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b[i].reshape(out, lora.rank)
        # Beside routed experts, the last part of a name would match theirs.
        within = module_names[0].split(".", 3)[3]
        modules.append(within if config.moe is not None and within.startswith("mlp.") else within.split(".")[-1])
    if not modules:
        raise InputError("The parameters hold no LoRA matrices. Expected those of a run with LoRA.")
    if jax.process_index() != 0:
        return
    saved = {"embed": "embed_tokens", "norm": "model.norm"}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if "score" in lora.whole else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(set(modules)),
        "modules_to_save": [saved.get(name, name) for name in lora.whole] or None,
        "ensure_weight_tying": tied and "embed" in lora.whole,
        "use_rslora": lora.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with new_folder(Path(folder), sum(x.nbytes for x in tensors.values())) as temporary:
        with Writer(temporary, {name: (x.dtype, x.shape) for name, x in tensors.items()}, math.inf) as writer:
            for name, x in tensors.items():
                writer.write(name, 0, x)
        os.rename(temporary / SINGLE, temporary / WEIGHTS)
        files = {CONFIG: settings, **({"generation_config.json": {"eos_token_id": list(end_ids)}} if end_ids else {})}
        for name, content in files.items():
            (temporary / name).write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
