"""`qwen-jax eval`: what a model makes of long contexts."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, ModelOption, ModelPosition, Seed, check_apart, given, model_name, sibling
from qwen_jax.cli.failures import complain
from qwen_jax.cli.lines import read_text
from qwen_jax.cli.model import Model, Running, Sampling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json, why_unusable

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig
    from qwen_jax.inference import Engine

Lengths = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")]
Depths = Annotated[tuple[float, ...], tyro.conf.arg(metavar="PERCENT [PERCENT ...]")]
FileOption = Annotated[str | None, tyro.conf.arg(metavar="FILE")]
# The names of `train.evaluate.ruler.RULER`.
RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
# Requests that are open at a server at once, unless a number is given.
_REQUESTS = 8
# Where no --lengths are given: those of them that the model's context holds.
_LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclasses.dataclass(frozen=True)
class Common:
    """Which model, how it is run, and where results go.

    Args:
      folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
      model: The same, as an option.
      lengths: In tokens; by default 1,024 to 32,768, as far as the model's context holds them.
      output: Folder for results; by default eval- and the name of the task.
      batch_size: Prompts that are read at once; by default as many as have 65,536 tokens, at most 32.
      json: Print the summary as JSON, instead of a table.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    lengths: Lengths = ()
    output: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    batch_size: Count = None
    running: tyro.conf.OmitArgPrefixes[Running] = dataclasses.field(default_factory=Running)
    json: bool = False

    def open_model(self, task: str, need_tokenizer: bool = True) -> Model:
        """The model's small files; its weights are loaded later."""
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        # Answers on token ids end by their length alone.
        sampling = Sampling(ignore_eos=not need_tokenizer)
        model = Model(model_name(self.folder, self.model), sampling, self.running, need_tokenizer=need_tokenizer)
        check_apart(self.results(task), model.folder)
        return model

    def chosen_lengths(self, config: "ModelConfig") -> tuple[int, ...]:
        """The lengths, in tokens. Raises InputError if one exceeds the model's context."""
        check_context = sibling("train.evaluate.perplexity").check_context
        for length in self.lengths:
            check_context(config, length)
        default = tuple(n for n in _LENGTHS if n <= config.context_length) or (config.context_length,)
        return self.lengths or default

    def results(self, task: str) -> Path:
        """The folder for results."""
        return Path(self.output if self.output is not None else f"eval-{task}")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is hidden, and how often.

    Args:
      depths: Where it is hidden, in percent of the context.
      samples: How many of each length and depth.
      seed: Of all random numbers.
      form: completion is plain text, which suits every model; chat uses the chat template. Both end in the beginning
        of the answer.
      base_url: Ask this OpenAI-compatible server, by token ids (/completions). The model's folder is then needed for
        its tokenizer and config.json only, and --batch-size is how many requests are open at once, by default 8.
      served_name: The name of the model at the URL, if it serves several.
    """

    depths: Depths = (0.0, 25.0, 50.0, 75.0, 100.0)
    samples: int = 10
    seed: Seed = 0
    form: Literal["completion", "chat"] = "completion"
    base_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    served_name: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Tasks on bare token ids, for small models that were trained without text.

    Args:
      token_ids: Hide random ids among random ids; needs no tokenizer.
      first_id: The first id of the task's markers, values, keys and noise.
    """

    token_ids: bool = False
    first_id: int = 0


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Hide a number of five digits in a long context, and ask for it. The score is the share of answers with all digits
    right (Mohtashami & Jaggi 2023, arXiv:2305.16300).

    A length counts prompt and answer, and is exact. The folder of results gets results.jsonl (one record a sample),
    summary.json and heatmap.png. The same command goes on after an interruption. The exit status is 1 if the model gave
    logits that are not finite.

    Example: qwen-jax eval passkey DIR --lengths 4096 32768 --depths 0 50 100 --samples 20

    Args:
      haystack: Hide it in this text; by default in sentences of noise.
    """

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)
    search: tyro.conf.OmitArgPrefixes[Search] = dataclasses.field(default_factory=Search)
    ids: tyro.conf.OmitArgPrefixes[TokenIds] = dataclasses.field(default_factory=TokenIds)
    haystack: FileOption = None

    def run(self) -> int:
        return _search("passkey", self.common, self.search, self.ids, self.haystack)


@dataclasses.dataclass(frozen=True)
class Needle:
    """Hide keys with values ("One of the special magic numbers for silver-otter is: 7654321.") in a long context, and
    ask for the values of some. The score is the share of values that the answer contains, as in RULER
    (arXiv:2404.06654).

    A length counts prompt and answer, and is exact. The first key that is asked for is at the depth, the others
    anywhere. Results and exit status are those of `qwen-jax eval passkey`.

    Example: qwen-jax eval needle DIR --lengths 8192 65536 --needles 8 --asked 4 --haystack book.txt

    Args:
      haystack: Hide them in this text; by default in sentences of noise.
      needles: Keys in the context.
      asked: How many of them are asked for.
    """

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)
    search: tyro.conf.OmitArgPrefixes[Search] = dataclasses.field(default_factory=Search)
    ids: tyro.conf.OmitArgPrefixes[TokenIds] = dataclasses.field(default_factory=TokenIds)
    haystack: FileOption = None
    needles: int = 1
    asked: int = 1

    def run(self) -> int:
        if self.ids.token_ids and self.asked != 1:
            raise InputError(f"--token-ids asks for one key, got --asked {self.asked}. Leave it out.")
        return _search("needle", self.common, self.search, self.ids, self.haystack, self.needles, self.asked)


@dataclasses.dataclass(frozen=True)
class Ruler:
    """Run RULER (arXiv:2404.06654): eight kinds of needles, chains of variables (vt), the most common words of a list
    (cwe), the most frequent coded words (fwe), and questions with many documents (qa_1, qa_2). The score is the share
    of references that the answer contains; of questions, whether it contains one.

    Five kinds of needles are hidden in a text (--haystack), such as a book. Questions come from a file in the form of
    SQuAD (qa_1) or HotpotQA (qa_2). Without these, the tasks that need them are left out, and named.

    A length counts prompt and answer, and is exact. Tasks without a depth have as many samples as the others at all
    depths together. Results and exit status are those of `qwen-jax eval passkey`.

    Example: qwen-jax eval ruler DIR --haystack book.txt --qa dev-v2.0.json --lengths 4096 131072 --form chat

    Args:
      tasks: Which of them; by default all for which there is the material.
      haystack: Hide needles in this text; white space becomes single spaces.
      qa: A JSON file of questions with documents; may be given twice, once in each form.
    """

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)
    search: tyro.conf.OmitArgPrefixes[Search] = dataclasses.field(default_factory=Search)
    tasks: tuple[RulerTask, ...] = ()
    haystack: FileOption = None
    qa: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()

    def run(self) -> int:
        ruler = sibling("train.evaluate.ruler")
        read = sibling("train.evaluate.questions").read_questions
        found = [read(Path(name)) for name in self.qa]
        questions = {of.task: of for of in found}
        if len(questions) < len(found):
            raise InputError("Two files of --qa have the same form. Give one in the form of SQuAD, one of HotpotQA.")
        names = self._names(ruler, {*questions})
        hashes = {of.task: _sha256(Path(of.name).read_text("utf-8-sig")) for of in found}
        text = None if self.haystack is None else " ".join(_read(self.haystack).split())
        model, source, settings = _open_text("ruler", self.common, self.search, self.haystack, text, questions)
        make = _text_maker({name: ruler.RULER[name] for name in names}, source, self.search.seed)
        return _answer("ruler", self.common, self.search, model, names, make, {**settings, "questions": hashes})

    def _names(self, ruler: Any, questions: set[str]) -> dict[str, bool]:
        """The tasks that are run, and whether they have a depth; those that lack material are named."""
        needed = dict.fromkeys(ruler.WITH_TEXT, "--haystack FILE") if self.haystack is None else {}
        for task, form in zip(ruler.WITH_QUESTIONS, ("SQuAD", "HotpotQA"), strict=True):
            if task not in questions:
                needed[task] = f"--qa FILE in the form of {form}"
        lacking = [name for name in self.tasks or ruler.RULER if name in needed]
        listed = ", ".join(f"{name} ({needed[name]})" for name in lacking)
        if lacking and self.tasks:
            raise InputError(f"Some tasks need a file: {listed}. Give it, or leave them out of --tasks.")
        if lacking:
            print(f"left out, as they need a file: {listed}", file=sys.stderr)
        wanted = [name for name in self.tasks or ruler.RULER if name not in needed]
        return {name: name in ruler.WITH_DEPTH for name in dict.fromkeys(wanted)}


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Measure the loss by position over a long text, in windows of each length. Windows of all lengths end at the same
    places, so the loss of their last tokens is that of the same tokens with more or less context.

    The folder of results gets summary.json and perplexity.png.

    Example: qwen-jax eval perplexity DIR --text book.txt --lengths 4096 32768 --windows 8

    Args:
      text: A UTF-8 text; may be given several times; the texts are joined.
      windows: At most this many of each length.
      last: How many tokens count as the last of a window.
      bucket: Tokens of a bucket of positions; by default buckets double: 1, 2, 4 and so on.
      loss_chunk: Tokens of a device whose logits exist at one time.
    """

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)
    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    windows: int = 16
    last: int = 1024
    bucket: Count = None
    loss_chunk: int = 2048

    def run(self) -> int:
        # What is wrong for any model.
        if not self.text:
            raise InputError("Give a text: --text FILE.")
        if min(self.last, self.loss_chunk, 1 if self.bucket is None else self.bucket) < 1:
            raise InputError("--last, --bucket and --loss-chunk must be at least 1.")
        text = "\n".join(map(_read, self.text))
        model = self.common.open_model("perplexity")
        assert model.tokenizer is not None
        module = sibling("train.evaluate.perplexity")
        lengths = self.common.chosen_lengths(model.config)
        # The text, in tokens.
        import numpy as np

        ids = np.asarray(model.tokenizer.encode(text, parse_special=False), np.int32)
        if not self.common.lengths:
            # Without --lengths, those that the text is long enough for.
            lengths = tuple(n for n in lengths if n <= len(ids)) or lengths
        rows = module.windows(ids, lengths, self.windows)
        folder = self.common.results("perplexity")
        settings = _settings(self.common, model, lengths=list(lengths), windows=self.windows, text=_sha256(text))
        runner = sibling("train.evaluate.runner")
        runner.open_folder(folder, settings)
        # Losses.
        engine = model.engine()
        measured = []
        with runner.progress_bar("perplexity", sum(map(np.size, rows.values()))) as advance:
            for length in lengths:
                size = self.common.batch_size or max(1, 65_536 // length)
                step = lambda count, length=length: advance(count * length)  # noqa: E731
                measured.append(module.position_losses(engine, rows[length], size, self.loss_chunk, step))
        summary = {"settings": settings, "lengths": module.summarise(measured, self.last, self.bucket)}
        sibling("train.files").write_file(folder / runner.SUMMARY, (to_json(summary, indent=2) + "\n").encode())
        curves = {f"{part['length']:,} tokens": part["buckets"] for part in summary["lengths"]}
        title = f"{model.checkpoint}: loss by position"
        sibling("train.evaluate.pictures").plot_losses(curves, folder / "perplexity.png", title)
        self._show(summary, folder)
        return 0

    def _show(self, summary: Mapping[str, Any], folder: Path) -> None:
        if self.common.json:
            print(to_json(summary))
            return

        def figures(of: Mapping[str, float]) -> list[str]:
            return [f"{of['loss']:.4f}", f"{of['perplexity']:.3f}"]

        rows = [
            [f"{part['length']:,}", str(part["windows"]), *figures(part), *figures(part["last"])]
            for part in summary["lengths"]
        ]
        head = ["length", "windows", "loss", "perplexity", f"loss, last {self.last:,}", "perplexity"]
        _print_table("Loss in nats per token", head, rows)
        print(f"all numbers: {folder / 'summary.json'}; by position: {folder / 'perplexity.png'}")


class _Loading:
    """An engine whose weights are loaded when the first prompt is there: a finished run needs none."""

    def __init__(self, model: Model):
        self._model = model
        self._engine: Engine | None = None

    def generate(self, *prompts: Any, **options: Any) -> list[Any]:
        """See `Engine.generate`."""
        if self._engine is None:
            self._engine = self._model.engine()
        return self._engine.generate(*prompts, **options)


def _search(
    task: str, common: Common, search: Search, ids: TokenIds, haystack: str | None, needles: int = 1, asked: int = 1
) -> int:
    """Runs passkey or needle, in text or on token ids."""
    if ids.token_ids:
        if search.base_url is not None:
            raise InputError(
                "--token-ids needs the ids of answers, which a server does not give. Leave --base-url out."
            )
        if haystack is not None:
            raise InputError("--haystack is a text, and --token-ids needs none. Leave one of them out.")
        model = common.open_model(task, need_tokenizer=False)
        synthetic = sibling("train.evaluate.synthetic_ids")
        layout = synthetic.IdLayout(ids.first_id, model.vocab_limit)
        settings = _settings(common, model, seed=search.seed, first_id=ids.first_id, needles=needles)

        def make(case: Any) -> Any:
            return synthetic.needle_sample(case.rng(search.seed), case.length, case.depth, layout, needles)

        return _answer(task, common, search, model, {task: True}, make, settings)
    tasks = sibling("train.evaluate.tasks")
    generate = tasks.passkey if task == "passkey" else tasks.Needles(needles=needles, asked=asked)
    text = None if haystack is None else _read(haystack)
    model, source, settings = _open_text(task, common, search, haystack, text)
    settings |= {"needles": needles, "asked": asked} if task == "needle" else {}
    maker = _text_maker({task: generate}, source, search.seed)
    return _answer(task, common, search, model, {task: True}, maker, settings)


def _open_text(
    task: str,
    common: Common,
    search: Search,
    haystack: str | None,
    text: str | None,
    questions: Mapping[str, Any] | None = None,
) -> tuple[Model, Any, dict[str, Any]]:
    """Opens a model and what its prompts are made of; returns them with the settings that decide the results."""
    served = search.base_url is not None
    # The server computes; what extends the context decides which lengths fit.
    extends = ("--rope-scaling", "--dual-chunk", "--trained-length")
    if served and (unread := [option for option in given(common.running) if option not in extends]):
        raise InputError(f"Leave out {', '.join(unread)}: with --base-url the server has its own.")
    if search.served_name is not None and not served:
        raise InputError("Leave out --served-name: without --base-url nothing reads it.")
    model = common.open_model(task)
    assert model.tokenizer is not None
    encoder = sibling("train.evaluate.text").Encoder(model.tokenizer, search.form)
    source = sibling("train.evaluate.tasks").Source.of(encoder, text, f"The haystack {haystack}", questions)
    hidden_in = None if text is None else _sha256(text)
    return model, source, _settings(common, model, served, seed=search.seed, form=search.form, haystack=hidden_in)


def _text_maker(tasks: Mapping[str, Any], source: Any, seed: int) -> Callable[[Any], Any]:
    return lambda case: tasks[case.task](source, case.length, case.depth or 0.0, case.rng(seed))


def _answer(
    task: str,
    common: Common,
    search: Search,
    model: Model,
    tasks: Mapping[str, bool],
    make: Callable[[Any], Any],
    settings: Mapping[str, Any],
) -> int:
    """Makes a prompt of each kind, which finds out what does not fit; then loads the weights and runs all."""
    runner = sibling("train.evaluate.runner")
    cases = runner.cases(tasks, common.chosen_lengths(model.config), search.depths, search.samples)
    for case in {(case.task, case.length): case for case in cases}.values():
        make(case)
    folder = common.results(task)
    engine: Any = _Loading(model)
    batch_size = common.batch_size
    if search.base_url is not None:
        batch_size = batch_size or _REQUESTS
        served = sibling("train.evaluate.served").ServedIds
        engine = served(search.base_url, search.served_name, concurrency=batch_size)
        settings = {**settings, "server": {"url": engine.url, "model": engine.model}}
    runner.open_folder(folder, settings)
    summary = runner.run(engine, make, cases, folder, settings, batch_size)
    picture = folder / "heatmap.png"
    sibling("train.evaluate.pictures").plot_scores(summary, picture, f"{model.checkpoint}: {task}")
    if common.json:
        print(to_json(summary))
    else:
        for title, head, rows in _tables(summary):
            _print_table(title, head, rows)
        print(f"all numbers: {folder / runner.SUMMARY}, {folder / runner.RESULTS}; heat map: {picture}")
    if summary["errors"]:
        complain(
            f"{summary['errors']} samples have no score, because the model's logits were not finite: see "
            f"{folder / runner.RESULTS}."
        )
    return int(bool(summary["errors"]))


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Scores over length and depth for each task with depths, and of all tasks over length."""
    found = []
    cells = summary["cells"]
    for task in dict.fromkeys(cell["task"] for cell in cells if cell["depth"] is not None):
        own = [cell for cell in cells if cell["task"] == task]
        lengths = list(dict.fromkeys(cell["length"] for cell in own))
        scores = {(cell["depth"], cell["length"]): cell["score"] for cell in own}
        rows = [
            [f"{depth:g}%", *(f"{scores[depth, n]:.2f}" for n in lengths)]
            for depth in dict.fromkeys(cell["depth"] for cell in own)
        ]
        found.append((f"{task}: score", ["depth", *(f"{n:,}" for n in lengths)], rows))
    lengths = list(next(iter(summary["lengths"].values())))
    rows = [
        [task, *(f"{of[n]:.3f}" for n in lengths), f"{summary['tasks'][task]:.3f}"]
        for task, of in summary["lengths"].items()
    ]
    if len(rows) > 1:
        # RULER's number of a length.
        every = [[of[n] for of in summary["lengths"].values()] for n in lengths]
        means = [sum(scores) / len(scores) for scores in every]
        rows.append(["mean of tasks", *(f"{mean:.3f}" for mean in means), f"{sum(means) / len(means):.3f}"])
    found.append(("mean over depths", ["task", *(f"{int(n):,}" for n in lengths), "all"], rows))
    return found


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout).print(table)


def _read(name: str) -> str:
    """A text file. Raises InputError if it cannot be read, or is not UTF-8, or is empty."""
    path = Path(name)
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
    text = read_text(path.read_bytes(), name)
    if not text.strip():
        raise InputError(f"{name} is empty. Give a file with text.")
    return text


def _sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def _settings(common: Common, model: Model, served: bool = False, **more: Any) -> dict[str, Any]:
    """What decides the results, besides lengths, depths and samples, which may grow.

    The model is known by the content of its files, and its path is recorded only. What a server serves is not known.
    """
    from qwen_jax import __version__
    from qwen_jax.cli.formats import hashes

    name = str(model.checkpoint)
    return {
        "model": name,
        **({} if served else hashes(name, common.running.adapter)),
        "config": sibling("train.fields").as_json(model.config),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.fingerprint(),
        "running": {**dataclasses.asdict(common.running), "adapter": None, "dtype": None if served else model.dtype},
        "version": __version__,
        **more,
    }
