"""A checkpoint in this process that answers requests on token ids as lm-eval's `hf` backend does."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine, SamplingParams
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.likelihood import Likelihood, LikelihoodScorer
from qwen_jax.inference.request import Request as EngineRequest
from qwen_jax.parallel.broadcast import Exchange, Message
from train.evaluate.encoding import RequestEncoder
from train.evaluate.task import Generate, Loglikelihood, Request, Response, Rolling

Done = Callable[[int, Response], None]
# Requests whose ids are in memory at one time.
_PART = 50_000


class TokenModel:
    """A `train.evaluate.task.Model`: log-likelihoods in packed rows, texts by an engine.

    Contexts and prompts that are too long lose their first tokens; `Response.prompt_cut` says so.

    Attributes:
      name: for reports.
      context_length: tokens that the model reads.
      encoder: makes the ids.
    """

    context_length: int | None

    def __init__(
        self,
        name: str,
        encoder: RequestEncoder,
        scorer: LikelihoodScorer | None,
        engine: ContinuousEngine | None,
        identity: Mapping[str, Any] | None = None,
        exchange: Exchange | None = None,
    ):
        """
        Args:
          name: for reports.
          encoder: with the model's tokenizer and context.
          scorer: answers `Loglikelihood` and `Rolling`; None if there are none.
          engine: answers `Generate`; None if there are none.
          identity: what decides the answers besides the requests.
          exchange: with it, all processes are asked the same, and each has an engine, which generates a share of the
            texts.
        """
        self.name, self.encoder = name, encoder
        self.context_length: int | None = encoder.context_length
        self._scorer, self._engine, self._identity = scorer, engine, dict(identity or {})
        self._exchange = exchange

    def identity(self) -> Mapping[str, Any]:
        """See `Model.identity`."""
        tokenizer = self.encoder.tokenizer.fingerprint()
        return {"name": self.name, "tokenizer": tokenizer, "context": self.context_length, **self._identity}

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        """See `Model.answer`."""
        texts = [(i, x) for i, x in enumerate(requests) if isinstance(x, Generate)]
        scored = [(i, x) for i, x in enumerate(requests) if not isinstance(x, Generate)]
        # The ids of a part at a time: a benchmark may have a million requests.
        for begin in range(0, len(scored), _PART):
            self._score(scored[begin : begin + _PART], done)
        for begin in range(0, len(texts), _PART):
            part = texts[begin : begin + _PART]
            if self._exchange is None:
                self._generate(part, done)
            else:
                self._generate_together(part, self._exchange, done)

    def _score(self, requests: Sequence[tuple[int, Request]], done: Done) -> None:
        if self._scorer is None:
            raise InputError(f"{self.name} was loaded without log-likelihoods, and a task asks for them.")
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        left: dict[int, int] = {}
        cut: dict[int, bool] = {}
        sums: dict[int, tuple[float, bool, int]] = {}
        self.encoder.prepare((x.context, x.continuation) for _, x in requests if isinstance(x, Loglikelihood))
        for i, request in requests:
            before = self.encoder.truncated
            try:
                parts = self._pairs(request)
            except InputError as error:
                done(i, Response(error=str(error)))
                continue
            if not parts:
                done(i, Response(logprob=0.0, greedy=True))
            pairs += parts
            owners += [i] * len(parts)
            left[i], sums[i] = len(parts), (0.0, True, 0)
            cut[i] = self.encoder.truncated > before

        def finish(pair: int, found: Likelihood) -> None:
            i = owners[pair]
            logprob, greedy, tokens = sums[i]
            sums[i] = logprob + found.logprob, greedy and found.greedy, tokens + found.tokens
            left[i] -= 1
            if not left[i]:
                logprob, greedy, tokens = sums[i]
                done(i, Response(logprob=logprob, greedy=greedy, tokens=tokens, prompt_cut=cut[i]))

        self._scorer.score(pairs, finish)

    def _pairs(self, request: Request) -> list[tuple[list[int], list[int]]]:
        if isinstance(request, Loglikelihood):
            return [self.encoder.pair(request.context, request.continuation)]
        assert isinstance(request, Rolling)
        return self.encoder.windows(request.text)

    def _generate_together(self, requests: Sequence[tuple[int, Request]], exchange: Exchange, done: Done) -> None:
        """As `_generate`, with the other processes: requests are dealt out in turn."""
        found: dict[int, Response] = {}

        def work() -> Message:
            self._generate(requests[jax.process_index() :: jax.process_count()], found.__setitem__)
            return [[i, dataclasses.asdict(response)] for i, response in found.items()], []

        for responses, _ in exchange.share("Generating texts", work):
            for i, response in responses:
                done(i, Response(**response))

    def _generate(self, requests: Sequence[tuple[int, Request]], done: Done) -> None:
        if self._engine is None:
            raise InputError(f"{self.name} was loaded without an engine, and a task asks for texts.")
        streams = []
        for i, request in requests:
            assert isinstance(request, Generate)
            before = self.encoder.truncated
            try:
                stream = self._engine.submit(self._request(request), incremental=False)
                streams.append((i, stream, self.encoder.truncated > before))
            except InputError as error:
                done(i, Response(error=str(error)))
        try:
            for i, stream, prompt_cut in streams:
                finished = stream.result()
                finish: Literal["stop", "length"] = "length" if finished.finish_reason == "length" else "stop"
                text, tokens = finished.text or "", len(finished.token_ids)
                done(i, Response(text, finish, tokens, error=finished.error, prompt_cut=prompt_cut))
        finally:
            for _, stream, _ in streams:
                stream.cancel()

    def _request(self, request: Generate) -> EngineRequest:
        assert self._engine is not None
        tokenizer = self.encoder.tokenizer
        if isinstance(request.prompt, str):
            prompt = request.prompt
        else:
            prompt = tokenizer.chat_template.render(request.prompt, add_generation_prompt=True)
        ids = self.encoder.prompt(prompt, request.max_tokens)
        ends = frozenset({*self._engine.eos_token_ids, tokenizer.eos_id})
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        return EngineRequest(tuple(ids), Ending(ends, tuple(request.stop), request.max_tokens), sampling)
