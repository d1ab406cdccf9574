"""What the server is started with: the model that it serves, and its limits."""

import dataclasses

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.request import MAX_TOP_LOGPROBS
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.engine_protocol import EngineLike, Pooling, ScorerLike
from qwen_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Service:
    """The model behind a server: a language model or a reward model.

    Attributes:
      engine: of a language model.
      defaults: its sampling and lengths, from generation_config.json.
      scorer: of a reward model.
      scorer_tokenizer: its tokenizer; a language model's is that of the engine.
    """

    engine: EngineLike | None = None
    defaults: GenerationDefaults | None = None
    scorer: ScorerLike | None = None
    scorer_tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if (self.engine is None) == (self.scorer is None):
            raise InputError("A server has one model: give an engine or a scorer.")
        if (self.engine is None) != (self.defaults is None):
            raise InputError("An engine needs GenerationDefaults, and a scorer takes none.")

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.scorer_tokenizer if self.engine is None else self.engine.tokenizer

    @property
    def config(self) -> ModelConfig:
        model = self.engine or self.scorer
        assert model is not None
        return model.config

    @property
    def max_length(self) -> int:
        """Tokens that a text may have, prompt and completion together."""
        return self.config.context_length if self.engine is None else self.engine.max_length


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How a server answers.

    Attributes:
      served_names: names of the model in requests; the first one stands in answers.
      api_keys: any of them is accepted as a bearer token; none are needed if it is empty.
      allowed_origins: websites whose pages may call the server (CORS); none by default.
      pooling: of embeddings, where a request does not say.
      max_body_bytes: of a request.
      max_prompts: texts of one request.
      max_choices: `n` and `best_of`.
      max_logprobs: the most likely tokens at each place.
      max_stops: stop strings.
      max_waiting: requests in the engine's queue, beside those that start at once; and of requests for embeddings or
        scores, those that wait. Beyond it the answer is 503 with Retry-After.
      request_timeout: seconds that a request may take; 0 is no limit.
      body_timeout: seconds that a client may take to send a request.
      send_timeout: seconds that a client may take to read a piece of a stream.
      drain_timeout: seconds that running requests get after SIGTERM.
      log_interval: seconds between two lines about throughput in the log; 0 writes none.
    """

    served_names: tuple[str, ...] = ("model",)
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    pooling: Pooling = "mean"
    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 1024
    max_choices: int = 64
    max_logprobs: int = MAX_TOP_LOGPROBS
    max_stops: int = 16
    max_waiting: int = 1024
    request_timeout: float = 0.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0
    log_interval: float = 10.0

    def __post_init__(self) -> None:
        if not self.served_names or not all(self.served_names):
            raise InputError("Give at least one name under which the model is served, and none that is empty.")
        if not all(self.api_keys):
            raise InputError("An API key is empty. Give a key of some length, or none at all.")
        if not 0 <= self.max_logprobs <= MAX_TOP_LOGPROBS:
            raise InputError(f"max_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.max_logprobs}.")
        # Comparisons with NaN are false.
        for name in ("max_body_bytes", "max_prompts", "max_choices", "body_timeout", "send_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("max_stops", "max_waiting", "request_timeout", "drain_timeout", "log_interval"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a number that is not negative, got {getattr(self, name)}.")
