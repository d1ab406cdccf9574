"""What was paid for is kept: answers and verdicts by their content, in one SQLite file that survives a kill."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.synthesize.generator import Answer, Generator, Request

# Another program may look at the file meanwhile.
_LOCKED_SECONDS = 30.0


class Seen:
    """Names that came before, on disk: the memory does not grow with them. Only one thread uses it."""

    def __init__(self) -> None:
        # A file without a name, in the folder for temporary files; the system removes it.
        # The collector of garbage may close it in another thread, where a run has ended early.
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._file.execute("PRAGMA journal_mode=OFF")
        self._file.execute("CREATE TABLE seen (name TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, name: str) -> bool:
        """Adds a name; whether it is new.

        Raises:
          InputError: there is no room for it.
        """
        try:
            return self._file.execute("INSERT OR IGNORE INTO seen VALUES (?)", (name,)).rowcount == 1
        except sqlite3.Error as error:
            raise InputError(f"Cannot write temporary files: {error}. Make room there, or set TMPDIR.") from None

    def close(self) -> None:
        """Closes the file, which is then gone."""
        self._file.close()


class Store:
    """Answers of models and verdicts of checks, by the hash of what they answer. Only one thread uses it.

    A record is in the file once `add_answer` or `add_verdict` returns: a process that is killed loses none. (A machine
    that loses power may lose the last ones.)
    """

    def __init__(self, path: Path):
        """
        Args:
          path: of the file; it is made if need be.

        Raises:
          InputError: the file cannot be used. All methods raise it once the file cannot be used any more.
        """
        self._path = path
        with self._usable():
            self._file = sqlite3.connect(path, timeout=_LOCKED_SECONDS, isolation_level=None)
        try:
            with self._usable():
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, value TEXT,"
                    " prompt_tokens INTEGER, tokens INTEGER) WITHOUT ROWID"
                )
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID"
                )
                # The file of another program is recognised before anything is paid for.
                self._file.execute("SELECT key, model, value, prompt_tokens, tokens FROM answers LIMIT 1").fetchone()
                self._file.execute("SELECT key, value FROM verdicts LIMIT 1").fetchone()
        except InputError:
            self._file.close()
            raise

    def answer(self, key: str) -> Answer | None:
        """The answer to a request, or None if it has not been answered yet."""
        found = self._first("SELECT value FROM answers WHERE key = ?", key)
        return None if found is None else Answer(**json.loads(found[0]))

    def add_answer(self, key: str, model: str, answer: Answer) -> None:
        """Keeps the answer to a request."""
        row = (key, model, to_json(answer.to_json()), answer.prompt_tokens, answer.tokens)
        self._insert("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", *row)

    def drop_refused(self) -> int:
        """Forgets the answers that are refusals, so that they are asked for again; returns how many there were."""
        with self._usable():
            return self._file.execute("DELETE FROM answers WHERE json_extract(value, '$.refused') IS NOT NULL").rowcount

    def verdict(self, key: str) -> tuple[Any] | None:
        """The verdict of a check, a JSON value, in a tuple; or None if there is none yet."""
        found = self._first("SELECT value FROM verdicts WHERE key = ?", key)
        return None if found is None else (json.loads(found[0]),)

    def add_verdict(self, key: str, value: Any) -> None:
        """Keeps the verdict of a check."""
        self._insert("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", key, to_json(value))

    def spent(self) -> dict[str, tuple[int, int, int]]:
        """By model: requests that were answered, tokens of their prompts, and tokens of their answers."""
        sums = "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(tokens) FROM answers GROUP BY model ORDER BY model"
        with self._usable():
            return {model: (count, prompt, tokens) for model, count, prompt, tokens in self._file.execute(sums)}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _first(self, query: str, *values: object) -> Any:
        """The first row of a query, or None."""
        try:
            return self._file.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise self._fault(error) from None

    def _insert(self, query: str, *values: object) -> None:
        try:
            self._file.execute(query, values)
        except sqlite3.Error as error:
            raise self._fault(error) from None

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Raises InputError where the file is damaged, locked, or on a full disk."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._fault(error) from None

    def _fault(self, error: sqlite3.Error) -> InputError:
        return InputError(
            f"{self._path} cannot be used: {error}. Make room if the disk is full, end what else has it open, or "
            "give another output folder if the file is damaged or another program's. Then run the command again."
        )


class KeptGenerator:
    """A `Generator` whose answers are kept: what a model has answered, and not refused, is not asked again."""

    def __init__(self, generator: Generator, store: Store):
        """
        Args:
          generator: that answers.
          store: of answers; it stays open.
        """
        self.model, self.concurrency = generator.model, generator.concurrency
        self._generator, self._store = generator, store

    async def ask(self, request: Request) -> Answer:
        """See `Generator.ask`."""
        key = request.key(self.model)
        if (answer := self._store.answer(key)) is None:
            answer = await self._generator.ask(request)
            if answer.refused is None:
                self._store.add_answer(key, self.model, answer)
        return answer

    async def close(self) -> None:
        """Closes the generator."""
        await self._generator.close()
