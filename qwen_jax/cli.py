"""The `qwen-jax` command. Each subcommand is a dataclass of its options with a `run` method.

This is the only module of qwen_jax that imports train or convert, and only when a subcommand needs them.
"""

import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.inference import Engine, GenerationDefaults, SamplingParams
    from qwen_jax.tokenizer import Tokenizer

DType = Literal["bfloat16", "float32", "float16"]
# Options that say in `--help` what they take.
Number = Annotated[float | None, tyro.conf.arg(metavar="X")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]


def sibling(name: str) -> ModuleType:
    """Imports `train`, `convert` or a module in them from beside this package, whatever lies in the working directory.

    Args:
      name: such as "convert.verify".
    """
    package = name.partition(".")[0]
    if package not in sys.modules:
        init = Path(__file__).resolve().parent.parent / package / "__init__.py"
        spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(init.parent)])
        if spec is None or spec.loader is None or not init.is_file():
            raise ImportError(f"{init} is missing: qwen_jax, train and convert are installed together.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(name)


# --- info ---


@dataclasses.dataclass(frozen=True)
class Info:
    """Print a model's shape, exact parameter counts, memory by dtype, and cache size.

    Args:
        model: A published name (Qwen2.5-7B-Instruct) or a checkpoint folder.
        json: Print one JSON object.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_DIR")]
    json: bool = False

    def run(self) -> int:
        from qwen_jax.config import load_config, published

        config = load_config(self.model) if Path(self.model).is_dir() else published(self.model)
        params = config.num_params()
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        report = {
            "model": self.model,
            "parameters": params,
            "weights_bytes": {dtype: params["total"] * size for dtype, size in sizes.items()},
            "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(size) for dtype, size in sizes.items()},
            "context_length": config.context_length,
            "config": config.to_hf(),
        }
        if self.json:
            print(json.dumps(report))
            return 0
        cache = config.kv_bytes_per_token()
        rows = [
            ("parameters", f"{params['total']:,} ({params['non_embedding']:,} without embedding and head)"),
            ("  embedding", f"{params['embedding']:,}" + (" (is the head too)" if not params["lm_head"] else "")),
            ("  layers", f"{params['layers']:,} in {config.num_layers}"),
            ("  head", f"{params['lm_head']:,}" if params["lm_head"] else "tied to the embedding"),
            ("hidden / feed-forward", f"{config.hidden_size:,} / {config.intermediate_size:,}"),
            ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, {config.head_dim} wide"),
            ("vocabulary", f"{config.vocab_size:,} rows"),
            ("RoPE base, norm epsilon", f"{config.rope_theta:,.0f}, {config.rms_norm_eps:g}"),
            ("context", f"{config.context_length:,} tokens"),
            ("weights", f"{params['total'] * 2 / 2**30:.2f} GiB bfloat16, {params['total'] * 4 / 2**30:.2f} float32"),
            ("cache", f"{cache / 1024:g} KiB a token, {cache * config.context_length / 2**30:.2f} GiB a full context"),
        ]
        print(self.model)
        for name, value in rows:
            print(f"  {name:24s} {value}")
        return 0


# --- convert, verify ---


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between Hugging Face safetensors and Orbax, tensor by tensor.

    The new folder appears whole or not at all. Tokenizer, generation config and config.json travel along.

    Args:
        src: Checkpoint folder, or a Hub id such as Qwen/Qwen2.5-0.5B.
        dst: The new folder.
        to: Format to write; by default the one that SRC does not have.
        dtype: Of the written weights; by default as stored, every tensor byte for byte.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    to: Literal["hf", "orbax"] | None = None
    dtype: DType | None = None

    def run(self) -> int:
        sibling("convert").convert(self.src, self.dst, self.to, self.dtype, progress=True)
        print(self.dst)
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints of any format by their logits; exit 0 pass, 1 fail, 2 could not compare.

    Args:
        a: Checkpoint folder or Hub id; the yardstick.
        b: The other checkpoint.
        against: Instead of B, run A in transformers as the yardstick.
        json: Print one JSON object.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    against: Literal["transformers"] | None = None
    json: bool = False

    def run(self) -> int:
        verify = sibling("convert.verify")
        try:
            report = verify.verify(self.a, self.b, against=self.against)
        except Exception as error:
            # Whatever it was, nothing was compared; status 1 would say that the weights differ.
            if self.json:
                print(json.dumps({"passed": None, "error": str(error)}))
            _complain(error)
            return 2
        print(json.dumps(report.to_json()) if self.json else report)
        return int(report.exit_code)


# --- generate, chat ---


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

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """The checkpoint's defaults with what was given on the command line."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(defaults, **given)


# How many new tokens where neither the caller nor the checkpoint says.
_DEFAULT_NEW_TOKENS = 512


class _Model:
    """A checkpoint's small files, read and checked before the weights are."""

    def __init__(self, name: str, options: Sampling, need_tokenizer: bool):
        from qwen_jax.config import load_config
        from qwen_jax.inference import load_generation_defaults
        from qwen_jax.sharding import parse_mesh

        self.options, self.axes = options, parse_mesh(options.mesh)
        self.folder: Path = sibling("convert").resolve(name)
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
        from qwen_jax.sharding import make_mesh

        _enable_compilation_cache()
        default = "float32" if jax.default_backend() == "cpu" else self.config.dtype
        dtype = self.options.dtype or default
        mesh = make_mesh(self.axes)
        config, params = sibling("convert").load(self.folder, mesh, dtype)
        return Engine(config, params, mesh, tokenizer=self.tokenizer, dtype=dtype)


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
        model = _Model(self.model, self.sampling, need_tokenizer=not self.prompt_ids)
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
        return [_utf8(line, f"{self.prompt_file}, line {number}") for number, line in enumerate(lines, 1)]

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


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}. Convert it first.") from None


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
        model = _Model(self.model, self.sampling, need_tokenizer=True)
        assert model.tokenizer is not None
        engine = model.engine()
        # A base checkpoint's own end-of-text id does not end a turn.
        turn_end = model.tokenizer.token_to_id("<|im_end|>")
        eos = {*model.defaults.eos_token_ids, *([] if turn_end is None else [turn_end])}
        start = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages: list[dict[str, Any]] = list(start)
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
            else:
                messages.append({"role": "assistant", "content": reply})
        return 0

    def _reply(self, model: _Model, engine: "Engine", messages: list[dict[str, Any]], eos: Sequence[int]) -> str | None:
        """Streams one reply; None if the conversation no longer fits."""
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
        except InputError as error:
            _complain(error)
            print("/reset starts a new conversation.", file=sys.stderr)
            return None
        except KeyboardInterrupt:
            pass
        print()
        return "".join(pieces)


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt where that is a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"Standard input is not UTF-8: {error.reason} at byte {error.start}.") from None


