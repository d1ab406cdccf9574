"""`qwen-jax generate` and `chat`: run a checkpoint."""

import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, DType, ModelOption, ModelPosition, Number, Texts, model_name, sibling
from qwen_jax.cli.failures import complain, explain
from qwen_jax.cli.lines import read_lines, read_text
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from qwen_jax.config import ModelConfig
    from qwen_jax.inference import Completion, Document, Engine, SamplingParams
    from qwen_jax.tokenizer import Tokenizer


# The values of `qwen_jax.kernels.Implementation`, which takes seconds to import.
Attention = Literal["auto", "gpu", "cudnn", "tpu", "xla", "reference"]
# Tokens of a conversation about a document.
_CONVERSATION = 16_384
IdLists = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="1,2,3")]
Message = dict[str, str]


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
        dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
        mesh: Devices to spread over, such as tensor=2.
        attention: Kernel that computes it; auto takes the best one here.
        rope_scaling: Longer texts than those of training by YaRN, such as yarn:4 for four times the length.
        dual_chunk: Four times the length of training by dual-chunk attention; short texts are as before.
        trained_length: Length of training in tokens, for these two; by default the model's max_position_embeddings.
        prefill_chunk: Longer prompts are read this many tokens at a time.
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
    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    attention: Attention = "auto"
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="yarn:FACTOR")] = None
    dual_chunk: bool = False
    trained_length: Count = None
    prefill_chunk: Annotated[int, tyro.conf.arg(metavar="N")] = 32768

    def extended(self, config: "ModelConfig") -> "ModelConfig":
        """The model's config with the context extension asked for. Raises InputError where it is not defined."""
        if self.rope_scaling is not None:
            config = config.with_rope_scaling(self.rope_scaling, self.trained_length)
        return config.with_dual_chunk(trained_length=self.trained_length) if self.dual_chunk else config

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """Returns the defaults, replaced where the command line has a value. Raises InputError for a wrong value."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(defaults, **given)

    def check(self) -> None:
        """Raises InputError for values that are wrong for any checkpoint."""
        from qwen_jax.inference import SamplingParams

        self.resolve(SamplingParams())
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if "" in self.stop:
            raise InputError("A stop string must not be empty.")
        if self.prefill_chunk < 1:
            raise InputError(f"--prefill-chunk must be at least 1, got {self.prefill_chunk}.")
        if self.rope_scaling is not None and self.dual_chunk:
            raise InputError("--rope-scaling and --dual-chunk together are not defined. Give one of them.")
        if self.trained_length is not None and self.rope_scaling is None and not self.dual_chunk:
            raise InputError("--trained-length needs --rope-scaling or --dual-chunk.")
        self.stop_ids()

    def stop_ids(self) -> list[int]:
        """The ids of --stop-token-ids. Raises InputError for something else than ids."""
        return [i for text in self.stop_token_ids for i in _parse_ids(text)]


class Model:
    """A checkpoint's small files, read and checked before its weights are downloaded or loaded.

    Args:
      name: a folder or a Hub id.
      options: from the command line.
      need_tokenizer: whether a checkpoint without a tokenizer is an error.
      also_ends: names of tokens that end a text, too, where the vocabulary has them.

    Raises:
      InputError: a wrong option, an unsupported model, damaged files, or options that do not fit the model.
    """

    def __init__(self, name: str, options: Sampling, need_tokenizer: bool, also_ends: Sequence[str] = ()):
        # Options that are wrong for any checkpoint.
        options.check()
        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, is_hub_id, resolve
        from qwen_jax.inference import load_generation_defaults
        from qwen_jax.inference import prompts as checks
        from qwen_jax.parallel.sharding import Sharding, make_mesh, parse_mesh

        self.options, self.mesh = options, make_mesh(parse_mesh(options.mesh))
        # The small files.
        self.folder = resolve(name, SMALL)
        self.checkpoint: str | Path = name if is_hub_id(name) else self.folder
        self.config = options.extended(load_config(self.folder))
        self.defaults = load_generation_defaults(self.folder, self.config)
        self.tokenizer = self._tokenizer(need_tokenizer)
        # Options that must fit this checkpoint.
        self.sampling = options.resolve(self.defaults.sampling)
        Sharding.for_inference(self.config, self.mesh)
        self.vocab_limit = checks.vocab_limit(self.config, self.tokenizer)
        self.stop = checks.check_stop(options.stop, self.tokenizer)
        ends = list(checks.check_ids(options.stop_ids(), "--stop-token-ids", self.config.vocab_size))
        if not options.ignore_eos:
            config = dataclasses.replace(self.config, eos_token_ids=self.defaults.eos_token_ids)
            ends += checks.default_eos(config, self.tokenizer)
            if self.tokenizer is not None:
                ends += [i for i in map(self.tokenizer.token_to_id, also_ends) if i is not None]
        self.eos_token_ids = tuple(dict.fromkeys(ends))

    def _tokenizer(self, needed: bool) -> "Tokenizer | None":
        from qwen_jax.tokenizer import load_tokenizer

        files = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")
        if not needed and not any((self.folder / name).is_file() for name in files):
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

    def engine(self) -> "Engine":
        """Loads the weights; downloads them first if the model is a Hub id."""
        import jax

        from qwen_jax.inference import Engine

        _enable_compilation_cache()
        default = "float32" if jax.default_backend() == "cpu" else self.config.dtype
        dtype = self.options.dtype or default
        config, params = sibling("convert").load(self.checkpoint, self.mesh, dtype)
        engine = Engine(
            self.options.extended(config),
            params,
            self.mesh,
            tokenizer=self.tokenizer,
            dtype=dtype,
            prefill_chunk=self.options.prefill_chunk,
            attention=self.options.attention,
            eos_token_ids=self.eos_token_ids,
        )
        engine.on_chunk = PromptProgress()
        return engine


class PromptProgress:
    """A progress bar on standard error for prompts that are read in chunks: tokens, tokens/s and time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, read: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            speed = TextColumn("{task.speed:,.0f} tokens/s")
            columns = TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=read)
        if read >= total:
            self._bar.stop()
            self._bar = None


