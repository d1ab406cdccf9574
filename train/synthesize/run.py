"""Runs a pipeline: part by part, many items at a time, resumable at any moment without paying twice."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import qwen_jax
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.files import write_file
from train.lock import lock
from train.synthesize.context import Context, Services, StoppedError, all_of
from train.synthesize.faults import failure, made_of, not_read, not_written
from train.synthesize.generator import Answer, Generator, GeneratorDownError
from train.synthesize.item import Item, Rejected, content_key
from train.synthesize.outputs import EARLIER, Written, set_aside, write_outputs
from train.synthesize.parts import Counts, Lost, Parts
from train.synthesize.pipeline import Pipeline, Stage, Together, is_output_name
from train.synthesize.progress import SynthesisProgress
from train.synthesize.report import to_html
from train.synthesize.store import Seen, Store
from train.synthesize.threads import DaemonThreads

ANSWERS, PARTS, SUMMARY, REPORT = "answers.sqlite", "parts", "summary.json", "report.html"
# A check is refused once it was wrong in more than this share of at least so many known cases.
_MOST_WRONG, _LEAST_AUDITS = 0.1, 20
# A model that answers none of its first requests will answer none of the others.
_MOST_REFUSED = 50


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a pipeline is run. No option changes the items that it makes.

    Attributes:
      part_items: number of items in a part. A part that a kill interrupted is done again; answers of models are kept.
      parts_at_once: number of parts in progress at the same time.
      workers: number of checks that run at the same time.
      max_tokens: limit on the tokens of prompts and answers together, over all runs of the folder; None is no limit.
      max_cost: limit on the cost over all runs of the folder, in the unit of the generators' prices.
      retry_refused: ask again where models refused in earlier runs of the folder.

    Raises:
      InputError: a value out of range.
    """

    part_items: int = 128
    parts_at_once: int = 4
    workers: int = min(8, os.cpu_count() or 1)
    max_tokens: int | None = None
    max_cost: float | None = None
    retry_refused: bool = False

    def __post_init__(self) -> None:
        for name in ("part_items", "parts_at_once", "workers", "max_tokens", "max_cost"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0, got {value}.")


def run(
    pipeline: Pipeline,
    generators: Mapping[str, Generator],
    folder: Path,
    options: RunOptions | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Makes the data of a pipeline. A folder in which it was begun is gone on with.

    Args:
      pipeline: what is made.
      generators: by the names of `pipeline.models`; all are closed at the end.
      folder: gets outputs, report, summary, and what is needed to go on.
      options: how it is run.
      console: shows progress; by default nothing is shown.

    Returns:
      The summary, which is also written: counts, yields, verdicts, tokens and cost. "retries" counts the requests that
      this run sent again, by model and reason. "stopped_by" is the signal that ended the run early, or 0. Examples that
      the run did not write itself are moved into the folder "earlier".

    Raises:
      InputError: a generator is down, the budget is used up, a stage fails, or a check is wrong too often. The report
        is written, and the same command goes on from there.
      KeyboardInterrupt: a second Ctrl-C.
    """
    if missing := sorted(set(pipeline.models) - set(generators)):
        raise InputError(f"The pipeline {pipeline.name} asks the model {missing[0]}, which was not given.")
    options = options or RunOptions()
    if options.max_cost is not None and not any(getattr(generators[name], "prices", None) for name in pipeline.models):
        raise InputError("max_cost is given, but no price: costs would stay 0. Give the price of a model (--price).")
    with lock(folder):
        store, hurry = Store(folder / ANSWERS), False
        try:
            return asyncio.run(_Run(pipeline, generators, folder, store, options, console).run())
        except asyncio.CancelledError:
            hurry = True
            raise KeyboardInterrupt from None
        finally:
            store.close()
            # What hangs is not waited for after a second Ctrl-C.
            if not hurry:
                pipeline.close()


class _Run:
    """A run of a pipeline: what is counted, and whether it goes on."""

    def __init__(
        self,
        pipeline: Pipeline,
        generators: Mapping[str, Generator],
        folder: Path,
        store: Store,
        options: RunOptions,
        console: Console | None,
    ):
        self._pipeline, self._folder, self._store, self._options = pipeline, folder, store, options
        self._console = console
        self._generators = {name: generators[name] for name in pipeline.models}
        self._prices = {g.model: getattr(g, "prices", None) or (0.0, 0.0) for g in generators.values()}
        spent = store.spent()
        self._spent_tokens = sum(prompt + tokens for _, prompt, tokens in spent.values())
        self._spent_cost = sum(self._cost(model, prompt, tokens) for model, (_, prompt, tokens) in spent.items())
        self._asked, self._stopped_by, self._refused, self._repeated = 0, 0, Counter[str](), 0
        if options.retry_refused and store.drop_refused():
            # Nobody knows which parts lack an answer: all are made again, with the answers that are kept.
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        self._fault: Exception | None = None
        self._audits = Counts()

    async def run(self) -> dict[str, Any]:
        """Runs all stages, writes outputs, summary and report, and raises what ended the run early."""
        began = time.monotonic()
        segments, counts, written = list(_segments(self._pipeline.stages)), Counts(), list[Written]()
        threads = DaemonThreads(self._options.workers, "check")
        services = Services(
            self._generators,
            self._store,
            threads,
            self._options.workers,
            self._pipeline.seed,
            self._may_go_on,
            self._may_ask,
            self._count,
        )
        with SynthesisProgress(self._console, len(segments), self._retries) as self._progress, self._signals():
            try:
                items, inputs = self._distinct(self._pipeline.source()), "source"
                for number, stages in enumerate(segments):
                    self._progress.begin(stages)
                    parts = Parts(self._folder / PARTS / f"{number:02d}")
                    first = stages[0]
                    if isinstance(first, Together):
                        done = await self._together(first, parts, items, inputs, counts)
                    else:
                        done = await self._apart(
                            [s for s in stages if isinstance(s, Stage)], parts, items, services, counts
                        )
                    if self._fault is not None or self._stopped_by:
                        break
                    parts.drop_after(done)
                    items = parts.items(done)
                    inputs = content_key([parts.signature(i) for i in range(done)])
                else:
                    written = write_outputs(self._pipeline, items, self._folder, self._versions())
            except (InputError, GeneratorDownError) as error:
                self._fault = self._fault or error
            except OSError as error:
                self._fault = self._fault or not_written(self._folder, error)
            finally:
                threads.shutdown(wait=False)
                for generator in {id(g): g for g in self._generators.values()}.values():
                    await generator.close()
        summary = self._summary(counts, written, time.monotonic() - began)
        try:
            self._set_aside(written)
            write_file(self._folder / SUMMARY, to_json(summary, indent=1).encode())
            write_file(self._folder / REPORT, to_html(summary).encode("utf-8", "replace"))
        except OSError as error:
            self._fault = self._fault or not_written(self._folder, error)
        if isinstance(self._fault, GeneratorDownError):
            raise InputError(
                f"{self._fault} What was answered is kept in {self._folder}: run the same command again to go on."
            )
        if self._fault is not None:
            raise self._fault
        return summary

    def _distinct(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items whose id did not come before: the others would be the same examples once more."""
        seen = Seen()
        try:
            for item in items:
                if seen.add(item.id):
                    yield item
                else:
                    self._repeated += 1
        finally:
            seen.close()

    async def _apart(
        self, stages: Sequence[Stage], parts: Parts, items: Iterator[Item], services: Services, counts: Counts
    ) -> int:
        """Brings all items through stages that look at one at a time; returns how many parts there are."""
        signature = content_key(
            self._pipeline.name,
            self._pipeline.seed,
            dict(self._pipeline.settings),
            {name: generator.model for name, generator in self._generators.items()},
            [(stage.name, stage.version) for stage in stages],
        )
        running: set[asyncio.Task[None]] = set()
        by_part: dict[int, Counts] = {}
        number = -1
        try:
            for number, batch in enumerate(_batches(items, self._options.part_items)):
                if len(running) >= self._options.parts_at_once:
                    ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                if self._fault is not None or self._stopped_by:
                    break
                part = self._part(number, batch, signature, stages, parts, services, by_part)
                running.add(asyncio.create_task(part))
                await asyncio.sleep(0)
        except (InputError, OSError) as error:
            # What the other parts have asked for is awaited.
            self._fault = self._fault or (error if isinstance(error, InputError) else not_read(error))
        await asyncio.gather(*running)
        for known in sorted(by_part):
            counts.add(by_part[known])
        return number + 1

    async def _part(
        self,
        number: int,
        items: Sequence[Item],
        signature: str,
        stages: Sequence[Stage],
        parts: Parts,
        services: Services,
        by_part: dict[int, Counts],
    ) -> None:
        """Makes one part, unless it is there."""
        signature = content_key(signature, [item.to_json() for item in items])
        counts = parts.done(number, signature)
        if counts is None:
            counts = Counts()
            try:
                outcomes = await all_of([self._through(item, stages, services, counts) for item in items])
            except (StoppedError, InputError, GeneratorDownError):
                return
            flat = [one for found in outcomes for one in found]
            lost = [one for one in flat if isinstance(one, Lost)]
            for one in lost:
                counts.lose(one)
            try:
                parts.write(number, signature, [one for one in flat if isinstance(one, Item)], lost, counts)
            except OSError as error:
                self._fault = self._fault or not_written(self._folder, error)
                return
        by_part[number] = counts
        self._audit(counts)
        self._progress.part(counts, stages[-1].name)

    async def _through(
        self, item: Item, stages: Sequence[Stage], services: Services, counts: Counts
    ) -> list[Item | Lost]:
        """What becomes of an item in stages, in the order of its parts."""
        for number, stage in enumerate(stages):
            self._may_go_on()
            context = Context(item, stage.name, services)
            try:
                made = made_of(stage.name, await stage.work(item, context), context.taken())
            except StoppedError:
                raise
            except (InputError, GeneratorDownError) as error:
                self._fault = self._fault or error
                raise
            except (Exception, SystemExit) as error:
                self._fault = self._fault or failure(stage.name, item, error)
                raise self._fault from error
            counts.entered[stage.name] += 1
            for audited in context.audits:
                counts.audit(*audited)
            if isinstance(made, Rejected):
                item = dataclasses.replace(item, steps=(*item.steps, *context.taken()))
                return [Lost(item, stage.name, made)]
            counts.left[stage.name] += len(made)
            if len(made) > 1:
                rest = stages[number + 1 :]
                found = await all_of([self._through(one, rest, services, counts) for one in made])
                return [outcome for outcomes in found for outcome in outcomes]
            item = made[0]
        return [item]

    async def _together(self, stage: Together, parts: Parts, items: Iterator[Item], inputs: str, counts: Counts) -> int:
        """Brings all items through a stage that looks at all of them; returns how many parts there are."""
        signature = content_key(
            self._pipeline.name, self._pipeline.seed, dict(self._pipeline.settings), stage.name, stage.version, inputs
        )
        # Parts that are there stay as they are, but the stage has to see all items again.
        number = -1
        for number, batch in enumerate(_batches(stage.work(items), self._options.part_items)):
            await asyncio.sleep(0)  # Signals come in between.
            if self._stopped_by:
                break
            here, kept, lost = Counts(), list[Item](), list[Lost]()
            here.entered[stage.name] = len(batch)
            for item, result in batch:
                made = made_of(stage.name, result, [])
                if isinstance(made, Rejected):
                    lost.append(Lost(item, stage.name, made))
                    here.lose(lost[-1])
                else:
                    kept.extend(made)
            here.left[stage.name] = len(kept)
            own = content_key(signature, number, [item.to_json() for item in kept])
            if parts.done(number, own) is None:
                parts.write(number, own, kept, lost, here)
            counts.add(here)
            self._progress.part(here, stage.name)
        return number + 1

    def _may_go_on(self) -> None:
        """Raises `StoppedError` once the run is to end."""
        if self._fault is not None or self._stopped_by:
            raise StoppedError

    def _may_ask(self) -> None:
        """The same, and once the budget is used up."""
        self._may_go_on()
        for spent, most, what in (
            (self._spent_tokens, self._options.max_tokens, "max-tokens"),
            (self._spent_cost, self._options.max_cost, "max-cost"),
        ):
            if most is not None and spent >= most:
                self._fault = InputError(
                    f"The budget is used up: {spent:,.6g} of --{what} {most:,.6g}. What was answered is kept in "
                    f"{self._folder}: run again with a larger budget to go on."
                )
                raise StoppedError

    def _count(self, generator: Generator, answer: Answer) -> None:
        self._asked += 1
        self._refused[generator.model] = 1 + self._refused[generator.model] if answer.refused is not None else -(10**9)
        if self._refused[generator.model] >= _MOST_REFUSED:
            self._fault = self._fault or InputError(
                f"{generator.model} has refused the first {_MOST_REFUSED} requests of this run: {answer.refused}. Mend "
                "that, and run again with --retry-refused: refusals are kept like other answers."
            )
        self._spent_tokens += answer.prompt_tokens + answer.tokens
        self._spent_cost += self._cost(generator.model, answer.prompt_tokens, answer.tokens)
        self._progress.answer(answer)

    def _cost(self, model: str, prompt_tokens: int, tokens: int) -> float:
        prompt_price, price = self._prices.get(model, (0.0, 0.0))
        return (prompt_tokens * prompt_price + tokens * price) / 1e6

    def _retries(self) -> dict[str, dict[str, int]]:
        """Requests that this run has sent again, by model and reason, for generators that count them."""
        found: dict[str, Counter[str]] = {}
        for generator in {id(g): g for g in self._generators.values()}.values():
            if (counts := getattr(generator, "counts", None)) and (again := counts()["retries"]):
                found.setdefault(generator.model, Counter()).update(again)
        return {model: dict(reasons.most_common()) for model, reasons in found.items()}

    def _audit(self, counts: Counts) -> None:
        """Ends the run where a check is wrong too often on answers that are known to be right or wrong."""
        self._audits.add(dataclasses.replace(counts, shown={}))
        for name, kinds in self._audits.audits.items():
            for kind, (count, passed) in kinds.items():
                wrong = passed if kind == "wrong" else count - passed
                if count >= _LEAST_AUDITS and wrong > _MOST_WRONG * count:
                    did = "passed" if kind == "wrong" else "rejected"
                    self._fault = self._fault or InputError(
                        f"The check {name} cannot be trusted: it {did} {wrong} of {count} answers that are known to be "
                        f"{kind}. Mend the check, change its name or version, and run again."
                    )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C: nothing more is asked; what was asked is awaited and kept. A second one ends at once."""
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        task = asyncio.current_task()
        assert task is not None

        def note(number: int) -> None:
            if self._stopped_by:
                task.cancel()
            self._stopped_by = number
            self._progress.say("Ending: waiting for answers that were asked for. Press Ctrl-C again to end at once.")

        added = []
        for number in numbers:
            with contextlib.suppress(ValueError, RuntimeError):  # Not in the main thread: whoever is there decides.
                loop.add_signal_handler(number, note, number)
                added.append(number)
        try:
            yield
        finally:
            for number in added:
                loop.remove_signal_handler(number)

    def _set_aside(self, written: Sequence[Written]) -> None:
        """Examples of an earlier run that this one has not written anew do not stay beside its summary."""
        try:
            earlier = [str(one["name"]) for one in json.loads((self._folder / SUMMARY).read_bytes())["outputs"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            earlier = []
        now = {one.name for one in written}
        known = [*earlier, *(output.name for output in self._pipeline.outputs)]
        # A name comes from a file: it must be one that a pipeline can have.
        if moved := set_aside(self._folder, [name for name in known if is_output_name(name) and name not in now]):
            self._progress.say(f"Examples of an earlier run are now in {self._folder / EARLIER}: {', '.join(moved)}.")

    def _versions(self) -> dict[str, Any]:
        return {"pipeline": self._pipeline.name, "seed": self._pipeline.seed, "qwen_jax": qwen_jax.__version__}

    def _summary(self, counts: Counts, written: Sequence[Written], seconds: float) -> dict[str, Any]:
        """The record of a run: strict JSON values."""
        spent = {
            model: {
                "requests": count,
                "prompt_tokens": prompt,
                "tokens": tokens,
                "cost": self._cost(model, prompt, tokens),
            }
            for model, (count, prompt, tokens) in self._store.spent().items()
        }
        return {
            **self._versions(),
            "settings": dict(self._pipeline.settings),
            "models": {name: generator.model for name, generator in self._generators.items()},
            "finished": bool(written),
            "stopped_by": 0 if written else self._stopped_by,
            "fault": None if self._fault is None else str(self._fault),
            "repeated": self._repeated,
            "stages": [
                {
                    "name": stage.name,
                    "in": counts.entered[stage.name],
                    "out": counts.left[stage.name],
                    "rejected": dict(counts.rejected.get(stage.name, Counter()).most_common()),
                    "shown": counts.shown.get(stage.name, {}),
                }
                for stage in self._pipeline.stages
            ],
            "audits": counts.audits,
            "outputs": [one.to_json() for one in written],
            "spent": spent,
            "retries": self._retries(),
            "measures": dict(self._pipeline.measures()),
            "asked_now": self._asked,
            "seconds": seconds,
        }


def _segments(stages: Sequence[Stage | Together]) -> Iterator[list[Stage | Together]]:
    """Neighbouring stages that look at one item at a time are done together; the others alone."""
    for together, group in itertools.groupby(stages, lambda stage: isinstance(stage, Together)):
        if together:
            yield from ([stage] for stage in group)
        else:
            yield list(group)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
