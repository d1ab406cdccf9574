"""`qwen-jax eval rewards`: benchmarks of reward models."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import DType, ModelOption, ModelPosition, Seed, check_apart, model_name, sibling
from qwen_jax.cli.failures import complain
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

RewardBenchmark = Literal["reward-bench", "rmb", "ppe", "preference"]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Run the benchmarks of reward models: RewardBench, RMB (pairs and best of n), PPE (human preference and
    correctness), and pairs of your own.

    Below the data root are the published files: reward_bench (allenai/reward-bench), reward_bench_prior
    (allenai/pref-test-sets), rmb (RMB_dataset), ppe/human_preference, ppe/ifeval and so on (lmarena-ai/PPE-*), and
    preference/NAME (prompt, chosen, rejected). A benchmark that is not there is named, and has no number.

    The folder of results gets scores.jsonl (one a text), results.jsonl (one an item), summary.json (figures with
    intervals of 95%, hashes of the data) and table.md (the form of the Qwen2.5 report). The same command goes on after
    an interruption.

    Example: qwen-jax eval rewards DIR --data-root benchmarks --output eval-rewards

    Args:
      folder: Checkpoint folder of a reward model, or Hub id.
      model: The same, as an option.
      data_root: Folder of the benchmarks' folders.
      benchmarks: Which of them; by default those that are there. If a part of one that is named here is not there, the
        exit status is 1.
      output: Folder for results.
      bootstrap: Samples that the intervals are computed from.
      seed: Of these.
      dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
      mesh: Devices to spread over, such as data=2.
      tokens_per_batch: Tokens to run at a time. Changes scores by rounding only.
      json: Print the summary as JSON, instead of tables.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    data_root: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("benchmarks")
    benchmarks: tuple[RewardBenchmark, ...] = ()
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("eval-rewards")
    bootstrap: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    seed: Seed = 0
    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    tokens_per_batch: Annotated[int, tyro.conf.arg(metavar="N")] = 16_384
    json: bool = False

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        name = model_name(self.folder, self.model)
        import hashlib

        import jax

        from qwen_jax import __version__
        from qwen_jax.cli.formats import hashes
        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, is_hub_id, resolve
        from qwen_jax.inference.scorer import Scorer, check_scores
        from qwen_jax.parallel.sharding import Sharding, make_mesh, parse_mesh
        from qwen_jax.tokenizer import load_tokenizer

        # Everything that can be wrong is checked before the weights are loaded.
        if not self.data_root.is_dir():
            raise InputError(f"{self.data_root} is not a folder. Give the folder of the benchmarks: --data-root DIR.")
        if self.tokens_per_batch < 1:
            raise InputError(f"--tokens-per-batch must be at least 1, got {self.tokens_per_batch}.")
        mesh = make_mesh(parse_mesh(self.mesh))
        small = resolve(name, SMALL)
        check_apart(self.output, small)
        config, tokenizer = load_config(small), load_tokenizer(small)
        check_scores(config)
        Sharding.for_inference(config, mesh)
        rewards = sibling("train.evaluate.reward_sets")
        runner = sibling("train.evaluate.reward_models")
        sets = [of for of in rewards.find_sets(self.data_root) if of.name in (self.benchmarks or [of.name])]
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
        settings = {
            "model": name,
            # A training run goes on, and its newest checkpoint is another model.
            "weights": hashes(name)["weights"] if any(of.files for of in sets) else "",
            "config": sibling("train.fields").as_json(config),
            "tokenizer": tokenizer.fingerprint(),
            "chat_template": hashlib.sha256(tokenizer.chat_template.source().encode()).hexdigest(),
            "dtype": dtype,
            "version": __version__,
        }
        conversation_ids = sibling("train.rewards.reward_model").conversation_ids
        scorer: list[Scorer] = []

        def score(texts: Sequence[Any]) -> Any:
            """Scores, by weights that are loaded when the first texts are there: a finished run needs none."""
            if not scorer:
                loaded, params = sibling("convert").load(name if is_hub_id(name) else small, mesh, dtype)
                scorer.append(Scorer(loaded, params, mesh, dtype=dtype, tokens_per_batch=self.tokens_per_batch))
            return scorer[0].score(texts)

        def started(texts: int) -> None:
            print(f"{texts:,} texts to score", file=sys.stderr)

        summary = runner.evaluate_rewards(
            sets,
            lambda prompt, answer: conversation_ids(tokenizer, prompt, answer),
            score,
            self.output,
            settings,
            longest=config.context_length,
            draws=self.bootstrap,
            seed=self.seed,
            started=started,
        )
        self._show(summary, runner.SUMMARY, runner.TABLE_FILE)
        # What was asked for by name and is not there is an error, and so are items without a result.
        parts = [*(of["missing"] for of in summary["benchmarks"].values()), *summary["missing"].values()]
        missing = [line for lines in parts for line in lines]
        for line in missing:
            complain(f"not found: {line}", "error" if self.benchmarks else "warning")
        too_long = {name: found["too_long"] for name, found in summary["benchmarks"].items() if found["too_long"]}
        for name, count in too_long.items():
            complain(f"{count:,} items of {name} are longer than the model's context: no result.")
        return int(bool(too_long) or bool(self.benchmarks and missing))

    def _show(self, summary: Mapping[str, Any], summary_name: str, table_name: str) -> None:
        if self.json:
            print(to_json(summary))
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        for benchmark, found in summary["benchmarks"].items():
            table = Table(title=benchmark, title_justify="left", box=box.SIMPLE)
            for column in ("figure", "%", "95%"):
                table.add_column(column, justify="left" if column == "figure" else "right")
            for name, figure in found["figures"].items():
                # NaN where nothing could be compared.
                if figure["value"] != figure["value"]:
                    table.add_row(name, "-", "-")
                    continue
                mark = "*" if figure["incomplete"] else ""
                interval = f"{100 * figure['low']:.1f} - {100 * figure['high']:.1f}"
                table.add_row(name + mark, f"{100 * figure['value']:.2f}", interval)
            Console(file=sys.stdout).print(table)
            print(f"{found['items']:,} items, {found['ties']:,} ties of {found['pairs']:,} pairs (not right)")
            if any(figure["incomplete"] for figure in found["figures"].values()):
                print("* not the published set: summary.json says what is missing")
        print(f"all numbers: {self.output / summary_name}; the report's table: {self.output / table_name}")