def _enable_compilation_cache() -> None:
    """Keeps the compiled programs of accelerators on disk, unless the user has chosen a folder already."""
    import jax

    if jax.default_backend() == "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "qwen_jax" / "compiled"))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Complete prompts. Give --prompt, --prompt-file or --prompt-ids.

    A single prompt is completed as a stream. With --json, one object is printed for each prompt: prompt_token_ids,
    token_ids, text, finish_reason ("stop", "length" or "error"), logprobs, error. If a prompt ends with an error, the
    exit status is 1.

    Args:
        folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        model: The same, as an option.
        prompt: A text; may be given several times.
        prompt_file: A file of prompts; may be given several times; "-" is standard input.
        prompt_per: One prompt on each line of a prompt file, or the whole file as one prompt.
        prompt_ids: Token ids such as 1,2,3; may be given several times.
        logprobs: Also give each token's log-probability.
        json: Print JSON, one object a line.
        batch_size: Prompts to run at a time. Does not change the results.
        document: A text file that is read once; each prompt continues it.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    prompt: Texts = ()
    prompt_file: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    prompt_per: Literal["line", "file"] = "line"
    prompt_ids: IdLists = ()
    logprobs: bool = False
    json: bool = False
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    document: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None

    def run(self) -> int:
        # Everything that can be wrong is checked before the weights are loaded.
        name = model_name(self.folder, self.model)
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        prompts = self._prompts()
        model = Model(name, self.sampling, need_tokenizer=not self.prompt_ids)
        from qwen_jax.inference.prompts import encode

        ids = [encode(prompt, i, model.tokenizer, model.vocab_limit) for i, prompt in enumerate(prompts)]
        longest, document_ids = max(map(len, ids)), []
        if self.document is not None:
            text = _text_of_file(self.document, "document")
            document_ids = encode(text, 0, model.tokenizer, model.vocab_limit)
        new_tokens = model.new_tokens(len(document_ids) + longest)
        sampling = dataclasses.replace(model.sampling, logprobs=self.logprobs)
        engine = model.engine()
        document = engine.read(document_ids, room=longest + new_tokens) if document_ids else None
        how: dict[str, Any] = {"max_new_tokens": new_tokens, "stop": model.stop, "document": document}
        errors: list[str] = []
        # A single prompt, as a stream.
        if len(ids) == 1 and not self.json and not self.logprobs and model.tokenizer is not None:
            for piece in engine.stream(ids[0], sampling, **how):
                print(piece.text, end="", flush=True)
                if piece.completion is not None and piece.completion.error is not None:
                    errors.append(piece.completion.error)
            print()
        else:
            for start in range(0, len(ids), self.batch_size):
                part = ids[start : start + self.batch_size]
                seeded = dataclasses.replace(sampling, seed=(sampling.seed + start) % 2**32)
                completions = engine.generate(part, seeded, **how)
                for i, completion in enumerate(completions, start):
                    self._show(i, len(ids), completion)
                    if completion.error is not None:
                        errors.append(f"prompt {i}: {completion.error}" if len(ids) > 1 else completion.error)
        if errors:
            more = f" ({len(errors) - 1} more prompts ended with an error.)" if len(errors) > 1 else ""
            complain(errors[0] + more)
        return int(bool(errors))

    def _prompts(self) -> list[str | list[int]]:
        if sum(map(bool, (self.prompt, self.prompt_file, self.prompt_ids))) != 1:
            raise InputError("Give exactly one of --prompt, --prompt-file and --prompt-ids.")
        if self.prompt:
            return list(self.prompt)
        if self.prompt_ids:
            return [_parse_ids(text) for text in self.prompt_ids]
        return [prompt for name in self.prompt_file for prompt in _prompts_of_file(name, self.prompt_per)]

    def _show(self, i: int, total: int, completion: "Completion") -> None:
        if self.json:
            print(json.dumps(dataclasses.asdict(completion), allow_nan=False), flush=True)
            return
        if total > 1:
            print(f"--- prompt {i} ({completion.finish_reason}) ---")
        print(completion.text if completion.text is not None else ",".join(map(str, completion.token_ids)), flush=True)
        if completion.logprobs is not None:
            print("logprobs: " + " ".join(f"{x:.4f}" for x in completion.logprobs), flush=True)


