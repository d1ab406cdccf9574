"""What was paid for is kept: answers and verdicts by their content, in one SQLite file that survives a kill."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.synthesize.generator import Answer


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
          InputError: the file cannot be used.
        """
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, value TEXT,"
                " prompt_tokens INTEGER, tokens INTEGER) WITHOUT ROWID"
            )
            self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise InputError(f"{path} cannot be used: {error}. Give another output folder.") from None

    def answer(self, key: str) -> Answer | None:
        """The answer to a request, or None if it has not been answered yet."""
        found = self._file.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if found is None else Answer(**json.loads(found[0]))

    def add_answer(self, key: str, model: str, answer: Answer) -> None:
        """Keeps the answer to a request."""
        row = (key, model, to_json(answer.to_json()), answer.prompt_tokens, answer.tokens)
        self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def drop_refused(self) -> int:
        """Forgets the answers that are refusals, so that they are asked for again; returns how many there were."""
        return self._file.execute("DELETE FROM answers WHERE json_extract(value, '$.refused') IS NOT NULL").rowcount

    def verdict(self, key: str) -> tuple[Any] | None:
        """The verdict of a check, a JSON value, in a tuple; or None if there is none yet."""
        found = self._file.execute("SELECT value FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if found is None else (json.loads(found[0]),)

    def add_verdict(self, key: str, value: Any) -> None:
        """Keeps the verdict of a check."""
        self._file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, to_json(value)))

    def spent(self) -> dict[str, tuple[int, int, int]]:
        """By model: requests that were answered, tokens of their prompts, and tokens of their answers."""
        sums = "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(tokens) FROM answers GROUP BY model ORDER BY model"
        return {model: (count, prompt, tokens) for model, count, prompt, tokens in self._file.execute(sums)}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
