"""`qwen-jax eval`, `eval list` and `eval compare`: benchmarks on a checkpoint or a server, and their differences."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwen_jax.cli.common import ModelOption, Seed, Texts, check_apart, given, sibling
from qwen_jax.cli.failures import complain
from qwen_jax.cli.model import Model, Running, Sampling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig
    from qwen_jax.inference import ContinuousEngine
    from qwen_jax.inference.likelihood import LikelihoodScorer

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Root = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Url = Annotated[str | None, tyro.conf.arg(metavar="URL")]
Id = Annotated[str | None, tyro.conf.arg(metavar="ID")]
# Share of a device's memory for weights and engine; the rest is for reading texts whose log-probability is asked for.
_ENGINE_MEMORY = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run benchmarks on a checkpoint or on a server, and write every score with all that decides it.

    Data is read from files below --data-root; nothing is downloaded unless --hub is given. `qwen-jax eval list` shows
    the benchmarks and which files they need. Other names are tasks of lm-eval (pip install 'qwen-jax[eval]').

    The folder of results gets summary.json (scores with 95% intervals, hashes of data and templates, versions),
    TASK.jsonl (a line for each item), responses.jsonl and report.html. The same command goes on after an interruption:
    no request is repeated. Items without a verdict are counted apart, never as zero. The exit status is 1 if any item
    has none.

    Example: qwen-jax eval --model Qwen2.5-7B --tasks gsm8k mmlu arc_challenge --data-root data --output results

    Args:
      model: Checkpoint folder or Hub id, run in this process.
      base_url: URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, instead of a model.
      served_model: The name of the model at the URL, if it serves several.
      tasks: Names of benchmarks, or qwen2.5-base or qwen2.5-instruct: those of the Qwen2.5 report whose data is here.
        lm-eval:NAME is lm-eval's where both have the name.
      data_root: Folder below which the data lies.
      output: Folder for results.
      limit: The first items of each task alone.
      shots: Solved examples of tasks of lm-eval; by default what each task says.
      chat: Give tasks of lm-eval the form of a conversation.
      include: Folders with further YAML tasks of lm-eval.
      hub: Let lm-eval fetch data that is not here.
      allow_changed_data: Also run on data that is no published version; the score says so.
      judge_url: URL of the model that judges, for tasks that need one.
      judge_model: Its name, if the URL serves several.
      max_seqs: Texts that are generated at the same time; requests that are open at a URL.
      workers: Programs that the sandbox runs at the same time.
      seed: Of sampled texts of lm-eval.
      json: Print the summary as JSON, instead of a table.
    """

    model: ModelOption = None
    base_url: Url = None
    served_model: Id = None
    tasks: Names = ()
    data_root: Root = None
    output: Folder
    limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    shots: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    chat: bool = False
    include: Texts = ()
    hub: bool = False
    allow_changed_data: bool = False
    judge_url: Url = None
    judge_model: Id = None
    max_seqs: int = 64
    workers: int = 2
    seed: Seed = 0
    running: tyro.conf.OmitArgPrefixes[Running] = dataclasses.field(default_factory=Running)
    json: bool = False

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        if (self.model is None) == (self.base_url is None):
            raise InputError("Give either --model DIR or --base-url URL.")
        if self.max_seqs < 1 or self.workers < 1:
            raise InputError("--max-seqs and --workers must be at least 1.")
        if self.shots is not None and self.shots < 0:
            raise InputError(f"--shots must be at least 0, got {self.shots}.")
        evaluation, run = sibling("train.evaluate.evaluation"), sibling("train.evaluate.run")
        chosen, chat = self._chosen(evaluation), self.chat
        if chosen is None:
            wanted, shots, left_out = self.tasks, dict.fromkeys(self.tasks, self.shots), {}
        else:
            suite = sibling("train.evaluate.suites").suite(self.tasks[0])
            chat, wanted, shots, left_out = suite.chat, chosen.names, chosen.shots, chosen.left_out
        names = evaluation.sort_names(wanted, shots)
        self._check_read(of_harness=bool(names.harness) or chosen is not None)
        options = run.RunOptions(self.data_root, self.allow_changed_data, self.limit)
        settings = sibling("train.evaluate.harness").Settings(
            data_root=self.data_root,
            include=tuple(map(Path, self.include)),
            hub=self.hub,
            limit=self.limit,
            chat=chat,
            seed=self.seed,
        )
        tools = self._tools(names)
        model: Any = None
        try:
            model, tokenizer = self._measured()
            summary = evaluation.evaluate(model, names, self.output, options, settings, tools, tokenizer, left_out)
        finally:
            if isinstance(model, InProcess):
                model.close()
            if tools.sandbox is not None:
                tools.sandbox.close()
        return self._show(summary)

    def _check_read(self, of_harness: bool) -> None:
        """Raises InputError for an option that nothing would read."""
        of_lm_eval = given(self, "shots", "chat", "include", "hub", "seed")
        unread = [
            (self.base_url is not None, given(self.running), "with --base-url the server has its own"),
            (self.base_url is None, given(self, "served_model"), "without --base-url nothing reads it"),
            (self.judge_url is None, given(self, "judge_model"), "without --judge-url nothing reads it"),
            (not of_harness, of_lm_eval, "it is for tasks of lm-eval alone"),
        ]
        for is_unread, options, why in unread:
            if is_unread and options:
                raise InputError(f"Leave out {', '.join(options)}: {why}.")

    def _chosen(self, evaluation: Any) -> Any:
        """What of a suite can run; None if no suite is asked for."""
        suites = sibling("train.evaluate.suites")
        if not any(name in suites.SUITES for name in self.tasks):
            return None
        if len(self.tasks) > 1 or self.shots is not None or self.chat:
            raise InputError(f"{', '.join(suites.SUITES)} say which tasks, shots and form. Give one of them alone.")
        name = self.tasks[0]
        chosen = evaluation.choose(suites.suite(name), self.data_root, self.hub, self.judge_url is not None)
        if not chosen.names:
            raise InputError(f"No task of {name} can run here: see qwen-jax eval list --suite {name}.")
        for benchmark, why in chosen.left_out.items():
            complain(f"{benchmark} is left out: {why}.", "warning")
        return chosen

    def _tools(self, names: Any) -> Any:
        task = sibling("train.evaluate.task")
        judge = None
        if self.judge_url is not None:
            judge = sibling("train.evaluate.server").ServerModel(self.judge_url, self.judge_model)
        sandbox = None
        if any(one.needs_sandbox for one in names.ours):
            sandbox = sibling("train.sandbox").Sandbox(workers=self.workers)
        return task.Tools(judge, sandbox, self.workers)

    def _measured(self) -> tuple[Any, Any]:
        """The model, and the tokenizer that formats conversations for it."""
        if self.base_url is not None:
            server = sibling("train.evaluate.server")
            return server.ServerModel(self.base_url, self.served_model, concurrency=self.max_seqs), None
        model = Model(str(self.model), Sampling(), self.running, need_tokenizer=True)
        # The identity of a model is the hash of all files in its folder: results in it would change it each time.
        check_apart(self.output, model.folder)
        return InProcess(model, self.max_seqs), model.tokenizer

    def _show(self, summary: Mapping[str, Any]) -> int:
        report = sibling("train.evaluate.report")
        if self.json:
            print(to_json(summary))
        else:
            rows = [
                [task, name, *report.shown(metric), str(metric["items"])]
                for task, found in summary["tasks"].items()
                for name, metric in found["metrics"].items()
            ]
            print_table(str(summary["model"]["name"]), ["task", "metric", "score", "95% interval", "items"], rows)
            print(f"all numbers: {self.output / 'summary.json'}; to read: {self.output / 'report.html'}")
        failed = (summary.get("harness") or {}).get("failed", {})
        for task, why in failed.items():
            complain(f"{task}: {why.rstrip('.')}.")
        unscored = len(failed)
        for task, found in summary["tasks"].items():
            lacking = max((metric["unscored"] for metric in found["metrics"].values()), default=0)
            unscored += lacking
            for line in report.problems_of(found):
                complain(f"{task}: {line.rstrip('.')}.", "error" if lacking else "warning")
        return int(unscored > 0)


