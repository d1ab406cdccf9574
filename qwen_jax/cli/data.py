"""`qwen-jax data`: documents to packed rows (build), test items taken out (decontaminate), what is trained of examples
(show), pairs that people label (review), samples of GRPO (rollouts)."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_jax.cli.common import ModelOption, Seed, model_name, parse, sibling
from qwen_jax.errors import InputError

FileOption = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


def build(argv: Sequence[str]) -> int:
    """Runs `train.data.build`, with the fields of `BuildConfig` and `--json` as options.

    Args:
      argv: arguments after `data build`.
    """
    module = sibling("train.data.build")
    fields = [("json", bool, dataclasses.field(default=False))]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(module.BuildConfig,), frozen=True)
    options_type.__doc__ = (
        f"{module.BuildConfig.__doc__.rstrip()}\n      json: print the summary as one JSON object.\n    "
    )
    options = parse(options_type, "data build", argv)
    names = [f.name for f in dataclasses.fields(module.BuildConfig)]
    manifest = module.build(module.BuildConfig(**{name: getattr(options, name) for name in names}))
    if options.json:
        keys = ("rows", "length", "tokens", "documents", "padding", "empty", "bad", "fingerprint")
        summary = {"domain": manifest.domain, "output": str(options.output)}
        print(json.dumps(summary | {key: getattr(manifest, key) for key in keys}))
        return 0
    left_out = manifest.left_out(options.output)
    print(
        f"{manifest.tokens:,} tokens of {manifest.documents:,} documents in {manifest.rows:,} rows of "
        f"{manifest.length:,} ({manifest.padding:.2%} padding) in {options.output}"
        + (f"; {left_out}" if left_out else "")
    )
    return 0


def decontaminate(argv: Sequence[str]) -> int:
    """Runs `train.curate.decontaminate`, with the fields of `DecontaminateConfig`, `--report` and `--json` as options.

    Args:
      argv: arguments after `data decontaminate`.
    """
    module = sibling("train.curate.decontaminate")
    config_type = module.DecontaminateConfig
    fields = [
        ("report", FileOption, dataclasses.field(default=None)),
        ("json", bool, dataclasses.field(default=False)),
    ]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(config_type,), frozen=True)
    options_type.__doc__ = (
        f"{config_type.__doc__.rstrip()}\n      report: write a page with examples, both texts side by side, to this "
        "file.\n      json: print the summary as one JSON object.\n    "
    )
    options = parse(options_type, "data decontaminate", argv)
    names = [f.name for f in dataclasses.fields(config_type)]
    summary = module.decontaminate(config_type(**{name: getattr(options, name) for name in names}))
    report = sibling("train.curate.decontaminate_report")
    if options.report:
        try:
            sibling("train.files").write_file(options.report, report.to_html(summary).encode())
        except OSError as error:
            raise InputError(f"Cannot write {options.report}: {error.strerror}. Give another file.") from None
    print(json.dumps(summary) if options.json else report.to_text(summary, options.output))
    return 0


@dataclasses.dataclass(frozen=True)
class Show:
    """Show examples for fine-tuning as a model is trained on them, with the trained text in colour.

    Files are JSON lines, JSON, Parquet, Arrow or a folder that `datasets` saved, with the columns messages; prompt and
    completion; prompt, chosen and rejected; or chosen and rejected. Messages are rendered with the chat template.

    Args:
        files: Files, folders or patterns.
        model: Folder of the model, or Hub id.
        tokenizer: Folder of the tokenizer, instead of a model.
        kind: Which columns to read, where the files have those of both.
        limit: Number of examples.
        trained: Turns of the assistant that are trained.
        newline: Also train the line end after <|im_end|>.
        parse_special: Read control tokens that are typed into messages as such, not as plain text.
        html: Write a page to this file instead of printing.
        json: Print each example as a JSON object on a line.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    model: ModelOption = None
    tokenizer: ModelOption = None
    kind: Literal["sft", "pairs"] | None = None
    limit: int = 5
    trained: Literal["all", "last"] = "all"
    newline: bool = False
    parse_special: bool = False
    html: Path | None = None
    json: bool = False

    def run(self) -> int:
        if not self.files:
            raise InputError("No examples. Give files, folders or patterns.")
        if self.limit < 1:
            raise InputError(f"limit must be at least 1, got {self.limit}.")
        from rich.console import Console

        from qwen_jax.tokenizer import load_tokenizer

        examples, show = sibling("train.data.examples"), sibling("train.data.show")
        tokenizer = load_tokenizer(model_name(self.tokenizer, self.model))
        files = sibling("train.data.tables").find_tables(self.files)
        options = examples.ExampleOptions(self.trained, self.newline, self.parse_special)
        shown = show.show_examples(files, tokenizer, options, kind=self.kind, limit=self.limit)
        if self.html:
            page = show.to_html(list(shown))
            try:
                sibling("train.files").write_file(self.html, page.encode())
            except OSError as error:
                raise InputError(f"Cannot write {self.html}: {error.strerror}. Give another file.") from None
            print(f"wrote {self.html}")
            return 0
        console = Console(highlight=False)
        for example in shown:
            if self.json:
                print(json.dumps(example.to_json()))
            else:
                show.print_example(example, console)
        return 0


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Show what a run of `qwen-jax train grpo` has sampled: rewards of its episodes, or a page to browse the responses.

    Args:
        run_folder: Output folder of the run.
        episodes: How many of the newest episodes.
        html: Write a page with all responses to this file.
        json: Print the numbers of each episode as a JSON object on a line.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    episodes: int = 20
    html: Path | None = None
    json: bool = False

    def run(self) -> int:
        if self.episodes < 1:
            raise InputError(f"episodes must be at least 1, got {self.episodes}.")
        page = sibling("train.rollout_page")
        found = page.read_episodes(self.run_folder, self.episodes)
        if self.html:
            try:
                sibling("train.files").write_file(self.html, page.to_html(found).encode())
            except OSError as error:
                raise InputError(f"Cannot write {self.html}: {error.strerror}. Give another file.") from None
            print(f"wrote {self.html}")
            return 0
        for episode in found:
            metrics = episode.metrics()
            if self.json:
                print(json.dumps({"episode": episode.number + 1, "version": episode.version, **metrics}))
            else:
                reward = "no reward"
                if episode.has_signal:
                    reward = f"reward {metrics['reward/mean']:.3f} ± {metrics['reward/std']:.3f}"
                print(
                    f"episode {episode.number + 1}: {reward}, "
                    f"{metrics['response/tokens']:.0f} tokens a response, {metrics['response/unfinished']:.0%} cut"
                )
        return 0


