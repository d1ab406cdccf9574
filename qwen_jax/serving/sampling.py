"""Fields that requests for completions and chats share, to the engine's `Request`."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence

from qwen_jax.errors import InputError
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.structured import Grammar
from qwen_jax.serving.context import Context, sentence
from qwen_jax.serving.engine_protocol import Grammars
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.protocol import Sampled


def check_common(context: Context, body: Sampled) -> None:
    """Checks limits and combinations that need no prompt. Raises ApiError."""
    limits = context.settings
    if (body.n or 1) > limits.max_choices:
        raise ApiError(f"n is {body.n}, and this server's limit is {limits.max_choices}.", param="n")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > limits.max_stops:
        raise ApiError(f"stop has {len(stops)} strings, and this server's limit is {limits.max_stops}.", param="stop")
    if any(not text or len(text) > 1024 for text in stops):
        raise ApiError("stop: a stop string needs 1 to 1024 characters.", param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream=true.", param="stream_options")
    check_truncation(context, body.truncate_prompt_tokens)
    for key in body.logit_bias or {}:
        if not (key.isascii() and key.isdigit() and len(key) < 10) or int(key) >= context.engine.config.vocab_size:
            raise ApiError(
                f"logit_bias: {key!r:.40} is no token id below {context.engine.config.vocab_size}.", param="logit_bias"
            )
    for token in body.stop_token_ids or ():
        if token >= context.engine.config.vocab_size:
            raise ApiError(
                f"stop_token_ids: {token} is no token id below {context.engine.config.vocab_size}.",
                param="stop_token_ids",
            )


def check_truncation(context: Context, most: int | None) -> None:
    """Raises ApiError for a value of truncate_prompt_tokens that no text of this model can have."""
    longest = context.engine.max_length
    if most is not None and not (most == -1 or 0 < most <= longest):
        raise ApiError(
            f"truncate_prompt_tokens is {most}; expected 1 to {longest}, this model's maximum context length, or -1 "
            "for as many tokens as fit.",
            param="truncate_prompt_tokens",
        )


def check_logprobs(context: Context, count: int, param: str) -> None:
    """Raises ApiError for more log-probabilities than the server gives."""
    if count > context.settings.max_logprobs:
        raise ApiError(f"{param} is {count}, and this server's limit is {context.settings.max_logprobs}.", param=param)


def seeds(body: Sampled, count: int) -> list[int]:
    """A seed for each choice: the request's and those after it, or random ones."""
    first = secrets.randbits(32) if body.seed is None else body.seed
    return [(first + i) % 2**32 for i in range(count)]


def truncated(context: Context, body: Sampled, prompt: list[int], asked: int | None, default: int | None) -> list[int]:
    """The last tokens of a prompt, as many as truncate_prompt_tokens says; for -1 as many as fit beside new tokens.

    Args:
      context: the server.
      body: the request.
      prompt: token ids.
      asked, default: numbers of new tokens, as for `new_tokens`. Without both, there is room for one.
    """
    most = body.truncate_prompt_tokens
    if most == -1:
        most = context.engine.max_length - (asked or default or 1)
    # Where new tokens alone are too many, `new_tokens` says so.
    return prompt if most is None or most < 1 else prompt[-most:]


