"""Texts that a model writes while it is trained: what a loss does not show."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.lora import LoRA, merged
from qwen_jax.parallel.multihost import in_step
from qwen_jax.parallel.sharding import on_mesh, without_context
from qwen_jax.params import Params
from qwen_jax.stack import unstack
from qwen_jax.tokenizer import Tokenizer
from train.data.examples import Example
from train.files import append_record
from train.loop import failing_together

SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A held-out prompt.

    Attributes:
      ids: up to the first answer.
      answer: the answer in the data, as ids.
    """

    ids: list[int]
    answer: list[int]

    @classmethod
    def of(cls, example: Example) -> "Prompt":
        """The beginning of an example, up to its first trained token, and the trained stretch that follows."""
        trained = np.flatnonzero(example.trained)
        first = int(trained[0])
        untrained = np.flatnonzero(~example.trained[first:])
        end = first + int(untrained[0]) if len(untrained) else len(example.ids)
        return cls(example.ids[:first].tolist(), example.ids[first:end].tolist())


def write_samples(
    folder: Path,
    step: int,
    model: ModelConfig,
    params: Params,
    lora: LoRA | None,
    mesh: Mesh,
    dtype: str,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """Completes prompts greedily and appends the texts to `samples.jsonl`. All processes of a mesh call it together.

    While it writes, the weights exist a second time, in the compute dtype.

    Args:
      folder: of the run.
      step: of the weights.
      model: the architecture.
      params: all weights, stacked or not; they are kept.
      lora: whose update is in the weights' tree; None for none.
      mesh: of the weights. The devices of a context axis complete different prompts.
      dtype: compute dtype.
      tokenizer: of the model.
      prompts: what to complete.
      end_ids: ids that end a text.
      max_new_tokens: of each text.

    Returns:
      The texts.

    Raises:
      SharedError: process 0 cannot write them.
    """
    mesh = without_context(mesh)
    params = on_mesh(params, mesh)
    with jax.set_mesh(mesh):
        copied = _copied(params, lora, dtype, model.sparse_layers)
    engine = Engine(model, copied, mesh, tokenizer=tokenizer, dtype=dtype, eos_token_ids=list(end_ids))
    found = engine.generate([p.ids for p in prompts], SamplingParams(temperature=0), max_new_tokens=max_new_tokens)
    texts = [completion.text or "" for completion in found]
    with failing_together(), in_step(f"Writing {folder / SAMPLES}"):
        for prompt, completion, text in zip(prompts, found, texts, strict=True):
            record: dict[str, Any] = {
                "step": step,
                "prompt": tokenizer.decode(prompt.ids),
                "text": text,
                "finish_reason": completion.finish_reason,
                "answer": tokenizer.decode(prompt.answer),
            }
            if jax.process_index() == 0:
                append_record(folder / SAMPLES, record)
    return texts


# Jitted once for all evaluations.
@functools.partial(jax.jit, static_argnames=("lora", "dtype", "sparse_layers"))
def _copied(params: Params, lora: LoRA | None, dtype: str, sparse_layers: tuple[int, ...]) -> Params:
    """A copy of all weights in the layout that an engine takes over."""
    if lora is not None:
        params = merged(params, lora)
    layers = params["layers"]
    if isinstance(layers, dict):
        layers = unstack(layers, dtype, sparse_layers)
    # An output that is an input would be the same buffer.
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), {**params, "layers": layers})
