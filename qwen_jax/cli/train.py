"""`qwen-jax quickstart` and `qwen-jax train`: training from the command line."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.cli.common import parse, sibling
from qwen_jax.cli.formats import CheckpointFormats as _Formats
from qwen_jax.cli.model import Model, Running, Sampling

if TYPE_CHECKING:
    from qwen_jax.tokenizer import Tokenizer


def quickstart(argv: Sequence[str]) -> int:
    """Runs `train.quickstart`. It does not import conversion and generation: they are passed to it."""
    module = sibling("train.quickstart")
    options = parse(module.QuickstartOptions, "quickstart", argv)
    huggingface = sibling("convert.huggingface")

    def export(params: Any, config: Any, tokenizer: "Tokenizer", folder: Path) -> None:
        huggingface.export(params, config, folder)
        tokenizer.save(folder)

    def verify_export(params: Any, config: Any, folder: Path) -> int:
        import jax
        import numpy as np

        from qwen_jax.parallel.sharding import make_mesh

        back = sibling("convert").load_params(folder, config, make_mesh({}, jax.devices()[:1]))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True)
        if not all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
            raise RuntimeError(f"The export in {folder} differs from the trained weights.")
        return sum(len(leaf.names) for leaf in sibling("convert.names").leaves(config))

    def complete(folder: Path, prompts: Sequence[str], max_new_tokens: int) -> Iterable[Iterable[str]]:
        # With greedy sampling, such a small model would soon repeat itself.
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.9, seed=options.seed)
        model = Model(str(folder), sampling, Running(), need_tokenizer=True)
        engine = model.engine()
        for prompt in prompts:
            stream = engine.stream(prompt, model.sampling, max_new_tokens=max_new_tokens)
            yield (piece.text for piece in stream)

    module.run(options, export=export, verify_export=verify_export, complete=complete)
    return 0


def pretrain(argv: Sequence[str]) -> int:
    """Runs `train.run`. It does not import conversion: the export is passed to it."""

    def export(params: Any, config: Any, origin: Path, folder: Path) -> None:
        sibling("convert.huggingface").export(params, config, folder, extra_files_from=origin)

    return _until_interrupted(lambda: sibling("train.run").main(argv, export))


def sft(argv: Sequence[str]) -> int:
    """Runs `train.tune` for supervised fine-tuning."""
    return _tune("sft", argv)


def reward(argv: Sequence[str]) -> int:
    """Runs `train.tune` for a reward model."""
    return _tune("reward", argv)


def dpo(argv: Sequence[str]) -> int:
    """Runs `train.tune` for DPO."""
    return _tune("dpo", argv)


def grpo(argv: Sequence[str]) -> int:
    """Runs `train.grpo_run` for reinforcement learning."""
    return _until_interrupted(lambda: sibling("train.grpo_command").main(argv, _Formats()))


def _tune(method: str, argv: Sequence[str]) -> int:
    return _until_interrupted(lambda: sibling("train.tune_command").main(method, argv, _Formats()))


def _until_interrupted(run: Callable[[], int]) -> int:
    interrupt = sibling("train.interrupt")
    try:
        return run()
    except interrupt.EndNow:
        # An ordinary exit would wait for a save in the background.
        print("qwen-jax: interrupted twice: ended without saving", file=sys.stderr, flush=True)
        os._exit(130)