def new_tokens(context: Context, asked: int | None, default: int | None, prompt_length: int, param: str) -> int:
    """How many tokens to generate. Raises ApiError where prompt and new tokens do not fit.

    Args:
      asked: by the request.
      default: where neither the request nor generation_config.json says; None is all that fits.
      prompt_length: in tokens.
      param: the field that the prompt came from.
    """
    longest, defaults = context.engine.max_length, context.service.defaults
    assert defaults is not None
    room = longest - prompt_length
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and {asked} new tokens"
        raise ApiError(
            f"This model's maximum context length is {longest} tokens, prompt and completion together. The prompt has "
            f"{prompt_length} tokens{wanted}. Shorten the prompt{'' if asked is None else ' or lower max_tokens'}.",
            param=param,
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    if defaults.max_new_tokens is not None or defaults.max_length is not None:
        try:
            return defaults.new_tokens(prompt_length, longest)
        except InputError as error:
            raise ApiError(sentence(error), param=param) from None
    return room if default is None else min(default, room)


def build_request(
    context: Context,
    body: Sampled,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    seed: int,
    adapter: str | None,
    grammar: Grammar | None,
    end_ids: Sequence[int] = (),
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
) -> Request:
    """A request to the engine.

    Args:
      context: the server.
      body: the HTTP request.
      prompt: token ids.
      max_new_tokens: from `new_tokens`.
      seed: of this choice.
      adapter: name of a LoRA adapter.
      grammar: what the text must match.
      end_ids: ids that end the text beside those of the model.
      top_logprobs, prompt_logprobs: as in `Request`.

    Raises:
      ApiError: a value that does not fit the model.
    """
    engine, defaults = context.engine, context.service.defaults
    assert defaults is not None
    ends = set(body.stop_token_ids or ())
    if not body.ignore_eos:
        ends |= {*engine.eos_token_ids, *end_ids}
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if stops and engine.tokenizer is None:
        raise ApiError("stop: the model has no tokenizer, so there is no text to stop at.", param="stop")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    min_tokens = body.min_tokens or 0
    if min_tokens > max_new_tokens:
        raise ApiError(
            f"min_tokens is {min_tokens}, and there are at most {max_new_tokens} new tokens.", param="min_tokens"
        )
    try:
        sampling: SamplingParams = dataclasses.replace(defaults.sampling, seed=seed, **given)
        return Request(
            tuple(prompt),
            Ending(frozenset(ends), stops, max_new_tokens, bool(body.include_stop_str_in_output)),
            sampling,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(key): value for key, value in (body.logit_bias or {}).items()},
            min_tokens=min_tokens,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            adapter=adapter,
            cache_salt=body.cache_salt,
        )
    except InputError as error:
        raise ApiError(
            sentence(error), param=next((name for name in names if str(error).startswith(name)), None)
        ) from None


def grammar_maker(context: Context, body: Sampled) -> tuple[Callable[[], Grammar], str] | None:
    """What compiles the grammar that a request asks for, and the field that asks; None if none does.

    Compiling takes time, and is done in a thread.

    Raises:
      ApiError: several grammars, a format without its schema, or no grammars here.
    """
    wishes: list[tuple[str, Callable[[Grammars], Grammar]]] = []

    def wish(field: str, make: Callable[[Grammars], Grammar]) -> None:
        wishes.append((field, make))

    form = body.response_format
    if form is not None:
        if (form.type == "json_schema") != (form.json_schema is not None):
            raise ApiError(
                "response_format: the type json_schema and the field json_schema belong together.",
                param="response_format",
            )
        if form.type == "json_object":
            wish("response_format", lambda grammars: grammars.json_object())
        if form.json_schema is not None:
            schema = form.json_schema.schema_
            wish("response_format", lambda grammars: grammars.json_schema(schema))
    outputs = body.structured_outputs
    if outputs is not None and outputs.json_object:
        wish("structured_outputs.json_object", lambda grammars: grammars.json_object())
    of_outputs = (None,) * 4 if outputs is None else (outputs.json_, outputs.regex, outputs.grammar, outputs.choice)
    for prefix, values in (
        ("structured_outputs.", of_outputs),
        ("guided_", (body.guided_json, body.guided_regex, body.guided_grammar, body.guided_choice)),
    ):
        json_schema, regex, grammar, choice = values
        if json_schema is not None:
            _check_schema(json_schema, f"{prefix}json")
            wish(f"{prefix}json", lambda grammars, x=json_schema: grammars.json_schema(x))  # type: ignore[misc]
        if regex is not None:
            wish(f"{prefix}regex", lambda grammars, x=regex: grammars.regex(x))  # type: ignore[misc]
        if grammar is not None:
            wish(f"{prefix}grammar", lambda grammars, x=grammar: grammars.ebnf(x))  # type: ignore[misc]
        if choice is not None:
            if not choice or not all(choice):
                raise ApiError(f"{prefix}choice: expected texts, none of them empty.", param=f"{prefix}choice")
            wish(f"{prefix}choice", lambda grammars, x=choice: grammars.choice(x))  # type: ignore[misc]
    if not wishes:
        return None
    if len(wishes) > 1:
        raise ApiError(f"{wishes[0][0]} and {wishes[1][0]} both constrain the text. Give one.", param=wishes[1][0])
    (field, make) = wishes[0]
    grammars = need_grammars(context, field)
    return lambda: make(grammars), field


def need_grammars(context: Context, field: str) -> Grammars:
    """The engine's grammars. Raises ApiError where it has none."""
    if context.engine.grammars is None:
        raise ApiError(
            f"{field}: structured output is not available here. It needs a tokenizer, and llguidance on the server "
            "(pip install 'qwen-jax[serve]').",
            param=field,
        )
    return context.engine.grammars


def _check_schema(schema: object, field: str) -> None:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{field}: not JSON ({error}).", param=field) from None
    if not isinstance(schema, dict):
        raise ApiError(f"{field}: expected a JSON schema, an object.", param=field)