@dataclasses.dataclass(frozen=True)
class Review:
    """Label preference pairs on a local page: which answer is better, by six criteria and overall, with keys alone.

    The file is JSON lines, JSON, Parquet or Arrow, with the columns of preference pairs (prompt, chosen and rejected,
    or chosen and rejected), or prompt and responses, a list of answers that are shown in pairs. Answers stand left and
    right at random. Several people may label at once, each in a browser. Only this machine can open the page.

    Args:
        file: The pairs.
        labels: File to which labels are added; by default FILE.labels.jsonl.
        labeller: Name of the only one who labels; by default the page asks.
        seed: Of the order in which answers are shown.
        port: On 127.0.0.1; 0 takes a free one.
        report: Print how far the labellers agree, instead of serving the page.
        export: Write the pairs that more than half of the labels decide, as prompt, chosen and rejected, to this file.
        min_labels: Leave pairs with fewer labels out of the export.
        json: Print a JSON object.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    labels: FileOption = None
    labeller: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    seed: Seed = 0
    port: int = 0
    report: bool = False
    export: FileOption = None
    min_labels: int = 1
    json: bool = False

    def run(self) -> int:
        review = sibling("train.synthesize.review")
        path = self.labels or review.default_labels(self.file)
        if self.report and self.export:
            raise InputError("--report and --export do different things. Give one of them.")
        if (self.report or self.export) and not path.exists():
            raise InputError(f"{path} does not exist, so there are no labels. Label pairs first, or give --labels.")
        pairs = sibling("train.synthesize.review_pairs").read_pairs(self.file)
        labelled = review.Review(pairs.pairs, review.open_labels(path, pairs), self.seed)
        if self.report:
            kappa = sibling("train.synthesize.kappa")
            found = kappa.report(labelled.pairs, labelled.labels.newest())
            print(json.dumps(found) if self.json else kappa.to_text(found))
            return 0
        if self.export:
            written = review.export(labelled, self.export, self.min_labels)
            print(json.dumps(dataclasses.asdict(written)) if self.json else f"{written.text()} in {self.export}")
            return 0
        labelled.labels.check_writable()
        server = sibling("train.synthesize.review_server").ReviewServer(
            labelled, self.file.name, self.labeller, self.port
        )
        with server:
            if self.json:
                print(json.dumps({"url": server.url, "pairs": len(pairs.pairs), "labels": str(path)}), flush=True)
            else:
                left_out = pairs.left_out()
                print(f"{len(pairs.pairs):,} pairs{f', {left_out}' if left_out else ''}. Labels are kept in {path}.")
                print(f"Open {server.url} (Ctrl-C ends)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        return 0
