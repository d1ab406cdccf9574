"""`qwen-jax generate` and `chat`: run a checkpoint."""

import dataclasses
import importlib.util
import json
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import ModelOption, ModelPosition, Texts, given, model_name
from qwen_jax.cli.failures import complain, explain
from qwen_jax.cli.lines import check_file, read_lines, read_text
from qwen_jax.cli.model import IdLists, Model, Running, Sampling, parse_ids
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.hub import is_hub_id

if TYPE_CHECKING:
    from qwen_jax.inference import Completion, ContinuousEngine, Document, Engine
    from qwen_jax.serving.direct import Direct


# Tokens of a conversation about a document.
_CONVERSATION = 16_384
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Complete prompts. Give --prompt, --prompt-file or --prompt-ids; or --input and --output for a file of requests.

    A single prompt is completed as a stream. With --json, one object is printed for each prompt: prompt_token_ids,
    token_ids, text, finish_reason ("stop", "length" or "error"), logprobs, error. If a prompt ends with an error, the
    exit status is 1.

    Args:
        folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        model: The same, as an option.
        prompt: A text; may be given several times.
        prompt_file: A file of prompts; may be given several times; "-" is standard input.
        prompt_per: One prompt on each line of a prompt file, or the whole file as one prompt, without its last line
            end.
        prompt_ids: Token ids such as 1,2,3; may be given several times.
        logprobs: Also give each token's log-probability.
        json: Print JSON, one object a line.
        batch_size: Prompts to run at a time. Does not change the results.
        document: A text file that is read once; each prompt continues it.
        input: A file of JSON lines: requests in OpenAI's batch format, or {"prompt": ...}, {"messages": ...} or
            {"prompt_token_ids": ...}. Many run at once; a run that was interrupted goes on where it stopped.
        output: Where their results are appended, a JSON object a line.
        in_flight: Requests of a file that run at the same time.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    running: tyro.conf.OmitArgPrefixes[Running] = dataclasses.field(default_factory=Running)
    prompt: Texts = ()
    prompt_file: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    prompt_per: Literal["line", "file"] = "line"
    prompt_ids: IdLists = ()
    logprobs: bool = False
    json: bool = False
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    document: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    in_flight: Annotated[int, tyro.conf.arg(metavar="N")] = 256

    def run(self) -> int:
        # Everything that can be wrong is checked before the weights are loaded.
        name = model_name(self.folder, self.model)
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if self.input is not None or self.output is not None:
            return self._run_file(name)
        prompts = self._prompts()
        model = Model(name, self.sampling, self.running, need_tokenizer=not self.prompt_ids)
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

    def _run_file(self, name: str) -> int:
        """Answers the requests of a file."""
        from qwen_jax.cli import batch, batch_files

        if self.input is None or self.output is None:
            raise InputError("Give both --input and --output.")
        others: dict[str, object] = {"--prompt": self.prompt, "--prompt-file": self.prompt_file}
        others |= {"--prompt-ids": self.prompt_ids, "--document": self.document}
        if prompts := [option for option, value in others.items() if value]:
            raise InputError(f"--input has prompts of its own; {prompts[0]} cannot be given with it.")
        if self.in_flight < 1:
            raise InputError(f"--in-flight must be at least 1, got {self.in_flight}.")
        if self.running.attention != "dense":
            raise InputError("--input runs with dense attention.")
        if given(self.running, "prefill_chunk"):
            raise InputError("Leave out --prefill-chunk: --input reads prompts in chunks of its own.")
        batch_files.check_files(self.input, self.output)
        model = Model(name, self.sampling, self.running, need_tokenizer=False)
        with model.continuous_engine(self.in_flight) as engine:
            complete = batch.PlainPrompts(
                engine,
                model.sampling,
                frozenset(model.eos_token_ids),
                model.stop,
                model.new_tokens,
                model.vocab_limit,
                logprobs=self.logprobs,
            )
            answer = _OpenAI(engine, model, name)
            try:
                how: dict[str, Any] = {"settings": self._settings(name), "in_flight": self.in_flight}
                return batch.report(batch.answer_file(self.input, self.output, answer, complete, **how), self.output)
            finally:
                answer.close()

    def _settings(self, name: str) -> str:
        """What decides the answers to a file of requests: all but where and how fast the model runs."""
        model = name if is_hub_id(name) else os.path.realpath(name)
        of_model = ("dtype", "adapter", "kv_dtype", "w8a8", "rope_scaling", "dual_chunk", "trained_length")
        running = [getattr(self.running, field) for field in of_model]
        return to_json([model, running, dataclasses.asdict(self.sampling), self.logprobs])

    def _prompts(self) -> list[str | list[int]]:
        if sum(map(bool, (self.prompt, self.prompt_file, self.prompt_ids))) != 1:
            raise InputError("Give exactly one of --prompt, --prompt-file and --prompt-ids.")
        if [*self.prompt_file, self.document].count("-") > 1:
            raise InputError('"-" is standard input, which can be read once. Give a file for the others.')
        if self.prompt:
            return list(self.prompt)
        if self.prompt_ids:
            return [parse_ids(text) for text in self.prompt_ids]
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


