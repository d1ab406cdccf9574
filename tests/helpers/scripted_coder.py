"""A scripted programmer: it plays every role of the recipe `code`, and makes mistakes that the test knows."""

import json
import re
from typing import Any

from train.synthesize.generator import Answer, Request
from train.synthesize.item import content_key

# What a program does with n, by language.
PROGRAMS = {
    "python": "n = int(input())\nprint({formula})\n",
    "bash": "read n\necho $(({formula}))\n",
    "perl": "my $n = <STDIN>;\nprint {formula}, qq(\\n);\n",
}
_TITLES = {"Python": "python", "Bash": "bash", "Perl": "perl"}
CHINESE = "对不起我不知道这个问题的答案是什么因为这个问题很难"


class Coder:
    """Answers requests. Each answer follows from its request and the seed alone.

    Attributes:
      mistakes: share of answers of each role that are wrong in some way.
      right: texts of solutions that are right.
      wrong: texts of solutions that are wrong, with the kind of mistake.
    """

    def __init__(self, seed: int, mistakes: float = 0.35, trusting: bool = False):
        """
        Args:
          seed: of the mistakes.
          mistakes: share of wrong answers.
          trusting: whether the examiner finds everything well posed.
        """
        self._seed, self.mistakes, self._trusting = seed, mistakes, trusting
        self.right: set[str] = set()
        self.wrong: dict[str, str] = {}

    def __call__(self, request: Request) -> str | Answer:
        key = content_key(self._seed, request.key(""))
        self._draw, self._number = int(key[:8], 16) / 2**32, int(key[8:16], 16)
        text = str(request.messages[-1]["content"])
        if "Write the program in" in text or "Write the function" in text:
            return self._solve(text)
        if "well posed" in text:
            return self._damaged() or json.dumps(
                {"well_posed": self._trusting or "n * " in text, "reason": "So it is."}
            )
        if "tests for the programming task" in text:
            return self._damaged() or self._tests(text)
        if text.startswith("Rewrite"):
            return self._damaged() or json.dumps({"task": text.partition("The task:\n")[2]})
        return self._damaged() or self._propose(text)

    def _damaged(self) -> str | Answer | None:
        """What is wrong with the form of an answer, or None."""
        if self._draw > self.mistakes / 4:
            return None
        return (
            Answer("[{", finish="length"),
            "I'm sorry, but I can't help with that.",
            '{"task": "Read',
            CHINESE * 4,
            "word \x00 " * 9,
            "",
        )[self._number % 6]

    def _propose(self, text: str) -> str:
        a, b = 2 + self._number % 97, 1 + self._number // 97 % 89
        if self._draw < self.mistakes / 2:
            return json.dumps({"task": f"Write something nice about the numbers {a} and {b}, please.", "function": "f"})
        if "one Python function" in text:
            task = f"Write a function affine_{a} that takes an integer n and returns n * {a} + {b}."
            return json.dumps({"task": task, "function": f"affine_{a}"})
        task = f"Read an integer n from standard input, and print n * {a} + {b}. For 0 the output is {b}."
        return "```json\n" + json.dumps({"task": task, "function": None}) + "\n```"

    def _tests(self, text: str) -> str:
        a, b, function = formula_of(text)
        tests: list[Any] = []
        for i in range(4):
            n = (self._number >> 3 * i) % 50 + 60 * i
            value: Any = n * a + b
            flaw = (self._number >> 4 * i) % 16 if self._draw < self.mistakes else 15
            if flaw < 4:
                value += 1 + (self._number >> i) % 1000
            elif flaw == 4:
                value = "" if function is None else None
            if function is None:
                tests.append({"input": f"{n}\n", "output": f"{value}"} if flaw != 5 else {"input": 3})
            else:
                tests.append(f"assert {function}({n}) == {value}" if flaw != 5 else "import os; assert True")
        return json.dumps(tests)

    def _solve(self, text: str) -> str | Answer:
        a, b, function = formula_of(text)
        title = re.findall(r"Write the program in (\w+)\.", text)
        language = _TITLES[title[-1]] if title else "python"
        formula = f"$n * {a} + {b}" if language == "perl" else f"n * {a} + {b}"
        kind = None
        if self._draw < self.mistakes:
            kind = ("off", "off", "constant", "syntax", "import", "nothing", "cut", "none", "other")[self._number % 9]
        # Wrong values are all different, so that wrong solutions agree on nothing.
        formula = {"off": f"{formula} + {self._number}", "constant": f"{b}"}.get(kind or "", formula)
        if function is None:
            code = PROGRAMS[language].replace("{formula}", formula)
        else:
            code = f"def {function}(n):\n    return {formula}\n"
        if kind == "syntax":
            code = f"(({code}"
        elif kind == "import":
            code = {"python": "import subprocess\n", "bash": "kill 1\n", "perl": "system 'ls';\n"}[language] + code
        elif kind == "nothing":
            code = "# n\n" if function is None else f"def {function}(n):\n    pass\n"
        fence = "```" if kind != "none" else ""
        tag = "rust" if kind == "other" else language
        answer = f"This is solution number {self._number}.\n\n{fence}{tag}\n{code}{fence}\n"
        if kind is None:
            self.right.add(answer)
        else:
            self.wrong[answer] = kind
        return Answer(answer, finish="length") if kind == "cut" else answer


def formula_of(text: str) -> tuple[int, int, str | None]:
    """What a task asks for: a and b of n * a + b, and the name of the function or None."""
    a, b = re.findall(r"n \* (\d+) \+ (\d+)", text)[0]
    name = re.search(r"affine_\d+", text)
    return int(a), int(b), name[0] if name else None
