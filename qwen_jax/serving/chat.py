"""/v1/chat/completions: answers conversations, with tools."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any

from qwen_jax.inference.outputs import Finished, Step
from qwen_jax.inference.request import Request
from qwen_jax.serving.context import Context, in_thread, usage, without_none
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.logprobs import of_chat
from qwen_jax.serving.protocol import ChatRequest, Message, NamedTool, Rendering, Tool
from qwen_jax.serving.running import Run
from qwen_jax.serving.sampling import (
    build_request,
    check_common,
    check_logprobs,
    grammar_maker,
    need_grammars,
    new_tokens,
    seeds,
    truncated,
)
from qwen_jax.serving.tools import CallArguments, CallStart, Part, ToolParser
from qwen_jax.tokenizer import Tokenizer, parse_tool_arguments
from qwen_jax.tokenizer.control import TURN_END

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    rendering: Rendering,
    *,
    where: str = "messages",
) -> list[int]:
    """The token ids of a conversation; blocks.

    Args:
      tokenizer: with the chat template.
      messages, tools, rendering: of a request.
      where: the field of the messages, for errors.

    Raises:
      ApiError: a part of a message that is not text, or a wrong value of `rendering`.
      InputError: messages that the template refuses.
    """
    plain = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        calls = [{"type": "function", "function": call.function.model_dump()} for call in message.tool_calls or ()]
        content = _text(message, f"{where}[{i}].content")
        if content is None and role == "assistant" and not calls:
            raise ApiError(f"{where}[{i}] has neither content nor tool_calls.", param=f"{where}[{i}].content")
        fields = {"role": role, "content": content, "tool_calls": calls or None}
        plain.append(without_none({**fields, "name": message.name, "tool_call_id": message.tool_call_id}))
    described = [
        without_none(tool.model_dump(exclude={"function"})) | {"function": _function(tool)} for tool in tools or ()
    ]
    variables = rendering.chat_template_kwargs or {}
    if variables:
        _check_variables(variables, tokenizer.chat_template.variables(described or None))
    return tokenizer.encode_chat(
        parse_tool_arguments(plain),
        described or None,
        add_generation_prompt=begins_answer(rendering),
        continue_final_message=bool(rendering.continue_final_message),
        **variables,
    )


def begins_answer(rendering: Rendering) -> bool:
    """Whether the prompt ends with the opening of an answer. Raises ApiError if it is also to go on with a message."""
    if rendering.continue_final_message and rendering.add_generation_prompt:
        raise ApiError(
            "continue_final_message goes on with the last message, and add_generation_prompt begins another one. Leave "
            "one of them out.",
            param="continue_final_message",
        )
    return not rendering.continue_final_message and rendering.add_generation_prompt is not False


def _check_variables(variables: Mapping[str, Any], read: Collection[str]) -> None:
    """Raises ApiError for variables that the chat template does not read."""
    for name in sorted(variables.keys() - read):
        known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
        raise ApiError(
            f"chat_template_kwargs: the model's chat template reads no variable {name!r:.80}; {known}. This server "
            "refuses what it would ignore: remove it.",
            param=f"chat_template_kwargs.{name:.80}",
        )


def _function(tool: Tool) -> dict[str, Any]:
    """What the model reads of a tool: the fields that the client gave."""
    return without_none(tool.function.model_dump(exclude={"strict"}))


def _text(message: Message, where: str) -> str | None:
    """The content of a message as one text. Raises ApiError for images, audio and files."""
    if not isinstance(message.content, list):
        return message.content
    texts = []
    for i, part in enumerate(message.content):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise ApiError(
                f"{where}[{i}] is of type {kind!r:.40}. This model reads text only: send parts of type 'text'.",
                param=f"{where}[{i}]",
                code="unsupported_content",
            )
        if not isinstance(part.get(kind), str) or set(part) != {"type", kind}:
            raise ApiError(f"{where}[{i}]: expected the keys 'type' and '{kind}', a text.", param=f"{where}[{i}]")
        texts.append(part[kind])
    return "".join(texts)


@dataclasses.dataclass
class _Call:
    """A tool call of a growing answer."""

    name: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    arguments: list[str] = dataclasses.field(default_factory=list)
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it stands in a whole answer; in a stream, before its arguments come."""
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class _Choice:
    """A growing answer. Streams and whole answers are made from the same deltas.

    Args:
      with_tools: tool calls are read from the text.
      single: at most one call.

    Attributes:
      content, calls, tokens: so far.
      reason: why the answer has ended, which may be before the text does; None if it has not.
      finished: the end of the text.
    """

    def __init__(self, with_tools: bool, single: bool) -> None:
        self._parser = ToolParser() if with_tools else None
        self._single = single
        self.content, self.calls = "", list[_Call]()
        self.tokens: list[Any] = []
        self.reason: str | None = None
        self.finished: Finished | None = None

    def add(self, step: Step) -> list[dict[str, Any]]:
        """Takes a step in, and returns what it adds to the message, as OpenAI's deltas."""
        self.tokens += step.tokens
        self.finished = step.finished
        parts: list[Part] = [step.text] if step.text else []
        if self._parser is not None:
            parts = self._parser.push(step.text)
            if step.finished is not None:
                parts += self._parser.finish()
        deltas = []
        for part in parts:
            deltas += self._take(part)
            if self._single and self.calls and self.calls[0].complete:
                self.reason = "tool_calls"
                return deltas
        if step.finished is not None:
            cut = step.finished.finish_reason == "length"
            self.reason = "tool_calls" if self.calls and not cut else step.finished.finish_reason
        return deltas

    def _take(self, part: Part) -> list[dict[str, Any]]:
        if isinstance(part, str):
            self.content += part
            return [{"content": part}]
        if isinstance(part, CallStart):
            self.calls.append(_Call(part.name))
            piece = self.calls[-1].to_json()
        elif isinstance(part, CallArguments):
            self.calls[-1].arguments.append(part.text)
            piece = {"function": {"arguments": part.text}}
        else:
            self.calls[-1].complete = part.complete
            return []
        return [{"tool_calls": [{"index": len(self.calls) - 1, **piece}]}]


