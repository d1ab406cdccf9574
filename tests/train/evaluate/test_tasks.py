"""Prompts of an exact length, what is hidden in them, and scores."""

import re

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.runs import print_seed
from train.evaluate import score, synthetic_ids, words
from train.evaluate.questions import Question, Questions
from train.evaluate.ruler import RULER, WITH_DEPTH
from train.evaluate.tasks import Needles, Sample, Source, passkey
from train.evaluate.text import NOISE, Encoder

BOOK = (
    "It was late in the year. Nobody had seen the old captain for days! Where was he? Perhaps in the harbor.\n"
    "He had promised to return before the storm, and he always kept his word. The letters said nothing.\n\n"
) * 40
TASKS = {
    "passkey": passkey,
    "needle": Needles(),
    "several needles": Needles(needles=5, asked=3),
    **RULER,
}
# Long enough for every task with a tokenizer of few merges.
LENGTH = 3000
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([BOOK, NOISE * 5, "One of the special magic numbers is: 12 mentioned in the provided text"], 700)


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer) -> Source:
    documents = tuple(f"The number of the house of {name} is {i}." for i, name in enumerate(words.pairs(RNG, 50)))
    asked = tuple(Question(text.replace(" is ", "? "), (text[-3:-1],), (i,)) for i, text in enumerate(documents))
    questions = {task: Questions(task, asked, documents, "houses.json") for task in ("qa_1", "qa_2")}
    return Source.of(Encoder(tokenizer), questions=questions)


def make(source: Source, task: str, length: int, depth: float, seed: int) -> Sample:
    return TASKS[task](source, length, depth, np.random.default_rng(seed))


# --- length, depth, seeds ---


@pytest.mark.parametrize("task", TASKS)
def test_the_length_is_exact(source: Source, task: str) -> None:
    """Prompt and answer have exactly the tokens that were asked for, whatever the length, and all ids are tokens."""
    rng = print_seed()
    for length in rng.integers(LENGTH, 3 * LENGTH, 3).tolist():
        sample = make(source, task, length, float(rng.uniform(0, 100)), int(rng.integers(2**31)))
        assert len(sample.prompt) + sample.new_tokens == length
        assert sample.prompt.dtype == np.int32
        assert sample.prompt.min() >= 0
        assert sample.prompt.max() < source.encoder.tokenizer.vocab_size


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_one_prompt(source: Source, task: str) -> None:
    a, b, other = (make(source, task, LENGTH, 30, seed) for seed in (1, 1, 2))
    assert np.array_equal(a.prompt, b.prompt)
    assert a.references == b.references != other.references
    assert not np.array_equal(a.prompt, other.prompt)


@pytest.mark.parametrize("task", ["passkey", "needle", *WITH_DEPTH])
@pytest.mark.parametrize("text", [None, BOOK], ids=["noise", "book"])
def test_the_needle_is_at_its_depth(tokenizer: Tokenizer, task: str, text: str | None) -> None:
    """Between its places at 0% and at 100%, the place is linear in the depth, up to the longest sentence."""
    rng = print_seed()
    source, seed = Source.of(Encoder(tokenizer), text), int(rng.integers(2**31))
    depth = float(rng.uniform(0, 100))
    first, here, last = (make(source, task, LENGTH, d, seed) for d in (0, depth, 100))
    sentences = re.split(r"(?<=[.\n])", tokenizer.decode(here.prompt.tolist()))
    sentence = max(len(tokenizer.encode(sentence)) for sentence in sentences)

    def in_haystack(sample: Sample) -> int:
        """Tokens before the needle, without those of needles at other depths."""
        if task in ("niah_multikey_2", "niah_multikey_3"):  # Their haystack is needles.
            return sample.place
        before = tokenizer.decode(sample.prompt[: sample.place])
        return sample.place - sum(
            len(tokenizer.encode(x)) for x in re.findall(r" One of the special magic[^.]*\.", before)
        )

    begin, end = in_haystack(first), in_haystack(last)
    assert abs(in_haystack(here) - (begin + depth / 100 * (end - begin))) <= sentence
    # At 0% nothing but the instruction, and less than a needle of noise, is before it; at 100% nothing is after it.
    assert first.place <= 300
    assert not re.search("The pass key is|One of the", tokenizer.decode(first.prompt[: first.place]))
    after = tokenizer.decode(last.prompt[last.place :])
    question = re.search(r"\nWhat (is|are all) the", after).start()
    assert 0 <= question - after.index(last.references[0]) < 800
    for sample in (first, here, last):
        shown = tokenizer.decode(sample.prompt[sample.place :])
        assert shown.startswith((f" The pass key is {sample.references[0]}.", " One of the special magic"))
        assert sample.references[0] in shown[:140]


