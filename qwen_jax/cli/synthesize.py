"""`qwen-jax data synthesize`: data for post-training from a recipe and models that generate and judge."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen_jax.cli.common import Count, Number, Texts, parse, sibling
from qwen_jax.cli.function_options import config_of, result_of, with_arguments
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Make data for post-training: generate, verify, filter and pair, with a record of where each example comes from.

    A recipe is a Python function that returns a `train.synthesize.pipeline.Pipeline`; its arguments are options of this
    command: `--config RECIPE --help` shows them. A run that ends early goes on when the same command is given again;
    what a model has answered is never asked again.

    Recipes: long_responses, mathematics, code, instructions, structured_data, logic, cross_lingual, system_prompts,
    knowledge, filtering, preferences.

    Args:
        config: A recipe's name, FILE.py, or FILE.py:function (by default the function is called pipeline).
        output: Folder for examples, report.html, summary.json, and what is needed to go on.
        model: What answers: a URL of an OpenAI-compatible server (http://127.0.0.1:8000/v1), or a checkpoint folder or
            Hub id, which is loaded here. NAME=MODEL gives one of several models of the recipe, such as judge=...
        model_name: The name of the model at the URL, if it serves several. NAME=... as above.
        concurrency: Requests that are open at the same time, for each model.
        price: Of a million prompt tokens and of a million generated ones, as 0.1:0.4. NAME=... as above.
        give_up_after: Seconds without any answer after which the run ends.
        max_tokens: End once prompts and answers have so many tokens in all.
        max_cost: End once they have cost so much, in the unit of --price.
        retry_refused: Ask again what a model has refused in an earlier run of this folder.
        workers: Checks that run at the same time; by default one a processor, at most 8.
        part_items: Items that are done, and kept, at once.
        json: Print the summary as one JSON object.
    """

    config: Annotated[str, tyro.conf.arg(metavar="RECIPE|FILE.py")]
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    model: Annotated[Texts, tyro.conf.arg(metavar="[NAME=]URL|DIR")] = ()
    model_name: Annotated[Texts, tyro.conf.arg(metavar="[NAME=]ID")] = ()
    concurrency: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    price: Annotated[Texts, tyro.conf.arg(metavar="[NAME=]X:Y")] = ()
    give_up_after: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    max_tokens: Count = None
    max_cost: Number = None
    retry_refused: bool = False
    workers: Count = None
    part_items: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    json: bool = False


def synthesize(argv: Sequence[str]) -> int:
    """Runs a recipe; the function's arguments are options beside those of `Options`.

    Args:
      argv: arguments after `data synthesize`.
    """
    config = config_of(argv)
    if config is None:
        # Without a recipe there is only the general help, or the error that --config is missing.
        parse(Options, "data synthesize", argv)
        raise AssertionError("--config is required")
    recipe = sibling("train.synthesize.loading").load_recipe(config)
    options = parse(with_arguments(Options, recipe), "data synthesize", argv)
    runner = sibling("train.synthesize.run")
    pipeline = result_of(recipe, config, options)
    if not isinstance(pipeline, sibling("train.synthesize.pipeline").Pipeline):
        raise InputError(f"{config} returned a {type(pipeline).__name__}, expected a Pipeline.")
    limits = {"workers": options.workers} if options.workers is not None else {}
    run_options = runner.RunOptions(
        part_items=options.part_items,
        max_tokens=options.max_tokens,
        max_cost=options.max_cost,
        retry_refused=options.retry_refused,
        **limits,
    )
    from rich.console import Console

    generators = _generators(options, pipeline.models)
    summary = runner.run(pipeline, generators, options.output, run_options, Console(stderr=True))
    print(json.dumps(summary) if options.json else _text(summary, options.output))
    return 128 + int(summary["stopped_by"]) if summary["stopped_by"] else 0


def _named(given: Sequence[str], names: Sequence[str], option: str) -> dict[str, str]:
    """Values by the name of the model; what has no name is the generator's."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            # A folder's name may have "=" in it; whatever else looks like a name is meant as one.
            if equals and re.fullmatch(r"[\w.-]+", name) and not Path(text).exists():
                raise InputError(
                    f"--{option} names {name}, but with these options the recipe asks {', '.join(names)}. Leave it "
                    "out, or give the option that asks it."
                )
            name, value = names[0], text
        if name in found:
            raise InputError(f"--{option} gives {name} twice: {found[name]} and {value}.")
        found[name] = value
    return found


def _generators(options: Options, names: Sequence[str]) -> dict[str, Any]:
    """The generators by name; models that are not given are the first one."""
    if not names:
        if options.model:
            raise InputError("The recipe asks no model with these options. Leave --model out.")
        return {}
    models = _named(options.model, names, "model")
    ids, prices = _named(options.model_name, names, "model-name"), _named(options.price, names, "price")
    if names[0] not in models:
        raise InputError(f"Expected --model URL or --model DIR for {names[0]}; the recipe asks {', '.join(names)}.")
    opening = sibling("train.synthesize.engine_generator")
    made: dict[str, Any] = {}
    by_spec: dict[tuple[str, str | None], Any] = {}
    for name in names:
        of = name if name in models else names[0]
        key = (models[of], ids.get(name, ids.get(of)))
        if key not in by_spec:
            by_spec[key] = opening.open_generator(
                key[0],
                load=load_engine,
                model=key[1],
                concurrency=options.concurrency,
                give_up_after=options.give_up_after,
                prices=_price(prices[of]) if of in prices else None,
            )
        made[name] = by_spec[key]
    opening.tell_apart(by_spec.values())
    return made


def load_engine(name: str, max_seqs: int) -> Any:
    """Loads a checkpoint; see `train.synthesize.engine_generator.LoadEngine`."""
    from qwen_jax.cli.model import Model, Running, Sampling

    model = Model(name, Sampling(), Running(), need_tokenizer=True)
    return model.continuous_engine(max_seqs), model.defaults


def _price(text: str) -> tuple[float, float]:
    try:
        prompt, generated = map(float, text.split(":"))
    except ValueError:
        raise InputError(f"--price expects two numbers such as 0.1:0.4, got {text!r}.") from None
    return prompt, generated


def _text(summary: dict[str, Any], folder: Path) -> str:
    """A summary for people."""
    lines = [
        f"{stage['name']}: {stage['out']:,} of {stage['in']:,}"
        + "".join(f"\n    {count:,} {reason}" for reason, count in stage["rejected"].items())
        for stage in summary["stages"]
    ]
    if summary["repeated"]:
        lines.insert(0, f"source: {summary['repeated']:,} items that came before were left out")
    lines += sibling("train.synthesize.progress").retries_text(summary["retries"])
    lines += [f"{folder / output['name']}.jsonl: {output['rows']:,} examples" for output in summary["outputs"]]
    lines += sibling("train.synthesize.report").not_cleaned(stage["name"] for stage in summary["stages"])
    if not summary["finished"]:
        lines.append("Stopped early: the same command goes on from here.")
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])
