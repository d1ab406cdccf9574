"""`qwen-jax serve`: a server of OpenAI's API."""

import dataclasses
import gc
import importlib.util
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, DType, ModelOption, ModelPosition, model_name, sibling
from qwen_jax.cli.model import KVDtype, Model, Running, Sampling, enable_compilation_cache
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.inference.continuous import ContinuousEngine
    from qwen_jax.inference.proposers import Proposer
    from qwen_jax.serving.settings import ServerSettings, Service

# Of the extra `serve`, by the names that are imported.
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_KEY_VARIABLE = "QWEN_JAX_API_KEY"
# Proposals are made while at most so many requests run: a small batch leaves the device time to check them.
_SPECULATED_ROWS = 8
# Settings of the server whose option has another name.
_OPTIONS = {"max_waiting": "max_queue", "drain_timeout": "shutdown_timeout"}


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP: OpenAI's API, metrics for Prometheus, and a chat page at /.

    A reward model answers /v1/score. SIGTERM and Ctrl-C let running requests end first. A model may be spread over
    several machines: start the same command on each; process 0 answers.

    Args:
        folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        model: The same, as an option.
        host: Address to listen at; 0.0.0.0 is reached from other machines.
        port: Port to listen at; 0 takes a free one.
        api_key: Clients must send one of these keys; may be given several times. Other users of the machine can see
            the command line: the variable QWEN_JAX_API_KEY (keys with commas between) is not seen.
        served_model_name: Name of the model in requests; may be given several times. By default the Hub id, or the
            folder's name.
        allowed_origin: Let pages of this origin call the server (CORS), such as https://a.example; may be given several
            times.
        max_model_len: Tokens that prompt and completion may have together; by default the model's context.
        max_num_seqs: Requests in the batch at a time.
        max_num_batched_tokens: Tokens of prompts that are read between two steps of the running requests.
        gpu_memory_utilization: Part of the device's memory to use.
        kv_dtype: int8 and fp8 hold keys and values in 8 bits: twice the tokens in the same memory, and slower steps
            except on Hopper GPUs and TPUs; auto holds them in the dtype to compute in.
        w8a8: Round activations to the int8 or float8 of the weights in steps of 64 tokens or more, one scale a token. A
            text may then differ with the requests that run beside it.
        no_prefix_caching: Do not share keys and values of equal beginnings of prompts.
        mesh: Devices to spread over, such as tensor=2.
        dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
        adapter: A LoRA adapter of PEFT, a folder or Hub id, which requests choose as their model by its name; may be
            given several times.
        speculative: Guess tokens ahead: ngram takes them from the text itself, a folder is a smaller model with the
            same tokenizer. The text does not change.
        lazy_compile: Compile each program when it is first needed: a quick start, and slow first answers.
        num_speculative_tokens: How many tokens to guess.
        rope_scaling: Longer texts than those of training by YaRN, such as yarn:4 for four times the length.
        dual_chunk: Four times the length of training by dual-chunk attention.
        trained_length: Length of training in tokens, for these two; by default the model's max_position_embeddings.
        pooling: Of /v1/embeddings, where a request does not say.
        max_logprobs: The most likely tokens at each place that a request may ask for.
        max_choices: n and best_of.
        max_queue: Requests that may wait, beside those that start at once; beyond it clients are told to come again.
        max_body_bytes: Of a request.
        request_timeout: Seconds that a request may take; 0 is no limit.
        shutdown_timeout: Seconds that running requests get after SIGTERM.
        log_interval: Seconds between two lines about throughput in the log, which are written while there are requests;
            0 writes none.
        distributed: First join the other processes of a SLURM, GKE, MPI or TPU job.
        coordinator: HOST:PORT of process 0, if no scheduler says it.
        num_processes: How many, if no scheduler says it.
        process_id: Of this process, if no scheduler says it.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8000
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY")] = ()
    served_model_name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    allowed_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="URL")] = ()
    max_model_len: Count = None
    max_num_seqs: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    max_num_batched_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 2048
    gpu_memory_utilization: Annotated[float, tyro.conf.arg(metavar="X")] = 0.9
    kv_dtype: KVDtype = "auto"
    w8a8: bool = False
    no_prefix_caching: bool = False
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    dtype: DType | None = None
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=DIR")] = ()
    speculative: Annotated[str | None, tyro.conf.arg(metavar="ngram|DIR")] = None
    lazy_compile: bool = False
    num_speculative_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="yarn:FACTOR")] = None
    dual_chunk: bool = False
    trained_length: Count = None
    pooling: Literal["mean", "last"] = "mean"
    max_logprobs: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    max_choices: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    max_queue: Annotated[int, tyro.conf.arg(metavar="N")] = 1024
    max_body_bytes: Annotated[int, tyro.conf.arg(metavar="N")] = 16 * 2**20
    request_timeout: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0
    shutdown_timeout: Annotated[float, tyro.conf.arg(metavar="X")] = 30.0
    log_interval: Annotated[float, tyro.conf.arg(metavar="X")] = 10.0
    distributed: bool = False
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    num_processes: Count = None
    process_id: Count = None

    def run(self) -> int:
        # Everything that can be wrong is checked before the weights are loaded.
        name = model_name(self.folder, self.model)
        adapters = sibling("convert.adapter").adapter_folders(self.adapter) if self.adapter else {}
        self._check_numbers()
        if missing := [package for package in _PACKAGES if importlib.util.find_spec(package) is None]:
            raise InputError(f"The server needs {', '.join(missing)}: run pip install 'qwen-jax[serve]'.")
        first = True
        if self.distributed or self.coordinator:
            sibling("train.distributed").join(self.coordinator, self.num_processes, self.process_id)
            import jax

            first = jax.process_index() == 0
        from qwen_jax.serving.app import create_app
        from qwen_jax.serving.server import listen, run

        settings = self._settings(name)
        if first:
            # A port that is taken is found before the weights are loaded.
            listen(self.host, self.port).close()
        service = self._service(name, adapters)
        if not first:
            assert service.engine is not None
            # Signals to the whole job reach process 0, too, which lets running requests end.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            service.engine.close()
            return 0
        # Its lines are written without --verbose, too.
        logging.getLogger("qwen_jax.serving.throughput").setLevel(logging.INFO)
        app = create_app(service, settings)
        interrupted = run(app, self.host, self.port, self._announce)
        return 130 if interrupted else 0

    def _announce(self, url: str) -> None:
        print(f"Serving at {url} (OpenAI's API at {url}/v1, chat page at {url}/).", file=sys.stderr, flush=True)

    def _check_numbers(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_speculative_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.speculative is None and self.num_speculative_tokens != Serve.num_speculative_tokens:
            raise InputError("--num-speculative-tokens needs --speculative ngram or --speculative DIR.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}.")

    def _settings(self, name: str) -> "ServerSettings":
        """The server's limits. Raises InputError for values out of range."""
        from qwen_jax.hub import is_hub_id
        from qwen_jax.serving.settings import ServerSettings

        # Of a link its own name: what it points to may change.
        called = name if is_hub_id(name) else Path(os.path.abspath(name)).name
        keys = [key.strip() for key in os.environ.get(_KEY_VARIABLE, "").split(",")]
        try:
            return ServerSettings(
                served_names=self.served_model_name or (called,),
                api_keys=(*self.api_key, *filter(None, keys)),
                allowed_origins=self.allowed_origin,
                pooling=self.pooling,
                max_body_bytes=self.max_body_bytes,
                max_choices=self.max_choices,
                max_logprobs=self.max_logprobs,
                max_waiting=self.max_queue,
                request_timeout=self.request_timeout,
                drain_timeout=self.shutdown_timeout,
                log_interval=self.log_interval,
            )
        except InputError as error:
            # The message begins with the name of a field, or is about names and keys.
            field, _, rest = str(error).partition(" ")
            option = _OPTIONS.get(field, field)
            if not hasattr(self, option):
                raise
            raise InputError(f"--{option.replace('_', '-')} {rest}") from None

    def _service(self, name: str, adapters: dict[str, Path]) -> "Service":
        """Loads the model: a language model with its engine, or a reward model."""
        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, resolve

        if load_config(resolve(name, SMALL)).score is not None:
            if adapters or self.speculative:
                raise InputError("A reward model takes neither --adapter nor --speculative.")
            return self._reward_model(name)
        return self._language_model(name, adapters)

    def _reward_model(self, name: str) -> "Service":
        import jax

        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, is_hub_id, resolve
        from qwen_jax.inference.scorer import Scorer
        from qwen_jax.parallel.sharding import Sharding, make_mesh, parse_mesh
        from qwen_jax.serving.settings import Service
        from qwen_jax.tokenizer import load_tokenizer

        if jax.process_count() > 1:
            raise InputError("A reward model is served by one process. Start a server on each machine.")
        enable_compilation_cache()
        small = resolve(name, SMALL)
        config, tokenizer, mesh = load_config(small), load_tokenizer(small), make_mesh(parse_mesh(self.mesh))
        Sharding.for_inference(config, mesh)
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
        config, params = sibling("convert").load(name if is_hub_id(name) else small, mesh, dtype)
        return Service(scorer=Scorer(config, params, mesh, dtype=dtype), scorer_tokenizer=tokenizer)

    def _language_model(self, name: str, adapters: dict[str, Path]) -> "Service":
        from qwen_jax.inference.continuous import ContinuousEngine
        from qwen_jax.parallel.multihost import check_uses_all
        from qwen_jax.serving.settings import Service

        self._check_draft()
        running = Running(
            dtype=self.dtype,
            mesh=self.mesh,
            w8a8=self.w8a8,
            rope_scaling=self.rope_scaling,
            dual_chunk=self.dual_chunk,
            trained_length=self.trained_length,
        )
        model = Model(name, Sampling(), running, need_tokenizer=True)
        check_uses_all(model.mesh, "tensor")
        if self.max_model_len is not None and self.max_model_len > model.config.context_length:
            raise InputError(
                f"--max-model-len is {self.max_model_len}, and the model's context has {model.config.context_length} "
                "tokens. Give at most that, or extend it (--rope-scaling, --dual-chunk)."
            )
        factors = sibling("convert.adapter").load_adapters(adapters, model.config) if adapters else None
        config, params, dtype = model.loaded()
        options: dict[str, Any] = {
            "tokenizer": model.tokenizer,
            "dtype": dtype,
            "max_seqs": self.max_num_seqs,
            "max_length": self.max_model_len,
            "max_batched_tokens": self.max_num_batched_tokens,
            "memory_fraction": self.gpu_memory_utilization,
            "kv_dtype": self.kv_dtype,
            "prefix_cache": not self.no_prefix_caching,
            "eos_token_ids": model.eos_token_ids,
        }
        if factors:
            options["adapters"] = factors
        most = min(self.max_model_len or config.context_length, config.context_length)
        # The draft model's cache takes its memory before the engine takes the rest.
        proposer = self._proposer(model, dtype, most)
        engine = ContinuousEngine(config, params, model.mesh, proposer=proposer, **options)
        if not self.lazy_compile and engine.leads:
            self._compile(engine)
        return Service(engine=engine, defaults=model.defaults)

    def _check_draft(self) -> None:
        """Raises InputError if the model that guesses tokens cannot be found."""
        from qwen_jax.hub import SMALL, is_hub_id, resolve

        if self.speculative in (None, "ngram"):
            return
        if not Path(self.speculative).is_dir() and not is_hub_id(self.speculative):
            raise InputError(
                "--speculative must be ngram, or the folder or Hub id of a smaller model with the same tokenizer; got "
                f"{self.speculative!r}, which is none of them."
            )
        resolve(self.speculative, SMALL)

    def _proposer(self, target: Model, dtype: str, max_length: int) -> "Proposer | None":
        """What proposes tokens: the text itself, or a draft model, which is loaded."""
        from qwen_jax.inference.proposers import DraftModel, Ngrams

        if self.speculative is None:
            return None
        if self.speculative == "ngram":
            return Ngrams(self.num_speculative_tokens, _SPECULATED_ROWS)
        import jax

        from qwen_jax.inference.weights import fuse
        from qwen_jax.parallel.sharding import Sharding

        config, params = sibling("convert").load(self.speculative, target.mesh, dtype)
        with jax.set_mesh(target.mesh):
            fused = fuse(params, config, Sharding.for_inference(config, target.mesh))
        return DraftModel(
            config,
            fused,
            target.mesh,
            dtype=dtype,
            vocab_limit=target.vocab_limit,
            max_length=max_length,
            count=self.num_speculative_tokens,
            rows=_SPECULATED_ROWS,
            max_batched_tokens=self.max_num_batched_tokens,
        )

    def _compile(self, engine: "ContinuousEngine") -> None:
        """Compiles all programs, with a line that tells how far it is."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        shown = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*shown, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)

            def report(name: str, seconds: float, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, description=f"{name}, {seconds:.1f} s")

            seconds = engine.start(report)
        # What was made until now stays: the collector need not look at it again and again while texts are streamed.
        gc.collect()
        gc.freeze()
        print(f"All programs are ready after {seconds:.1f} s.", file=sys.stderr, flush=True)
