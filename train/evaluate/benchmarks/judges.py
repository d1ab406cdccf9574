"""What benchmarks with a judge share: asking it, and reading its rating."""

import re
from collections.abc import Sequence

from train.evaluate.task import Generate, Response, Tools

# As published, the first one counts, and one pair of brackets will do where there is no double pair.
_RATINGS = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]")


def ask(tools: Tools, prompts: Sequence[str], max_tokens: int = 2048) -> list[Response]:
    """The judge's responses to prompts, greedy.

    Args:
      tools: with the judge.
      prompts: one message each.
      max_tokens: of a response.
    """
    found: dict[int, Response] = {}
    if tools.judge is None:
        return [Response(error="there is no judge") for _ in prompts]
    requests = [Generate(({"role": "user", "content": prompt},), max_tokens) for prompt in prompts]
    tools.judge.answer(requests, found.__setitem__)
    return [found.get(i, Response(error="no answer")) for i in range(len(prompts))]


def rating(response: Response) -> tuple[float | None, str | None]:
    """The first [[rating]] from 1 to 10 of a response, or None and why there is none."""
    if response.error is not None:
        return None, f"the judge failed: {response.error}"
    found = _RATINGS[0].search(response.text) or _RATINGS[1].search(response.text)
    if found is None:
        return None, "the judge gave no [[rating]]"
    value = float(found[1])
    return (value, None) if 1 <= value <= 10 else (None, "the judge's rating is not from 1 to 10")
