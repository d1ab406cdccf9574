"""`qwen-jax generate` and `chat`: a checkpoint speaks."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, DType, Folder, Number, Texts, sibling, utf8
from qwen_jax.cli.failures import complain, explain
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.inference import Engine, GenerationDefaults, SamplingParams
    from qwen_jax.tokenizer import Tokenizer


# Of `qwen_jax.kernels.Implementation`, which takes seconds to import.
Attention = Literal["auto", "gpu", "cudnn", "tpu", "xla", "reference"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. What is not given comes from the checkpoint's generation_config.json.

    Args:
        max_new_tokens: At most this many new tokens.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the K most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: Makes tokens that have occurred less likely; 1 is none.
        seed: Of the random numbers; prompt i uses SEED + i.
        stop: Strings that end a text; they are cut off.
        dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
        mesh: Devices to spread over, such as tensor=2.
        attention: Kernel that computes it; auto takes the best one here.
    """

    max_new_tokens: Count = None
    temperature: Number = None
    top_k: Count = None
    top_p: Number = None
    min_p: Number = None
    repetition_penalty: Number = None
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    stop: Texts = ()
    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    attention: Attention = "auto"

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """The checkpoint's defaults with what was given on the command line."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(defaults, **given)


# How many new tokens where neither the caller nor the checkpoint says.
_DEFAULT_NEW_TOKENS = 512


class Model:
    """A checkpoint's small files, read and checked before the weights are."""

    def __init__(self, name: str, options: Sampling, need_tokenizer: bool):
        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, is_hub_id, resolve
        from qwen_jax.inference import SamplingParams, load_generation_defaults
        from qwen_jax.parallel.sharding import parse_mesh

        self.options, self.axes = options, parse_mesh(options.mesh)
        options.resolve(SamplingParams())  # Refuses values out of range before anything is downloaded.
        self.folder = resolve(name, SMALL)
        # The weights of a Hub model are downloaded later, when everything else is known to be in order.
        self.checkpoint: str | Path = name if is_hub_id(name) else self.folder
        self.config = load_config(self.folder)
        self.defaults: GenerationDefaults = load_generation_defaults(self.folder, self.config)
        self.sampling = options.resolve(self.defaults.sampling)
        self.tokenizer = self._tokenizer(need_tokenizer)

    def _tokenizer(self, needed: bool) -> "Tokenizer | None":
        from qwen_jax.tokenizer import load_tokenizer

        files = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")
        if not needed and not any((self.folder / name).is_file() for name in files):
            return None
        return load_tokenizer(self.folder)

    def new_tokens(self, longest_prompt: int) -> int:
        """As asked for; a default is cut to what the context leaves."""
        if self.options.max_new_tokens is not None:
            return self.options.max_new_tokens
        wanted = self.defaults.max_new_tokens or _DEFAULT_NEW_TOKENS
        return max(1, min(wanted, self.config.context_length - longest_prompt))

    def engine(self) -> "Engine":
        """Loads the weights."""
        import jax

        from qwen_jax.inference import Engine
        from qwen_jax.parallel.sharding import make_mesh

        _enable_compilation_cache()
        default = "float32" if jax.default_backend() == "cpu" else self.config.dtype
        dtype = self.options.dtype or default
        mesh = make_mesh(self.axes)
        config, params = sibling("convert").load(self.checkpoint, mesh, dtype)
        attention = self.options.attention
        return Engine(config, params, mesh, tokenizer=self.tokenizer, dtype=dtype, attention=attention)


