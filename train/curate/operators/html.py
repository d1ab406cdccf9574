"""The main text of HTML pages, by resiliparse."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import weakref

import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.operator import REASON, Compute, Operator
from train.curate.operators import page as page_program
from train.data.documents import optional_library

# Parsing takes a time that grows with the square of some things, such as attributes of one element or options of one
# list. In a page of this size it ends within a second.
_SMALL = 65_536
# The most memory seen is 50 times the size of a page; the libraries take 200 MB of address space.
_MEMORY, _MEMORY_PER_BYTE = 1 << 30, 200


@dataclasses.dataclass(frozen=True)
class ExtractText(Operator):
    """The text of a page: paragraphs, headings, lists and code, without navigation, advertisements and forms.

    A document without a page keeps the text that it has. A page that gives no text gets null and a reason: "larger
    than N bytes", "not HTML", "elements are nested too deeply", "takes longer than N s", "needs too much memory", "no
    text in the page".

    The encoding is that of the byte order mark; else UTF-8 if the page is valid UTF-8, whatever it declares; else what
    it declares, if the page is valid in it; else the most likely one. Zero bytes are dropped.

    A page above 64 kB is parsed in a process of its own, under limits of processor time and memory: a hostile page
    ends only that process. The limit of time is the only reason for which results may depend on the machine.

    Attributes:
      main_content: whether to leave out what is not the main content, by resiliparse's rules.
      title: whether the text begins with the title of the page and an empty line.
      max_bytes: of a page.
      max_seconds: of processor time for a page, rounded up to the next second of the process.
    """

    main_content: bool = True
    title: bool = False
    max_bytes: int = 4_000_000
    max_seconds: int = 5

    reads = ("html", "text")
    makes = pa.schema([pa.field("text", pa.large_string()), pa.field(REASON, pa.string())])

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_seconds < 1:
            raise InputError(
                f"max_bytes and max_seconds must be at least 1, got {self.max_bytes} and {self.max_seconds}."
            )

    def start(self) -> Compute:
        optional_library("resiliparse", "HTML pages")
        here = page_program.extractor(self.main_content, self.title)
        apart = _Process(self)

        def compute(table: pa.Table) -> pa.Table:
            pages, given = table["html"], table["text"].to_pylist()
            texts: list[str | None] = []
            reasons: list[str | None] = []
            for row, size in enumerate(pc.binary_length(pages).to_pylist()):
                text: str | None
                reason: str | None
                if size is None:
                    text, reason = given[row], None if given[row] is not None else "neither page nor text"
                elif size > self.max_bytes:  # It is never copied.
                    text, reason = None, f"larger than {self.max_bytes} bytes"
                else:
                    text, reason = (here if size <= _SMALL else apart.extract)(pages[row].as_py())
                texts.append(text)
                reasons.append(reason)
            return pa.table([texts, reasons], schema=self.makes)

        return compute


class _Process:
    """Extracts in a process of its own, which is started when a page needs it and after a page has ended it."""

    def __init__(self, operator: ExtractText):
        self._operator = operator
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], _Process] | None = None

    def extract(self, page: bytes) -> tuple[str | None, str | None]:
        if self._process is None:
            self._process = self._started()
            self._stop = weakref.finalize(self, _end, self._process)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            page_program.write_message(process.stdin, page)
            answer = page_program.read_message(process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is not None:
            text, reason = json.loads(answer)
            return text, reason
        assert self._stop is not None
        self._stop()
        self._process = None
        if process.returncode == -signal.SIGXCPU:
            return None, f"takes longer than {self._operator.max_seconds} s"
        return None, "needs too much memory"

    def _started(self) -> subprocess.Popen[bytes]:
        operator = self._operator
        settings = {
            "main_content": operator.main_content,
            "title": operator.title,
            "seconds": operator.max_seconds,
            "memory": _MEMORY + _MEMORY_PER_BYTE * operator.max_bytes,
        }
        # -P: the folder of the program has modules with names of the standard library.
        command = [sys.executable, "-P", page_program.__file__, json.dumps(settings)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # Something of the last page may be left to write.
        process.stdin.close()
    process.stdout.close()
    process.wait()
