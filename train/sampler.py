"""Rollouts: the texts that a policy generates for the prompts of a step, with the engine that serves models.

A rollout depends on the weights, its prompt, and the seed of its prompt's number, the version of the weights and its
place in the group; never on what is sampled beside it, in which order, or in how many calls. So an interrupted step
samples the same texts again.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine, Ending, Request, SamplingParams
from qwen_jax.inference.outputs import Finished
from qwen_jax.inference.stream import Stream
from qwen_jax.tokenizer import Tokenizer
from train.data.rollouts import Rollout
from train.environments import Environment, Observation, ToolUnavailableError, observation_ids
from train.fields import at_least

# Threads that run an environment: tools wait for other processes most of the time.
_WORKERS = 32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are sampled: always from the whole distribution, without top-k, top-p or penalties.

    A filter would change the distribution that tokens are drawn from, and the ratio of policies would be wrong.

    Attributes:
      group_size: rollouts of each prompt.
      max_new_tokens: tokens that may follow a prompt, those of tools included.
      temperature: divides the logits before the softmax. Log-probabilities of rollouts are those at this temperature;
        the trainer must use the same.
      seed: of all random numbers.

    Raises:
      InputError: a value out of range.
    """

    group_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, group_size=1, max_new_tokens=1, seed=0)
        if not 1e-5 <= self.temperature <= 1e5:
            raise InputError(
                f"temperature must be in [1e-5, 1e5], got {self.temperature}. Greedy texts (temperature 0) have no "
                "distribution to learn from; 1 samples from the policy itself."
            )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What rollouts begin with.

    Attributes:
      number: of the prompt, such as its row in a file; together with the seed it determines the random numbers.
      ids: token ids, at least one, up to where the policy goes on.
      text_or_messages: the same as a user wrote it, for rewards and environments.
      columns: further columns of its row.
    """

    number: int
    ids: Sequence[int]
    text_or_messages: str | Sequence[Mapping[str, Any]] = ""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sample(Rollout):
    """A rollout, and what rewards and tables need of it.

    Attributes:
      prompt_length: tokens of the prompt.
      text: of the policy's last turn, without special tokens; None if the engine has no tokenizer.
      turns: of the policy.
      failure: why the environment failed, which is not the policy's fault: such a rollout must get no reward. None if
        it did not.
      earlier: the turns before the last one and what the environment answered, as text with special tokens.
    """

    prompt_length: int
    text: str | None
    turns: int = 1
    failure: str | None = None
    earlier: str = ""


@dataclasses.dataclass(frozen=True)
class SampleCounts:
    """Counts of one call of `Sampler.sample`.

    Attributes:
      rollouts: all of them.
      unfinished: cut by a length.
      failed: whose environment failed.
      empty: whose last turn has no text, such as one of padding or of the end id alone; 0 without a tokenizer.
      sampled_tokens, other_tokens: sampled by the policy, and added by the environment.
      cached_tokens: of prompts and earlier turns, found in the prefix cache.
      preemptions: how often the engine lacked pages, and a text was read again.
      seconds: that it took.
    """

    rollouts: int = 0
    unfinished: int = 0
    failed: int = 0
    empty: int = 0
    sampled_tokens: int = 0
    other_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class _Conversation:
    """A rollout on its way."""

    prompt: Prompt
    place: tuple[int, int]
    """Of the prompt among the prompts, and of the rollout in its group."""
    ids: list[int]
    state: Any = None
    stream: Stream | None = None
    trained: list[bool] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    turns: int = 0
    text: str | None = None
    finished: bool = False
    failure: str | None = None
    turn_begin: int = 0
    """Where the last turn begins among `ids`."""
    cached_tokens: int = 0

    def sample(self, version: int, tokenizer: Tokenizer | None) -> Sample:
        earlier = self.ids[len(self.prompt.ids) : self.turn_begin]
        return Sample(
            ids=self.ids,
            trained=np.asarray(self.trained, bool),
            log_probs=np.asarray(self.log_probs, np.float32),
            finished=self.finished,
            version=version,
            prompt_length=len(self.prompt.ids),
            text=self.text,
            turns=self.turns,
            failure=self.failure,
            earlier="" if tokenizer is None or not earlier else tokenizer.decode(earlier),
        )

    def add(self, ids: Sequence[int], log_probs: Sequence[float] | None) -> None:
        """Appends tokens: of the policy with their log-probabilities, others with None."""
        self.ids += ids
        self.trained += [log_probs is not None] * len(ids)
        self.log_probs += [0.0] * len(ids) if log_probs is None else log_probs


# A conversation whose turn has ended, or with what its environment answers.
_Event = tuple[_Conversation, "concurrent.futures.Future[Observation | None] | None"]


class Sampler:
    """Generates groups of rollouts. Tokens are kept as they were sampled, over all turns.

    Args:
      engine: or several that are replicas of one another; prompts are dealt out to them.
      config: how to sample.
      environment: answers the policy's turns; None for rollouts of one turn.

    Attributes:
      counts: of the last call of `sample`.

    Raises:
      InputError: engines of different models or end ids, or an environment with an engine that has no tokenizer.
    """

    def __init__(
        self,
        engine: ContinuousEngine | Sequence[ContinuousEngine],
        config: SamplingConfig,
        environment: Environment | None = None,
    ) -> None:
        self._engines = [engine] if isinstance(engine, ContinuousEngine) else list(engine)
        self.config, self.environment, self.counts = config, environment, SampleCounts()
        if not self._engines:
            raise InputError("Expected at least one engine to sample with, got none.")
        kinds = {(other.config, other.eos_token_ids, other.dtype, other.max_length) for other in self._engines}
        if len(kinds) > 1:
            raise InputError("Engines must have the same model, end ids, dtype and max_length; these differ.")
        if environment is not None and any(other.tokenizer is None for other in self._engines):
            raise InputError("An environment reads texts: make the engine with a tokenizer.")

    def sample(
        self, prompts: Sequence[Prompt], version: int, on_done: Callable[[int, int], None] | None = None
    ) -> list[list[Sample]]:
        """Samples a group of rollouts for each prompt.

        Args:
          prompts: whose numbers differ.
          version: of the weights that the engine has: optimiser steps taken.
          on_done: called after each rollout with how many are done, and how many there are.

        Returns:
          The groups, in the order of the prompts.

        Raises:
          InputError: before anything is sampled, for prompts of one number, and for a prompt that is empty, has ids out
            of range, or is too long for the engine together with `max_new_tokens`; later, for logits that are not
            finite, and for an environment that raises.
          RuntimeError: the engine has stopped.
        """
        begin, preemptions = time.perf_counter(), self._preemptions()
        self._check(prompts)
        conversations = [
            _Conversation(prompt, (query, member), list(prompt.ids), trained=[False] * len(prompt.ids))
            for query, prompt in enumerate(prompts)
            for member in range(self.config.group_size)
        ]
        for conversation in conversations:
            conversation.log_probs = [0.0] * len(conversation.ids)
        self._run(conversations, version, on_done)
        samples = [conversation.sample(version, self._engines[0].tokenizer) for conversation in conversations]
        self.counts = SampleCounts(
            rollouts=len(samples),
            unfinished=sum(not s.finished and s.failure is None for s in samples),
            failed=sum(s.failure is not None for s in samples),
            empty=sum(s.text is not None and not s.text.strip() for s in samples),
            sampled_tokens=sum(int(s.trained.sum()) for s in samples),
            other_tokens=sum(len(s.ids) - s.prompt_length - int(s.trained.sum()) for s in samples),
            cached_tokens=sum(c.cached_tokens for c in conversations),
            preemptions=self._preemptions() - preemptions,
            seconds=time.perf_counter() - begin,
        )
        size = self.config.group_size
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _preemptions(self) -> int:
        return sum(engine.stats().preemptions for engine in self._engines)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Raises InputError if a prompt cannot be sampled, before anything is."""
        numbers = [prompt.number for prompt in prompts]
        if len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise InputError(f"Prompt {twice} is there twice: its rollouts would be the same. Give each prompt once.")
        engine, new = self._engines[0], self.config.max_new_tokens
        for prompt in prompts:
            try:
                if len(prompt.ids) + new > engine.max_length:
                    raise InputError(
                        f"{len(prompt.ids)} tokens and max_new_tokens={new} exceed the {engine.max_length} tokens that "
                        "a text of this engine may have. Leave it out, lower max_new_tokens, or make the engine with a "
                        "larger max_length."
                    )
                for other in self._engines:
                    other.check(self._request(prompt.ids, new, 0))
            except InputError as error:
                raise InputError(f"Prompt {prompt.number}: {error}") from None

    def _request(self, ids: Sequence[int], new: int, seed: int, continues: bool = False) -> Request:
        temperature = self.config.temperature
        return Request(
            tuple(ids),
            Ending(frozenset(self._engines[0].eos_token_ids), (), new),
            SamplingParams(temperature=temperature, seed=seed),
            logprob_temperature=temperature,
            continues=continues,
        )

    def _run(
        self, conversations: Sequence[_Conversation], version: int, on_done: Callable[[int, int], None] | None
    ) -> None:
        """Carries conversations to their ends: a turn of each is with the engine, or its answer with a thread."""
        events = queue.SimpleQueue[_Event]()
        waiting, done = len(conversations), 0
        tools = concurrent.futures.ThreadPoolExecutor(_WORKERS, "environment")
        try:
            for conversation in conversations:
                if self.environment is not None:
                    with _environment_of(conversation):
                        conversation.state = self.environment.reset(conversation.prompt)
                self._start_turn(conversation, version, events)
            while waiting:
                conversation, answer = events.get()
                if answer is None:
                    goes_on = self._end_turn(conversation, tools, events)
                else:
                    goes_on = self._take_answer(conversation, answer, version, events)
                if not goes_on:
                    waiting, done = waiting - 1, done + 1
                    if on_done is not None:
                        on_done(done, len(conversations))
        finally:
            # After an error or an interruption nothing must go on.
            for conversation in conversations:
                if conversation.stream is not None:
                    conversation.stream.cancel()
            tools.shutdown(wait=waiting == 0, cancel_futures=True)

    def _start_turn(self, conversation: _Conversation, version: int, events: "queue.SimpleQueue[_Event]") -> None:
        query, member = conversation.place
        used = len(conversation.ids) - len(conversation.prompt.ids)
        seed = turn_seed(self.config.seed, conversation.prompt.number, version, member, conversation.turns)
        # A later turn starts before prompts that wait, while what it continues is still in the prefix cache.
        request = self._request(conversation.ids, self.config.max_new_tokens - used, seed, conversation.turns > 0)
        conversation.stream = self._engines[query % len(self._engines)].submit(request, incremental=False)
        conversation.stream.when_ended(lambda: events.put((conversation, None)))

    def _end_turn(
        self,
        conversation: _Conversation,
        tools: concurrent.futures.Executor,
        events: "queue.SimpleQueue[_Event]",
    ) -> bool:
        """Takes the tokens of a turn; returns whether an answer of the environment is to come."""
        assert conversation.stream is not None
        found: Finished = conversation.stream.result()
        _, member = conversation.place
        if found.finish_reason == "error":
            raise InputError(f"Prompt {conversation.prompt.number}, rollout {member}: {found.error}")
        if found.finish_reason == "abort":
            raise RuntimeError("The engine was closed while it sampled.")
        conversation.turn_begin = len(conversation.ids)
        conversation.add(found.token_ids, [token.logprob for token in found.tokens])
        conversation.turns += 1
        conversation.text = found.text
        conversation.cached_tokens += found.cached_tokens
        conversation.finished = found.finish_reason == "stop"
        if self.environment is None or not conversation.finished:
            return False
        answer = tools.submit(self.environment.step, conversation.state, found.text or "", found.token_ids)
        answer.add_done_callback(lambda answer: events.put((conversation, answer)))
        return True

    def _take_answer(
        self,
        conversation: _Conversation,
        answer: "concurrent.futures.Future[Observation | None]",
        version: int,
        events: "queue.SimpleQueue[_Event]",
    ) -> bool:
        """Takes what the environment answers; returns whether another turn has begun."""
        with _environment_of(conversation):
            try:
                observation = answer.result()
            except ToolUnavailableError as failure:
                conversation.finished, conversation.failure = False, str(failure)
                return False
            if observation is None:
                return False
        if not isinstance(observation, Observation):
            raise InputError(
                f"Prompt {conversation.prompt.number}: `step` of the environment returned {observation!r:.200}; "
                "expected an Observation, or None for the end."
            )
        tokenizer = self._engines[0].tokenizer
        assert tokenizer is not None
        ids = observation_ids(tokenizer, observation, conversation.ids[-1])
        # Without room for the answer and a token after it, the conversation is cut here.
        if len(conversation.ids) + len(ids) - len(conversation.prompt.ids) >= self.config.max_new_tokens:
            conversation.finished = False
            return False
        conversation.add(ids, None)
        self._start_turn(conversation, version, events)
        return True


@contextlib.contextmanager
def _environment_of(conversation: _Conversation) -> Iterator[None]:
    """What a user's environment raises becomes an InputError, for which a run saves its state."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        raise InputError(
            f"Prompt {conversation.prompt.number}: the environment raised {type(error).__name__} ({where}): {error}. "
            "Correct it; its `step` may raise ToolUnavailableError for a rollout that must get no reward."
        ) from error


def turn_seed(seed: int, number: int, version: int, member: int, turn: int) -> int:
    """The seed of one turn of a rollout, in [0, 2**32). Members of a group never share one.

    Args:
      seed: of the run.
      number: of the prompt.
      version: of the weights.
      member: place in the group.
      turn: counted from 0.
    """
    digest = hashlib.blake2b(f"{seed} {number} {version} {turn}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + member) % 2**32
