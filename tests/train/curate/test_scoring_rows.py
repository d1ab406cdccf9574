"""Documents and questions in rows: nothing is lost, nothing overlaps, little is padding; long documents are cut."""

import itertools

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import train_bpe
from tests.helpers.runs import print_seed
from tests.helpers.scoring import RATINGS, TOPIC, tokenizer
from tests.helpers.timing import best_rate
from train.curate.scoring.prompt import Prompt
from train.curate.scoring.questions import Rating, Reward
from train.curate.scoring.rows import OWN_END, OWN_START, POSITIONS, SHARED_END, SHARED_START, TOKENS, Batch, Packer

MADE = tokenizer()


@pytest.mark.parametrize("questions", [RATINGS, (*RATINGS, TOPIC), RATINGS[:1]])
def test_rows_hold_each_conversation_as_if_it_were_alone(questions: tuple[Rating, ...]) -> None:
    """From the masks alone: the tokens that the last token of a question sees are its conversation, in order."""
    rng, prompt = print_seed(), Prompt(MADE, questions, 64)
    lengths = np.minimum(rng.geometric(0.03, 200), 64)
    documents = [rng.integers(0, 500, n).astype(np.int32) for n in lengths]
    packer = Packer(prompt, 320, rows=4, shards=2, window=2)
    batches: list[Batch] = []
    for i, ids in enumerate(documents):
        batches += packer.add(i, ids)
    before = len(batches)
    assert before
    assert all(len(batch.packed) == 4 for batch in batches)
    batches += packer.flush()
    assert list(packer.flush()) == []
    seen = set()
    for batch in batches:
        assert len(batch.packed) in packer.sizes == [2, 4]
        used = batch.packed[:, SHARED_END] > batch.packed[:, SHARED_START]
        assert used.sum() == batch.tokens
        for b, m in np.argwhere(batch.document >= 0):
            row, at = batch.packed[b], batch.last[b, m]
            i, q = int(batch.document[b, m]), int(batch.question[b, m])
            keys = [*range(*row[[SHARED_START, SHARED_END], at]), *range(*row[[OWN_START, OWN_END], at])]
            if len(questions) == 1:  # Then the question belongs to the text before it.
                keys = [*range(*row[[SHARED_START, SHARED_END], at])]
            np.testing.assert_array_equal(row[TOKENS, keys], prompt.whole(documents[i], q))
            np.testing.assert_array_equal(row[POSITIONS, keys], np.arange(len(keys)))
            # Each of these tokens sees those before it, and itself.
            for n, key in enumerate(keys):
                count = row[SHARED_END, key] - row[SHARED_START, key] + row[OWN_END, key] - row[OWN_START, key]
                assert count == n + 1
            assert (i, q) not in seen
            seen.add((i, q))
    assert len(seen) == len(documents) * len(questions)
    # Best fit: of two rows that were packed together, one has no room for the longest document of the other.
    sizes = lengths + (prompt.longest - 64)
    for batch in batches:
        rows = [sizes[np.unique(row[row >= 0])] for row in batch.document if row.max() >= 0]
        assert sum(row.sum() for row in rows) == batch.tokens
        for a, b in itertools.combinations(rows, 2):
            assert a.sum() + b.max() > 320 or b.sum() + a.max() > 320


@pytest.mark.parametrize("questions", [RATINGS, (*RATINGS, TOPIC), RATINGS[:1]])
def test_little_is_padding(questions: tuple[Rating, ...]) -> None:
    """Of rows of documents of all lengths up to 64, in an order that is the same every time."""
    packer = Packer(Prompt(MADE, questions, 64), 320, rows=4, window=2)
    documents = [np.zeros(1 + 37 * i % 64, np.int32) for i in range(256)]
    batches = [batch for i, ids in enumerate(documents) for batch in packer.add(i, ids)]
    assert sum(batch.tokens for batch in batches) > 0.85 * len(batches) * 4 * 320


def test_batches_are_the_same_in_every_run() -> None:
    rng, prompt = print_seed(), Prompt(MADE, RATINGS, 64)
    documents = [rng.integers(0, 500, n).astype(np.int32) for n in rng.integers(1, 65, 60)]

    def made() -> list[Batch]:
        packer = Packer(prompt, 320, rows=2, window=2)
        return [b for i, ids in enumerate(documents) for b in packer.add(i, ids)] + list(packer.flush())

    for a, b in zip(made(), made(), strict=True):
        np.testing.assert_array_equal(a.packed, b.packed)
        np.testing.assert_array_equal(a.document, b.document)


def test_long_documents_lose_their_middle_before_they_are_tokenised() -> None:
    prompt = Prompt(MADE, RATINGS, 64)
    huge = "river" + " river" * 8_000_000 + "the middle" + " river" * 8_000_000
    # Characters a second; a tokenizer reads about 1e7.
    assert best_rate(len(huge), lambda _: prompt.documents([huge]), 1e9) > 1e9
    short, long, medium = prompt.documents(["stone river", huge, "stone" + " quiet" * 80 + " river"])
    assert (short.cut, long.cut, medium.cut) == (False, True, True)
    assert len(long.ids) == len(medium.ids) == 64
    text = MADE.decode(long.ids)
    assert text.startswith("river river")
    assert text.endswith("river river")
    assert "[the middle of the document is left out]" in text
    assert MADE.decode(medium.ids).startswith("stone quiet")
    # As many tokens from the beginning as from the end, up to one.
    left, right = (part.split() for part in text.split("[the middle of the document is left out]"))
    assert len(left) > 9
    assert abs(len(left) - len(right)) <= 4
    # A text of few, long tokens is not longer than the budget.
    (spaces,) = prompt.documents([" " * 10_000_000])
    assert len(spaces.ids) <= 64


def test_the_prompt_is_that_of_the_chat_template() -> None:
    """The ids are those of the rendered conversation, where no token spans a document's edge; control tokens in a
    document are plain text."""
    prompt = Prompt(MADE, (*RATINGS, TOPIC), 64)
    for q, question in enumerate((*RATINGS, TOPIC)):
        text = "stone river <|im_end|> light"
        (document,) = prompt.documents([text])
        whole = MADE.decode(prompt.whole(document.ids, q))
        assert whole.count("<|im_end|>") == 3
        assert whole.endswith(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
        control = set(MADE.control_ids.values())
        assert not control & set(document.ids.tolist())
        assert sum(id in control for id in prompt.whole(document.ids, q).tolist()) == 5
    rewarded = Prompt(MADE, (Reward(),), 64)
    (document,) = rewarded.documents(["stone"])
    assert MADE.decode(rewarded.whole(document.ids, 0)).endswith("<|im_start|>assistant\nstone<|im_end|>\n")
    assert rewarded.answers == ((),)


def test_tokenizers_without_the_answers_are_refused() -> None:
    """A tokenizer that spells a letter in several tokens."""

    class Spelled(type(MADE)):  # type: ignore[misc]
        def _encode_text(self, text: str, parse_special: bool) -> list[int]:
            ids: list[int] = super()._encode_text(text, parse_special)
            return ids * 2 if text == "3" else ids

    spelled = train_bpe(["abc"], 278)
    spelled.__class__ = Spelled
    with pytest.raises(InputError, match="The answer '3' to good is 2 tokens of this tokenizer, expected one"):
        Prompt(spelled, RATINGS, 64)
