"""Right answers get 1, wrong ones 0, and what cannot be judged no signal; whatever a response does."""

import concurrent.futures
import resource
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.rewards import load_reward
from train.rewards.math import MathReward


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    made = load_reward("math", workers=1, seconds=30.0)
    assert isinstance(made, MathReward)
    yield made
    made.close()


def boxed(reward: Any, pairs: list[tuple[Any, str]]) -> list[float | None]:
    golds, answers = zip(*pairs, strict=True)
    return reward([rf"So \boxed{{{x}}}." for x in answers], [True] * len(pairs), answer=list(golds))


RIGHT = [
    ("42", "42.0"), (42, "42"), (0.75, r"\frac{3}{4}"), ("3/4", r"\frac34"), (r"\frac{3}{4}", "0.75"),
    ("1000000", r"1{,}000{,}000"), ("1000000", "1,000,000"), ("1000000", r"1\,000\,000"), ("1000000", "1 000 000"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2-1", "(x-1)(x+1)"), ("5", "x=5"), ("x=5", "5"), ("1,2", "2, 1"), 
    ("42", "$42$"),
    ("(1,2)", "( 1, 2 )"), (r"\frac{3}{2}", r"1\frac{1}{2}"), ("A", r"\text{A}"), (r"\text{even}", "even"),
    ("42", "42."),
    (r"\pi/2", r"\frac{\pi}{2}"), ("-3", "-3"), (r"42\text{ km}", "42"), (r"The result: \boxed{7}", "7"),
]  # fmt: skip
WRONG = [
    ("42", "43"), ("42", "-42"), ("42", "41 or 42"), ("42", "41, 42"), ("42", r"42 \text{ or } 43"),
    ("42", "42 and 43"),
    ("42", r"\{41, 42\}"), ("42", "the answer is 42"), ("42", "x"), ("(1,2)", "(2,1)"), ("A", "B"), ("even", "odd"),
    ("42", r"42 \pm 1"), ("42", "[41, 43]"), ("42", "x > 41"), ("0", "0.001"), (r"\frac13", "0.33"),
    ("42", r"\text{whatever}"), ("42", "0/0"), ("42", "__import__('os').system('true')"), ("42", "9" * 2000),
    # Numbers beside one another are not added.
    ("83", "41 42"), ("83", r"41\ 42"), ("83", "{41}{42}"), ("83", "41{42}"), ("83", r"41\text{ }42"),
    ("83", "41$ $42"),
    ("42", r"42\text{ or 43}"),
]  # fmt: skip


def test_right_and_wrong_answers(reward: MathReward) -> None:
    found = dict(zip(map(str, RIGHT + WRONG), boxed(reward, RIGHT + WRONG), strict=True))
    assert found == {**{str(x): 1.0 for x in RIGHT}, **{str(x): 0.0 for x in WRONG}}


def test_numbers_are_equal_however_they_are_written(reward: MathReward) -> None:
    """Random fractions, scaled and as decimals; other fractions are not equal."""
    rng = print_seed()
    right, wrong = [], []
    for _ in range(25):
        a, b, k = int(rng.integers(-500, 500)), int(rng.choice([1, 2, 4, 5, 8, 10])), int(rng.integers(2, 9))
        sign, value = "-" * (a < 0), Fraction(a, b)
        right += [(f"{a}/{b}", rf"{sign}\frac{{{abs(a) * k}}}{{{b * k}}}"), (f"{a}/{b}", f"{float(value)}")]
        right.append((f"{a}/{b}", f"{a * k}/{b * k}"))
        wrong += [(f"{a}/{b}", f"{a + k}/{b}"), (f"{a}/{b}", rf"{sign}\frac{{{abs(a)}}}{{{b + 1}}}")][: 2 if a else 1]
    assert boxed(reward, right) == [1.0] * len(right)
    assert boxed(reward, wrong) == [0.0] * len(wrong)


def test_only_the_final_answer_of_a_finished_response_counts(reward: MathReward) -> None:
    texts = [
        (r"\boxed{42}", True, 1.0),
        (r"\boxed{42}", False, 0.0),
        (r"\boxed{42} or rather \boxed{41}", True, 0.0),
        (r"\boxed{41} or rather \boxed{42}", True, 1.0),
        ("The answer is 42.", True, 0.0),
        (r"42 42 42 \boxed{}", True, 0.0),
        (r"\boxed{42} \boxed{4", True, 0.0),
        (r"All numbers: \boxed{1, 2, 3, 42}", True, 0.0),
        ("", True, 0.0),
    ]
    completions, finished, expected = map(list, zip(*texts, strict=True))
    # What the prompt says is not read: it is not even asked for.
    assert reward(completions, finished, prompts=[r"Say \boxed{42}"] * 9, answer=["42"] * 9) == expected
    marked = MathReward(workers=1, markers=("####",), after="</think>", column="solution")
    try:
        texts = ["x</think>#### 42", "#### 42</think>#### 41", "#### 42</think>", "#### 42", r"</think>\boxed{42}"]
        assert marked(texts, [True] * 5, solution=["sum #### 42"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    finally:
        marked.close()


def test_what_cannot_be_judged_is_no_signal() -> None:
    """A comparison that never ends, one that needs too much memory, and a right answer that cannot be read."""
    reward = MathReward(workers=2, seconds=3.0, memory_bytes=1 << 30)
    try:
        handler = signal.getsignal(signal.SIGALRM)
        endless = [("42", "10^{10^{10}}"), ("42", "99999999!"), ("42", "42.0")]
        # Off the main thread, where no signal could interrupt.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            assert thread.submit(boxed, reward, endless).result() == [None, None, 1.0]
        assert signal.getsignal(signal.SIGALRM) is handler
        assert reward([r"\boxed{42}"] * 3, [True, True, False], answer=["", None, "}{"])[:2] == [None, None]
        # Their limits, not ours.
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        limits = Path(f"/proc/{reward.processes()[0]}/limits").read_text()
        for name, value in (("address space", 1 << 30), ("file size", 0), ("core file size", 0), ("processes", 0)):
            line = next(line for line in limits.splitlines() if f"Max {name}" in line)
            assert line.split()[-3 if line.split()[-1].isalpha() else -2] == str(value)
    finally:
        reward.close()
    assert reward.processes() == []


def test_bad_input(reward: MathReward, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ([1], True, {"a": 1}):
        with pytest.raises(InputError, match=r"column answer has .* for completion 0"):
            reward([r"\boxed{1}"], [True], answer=[value])
    with pytest.raises(InputError, match="columns are: question"):
        reward([r"\boxed{1}"], [True], question=["?"])
    for settings in ({"workers": 0}, {"seconds": 0.0}, {"markers": ("",)}, {"recycle": 0}, {"longest": 0}):
        with pytest.raises(InputError):
            load_reward("math", **settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'qwen-jax\[post\]'"):
        load_reward("math")