class Chat:
    """One request of /v1/chat/completions.

    Args:
      context: the server.
      body: the request.

    Attributes:
      arrival: seconds of `time.monotonic`.
      run: its choices on the engine, from `start` on.
    """

    def __init__(self, context: Context, body: ChatRequest) -> None:
        self._context, self._body = context, body
        self.arrival = time.monotonic()
        self.run: Run | None = None
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        choice = body.tool_choice
        # Without a choice, tools may be called where there are any.
        self._mode = "named" if isinstance(choice, NamedTool) else choice or ("auto" if body.tools else "none")
        self._with_tools = bool(body.tools) and self._mode != "none"
        self._top = body.top_logprobs or 0
        self._prompt: list[int] = []
        # A continued message keeps its role.
        self._role = "assistant" if begins_answer(body) else body.messages[-1].role

    async def start(self, incremental: bool = True) -> Run:
        """Checks the request and starts it on the engine; see `Run`. Raises ApiError."""
        requests = await self._prepare()
        self._context.metrics.choices.observe(len(requests))
        # What follows a single call is not generated, so the text must be seen to grow.
        incremental |= self._with_tools and self._body.parallel_tool_calls is False
        self.run = Run(self._context, requests, "messages", self.arrival, incremental)
        return self.run

    async def _prepare(self) -> list[Request]:
        context, body = self._context, self._body
        context.admit(1)
        adapter = context.adapter(body.model)
        check_common(context, body)
        check_logprobs(context, self._top, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise ApiError("top_logprobs needs logprobs=true.", param="top_logprobs")
        if body.max_tokens == 0:
            raise ApiError("max_tokens must be at least 1.", param="max_tokens")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError("max_tokens and max_completion_tokens differ. Give one of them.", param="max_tokens")
        tokenizer = context.tokenizer
        self._check_tools()
        making = grammar_maker(context, body)
        if making is not None and self._with_tools:
            raise ApiError(
                f"{making[1]} constrains the whole answer, so that no tool could be called. Leave it out, or set "
                "tool_choice to 'none'.",
                param=making[1],
            )
        tools = body.tools if self._with_tools else None
        if self._mode in ("required", "named"):
            making = self._calls_grammar(), "tools"
        grammar = None if making is None else await in_thread(*making, context.grammar_threads)
        asked = body.max_completion_tokens or body.max_tokens
        whole = await in_thread(lambda: encode_conversation(tokenizer, body.messages, tools, body), "messages")
        self._prompt = truncated(context, body, whole, asked, None)
        count = new_tokens(context, asked, None, len(self._prompt), "messages")
        turn_end = tokenizer.token_to_id(TURN_END)
        return [
            build_request(
                context,
                body,
                self._prompt,
                count,
                seed=seed,
                adapter=adapter,
                grammar=grammar,
                end_ids=() if turn_end is None else (turn_end,),
                top_logprobs=self._top,
            )
            for seed in seeds(body, body.n or 1)
        ]

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self._body.tools or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ApiError(f"tools: {twice!r} is there twice.", param="tools")
        choice = self._body.tool_choice
        if not names and choice not in (None, "none", "auto"):
            raise ApiError("tool_choice needs tools.", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                f"tool_choice names {choice.function.name!r:.80}, which is not among tools: {', '.join(names)}.",
                param="tool_choice",
            )
        for i, tool in enumerate(self._body.tools or ()):
            if (tool.function.parameters or _ANY_OBJECT).get("type", "object") != "object":
                where = f"tools[{i}].function.parameters"
                raise ApiError(f"{where}: expected a JSON schema of type object.", param=where)

    def _calls_grammar(self) -> Any:
        choice = self._body.tool_choice
        grammars = need_grammars(self._context, "tool_choice")
        named = choice.function.name if isinstance(choice, NamedTool) else None
        tools = [(tool.function.name, tool.function.parameters or _ANY_OBJECT) for tool in self._body.tools or ()]
        return lambda: grammars.tool_calls(tools, named, self._body.parallel_tool_calls is not False and named is None)

    def _choices(self, count: int) -> list[_Choice]:
        single = self._body.parallel_tool_calls is False
        return [_Choice(self._with_tools, single) for _ in range(count)]

    async def answer(self, run: Run) -> dict[str, Any]:
        """The answer as one object."""
        choices = self._choices(self._body.n or 1)
        try:
            async for i, step in run:
                choice = choices[i]
                if choice.reason is None:
                    choice.add(step)
                    if choice.reason is not None:
                        run.stop(i)
        finally:
            run.close()

        def one(i: int, choice: _Choice) -> dict[str, Any]:
            message: dict[str, Any] = {"role": self._role, "content": choice.content or None, "refusal": None}
            if choice.calls:
                message["tool_calls"] = [call.to_json() for call in choice.calls]
            else:
                message["content"] = choice.content
            logprobs = of_chat(self._context.tokenizer, choice.tokens, self._top) if self._body.logprobs else None
            ids = {"token_ids": [token.id for token in choice.tokens]} if self._body.return_token_ids else {}
            return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.reason, **ids}

        # Log-probabilities of many tokens take a while to write down.
        found = await in_thread(lambda: [one(i, choice) for i, choice in enumerate(choices)])
        prompt = {"prompt_token_ids": self._prompt} if self._body.return_token_ids else {}
        return {**self._head("chat.completion"), "choices": found, "usage": self._usage(choices), **prompt}

    async def chunks(self, run: Run) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as a stream of objects."""
        body = self._body
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if with_usage else {})}
        choices = self._choices(body.n or 1)

        def chunk(
            i: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None, tokens: Sequence[Any] = ()
        ) -> dict[str, Any]:
            ids = {"token_ids": [token.id for token in tokens]} if body.return_token_ids else {}
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **ids}
            return {**head, "choices": [choice]}

        for i in range(len(choices)):
            prompt = {"prompt_token_ids": self._prompt} if body.return_token_ids and i == 0 else {}
            yield {**chunk(i, {"role": self._role, "content": ""}), **prompt}
        async for i, step in run:
            choice = choices[i]
            if choice.reason is not None:
                continue
            deltas = choice.add(step)
            logprobs, tokens = None, step.tokens
            if body.logprobs and tokens:
                logprobs = of_chat(self._context.tokenizer, tokens, self._top)
            if (body.logprobs or body.return_token_ids) and tokens:
                deltas = deltas or [{}]
            for delta in deltas:
                yield chunk(i, delta, logprobs, tokens=tokens)
                logprobs, tokens = None, ()
            if choice.reason is not None:
                run.stop(i)
                yield chunk(i, {}, None, choice.reason)
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._context.name(self._body.model)
        return {"id": self._id, "object": kind, "created": self._created, "model": model}

    def _usage(self, choices: Sequence[_Choice]) -> dict[str, Any]:
        cached = [choice.finished.cached_tokens for choice in choices if choice.finished is not None]
        new = sum(len(choice.tokens) for choice in choices)
        return usage(len(self._prompt), new, min(cached, default=0))