def test_the_passkey_is_there_twice(source: Source) -> None:
    """The prompt holds the key in its needle, and nowhere else; `test_ruler` has the same for all tasks of RULER."""
    rng = print_seed()
    sample = make(source, "passkey", LENGTH, float(rng.uniform(0, 100)), int(rng.integers(2**31)))
    text = source.encoder.tokenizer.decode(sample.prompt)
    assert text.count(sample.references[0]) == 2
    assert f"The pass key is {sample.references[0]}. Remember it. {sample.references[0]} is the" in text


def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """Up to the end of the haystack, a prompt that is put together has the ids that its text is encoded to."""
    for text in (None, BOOK):
        sample = make(Source.of(Encoder(tokenizer), text), "needle", LENGTH, 60, 0)
        ids = sample.prompt[: sample.place + 60].tolist()
        # The last token may be part of a word.
        assert tokenizer.encode(tokenizer.decode(ids))[:-8] == ids[:-8]


def test_a_chat_prompt_is_the_template_with_the_beginning_of_the_answer(tokenizer: Tokenizer) -> None:
    sample = make(Source.of(Encoder(tokenizer, "chat")), "passkey", LENGTH, 50, 0)
    assert len(sample.prompt) + sample.new_tokens == LENGTH
    text = tokenizer.decode(sample.prompt)
    whole, answer = text.rsplit("<|im_start|>assistant\n", 1)
    assert answer == "The pass key is"
    message = whole.split("<|im_start|>user\n")[1].removesuffix("<|im_end|>\n")
    expected = tokenizer.chat_template.render([{"role": "user", "content": message}], add_generation_prompt=True)
    assert text == expected + answer


def test_control_tokens_of_a_haystack_are_plain_text(tokenizer: Tokenizer) -> None:
    source = Source.of(Encoder(tokenizer), "A text with <|im_end|> in it. And more. " * 50)
    sample = make(source, "passkey", LENGTH, 50, 0)
    assert not {*tokenizer.special_ids} & {*sample.prompt.tolist()}


# --- what does not fit ---


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_cannot_hold_the_task_is_an_error_that_names_one_that_can(source: Source, task: str) -> None:
    with pytest.raises(
        InputError, match=r"needs at least [\d,]+ tokens with this tokenizer .* got a length of 60"
    ) as e:
        make(source, task, 60, 50, 0)
    enough = int(re.search(r"at least ([\d,]+)", str(e.value))[1].replace(",", ""))
    # What is said to suffice does, up to the spread between random words.
    sample = make(source, task, enough + 200, 50, 0)
    assert len(sample.prompt) == enough + 200 - sample.new_tokens


def test_an_empty_haystack_and_more_questions_than_keys_are_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"notes\.txt is empty"):
        Source.of(Encoder(tokenizer), " \n ", "notes.txt")
    with pytest.raises(InputError, match="1 to 2 keys"):
        Needles(needles=2, asked=3)


def test_there_are_enough_distinct_words() -> None:
    rng = print_seed()
    for count in (1, 300, 60_000):
        assert len({*words.pairs(rng, count)}) == count
        assert len({*words.words(rng, count)}) == count
    with pytest.raises(InputError, match="keys of two or three words"):
        words.pairs(rng, 10**9)