@dataclasses.dataclass(frozen=True)
class List:
    """Show the benchmarks, with shots and metrics, and whether the files of each are below --data-root.

    Args:
      data_root: Folder below which the data lies.
      suite: Show the benchmarks of qwen2.5-base or qwen2.5-instruct, those of lm-eval too.
      json: Print a JSON object for each.
    """

    data_root: Root = None
    suite: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    json: bool = False

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        if self.suite is not None:
            return self._show_suite(self.suite)
        registry = sibling("train.evaluate.registry")
        rows = []
        for name, task in sorted(registry.tasks().items()):
            states = registry.states(task, self.data_root)
            missing, changed = ([path for path, x in states.items() if x == state] for state in ("missing", "changed"))
            found = {
                "task": name,
                "shots": task.shots,
                "metrics": [metric.name for metric in task.metrics],
                "missing": missing,
                "changed": changed,
                "sources": sorted({file.source for file in task.files}),
                "needs": [what for what in ("judge", "sandbox") if getattr(task, f"needs_{what}")],
                "citation": task.citation,
            }
            if self.json:
                print(to_json(found))
            needs = [*missing, *(f"{path} as published" for path in changed), *(f"a {what}" for what in found["needs"])]
            rows.append([name, str(task.shots), ", ".join(found["metrics"][:3]), ", ".join(needs) or "nothing"])
        if not self.json:
            print_table("benchmarks", ["task", "shots", "metrics", "still needs"], rows, texts=4)
            print("Further names are those of lm-eval's tasks.")
        return 0

    def _show_suite(self, name: str) -> int:
        """Shows what of a suite can run here."""
        suite = sibling("train.evaluate.suites").suite(name)
        left_out = sibling("train.evaluate.evaluation").choose(suite, self.data_root, judge=True).left_out
        rows = []
        for entry in suite.entries:
            why = left_out.get(entry.benchmark)
            if self.json:
                print(to_json({**dataclasses.asdict(entry), "missing": why}))
            task = f"{entry.side}: {entry.task}" if entry.task else ""
            rows.append([entry.benchmark, task, str(entry.shots), why or "ready", entry.note])
        if not self.json:
            print_table(name, ["benchmark", "task", "shots", "here", "note"], rows, texts=5)
        return 0


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two evaluations item by item: differences with 95% intervals and a paired test (McNemar's exact test for
    scores of 0 and 1, else a permutation test). Settings that differ are named.

    Args:
      a: Results of one model: the --output of `qwen-jax eval`.
      b: Results of the other one.
      json: Print the comparison as JSON.
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    json: bool = False

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        found = sibling("train.evaluate.compare").compare(self.a, self.b)
        if self.json:
            print(to_json(found))
            return 0
        rows = []
        for task, of in found["tasks"].items():
            for name, one in of["metrics"].items():
                scale = one["scale"]
                if one["items"] == 0:
                    rows.append([task, name, "", "", "no common scores", "", "", "0"])
                    continue
                interval = "" if one["low"] is None else f"{one['low'] * scale:+.2f} to {one['high'] * scale:+.2f}"
                values = [f"{one['a'] * scale:.2f}", f"{one['b'] * scale:.2f}", f"{one['value'] * scale:+.2f}"]
                rows.append([task, name, *values, interval, f"{one['p']:.3g}", str(one["items"])])
        head = ["task", "metric", "A", "B", "B - A", "95% interval", "p", "items"]
        print_table(f"A: {found['a']}, B: {found['b']}", head, rows)
        for warning in found["warnings"]:
            complain(f"{warning}.", "warning")
        return 0


