"""The reward that a reward model gives, computed on the mesh."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.scorer import Scorer, check_scores
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.tokenizer import Tokenizer, render_example

if TYPE_CHECKING:
    from train.tuned import Formats


class RewardModelReward:
    """The score of a conversation under a reward model, in its last token, as `qwen-jax score` computes it.

    Messages are rendered with the chat template of the reward model, with the tools in the column `tools`; a plain
    prompt and its completion are scored at the end-of-text token. A response that was cut has no end that could be
    scored, and gives no signal by default, nor does a conversation that is longer than the context of the reward model.

    Every process that has devices of the mesh must call it with the same texts.
    """

    def __init__(
        self,
        model: str,
        formats: "Formats",
        mesh: Mesh,
        policy_tokenizer: Tokenizer,
        dtype: str | None = None,
        tokens_per_batch: int = 16_384,
        unfinished: float | None = None,
    ):
        """
        Args:
          model: checkpoint folder of a reward model, or Hub id.
          formats: reads it; the command line gives that of `convert`.
          mesh: that the model is put on, from `make_mesh`.
          policy_tokenizer: of the policy, which the reward model must share.
          dtype: to compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
          tokens_per_batch: tokens that are run at a time.
          unfinished: the reward of a response that was cut; None for no signal.

        Raises:
          InputError: a language model, a reward model of another tokenizer, or one that does not fit the mesh.
        """
        # Everything that can be wrong is checked before the weights are loaded.
        config, tokenizer, _ = formats.describe(model)
        check_scores(config)
        check_tokenizers(tokenizer, policy_tokenizer, model)
        Sharding.for_inference(config, mesh)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
        params = formats.load(model, config, mesh, dtype, stacked=False)
        self._config: ModelConfig = config
        self._tokenizer, self._unfinished = tokenizer, unfinished
        self._scorer = Scorer(config, params, mesh, dtype=dtype, tokens_per_batch=tokens_per_batch)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], finished: Sequence[bool], **columns: Any
    ) -> list[float | None]:
        """The scores, or None for no signal."""
        tools = columns.get("tools", [None] * len(prompts))
        rewards: list[float | None] = [self._unfinished] * len(prompts)
        scored, texts = [], []
        for i, ended in enumerate(finished):
            if not ended:
                continue
            ids = conversation_ids(self._tokenizer, prompts[i], completions[i], tools[i])
            rewards[i] = None
            if len(ids) <= self._config.context_length:
                scored.append(i)
                texts.append(ids)
        for i, score in zip(scored, self._scorer.score(texts), strict=True):
            rewards[i] = float(score)
        return rewards


def check_tokenizers(reward: Tokenizer, policy: Tokenizer, model: str) -> None:
    """Raises InputError if a reward model has another tokenizer than the policy."""
    if reward.fingerprint() != policy.fingerprint():
        raise InputError(
            f"The reward model {model} has another tokenizer ({reward.vocab_size} tokens) than the policy "
            f"({policy.vocab_size} tokens): it was trained on other tokens. Give a reward model that was trained from "
            "the policy's family; `qwen-jax train reward` makes one."
        )


def conversation_ids(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, Any]],
    completion: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The token ids of a prompt and its completion, with the end that is scored, as `qwen-jax score` has them.

    Args:
      tokenizer: of the reward model.
      prompt: a text, or messages.
      completion: the text of the answer.
      tools: of the conversation.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        return [*ids, *tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_id]
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return render_example(tokenizer, messages, tools or None, open_calls=True).ids