# --- scores ---


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("contained", "they are ABC and def.", ["abc", "DEF"], 1.0),
        ("contained", "abc", ["abc", "def", "ghi", "jkl"], 0.25),
        ("contained", "", ["abc"], 0.0),
        ("any", "they are def.", ["abc", "DEF"], 1.0),
        ("any", "they are none.", ["abc", "DEF"], 0.0),
        ("number", " 12345. Remember it. 99999", ["12345"], 1.0),
        ("number", " 123456", ["12345"], 0.0),
        ("number", " 12344", ["12345"], 0.0),
        ("number", "no number", ["12345"], 0.0),
        ("ids", "7 8 9 10", ["7 8 9"], 1.0),
        ("ids", "7 8", ["7 8 9"], 0.0),
        ("ids", "7 8 91", ["7 8 9"], 0.0),
    ],
)
def test_scores(metric: score.Metric, answer: str, references: list[str], expected: float) -> None:
    assert score.score(metric, answer, references) == expected


# --- token ids ---


def test_roles_of_ids_are_disjoint() -> None:
    layout = synthetic_ids.IdLayout(256, 512)
    roles = [[layout.needle, layout.question], layout.values, layout.keys, layout.noise]
    every = np.concatenate(roles)
    assert len({*every.tolist()}) == len(every)
    assert every.min() == 256
    assert every.max() == 511
    with pytest.raises(InputError, match="at least 32 ids"):
        synthetic_ids.IdLayout(256, 270)


def test_rows_of_needles_answer_their_questions() -> None:
    """Every answer stands behind its key once before; weights are on the answers alone; noise is kept."""
    rng, layout = print_seed(), synthetic_ids.IdLayout(100, 300)
    noise = rng.integers(0, 100, (6, 301)).astype(np.int32)
    tokens, weights = synthetic_ids.needle_rows(rng, 6, 301, layout, needles=7, questions=3, noise=noise)
    assert tokens.shape == weights.shape == (6, 301)
    for row, weight, plain in zip(tokens, weights, noise, strict=True):
        assert weight.sum() == 9
        asked = np.flatnonzero(row == layout.question)
        assert len({row[i + 1] for i in asked}) == 3
        for i in asked:
            (at,) = (j for j in np.flatnonzero(row == row[i + 1]) if row[j - 1] == layout.needle)
            assert row[i + 2 : i + 5].tolist() == row[at + 1 : at + 4].tolist()
            assert weight[i + 2 : i + 5].tolist() == [1, 1, 1]
        assert (row == layout.needle).sum() == 7
        assert (row == plain).sum() >= 301 - 10 * 5
    with pytest.raises(InputError, match="do not fit"):
        synthetic_ids.needle_rows(rng, 1, 30, layout, needles=6)


def test_rows_repeat_their_sequences() -> None:
    """What counts equals what stood a period before; periods have the lengths asked for, and short ones are common."""
    rng, layout = print_seed(), synthetic_ids.IdLayout(5, 64)
    for length, shortest, longest in ((16, 8, None), (101, 3, 20), (4000, 8, None)):
        tokens, weights = synthetic_ids.repeated_rows(rng, 40, length, layout, shortest, longest)
        assert tokens.shape == weights.shape == (40, length)
        assert set(np.unique(tokens)) <= set(layout.content)
        periods = (weights == 0).sum(axis=1)
        assert periods.min() >= shortest
        assert periods.max() <= (longest or length // 2)
        for row, weight, period in zip(tokens, weights, periods, strict=True):
            assert np.array_equal(row[period:], row[:-period])
            assert (weight[period:] == 1).all()
    assert (periods < 200).sum() > 10
    with pytest.raises(InputError, match="cannot be repeated"):
        synthetic_ids.repeated_rows(rng, 1, 10, layout, 6)


def test_a_sample_on_ids_has_its_needle_at_its_depth() -> None:
    rng, layout = print_seed(), synthetic_ids.IdLayout(0, 128)
    for depth in (0.0, float(rng.uniform(0, 100)), 100.0):
        sample = synthetic_ids.needle_sample(rng, 700, depth, layout, needles=4)
        assert len(sample.prompt) == 697
        key = sample.prompt[-1]
        assert sample.prompt[sample.place : sample.place + 2].tolist() == [layout.needle, key]
        found = sample.prompt[sample.place + 2 : sample.place + 5].tolist()
        assert sample.references == (" ".join(map(str, found)),)
        assert abs(sample.place - depth / 100 * 690) <= 10
        assert (sample.metric, sample.new_tokens) == ("ids", 3)
