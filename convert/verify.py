"""Compares two checkpoints of any format, or one with transformers, by their logits; reward models by their scores."""

import dataclasses
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import convert
from convert import numpy_model
from convert.dequantize import DequantizedSource
from convert.huggingface import export
from convert.names import leaves
from convert.placement import place
from convert.source import Source
from qwen_jax import kernels
from qwen_jax.config import DualChunk, ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.hub import CONFIG, resolve
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind


class CouldNotCompareError(InputError):
    """There is no meaningful comparison: the vocabularies differ, or transformers is not installed."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The largest differences that still count as equal.

    Attributes:
      max_relative: largest difference of a logit over the largest logit.
      kl: mean Kullback-Leibler divergence of the next-token distributions, in nats.
      top1: least fraction of positions with the same most likely token.
    """

    max_relative: float
    kl: float
    top1: float


# Everything is computed in float32. If both sides store the same dtype, they must hold the same weights, and only the
# order of additions may differ. Otherwise the coarser dtype has rounded the weights: half a unit in the last place is a
# relative error of 2^-9 for bfloat16 and of 2^-12 for float16, and it grows about tenfold through the layers.
EXACT = Tolerance(max_relative=1e-4, kl=1e-6, top1=0.99)
ROUNDED = {
    "bfloat16": Tolerance(max_relative=5e-2, kl=1e-2, top1=0.85),
    "float16": Tolerance(max_relative=5e-3, kl=1e-4, top1=0.97),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a comparison.

    Attributes:
      passed: whether every figure is within tolerance.
      max_abs, max_relative: largest difference of a logit, absolute and over the largest logit of `a`.
      mean_kl, max_kl: KL(a || b) over positions, in nats.
      top1_agreement: fraction of positions with the same most likely token.
      positions: how many were compared.
      tolerance: the differences that were allowed.
      dtypes: in which the two sides store their weights; the coarsest one of each.
    """

    passed: bool
    max_abs: float
    max_relative: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    positions: int
    tolerance: Tolerance
    dtypes: tuple[str, str]

    @property
    def exit_code(self) -> int:
        """0 for a pass, 1 for a fail. (2 stands for a comparison that could not be made, which raises InputError.)"""
        return 0 if self.passed else 1

    def to_json(self) -> str:
        """The report as a JSON object. A figure that is not finite is null, and such a report has not passed."""
        return to_json(dataclasses.asdict(self))

    def __str__(self) -> str:
        t = self.tolerance
        return (
            f"{'PASS' if self.passed else 'FAIL'}: {self.positions} positions, {self.dtypes[0]} against "
            f"{self.dtypes[1]}\n"
            f"  largest difference  {self.max_abs:.3g} absolute, {self.max_relative:.3g} relative "
            f"(allowed {t.max_relative:g})\n"
            f"  KL divergence       {self.mean_kl:.3g} mean (allowed {t.kl:g}), {self.max_kl:.3g} largest\n"
            f"  same top token      {self.top1_agreement:.2%} (needed {t.top1:.0%})"
        )


def compare(a_BTV: np.ndarray, b_BTV: np.ndarray, dtypes: tuple[str, str]) -> Report:
    """Compares two sets of logits.

    Args:
      a_BTV, b_BTV: float32 [batch, length, vocabulary], for the same tokens; `a` is the reference.
      dtypes: in which the weights of the two are stored; decides the tolerance.
    """
    tolerance = EXACT if dtypes[0] == dtypes[1] else ROUNDED["bfloat16" if "bfloat16" in dtypes else "float16"]
    max_abs = float(np.abs(a_BTV - b_BTV).max())
    max_relative = max_abs / max(float(np.abs(a_BTV).max()), 1e-30)
    kl = []
    for a_V, b_V in zip(a_BTV.reshape(-1, a_BTV.shape[-1]), b_BTV.reshape(-1, b_BTV.shape[-1]), strict=True):
        log_a, log_b = _log_softmax(a_V), _log_softmax(b_V)
        kl.append(float((np.exp(log_a) * (log_a - log_b)).sum()))
    top1 = float((a_BTV.argmax(-1) == b_BTV.argmax(-1)).mean())
    mean_kl, max_kl = float(np.mean(kl)), float(np.max(kl))
    # A NaN makes each of these comparisons false, so it fails.
    passed = max_relative <= tolerance.max_relative and mean_kl <= tolerance.kl and top1 >= tolerance.top1
    return Report(passed, max_abs, max_relative, mean_kl, max_kl, top1, len(kl), tolerance, dtypes)


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    *,
    against: Literal["transformers", "numpy"] | None = None,
    tokens_BT: np.ndarray | None = None,
    seed: int = 0,
) -> Report:
    """Compares two checkpoints, or one with the same checkpoint in transformers. One model is in memory at a time.

    Args:
      a: a Hugging Face folder, an Orbax folder, or a Hub id; the reference. Quantised weights run as they are, with
        activations that are not rounded; the other side of `against` gets the values of their codes.
      b: the other checkpoint; None if `against` is given.
      against: "transformers" runs `a` there, on the CPU in float32 with eager attention, as the reference. "numpy" runs
        it in float64 NumPy (`convert.numpy_model`; dense models only). Where the model has dual-chunk attention, which
        no other framework runs, both then use chunks of 16 tokens, so that the text has several.
      tokens_BT: token ids to run; by default two rows of 64 pseudo-random ones.
      seed: of the pseudo-random tokens.

    Raises:
      CouldNotCompareError: the vocabularies differ, or transformers is not installed.
      InputError: a checkpoint that cannot be read.
    """
    if (b is None) == (against is None) or against not in (None, "transformers", "numpy"):
        raise InputError("Give a second checkpoint, or against='transformers' or 'numpy'; one of the two.")
    if against == "transformers":
        _need_transformers()
    # The configs first: of a Hub model they are small.
    configs = [load_config(resolve(name, CONFIG)) for name in (a, b) if name is not None]
    if configs[0].vocab_size != configs[-1].vocab_size:
        raise CouldNotCompareError(
            f"{a} has a vocabulary of {configs[0].vocab_size}, {b} of {configs[1].vocab_size}: "
            "their logits do not mean the same tokens."
        )
    if against == "numpy" and (configs[0].moe is not None or configs[0].yarn is not None):
        what = "experts" if configs[0].moe is not None else "YaRN"
        raise CouldNotCompareError(f"{a} has {what}, which the NumPy model has not. Compare with transformers.")
    source = convert.open_source(a)
    other = source if b is None else convert.open_source(b)
    if (source.config.score is None) != (other.config.score is None):
        raise CouldNotCompareError(f"One of {a} and {b} is a reward model, the other one a language model.")
    if tokens_BT is None:
        length = min(64, source.config.context_length, other.config.context_length)
        tokens_BT = np.random.default_rng(seed).integers(0, source.config.vocab_size, (2, length))
    if against == "transformers":
        theirs = _run_transformers(_full_precision(source), tokens_BT)
        return compare(theirs, _run(source, tokens_BT), (_dtype(source),) * 2)
    if against == "numpy":
        return compare(*_run_numpy(source, tokens_BT), (_dtype(source),) * 2)
    return compare(_run(source, tokens_BT), _run(other, tokens_BT), (_dtype(source), _dtype(other)))


def _dtype(source: Source) -> str:
    """The coarsest dtype of a checkpoint's weights."""
    found = {source.dtype(leaf).name for leaf in leaves(source.config) if leaf.stored is None}
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


def _full_precision(source: Source) -> Source:
    """The source with the values of quantised weights."""
    return source if source.config.quantization is None else DequantizedSource(source)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max()
    result: np.ndarray = x - np.log(np.exp(x).sum())
    return result


def _run(source: Source, tokens_BT: np.ndarray, config: ModelConfig | None = None) -> np.ndarray:
    """Float32 logits [B, T, V] of this implementation, on one device; with another config, if one is given."""
    mesh = make_mesh({}, jax.devices()[:1])
    # Fields that the forward pass does not read are left out: checkpoints of one architecture share a compilation.
    config = dataclasses.replace(config or source.config, dtype="float32", bos_token_id=None, eos_token_ids=())
    if config.quantization is not None:
        config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, activations="none"))
    sharding = Sharding.for_inference(config, mesh)
    params = place(source, mesh, "float32", Options(stacked=config.quantization is None))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        tokens = jax.device_put(tokens_BT.astype(np.int32), NamedSharding(mesh, sharding.tokens))
        return np.asarray(_logits(params, tokens, config, sharding))


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _logits(params: Params, tokens_BT: jax.Array, config: ModelConfig, sharding: Sharding) -> jax.Array:
    model = bind(config, params, sharding, Options(stacked=config.quantization is None))
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    positions, mask = jax.tree.map(
        lambda x: jax.reshard(x, sharding.tokens), (positions, kernels.causal_mask(*tokens_BT.shape))
    )
    hidden_BTD = model(tokens_BT, positions, mask).hidden
    return model.logits(hidden_BTD) if config.score is None else model.scores(hidden_BTD)[..., None]