class _OpenAI:
    """Answers requests in OpenAI's format. The packages of the server are imported with the first one."""

    def __init__(self, engine: "ContinuousEngine", model: Model, name: str) -> None:
        self._engine, self._model, self._name = engine, model, name
        self._lock = threading.Lock()
        self._direct: Direct | None = None

    def __call__(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """See `batch.Answer`."""
        with self._lock:
            if self._direct is None:
                self._direct = self._make()
        # A file may name any model: it was written for this run.
        return self._direct(url, {key: value for key, value in body.items() if key != "model"})

    def _make(self) -> "Direct":
        if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("prometheus_client") is None:
            raise InputError("Requests in OpenAI's format need the server's packages: pip install 'qwen-jax[serve]'.")
        from qwen_jax.serving.direct import Direct
        from qwen_jax.serving.settings import ServerSettings, Service

        # Options of the command line are the defaults of the requests.
        model = self._model
        new_tokens = model.options.max_new_tokens or model.defaults.max_new_tokens
        defaults = dataclasses.replace(model.defaults, sampling=model.sampling, max_new_tokens=new_tokens)
        settings = ServerSettings(served_names=(self._name,), max_waiting=1 << 30)
        return Direct(Service(engine=self._engine, defaults=defaults), settings)

    def close(self) -> None:
        """Ends what was started."""
        if self._direct is not None:
            self._direct.close()


def _bytes_of_file(name: str, what: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    check_file(path, what)
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
    running: tyro.conf.OmitArgPrefixes[Running] = dataclasses.field(default_factory=Running)
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    document: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None

    def run(self) -> int:
        name = model_name(self.folder, self.model)
        if self.document == "-":
            raise InputError("chat reads what you say from standard input. Give --document a file.")
        # The end-of-text id of a base checkpoint does not end a turn.
        model = Model(name, self.sampling, self.running, need_tokenizer=True, also_ends=["<|im_end|>"])
        assert model.tokenizer is not None
        parts = [] if self.system is None else [self.system]
        parts += [] if self.document is None else [_text_of_file(self.document, "document")]
        start = [{"role": "system", "content": "\n\n".join(parts)}] if parts else []
        # A template that fails, or refuses a system message, does so before the weights are loaded.
        model.tokenizer.encode_chat([*start, {"role": "user", "content": "Hello"}])
        shared: list[int] = []
        if self.document is not None:
            # What all conversations begin with is read once.
            shared = _common_prefix(
                *(model.tokenizer.encode_chat([*start, {"role": "user", "content": word}]) for word in ("Hello", "7"))
            )
        room = model.config.context_length - len(shared)
        if room < 1:
            raise InputError(
                f"The document and what is before it have {len(shared)} tokens, the model's context "
                f"{model.config.context_length}. Shorten it"
                + ("." if model.config.yarn or model.config.dual_chunk else ", or give --dual-chunk or --rope-scaling.")
            )
        engine = model.engine()
        room = min(room, _CONVERSATION)
        document = engine.read(shared, room=room) if self.document is not None else None
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
            if document is not None and not document.is_free:  # Ctrl-C while the device had its cache.
                print("The document is read again.", file=sys.stderr)
                document = engine.read(shared, room=room)
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
