"""Filtering: only examples stay in which rules, a critic and all scorers find no flaw (arXiv:2412.15115, section 4.1).

1. Rules look at the form of each answer: empty, too short or long, another language, repetition, control tokens,
   refusals, and blocks of code that are not closed.
2. A critic lists the flaws of an answer, and each of several scorers, models or reward functions, scores it. All of
   them look at all examples that follow the rules, and at answers with planted flaws.
3. An example stays if the critic finds no flaw and each scorer gives its threshold at least. Agreement of each two of
   them, Cohen's kappa, and what each of them rejected are reported.
"""

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.data.examples import Conversation, PlainText, RawExample, read_examples
from train.data.tables import find_tables
from train.synthesize.checks import fault, json_of, score_of, unbalanced_fences
from train.synthesize.context import Context, all_of
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected, content_key, make_item
from train.synthesize.kappa import cohen_kappa
from train.synthesize.overlap import cleaned, words
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.scoring import RewardScores
from train.synthesize.spoilt import broken_off, out_of_order

CRITIC = """Here are a conversation and the last answer in it. List all flaws of this answer: what is false, does not
follow, is missing, does not answer the request, breaks off, is out of order, is unclear, or does not belong there. Do
not list what is only a matter of taste.

Conversation:
{conversation}

Answer:
{answer}

Answer with a JSON object and nothing else: {{"flaws": ["...", ...]}}. The list is empty if there is no flaw."""

SCORER = """Here are a conversation and the last answer in it. Judge how well the answer does what is asked for: whether
it is correct, complete, in a sensible order, clear, and about what was asked.

Conversation:
{conversation}

Answer:
{answer}

First give your reasons in a few sentences. Then end with one line: Score: N, where N is a number from 0 (useless) to 10
(without flaw)."""

