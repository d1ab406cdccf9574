"""Long responses: requests are written for long texts of a corpus, by back-translation (arXiv:2412.15115, section 4.1).

1. Texts of the corpus are measured, and those that are damaged, repetitive or too long are left out. A statement about
   length that holds for the text is drawn: words, pages, sections, or tokens.
2. A model writes the request that the text answers, with that statement. Code checks that it states no other length.
3. On request a model plans and writes the answer instead, section by section, and its length is checked by code.
4. A judge drops pairs where the text does not fit the request, is not complete, or has boilerplate.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import load_tokenizer
from train.synthesize.checks import fault, is_repetitive, json_of, object_of, unbalanced_fences
from train.synthesize.context import Context
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected
from train.synthesize.lengths import Length, draw_length, estimated_tokens, measure, stated
from train.synthesize.overlap import cleaned, words
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.sources import checked, texts
from train.synthesize.spoilt import broken_off

REQUEST = """Below is a text. Imagine that an assistant wrote it as the answer to a request of a user, and write that
request. It must name the subject, what has to be covered, for whom, and in which form and tone, so that somebody who
has not seen the text could write one like it. It must say this about the length of the answer: {length}

Do not mention the text, do not copy sentences of it, and state no other length.

Text:
{text}

Answer with a JSON object and nothing else: {{"request": "..."}}"""

PLAN = """Plan the answer to this request. It will be written section by section, by somebody who sees this plan.

Request:
{request}

Answer with a JSON object and nothing else: {{"sections": [{{"heading": "...", "content": "what it covers", "words":
300}}, ...]}}. Give {least} to {most} sections, in order. The words of all sections together must be what the request
asks for{target}."""

WRITE = """You write one section of a long answer to this request.

Request:
{request}

Plan of the whole answer:
{plan}

End of what is written so far:
{so_far}

Write the text of section {number}, "{heading}", now: {content} It must have about {words} words. Go on from what is
written, repeat nothing, and write neither a heading nor anything about the plan."""

JUDGE = """Here are a user's request and an answer. Judge three things:
fits: the answer does what the request asks for, and is about its subject.
complete: the answer is whole. It does not begin or break off in the middle, and leaves nothing out that is asked for.
boilerplate: the answer has parts that do not belong to it, such as menus, cookie or copyright notices, advertisements,
calls to subscribe, links to other pages, or remarks about itself.

Request:
{request}

Answer:
{answer}

