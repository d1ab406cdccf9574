"""IFEval: prompts with instructions that a program checks (Zhou et al. 2023, arXiv:2311.07911).

The checks are those of `train.rewards.instructions`. Four numbers: the share of prompts with all instructions followed,
and of instructions followed, each strict and loose.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict
from train.rewards.instructions import check_instruction

FILE = DataFile(
    "ifeval/input_data.jsonl",
    source="https://github.com/google-research/google-research/tree/master/instruction_following_eval",
    licence="Apache-2.0",
)


def share(items: Sequence[Sequence[bool]]) -> float:
    """The share of instructions that are followed, over all items together."""
    return sum(map(sum, items)) / sum(map(len, items))


class IFEval(Task):
    """One message for each prompt; the whole answer counts."""

    name = "ifeval_chat"
    citation = "arXiv:2311.07911"
    files = (FILE,)
    metrics = (
        Metric("prompt_strict"),
        Metric("instruction_strict", aggregate=share, of_details=True),
        Metric("prompt_loose"),
        Metric("instruction_loose", aggregate=share, of_details=True),
    )

    def template(self) -> str:
        """See `Task.template`."""
        return "{prompt}\n---\nthe whole answer counts; loose: without first line, last line, asterisks"

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        found = []
        for row in read_rows(files[FILE.path]):
            fields: dict[str, Any] = {
                name: row.values.get(name) for name in ("key", "prompt", "instruction_id_list", "kwargs")
            }
            kinds, given = fields["instruction_id_list"], fields["kwargs"]
            lists = isinstance(kinds, list) and isinstance(given, list) and 0 < len(kinds) == len(given)
            if (
                not lists
                or not isinstance(fields["prompt"], str)
                or not isinstance(fields["key"], (int, str))
                or not all(isinstance(kind, str) for kind in kinds)
                or not all(isinstance(one, Mapping) for one in given)
            ):
                raise InputError(
                    f"{row.where}: expected key, the text prompt, the list of texts instruction_id_list, and as many "
                    f"objects kwargs; found {', '.join(map(str, row.values))}."
                )
            # Wrong instructions are found before the model is asked.
            for kind, one in zip(kinds, given, strict=True):
                try:
                    check_instruction(kind, one, "")
                except InputError as error:
                    raise InputError(f"{row.where}: {error}") from None
            found.append(Item(str(fields.pop("key")), fields))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        if rounds:
            return ()
        return (Generate(({"role": "user", "content": item.fields["prompt"]},), 2048),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        verdicts = []
        for item, ((response,),) in zip(items, responses, strict=True):
            asked = list(zip(item.fields["instruction_id_list"], item.fields["kwargs"], strict=True))
            scores: dict[str, float | None] = {}
            details: dict[str, Any] = {"instructions": [kind for kind, _ in asked], "cut": response.finish == "length"}
            for form, loose in (("strict", False), ("loose", True)):
                followed = [check_instruction(kind, given, response.text, loose) for kind, given in asked]
                scores[f"prompt_{form}"] = float(all(followed))
                scores[f"instruction_{form}"] = sum(followed) / len(followed)
                details[f"instruction_{form}"] = followed
            verdicts.append(Verdict(scores, details))
        return verdicts


TASKS = (IFEval(),)
