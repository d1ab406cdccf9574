"""Bodies of requests. Fields that are not listed here are refused."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError

from qwen_jax.inference.sampling import PENALTIES

MOST_TOKENS = 2**31 - 1
# Lists of objects are read in one go, in which nothing else runs: 0.3 s for these. A server's own limits are lower.
_MOST_ITEMS = 65_536
_MOST_MESSAGES = 16_384
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]


def _expect(what: str) -> WrapValidator:
    """Says what a union expects, in place of one complaint for each of its types."""

    def check(value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except pydantic.ValidationError:
            raise PydanticCustomError("wrong_type", "Input should be {what}", {"what": what}) from None

    return WrapValidator(check)


Texts = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(max_length=_MOST_ITEMS, fail_fast=True)],
    Field(union_mode="left_to_right"),
    _expect(
        f"a text, a list of texts, a list of token ids in [0, {MOST_TOKENS}], or a list of such lists; of at most "
        f"{_MOST_ITEMS} items"
    ),
]
TextOrTexts = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)],
    Field(union_mode="left_to_right"),
    _expect(f"a text or a list of at most {_MOST_ITEMS} texts"),
]

# Clients send an empty list for none.
Stops = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)],
    Field(union_mode="left_to_right"),
    _expect("a text or a list of texts"),
]
Schema = Annotated[dict[str, Any] | str, _expect("a JSON schema as an object or its text")]


class Body(BaseModel):
    """A JSON object without unknown fields, whose values have exactly the types declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    # Noise against guessing of texts by the size of encrypted packets: OpenAI's server adds it, this one never does.
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    # `schema` is a method of pydantic's.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's field: exactly one of these."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class Sampled(Body):
    """What /v1/completions and /v1/chat/completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    # Accepted and without effect: the prefix cache finds equal beginnings without a key.
    user: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's.
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


class CompletionRequest(Sampled):
    prompt: Texts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str | dict[str, Any], _expect("JSON text or an object")]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """A message. Parts of the content that are not text are refused later, by their type."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[dict[str, Any]], Field(max_length=_MOST_MESSAGES, fail_fast=True)] | None,
        _expect(f"a text or a list of at most {_MOST_MESSAGES} parts"),
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_MESSAGES, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    # What a client sends back of an answer, and lm-eval's mark of a text.
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    type: Literal["text"] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
Conversations = Annotated[
    Messages | Annotated[list[Messages], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)],
    Field(union_mode="left_to_right"),
    _expect("a conversation (a list of messages) or a list of conversations"),
]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Annotated[str, Field(min_length=1)]


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    _expect('"none", "auto", "required" or {"type": "function", "function": {"name": text}}'),
]


class Rendering(Body):
    """How the chat template renders messages, with vLLM's fields."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Sampled, Rendering):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Of OpenAI's service: accepted where they ask for nothing.
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class EmbeddingRequest(Body):
    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None


class ScoreRequest(Body):
    """One of `messages`, `input`, or `text_1` with `text_2`."""

    model: str | None = None
    messages: Conversations | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    input: Texts | None = None
    text_1: TextOrTexts | None = None
    text_2: TextOrTexts | None = None
    user: str | None = None


class TokenizeRequest(Rendering):
    """`prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Ids
