"""Chat templates: messages to the text that a model reads, and tool calls parsed from the text that it writes."""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.files import TEMPLATE_FILE, default_chat_template
from qwen_jax.tokenizer.text import valid_text

ROLES = ("system", "user", "assistant", "tool")
# The variable of the marks of generation blocks. A template cannot read it: no name in Jinja has a space.
_MARKS = "generation marks"
# Names that templates read and that are not a caller's to give.
_OWN = {"self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
# After a mark, to see whether a template takes spaces away from the end of a text.
_SPACES = " \n\t"
# Exceptions that sandboxed template code can raise. Templates are input, so each becomes an InputError.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A chat template, rendered as Hugging Face's `apply_chat_template` renders it.

    Args:
        source: Jinja source, or several by name. Of several, "tool_use" is rendered where tools are given, otherwise
            "default".
        special_tokens: name to text of the tokens that a template may use, such as `eos_token`.

    Raises:
        InputError: a single source is not valid Jinja. One of several is checked when it is rendered.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        if isinstance(source, str):
            _compiled(source)

    def source(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the Jinja source for a conversation with or without tools.

        Raises:
            InputError: there are several templates and none of them is called "default".
        """
        if tools is not None and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            raise InputError(
                f"the tokenizer has chat templates called {', '.join(sorted(self.sources))}, and none called "
                f"'default'. Write the one to use into {TEMPLATE_FILE}."
            )
        return self.sources["default"]

    def variables(self, tools: Sequence[Mapping[str, Any]] | None = None) -> frozenset[str]:
        """Return the names of the further values that the template reads, which `render` takes as `variables`.

        Raises:
            InputError: as `source` does, or the template is not valid Jinja.
        """
        return _variables(self.source(tools))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation.

        Args:
            messages: each with a `role` of system, user, assistant or tool, and a string `content`; an assistant's may
                be missing or None beside `tool_calls`. Arguments of a tool call render as given, as in Hugging Face, so
                a JSON string comes out quoted: see `parse_tool_arguments`.
            tools: each `{"type": "function", "function": {"name", "description", "parameters"}}`.
            add_generation_prompt: end with the opening of an assistant's turn.
            variables: further names that the template reads, JSON values. They win over special tokens.

        Raises:
            InputError: a message or tool is malformed (the error names its index), or the template fails or refuses.
        """
        return self.render_marked(messages, tools, ("", ""), add_generation_prompt=add_generation_prompt, **variables)

    def render_open(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation up to the end of the final message's content, so that a model goes on with that text.

        Args:
            messages, tools, variables: as for `render`. The final message has a content and no `tool_calls`.

        Raises:
            InputError: as `render` does; or there is no text to go on with, or the template does not render it once.
        """
        check_messages(messages)
        *before, final = messages
        if final.get("tool_calls") or not isinstance(final.get("content"), str):
            raise InputError(
                f"message {len(before)}: to go on with the final message, it must have a text as 'content' and no "
                "'tool_calls'"
            )
        # Nobody can guess the mark, so that no message has it.
        mark = secrets.token_hex(16)
        marked = {**final, "content": f"{final['content']}{mark}{_SPACES}"}
        text = self.render([*before, marked], tools, add_generation_prompt=False, **variables)
        if text.count(mark) != 1:
            raise InputError(
                f"the chat template renders the text of the final message {text.count(mark)} times; to go on with it, "
                "it must be there once"
            )
        opened, after = text.split(mark)
        return opened if after.startswith(_SPACES) else opened.rstrip()

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        marks: tuple[str, str],
        *,
        add_generation_prompt: bool,
        **variables: Any,
    ) -> str:
        """Render a conversation, with marks around what the template declares as an assistant's text.

        Args:
            messages, tools, add_generation_prompt, variables: as for `render`.
            marks: put before and after the body of each `{% generation %}` block.

        Raises:
            InputError: as `render` does.
        """
        check_messages(messages)
        check_tools(tools or [])
        values = {name: _plain(value, f"variable {name}") for name, value in variables.items()}
        # Templates come with checkpoints, so they get plain JSON values only, with no methods to misuse.
        # As in transformers 5.23, a key whose value is None is left out. Earlier versions let templates print "None".
        plain_messages = [
            {key: value for key, value in _plain(message, f"message {i}").items() if value is not None}
            for i, message in enumerate(messages)
        ]
        plain_tools = None if tools is None else [_plain(tool, f"tool {i}") for i, tool in enumerate(tools)]
        try:
            return _compiled(self.source(tools)).render(
                {**self.special_tokens, **values, _MARKS: marks},
                messages=plain_messages,
                tools=plain_tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _TEMPLATE_FAULTS as error:
            raise InputError(
                f"the chat template failed: {error}. Check that the messages have what it expects, or correct it."
            ) from None


@functools.lru_cache(maxsize=16)
def _variables(source: str) -> frozenset[str]:
    """See `ChatTemplate.variables`."""
    _compiled(source)  # Which raises for what is not valid.
    environment = _environment()
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)) - {*environment.globals} - _OWN)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """Compile Jinja source. Raises InputError where it is not valid."""
    try:
        return _environment().from_string(source)
    except _TEMPLATE_FAULTS as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"the chat template is not valid Jinja{line}: {error}. Correct it.") from None


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = True,
    template: str | ChatTemplate | None = None,
) -> str:
    """Render a conversation as text; see `ChatTemplate.render`.

    Args:
        messages, tools, add_generation_prompt: as for `ChatTemplate.render`.
        template: a tokenizer's `chat_template`, or Jinja source; by default that of the Qwen2.5 instruct checkpoints.
            Source alone knows no special tokens.
    """
    if not isinstance(template, ChatTemplate):
        template = ChatTemplate(default_chat_template() if template is None else template)
    return template.render(messages, tools, add_generation_prompt=add_generation_prompt)


class _GenerationTag(jinja2.ext.Extension):
    """Hugging Face's `{% generation %}`, which marks assistant text and renders as its body, between marks if asked."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        """Render a block."""
        before, after = context[_MARKS]
        return f"{before}{caller()}{after}"


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Hugging Face's environment: transformers/utils/chat_template_utils.py defines what templates may rely on."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which a model never saw.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def _plain(value: Any, where: str) -> Any:
    """Copy a JSON value, or raise InputError."""
    if isinstance(value, str):
        try:
            return str(valid_text(value))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise InputError(f"{where}: expected JSON values (text, number, list, object), got {type(value).__name__}")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError, naming the message by its index, unless the messages have the form `ChatTemplate` renders."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"expected a list of messages, got {type(messages).__name__}. Give each of them as an object with role and "
            "content."
        )
    if not messages:
        raise InputError("expected at least one message, got an empty list. Give a message with role and content.")
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: expected an object with 'role' and 'content', got {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{where}: expected role {', '.join(ROLES)}, got {role!r}. Give one of these.")
        calls = message.get("tool_calls")
        if calls and role != "assistant":
            raise InputError(f"{where}: only an assistant's message may have 'tool_calls', this one is of role {role}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise InputError(
                f"{where} ({role}): expected 'content' as a string, got "
                f"{'nothing' if content is None else type(content).__name__}. Join content parts into one text."
            )
        if calls is not None and not isinstance(calls, (list, tuple)):
            raise InputError(f"{where}: expected 'tool_calls' as a list, got {type(calls).__name__}")
        for n, call in enumerate(calls or []):
            _check_call(call, f"{where}, tool call {n}")


def _check_call(call: Any, where: str) -> None:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where}: expected {{'function': {{'name': text, 'arguments': object}}}}, got {call!r:.200}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        _loads_arguments(arguments, where)
    elif not isinstance(arguments, Mapping):
        raise InputError(f"{where}: expected 'arguments' as an object or its JSON text, got {arguments!r:.200}")


def _loads_arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: 'arguments' is not JSON ({error}): {text!r:.200}") from None
    if not isinstance(arguments, dict):
        raise InputError(f"{where}: 'arguments' must be a JSON object, got {text!r:.200}")
    return arguments


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError, naming the tool by its index, unless the tools are function descriptions."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InputError(f"expected a list of tools, got {type(tools).__name__}")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(
                f"tool {i}: expected {{'type': 'function', 'function': {{'name': text, ...}}}}, got {tool!r:.200}"
            )
        if not isinstance(function.get("description", ""), str):
            raise InputError(f"tool {i} ({function['name']}): expected 'description' as a string")
        parameters = function.get("parameters", {})
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise InputError(
                f"tool {i} ({function['name']}): expected 'parameters' as a JSON schema of type object, got "
                f"{parameters!r:.200}"
            )


def parse_tool_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with every tool call's arguments as an object, as the model was trained to read them.

    OpenAI's interface carries arguments as JSON text; rendered as it is, the text would appear quoted.
    Raises InputError as `check_messages` does.
    """
    check_messages(messages)
    result = []
    for i, message in enumerate(messages):
        copied = dict(message)
        if copied.get("tool_calls"):
            copied["tool_calls"] = [_with_object(call, f"message {i}") for call in copied["tool_calls"]]
        result.append(copied)
    return result


def _with_object(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"], where)}
    arguments = call["arguments"]
    return {**call, "arguments": _loads_arguments(arguments, where) if isinstance(arguments, str) else arguments}


class ParsedReply(NamedTuple):
    """An assistant's reply, parsed.

    Args:
        content: the text without the tool calls that could be read.
        tool_calls: each `{"type": "function", "function": {"name", "arguments"}}`, ready for a message.
        problems: one line for each `<tool_call>` that could not be read and was left in `content`.
    """

    content: str
    tool_calls: list[dict[str, Any]]
    problems: list[str]


_CALL_START = re.compile(r"\n?(<tool_call>)\s*")
_CALL_END = re.compile(r"\s*</tool_call>")


def parse_tool_calls(text: str) -> ParsedReply:
    """Find the `<tool_call>` blocks of a reply in Hermes format: a JSON object with `name` and `arguments` in each.

    It inverts the template: a rendered assistant turn gives its message back. Malformed blocks stay text and are
    reported; nothing is raised, since a model may write anything.
    """
    calls: list[dict[str, Any]] = []
    problems: list[str] = []
    kept: list[str] = []
    position = 0
    search_from = 0
    while match := _CALL_START.search(text, search_from):
        try:
            value, end = json.JSONDecoder().raw_decode(text, match.end())
            closing = _CALL_END.match(text, end)
            problem = None if closing else "no </tool_call> after the JSON"
            if not (isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"]):
                problem = "expected an object with a name"
            elif not isinstance(value.get("arguments"), dict):
                problem = "expected 'arguments' as an object"
        except (ValueError, RecursionError) as error:
            closing, problem = None, f"not JSON: {error}"
        if problem is not None or closing is None:
            problems.append(f"tool call at character {match.start()}: {problem}")
            search_from = match.end(1)
            continue
        calls.append({"type": "function", "function": {"name": value["name"], "arguments": value["arguments"]}})
        kept.append(text[position : match.start()])
        position = search_from = closing.end()
    kept.append(text[position:])
    return ParsedReply("".join(kept), calls, problems)
