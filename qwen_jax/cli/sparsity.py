"""`qwen-jax sparsity tune`: budgets of vertical-slash attention for a model."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen_jax.cli.common import ModelOption, ModelPosition, given, model_name
from qwen_jax.cli.lines import check_file, read_text
from qwen_jax.cli.model import Model, Running, Sampling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

if TYPE_CHECKING:
    from qwen_jax.inference.sparsity import Round


@dataclasses.dataclass(frozen=True)
class Tune:
    """Raise the budgets of vertical-slash attention, head by head, until each head visits enough of the softmax.

    Reads the text several times; each time, heads whose recall is below the threshold get more columns and slashes. The
    result is a file in the format of sparse_attention_config.json, which --sparsity-file and other tools take. Begins
    with --sparsity-file, or with the checkpoint's own file, or with 1,000 columns and 6,096 slashes.

    Example: qwen-jax sparsity tune DIR --text book.txt --length 262144 --output sparse_attention_config.json

    Args:
        folder: Checkpoint folder (Hugging Face or Orbax) or Hub id.
        model: The same, as an option.
        text: A long text; the longer, the better the budgets are for long prompts.
        length: Tokens of it to read; by default all of it.
        output: The file to write.
        threshold: The least recall of a head: the share of its softmax that it visits.
        rounds: At most this often the text is read.
        step: Columns and slashes that are added to a head at a time.
        json: Print each round as JSON, one object a line.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    text: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    length: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "sparse_attention_config.json"
    threshold: float = 0.9
    rounds: int = 6
    step: int = 2048
    json: bool = False
    running: tyro.conf.OmitArgPrefixes[Running] = dataclasses.field(default_factory=Running)

    def run(self) -> int:
        # Everything that can be wrong is checked before the weights are loaded.
        if self.text is None:
            raise InputError("Give a long text with --text FILE.")
        path = Path(self.text)
        check_file(path, "text")
        if Path(self.output).exists():
            raise InputError(f"{self.output} exists. Remove it, or give another --output.")
        if not Path(self.output).parent.is_dir():
            raise InputError(f"The folder of --output {self.output} does not exist. Make it first.")
        if self.running.attention == "pooled" or given(self.running, "sparse_from"):
            raise InputError(
                "Budgets are those of vertical-slash attention, whatever the length. Leave out --attention "
                "and --sparse-from."
            )
        from qwen_jax.inference.sparsity import check_settings, tune

        check_settings(self.threshold, self.rounds, self.step)
        running = dataclasses.replace(self.running, attention="vertical-slash")
        model = Model(model_name(self.folder, self.model), Sampling(), running, need_tokenizer=True)
        assert model.tokenizer is not None
        tokens = model.tokenizer.encode(read_text(path.read_bytes(), self.text))
        if not tokens:
            raise InputError(f"The text file {path} is empty.")
        longest = model.config.context_length - 1
        length = min(len(tokens), longest) if self.length is None else self.length
        if not 1 <= length <= min(len(tokens), longest):
            raise InputError(
                f"--length must be from 1 to {min(len(tokens), longest)}, got {length}: {self.text} has {len(tokens)} "
                f"tokens, and the model's context {model.config.context_length}."
            )
        engine = model.engine()
        from qwen_jax.attention.sparse import VerticalSlash

        pattern = model.pattern
        assert isinstance(pattern, VerticalSlash)
        last = tune(
            engine,
            tokens[:length],
            pattern,
            threshold=self.threshold,
            rounds=self.rounds,
            step=self.step,
            report=self._show,
        )
        last.pattern.to_file(Path(self.output))
        low = int((last.recall_LH < self.threshold).sum())
        if low:
            print(f"{low} heads are still below {self.threshold}: more --rounds would go on.", file=sys.stderr)
        print(self.output)
        return 0

    def _show(self, number: int, result: "Round") -> None:
        recall = result.recall_LH
        record = {
            "round": number,
            "recall_mean": float(recall.mean()),
            "recall_min": float(recall.min()),
            "heads_below": int((recall < self.threshold).sum()),
            "density": result.density,
            "cut": result.cut,
        }
        if self.json:
            print(to_json(record), flush=True)
            return
        print(
            f"round {number}: recall {record['recall_mean']:.4f} (lowest head {record['recall_min']:.4f}, "
            f"{record['heads_below']} below {self.threshold}), density {result.density:.2%}"
            + (f", {result.cut} pieces or columns cut" if result.cut else ""),
            flush=True,
        )