def _run_numpy(source: Source, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [B, T, V] of the NumPy model and of this implementation, with short chunks if it has any."""
    config = source.config
    if config.dual_chunk is not None:
        config = dataclasses.replace(config, dual_chunk=DualChunk(24, 8, 24))
    ours = _run(source, tokens_BT, config)
    params = place(_full_precision(source), make_mesh({}, jax.devices()[:1]), "float32", Options(stacked=False))
    theirs = np.stack([numpy_model.logits(config, params, row) for row in tokens_BT])
    return theirs.astype(np.float32), ours


def _need_transformers() -> None:
    """Raises CouldNotCompareError where transformers or torch is not installed, without importing them."""
    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise CouldNotCompareError(
            f"Comparing with transformers needs {' and '.join(missing)}. pip install transformers torch."
        )


def _run_transformers(source: Source, tokens_BT: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of transformers; a checkpoint in another format is exported for it first.

    Of a reward model: the scores [B, T, 1] at every position, by a torch module on transformers' hidden states.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if source.config.score is not None:
        logging.set_verbosity_error()  # It would list the tensors of the score head as unexpected.
    tokens = torch.as_tensor(tokens_BT, dtype=torch.long)
    how: Any = {"dtype": torch.float32, "attn_implementation": "eager"}

    def logits(folder: Path) -> np.ndarray:
        with torch.no_grad():
            if source.config.score is None:
                out = AutoModelForCausalLM.from_pretrained(folder, **how).eval()(input_ids=tokens).logits
            else:
                hidden = AutoModel.from_pretrained(folder, **how).eval()(input_ids=tokens).last_hidden_state
                out = _torch_score_head(source)(hidden)
        result: np.ndarray = out.numpy()
        return result

    return _in_hf_format(source, logits)


def _torch_score_head(source: Source) -> Any:
    """The score head of a reward model as a float32 torch module."""
    import torch

    D = source.config.hidden_size
    heads = {
        "linear": lambda: torch.nn.Linear(D, 1, bias=False),
        "mlp": lambda: torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, 1)),
    }
    assert source.config.score is not None
    head = heads[source.config.score]()
    weights = {
        leaf.names[0].removeprefix("score."): torch.from_numpy(
            source.read(leaf, slice(0, 1), slice(0, leaf.shape[0]))[0].astype(np.float32)
        )
        for leaf in leaves(source.config)
        if leaf.path[0] == "score"
    }
    head.load_state_dict(weights)
    return head


def _in_hf_format(source: Source, use: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Calls a function with a Hugging Face folder of a checkpoint, temporary if it is in Orbax or was quantised."""
    assert source.folder is not None
    if convert.detect(source.folder) == "hf" and not isinstance(source, DequantizedSource):
        return use(source.folder)
    with tempfile.TemporaryDirectory(prefix="qwen-jax-verify-") as temporary:
        export(source, source.config, Path(temporary) / "hf", "float32")
        return use(Path(temporary) / "hf")
