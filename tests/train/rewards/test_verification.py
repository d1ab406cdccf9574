"""Functions that verify responses: in the sandbox, and as a reward."""

import json
import shutil
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.scripted_instructor import RIGHT
from train.rewards.loading import load_reward
from train.rewards.verification import LIMITS, ROWS, ask_function
from train.sandbox import LANGUAGES, Limits, Sandbox

ISOLATION: Any = "bubblewrap" if shutil.which("bwrap") else "none"


TEXT = ["a b", "abc", "x,y", ""] * 3


@pytest.mark.draw(5)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return ',' not in response", "1101" * 3),
        ("return response.index('b') > 0", "11ee" * 3),
        ("time.sleep(99)", "t" * 12),
        ("return time.sleep(99 * (response == 'abc')) is None", "1t111t" + "t" * 6),
        ("os._exit(0)", "k" * 12),
        ("os.kill(os.getppid(), 9)", "k" * 12),
        ("print('1' * 99); return False", "0" * 12),
        ("[os.write(fd, b'1' * 60) for fd in range(3, 9) if is_pipe(fd)]; return False", "f" * 12),
        ("return 1", "e" * 12),
        ("sys.modules['re'] = None; n[0] += 1; return n[0] == 1", "1" * 12),
        ("raise SystemExit", "e" * 12),
        ("signal.pthread_kill(threading.main_thread().ident, 11)", "k" * 12),
    ],
)  # fmt: skip
def test_a_function_can_spoil_its_own_answers_only(body: str, said: str) -> None:
    """It loops, ends or kills its process, prints verdicts and writes to pipes: each text has an answer of its own."""
    source = (
        "import os, signal, sys, threading, time\nn = [0]\n"
        "def is_pipe(fd):\n    try:\n        return os.fstat(fd).st_mode & 0o10000\n"
        "    except OSError:\n        return 0\n"
        f"def evaluate(response):\n    {body}\n"
    )
    with Sandbox(Limits(**LIMITS), 1, ISOLATION, languages={**LANGUAGES, **ROWS}) as box:
        assert ask_function(box.run, source, TEXT) == said


def test_the_reward_of_functions() -> None:
    """The share of functions; no signal without functions; 0 for what is cut or empty."""
    word = RIGHT.replace("{word}", "so").replace("{number}", "1")
    longer = "def evaluate(response):\n    return len(response) > 10\n"
    broken = "def evaluate(response):\n    return response.x\n"
    texts = ["so so", "so so and so on", "no", "so so", "so so", " "]
    functions = [[word, longer], json.dumps([word, longer]), [word], [], [word, broken], [word]]
    reward: Any = load_reward("verification", isolation=ISOLATION, workers=2)
    assert reward(texts, [True] * 6, functions=functions) == [0.5, 1.0, 0.0, None, 0.5, 0.0]
    assert reward(texts, [False] * 6, functions=functions) == [0.0, 0.0, 0.0, None, 0.0, 0.0]
    with pytest.raises(InputError, match="list of sources"):
        reward(texts[:1], [True], functions=[3])
    reward.close()
    with pytest.raises(InputError, match="least must lie"):
        load_reward("verification", isolation="none", least=2.0)
