"""`qwen-jax eval system-prompts`: how much the answers of a model depend on its system prompt."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from qwen_jax.cli.common import ModelOption, ModelPosition, Seed, Texts, model_name, sibling
from qwen_jax.cli.synthesize import load_engine
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

_BOXED = r"Reason step by step, and put your final answer within \boxed{}."


@dataclasses.dataclass(frozen=True)
class SystemPrompts:
    r"""Ask questions under many system prompts, and show mean and variance of the score over these.

    Each question is asked once under each system prompt, and the answers are scored by a reward. A model that is robust
    has a small variance. The folder of results gets results.jsonl (the score of each system prompt) and summary.json.
    The same command goes on after an interruption: answers are kept.

    Example: qwen-jax eval system-prompts http://127.0.0.1:8000/v1 --questions gsm8k.jsonl --prompts 100

    Args:
      folder: URL of an OpenAI-compatible server, or checkpoint folder or Hub id, which is loaded here.
      model: The same, as an option.
      questions: Files of records with the column question, and the columns that the reward reads, such as answer.
      prompts: General system prompts of roles and styles, at most 198. No system prompt at all is one more.
      system_prompts: Files of records with the column prompt, instead of these.
      reward: What scores an answer: a built-in reward such as math, or FILE.py:function.
      ask: Text after each question; by default, for math, that the final answer is to be put into a box.
      max_new_tokens: Of an answer at most; one that is cut has the score 0.
      temperature: Of sampling; 0 is greedy.
      seed: Of sampling and of the choice of system prompts.
      model_name: The name of the model at the URL, if it serves several.
      concurrency: Requests that are open at the same time.
      give_up_after: Seconds without any answer from the URL after which the run ends.
      output: Folder for results; by default eval-system-prompts.
      json: Print the summary as JSON.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    questions: Texts = ()
    prompts: int = 100
    system_prompts: Texts = ()
    reward: str = "math"
    ask: str | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: Seed = 0
    model_name: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    concurrency: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    give_up_after: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("eval-system-prompts")
    json: bool = False

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        # Everything that can be wrong in files is found before a model is loaded.
        spec, evaluation = model_name(self.folder, self.model), sibling("train.synthesize.system_prompts_evaluation")
        if not self.questions:
            raise InputError("Give --questions: files of records with the column question.")
        if self.max_new_tokens < 1 or self.concurrency < 1 or not self.temperature >= 0:
            raise InputError("--max-new-tokens and --concurrency must be at least 1, and --temperature at least 0.")
        after = self.ask if self.ask is not None else _BOXED if self.reward == "math" else ""
        questions = [
            {**record, "question": f"{record['question']}\n\n{after}".strip()}
            for record in evaluation.texts_of_files(self.questions, "question")
        ]
        if self.system_prompts:
            prompts = [record["prompt"] for record in evaluation.texts_of_files(self.system_prompts, "prompt")]
        else:
            make = sibling("train.synthesize.made_system_prompts").general_system_prompts
            prompts = ["", *make(self.prompts, self.seed)]
        prompts = list(dict.fromkeys(prompts))
        # The evaluation.
        generator = sibling("train.synthesize.engine_generator").open_generator(
            spec,
            load=load_engine,
            model=self.model_name,
            concurrency=self.concurrency,
            give_up_after=self.give_up_after,
        )
        summary = evaluation.evaluate_into(
            self.output,
            generator,
            prompts,
            questions,
            self.reward,
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        # What came out.
        if self.json:
            print(to_json(summary))
            return 0
        deviation = summary["variance"] ** 0.5
        print(f"{len(prompts):,} system prompts, {len(questions):,} questions")
        print(f"mean {summary['mean']:.4f}, variance {summary['variance']:.6f}, standard deviation {deviation:.4f}")
        print(
            f"variance of a single question: {summary['spread']:.4f}; answers without a score: {summary['missing']:,}"
        )
        for name in ("worst", "best"):
            one = summary[name]
            print(f"{name} {one['score']:.4f}: {one['system_prompt'] or '(no system prompt)'}")
        print(f"all: {self.output / evaluation.RESULTS}")
        return 0