def _enable_compilation_cache() -> None:
    """Compiled programs survive the process on accelerators, unless the user has chosen a place or none already."""
    import jax

    if jax.default_backend() == "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "qwen_jax" / "compiled"))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Complete prompts. Give --prompt, --prompt-file or --prompt-ids.

    A single prompt on a terminal is completed as a stream. With --json, one object is printed for each prompt:
    prompt_token_ids, token_ids, text, finish_reason ("stop" or "length"), logprobs.

    Args:
        model: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        prompt: A text; may be given several times.
        prompt_file: A file with one prompt a line; "-" is standard input.
        prompt_ids: Token ids such as 1,2,3; may be given several times.
        logprobs: Also give each token's log-probability.
        json: Print JSON, one object a line.
        batch_size: Prompts to run at a time. Does not change the results.
    """

    model: Folder
    sampling: tyro.conf.OmitArgPrefixes[Sampling]
    prompt: Texts = ()
    prompt_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    prompt_ids: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="1,2,3")] = ()
    logprobs: bool = False
    json: bool = False
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32

    def run(self) -> int:
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        prompts = self._prompts()
        model = Model(self.model, self.sampling, need_tokenizer=not self.prompt_ids)
        from qwen_jax.inference import engine as engines

        limit = engines.vocab_limit(model.config, model.tokenizer)
        ids = [engines.encode(prompt, i, model.tokenizer, limit) for i, prompt in enumerate(prompts)]
        longest = max(map(len, ids))
        new_tokens = model.new_tokens(longest)
        engines.check_lengths(model.config, longest, new_tokens)
        engines.check_stop(self.sampling.stop, model.tokenizer)
        sampling = dataclasses.replace(model.sampling, logprobs=self.logprobs)
        engine = model.engine()
        settings: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "eos_token_ids": model.defaults.eos_token_ids,
            "stop": self.sampling.stop,
        }
        if len(ids) == 1 and not self.json and not self.logprobs and model.tokenizer is not None:
            for piece in engine.stream(ids[0], sampling, **settings):
                print(piece.text, end="", flush=True)
            print()
            return 0
        for start in range(0, len(ids), self.batch_size):
            part = ids[start : start + self.batch_size]
            seeded = dataclasses.replace(sampling, seed=(sampling.seed + start) % 2**32)
            for i, completion in enumerate(engine.generate(part, seeded, **settings), start):
                self._show(i, len(ids), completion)
        return 0

    def _prompts(self) -> list[str | list[int]]:
        if sum(map(bool, (self.prompt, self.prompt_file, self.prompt_ids))) != 1:
            raise InputError("Give exactly one of --prompt, --prompt-file and --prompt-ids.")
        if self.prompt:
            return list(self.prompt)
        if self.prompt_ids:
            return [_parse_ids(text) for text in self.prompt_ids]
        if self.prompt_file == "-":
            lines = sys.stdin.buffer.read().splitlines()
        else:
            path = Path(str(self.prompt_file))
            if not path.is_file():
                raise InputError(f"The prompt file {path} does not exist.")
            lines = path.read_bytes().splitlines()
        if not lines:
            raise InputError(f"The prompt file {self.prompt_file} is empty. Expected one prompt a line.")
        for number, line in enumerate(lines, 1):
            if not line:
                raise InputError(f"{self.prompt_file}, line {number} is empty. Expected one prompt a line.")
        return [utf8(line, f"{self.prompt_file}, line {number}") for number, line in enumerate(lines, 1)]

    def _show(self, i: int, total: int, completion: Any) -> None:
        if self.json:
            print(json.dumps(dataclasses.asdict(completion)), flush=True)
            return
        if total > 1:
            print(f"--- prompt {i} ({completion.finish_reason}) ---")
        print(completion.text if completion.text is not None else ",".join(map(str, completion.token_ids)), flush=True)
        if completion.logprobs is not None:
            print("logprobs: " + " ".join(f"{x:.4f}" for x in completion.logprobs), flush=True)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"Expected token ids such as 1,2,3; got {text!r}.") from None


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk to a model. /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply.

    Args:
        model: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        system: System message; by default the chat template's own.
    """

    model: Folder
    sampling: tyro.conf.OmitArgPrefixes[Sampling]
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None

    def run(self) -> int:
        model = Model(self.model, self.sampling, need_tokenizer=True)
        assert model.tokenizer is not None
        engine = model.engine()
        # A base checkpoint's own end-of-text id does not end a turn.
        turn_end = model.tokenizer.token_to_id("<|im_end|>")
        eos = {*model.defaults.eos_token_ids, *([] if turn_end is None else [turn_end])}
        start = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages: list[dict[str, Any]] = list(start)
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
            reply = self._reply(model, engine, messages, sorted(eos))
            if reply is None:
                messages.pop()
                failed = True
            else:
                messages.append({"role": "assistant", "content": reply})
        # Somebody at a terminal has seen it and gone on; a script has only the status.
        return int(failed and not sys.stdin.isatty())

    def _reply(self, model: Model, engine: "Engine", messages: list[dict[str, Any]], eos: Sequence[int]) -> str | None:
        """Streams one reply; None if there is none, because the conversation no longer fits."""
        from qwen_jax.tokenizer import render_chat

        assert model.tokenizer is not None
        pieces: list[str] = []
        try:
            ids = model.tokenizer.encode(render_chat(messages, template=model.tokenizer.chat_template))
            stream = engine.stream(
                ids,
                model.sampling,
                max_new_tokens=model.new_tokens(len(ids)),
                eos_token_ids=eos,
                stop=self.sampling.stop,
            )
            for piece in stream:
                pieces.append(piece.text)
                print(piece.text, end="", flush=True)
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


def _lines() -> Iterator[str]:
    """Lines of standard input: of a terminal in its own encoding, with a prompt, otherwise UTF-8."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            yield utf8(line.removesuffix(b"\n").removesuffix(b"\r"), f"Standard input, line {number}")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"That line is not {error.encoding}: {error.reason} at byte {error.start}.") from None
