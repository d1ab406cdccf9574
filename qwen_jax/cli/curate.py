"""`qwen-jax data curate`: pre-training data from raw documents."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Count, parse, sibling
from qwen_jax.cli.function_options import config_of, result_of, with_arguments
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Curate documents for pre-training: read, extract, score, select, deduplicate, mix; write what is kept.

    A curation is a Python function that returns a `train.curate.curation.Curation`; its arguments are options of this
    command: `--config FILE.py --help` shows them. FILE.py may hold:

        from train.curate.curation import Curation, Input, Map, Select
        from train.curate.operators.heuristics import Statistics

        def curation(web: str, least_words: int = 50) -> Curation:
            return Curation(
                [Input("web", web)],
                [Map("features", [Statistics()]), Select(f"words >= {least_words}")],
            )

    and `qwen-jax data curate --config FILE.py --web 'web/*.jsonl.zst' --output RUN` runs it. RUN/output has a folder
    for each input, which `qwen-jax data build` reads; RUN/report.html says what was removed and why. The same command
    goes on where an earlier one ended; after a change it makes anew only what reads what was changed.

    Args:
        config: FILE.py, or FILE.py:function (by default the function is called curation).
        output: Folder for documents, columns, output, manifests and report.
        workers: Worker processes; by default one a core.
        engine: native is this machine; ray is a Ray cluster whose nodes all see input and output.
        address: Of the Ray cluster; by default RAY_ADDRESS, or else a Ray that is started on this machine.
        tokenizer: Folder of a tokenizer: also pack the output into rows of tokens, in RUN/rows, as `qwen-jax data
            build` does.
        length: Tokens in a row.
        json: Print the summary as one JSON object.
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE.py")]
    output: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    workers: Count = None
    engine: Literal["native", "ray"] = "native"
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    length: Count = None
    json: bool = False


def curate(argv: Sequence[str]) -> int:
    """Runs a curation; the function's arguments are options beside those of `Options`.

    Args:
      argv: arguments after `data curate`.
    """
    config = config_of(argv)
    if config is None:
        # Without a function there is only the general help, or the error that --config is missing.
        parse(Options, "data curate", argv)
        raise AssertionError("--config is required")
    function = sibling("train.curate.loading").load_curation(config)
    options = parse(with_arguments(Options, function), "data curate", argv)
    curation = result_of(function, config, options)
    if not isinstance(curation, sibling("train.curate.curation").Curation):
        raise InputError(f"{config} returned a {type(curation).__name__}, expected a Curation.")
    if (options.tokenizer is None) != (options.length is None):
        raise InputError("--tokenizer and --length belong together: give both to pack rows, or none.")
    if options.tokenizer is not None:
        from qwen_jax.tokenizer import load_tokenizer

        load_tokenizer(options.tokenizer)
        # Checks the length, before any work is done.
        sibling("train.data.build").BuildConfig(
            (str(options.output),), options.tokenizer, options.length, options.output
        )
    runner = sibling("train.curate.run")
    from rich.console import Console

    run_options = runner.RunOptions(options.engine, options.workers, options.address)
    console = Console(stderr=True)
    summary = runner.run(curation, options.output, run_options, console)
    if options.tokenizer is not None:
        packing = sibling("train.curate.pack")
        summary["rows"] = packing.pack(options.output, options.tokenizer, options.length, options.workers, console)
    print(json.dumps(summary) if options.json else _text(summary, options.output))
    return 0


def _text(summary: dict[str, Any], folder: Path) -> str:
    """A summary for people."""
    lines = []
    for name, found in summary["inputs"].items():
        faults = list({**found["broken"], **found["damaged"]})
        lines.append(f"{name}: {found['documents']:,} documents of {found['files']:,} files")
        lines += [f"    {count:,} unusable: {reason}" for reason, count in found["bad"].items()]
        lines += [f"    {count:,} skipped: {reason}" for reason, count in found["skipped"].items()]
        if faults:
            shown = ", ".join([*faults[:3], *(["..."] if len(faults) > 3 else [])])
            lines.append(f"    {len(faults):,} damaged files: {shown}")
        if faults or found["bad"]:
            lines.append(f"    all are listed in {folder / 'bad.jsonl'}")
    for stage in summary["stages"]:
        lines.append(f"{stage['name']}: {stage['out']:,} of {stage['in']:,}")
        lines += [f"    {count:,} {reason}" for reason, count in list(stage["removed"].items())[:10]]
    lines += [f"{count:,} not written: {reason}" for reason, count in summary["writing"]["removed"].items()]
    lines += [
        f"{folder / 'output' / name}: {out['written']:,} documents, {out['bytes'] / 1e6:,.1f} MB of text"
        for name, out in summary["output"].items()
    ]
    lines += [
        f"{data['folder']}: {data['tokens']:,} tokens in {data['rows']:,} rows"
        for data in summary.get("rows", {}).values()
    ]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])
