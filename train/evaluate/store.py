"""Responses that are kept: what a model or a judge was asked once is never asked again."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.evaluate.task import Model, Request, Response
from train.files import append_record, read_records, write_file


class Store:
    """Answers requests by a model, each once, and keeps the responses in a file.

    Attributes:
      asked: how many requests the model was asked in this process.
    """

    def __init__(self, model: Model, path: Path | None):
        """
        Args:
          model: answers what is not known yet.
          path: of the file; None to keep responses in memory alone.
        """
        self._model, self._path, self.asked = model, path, 0
        self._salt = hashlib.sha256(to_json(dict(model.identity())).encode()).hexdigest()
        self._known: dict[str, Response] = {}
        if path is not None and path.exists():
            names = {field.name for field in dataclasses.fields(Response)}
            for record in read_records(path, "key"):
                key = record.pop("key")
                # A record of another form is not known: its request is asked again.
                if isinstance(key, str) and set(record) == names:
                    self._known[key] = Response(**record)

    def __call__(self, requests: Sequence[Request], answered: Callable[[], None] = lambda: None) -> list[Response]:
        """The responses, in order. Equal requests are asked once, and those without an answer again in a later run.

        Args:
          requests: of any kinds.
          answered: called for each request as soon as its response is there.

        Raises:
          RuntimeError: the model has left a request without a response.
        """
        keys = [self._key(request) for request in requests]
        wanted = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        new = list(wanted)
        count = Counter(keys)
        for _ in range(len(keys) - sum(count[key] for key in new)):
            answered()

        def done(i: int, response: Response) -> None:
            self._known[new[i]] = response
            self.asked += 1
            if self._path is not None and response.error is None:
                append_record(self._path, self._record(new[i]))
            for _ in range(count[new[i]]):
                answered()

        if new:
            self._model.answer(list(wanted.values()), done)
        if missing := [key for key in new if key not in self._known]:
            raise RuntimeError(f"{self._model.name} left {len(missing)} of {len(new)} requests without a response.")
        return [self._known[key] for key in keys]

    def finish(self) -> None:
        """Sorts the file by key, so that it does not depend on the order in which responses came."""
        if self._path is not None:
            lines = [to_json(self._record(key)) for key, found in sorted(self._known.items()) if found.error is None]
            write_file(self._path, "".join(line + "\n" for line in lines).encode())

    def known(self, request: Request) -> Response | None:
        """The response to a request that was asked already, or None."""
        return self._known.get(self._key(request))

    def _record(self, key: str) -> dict[str, object]:
        return {"key": key, **dataclasses.asdict(self._known[key])}

    def _key(self, request: Request) -> str:
        text = json.dumps([self._salt, type(request).__name__, vars(request)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class KeptJudge:
    """A `Model` that judges. Its responses are kept, and it may be down.

    Once it gives no answers, its responses have an error that says so, so that items without a verdict are counted
    apart. It is not waited for a second time.

    Attributes:
      name, context_length: of the judge.
    """

    def __init__(self, judge: Model, path: Path | None):
        """
        Args:
          judge: answers what is not known yet.
          path: of the file; None to keep responses in memory alone.
        """
        self.name, self.context_length = judge.name, judge.context_length
        self._judge, self._store = judge, Store(judge, path)
        self._down: str | None = None

    def identity(self) -> Mapping[str, Any]:
        """See `Model.identity`."""
        return self._judge.identity()

    def answer(self, requests: Sequence[Request], done: Callable[[int, Response], None]) -> None:
        """See `Model.answer`."""
        if self._down is None:
            try:
                self._store(requests)
            except InputError as error:
                self._down = f"the judge {self.name} gives no answers: {error}"
        for i, request in enumerate(requests):
            done(i, self._store.known(request) or Response(error=self._down))

    def finish(self) -> None:
        """See `Store.finish`."""
        self._store.finish()
