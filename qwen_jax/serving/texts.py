"""The endpoints that generate nothing: embeddings, scores, and the tokenizer."""

import base64
import secrets
import time
from typing import Any

import numpy as np

from qwen_jax.serving.chat import encode_conversation
from qwen_jax.serving.completions import encode_texts
from qwen_jax.serving.context import Context, in_thread, usage
from qwen_jax.serving.errors import ApiError, not_supported
from qwen_jax.serving.logprobs import token_bytes
from qwen_jax.serving.protocol import (
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    Rendering,
    ScoreRequest,
    TokenizeRequest,
)
from qwen_jax.serving.sampling import check_truncation


async def embeddings(context: Context, body: EmbeddingRequest) -> dict[str, Any]:
    """/v1/embeddings: a vector of unit length for each text."""
    engine, settings = context.engine, context.settings
    if context.adapter(body.model) is not None:
        raise ApiError("Embeddings are those of the model itself, not of an adapter.", param="model")
    if body.dimensions not in (None, engine.config.hidden_size):
        raise not_supported(f"dimensions: this model's vectors have {engine.config.hidden_size} numbers.", "dimensions")
    check_truncation(context, body.truncate_prompt_tokens)
    context.check_open()
    texts = await in_thread(lambda: encode_texts(context, body.input, special=True, param="input"))
    most = engine.max_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    prompts = [ids if most is None else ids[-most:] for _, ids in texts]
    _check_lengths(prompts, engine.max_length, "input")
    pooling = body.pooling or settings.pooling
    vectors = await context.on_device(lambda stopped: engine.embed(prompts, pooling, stopped=stopped), "input")
    vectors = np.asarray(vectors, np.float32)
    if body.normalize is not False:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if not np.isfinite(vectors).all():
        raise ApiError("The model's vectors are not finite: check the checkpoint (qwen-jax verify).", 500)
    as_text = body.encoding_format == "base64"

    def one(i: int, vector: np.ndarray) -> dict[str, Any]:
        numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
        return {"object": "embedding", "index": i, "embedding": numbers}

    data = await in_thread(lambda: [one(i, vector) for i, vector in enumerate(vectors)])
    return {
        "object": "list",
        "data": data,
        "model": context.name(body.model),
        "usage": usage(sum(map(len, prompts))),
    }


async def score(context: Context, body: ScoreRequest) -> dict[str, Any]:
    """/v1/score: a reward model's number for each text, in vLLM's form."""
    scorer = context.scorer
    context.check_open()
    context.adapter(body.model)
    given = [name for name in ("messages", "input", "text_1") if getattr(body, name) is not None]
    if len(given) != 1 or (body.text_2 is None) != (body.text_1 is None):
        raise ApiError("Give one of messages, input, or text_1 with text_2.", param=given[1] if given[1:] else None)
    if body.tools and not body.messages:
        raise ApiError("tools needs messages.", param="tools")
    texts = await in_thread(lambda: _scored_ids(context, body), given[0])
    _check_lengths(texts, scorer.config.context_length, given[0])
    scores = await context.on_device(lambda stopped: scorer.score(texts, stopped=stopped), given[0])
    return {
        "id": f"score-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": context.name(body.model),
        "data": [{"index": i, "object": "score", "score": float(x)} for i, x in enumerate(scores)],
        "usage": usage(sum(map(len, texts))),
    }


def _scored_ids(context: Context, body: ScoreRequest) -> list[list[int]]:
    """The texts of a request, as `qwen-jax score` encodes them; blocks."""
    tokenizer, most = context.tokenizer, context.settings.max_prompts
    if body.messages is not None:
        several = not isinstance(body.messages[0], Message)
        conversations: list[Any] = list(body.messages) if several else [body.messages]
        if len(conversations) > most:
            raise ApiError(f"messages has {len(conversations)} conversations, and this server's limit is {most}.")
        return [
            encode_conversation(
                tokenizer,
                messages,
                body.tools,
                Rendering(add_generation_prompt=False),
                where=f"messages[{i}]" if several else "messages",
            )
            for i, messages in enumerate(conversations)
        ]
    if body.input is not None:
        return [ids for _, ids in encode_texts(context, body.input, special=True, param="input")]
    pairs = [[x] if isinstance(x, str) else x or [] for x in (body.text_1, body.text_2)]
    prompts, answers = pairs if len(pairs[0]) > 1 else (pairs[0] * len(pairs[1]), pairs[1])
    if len(prompts) != len(answers) or len(prompts) > most:
        raise ApiError(
            f"text_1 has {len(pairs[0])} texts and text_2 has {len(pairs[1])}; expected as many, or one text_1 for "
            f"all, and at most {most}.",
            param="text_2",
        )
    return [
        [*tokenizer.encode(prompt), *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_id]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _check_lengths(texts: list[list[int]], longest: int, param: str) -> None:
    for i, ids in enumerate(texts):
        if len(ids) > longest:
            raise ApiError(
                f"This model's maximum context length is {longest} tokens. Text {i} of {param} has {len(ids)}.",
                param=param,
                code="context_length_exceeded",
            )


async def tokenize(context: Context, body: TokenizeRequest) -> dict[str, Any]:
    """/tokenize: the ids of a text or of a conversation."""
    context.adapter(body.model)
    tokenizer = context.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("Give either prompt or messages.", param="prompt")
    for name in ("tools", *Rendering.model_fields):
        # OpenAI's clients send an empty list of tools for none, and false for what is off.
        if body.prompt is not None and getattr(body, name):
            raise ApiError(f"{name} needs messages.", param=name)

    def encode() -> list[int]:
        if body.messages is None:
            return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        return encode_conversation(tokenizer, body.messages, body.tools, body)

    ids = await in_thread(encode, "prompt" if body.messages is None else "messages")
    names = [token_bytes(tokenizer, i).decode("utf-8", "replace") for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": context.service.max_length, "tokens": ids, "token_strs": names}


async def detokenize(context: Context, body: DetokenizeRequest) -> dict[str, Any]:
    """/detokenize: the text of ids."""
    context.adapter(body.model)
    tokenizer = context.tokenizer
    return {"prompt": await in_thread(lambda: tokenizer.decode(body.tokens), "tokens")}
