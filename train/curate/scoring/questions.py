"""What a model is asked about a document: ratings on rubrics, classes, and rewards."""

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Any

from qwen_jax.errors import InputError

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"The name of a question must be a column such as clarity, in lower case; got {name!r}.")


@dataclasses.dataclass(frozen=True)
class Rating:
    """A rubric that an instruct model rates with a digit.

    The score is the expected rating: the mean of the ratings under the softmax over their log-probabilities.

    Attributes:
      name: of the column.
      question: what is rated, and what the lowest and the highest rating mean.
      lowest, highest: ratings; all integers between them are answers, of one digit each.

    Raises:
      InputError: a name that is no column, or wrong ratings.
    """

    name: str
    question: str
    lowest: int = 1
    highest: int = 5

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not 0 <= self.lowest < self.highest <= 9:
            raise InputError(
                f"The ratings of {self.name} must be digits, the lowest before the highest; got {self.lowest} to "
                f"{self.highest}."
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that the model may answer."""
        return tuple(map(str, range(self.lowest, self.highest + 1)))

    @property
    def text(self) -> str:
        """The whole question."""
        return f"{self.question} Answer with one digit from {self.lowest} to {self.highest}."


@dataclasses.dataclass(frozen=True)
class Choice:
    """A classification by an instruct model, which answers with a letter. The result is the likeliest class.

    Attributes:
      name: of the column of classes; NAME_probability is that of their probabilities.
      question: what is chosen.
      classes: name and description of each, at most 26.

    Raises:
      InputError: a name that is no column, or too few, too many or repeated classes.
    """

    name: str
    question: str
    classes: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        _check_name(self.name)
        names = [name for name, _ in self.classes]
        if not 2 <= len(names) <= len(string.ascii_uppercase) or len(set(names)) < len(names):
            raise InputError(f"Expected 2 to 26 different classes of {self.name}, got {', '.join(names) or 'none'}.")

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that the model may answer."""
        return tuple(string.ascii_uppercase[: len(self.classes)])

    @property
    def text(self) -> str:
        """The whole question."""
        listed = "\n".join(f"{letter}: {about}" for letter, (_, about) in zip(self.answers, self.classes, strict=True))
        return f"{self.question}\n{listed}\nAnswer with one letter."


@dataclasses.dataclass(frozen=True)
class Reward:
    """The score that a reward model gives to a document as the answer to a request.

    Attributes:
      name: of the column.
      request: what the user asks for.

    Raises:
      InputError: a name that is no column.
    """

    name: str = "reward"
    request: str = "Write a text that is worth reading: correct, clear, complete and free of noise."

    def __post_init__(self) -> None:
        _check_name(self.name)

    @property
    def answers(self) -> tuple[str, ...]:
        """None: the score is that at the end of the document's turn."""
        return ()


Question = Rating | Choice | Reward

RUBRICS = (
    Rating(
        "education",
        "How much does a student learn from this document? 1: nothing, 3: some facts, 5: as much as in a good lesson.",
    ),
    Rating("clarity", "How clear is this document? 1: cannot be followed, 3: readable, 5: precise and well ordered."),
    Rating(
        "reasoning",
        "How correct and how well reasoned is this document? 1: false or without reasons, 3: plausible, "
        "5: correct, each step with its reason.",
    ),
    Rating(
        "cleanliness",
        "How free of noise is this document? Noise is advertising, menus, repetition, and broken text. 1: nothing "
        "but noise, 3: half of it, 5: no noise.",
    ),
    Rating(
        "code",
        "How good is the program code in this document? 1: none, or it cannot work, 3: it works, 5: correct, "
        "readable and explained.",
    ),
    Rating(
        "mathematics",
        "How much mathematics is in this document? 1: none, 3: some formulas, 5: definitions or problems, worked out "
        "step by step.",
    ),
)
"""Rubrics for pre-training text."""

TOPIC = Choice(
    "topic",
    "What is this document mainly about?",
    (
        ("mathematics", "mathematics, statistics, logic"),
        ("natural_science", "physics, chemistry, astronomy, earth science"),
        ("life_science", "biology, ecology, agriculture"),
        ("health", "medicine, nutrition, fitness"),
        ("computing", "programming, software, data, artificial intelligence"),
        ("engineering", "machines, electronics, construction, energy, transport"),
        ("business", "economy, finance, companies, work"),
        ("law", "law, government, administration"),
        ("politics", "politics, society, military"),
        ("history", "history, archaeology, biographies"),
        ("geography", "places, travel, maps"),
        ("education", "schools, teaching, careers"),
        ("language", "languages, linguistics, translation"),
        ("literature", "fiction, poetry, books"),
        ("art", "visual art, music, film, architecture, design"),
        ("thought", "religion, philosophy, psychology"),
        ("home", "cooking, housekeeping, family, crafts, gardening"),
        ("games", "sport, games, toys"),
        ("shopping", "products, fashion, advertising"),
        ("people", "celebrities, gossip, personal life, relationships"),
        ("adult", "sexual content"),
        ("other", "something else, or no topic"),
    ),
)
"""Topics of documents."""

FORMAT = Choice(
    "format",
    "What kind of text is this document?",
    (
        ("lesson", "lesson, textbook, tutorial, explanation"),
        ("reference", "encyclopedia, dictionary, reference"),
        ("paper", "scientific paper, thesis, report"),
        ("manual", "instructions, technical documentation"),
        ("problems", "exercises or questions, with or without answers"),
        ("source_code", "source code or configuration"),
        ("news", "news, press release"),
        ("opinion", "opinion, blog, review"),
        ("forum", "forum, comments, chat, questions of users"),
        ("story", "story, novel, script, poem, lyrics"),
        ("speech", "speech, interview, transcript"),
        ("legal", "law, contract, policy, terms"),
        ("advertisement", "advertisement, product page, shop"),
        ("data", "table, list, log, records"),
        ("navigation", "menus, links, error page, little else"),
        ("other", "something else, or damaged text"),
    ),
)
"""Formats of documents."""

QUESTIONS: dict[str, Question] = {question.name: question for question in (*RUBRICS, TOPIC, FORMAT, Reward())}
"""All of them, by name."""


def questions_of(names: Sequence[str]) -> tuple[Question, ...]:
    """The built-in questions with these names, in this order.

    Raises:
      InputError: there is none of a name, or one is asked twice.
    """
    for name in names:
        if name not in QUESTIONS:
            raise InputError(f"There is no question {name!r}. Expected some of {', '.join(QUESTIONS)}.")
    return check_questions([QUESTIONS[name] for name in names])


def check_questions(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions as a tuple.

    Raises:
      InputError: none, two with one column, or a reward beside questions for an instruct model.
    """
    columns = [column for question in questions for column in columns_of(question)]
    if not columns or len(set(columns)) < len(columns):
        raise InputError(f"Expected questions with different names, got {', '.join(columns) or 'none'}.")
    if len(questions) > 1 and any(isinstance(question, Reward) for question in questions):
        raise InputError("A reward model answers one question, its reward. Ask an instruct model the others.")
    return tuple(questions)


def columns_of(question: Question) -> tuple[str, ...]:
    """The names of a question's columns."""
    return (question.name, f"{question.name}_probability") if isinstance(question, Choice) else (question.name,)


def to_json(question: Question) -> dict[str, Any]:
    """A question as a JSON object, which tells whether earlier scores still hold."""
    return {"kind": type(question).__name__, **dataclasses.asdict(question)}
