"""What a generator has done, and what it cost."""

import dataclasses
from collections import Counter
from typing import Any

from train.synthesize.generator import Answer


@dataclasses.dataclass
class Tally:
    """Counts of one generator in one process.

    Attributes:
      prices: of a million prompt tokens and of a million generated ones; None if they cost nothing.
      requests: sent, those that were sent again among them.
      retries: of the requests those that were sent again, by the reason.
      answers, refused: requests that were answered, and that never will be.
      prompt_tokens, tokens: of the conversations and of the answers.
    """

    prices: tuple[float, float] | None = None
    requests: int = 0
    retries: Counter[str] = dataclasses.field(default_factory=Counter)
    answers: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Counts what a request came to."""
        self.answers += answer.refused is None
        self.refused += answer.refused is not None
        self.prompt_tokens += answer.prompt_tokens
        self.tokens += answer.tokens

    def to_json(self) -> dict[str, Any]:
        """The counts and the cost, as a JSON object."""
        prompt_price, price = self.prices or (0.0, 0.0)
        cost = (self.prompt_tokens * prompt_price + self.tokens * price) / 1e6
        names = [field.name for field in dataclasses.fields(self) if field.name != "prices"]
        counts = {name: getattr(self, name) for name in names}
        return {**counts, "retries": dict(self.retries.most_common()), "cost": cost}
