"""What one caller asks of the scheduler: a prompt, how to sample, and what ends the text."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen_jax.errors import InputError
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.sampling import SamplingParams, as_int, as_number

if TYPE_CHECKING:
    from qwen_jax.inference.structured import Grammar

MAX_TOP_LOGPROBS = 20
"""The most likely tokens that a request may ask for at each place, as in OpenAI's API."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to generate. Requests with several choices are several of these with other seeds.

    Attributes:
      prompt: token ids, at least one.
      ending: what ends the text.
      sampling: how tokens are sampled; its `seed` alone determines the random numbers, whatever runs beside it.
        Log-probabilities of sampled tokens are always returned.
      logprob_temperature: log-probabilities are those of the softmax of the logits divided by it: 1 is the model's own.
        With the temperature of `sampling` they are those of the distribution that a token was drawn from, if nothing
        else changes it.
      presence_penalty: subtracted from the logits of tokens that the text has, in [-2, 2]. The prompt does not count.
      frequency_penalty: the same, times how often the text has the token.
      logit_bias: added to the logits of single tokens, in [-100, 100].
      min_tokens: end ids, also those of a grammar, are not sampled before the text has this many tokens, and a
        stop string in the text of these does not end it. A text that its grammar has completed ends all the same.
      top_logprobs: how many of the most likely tokens are returned for each sampled token, and for each token of the
        prompt with `prompt_logprobs`.
      prompt_logprobs: whether log-probabilities of the prompt's tokens are returned. Such a prompt is read whole.
      grammar: what the text must match, or None.
      adapter: name of a LoRA adapter, or None for the model itself.
      cache_salt: the beginning of its prompt is shared in the prefix cache with requests of the same salt only, so that
        nobody else can find out by the time of an answer that it was read before. None shares it with all without one.
      continues: whether it goes on with a text that has just ended here, such as the next turn of a conversation. It
        starts before waiting requests that do not, so that its beginning is still in the prefix cache.

    Raises:
      InputError: a value of another type, or out of range.
    """

    prompt: tuple[int, ...]
    ending: Ending
    sampling: SamplingParams = SamplingParams()
    logprob_temperature: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    grammar: "Grammar | None" = None
    adapter: str | None = None
    cache_salt: str | None = None
    continues: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("The prompt is empty. Give at least one token.")
        prompt = tuple(self.prompt)
        # A prompt may have a million ids, and usually all of them are integers.
        if {*map(type, prompt)} != {int}:
            prompt = tuple(as_int(token, "A token id of the prompt") for token in prompt)
        object.__setattr__(self, "prompt", prompt)
        for name in ("presence_penalty", "frequency_penalty"):
            value = as_number(getattr(self, name), name)
            object.__setattr__(self, name, value)
            if not -2 <= value <= 2:
                raise InputError(f"{name} must be in [-2, 2], got {value}.")
        temperature = as_number(self.logprob_temperature, "logprob_temperature")
        object.__setattr__(self, "logprob_temperature", temperature)
        if not 1e-5 <= temperature <= 1e5:
            raise InputError(f"logprob_temperature must be in [1e-5, 1e5], got {temperature}.")
        bias = {as_int(k, "A token id of logit_bias"): as_number(v, "logit_bias") for k, v in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)
        if wrong := [(k, v) for k, v in bias.items() if k < 0 or not -100 <= v <= 100]:
            raise InputError(f"logit_bias needs ids and numbers in [-100, 100], got {wrong[0][0]}: {wrong[0][1]}.")
        if not (self.cache_salt is None or (isinstance(self.cache_salt, str) and self.cache_salt)):
            raise InputError(f"cache_salt must be a text that is not empty, or None; got {self.cache_salt!r}.")
        for name, most in (("min_tokens", self.ending.max_new_tokens), ("top_logprobs", MAX_TOP_LOGPROBS)):
            value = as_int(getattr(self, name), name)
            if not 0 <= value <= most:
                raise InputError(f"{name} must be in [0, {most}], got {value}.")

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens the prompt or the text has."""
        return bool(self.presence_penalty or self.frequency_penalty or self.sampling.repetition_penalty != 1)