First give your reasons in a few sentences. Then end with one line that is a JSON object:
{{"fits": true or false, "complete": true or false, "boilerplate": true or false}}"""

_STRANGE_REQUEST = (
    "Write a letter to a landlord in which a tenant explains why the washing machine in the cellar has been leaking "
    "since Tuesday, and asks for a date on which it will be mended."
)
_BOILERPLATE = (
    "Home | About us | Contact | Log in\nWe use cookies to improve your experience. Accept all cookies. Subscribe to "
    "our newsletter and follow us!\n\n"
)
_TO_THE_TEXT = re.compile(
    r"\b(?:the|this|that|following|given|provided|above|below) (?:original )?(?:text|passage|excerpt|document|article) "
    r"(?:above|below|provided|given)\b"
    r"|\b(?:above|below|following|given|provided) (?:text|passage|excerpt|document|article)\b"
    r"|\bin the (?:text|passage|excerpt)\b",
    re.IGNORECASE,
)
# Words in a row that a request may share with the text.
_MOST_COPIED = 12
_LEAST_REQUEST, _MOST_REQUEST = 20, 4000
_MOST_SECTIONS, _SHOWN_BEFORE = 40, 2000
_AUDITED = 0.25


def pipeline(
    *,
    corpus: tuple[str, ...],
    field: str = "text",
    write: Literal["corpus", "sections"] = "corpus",
    least_words: int = 400,
    most_tokens: int = 8192,
    tokenizer: str = "",
    language: str | None = None,
    temperature: float = 0.7,
    section_tokens: int = 2048,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Long responses: long texts of a corpus become conversations whose requests state how long the answer is.

    Models: generator; judge, which drops pairs of low quality.

    Args:
        corpus: Files of text, JSON lines or Parquet, or folders of them.
        field: JSON field or Parquet column that holds the text.
        write: Whether the text of the corpus is the answer, or a model writes one section by section.
        least_words: Words that a text must have.
        most_tokens: Tokens of an answer at most.
        tokenizer: Folder of the tokenizer that counts tokens. Without it no request speaks of tokens, and four
            characters count as one.
        language: Code of the language that texts and requests must be in, such as en; by default any.
        temperature: Of sampling.
        section_tokens: Of a section that a model writes, at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    for name in ("least_words", "most_tokens", "section_tokens"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    if not temperature >= 0:
        raise InputError(f"temperature must be at least 0, got {temperature}.")
    recipe = _LongResponses(settings)
    stages = [Stage("measure", recipe.measure), Stage("request", recipe.request)]
    if write == "sections":
        stages.append(Stage("write", recipe.write))
    made = Pipeline(
        "long_responses",
        # A token has at most some twenty characters: what is longer is not even read.
        checked(texts([str(Path(path).expanduser()) for path in corpus], "auto", field, 1, 20 * most_tokens)),
        [*stages, Stage("judge", recipe.judge)],
        [Output("sft", recipe.sft)],
        models=("generator", "judge"),
        seed=seed,
        settings=settings,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _LongResponses:
    """The stages and outputs, with their settings."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._exact: Callable[[str], int] | None = None
        if settings["tokenizer"]:
            tokenizer = load_tokenizer(settings["tokenizer"])
            self._exact = lambda text: len(tokenizer.encode(text, parse_special=False))
        self._tokens = self._exact or estimated_tokens

    async def measure(self, item: Item, context: Context) -> Result:
        """Looks at the form of a text, and draws what the request says about its length."""
        text = item["text"].strip()
        if measure(text, "words") < self._settings["least_words"]:
            return Rejected("too short")
        why = fault(Answer(text), self._settings["language"], refusals=False)
        if why is not None:
            return Rejected(why)
        if unbalanced_fences(text):
            return Rejected("an open block of code")
        if self._tokens(text) > self._settings["most_tokens"]:
            return Rejected("too long")
        length = draw_length(text, item.rng("length"), self._exact)
        self._audit_length(length, text, context)
        return item.update(text=text, length=length.to_json())

    async def request(self, item: Item, context: Context) -> Result:
        """Writes the request that the text answers."""
        length = Length.from_json(item["length"])
        prompt = REQUEST.format(length=length.says, text=item["text"])
        (answer,) = await context.ask(prompt, temperature=self._settings["temperature"], max_tokens=1024)
        if why := fault(answer, self._settings["language"]):
            return Rejected(f"request: {why}")
        value = json_of(answer.text)
        request = value.get("request") if isinstance(value, dict) else None
        if not isinstance(request, str) or not _LEAST_REQUEST <= len(request.strip()) <= _MOST_REQUEST:
            return Rejected("no request in the answer", answer.text)
        request = request.strip()
        if why := _request_fault(request, item["text"], length):
            return Rejected(why, request)
        # A model may leave the length out: code says it then.
        has_length = _states(request, length)
        context.note(length=length.says, length_by="model" if has_length else "code")
        return item.update(request=request if has_length else f"{request} {length.says}", answer=item["text"])

    async def write(self, item: Item, context: Context) -> Result:
        """Plans an answer, and writes it section by section."""
        length = Length.from_json(item["length"])
        sections = await self._plan(item, length, context)
        if isinstance(sections, Rejected):
            return sections
        plan = "\n".join(f"{i}. {one['heading']}: {one['content']}" for i, one in enumerate(sections, 1))
        written: list[str] = []
        for number, section in enumerate(sections):
            prompt = WRITE.format(
                request=item["request"],
                plan=plan,
                so_far="\n\n".join(written)[-_SHOWN_BEFORE:] or "(nothing yet)",
                number=number + 1,
                **section,
            )
            (answer,) = await context.ask(
                prompt,
                first=number,
                temperature=self._settings["temperature"],
                max_tokens=self._settings["section_tokens"],
            )
            if why := fault(answer, self._settings["language"]):
                return Rejected(f"section: {why}", f"section {number + 1}")
            # Of two sections, each may open what the other seems to close.
            if unbalanced_fences(answer.text):
                return Rejected("an open block of code", answer.text)
            written.append(f"## {section['heading']}\n\n{_without_heading(answer.text, section['heading'])}")
        text = "\n\n".join(written)
        if len({part.partition("\n\n")[2] for part in written}) < len(written):
            return Rejected("a section comes twice", text)
        if is_repetitive(text):
            return Rejected("garbage", text)
        if not length.holds(text, self._tokens) or self._tokens(text) > self._settings["most_tokens"]:
            return Rejected("not the length that is asked for", f"{measure(text, 'words'):.0f} words. {length.says}")
        return item.update(answer=text)

    async def judge(self, item: Item, context: Context) -> Result:
        """Drops what a judge finds wrong with the pair."""
        request, answer = item["request"], item["answer"]
        # What was checked before is checked once more on what is written.
        if not Length.from_json(item["length"]).holds(answer, self._tokens):
            return Rejected("not the length that is asked for")
        verdict = await self._verdict(request, answer, context)
        if verdict is None:
            return Rejected("the judge gives no verdict")
        for name, good, why in _CRITERIA:
            if verdict[name] is not good:
                return Rejected(why, request)
        await self._audit_judge(item, context)
        return item.without("text")

    def sft(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The request and the answer, with the length that was asked for."""
        messages = [{"role": "user", "content": item["request"]}, {"role": "assistant", "content": item["answer"]}]
        yield {"messages": messages}

    async def _plan(self, item: Item, length: Length, context: Context) -> list[dict[str, Any]] | Rejected:
        least, most = (length.stated[0][1],) * 2 if length.unit == "sections" else (2, _MOST_SECTIONS)
        low, high = _word_limits(length, self._settings["most_tokens"])
        target = f", {low:.0f} to {high:.0f} words" if low else f", at most {high:.0f} words"
        prompt = PLAN.format(request=item["request"], least=least, most=most, target=target)
        (answer,) = await context.ask(prompt, temperature=self._settings["temperature"], max_tokens=4096)
        if why := fault(answer, self._settings["language"]):
            return Rejected(f"plan: {why}")
        value = json_of(answer.text)
        found = value.get("sections") if isinstance(value, dict) else None
        if not isinstance(found, list) or not all(_is_section(one) for one in found):
            return Rejected("no plan in the answer", answer.text)
        sections = [{name: one[name] for name in ("heading", "content", "words")} for one in found]
        if not least <= len(sections) <= most or len({one["heading"] for one in sections}) < len(sections):
            return Rejected("a plan with other sections", answer.text)
        if not low <= sum(one["words"] for one in sections) <= high:
            return Rejected("a plan of another length", answer.text)
        return sections

    async def _verdict(self, request: str, answer: str, context: Context) -> dict[str, bool] | None:
        prompt = JUDGE.format(request=request, answer=answer)
        (found,) = await context.ask(prompt, model="judge", temperature=0.0, max_tokens=1024)
        value = object_of(found)
        verdict = {name: value.get(name) for name, _, _ in _CRITERIA}
        return verdict if all(isinstance(one, bool) for one in verdict.values()) else None  # type: ignore[return-value]

    async def _audit_judge(self, item: Item, context: Context) -> None:
        """Lets the judge look at a pair that is spoilt in one known way."""
        rng = item.rng("plant")
        if rng.random() >= _AUDITED:
            return
        request, answer = item["request"], item["answer"]
        for name, good, pair in (
            ("fits", True, (_STRANGE_REQUEST, answer)),
            ("complete", True, (request, broken_off(answer, rng.uniform(0.4, 0.7)))),
            ("boilerplate", False, (request, _BOILERPLATE + answer)),
        ):
            if pair[1] is None:
                continue
            verdict = await self._verdict(pair[0], pair[1], context)
            if verdict is not None:
                context.audit(f"judge, {name}", False, verdict[name] is good)

    def _audit_length(self, length: Length, text: str, context: Context) -> None:
        """The check of lengths has to tell the text, which has the length, from one that has not."""
        context.audit("length", True, length.holds(text, self._tokens))
        if length.least is None:
            other = "\n\n".join([text] * 3)
        else:
            # So much of the beginning that the counted length is at most a quarter.
            whole, characters = measure(text, length.unit, self._tokens), len(text) // 4
            while characters and 4 * measure(text[:characters], length.unit, self._tokens) > whole:
                characters //= 2
            other = text[:characters]
        if length.unit == "sections":
            other = f"{text}\n\n# One more\n\nThis one was not asked for."
        context.audit("length", False, length.holds(other, self._tokens))


# What the judge says, what it has to say, and why a pair is dropped otherwise.
_CRITERIA: Sequence[tuple[str, bool, str]] = (
    ("fits", True, "the answer does not fit the request"),
    ("complete", True, "the answer is not complete"),
    ("boilerplate", False, "boilerplate in the answer"),
)


def _request_fault(request: str, text: str, length: Length) -> str | None:
    """Why a request cannot be used; None if nothing is wrong with it."""
    if _TO_THE_TEXT.search(request):
        return "the request speaks of the text"
    if any(one not in length.stated for one in stated(request)):
        return "the request states another length"
    asked, known = words(request), words(text)
    runs = {tuple(known[i : i + _MOST_COPIED]) for i in range(len(known) - _MOST_COPIED + 1)}
    if any(tuple(asked[i : i + _MOST_COPIED]) in runs for i in range(len(asked) - _MOST_COPIED + 1)):
        return "the request copies the text"
    return None


def _states(request: str, length: Length) -> bool:
    """Whether a request has all numbers of a length, with their units."""
    return set(stated(request)) >= set(length.stated)


def _word_limits(length: Length, most_tokens: int) -> tuple[float, float]:
    """The words that an answer may have: as is asked for, or what the tokens allow."""
    # English has some four tokens for three words.
    scale = {"words": 1.0, "pages": 500.0, "tokens": 0.75}.get(length.unit)
    high = 0.75 * most_tokens
    if scale is None:
        return 0.0, high
    return scale * (length.least or 0.0), high if length.most is None else min(high, scale * length.most)


def _is_section(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts_are = all(isinstance(value.get(name), str) and value[name].strip() for name in ("heading", "content"))
    count = value.get("words")
    return texts_are and isinstance(count, int) and not isinstance(count, bool) and count > 0


def _without_heading(text: str, heading: str) -> str:
    """The text of a section, without the heading that a model may have repeated."""
    first, _, rest = text.strip().partition("\n")
    return rest.strip() if first.strip("#*_: \t").casefold() == heading.strip().casefold() else text.strip()
