"""The answer that most samples agree on, where nobody has annotated one (self-consistency, arXiv:2203.11171)."""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What samples agree on.

    Attributes:
      answer: of the largest group of equal answers, as most of the group write it.
      votes: samples in that group.
      share: of the group among all samples.
      groups: number of the group of each sample; None for one without an answer.
      group: number of the largest group.
    """

    answer: str
    votes: int
    share: float
    groups: tuple[int | None, ...]
    group: int


async def agree(answers: Sequence[str | None], equal: Callable[[str, str], Awaitable[bool | None]]) -> Agreement | None:
    """Groups equal answers; None if there is no answer, or no largest group.

    Args:
      answers: of all samples; None for one without an answer, which counts as one that does not agree.
      equal: whether two answers are the same; None if that is not known, which counts as no.
    """
    spellings = list(dict.fromkeys(answer for answer in answers if answer is not None))
    # Each group by its first spelling.
    heads: list[str] = []
    group_of: dict[str, int] = {}
    for spelling in spellings:
        for number, head in enumerate(heads):
            if await equal(head, spelling):
                group_of[spelling] = number
                break
        else:
            group_of[spelling] = len(heads)
            heads.append(spelling)
    groups = tuple(None if answer is None else group_of[answer] for answer in answers)
    sizes = [groups.count(number) for number in range(len(heads))]
    if not sizes or sizes.count(max(sizes)) > 1:
        return None
    group = sizes.index(max(sizes))
    inside = [answer for answer, number in zip(answers, groups, strict=True) if number == group and answer is not None]
    # The first one of the most frequent spellings.
    answer = max(dict.fromkeys(inside), key=inside.count)
    return Agreement(answer, max(sizes), max(sizes) / len(answers), groups, group)
