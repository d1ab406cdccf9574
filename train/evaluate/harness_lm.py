"""lm-eval's interface over a model of ours. Imported only where lm-eval is installed; see `train.evaluate.harness`."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from train.evaluate.encoding import stop_cut
from train.evaluate.task import Generate, Loglikelihood, Model, Request, Response, Rolling

MAX_TOKENS = 256
"""Of an answer, where a task does not say."""
# Stands before a conversation in JSON, for models that format it themselves.
_MESSAGES = "<QWENJAXMESSAGES>"
# The names that tasks give the number of tokens, the first one counts.
_MAX_TOKENS_NAMES = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"

Answer = Callable[[Sequence[Request]], Sequence[Response]]


class UnansweredError(InputError):
    """Requests of a task have no answer, so that it has no score."""


class HarnessLM(LM):
    """What lm-eval's tasks ask, as requests to a `Model`.

    Args:
      model: in this process or at a URL.
      tokenizer: formats conversations; None if the model formats them itself.
      answer: answers requests, in order; by default the model does. `train.evaluate.store.Store` keeps the responses.
      seed: of sampled texts.

    Attributes:
      truncated: by task, the items with an answer that was cut at its longest length.
      prompts_cut: by task, the items whose prompts were longer than the model's context.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None = None, answer: Answer | None = None, seed: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._answer = answer or (lambda requests: ask(model, requests))
        self.truncated: defaultdict[str, set[Any]] = defaultdict(set)
        self.prompts_cut: defaultdict[str, set[Any]] = defaultdict(set)

    # --- requests ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether they are what greedy decoding gives."""
        asked = [Loglikelihood(*request.args) for request in requests]
        return [(_logprob(x), x.greedy) for x in self._answers(asked, requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts."""
        asked = [Rolling(request.args[0]) for request in requests]
        return [_logprob(x) for x in self._answers(asked, requests)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, as `generate_request` asks for them."""
        seen: dict[str, int] = {}
        asked = []
        for request in requests:
            context, kwargs = request.args
            # The samples of one prompt have seeds of their own, whatever else is asked.
            key = json.dumps([context, kwargs], sort_keys=True, default=str)
            seen[key] = seen.get(key, -1) + 1
            asked.append(generate_request(_prompt(context), kwargs, _seed(self.seed, key, seen[key])))
        found = self._answers(asked, requests)
        return [stop_cut(x.text, request.stop) for x, request in zip(found, asked, strict=True)]

    def _answers(self, asked: Sequence[Request], requests: Sequence[Instance]) -> Sequence[Response]:
        found = self._answer(asked)
        failed = [(request, x) for request, x in zip(requests, found, strict=True) if x.error is not None]
        if failed:
            request, response = failed[0]
            raise UnansweredError(
                f"{len(failed)} of {len(asked)} requests have no answer, so their tasks have no score. The first is of "
                f"task {request.task_name}, item {request.doc_id}: {response.error}"
            )
        for request, response in zip(requests, found, strict=True):
            if response.finish == "length":
                self.truncated[request.task_name].add(request.doc_id)
            if response.prompt_cut:
                self.prompts_cut[request.task_name].add(request.doc_id)
        return found

    # --- conversations ---

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt. Without a generation prompt, the last message goes on."""
        if self.tokenizer is None:
            if not add_generation_prompt:
                raise InputError(f"{self.model.name} formats conversations itself and goes on with no last message.")
            return _MESSAGES + json.dumps(chat_history)
        text = self.tokenizer.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rindex(last.strip())
        whole = text[at : at + len(last.lstrip())] == last.lstrip()
        return text[: at + len(last.lstrip() if whole else last.strip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which lm-eval writes with the results."""
        if not chat_template or self.tokenizer is None:
            return ""
        return self.tokenizer.chat_template.source()

    @property
    def tokenizer_name(self) -> str:
        """A name that differs where ids or the template differ."""
        if self.tokenizer is None:
            return self.model.name
        template = hashlib.sha256((self.chat_template(True) or "").encode()).hexdigest()[:12]
        return f"{self.tokenizer.fingerprint()[:12]}-{template}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model."""
        return {"model_identity": dict(self.model.identity())}


def ask(
    model: Model, requests: Sequence[Request], done: Callable[[int, Response], None] | None = None
) -> list[Response]:
    """The responses of a model, in order.

    Args:
      model: answers.
      requests: of any kinds.
      done: called with each, as soon as it is there.

    Raises:
      RuntimeError: the model has left a request without a response.
    """
    found: dict[int, Response] = {}

    def take(i: int, response: Response) -> None:
        found[i] = response
        if done is not None:
            done(i, response)

    if requests:
        model.answer(requests, take)
    if len(found) < len(requests):
        raise RuntimeError(f"{model.name} answered {len(found)} of {len(requests)} requests.")
    return [found[i] for i in range(len(requests))]


def generate_request(prompt: Any, kwargs: Mapping[str, Any], seed: int) -> Generate:
    """A request for a text from the `generation_kwargs` of a task.

    Args:
      prompt: text or messages.
      kwargs: until, the number of tokens under one of its names (256 where none is given), do_sample, temperature,
        top_p. Without do_sample, a temperature above 0 samples.
      seed: if the text is sampled.

    Raises:
      InputError: an argument that is not known: a text made without it would not be what the task asks for.
    """
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    sizes = [rest.pop(name, None) for name in _MAX_TOKENS_NAMES]
    size = next((x for x in sizes if x is not None), MAX_TOKENS)
    temperature = float(rest.pop("temperature", None) or 0.0)
    sampled = rest.pop("do_sample", None)
    if sampled is True and not temperature:
        temperature = 1.0
    elif sampled is False:
        temperature = 0.0
    top_p = float(rest.pop("top_p", None) or 1.0)
    unknown = {name: value for name, value in rest.items() if value is not None}
    if unknown:
        raise InputError(
            f"A task asks for texts with {', '.join(sorted(unknown))}, which models here do not have. Expected until, "
            f"{', '.join(_MAX_TOKENS_NAMES)}, do_sample, temperature and top_p: change the task's generation_kwargs."
        )
    if not temperature:
        top_p, seed = 1.0, 0
    return Generate(prompt, int(size), tuple(x for x in until if x), temperature, top_p, seed)


def _prompt(context: str) -> Any:
    return tuple(json.loads(context[len(_MESSAGES) :])) if context.startswith(_MESSAGES) else context


def _seed(seed: int, key: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {key}".encode()).digest()[:4], "big")


def _logprob(response: Response) -> float:
    assert response.logprob is not None
    return response.logprob
