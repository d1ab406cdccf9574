"""How `train` reads and writes checkpoints: by `convert`, which it does not import."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.cli.common import sibling

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.config import ModelConfig
    from qwen_jax.lora import LoRA
    from qwen_jax.tokenizer import Tokenizer


class CheckpointFormats:
    """`train.tuned.Formats` by `convert`. It holds nothing, and can be pickled."""

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
        place = resolve(path)
        # A GGUF file is a checkpoint by itself.
        for file in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()

    def write(self, params: Any, config: "ModelConfig", origin: Path, folder: Path) -> None:
        sibling("convert.huggingface").export(params, config, folder, extra_files_from=origin)

    def write_adapter(
        self, params: Any, config: "ModelConfig", lora: "LoRA", base: str, end_ids: Sequence[int], folder: Path
    ) -> None:
        sibling("convert.adapter").write_adapter(folder, params, config, lora, base, end_ids)


def hashes(name: str, adapter: str | None = None) -> dict[str, str | None]:
    """What a model is by its content, whatever its path: hashes of its files and of those of its adapter.

    Args:
      name: folder, file or Hub id of the model.
      adapter: folder or Hub id of the adapter; None for none.
    """
    from qwen_jax.hub import adapter_folder

    formats = CheckpointFormats()
    beside = None if adapter is None else formats.fingerprint(str(adapter_folder(adapter)))
    return {"weights": formats.fingerprint(name), "adapter": beside}
