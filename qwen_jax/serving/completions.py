"""/v1/completions: continues texts or token ids."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import Finished, TokenInfo
from qwen_jax.inference.request import Request
from qwen_jax.serving.context import Context, in_thread, usage
from qwen_jax.serving.errors import ApiError, not_supported
from qwen_jax.serving.logprobs import CompletionLogprobs
from qwen_jax.serving.protocol import CompletionRequest
from qwen_jax.serving.running import Run
from qwen_jax.serving.sampling import (
    build_request,
    check_common,
    check_logprobs,
    grammar_maker,
    new_tokens,
    seeds,
    truncated,
)

# Of OpenAI's API, where neither the request nor generation_config.json gives a number.
_DEFAULT_NEW_TOKENS = 16


def encode_texts(context: Context, texts: Any, *, special: bool, param: str) -> list[tuple[str | None, list[int]]]:
    """Text, if it was text, and token ids of each input of a request; blocks.

    Args:
      context: the server.
      texts: a text, token ids, or a list of either.
      special: whether the tokenizer's own tokens, such as BOS, are added.
      param: the field, for errors.

    Raises:
      ApiError: too many of them, an empty one, or an id out of range.
    """
    many = texts if isinstance(texts, list) and texts and not isinstance(texts[0], int) else [texts]
    if len(many) > context.settings.max_prompts:
        raise ApiError(
            f"{param} has {len(many)} texts, and this server's limit is {context.settings.max_prompts}.", param=param
        )
    limit = context.engine.vocab_limit if context.service.engine else context.service.config.vocab_size
    result: list[tuple[str | None, list[int]]] = []
    for i, text in enumerate(many):
        where = param if many is not texts else f"{param}[{i}]"
        if isinstance(text, str):
            try:
                ids = context.tokenizer.encode(text, add_special_tokens=special)
            except InputError as error:
                raise ApiError(f"{where}: {error}", param=where) from None
            result.append((text, ids))
        else:
            result.append((None, cast(list[int], text)))
        ids = result[-1][1]
        if not ids:
            raise ApiError(f"{where} is empty. Give at least one token.", param=where)
        if max(ids) >= limit:
            raise ApiError(f"{where} has the token id {max(ids)}; ids must be in [0, {limit}).", param=where)
    return result


@dataclasses.dataclass
class _Plan:
    """A checked request: its prompts, and the engine's requests, `best_of` for each prompt."""

    prompts: list[tuple[str | None, list[int]]]
    requests: list[Request]
    n: int
    best_of: int


