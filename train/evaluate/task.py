"""What a benchmark is: files, items, requests to a model, scores.

A task knows nothing of how a model is run. It turns its files into items, an item into requests, and the responses into
scores. `train.evaluate.run` does the rest: it sends the requests, keeps the responses, and writes the results.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
"""A message of a conversation: `role` and `content`."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that a task reads.

    Attributes:
      path: below the data root, such as "gsm8k/test.jsonl".
      sha256: hashes of published versions in hexadecimal; empty if any content will do. The hash of what was read is
        written with every score; content with another hash than these is an error, unless the user asks for it.
      source: where people find the file.
      licence: of the data, as its publisher states it; "" if none is stated.
    """

    path: str
    sha256: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
      id: unique in its task, and the same in every run.
      fields: of the question, JSON values only.
      groups: parts of the benchmark that it belongs to, by kind, such as {"subject": "anatomy"}. Results are also
        given for each part.
    """

    id: str
    fields: Mapping[str, Any]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks for a text.

    Attributes:
      prompt: a text to go on with, for base models; or a conversation, which the chat template formats.
      max_tokens: of the answer.
      stop: texts that end the answer; they are not a part of it.
      temperature: of sampling; 0 is greedy.
      top_p: tokens are drawn from the most likely ones that have this probability together.
      seed: of the random numbers. Several samples of one prompt are requests with different seeds.
    """

    prompt: str | tuple[Message, ...]
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Loglikelihood:
    """Asks for the log-probability of a text after another.

    Attributes:
      context: what comes before. White space at its end counts as the beginning of the continuation, since tokens
        begin with it. "" is the end-of-text token alone.
      continuation: whose tokens count.
    """

    context: str
    continuation: str


@dataclasses.dataclass(frozen=True)
class Rolling:
    """Asks for the log-probability of a whole text, in windows of the model's context that do not overlap in what they
    count, as for perplexity.

    Attributes:
      text: of any length.
    """

    text: str


Request = Generate | Loglikelihood | Rolling


@dataclasses.dataclass(frozen=True)
class Response:
    """What a model answered to a request.

    Attributes:
      text: of `Generate`; "" for the others.
      finish: "stop" if the text ended by itself, "length" if it was cut.
      tokens: how many tokens were generated, or count in the log-probability.
      logprob: of `Loglikelihood` and `Rolling`, in nats: the sum over the tokens that count; None for `Generate`.
      greedy: whether each token of the continuation is the most likely one.
      error: why there is no answer, such as a prompt that is longer than the model's context; None if there is one.
      prompt_cut: whether the model has read the end of the prompt alone, because its context has no room for the rest.
    """

    text: str = ""
    finish: Literal["stop", "length"] = "stop"
    tokens: int = 0
    logprob: float | None = None
    greedy: bool = False
    error: str | None = None
    prompt_cut: bool = False


Score = float | None
"""Of one item. None is no verdict (the sandbox or the judge failed): such items are counted apart, never as zero."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The scores of an item.

    Attributes:
      scores: by name of the metric, for each metric of the task.
      details: what people want to read beside the scores, such as the answer that was found in the text; JSON values.
      problem: why a score is None; None if none is.
    """

    scores: Mapping[str, Score]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None


def mean(values: Sequence[Any]) -> float:
    """The mean of numbers."""
    return sum(values) / len(values)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that a task reports.

    Attributes:
      name: such as "accuracy", "pass@1".
      scale: what the number is multiplied with for people: 100 for shares that are shown in percent.
      higher_is_better: for comparisons.
      aggregate: from the scores of items to the number of the task; by default the mean. Metrics of a whole corpus,
        such as BLEU, give each item's statistics as `Verdict.details[name]` and are computed from those: then
        `of_details` is true.
      of_details: whether `aggregate` gets `Verdict.details[name]` of each item in place of its score.
    """

    name: str
    scale: float = 100.0
    higher_is_better: bool = True
    aggregate: Callable[[Sequence[Any]], float] = mean
    of_details: bool = False


class Model(Protocol):
    """What answers requests: a checkpoint in this process (`train.evaluate.in_process`) or a server at a URL
    (`train.evaluate.server`).

    Attributes:
      name: for reports.
      context_length: tokens of prompt and answer together; None if it is not known.
    """

    name: str
    context_length: int | None

    def identity(self) -> Mapping[str, Any]:
        """What decides the answers besides the requests: weights, tokenizer, chat template, dtype; JSON values."""
        ...

    def answer(self, requests: Sequence[Request], done: Callable[[int, Response], None]) -> None:
        """Answers requests of any kinds, in any order.

        Args:
          requests: to be answered.
          done: called once for each request with its index and its response, as soon as it is there.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Tools:
    """What scoring may use besides the responses.

    Attributes:
      judge: the model that judges answers, or None if the user named none.
      sandbox: what runs untrusted code (`train.sandbox.Sandbox`), or None if the machine has none.
      workers: programs that run at the same time.
    """

    judge: Model | None = None
    sandbox: Any = None
    workers: int = 1


class Task:
    """A benchmark. Subclasses set the attributes and write `items`, `requests` and `score`.

    Attributes:
      name: what `--tasks` calls it.
      version: of prompts, extraction and metrics; a change that may change a score raises it.
      files: that it reads.
      metrics: the first one is the headline.
      shots: solved examples in a prompt.
      citation: the paper or the repository that defines the benchmark.
      needs_judge: whether scoring needs a judge.
      needs_sandbox: whether scoring runs the model's code.
    """

    name: str
    version: int = 1
    files: tuple[DataFile, ...] = ()
    metrics: tuple[Metric, ...] = ()
    shots: int = 0
    citation: str = ""
    needs_judge: bool = False
    needs_sandbox: bool = False

    def template(self) -> str:
        """The prompt template with its placeholders, and the rules of extraction. Its hash is written with a score."""
        raise NotImplementedError

    def signatures(self) -> Mapping[str, str]:
        """By name of a metric, what a library says of how it computed it; {} where the task's version says all."""
        return {}

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """Reads the items.

        Args:
          files: where each of `files` lies, by its `DataFile.path`.

        Raises:
          InputError: a file that has not the form of this benchmark; names the file and the line.
        """
        raise NotImplementedError

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        """The requests of the next round.

        Args:
          item: of this task.
          rounds: the responses of each earlier round, in the order of its requests; () at first. Only conversations
            of several turns have more than one round.

        Returns:
          The requests; () when there is nothing more to ask.
        """
        raise NotImplementedError

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """The verdict on each item.

        Args:
          items: some or all items of this task.
          responses: of each item, the responses of each round.
          tools: the judge and the sandbox.
        """
        raise NotImplementedError
