"""`qwen-jax quickstart` and `qwen-jax train`: training from the command line."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.cli.common import parse, sibling
from qwen_jax.cli.model import Model, Running, Sampling

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.config import ModelConfig
    from qwen_jax.lora import LoRA
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


class _Formats:
    """`train.tuned.Formats` by `convert`, which `train` does not import."""

    def describe(self, path: str) -> tuple["ModelConfig", "Tokenizer", Path]:
        from qwen_jax.config import load_config
        from qwen_jax.hub import CONFIG, resolve
        from qwen_jax.inference.settings import add_end_ids
        from qwen_jax.tokenizer import load_tokenizer

        config = load_config(resolve(path, CONFIG))  # An unsupported model is refused before its weights are fetched.
        folder = resolve(path)
        if sibling("convert").is_quantized(folder):
            # The weights too say how.
            config = sibling("convert").open_source(folder).config
        return add_end_ids(config, folder), load_tokenizer(path), folder

    def load(self, path: str, config: "ModelConfig", mesh: "Mesh", dtype: str, stacked: bool = True) -> Any:
        from qwen_jax.options import Options

        return sibling("convert").load_params(path, config, mesh, dtype, Options(stacked=stacked))

    def fingerprint(self, path: str) -> str:
        import hashlib

        from qwen_jax.hub import resolve

        whole = hashlib.sha256()
        for file in sorted(p for p in resolve(path).rglob("*") if p.is_file()):
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()

    def write(self, params: Any, config: "ModelConfig", origin: Path, folder: Path) -> None:
        sibling("convert.huggingface").export(params, config, folder, extra_files_from=origin)

    def write_adapter(self, params: Any, config: "ModelConfig", lora: "LoRA", base: str, folder: Path) -> None:
        sibling("convert.adapter").write_adapter(folder, params, config, lora, base)


def _until_interrupted(run: Callable[[], int]) -> int:
    interrupt = sibling("train.interrupt")
    try:
        return run()
    except interrupt.EndNow:
        # An ordinary exit would wait for a save in the background.
        print("qwen-jax: interrupted twice: ended without saving", file=sys.stderr, flush=True)
        os._exit(130)
