"""What commands that run a model share: options, checks before the weights are loaded, and the engine."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, DType, Number, Texts, given, sibling
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from qwen_jax.attention.sparse import PooledBlocks, VerticalSlash
    from qwen_jax.config import ModelConfig
    from qwen_jax.inference import ContinuousEngine, Engine, SamplingParams
    from qwen_jax.tokenizer import Tokenizer


# The values of `qwen_jax.kernels.Implementation`, which takes seconds to import.
Kernel = Literal["auto", "gpu", "cudnn", "tpu", "xla", "reference"]
# The values of `qwen_jax.attention.quantized_cache.KVDtype`, likewise.
KVDtype = Literal["auto", "int8", "fp8"]
Pattern = Literal["dense", "vertical-slash", "pooled"]
IdLists = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="1,2,3")]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Values that are not given come from the checkpoint's generation_config.json.

    Args:
        max_new_tokens: At most this many new tokens.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the K most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: Makes tokens that have occurred less likely; 1 is none.
        seed: Of the random numbers. generate uses SEED + i for prompt i, by default 0 + i; chat uses SEED + i for
            turn i, by default a new seed each turn.
        stop: Strings that end a text; they are cut off.
        stop_token_ids: Further token ids that end a text; may be given several times.
        ignore_eos: Let only --stop, --stop-token-ids and the length end a text.
    """

    max_new_tokens: Count = None
    temperature: Number = None
    top_k: Count = None
    top_p: Number = None
    min_p: Number = None
    repetition_penalty: Number = None
    seed: Count = None
    stop: Texts = ()
    stop_token_ids: IdLists = ()
    ignore_eos: bool = False

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """Returns the defaults, replaced where the command line has a value. Raises InputError for a wrong value."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(defaults, **values)

    def check(self) -> None:
        """Raises InputError for values that are wrong for any checkpoint."""
        from qwen_jax.inference import SamplingParams

        self.resolve(SamplingParams())
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if "" in self.stop:
            raise InputError("A stop string must not be empty.")
        self.stop_ids()

    def stop_ids(self) -> list[int]:
        """The ids of --stop-token-ids. Raises InputError for something else than ids."""
        return [i for text in self.stop_token_ids for i in parse_ids(text)]


@dataclasses.dataclass(frozen=True)
class Running:
    """How a model is run.

    Args:
        dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
        mesh: Devices to spread over, such as tensor=2.
        adapter: LoRA folder of PEFT, or Hub id. It is merged into the weights as they are loaded: summed in float32,
            then rounded.
        attention: Keys that long prompts attend to: all (dense), columns and diagonals (vertical-slash), or blocks with
            large means (pooled). New tokens always attend to all keys.
        sparse_from: Length of prompts in tokens from which --attention is not dense.
        sparsity_file: Budgets of vertical-slash for each head; by default the file sparse_attention_config.json of the
            checkpoint.
        attention_kernel: Kernel that computes attention; auto takes the best one here.
        kv_dtype: int8 and fp8 hold keys and values in 8 bits, half the memory; auto in the dtype to compute in.
        w8a8: Round activations to the int8 or float8 of the weights in steps of 64 tokens or more, one scale a token.
        rope_scaling: Longer texts than those of training by YaRN, such as yarn:4 for four times the length.
        dual_chunk: Four times the length of training by dual-chunk attention; short texts are as before.
        trained_length: Length of training in tokens, for these two; by default the model's max_position_embeddings.
        prefill_chunk: Longer prompts are read this many tokens at a time.
    """

    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    attention: Pattern = "dense"
    sparse_from: Annotated[int, tyro.conf.arg(metavar="N")] = 65_536
    sparsity_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    attention_kernel: Kernel = "auto"
    kv_dtype: KVDtype = "auto"
    w8a8: bool = False
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="yarn:FACTOR")] = None
    dual_chunk: bool = False
    trained_length: Count = None
    prefill_chunk: Annotated[int, tyro.conf.arg(metavar="N")] = 32768

    def extended(self, config: "ModelConfig") -> "ModelConfig":
        """The model's config with the context extension asked for. Raises InputError where it is not defined."""
        if self.rope_scaling is not None:
            config = config.with_rope_scaling(self.rope_scaling, self.trained_length)
        return config.with_dual_chunk(trained_length=self.trained_length) if self.dual_chunk else config

    def pattern(self, folder: Path, config: "ModelConfig") -> "VerticalSlash | PooledBlocks | None":
        """The pattern of --attention. Raises InputError for a sparsity file of another model."""
        if self.attention == "dense":
            return None
        from qwen_jax.attention.sparse import FILE_NAME, PooledBlocks, VerticalSlash

        if self.attention == "pooled":
            return PooledBlocks()
        file = folder / FILE_NAME if self.sparsity_file is None else Path(self.sparsity_file)
        if self.sparsity_file is None and not file.is_file():
            return VerticalSlash.default(config)
        return VerticalSlash.from_file(file, config)

    def check(self) -> None:
        """Raises InputError for values that are wrong for any checkpoint."""
        if self.prefill_chunk < 1:
            raise InputError(f"--prefill-chunk must be at least 1, got {self.prefill_chunk}.")
        if self.sparse_from < 0:
            raise InputError(f"--sparse-from must be at least 0, got {self.sparse_from}.")
        if self.attention == "dense" and given(self, "sparse_from"):
            raise InputError("--sparse-from needs --attention vertical-slash or pooled.")
        if self.rope_scaling is not None and self.dual_chunk:
            raise InputError("--rope-scaling and --dual-chunk together are not defined. Give one of them.")
        if self.sparsity_file is not None and self.attention != "vertical-slash":
            raise InputError("--sparsity-file needs --attention vertical-slash.")
        if self.attention != "dense" and self.prefill_chunk % 128:
            raise InputError(
                f"--attention {self.attention} needs a --prefill-chunk that is a multiple of 128, got "
                f"{self.prefill_chunk}."
            )
        if self.trained_length is not None and self.rope_scaling is None and not self.dual_chunk:
            raise InputError("--trained-length needs --rope-scaling or --dual-chunk.")