_AUDITED = 0.2
_CRITIC_NAME = "critic"
_LEAST_WORDS, _STRANGERS = 12, 32
# Answers to more similar questions, and more similar answers, may be right for one another.
_MOST_ALIKE_QUESTIONS, _MOST_ALIKE = 0.9, 0.8


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Something that scores answers.

    Attributes:
      name: of it; a model of the pipeline has it too.
      threshold: score from which an answer is flawless.
      reward: a reward function; None is a model that is asked for a score from 0 to 10.
    """

    name: str
    threshold: float
    reward: RewardScores | None


def pipeline(
    *,
    examples: tuple[str, ...],
    critic: bool = True,
    scorers: tuple[str, ...] = ("judge=8",),
    least_words: int = 1,
    most_words: int = 20_000,
    language: str | None = None,
    refusals: bool = False,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Filtering: of conversations or preference pairs, those stay in which nothing finds a flaw.

    Models: critic, and the scorers that are models, by their names; one without a name is for all of them.

    Args:
        examples: Files of examples, as training reads them: messages; prompt and completion; or prompt, chosen and
            rejected. The sft.jsonl or pairs.jsonl of another recipe is such a file. Of a pair, the chosen answer must
            be without flaw, and each scorer must give it more than the rejected one.
        critic: Whether a critic lists flaws.
        scorers: Each NAME=THRESHOLD, a model that scores from 0 to 10, or NAME=THRESHOLD=FILE.py:function, a reward
            function such as that of a reward model.
        least_words: Words of an answer at least.
        most_words: Words of an answer at most.
        language: Code of the language that answers must be in, such as en; by default any.
        refusals: Whether answers that decline may stay.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    if not 1 <= least_words <= most_words:
        raise InputError(f"Expected 1 <= least_words <= most_words, got {least_words} and {most_words}.")
    made = [_scorer(text) for text in scorers]
    names = [*([_CRITIC_NAME] if critic else []), *(one.name for one in made)]
    if len(set(names)) < len(names):
        raise InputError(f"Expected scorers with different names, got {', '.join(names)}.")
    if not names:
        raise InputError("Nothing looks for flaws. Give --scorers, or leave --critic on.")
    settings["scorer_code"] = {one.name: one.reward.code for one in made if one.reward is not None}
    source, pairs, strangers = _source(examples)
    recipe = _Filtering(settings, made, strangers)
    outputs = [Output("pairs", recipe.rows)] if pairs else [Output("sft", recipe.rows)]
    asked = [name for name in names if name == _CRITIC_NAME or any(o.name == name and not o.reward for o in made)]
    result = Pipeline(
        "filtering",
        source,
        [
            Stage("rules", recipe.rules),
            Stage("verdicts", recipe.verdicts),
            Together("decide", recipe.decide),
        ],
        outputs,
        models=tuple(asked),
        seed=seed,
        settings=settings,
        measures=recipe.measures,
        close=recipe.close,
    )
    return cleaned(result, decontaminate, near_duplicates)


class _Filtering:
    """The stages and outputs, with their settings, and answers that the audit gives to other questions."""

    def __init__(self, settings: Mapping[str, Any], scorers: Sequence[Scorer], strangers: Sequence[tuple[Any, str]]):
        self._settings, self._scorers, self._strangers = settings, scorers, strangers
        self._names = [*([_CRITIC_NAME] if settings["critic"] else []), *(one.name for one in scorers)]
        self._given: dict[str, bytearray] = {}

    async def rules(self, item: Item, context: Context) -> Result:
        """What is wrong with the form of an answer."""
        for turn in item["turns"]:
            count = len(turn.split())
            why = fault(Answer(turn), self._settings["language"], not self._settings["refusals"])
            # Characters stand in for words where there are no spaces.
            if why is None and max(count, len(turn) // 20) < self._settings["least_words"]:
                why = "too short"
            if why is None and count > self._settings["most_words"]:
                why = "too long"
            if why is None and unbalanced_fences(turn):
                why = "an open block of code"
            if why is not None:
                return Rejected(why, turn)
        return item

    async def verdicts(self, item: Item, context: Context) -> Result:
        """What the critic and the scorers say; planted flaws are judged beside the answer."""
        spoilt = _spoilt(item, self._strangers)
        found = await all_of([self._judged(name, item, context) for name in self._names])
        planted = await all_of([self._passes(name, item, text, context) for name in self._names for _, text in spoilt])
        known = ((name, kind) for name in self._names for kind, _ in spoilt)
        for (name, kind), passed in zip(known, planted, strict=True):
            if passed is not None:
                context.audit(f"{name}, {kind}", False, passed)
        verdicts = dict(zip(self._names, found, strict=True))
        context.note(flawless=verdicts)
        return item.update(verdicts=verdicts)

    def decide(self, items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Keeps what all hold flawless, and remembers the verdicts of all: one byte each."""
        self._given = {name: bytearray() for name in self._names}
        for item in items:
            verdicts = item["verdicts"]
            for name, passed in verdicts.items():
                self._given[name].append(2 if passed is None else int(passed))
            against = [name for name, passed in verdicts.items() if passed is False]
            silent = [name for name, passed in verdicts.items() if passed is None]
            if against:
                yield item, Rejected(f"flawed: {', '.join(against)}")
            elif silent:
                yield item, Rejected(f"not judged: {', '.join(silent)}")
            else:
                yield item, item.without("verdicts")

    def measures(self) -> dict[str, Any]:
        """What each scorer did, and how far each two agree."""
        if not self._given:
            return {}
        scorers = {}
        for name, given in self._given.items():
            others = [theirs for other, theirs in self._given.items() if other != name]
            alone = sum(
                mine == 0 and all(their != 0 for their in theirs)
                for mine, theirs in zip(given, zip(*others, strict=True) if others else [()] * len(given), strict=True)
            )
            scorers[name] = {
                "judged": len(given) - given.count(2),
                "rejected": given.count(0),
                "rejected_alone": alone,
                "no_verdict": given.count(2),
            }
        agreement = []
        for one, other in itertools.combinations(self._names, 2):
            both = [(a, b) for a, b in zip(self._given[one], self._given[other], strict=True) if a != 2 and b != 2]
            kappa = cohen_kappa([a for a, _ in both], [b for _, b in both], 2)
            agreement.append({"scorers": [one, other], "common": len(both), "kappa": kappa})
        return {"scorers": scorers, "agreement of scorers": agreement}

    def close(self) -> None:
        """Ends what reward functions hold."""
        for scorer in self._scorers:
            if scorer.reward is not None:
                scorer.reward.close()

    def rows(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The record as it was read."""
        yield item["record"]

    async def _judged(self, name: str, item: Item, context: Context) -> bool | None:
        """Whether the critic or a scorer holds the answer flawless, and better than the rejected one of a pair."""
        answer, rejected = item["turns"][-1], item["rejected"]
        scorer = next((one for one in self._scorers if one.name == name), None)
        if scorer is None:
            return await self._flawless(item, answer, context)
        score = await self._score(scorer, item, answer, context)
        if score is None or rejected is None:
            return None if score is None else score >= scorer.threshold
        worse = await self._score(scorer, item, rejected, context)
        return None if worse is None else score >= scorer.threshold and score > worse

    async def _passes(self, name: str, item: Item, answer: str, context: Context) -> bool | None:
        """Whether the critic or a scorer holds any answer flawless."""
        scorer = next((one for one in self._scorers if one.name == name), None)
        if scorer is None:
            return await self._flawless(item, answer, context)
        score = await self._score(scorer, item, answer, context)
        return None if score is None else score >= scorer.threshold

    async def _flawless(self, item: Item, answer: str, context: Context) -> bool | None:
        prompt = CRITIC.format(conversation=_told(item["prompt"]), answer=answer)
        (found,) = await context.ask(prompt, model=_CRITIC_NAME, temperature=0.0, max_tokens=2048)
        value = None if fault(found) else json_of(found.text)
        flaws = value.get("flaws") if isinstance(value, dict) else None
        if not isinstance(flaws, list) or not all(isinstance(flaw, str) for flaw in flaws):
            return None
        return not any(flaw.strip() for flaw in flaws)

    async def _score(self, scorer: Scorer, item: Item, answer: str, context: Context) -> float | None:
        if scorer.reward is not None:
            return (await scorer.reward.scores(context, item["prompt"], [answer], item["columns"]))[0]
        prompt = SCORER.format(conversation=_told(item["prompt"]), answer=answer)
        (found,) = await context.ask(prompt, model=scorer.name, temperature=0.0, max_tokens=1024)
        return None if fault(found) else score_of(found.text)


def _scorer(text: str) -> Scorer:
    """A scorer of an option.

    Raises:
      InputError: it is malformed, or there is no such reward function.
    """
    name, _, rest = text.partition("=")
    threshold, equals, spec = rest.partition("=")
    try:
        value = float(threshold)
    except ValueError:
        value = float("nan")
    if not name.isidentifier() or value != value or (equals and not spec):
        raise InputError(f"Expected a scorer as NAME=THRESHOLD or NAME=THRESHOLD=FILE.py:function, got {text!r}.")
    if not equals and not 0 < value <= 10:
        raise InputError(f"The model {name} scores from 0 to 10: expected a threshold above 0, got {threshold}.")
    return Scorer(name, value, RewardScores(spec) if spec else None)


def _source(examples: Sequence[str]) -> tuple[Callable[[], Iterator[Item]], bool, list[tuple[Any, str]]]:
    """The items of files of examples, whether these are pairs, and some prompts with their answers.

    Raises:
      InputError: a file or a record is malformed.
    """
    files = find_tables(examples)

    def items() -> Iterator[Item]:
        for raw in read_examples(files):
            yield _item(raw)

    kinds = set()

    def answers() -> Iterator[tuple[Any, str]]:
        for raw in read_examples(files):
            kinds.add(raw.kind)
            item = _item(raw)
            if len(words(item["turns"][-1])) >= _LEAST_WORDS:
                yield item["prompt"], item["turns"][-1]

    # The same ones in whatever order the examples come.
    strangers = heapq.nsmallest(_STRANGERS, answers(), key=content_key)
    return items, kinds == {"pairs"}, [one for one in strangers if fault(Answer(one[1])) is None]


def _item(raw: RawExample) -> Item:
    """The record of an example, with its prompt and the answers to look at."""
    kept = {name: value for name, value in raw.row.values.items() if name != "provenance"}
    prompt, turns = _parts(raw.answers[0])
    if not turns:
        raise InputError(f"{raw.row.where}: the answer has no text. Leave the example out.")
    rejected = _parts(raw.answers[1])[1] if len(raw.answers) > 1 else []
    read = ("messages", "prompt", "completion", "completions", "chosen", "rejected", "finished", "completion_ids")
    return make_item(
        {
            "record": kept,
            "prompt": prompt,
            "turns": turns,
            "rejected": rejected[-1] if rejected else None,
            "columns": {name: value for name, value in kept.items() if name not in (*read, "prompts")},
        },
        [raw.row.where],
    )


def _parts(answer: Conversation | PlainText) -> tuple[Any, list[str]]:
    """What comes before the last answer, and all answers to look at."""
    if isinstance(answer, PlainText):
        return answer.prompt, [answer.completion]
    turns = [
        (i, message["content"])
        for i, message in enumerate(answer.messages)
        if message["role"] == "assistant" and i >= answer.first and isinstance(message.get("content"), str)
    ]
    last = turns[-1][0] if turns else 0
    return [dict(message) for message in answer.messages[:last]], [text for _, text in turns if text.strip()]


def _told(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a text."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)


def _spoilt(item: Item, strangers: Sequence[tuple[Any, str]]) -> list[tuple[str, str]]:
    """Answers with a planted flaw, and what it is, for some of the items."""
    rng = item.rng("audit")
    if rng.random() >= _AUDITED:
        return []
    answer = item["turns"][-1]
    found = [
        ("truncated", broken_off(answer, rng.uniform(0.3, 0.6)) if len(words(answer)) >= _LEAST_WORDS else None),
        ("out of order", out_of_order(answer, rng)),
        ("another question", _to_another(item, strangers, rng)),
    ]
    return [(kind, text) for kind, text in found if text is not None]


def _to_another(item: Item, strangers: Sequence[tuple[Any, str]], rng: random.Random) -> str | None:
    """The answer to another question; None if all that are known might answer this one, too."""
    question, answer = _told(item["prompt"]), item["turns"][-1]
    others = [
        theirs
        for prompt, theirs in strangers
        if _alike(_told(prompt), question) < _MOST_ALIKE_QUESTIONS and _alike(theirs, answer) < _MOST_ALIKE
    ]
    return rng.choice(others) if others else None


def _alike(first: str, second: str) -> float:
    """The share of the words of two texts that both have."""
    one, other = set(words(first)), set(words(second))
    return len(one & other) / max(1, len(one | other))