class Completions:
    """One request of /v1/completions.

    Args:
      context: the server.
      body: the request.

    Attributes:
      arrival: seconds of `time.monotonic`.
      run: its choices on the engine, from `start` on.
    """

    def __init__(self, context: Context, body: CompletionRequest) -> None:
        self._context, self._body = context, body
        self.arrival = time.monotonic()
        self.run: Run | None = None
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._echo = bool(body.echo)

    async def start(self, incremental: bool = True) -> Run:
        """Checks the request and starts it on the engine; see `Run`. Raises ApiError."""
        self._plan = await self._prepare()
        self._context.metrics.choices.observe(self._plan.n)
        self.run = Run(self._context, self._plan.requests, "prompt", self.arrival, incremental)
        return self.run

    async def _prepare(self) -> _Plan:
        context, body = self._context, self._body
        context.admit(1)
        adapter = context.adapter(body.model)
        check_common(context, body)
        check_logprobs(context, body.logprobs or 0, "logprobs")
        n = body.n or 1
        best_of = n if body.best_of is None else body.best_of
        if body.suffix is not None:
            raise not_supported("suffix is not supported. Put the fill-in-the-middle tokens into the prompt.", "suffix")
        if not n <= best_of <= context.settings.max_choices:
            raise ApiError(
                f"best_of is {best_of}; expected n ({n}) to {context.settings.max_choices}, this server's limit.",
                param="best_of",
            )
        if best_of > n and body.stream:
            raise ApiError("best_of > n cannot be streamed: the best is known at the end.", param="best_of")
        if self._echo and body.logprobs is not None and body.stream:
            raise ApiError("echo with logprobs cannot be streamed. Set stream=false.", param="echo")
        if body.max_tokens == 0 and not self._echo:
            raise ApiError("max_tokens must be at least 1, or 0 with echo=true.", param="max_tokens")
        making = grammar_maker(context, body)
        grammar = None if making is None else await in_thread(*making, context.grammar_threads)

        # One token is generated where none is asked for, and left out.
        asked = 1 if body.max_tokens == 0 else body.max_tokens

        def encode() -> list[tuple[str | None, list[int]]]:
            special = body.add_special_tokens is not False
            texts = encode_texts(context, body.prompt, special=special, param="prompt")
            kept = [truncated(context, body, ids, asked, _DEFAULT_NEW_TOKENS) for _, ids in texts]
            # The text of a prompt that was cut is that of the tokens which are left.
            return [
                (text if len(ids) == len(whole) else None, ids) for (text, whole), ids in zip(texts, kept, strict=True)
            ]

        prompts = await in_thread(encode, "prompt")
        if len(prompts) * best_of > context.settings.max_prompts:
            raise ApiError(
                f"{len(prompts)} prompts with {best_of} choices each are more than "
                f"{context.settings.max_prompts} texts, this server's limit.",
                param="n",
            )

        def build() -> list[Request]:
            requests = []
            for p, (_, ids) in enumerate(prompts):
                count = new_tokens(context, asked, _DEFAULT_NEW_TOKENS, len(ids), "prompt")
                requests += [
                    build_request(
                        context,
                        body,
                        ids,
                        count,
                        seed=seed,
                        adapter=adapter,
                        grammar=grammar,
                        top_logprobs=body.logprobs or 0,
                        prompt_logprobs=self._echo and body.logprobs is not None,
                    )
                    for seed in of_choices[p * best_of : (p + 1) * best_of]
                ]
            return requests

        # A seed that is drawn, too, goes on from prompt to prompt.
        of_choices = seeds(body, len(prompts) * best_of)
        return _Plan(prompts, await in_thread(build), n, best_of)

    async def answer(self, run: Run) -> dict[str, Any]:
        """The answer as one object."""
        plan, best_of = self._plan, self._plan.best_of
        results = await run.results()

        def make_choices() -> list[dict[str, Any]]:
            choices: list[dict[str, Any]] = []
            for p, prompt in enumerate(plan.prompts):
                of_prompt = results[p * best_of : (p + 1) * best_of]
                best = sorted(of_prompt, key=_mean_logprob, reverse=True) if best_of > plan.n else of_prompt
                choices += [self._choice(len(choices) + i, prompt, x) for i, x in enumerate(best[: plan.n])]
            return choices

        # Log-probabilities of long prompts take a while to write down.
        choices = await in_thread(make_choices)
        return {**self._head(), "choices": choices, "usage": self._usage(results)}

    def _choice(self, index: int, prompt: tuple[str | None, list[int]], finished: Finished) -> dict[str, Any]:
        none = self._body.max_tokens == 0
        text = "" if none else finished.text or ""
        tokens: list[TokenInfo | None] = [] if none else list(finished.tokens)
        ids = [] if none else list(finished.token_ids)
        if self._echo:
            text = self._prompt_text(prompt) + text
            tokens = [*(finished.prompt_logprobs or []), *tokens]
            ids = [*prompt[1], *ids]
        logprobs = None
        if self._body.logprobs is not None:
            maker = CompletionLogprobs(self._context.tokenizer, self._body.logprobs)
            logprobs = maker.piece(tokens, ids, prompt=len(prompt[1]) if self._echo else 0)
        reason = "length" if none else finished.finish_reason
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": None if none or reason != "stop" else _stop_reason(self._context, finished),
        }
        if self._body.return_token_ids:
            choice |= {"token_ids": [] if none else list(finished.token_ids), "prompt_token_ids": prompt[1]}
        return choice

    def _prompt_text(self, prompt: tuple[str | None, list[int]]) -> str:
        return prompt[0] if prompt[0] is not None else self._context.tokenizer.decode(prompt[1])

    async def chunks(self, run: Run) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as a stream of objects."""
        body, plan = self._body, self._plan
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        head = {**self._head(), **({"usage": None} if with_usage else {})}
        logprobs: dict[int, CompletionLogprobs] = {}
        begun = set[int]()

        def with_ids(choice: dict[str, Any], tokens: Sequence[TokenInfo]) -> dict[str, Any]:
            """A chunk, with ids if they are asked for. The first one of a choice has those of the prompt."""
            i = choice["index"]
            if body.return_token_ids:
                choice["token_ids"] = [token.id for token in tokens]
                choice["prompt_token_ids"] = None if i in begun else plan.prompts[i // plan.best_of][1]
                begun.add(i)
            return {**head, "choices": [choice]}

        if self._echo:
            for i in range(len(plan.requests)):
                text = self._prompt_text(plan.prompts[i // plan.best_of])
                yield with_ids({"index": i, "text": text, "logprobs": None, "finish_reason": None}, ())
        results: list[Finished] = []
        async for i, step in run:
            text, tokens, reason, stop = step.text, step.tokens, None, None
            if step.finished is not None:
                results.append(step.finished)
                reason = step.finished.finish_reason
                stop = _stop_reason(self._context, step.finished) if reason == "stop" else None
            if body.max_tokens == 0:
                text, tokens, stop = "", (), None
                reason = reason and "length"
            if not (text or reason or (tokens and (body.logprobs is not None or body.return_token_ids))):
                continue
            choice: dict[str, Any] = {"index": i, "text": text, "logprobs": None, "finish_reason": reason}
            if reason:
                choice["stop_reason"] = stop
            if body.logprobs is not None:
                maker = logprobs.setdefault(i, CompletionLogprobs(self._context.tokenizer, body.logprobs))
                choice["logprobs"] = maker.piece(tokens)
            yield with_ids(choice, tokens)
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage(results)}

    def _head(self) -> dict[str, Any]:
        model = self._context.name(self._body.model)
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": model}

    def _usage(self, results: Sequence[Finished]) -> dict[str, Any]:
        prompts = sum(len(ids) for _, ids in self._plan.prompts)
        new = 0 if self._body.max_tokens == 0 else sum(len(finished.token_ids) for finished in results)
        return usage(prompts, new, min(prompts, sum(finished.cached_tokens for finished in results)))


def _mean_logprob(finished: Finished) -> float:
    """By which the best of several texts is chosen: log-probability per token."""
    return sum(token.logprob for token in finished.tokens) / max(len(finished.tokens), 1)


def _stop_reason(context: Context, finished: Finished) -> str | int | None:
    """vLLM's field: the stop string or the id that ended the text; None for an ordinary end-of-text token."""
    return None if finished.stop in context.engine.eos_token_ids else finished.stop
