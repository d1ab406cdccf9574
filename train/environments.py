"""Environments of rollouts with several turns: what answers the policy when it calls a tool.

An environment never sees or changes the policy's tokens: it reads the text of a turn, and what it answers becomes a
turn of the chat template, whose tokens are not trained. `ToolEnvironment` reads tool calls in Qwen's (Hermes) format.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen_jax.errors import InputError
from qwen_jax.serving.tools import Call, parse
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.chat import check_tools
from qwen_jax.tokenizer.text import unused_characters
from train.fields import at_least

if TYPE_CHECKING:
    from train.sampler import Prompt


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn of the policy.

    Attributes:
      texts: one for each message, such as what each tool returned. They are plain text: control tokens that they spell
        are not read as such.
      role: of the messages, as the chat template knows it.

    Raises:
      InputError: texts that are one text, or something else.
    """

    texts: tuple[str, ...]
    role: str = "tool"

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
            raise InputError(f"An observation has a tuple of texts, one for each message; got {self.texts!r:.200}.")


class ToolUnavailableError(Exception):
    """A tool failed for a reason that is not the policy's fault. The rollout ends, and must get no reward."""


class Environment(Protocol):
    """What a policy talks to. `step` is called from several threads, never from two for one state."""

    def reset(self, prompt: "Prompt") -> Any:
        """The state of a conversation before its first turn.

        Args:
          prompt: that the conversation begins with.
        """

    def step(self, state: Any, text: str, ids: Sequence[int]) -> Observation | None:
        """Answers a turn of the policy that ended by itself.

        Args:
          state: of `reset`; may be changed.
          text: of the turn, without the end id and other special tokens.
          ids: its tokens, with the end id.

        Returns:
          What comes next, or None if the conversation has ended.

        Raises:
          ToolUnavailableError: for a reason that is not the policy's fault.
        """