class InProcess:
    """A checkpoint in this process, whose weights are loaded with the first request that is left to do.

    One copy of the weights serves the log-probabilities and the generated texts. The cache of the engine takes memory
    from the first text on.
    """

    def __init__(self, model: Model, max_seqs: int) -> None:
        """
        Args:
          model: small files and options.
          max_seqs: texts that are generated at the same time.
        """
        from qwen_jax.cli.formats import hashes

        assert model.tokenizer is not None
        if model.running.attention != "dense":
            raise InputError(
                f"Benchmarks are run with all keys, got --attention {model.running.attention}. Leave it out; qwen-jax "
                "eval ruler measures sparse attention."
            )
        self._model, self._max_seqs = model, max_seqs
        self._weights: tuple[ModelConfig, Any, str] | None = None
        self._scorer: LikelihoodScorer | None = None
        self._engine: ContinuousEngine | None = None
        encoding = sibling("train.evaluate.encoding")
        self.name = str(model.checkpoint)
        self.context_length = model.config.context_length
        self._encoder = encoding.RequestEncoder(model.tokenizer, self.context_length)
        running = model.running
        self._identity = {
            **hashes(self.name, running.adapter),
            "dtype": model.dtype,
            "tokenizer": model.tokenizer.fingerprint(),
            "running": {**dataclasses.asdict(running), "adapter": None},
        }

    def identity(self) -> Mapping[str, Any]:
        """See `train.evaluate.task.Model.identity`."""
        return self._identity

    def answer(self, requests: Sequence[Any], done: Callable[[int, Any], None]) -> None:
        """See `train.evaluate.task.Model.answer`."""
        generate = sibling("train.evaluate.task").Generate
        if self._weights is None:
            self._weights = self._load()
        if self._scorer is None:
            self._scorer = self._new_scorer(*self._weights)
        if self._engine is None and any(isinstance(request, generate) for request in requests):
            self._engine = self._new_engine(*self._weights)
        token_model = sibling("train.evaluate.token_model").TokenModel
        token_model(self.name, self._encoder, self._scorer, self._engine).answer(requests, done)

    def close(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _load(self) -> "tuple[ModelConfig, Any, str]":
        """The weights in the layout of inference, which both sides read."""
        import jax

        from qwen_jax.inference.weights import fuse
        from qwen_jax.parallel.sharding import Sharding

        config, params, dtype = self._model.loaded()
        with jax.set_mesh(self._model.mesh):
            return config, fuse(params, config, Sharding.for_inference(config, self._model.mesh)), dtype

    def _new_scorer(self, config: "ModelConfig", params: Any, dtype: str) -> "LikelihoodScorer":
        from qwen_jax.inference.likelihood import LikelihoodScorer

        kernel = self._model.running.attention_kernel
        return LikelihoodScorer(config, params, self._model.mesh, dtype=dtype, attention=kernel)

    def _new_engine(self, config: "ModelConfig", params: Any, dtype: str) -> "ContinuousEngine":
        from qwen_jax.inference import ContinuousEngine

        model = self._model
        return ContinuousEngine(
            config,
            params,
            model.mesh,
            tokenizer=model.tokenizer,
            dtype=dtype,
            max_seqs=self._max_seqs,
            memory_fraction=_ENGINE_MEMORY,
            attention=model.running.attention_kernel,
            kv_dtype=model.running.kv_dtype,
            eos_token_ids=model.eos_token_ids,
        )


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 2) -> None:
    """Prints a table to standard output: as wide as a terminal, or as its text where a file or a program reads it.

    Args:
      title: of the table.
      head: names of the columns.
      rows: cells of each row.
      texts: how many columns, the first ones, hold texts; the others hold numbers, on the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000).print(table)
