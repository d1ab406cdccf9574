"""`qwen-jax score`: scores conversations with a reward model, or a model's answers to prompts with reward functions."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwen_jax.cli.common import DType, ModelOption, ModelPosition, model_name, parse, sibling
from qwen_jax.cli.formats import CheckpointFormats
from qwen_jax.cli.lines import read_lines
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.tokenizer import Tokenizer

# The columns of a record: each of them is one text.
_FORMS = ("messages",), ("prompt", "completion"), ("text",)
# Lines that are scored before their results are printed.
_GROUP = 1024
# Options that only the scoring of a model's own answers has.
_OF_ANSWERS = {"--prompts", "--reward", "--samples", "--config"}


def score(argv: Sequence[str]) -> int:
    """Runs `Score`; or `train.grpo_command`, where the options are its own."""
    names = {argument.partition("=")[0] for argument in argv}
    if not names & _OF_ANSWERS:
        return int(parse(Score, "score", argv).run())
    if "--input" in names:
        raise InputError(
            f"--input has conversations that a reward model scores, {min(names & _OF_ANSWERS)} belongs to prompts that "
            "a model answers. Leave one of them out."
        )
    return int(sibling("train.grpo_command").score(argv, CheckpointFormats()))


@dataclasses.dataclass(frozen=True)
class Score:
    """Score conversations with a reward model: one JSON object a line, with line, score and tokens.

    Each line of the input is a JSON object: {"messages": [...]}, perhaps with "tools"; {"prompt": ..., "completion":
    ...}, both texts or both messages; or {"text": ...}. Messages are rendered with the chat template, without an
    opening for a further answer. A plain completion is scored at the end-of-text token, a plain text at its last token.

    With --prompts, a language model answers, and reward functions score its answers, for the order of prompts in GRPO:
    qwen-jax score --model DIR --prompts FILE --reward NAME --samples 8 --output FILE. For the options of this use:
    qwen-jax score --prompts FILE --help.

    Args:
        folder: Checkpoint folder of a reward model, or Hub id.
        model: The same, as an option.
        input: A file of JSON lines; "-" is standard input.
        output: Write the scores to this file instead of printing them; it appears when it is complete.
        dtype: To compute in; by default the checkpoint's own on a GPU or TPU, float32 on a CPU.
        mesh: Devices to spread over, such as data=2.
        tokens_per_batch: Tokens to run at a time. Changes scores by rounding only.
    """

    folder: ModelPosition = None
    model: ModelOption = None
    input: Annotated[str, tyro.conf.arg(metavar="FILE")] = "-"
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    dtype: DType | None = None
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    tokens_per_batch: Annotated[int, tyro.conf.arg(metavar="N")] = 16_384

    def run(self) -> int:
        name = model_name(self.folder, self.model)
        import jax

        from qwen_jax.config import load_config
        from qwen_jax.hub import SMALL, is_hub_id, resolve
        from qwen_jax.inference.scorer import Scorer, check_scores
        from qwen_jax.parallel.sharding import Sharding, make_mesh, parse_mesh
        from qwen_jax.tokenizer import load_tokenizer

        # Everything that can be wrong is checked before the weights are loaded.
        mesh = make_mesh(parse_mesh(self.mesh))
        small = resolve(name, SMALL)
        config, tokenizer = load_config(small), load_tokenizer(small)
        check_scores(config)
        Sharding.for_inference(config, mesh)
        texts = list(_read(self.input, tokenizer, config.context_length))
        # The scores, some lines at a time.
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
        config, params = sibling("convert").load(name if is_hub_id(name) else small, mesh, dtype)
        scorer = Scorer(config, params, mesh, dtype=dtype, tokens_per_batch=self.tokens_per_batch)
        lines = []
        for start in range(0, len(texts), _GROUP):
            part = texts[start : start + _GROUP]
            for (line, ids), score in zip(part, scorer.score([ids for _, ids in part]), strict=True):
                lines.append(json.dumps({"line": line, "score": float(score), "tokens": len(ids)}, allow_nan=False))
                if self.output is None:
                    print(lines[-1], flush=True)
        if self.output is not None:
            try:
                sibling("train.files").write_file(self.output, "".join(line + "\n" for line in lines).encode())
            except OSError as error:
                raise InputError(f"Cannot write {self.output}: {error.strerror}. Give another file.") from None
        return 0


def _read(name: str, tokenizer: "Tokenizer", longest: int) -> Iterator[tuple[int, list[int]]]:
    """Number and token ids of each line that is not blank."""
    if name != "-" and not Path(name).is_file():
        raise InputError(f"The input file {name} does not exist. Give a file of JSON lines, or - for standard input.")
    empty = True
    with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
        for number, line in enumerate(read_lines(file, "Standard input" if name == "-" else name), 1):
            if not line.strip():
                continue
            empty = False
            try:
                ids = _encode(line, tokenizer)
                if not 0 < len(ids) <= longest:
                    raise InputError(
                        f"expected 1 to {longest} tokens, the model's context, got {len(ids)}. Shorten the text, or "
                        "leave it out."
                    )
            except InputError as error:
                where = "Standard input" if name == "-" else name
                raise InputError(f"{where}, line {number}: {error}") from None
            yield number, ids
    if empty:
        raise InputError(f"{'Standard input' if name == '-' else name} is empty. Expected a JSON object on each line.")


def _encode(line: str, tokenizer: "Tokenizer") -> list[int]:
    """The token ids of a record; the last one is where it is scored."""
    from qwen_jax.tokenizer import parse_tool_arguments, render_example

    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}). Expected an object.") from None
    seen = sorted(record) if isinstance(record, dict) else []
    found = [form for form in _FORMS if set(form) <= set(seen)]
    if len(found) != 1:
        raise InputError(
            f"expected the keys {' or '.join(' and '.join(form) for form in _FORMS)}, one of these; found "
            f"{', '.join(seen) or type(record).__name__}."
        )
    values = [record[key] for key in found[0]]
    texts = [isinstance(value, str) for value in values]
    wrong = (found[0] == ("messages",) and texts[0]) or (found[0] == ("text",) and not texts[0])
    if wrong or len(set(texts)) > 1:
        raise InputError(f"expected {' and '.join(found[0])} as {_EXPECTED[found[0]]}.")
    if texts[0]:
        if record.get("tools"):
            raise InputError("'tools' stands beside plain text, which has no chat template. Give messages.")
        if found[0] == ("text",):
            return tokenizer.encode(values[0])
        prompt, completion = values
        return [*tokenizer.encode(prompt), *tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_id]
    messages = [message for part in values for message in (part if isinstance(part, list) else [part])]
    tools = record.get("tools") or None
    if any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        # As the answers of pairs are encoded in training.
        return render_example(tokenizer, messages, tools).ids
    return tokenizer.encode_chat(parse_tool_arguments(messages), tools, add_generation_prompt=False)


_EXPECTED = {
    ("messages",): "a list of messages",
    ("prompt", "completion"): "texts, or both as lists of messages",
    ("text",): "a text",
}
