"""MultiPL-E: HumanEval and MBPP in other languages, tested in the sandbox where it has the language."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.java_tuples import JAVA_TUPLES
from train.evaluate.benchmarks.lines import Ids, read_records, texts
from train.evaluate.benchmarks.passes import ProgramTask, Sampling, Trial, sampling_text, trial
from train.evaluate.task import DataFile, Item, Message
from train.rewards.text import code_blocks
from train.sandbox import LANGUAGES, Outcome, Run

# The sampling of the paper, section 4.
_PAPER = Sampling(samples=20, ks=(1, 10), temperature=0.2, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class _Row:
    """How programs in a language are run.

    Attributes:
      name: of the language, for people.
      sandbox: its name in the sandbox; "" if the sandbox does not have it.
      probe: a program that passes where the tests can pass: it uses what they need besides the language itself.
      before, after: source around the program.
      files: beside the program.
      absent: why the tests cannot run, if the sandbox has the language.
    """

    name: str
    sandbox: str = ""
    probe: str = ""
    before: str = ""
    after: str = ""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    absent: str = ""


_JAVA_MAIN = """
class Main {
    public static void main(String[] args) throws Exception {
        ClassLoader.getSystemClassLoader().setDefaultAssertionStatus(true);
        Class.forName("Problem").getMethod("main", String[].class).invoke(null, (Object) args);
    }
}
"""
_JAVA_PROBE = """
import org.javatuples.*;
class Problem {
    public static void main(String[] args) { assert(Pair.with(1L, 2L).equals(Pair.with(1L, 2L))); }
}
"""
_ROWS: Mapping[str, _Row] = {
    "cpp": _Row("C++", "cpp", "#include<assert.h>\n#include<bits/stdc++.h>\nint main() { assert(1 + 1 == 2); }\n"),
    "java": _Row("Java", "java", _JAVA_PROBE, after=_JAVA_MAIN, files=JAVA_TUPLES),
    "js": _Row("JavaScript", "javascript", "const assert = require('node:assert');\nassert.deepEqual([1], [1]);\n"),
    "ts": _Row(
        "TypeScript",
        "typescript",
        "declare var require: any;\nconst assert = require('node:assert');\nassert.deepEqual([1], [1]);\n",
    ),
    "sh": _Row("Bash", "bash", "set -e\n[[ $(echo 1) = 1 ]]\n"),
    "php": _Row("PHP", "php", "<?php\nif (1 !== 1) { throw new Exception('no'); }\n"),
    "rs": _Row("Rust", "rust", "fn main() { assert_eq!(1, 1); }\n"),
    "pl": _Row("Perl", "perl", "use Test::Deep;\nexit(eq_deeply([1], [1]) ? 0 : 1);\n"),
    "r": _Row("R", "r", "if (!identical(1, 1)) { quit('no', 1) }\n"),
    "cs": _Row("C#", "csharp", absent="its tests report through a trace listener, which the sandbox does not set"),
    "go": _Row("Go", "go", absent="its tests are for `go test`, which the sandbox does not run"),
    **{
        name: _Row(words)
        for name, words in {
            "d": "D",
            "dart": "Dart",
            "hs": "Haskell",
            "jl": "Julia",
            "lua": "Lua",
            "ml": "OCaml",
            "rb": "Ruby",
            "rkt": "Racket",
            "scala": "Scala",
            "swift": "Swift",
        }.items()
    },
}
_COMMENTS = ("//", "#", "--", "/*", "*", ";")


class MultiPLE(ProgramTask):
    """One file of MultiPL-E: one benchmark in one language.

    A program is the prompt, the answer up to the first stop text of the record, and the tests; it passes if it ends
    with status 0. As in the benchmark, the tests are a part of the program. Problems of a language that the sandbox
    does not have, or whose libraries are not there, have no score.
    """

    citation = "Cassano et al. 2023, MultiPL-E, IEEE TSE, arXiv:2208.08227"
    max_tokens = 1024
    _ask = (
        "Complete the {language} function below. Give the whole program text from its first line to the end of the "
        "function, without tests, in one Markdown code block.\n\n```{tag}\n{prompt}\n```"
    )

    def __init__(
        self,
        benchmark: str,
        language: str,
        suffix: str = "",
        chat: bool = False,
        sampling: Sampling = Sampling(),  # noqa: B008
    ):
        """
        Args:
          benchmark: "humaneval" or "mbpp".
          language: as in the names of the files, such as "cpp".
          suffix: of the task's name.
          chat: whether a chat model is asked.
          sampling: of the answers.
        """
        super().__init__(f"multipl_e_{benchmark}_{language}{suffix}", chat, sampling)
        self.language, self._row = language, _ROWS[language]
        self.files = (
            DataFile(
                f"multipl-e/{benchmark}-{language}-reworded.jsonl",
                source=f"github.com/nuprl/MultiPL-E: prompts/{benchmark}-{language}-reworded.jsonl",
                licence="BSD-3-Clause with machine learning restriction",
            ),
        )

    def template(self) -> str:
        asked = self._ask if self.chat else "{prompt}"
        row = self._row
        return (
            f"{asked}\n---\nstop: the record's stop_tokens, max_tokens: {self.max_tokens}, "
            f"{sampling_text(self.sampling)}\n"
            "program: prompt, answer up to the first stop text, tests\n"
            "chat: in the last closed code block with the last line of the prompt, the answer is what follows that "
            "line; lines of the prompt before that one which the block lacks come first\n"
            f"before: {row.before!r}\nafter: {row.after!r}"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        kinds = {"name": str, "language": str, "prompt": str, "tests": str, "stop_tokens": list}
        ids = Ids()
        found = []
        for where, record in read_records(files[self.files[0].path], kinds):
            # That of Go is go_test.go.
            if record["language"].partition("_")[0] != self.language:
                raise InputError(f"{where}: expected problems in {self.language}, found {record['language']!r:.40}.")
            record["stop_tokens"] = texts(where, record, "stop_tokens")
            if not record["prompt"].strip():
                raise InputError(f"{where}: the field prompt is empty.")
            fields = {name: record[name] for name in ("prompt", "tests", "stop_tokens")}
            found.append(Item(ids.new(where, record["name"]), fields, {"language": self._row.name}))
        return found

    def prompt(self, item: Item) -> str | tuple[Message, ...]:
        prompt = str(item.fields["prompt"])
        if not self.chat:
            return prompt
        content = self._ask.format(language=self._row.name, tag=self._row.sandbox, prompt=prompt)
        return ({"role": "user", "content": content},)

    def stops(self, item: Item) -> tuple[str, ...]:
        return () if self.chat else tuple(item.fields["stop_tokens"])

    def program(self, item: Item, answer: str) -> str | None:
        fields = item.fields
        if self.chat:
            begun = [part for _, block in code_blocks(answer)[0] if (part := continuation(fields["prompt"], block))]
            if not begun:
                return None
            start, answer = begun[-1]
        else:
            start = fields["prompt"]
        cut = min((at for stop in fields["stop_tokens"] if (at := answer.find(stop)) >= 0), default=len(answer))
        row = self._row
        return f"{row.before}{start}{answer[:cut]}\n{fields['tests']}{row.after}"

    def trial(self, item: Item, program: str, sandbox: Any) -> Trial:
        run = self._run(sandbox, program)
        if run.killed_by == "time" and run.reason.startswith("compilation"):
            # Large headers take long on a busy machine, whatever the program is.
            run = dataclasses.replace(run, outcome=Outcome.ERROR)
        return trial("pass", run)

    def unusable(self, sandbox: Any) -> str | None:
        row = self._row
        if not row.sandbox or row.sandbox not in LANGUAGES:
            return f"the sandbox does not have {row.name}; it has {', '.join(LANGUAGES)}"
        if row.absent:
            return f"{row.name} cannot be tested here: {row.absent}"
        try:
            run = self._run(sandbox, f"{row.before}{row.probe}{row.after}")
        except InputError as error:
            return str(error)
        if run.outcome is Outcome.PASS:
            return None
        said = run.stderr.decode(errors="replace").strip().splitlines()
        return (
            f"{row.name} cannot be tested here: a program that uses what the tests need does not run: {run.reason}"
            f"{': ' + said[0][:200] if said else ''}"
        )

    def _run(self, sandbox: Any, program: str) -> Run:
        run: Run = sandbox.run(self._row.sandbox, program, files=self._row.files or None)
        return run


def continuation(prompt: str, block: str) -> tuple[str, str] | None:
    """The parts of a code block up to the last line of a prompt, and from there on.

    Args:
      prompt: ends in the line that begins the function.
      block: a whole program.

    Returns:
      The block up to the end of that line, after the lines of the prompt that it lacks; and what follows. None if the
      line is not in the block, but for white space.
    """
    lines = prompt.rstrip().split("\n")
    signature = "".join(lines[-1].split())
    parts = block.split("\n")
    place = next((n for n, line in enumerate(parts) if "".join(line.split()) == signature), None)
    if place is None:
        return None
    there = {line.strip() for line in parts[:place]}
    lacking = [line for line in lines[:-1] if line.strip() not in there and not _is_comment(line)]
    start = "\n".join([*lacking, *parts[: place + 1], ""])
    return start, "\n".join(parts[place + 1 :])


def _is_comment(line: str) -> bool:
    """Whether a line of a prompt is empty or a comment in one of the languages. Rust's and C's directives are none."""
    text = line.strip()
    return not text or (text.startswith(_COMMENTS) and not text.startswith(("#include", "#[", "#!")))


TASKS: tuple[ProgramTask, ...] = tuple(
    MultiPLE(benchmark, language, suffix, **settings)
    for suffix, settings in (
        ("", {}),
        ("_instruct", {"chat": True}),
        ("_sampled", {"sampling": _PAPER}),
    )
    for benchmark in ("humaneval", "mbpp")
    for language in _ROWS
    # Other forms for what can be tested only.
    if not suffix or (_ROWS[language].sandbox and not _ROWS[language].absent)
)
