"""The reward of following instructions that a program can check: the 25 kinds of IFEval, strict or loose."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.instruction_kinds import follows
from train.rewards.text import column_of


class InstructionReward:
    """Whether a finished response follows the instructions of its prompt; 0 for one that was cut or is empty.

    The prompt file has IFEval's columns: `instruction_id_list`, a list of ids such as "keywords:existence", and
    `kwargs`, a list with the arguments of each. Both lists may also be JSON texts.
    """

    def __init__(
        self,
        loose: bool = False,
        each: Literal["prompt", "instruction"] = "prompt",
        ids_column: str = "instruction_id_list",
        arguments_column: str = "kwargs",
    ):
        """
        Args:
          loose: an instruction is followed if one of eight variants of the response follows it: without its first line,
            its last line, both or none, and each of these without asterisks.
          each: "prompt" gives 1 if all instructions are followed, otherwise 0; "instruction" gives the share of those
            that are.
          ids_column: of the prompt file, with the ids.
          arguments_column: of the prompt file, with the arguments.

        Raises:
          InputError: another value of `each`.
        """
        if each not in ("prompt", "instruction"):
            raise InputError(f"each must be prompt or instruction, got {each!r}.")
        self._loose, self._each = loose, each
        self._ids_column, self._arguments_column = ids_column, arguments_column

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards, 0 to 1; None for a prompt without instructions."""
        ids = column_of(columns, self._ids_column, "the ids of instructions")
        arguments = column_of(columns, self._arguments_column, "the arguments of instructions")
        rewards: list[float | None] = []
        for i, (text, ended) in enumerate(zip(completions, finished, strict=True)):
            asked = _instructions(ids[i], arguments[i], i)
            # Checked also for a response that was cut, so that a wrong prompt file is found at once.
            followed = [check_instruction(kind, given, text, self._loose) for kind, given in asked]
            if not asked:
                rewards.append(None)
            elif not ended:
                rewards.append(0.0)
            elif self._each == "prompt":
                rewards.append(float(all(followed)))
            else:
                rewards.append(sum(followed) / len(followed))
        return rewards


def check_instruction(kind: str, arguments: Mapping[str, Any], response: str, loose: bool = False) -> bool:
    """Whether a response follows one instruction.

    Args:
      kind: the id of the instruction.
      arguments: of the instruction.
      response: the text. An empty one follows nothing.
      loose: see `InstructionReward`.

    Raises:
      InputError: an unknown id, or arguments that are not those of the kind.
    """
    texts = variants(response) if loose else iter([response])
    # All variants are checked, so that wrong arguments are found in an empty response too.
    return any([follows(kind, arguments, variant) and bool(variant.strip()) for variant in texts])


def variants(response: str) -> Iterator[str]:
    """The response without its first line, its last line, both or none, and each without asterisks (IFEval)."""
    lines = response.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part)
        text = text if part is lines else text.strip()
        yield text
        yield text.replace("*", "")


def _instructions(ids: Any, arguments: Any, index: int) -> list[tuple[str, Mapping[str, Any]]]:
    """The instructions of a prompt: id and arguments of each."""
    values = []
    for value in (ids, arguments):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InputError(f"completion {index}: expected lists of instructions, found {value[:80]!r}.") from None
        values.append([] if value is None else value)
    ids, arguments = values
    lists = all(isinstance(value, (list, tuple)) for value in values)
    if (
        not lists
        or len(ids) != len(arguments)
        or not all(isinstance(kind, str) for kind in ids)
        or not all(isinstance(given, Mapping) for given in arguments)
    ):
        raise InputError(
            f"completion {index}: expected a list of ids and as many objects of arguments, found {ids!r:.200} and "
            f"{arguments!r:.200}."
        )
    return list(zip(ids, arguments, strict=True))