class Model:
    """A checkpoint's small files, read and checked before its weights are downloaded or loaded.

    Args:
      name: a folder or a Hub id.
      sampling: how tokens are sampled, from the command line.
      running: how the model is run, from the command line.
      need_tokenizer: whether a checkpoint without a tokenizer is an error.
      also_ends: names of tokens that end a text, too, where the vocabulary has them.

    Raises:
      InputError: a wrong option, an unsupported model, damaged files, or options that do not fit the model.
    """

    def __init__(
        self, name: str, sampling: Sampling, running: Running, need_tokenizer: bool, also_ends: Sequence[str] = ()
    ):
        # Options that are wrong for any checkpoint.
        sampling.check()
        running.check()
        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, adapter_folder, is_hub_id, resolve
        from qwen_jax.inference import load_generation_defaults
        from qwen_jax.inference import prompts as checks
        from qwen_jax.inference.settings import add_end_ids
        from qwen_jax.parallel.sharding import Sharding, make_mesh, parse_mesh

        self.options, self.running = sampling, running
        self.mesh = make_mesh(parse_mesh(running.mesh))
        # The small files.
        self.folder = resolve(name, SMALL)
        self.checkpoint: str | Path = name if is_hub_id(name) else self.folder
        self.config = running.extended(load_config(self.folder))
        if running.w8a8 and not sibling("convert").is_quantized(self.folder):
            self.config.with_w8a8()  # Refuses it.
        checks.check_generates(self.config)
        self.defaults = load_generation_defaults(self.folder, self.config)
        self.tokenizer = self._tokenizer(need_tokenizer)
        # Options that must fit this checkpoint.
        self.sampling = sampling.resolve(self.defaults.sampling)
        self.pattern = running.pattern(self.folder, self.config)
        Sharding.for_inference(self.config, self.mesh)
        self.vocab_limit = checks.vocab_limit(self.config, self.tokenizer)
        self.stop = checks.check_stop(sampling.stop, self.tokenizer)
        ends = list(checks.check_ids(sampling.stop_ids(), "--stop-token-ids", self.config.vocab_size))
        if not sampling.ignore_eos:
            config = dataclasses.replace(self.config, eos_token_ids=self.defaults.eos_token_ids)
            if running.adapter is not None:
                config = add_end_ids(config, adapter_folder(running.adapter))
            ends += checks.default_eos(config, self.tokenizer)
            if self.tokenizer is not None:
                ends += [i for i in map(self.tokenizer.token_to_id, also_ends) if i is not None]
        self.eos_token_ids = tuple(dict.fromkeys(ends))

    def _tokenizer(self, needed: bool) -> "Tokenizer | None":
        from qwen_jax.gguf.header import is_gguf, read_header
        from qwen_jax.hub import has_vocabulary
        from qwen_jax.tokenizer import load_tokenizer
        from qwen_jax.tokenizer.gguf import has_tokenizer

        in_file = is_gguf(self.folder) and has_tokenizer(read_header(self.folder))
        if not needed and not in_file and not has_vocabulary(self.folder):
            return None
        return load_tokenizer(self.folder)

    def new_tokens(self, longest_prompt: int) -> int:
        """How many new tokens: as given; otherwise the checkpoint's default, at most what the context leaves.

        Raises:
          InputError: prompt and new tokens do not fit the context.
        """
        from qwen_jax.inference.prompts import check_lengths

        wanted = self.options.max_new_tokens
        if wanted is None:
            wanted = self.defaults.new_tokens(longest_prompt, self.config.context_length)
        check_lengths(self.config, longest_prompt, wanted)
        return wanted

    def loaded(self) -> tuple["ModelConfig", Any, str]:
        """The config, the weights and the dtype; downloads them first if the model is a Hub id."""
        enable_compilation_cache()
        if self.running.w8a8:
            sibling("convert").open_source(self.checkpoint).config.with_w8a8()  # Refuses it before weights are read.
        config, params = sibling("convert").load(self.checkpoint, self.mesh, self.dtype, adapter=self.running.adapter)
        config = self.running.extended(config)
        return config.with_w8a8() if self.running.w8a8 else config, params, self.dtype

    @property
    def dtype(self) -> str:
        """The compute dtype. The default depends on the machine: that of the model, or float32 on a CPU."""
        import jax

        return self.running.dtype or ("float32" if jax.default_backend() == "cpu" else self.config.dtype)

    def continuous_engine(self, max_seqs: int) -> "ContinuousEngine":
        """Loads the weights into an engine of many requests.

        Args:
          max_seqs: requests that run at the same time.
        """
        from qwen_jax.inference import ContinuousEngine

        config, params, dtype = self.loaded()
        return ContinuousEngine(
            config,
            params,
            self.mesh,
            tokenizer=self.tokenizer,
            dtype=dtype,
            max_seqs=max_seqs,
            attention=self.running.attention_kernel,
            kv_dtype=self.running.kv_dtype,
            eos_token_ids=self.eos_token_ids,
        )

    def engine(self) -> "Engine":
        """Loads the weights into an engine of one batch at a time."""
        from qwen_jax.inference import Engine

        config, params, dtype = self.loaded()
        engine = Engine(
            config,
            params,
            self.mesh,
            tokenizer=self.tokenizer,
            dtype=dtype,
            prefill_chunk=self.running.prefill_chunk,
            attention=self.running.attention_kernel,
            kv_dtype=self.running.kv_dtype,
            sparse=self.pattern,
            sparse_from=self.running.sparse_from,
            eos_token_ids=self.eos_token_ids,
        )
        engine.on_chunk = PromptProgress()
        return engine


class PromptProgress:
    """A progress bar on standard error for prompts that are read in chunks: tokens, tokens/s and time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._start = 0.0

    def __call__(self, read: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            title, speed = TextColumn("reading the prompt"), TextColumn("{task.description}")
            columns = title, BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._start = time.perf_counter()
            self._bar.start()
        rate = f"{read / (time.perf_counter() - self._start):,.0f} tokens/s" if read else ""
        self._bar.update(self._bar.task_ids[0], completed=read, description=rate)
        if read >= total:
            self._bar.stop()
            self._bar = None


def enable_compilation_cache() -> None:
    """Keeps the compiled programs of accelerators on disk, unless the user has chosen a folder already."""
    import jax

    if jax.default_backend() == "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "qwen_jax" / "compiled"))


def parse_ids(text: str) -> list[int]:
    """Token ids from text such as 1,2,3. Raises InputError for something else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"Expected token ids such as 1,2,3; got {text!r}.") from None