class Tool(Protocol):
    """A function that a policy may call.

    Attributes:
      schema: `{"type": "function", "function": {"name", "description", "parameters"}}`, for the chat template.
    """

    schema: Mapping[str, Any]

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The answer as text.

        Args:
          arguments: of the call, as the policy wrote them.

        Raises:
          ValueError: wrong arguments; the policy reads the message.
          ToolUnavailableError: for a reason that is not the policy's fault.
        """


class ToolEnvironment:
    """Runs the tools that a turn calls, and ends a conversation with the first turn that calls none.

    Args:
      tools: with different names. Give `schemas` to the chat template when prompts are made.
      max_turns: turns of the policy; the last one is not answered.
      max_calls: of one turn; further ones are refused.
      max_characters: of one answer; the middle of a longer one is left out.

    Raises:
      InputError: a malformed schema, two tools of one name, or a number below 1.
    """

    def __init__(
        self, tools: Sequence[Tool], max_turns: int = 8, max_calls: int = 8, max_characters: int = 4000
    ) -> None:
        self.max_turns, self.max_calls, self.max_characters = max_turns, max_calls, max_characters
        at_least(self, max_turns=1, max_calls=1, max_characters=100)
        check_tools([tool.schema for tool in tools])
        self._tools = {str(tool.schema["function"]["name"]): tool for tool in tools}
        if len(self._tools) < len(tools):
            raise InputError(f"Tools must have different names; got {', '.join(_name(tool) for tool in tools)}.")

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """The tools as the chat template takes them."""
        return [tool.schema for tool in self._tools.values()]

    def reset(self, prompt: "Prompt") -> list[int]:
        """A list that counts the turns."""
        return [0]

    def step(self, state: list[int], text: str, ids: Sequence[int]) -> Observation | None:
        """What the called tools return, in order; None without a call, and after the last turn."""
        state[0] += 1
        _, calls = parse(text)
        if not calls or state[0] >= self.max_turns:
            return None
        answers = [self._answer(call) for call in calls[: self.max_calls]]
        refused = f"Error: a turn may have {self.max_calls} calls."
        return Observation(tuple([*answers, *[refused] * (len(calls) - self.max_calls)]))

    def _answer(self, call: Call) -> str:
        tool = self._tools.get(call.name)
        if tool is None:
            return f"Error: there is no tool {call.name}; the tools are {', '.join(self._tools)}."
        try:
            answer = tool(json.loads(call.arguments))
        except InputError:
            raise  # The tool itself is set up wrongly.
        except (ValueError, RecursionError) as error:
            answer = f"Error: {error}"
        return shortened(answer, self.max_characters)


def _name(tool: Tool) -> str:
    return str(tool.schema["function"]["name"])


def shortened(text: str, most: int) -> str:
    """The text, without its middle if it has more characters than `most`."""
    if len(text) <= most:
        return text
    left_out = f"\n[{len(text) - most} characters left out]\n"
    return text[: most // 2] + left_out + text[len(text) - (most - most // 2) :]


def observation_ids(tokenizer: Tokenizer, observation: Observation, last_id: int) -> list[int]:
    """The tokens between the policy's turn and its next one, as the chat template writes them.

    Args:
      tokenizer: with a chat template.
      observation: what is answered.
      last_id: of the policy's turn. If it is the id that ends a turn in the template, it is not repeated.

    Raises:
      InputError: no chat template, or one that does not show messages as they are.
    """
    end, *places = unused_characters(1 + len(observation.texts), "".join(observation.texts))
    answers = [{"role": observation.role, "content": place} for place in places]
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": end}, *answers]
    rendered = tokenizer.chat_template.render(messages, add_generation_prompt=True)
    if any(rendered.count(mark) != 1 for mark in (end, *places)):
        raise InputError(
            f"The chat template does not write each message of role {observation.role} once and as it is. Use a "
            "template that does, or an environment with another role."
        )
    # The marks become the texts, in which nothing is a control token.
    pieces = re.split(f"([{''.join(places)}])", rendered.split(end)[1]) if places else [rendered.split(end)[1]]
    text, literal = "", list[int]()
    for piece in pieces:
        if piece in places:
            piece = observation.texts[places.index(piece)]
            literal += range(len(text), len(text) + len(piece))
        text += piece
    ids = tokenizer.encode(text, add_special_tokens=False, literal=literal)
    return ids[1:] if ids[:1] == [last_id] else ids


# --- tools ---


class CodeResult(Protocol):
    """What is read of `train.sandbox.Run`."""

    @property
    def outcome(self) -> Any:
        """A member of an enumeration; "ERROR" is a failure of the sandbox."""

    @property
    def stdout(self) -> bytes:
        """What the program wrote."""

    @property
    def stderr(self) -> bytes:
        """What it wrote about errors."""

    @property
    def killed_by(self) -> str | None:
        """The limit that ended it, such as "time"."""

    @property
    def reason(self) -> str | None:
        """Why there is no result."""


class CodeRunner(Protocol):
    """What is used of `train.sandbox.Sandbox`."""

    def run(self, language: str, source: str) -> CodeResult:
        """Runs a program in isolation."""


class PythonTool:
    """Runs Python code in a sandbox and returns what it prints.

    Args:
      sandbox: a `train.sandbox.Sandbox`; it limits time and memory.
    """

    def __init__(self, sandbox: CodeRunner) -> None:
        self._sandbox = sandbox
        self.schema: Mapping[str, Any] = _schema(
            "python",
            "Runs a Python program and returns what it prints. Each call starts anew.",
            {"code": {"type": "string", "description": "The program. Print what you want to see."}},
            ["code"],
        )

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """What the program printed, and the errors of one that failed."""
        found = self._sandbox.run("python", _text(arguments, "code"))
        if found.outcome.name == "ERROR":
            raise ToolUnavailableError(f"The sandbox failed: {found.reason}")
        parts = [found.stdout.decode(errors="replace")]
        if found.outcome.name == "FAIL":
            parts.append(found.stderr.decode(errors="replace"))
        if found.killed_by:
            parts.append(f"The program was stopped: it reached its limit of {found.killed_by}.")
        return "\n".join(part.rstrip("\n") for part in parts if part) or "The program printed nothing."


class FileSearchTool:
    """Finds paragraphs with given words in a folder of text files.

    Paragraphs are ranked by BM25 (Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework", section 3.4) with
    k1 = 1.2 and b = 0.75; of equal ones the first comes first.

    Args:
      folder: all files in it and below are read once, in order of their names. Links that lead out of it are not.
      suffixes: of the files that are read.
      results: paragraphs that a search returns.

    Raises:
      InputError: no such folder, no text in it, or a file that cannot be read.
    """

    def __init__(self, folder: str | Path, suffixes: Sequence[str] = (".txt", ".md", ".rst"), results: int = 5) -> None:
        self.results = results
        at_least(self, results=1)
        root = Path(folder).resolve()
        if not root.is_dir():
            raise InputError(f"{folder} is not a folder. Give one with text files to search.")
        self._paragraphs: list[tuple[str, str]] = []
        for path in sorted(root.rglob("*")):
            if path.suffix not in suffixes or not path.is_file() or not path.resolve().is_relative_to(root):
                continue
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise InputError(f"Cannot read {path}: {error.strerror}.") from None
            name = str(path.relative_to(root))
            self._paragraphs += [(name, part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
        if not self._paragraphs:
            raise InputError(f"{folder} has no text in files that end with {', '.join(suffixes)}.")
        # How often each word is in each paragraph.
        self._counts = [collections.Counter(_words(text)) for _, text in self._paragraphs]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean_length = max(sum(self._lengths) / len(self._lengths), 1.0)
        self._places = collections.defaultdict[str, list[int]](list)
        for i, counts in enumerate(self._counts):
            for word in counts:
                self._places[word].append(i)
        self.schema: Mapping[str, Any] = _schema(
            "search",
            "Searches text files for words and returns the paragraphs that fit best.",
            {"query": {"type": "string", "description": "Words to search for."}},
            ["query"],
        )

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The best paragraphs, each after the name of its file."""
        scores = collections.defaultdict[int, float](float)
        total = len(self._paragraphs)
        for word in dict.fromkeys(_words(_text(arguments, "query"))):
            places = self._places.get(word, [])
            rarity = math.log(1 + (total - len(places) + 0.5) / (len(places) + 0.5))
            for i in places:
                count, length = self._counts[i][word], 0.25 + 0.75 * self._lengths[i] / self._mean_length
                scores[i] += rarity * count * 2.2 / (count + 1.2 * length)
        best = sorted(scores, key=lambda i: (-scores[i], i))[: self.results]
        found = ["{}:\n{}".format(*self._paragraphs[i]) for i in best]
        return "\n\n".join(found) or "Nothing was found."


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ValueError(f"the argument {name} must be a text.")
    return value


def _schema(name: str, description: str, properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
