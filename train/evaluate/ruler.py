"""The thirteen tasks of RULER, made here, of an exact length in tokens.

Names, templates, numbers and answer lengths are those of RULER (Hsieh et al. 2024, arXiv:2404.06654). Eight tasks hide
needles; four of them need no text, as do `vt`, `cwe` and `fwe`. The other five hide needles in a text of the user;
`qa_1` and `qa_2` ask questions of a file of the user, with other documents as distractors (`train.evaluate.questions`).
"""

import itertools
import string
from collections.abc import Mapping, Sequence

import numpy as np

from train.evaluate.questions import questions_of
from train.evaluate.tasks import (
    Needles,
    Sample,
    Source,
    Task,
    distinct,
    joined,
    largest,
    make_sample,
    room_left,
)
from train.evaluate.words import words


def variable_tracking(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A chain of five assignments in noise; all variables of one value are asked for. The depth has no effect.

    The arguments and errors are those of `passkey`.

    Source: RULER (arXiv:2404.06654), section 3.2, `vt`: one chain, four hops, one example before the question.
    """
    encoder, count = source.encoder, 5
    letters = list(string.ascii_uppercase)
    names = distinct(count, lambda: "".join(rng.choice(letters, 5)))
    # RULER's example has variables of three letters.
    others = distinct(count, lambda: "".join(rng.choice(letters, 3)))
    # The value in the example is another one.
    shown, value = (str(x) for x in rng.choice(np.arange(10_000, 100_000), 2, replace=False))

    def lines(names: Sequence[str], value: str) -> list[str]:
        return [f" VAR {name} = {f'VAR {names[i - 1]}' if i else value}." for i, name in enumerate(names)]

    def template(value: str) -> tuple[str, str, str]:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            # RULER's spelling.
            f" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
            f"assgined the value {value}, they are:",
        )

    # One example with its answer, in little noise.
    example = "".join(f"{line}{source.noise.text}" for line in lines(others, shown))
    before, question, answer = template(shown)
    solved = f"{before}{example}{question}{answer} {' '.join(others)}\n\n"
    # The task itself.
    before, question, answer = template(value)
    frame = encoder.frame(solved + before, question, answer)
    needles = [encoder.ids(line) for line in lines(names, value)]
    new_tokens = 30
    room = room_left("vt", length, new_tokens, frame, sum(map(len, needles)))
    depths = np.sort(rng.uniform(0, 100, count)).tolist()
    context, _ = source.noise.filler(rng, room).insert(list(zip(depths, needles, strict=True)))
    return make_sample(frame, context, tuple(names), new_tokens, "contained")


def common_words(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A numbered list of words; the ten most common are asked for. The depth has no effect.

    The arguments and errors are those of `passkey`. Common words occur 30 times and the others 3 times; 6 times and
    once below 4,096 tokens, or where the tokenizer makes the former too long.

    Source: RULER (arXiv:2404.06654), section 3.3, `cwe`: one example before the question.
    """
    encoder, top, new_tokens = source.encoder, 10, 120
    before = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = "\nQuestion: What are the 10 most common words in the above list?"
    answer = " Answer: The top 10 words that appear most often in the list are:"
    # Words of the example, of the answer, and others: more than fit, as an entry has at least three tokens.
    pool = words(rng, 2 * top + 30 + length // (9 if length >= 4096 else 3))
    example, common, others = pool[: top + 30], pool[top + 30 : 2 * top + 30], pool[2 * top + 30 :]
    # Nothing that is asked for may be a part of another word.
    others = [word for word in others if not any(key in word for key in common)]
    sizes = np.array([len(encoder.ids(f" {word}")) for word in [*common, *others]])

    def frame_of(words: Sequence[str], often: int, seldom: int) -> tuple[np.ndarray, np.ndarray]:
        """The frame with a solved example of the first words often and the others seldom."""
        shown = [word for i, word in enumerate(words) for _ in range(often if i < top else seldom)]
        solved = f"{before}{_numbered(rng.permutation(shown).tolist())}{question}{answer} {_numbered(words[:top])}\n\n"
        return encoder.frame(solved + before, question, answer)

    def size(often: int, seldom: int, count: int) -> int:
        """Tokens of a list with some of the other words."""
        entries = top * often + count * seldom
        return int(numbers[entries] + often * sizes[:top].sum() + seldom * sizes[top : top + count].sum())

    # RULER's counts, for the example and the list; smaller ones for short lengths.
    often, seldom, frame, numbers, room = 0, 0, None, [0], 0
    for often, seldom, shown in ((30, 3, (40, 10, 3)), (6, 1, (20, 3, 1))):
        if often == 30 and length < 4096:
            continue
        frame = frame_of(example[: shown[0]], *shown[1:])
        room = length - new_tokens - sum(map(len, frame))
        # numbers[n] is the tokens of the first n numbers; there are as many as could fit.
        while numbers[-1] + int(sizes.min()) * len(numbers) <= room or len(numbers) <= 33 * top:
            numbers.append(numbers[-1] + len(encoder.ids(f" {len(numbers)}.")))
        # At least as many other words as common ones.
        if size(often, seldom, top) <= room:
            break
    assert frame is not None
    room_left("cwe", length, new_tokens, frame, size(often, seldom, top))
    most = min(len(others), (len(numbers) - 1 - top * often) // seldom)
    count = largest(most, lambda count: size(often, seldom, count) <= room)
    # The list, in random order.
    entries = rng.permutation([*common * often, *others[:count] * seldom]).tolist()
    parts = [encoder.ids(part) for i, word in enumerate(entries, 1) for part in (f" {i}.", f" {word}")]
    context = joined(source, rng, parts, room - size(often, seldom, count)).ids
    return make_sample(frame, context, tuple(common), new_tokens, "contained")


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{i}. {entry}" for i, entry in enumerate(entries, 1))


def frequent_words(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """Coded words whose frequencies fall with the square of their rank; the first three are asked for.

    The arguments and errors are those of `passkey`; the depth has no effect. The most frequent of all is "...".

    Source: RULER (arXiv:2404.06654), section 3.3, `fwe`: six letters, alpha 2.
    """
    encoder, new_tokens = source.encoder, 50
    frame = encoder.frame(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    )
    vocabulary = distinct(max(length // 50, 8), lambda: "".join(rng.choice(list(string.ascii_lowercase), 6)))
    parts = [encoder.ids(f" {word}") for word in ["...", *vocabulary]]
    sizes = np.array(list(map(len, parts)))
    # Shares of a zeta distribution: those of the first N ranks sum to less than 1.
    share = 6 / np.pi**2 / np.arange(1, len(parts) + 1) ** 2

    def counts(total: int) -> np.ndarray:
        return np.floor(total * share).astype(int)

    def clear(total: int) -> bool:
        """Whether the three can be told apart: each occurs more often than the next."""
        occurs = counts(total)
        return bool(occurs[3] and (np.diff(occurs[1:5]) < 0).all())

    fewest = next(total for total in itertools.count(1) if clear(total))
    room = room_left("fwe", length, new_tokens, frame, int(counts(fewest) @ sizes)) + int(counts(fewest) @ sizes)
    total = largest(2 * room, lambda total: int(counts(total) @ sizes) <= room)
    while not clear(total):
        total -= 1
    occurs = counts(total)
    order = rng.permutation(np.repeat(np.arange(len(parts)), occurs)).tolist()
    context = joined(source, rng, [parts[i] for i in order], room - int(occurs @ sizes)).ids
    return make_sample(frame, context, tuple(vocabulary[:3]), new_tokens, "contained")


RULER: Mapping[str, Task] = {
    "niah_single_1": Needles("noise", name="niah_single_1"),
    "niah_single_2": Needles(name="niah_single_2"),
    "niah_single_3": Needles(kind="uuid", name="niah_single_3"),
    "niah_multikey_1": Needles(needles=4, name="niah_multikey_1"),
    "niah_multikey_2": Needles("needles", name="niah_multikey_2"),
    "niah_multikey_3": Needles("needles", "uuid", "uuid", name="niah_multikey_3"),
    "niah_multivalue": Needles(values=4, name="niah_multivalue"),
    "niah_multiquery": Needles(needles=4, asked=4, name="niah_multiquery"),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa_1": questions_of("qa_1"),
    "qa_2": questions_of("qa_2"),
}
"""RULER's tasks."""

WITH_TEXT = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Those that hide needles in a text of the user."""

WITH_QUESTIONS = ("qa_1", "qa_2")
"""Those that need a file of questions: in the form of SQuAD, and in that of HotpotQA."""

WITH_DEPTH = tuple(name for name in RULER if name.startswith("niah_"))
"""Those that hide what is asked for at a depth."""
