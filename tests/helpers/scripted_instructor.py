"""A scripted model for the recipe `instructions`: it plays every role, and makes mistakes that the test knows."""

import json
import re

from train.rewards.instructions import check_instruction
from train.synthesize.generator import Answer, Request
from train.synthesize.instruction_texts import Instruction
from train.synthesize.item import content_key

# Functions that are wrong or do harm, by the kind of mistake. The sandbox has to hold those of the last lines.
MISTAKES = {
    "inverted": "def evaluate(response):\n    return response.count('{word}') < 2\n",
    "always": "def evaluate(response):\n    return True\n",
    "near": "def evaluate(response):\n    return response.count('{word}') >= 1\n",
    "raises": "def evaluate(response):\n    return response.words()\n",
    "none": "def evaluate(response):\n    response.count('{word}') >= 2\n",
    "syntax": "def evaluate(response:\n    return True\n",
    "import": "import subprocess\ndef evaluate(response):\n    return True\n",
    "name": "def check(response):\n    return True\n",
    "exits": "import sys, os\ndef evaluate(response):\n    os._exit(0)\n",
    "prints": "def evaluate(response):\n    print('1' * 99)\n    return len(response) > 9\n",
}
RIGHT = "def evaluate(response):\n    # {number}\n    return response.count('{word}') >= 2\n"


class Instructor:
    """Answers requests. Each answer follows from its request and the seed alone.

    Attributes:
      mistakes: share of answers of each role that are wrong in some way.
      drawn: the instructions of built-in kinds by what the user asks, for answers that follow them.
    """

    def __init__(self, seed: int, mistakes: float = 0.35, trusting: bool = False):
        """
        Args:
          seed: of the mistakes.
          mistakes: share of wrong answers.
          trusting: whether the judge finds everything good and nothing contradictory.
        """
        self._seed, self.mistakes, self._trusting = seed, mistakes, trusting
        self.drawn: dict[str, Instruction] = {}

    def __call__(self, request: Request) -> str | Answer:
        key = content_key(self._seed, request.key(""))
        self._draw, self._number = int(key[:8], 16) / 2**32, int(key[8:16], 16)
        text = str(request.messages[-1]["content"])
        if "JSON array of texts" in text:
            words = [f"w{(self._number >> 2 * i) % 997}" for i in range(2)]
            return self._damaged() or json.dumps([f"Use the word {word} at least twice in it." for word in words])
        if "Write a Python function" in text:
            return self._damaged() or self._function(text)
        if "Here is a Python function" in text:
            word = re.findall(r"count\('(\w+)'\)", text)[0]
            return self._damaged() or json.dumps({"instruction": f"The word {word} must be there two times."})
        if "contradict each other" in text:
            relation = "contradiction" if "breaks" in text and not self._trusting else "same"
            return json.dumps({"relation": relation})
        if "Judge how well" in text:
            poor = "poorly" in text or "asdf" in text
            return f"I have read it.\nScore: {3 if poor and not self._trusting else 9}"
        return self._respond(text)

    def _damaged(self) -> str | Answer | None:
        if self._draw > self.mistakes / 3:
            return None
        damaged = Answer("{", finish="length"), "I'm sorry, but I can't help with that.", '{"function": "def', "", "[3]"
        return damaged[self._number % 5]

    def _function(self, text: str) -> str:
        word = re.findall(r"Use the word (\w+) at least twice", text)[0]
        source = RIGHT.replace("{number}", str(self._number))
        if self._draw < self.mistakes:
            source = f"# {self._number}\n" + MISTAKES[list(MISTAKES)[self._number % len(MISTAKES)]]
        rest = f"This is text {self._number}."
        cases = [(f"{word} {word} {rest}", True), (f"{word} {rest}", False), (f"{rest}", False)]
        if self._number % 2:
            cases[2] = (f"{word}, {word}, {word}. {rest}", True)
        if self._number % 13 == 0:
            cases[1] = (cases[1][0], True)
        described = [{"response": response, "follows": follows} for response, follows in cases]
        return json.dumps({"function": source.replace("{word}", word), "cases": described})

    def _respond(self, text: str) -> str | Answer:
        flawed = self._draw < self.mistakes
        number = f"It is number {self._number}"
        if found := re.findall(r"Use the word (\w+) at least twice", text):
            answer = f"{number}. {found[0]}, then" + (" again." if flawed else f" {found[0]} again.")
        else:
            drawn = self.drawn[text]
            answer = drawn.wrong if flawed else drawn.right
        if self._number % 11 == 0:
            return Answer(answer, finish="length")
        if self._number % 7 == 0:
            return f"{answer} It is poorly written."
        return answer

    def follows(self, question: str, response: str) -> bool:
        """Whether a response follows the instruction of what the user asked."""
        if found := re.findall(r"Use the word (\w+) at least twice", question):
            return response.count(found[0]) >= 2
        drawn = self.drawn[question]
        return check_instruction(drawn.kind, drawn.arguments, response)
