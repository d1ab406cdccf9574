"""A pipeline: a source of items, the stages that they go through, and the files that are written at the end."""

import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.errors import InputError
from train.synthesize.item import Item, Rejected

if TYPE_CHECKING:
    from train.synthesize.context import Context

Result = Item | Sequence[Item] | Rejected
# Names of the stages of `train.synthesize.overlap.cleaned`.
EVALUATION_SETS, NEAR_DUPLICATES = "evaluation sets", "near duplicates"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step that looks at one item at a time. Many items are in it at once.

    Its result must depend on nothing but the item, the answers and verdicts that it asks for, and `Item.rng`.

    Attributes:
      name: unique in the pipeline.
      work: makes one item, several, or none of an item.
      version: change it when `work` changes what it makes of the same item: it is then done again.
    """

    name: str
    work: "Callable[[Item, Context], Awaitable[Result]]"
    version: int = 1


@dataclasses.dataclass(frozen=True)
class Together:
    """A step that looks at all items, in their order, such as the removal of duplicates.

    Attributes:
      name: unique in the pipeline.
      work: takes all items, and yields each with what becomes of it: itself, changed, or rejected.
      version: as of `Stage`.
    """

    name: str
    work: Callable[[Iterator[Item]], Iterator[tuple[Item, Result]]]
    version: int = 1


@dataclasses.dataclass(frozen=True)
class Output:
    """A file of examples, one JSON object a line.

    Attributes:
      name: of the file, without .jsonl.
      rows: the examples that an item becomes, with the columns that training reads (docs/post-training.md). The
        runner adds the column "provenance".
    """

    name: str
    rows: Callable[[Item], Iterable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What is made, from what.

    Attributes:
      name: of the pipeline, in provenance and reports.
      source: begins the items anew each time it is called, always the same ones in the same order.
      stages: in order.
      outputs: what is written at the end, from the items that went through all stages.
      models: names under which stages ask models. `--model NAME=...` says which model that is; a model that is not
        given is the one called "generator".
      seed: of all random numbers.
      settings: what else decides the result, as JSON values: the arguments of the function that made the pipeline.
      measures: is called at the end for what the summary records besides counts, as JSON values, such as how programs
        were isolated and how many ran in a second. It decides nothing.
      close: is called at the end of each run, whether it finished or not: ends what stages hold, such as sandboxes. A
        pipeline may be run again, and makes them anew.

    Raises:
      InputError: no stage or output, a name that is used twice, or an output whose name is no name of a file.
    """

    name: str
    source: Callable[[], Iterator[Item]]
    stages: Sequence[Stage | Together]
    outputs: Sequence[Output]
    models: Sequence[str] = ("generator",)
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measures: Callable[[], Mapping[str, Any]] = dict
    close: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        for what, names in (
            ("stages", [stage.name for stage in self.stages]),
            ("outputs", [output.name for output in self.outputs]),
        ):
            if not names or len(set(names)) < len(names):
                raise InputError(
                    f"Expected {what} with different names in the pipeline {self.name}, got "
                    f"{', '.join(names) or 'none'}. Give each a name of its own."
                )
        if wrong := [output.name for output in self.outputs if not is_output_name(output.name)]:
            raise InputError(f"Expected letters, digits, _ and - in the name of an output, got {wrong[0]!r}.")


def is_output_name(name: str) -> bool:
    """Whether a text can be the name of an output: it is that of a file."""
    return re.fullmatch(r"\w[\w.-]{0,99}", name) is not None
