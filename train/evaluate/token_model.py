"""A checkpoint in this process that answers requests on token ids as lm-eval's `hf` backend does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine, SamplingParams
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.likelihood import Likelihood, LikelihoodScorer
from qwen_jax.inference.request import Request as EngineRequest
from train.evaluate.encoding import RequestEncoder
from train.evaluate.task import Generate, Loglikelihood, Request, Response, Rolling

Done = Callable[[int, Response], None]


class TokenModel:
    """A `train.evaluate.task.Model`: log-likelihoods in packed rows, texts by an engine.

    Contexts and prompts that are too long lose their first tokens; `encoder.truncated` counts them.

    Attributes:
      name: for reports.
      context_length: tokens that the model reads.
      encoder: makes the ids.
    """

    def __init__(
        self,
        name: str,
        encoder: RequestEncoder,
        scorer: LikelihoodScorer | None,
        engine: ContinuousEngine | None,
        identity: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          name: for reports.
          encoder: with the model's tokenizer and context.
          scorer: answers `Loglikelihood` and `Rolling`; None if there are none.
          engine: answers `Generate`; None if there are none.
          identity: what decides the answers besides the requests.
        """
        self.name, self.encoder = name, encoder
        self.context_length: int | None = encoder.context_length
        self._scorer, self._engine, self._identity = scorer, engine, dict(identity or {})

    def identity(self) -> Mapping[str, Any]:
        """See `Model.identity`."""
        tokenizer = self.encoder.tokenizer.fingerprint()
        return {"name": self.name, "tokenizer": tokenizer, "context": self.context_length, **self._identity}

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        """See `Model.answer`."""
        texts = [(i, x) for i, x in enumerate(requests) if isinstance(x, Generate)]
        scored = [(i, x) for i, x in enumerate(requests) if not isinstance(x, Generate)]
        if scored:
            self._score(scored, done)
        if texts:
            self._generate(texts, done)

    def _score(self, requests: Sequence[tuple[int, Request]], done: Done) -> None:
        if self._scorer is None:
            raise InputError(f"{self.name} was loaded without log-likelihoods, and a task asks for them.")
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        left: dict[int, int] = {}
        sums: dict[int, tuple[float, bool, int]] = {}
        for i, request in requests:
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

        def finish(pair: int, found: Likelihood) -> None:
            i = owners[pair]
            logprob, greedy, tokens = sums[i]
            sums[i] = logprob + found.logprob, greedy and found.greedy, tokens + found.tokens
            left[i] -= 1
            if not left[i]:
                logprob, greedy, tokens = sums[i]
                done(i, Response(logprob=logprob, greedy=greedy, tokens=tokens))

        self._scorer.score(pairs, finish)

    def _pairs(self, request: Request) -> list[tuple[list[int], list[int]]]:
        if isinstance(request, Loglikelihood):
            return [self.encoder.pair(request.context, request.continuation)]
        assert isinstance(request, Rolling)
        return self.encoder.windows(request.text)

    def _generate(self, requests: Sequence[tuple[int, Request]], done: Done) -> None:
        if self._engine is None:
            raise InputError(f"{self.name} was loaded without an engine, and a task asks for texts.")
        streams = []
        for i, request in requests:
            assert isinstance(request, Generate)
            try:
                streams.append((i, self._engine.submit(self._request(request), incremental=False)))
            except InputError as error:
                done(i, Response(error=str(error)))
        try:
            for i, stream in streams:
                finished = stream.result()
                cut = finished.finish_reason == "length"
                text = finished.text or ""
                done(i, Response(text, "length" if cut else "stop", len(finished.token_ids), error=finished.error))
        finally:
            for _, stream in streams:
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
