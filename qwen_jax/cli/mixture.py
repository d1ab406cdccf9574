"""`qwen-jax data mixture`: a sampling plan from a corpus (plan), and shares by regression on small runs (regress)."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_jax.cli.common import Seed, parse, sibling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=X")]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan how many tokens of each domain and quality bucket a run sees, with caps on repetition.

    Writes plan.json, plan.txt and plan.png to the output folder. A run of `qwen-jax train pretrain` reads the plan with
    train.curate.mixture_plan.read_mixture.

    Args:
        input: Parquet files with the columns id, domain and those below, or folders of `qwen-jax data curate`.
        output: Folder of the plan.
        budget: Tokens of the run, such as 1e9.
        share: Share of each domain, such as web=0.6 code=0.4; together 1. By default by temperature.
        temperature: Shares are proportional to tokens ** (1 / temperature): 1 is proportional, inf gives all the same.
        quality: Column of scores; in a folder of a curation also STAGE.COLUMN.
        buckets: Quality buckets of each domain, with about as many tokens each.
        thresholds: Scores that divide the buckets of all domains, instead.
        weights: How often a token of each bucket is seen, relative to the others, the lowest quality first.
        unscored: Weight of documents without a score.
        max_epochs: How often a token may be seen at most.
        most: Other values of max_epochs, by domain.
        tokens: Column of tokens of a document.
        bytes: Column of bytes, where there is none of tokens. With neither, the bytes of the text.
        bytes_per_token: Bytes that are a token.
        json: Print the plan as a JSON object.
    """

    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH")]
    output: Path
    budget: float
    share: Pairs = ()
    temperature: float = 1.0
    quality: str | None = None
    buckets: int = 1
    thresholds: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    unscored: float = 0.0
    max_epochs: float = 4.0
    most: Pairs = ()
    tokens: str | None = None
    bytes: str | None = None
    bytes_per_token: float = 4.0
    json: bool = False

    def run(self) -> int:
        tables, plans = sibling("train.curate.mixture_table"), sibling("train.curate.mixture_plan")
        if not 1 <= self.budget < 2**63:
            raise InputError(f"budget must be at least 1 token, got {self.budget}.")
        columns = tables.Columns(self.quality, self.tokens, self.bytes, self.bytes_per_token)
        table = tables.cell_table(
            lambda: tables.read_attributes(self.input, columns), self.quality, self.buckets, self.thresholds
        )
        caps = {**dict.fromkeys(table.domains, self.max_epochs), **_numbers("most", self.most)}
        shares = _numbers("share", self.share) or None
        plan = plans.make_plan(table, int(self.budget), shares, self.temperature, self.weights, self.unscored, caps)
        plans.write_plan(plan, self.output / "plan.json")
        files = {"plan.txt": (plans.plan_text(plan) + "\n").encode()}
        files["plan.png"] = sibling("train.curate.mixture_plot").plan_png(plan)
        for name, content in files.items():
            sibling("train.files").write_file(self.output / name, content)
        print(to_json(plan.to_json()) if self.json else plans.plan_text(plan))
        return 0


@dataclasses.dataclass(frozen=True)
class Regress:
    """Find shares of domains by a regression of held-out losses on the mixtures of small runs (RegMix).

    With a configuration, writes mixtures around the prior to OUTPUT/trials.json, and a command for each to
    OUTPUT/commands.txt, one a line, for a scheduler. With --run they are trained here, one after another. Once all have
    ended, the same command fits, and writes OUTPUT/regression.json. With --table, it only fits.

    Args:
        config: FILE.py[:FUNCTION] of a small run of one stage, whose data sets are the domains, with held-out data.
        set: Fields of it to change, such as stages.0.schedule.steps=200.
        trials: How many small runs.
        output: Folder of the runs.
        run: Train the runs that have not ended, in this process.
        table: JSON lines with name, shares and losses of runs that were made elsewhere.
        prior: Share of each domain, together 1: mixtures are drawn around it.
        most: Largest share of a domain, such as what its tokens and max_epochs of a plan allow.
        target: Weight of each held-out loss in what is minimised; by default all have the same.
        model: Of the regression; auto takes the one that predicts best.
        seed: Of mixtures, folds and simulation.
        json: Print a JSON object.
    """

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.py")] = None
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = ()
    trials: int = 32
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    run_here: Annotated[bool, tyro.conf.arg(name="run")] = False
    table: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    prior: Pairs = ()
    most: Pairs = ()
    target: Pairs = ()
    model: Literal["auto", "linear", "quadratic", "trees"] = "auto"
    seed: Seed = 0
    json: bool = False

    def run(self) -> int:
        regmix = sibling("train.curate.regmix")
        prior, most, target = (_numbers(name, getattr(self, name)) for name in ("prior", "most", "target"))
        if (self.table is None) == (self.config is None):
            raise InputError("Give --config with the small run, or --table with runs that have ended.")
        if not prior:
            raise InputError("Give the prior: a share of each domain, such as --prior web=0.7 code=0.3.")
        if self.table is not None:
            if self.run_here or self.set:
                raise InputError("--run and --set belong to --config. Leave them out with --table.")
            trials = regmix.read_trials(self.table)
        else:
            trials = self._trials(prior, most)
            if trials is None:
                return 0
        found = regmix.regress(trials, prior, target or None, self.model, most, self.seed)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            content = to_json(found.to_json(), indent=2) + "\n"
            sibling("train.files").write_file(self.output / "regression.json", content.encode())
        print(to_json(found.to_json()) if self.json else found.to_text())
        return 0

    def _trials(self, prior: dict[str, float], most: dict[str, float]) -> object:
        """The small runs, if all have ended; else None, after it was said what to do."""
        regmix, runs = sibling("train.curate.regmix"), sibling("train.curate.regmix_runs")
        if self.output is None:
            raise InputError("--config needs --output, the folder of the runs.")
        mixtures = regmix.draw_mixtures(prior, self.trials, self.seed, most=most)
        runs.write_trials(self.config, self.output, mixtures, prior, self.set)
        if self.run_here:
            train = sibling("train.run").pretrain
            collected = runs.run_trials(self.output, train, lambda line: print(line, file=sys.stderr, flush=True))
        else:
            collected = runs.collect(self.output)
        if collected.unfinished:
            count, waiting = len(collected.finished), len(collected.unfinished)
            commands = self.output / runs.COMMANDS
            if self.json:
                print(to_json({"finished": count, "unfinished": waiting, "commands": str(commands)}))
            else:
                print(
                    f"{count} of {count + waiting} runs have ended. Run the lines of {commands}, or give --run; then "
                    "give this command again."
                )
            return None
        return collected.trials(str(self.output))


_ACTIONS: dict[str, type[Plan] | type[Regress]] = {"plan": Plan, "regress": Regress}
_USAGE = """\
usage: qwen-jax data mixture plan|regress [options]

  plan     how many tokens of each domain and quality bucket a run sees, with caps on repetition
  regress  shares of domains by a regression on small runs

qwen-jax data mixture plan --help shows the options."""


def mixture(argv: Sequence[str]) -> int:
    """Runs one of the two.

    Args:
      argv: arguments after `data mixture`.
    """
    if not argv or argv[0] not in _ACTIONS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return int(parse(_ACTIONS[argv[0]], f"data mixture {argv[0]}", argv[1:]).run())


def _numbers(what: str, given: Sequence[str]) -> dict[str, float]:
    """Numbers by name of an option."""
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            name = ""
        if not name or name in found:
            raise InputError(f"--{what} expects NAME=NUMBER, each name once; got {text!r}.")
        found[name] = number
    return found