# --- tokenize ---


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Turn lines of standard input into JSON arrays of token ids, or back.

    Args:
        model: Folder with a tokenizer, or Hub id.
        decode: Read JSON arrays, write texts.
        plain: Treat control tokens in the text as plain text.
    """

    model: Folder
    decode: bool = False
    plain: bool = False

    def run(self) -> int:
        from qwen_jax.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(sibling("convert").resolve(self.model))
        for number, line in enumerate(sys.stdin.buffer, 1):
            text = _utf8(line.removesuffix(b"\n"), f"Standard input, line {number}")
            if not self.decode:
                print(json.dumps(tokenizer.encode(text, parse_special=not self.plain), separators=(",", ":")))
                continue
            try:
                ids = json.loads(text)
            except json.JSONDecodeError:
                ids = None
            if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise InputError(f"Standard input, line {number}: expected a JSON array of ids, got {text[:60]!r}.")
            print(tokenizer.decode(ids))
        return 0


# --- quickstart ---


def _quickstart(argv: Sequence[str]) -> int:
    quickstart = sibling("train.quickstart")
    options = _parse(quickstart.QuickstartOptions, "quickstart", argv)
    huggingface = sibling("convert.huggingface")

    def export(params: Any, config: Any, tokenizer: "Tokenizer", folder: Path) -> None:
        huggingface.export(params, config, folder)
        tokenizer.save(folder)

    def verify_export(params: Any, config: Any, folder: Path) -> int:
        import jax
        import numpy as np

        from qwen_jax.sharding import make_mesh

        back = huggingface.load_params(folder, config, make_mesh({}, jax.devices()[:1]))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True)
        if not all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
            raise RuntimeError(f"The export in {folder} differs from the trained weights.")
        return sum(len(leaf.names) for leaf in sibling("convert.names").leaves(config))

    def complete(folder: Path, prompts: Sequence[str], max_new_tokens: int) -> Iterable[Iterable[str]]:
        # Greedy, so small a model would soon repeat itself.
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.9, seed=options.seed)
        model = _Model(str(folder), sampling, need_tokenizer=True)
        engine = model.engine()
        for prompt in prompts:
            stream = engine.stream(prompt, model.sampling, max_new_tokens=max_new_tokens)
            yield (piece.text for piece in stream)

    quickstart.run(options, export=export, verify_export=verify_export, complete=complete)
    return 0


# --- the command ---

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def _parse(options: type[Any], name: str, argv: Sequence[str]) -> Any:
    return tyro.cli(options, prog=f"qwen-jax {name}", args=list(argv), config=_CONFIG)


def _command(options: type[Any], name: str) -> Callable[[Sequence[str]], int]:
    return lambda argv: int(_parse(options, name, argv).run())


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "info": (_command(Info, "info"), "a model's shape, parameters, memory and cache size"),
    "convert": (_command(Convert, "convert"), "between Hugging Face safetensors and Orbax"),
    "verify": (_command(Verify, "verify"), "compare two checkpoints, or one with transformers, by logits"),
    "generate": (_command(Generate, "generate"), "complete prompts"),
    "chat": (_command(Chat, "chat"), "talk to a model"),
    "tokenize": (_command(Tokenize, "tokenize"), "text to token ids and back"),
    "quickstart": (_quickstart, "train a small model on real text, export it, let it speak"),
}


def _usage() -> str:
    lines = [f"  {name:12s} {summary}" for name, (_, summary) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwen-jax COMMAND [options]",
            "",
            "Qwen2.5 in JAX: run, convert, verify and train. Commands:",
            "",
            *lines,
            "",
            "qwen-jax COMMAND --help explains a command and shows its options.",
        ]
    )


def _complain(error: Exception) -> None:
    print(f"qwen-jax: error: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; by default those of the process.

    Returns:
      The exit status: 0, 1 for bad input (or a failed comparison), 2 for a command line that makes no sense (or a
      comparison that could not be made), 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        import importlib.metadata

        print(importlib.metadata.version("qwen-jax"))
        return 0
    if argv[0] not in _COMMANDS:
        _complain(InputError(f"unknown command {argv[0]!r}; the commands are {', '.join(_COMMANDS)}."))
        return 2
    # What the kernels, converters and loops have to say goes to standard error, plainly.
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for package in ("qwen_jax", "convert", "train"):
        logging.getLogger(package).setLevel(logging.INFO)
    # A job scheduler's SIGTERM unwinds like any other failure, so that nothing half-written stays behind.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = _COMMANDS[argv[0]][0](argv[1:])
        # Here, where a reader that has left can still be caught.
        sys.stdout.flush()
        return status
    except InputError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left. Nothing more can be written, not even at interpreter shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