def _bytes_of_file(name: str, what: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"The {what} file {path} does not exist.")
    return path.read_bytes()


def _text_of_file(name: str, what: str) -> str:
    text = read_text(_bytes_of_file(name, what), name)
    if not text:
        raise InputError(f"The {what} file {name} is empty.")
    return text


def _prompts_of_file(name: str, per: Literal["line", "file"]) -> list[str]:
    data = _bytes_of_file(name, "prompt")
    if per == "file":
        prompts = [read_text(data, name)]
    else:
        # Only "\n" ends a line: `splitlines` would split at a lone "\r", too.
        prompts = list(read_lines(data.removesuffix(b"\n").split(b"\n") if data else [], name))
    if not any(prompts):
        what = "one prompt on each line" if per == "line" else "a prompt"
        raise InputError(f"The prompt file {name} is empty. Expected {what}.")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise InputError(f"{name}, line {number} is empty. Expected one prompt on each line (--prompt-per file?).")
    return prompts


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"Expected token ids such as 1,2,3; got {text!r}.") from None


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk to a model. /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply.

    Args:
        folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        model: The same, as an option.
        system: System message; by default the chat template's own.
        document: A text file to talk about. It is read once, as a part of the system message.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    document: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None

    def run(self) -> int:
        name = model_name(self.folder, self.model)
        # The end-of-text id of a base checkpoint does not end a turn.
        model = Model(name, self.sampling, need_tokenizer=True, also_ends=["<|im_end|>"])
        assert model.tokenizer is not None
        parts = [] if self.system is None else [self.system]
        parts += [] if self.document is None else [_text_of_file(self.document, "document")]
        start = [{"role": "system", "content": "\n\n".join(parts)}] if parts else []
        # A template that fails, or refuses a system message, does so before the weights are loaded.
        model.tokenizer.encode_chat([*start, {"role": "user", "content": "Hello"}])
        engine = model.engine()
        document = None
        if self.document is not None:
            # What all conversations begin with is read once.
            shared = _common_prefix(
                *(model.tokenizer.encode_chat([*start, {"role": "user", "content": word}]) for word in ("Hello", "7"))
            )
            room = model.config.context_length - len(shared)
            document = engine.read(shared, room=min(room, _CONVERSATION))
        messages: list[Message] = list(start)
        failed = False
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            reply = self._reply(model, engine, messages, document)
            if reply is None:
                messages.pop()
                failed = True
            else:
                messages.append({"role": "assistant", "content": reply})
        # A user at a terminal has seen the error and gone on; a script sees only the status.
        return int(failed and not sys.stdin.isatty())

    def _reply(
        self, model: Model, engine: "Engine", messages: list[Message], document: "Document | None"
    ) -> str | None:
        """Streams one reply and returns it; None if it failed, for example because the context is full."""
        assert model.tokenizer is not None
        turn = sum(message["role"] == "assistant" for message in messages)
        seed = secrets.randbits(32) if self.sampling.seed is None else (self.sampling.seed + turn) % 2**32
        sampling = dataclasses.replace(model.sampling, seed=seed)
        pieces: list[str] = []
        try:
            ids = model.tokenizer.encode_chat(messages)
            new_tokens = model.new_tokens(len(ids))
            if document is not None:
                if ids[: len(document.tokens)] != document.tokens:
                    raise InputError("The chat template changes the beginning of a conversation. Use no --document.")
                ids = ids[len(document.tokens) :]
            how: dict[str, Any] = {"max_new_tokens": new_tokens, "stop": model.stop, "document": document}
            for piece in engine.stream(ids, sampling, **how):
                pieces.append(piece.text)
                print(piece.text, end="", flush=True)
                if piece.completion is not None and piece.completion.error is not None:
                    raise InputError(piece.completion.error)
        except Exception as error:
            problem = explain(error)
            if problem is None:
                raise
            if pieces:
                print(flush=True)
            complain(problem)
            print("/reset starts a new conversation.", file=sys.stderr)
            return None
        except KeyboardInterrupt:
            pass
        print()
        return "".join(pieces)


def _common_prefix(first: list[int], second: list[int]) -> list[int]:
    """The ids with which both begin."""
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return first[:length]


def _lines() -> Iterator[str]:
    """Lines of standard input: of a terminal in its own encoding, with a prompt; otherwise UTF-8."""
    if not sys.stdin.isatty():
        yield from read_lines(sys.stdin.buffer, "Standard input")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"That line is not {error.encoding}: {error.reason} at byte {error.start}.") from None
