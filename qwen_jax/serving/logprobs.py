"""Log-probabilities in the two forms of OpenAI's API: of chats, and of completions."""

from collections.abc import Sequence
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import TokenInfo
from qwen_jax.tokenizer import StreamDecoder, Tokenizer

# JSON has no infinity; OpenAI's API says this number where a token cannot be.
_LOWEST = -9999.0


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The UTF-8 bytes of a token, perhaps part of a character. A row of padding is named by its id."""
    try:
        return tokenizer.token_bytes(token)
    except InputError:
        return f"<|id_{token}|>".encode()


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if logprob >= _LOWEST else _LOWEST


def of_chat(tokenizer: Tokenizer, tokens: Sequence[TokenInfo], top: int) -> dict[str, Any]:
    """The object "logprobs" of a chat's choice.

    Args:
      tokenizer: of the model.
      tokens: with the most likely ones at each place.
      top: how many of them.
    """

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    content = [
        {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top[:top]]} for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Makes the objects "logprobs" of a completion's choice, whose text offsets go on from piece to piece.

    Args:
      tokenizer: of the model.
      top: how many of the most likely tokens.
      offset: of the first token, in characters.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int = 0) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, offset
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)

    def piece(
        self, tokens: Sequence[TokenInfo | None], ids: Sequence[int] | None = None, prompt: int = 0
    ) -> dict[str, Any]:
        """The object for the next tokens.

        Args:
          tokens: None where there is no log-probability: for the first token of a prompt.
          ids: of the tokens, where some of them are None.
          prompt: how many of them are of an echoed prompt, whose text has its control tokens too.
        """
        control = set(self._tokenizer.control_ids.values()) if prompt else set()
        names, offsets = [], []
        for i, token in enumerate(tokens):
            token_id = token.id if token is not None else (ids or [])[i]
            names.append(self._name(token_id))
            offsets.append(self._offset)
            if 0 <= token_id < self._tokenizer.vocab_size:
                text = self._decoder.push([token_id])
                self._offset += len(text)
                if i < prompt and token_id in control and not text.endswith(names[-1]):
                    self._offset += len(names[-1])
        return {
            "tokens": names,
            "token_logprobs": [None if token is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token is None else self._tops(token) for token in tokens],
            "text_offset": offsets,
        }

    def _tops(self, token: TokenInfo) -> dict[str, float]:
        """The most likely tokens, and always the token itself."""
        pairs = [*token.top[: self._top], (token.id, token.logprob)]
        return {self._name(token_id): finite(logprob) for token_id, logprob in pairs}

    def _name(self, token_id: int) -> str:
        r"""The text of a token. Part of a character is written as bytes:\xe4, so that no two tokens are mixed up."""
        data = token_bytes(self._tokenizer, token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
