"""Run configurations of scaling laws: a base run with another size, batch, length and rate; and as a Python file."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.config import RunConfig, load
from train.files import write_file

# How laws count parameters, and what `ModelConfig.num_params` calls it.
COUNTED = {"total": "total", "with-head": "active", "non-embedding": "non_embedding"}


def configure(
    base: RunConfig,
    *,
    learning_rate: float,
    batch_tokens: float,
    tokens: float,
    model: ModelConfig | None = None,
    warmup: float | None = None,
    seed: int | None = None,
    output: str | None = None,
) -> RunConfig:
    """A run of one stage with the hyper-parameters that a sweep tries or a law predicts.

    The batch is rounded to whole rows, as many as the mesh and the accumulation of the base divide, and the tokens to
    whole steps. Warm-up and decay keep their shares of the steps.

    Args:
      base: has the data, the length of a row, the kind of the schedule and all else.
      learning_rate: the peak.
      batch_tokens: tokens of a step.
      tokens: of the run.
      model: by default the base's.
      warmup: share of the steps; by default the base's.
      seed, output: by default the base's.

    Raises:
      InputError: the base has several stages, fewer tokens than a batch, or a value that no run can have.
    """
    if len(base.stages) != 1:
        raise InputError(f"Expected a run of one stage, the configuration has {len(base.stages)}.")
    stage, schedule = base.stages[0], base.stages[0].schedule
    if not (batch_tokens > 0 and tokens > 0 and learning_rate > 0):
        raise InputError(
            f"A run needs a positive learning rate, batch and number of tokens, got {learning_rate}, {batch_tokens} "
            f"and {tokens}."
        )
    unit = rows_of_batch(base)
    rows = max(round(batch_tokens / (stage.length * unit)), 1) * unit
    if tokens < rows * stage.length:
        raise InputError(
            f"{tokens:,.0f} tokens are less than a batch of {rows * stage.length:,}. Give more tokens, a smaller "
            "batch, or a base with shorter rows, fewer micro-batches or fewer shards."
        )
    steps = round(tokens / (rows * stage.length))
    share = schedule.warmup_steps / schedule.steps if warmup is None else warmup
    # At least one step is between them.
    warmup_steps = min(round(share * steps), steps - 1)
    decay_steps = min(round(schedule.decay_steps / schedule.steps * steps), steps - 1 - warmup_steps)
    new = dataclasses.replace(
        schedule, steps=steps, learning_rate=learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps
    )
    return dataclasses.replace(
        base,
        output=base.output if output is None else output,
        model=base.model if model is None else model,
        stages=(dataclasses.replace(stage, schedule=new, batch_size=rows),),
        seed=base.seed if seed is None else seed,
    )


def rows_of_batch(base: RunConfig) -> int:
    """The rows of a batch are a multiple of this: micro-batches times the shards of the mesh."""
    mesh = base.mesh_axes(0)
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1)
    return base.step_config(0).accumulation * shards


def run_of_law(law: Mapping[str, Any], base: str, params: float | None, tokens: float) -> tuple[RunConfig, int]:
    """The run that a law of learning rate and batch size predicts.

    Args:
      law: the content of law.json.
      base: "FILE.py[:function]" of a run of one stage: model, data and all that the law says nothing of.
      params: model size, counted as the law counts; by default that of the base's model.
      tokens: of the run.

    Returns:
      The run, and the size of its model as the law counts it.

    Raises:
      InputError: a law of another kind or that does not state its counting; a size that is not that of the base's
        model.
    """
    from train.scaling.hyperparameters_law import predict

    if law.get("counting") not in COUNTED:
        raise InputError(
            f"The law does not state how it counts parameters ({law.get('counting')!r}), so the size of the model of "
            f"{base} is not known to it. Fit it again with --counting {', '.join(COUNTED)}."
        )
    config = load(base)
    size = counted(config.model, law["counting"])
    if params is not None and not 0.98 < params / size < 1.02:
        raise InputError(
            f"The model of {base} has {size:,} parameters as the law counts them ({law.get('counting')}), not "
            f"{params:,.0f}. Leave out --params, or change the model."
        )
    said = predict(law, size, tokens)
    return configure(config, learning_rate=said.learning_rate, batch_tokens=said.batch_tokens, tokens=tokens), size


def counted(model: ModelConfig, counting: str) -> int:
    """The size of a model, as a law counts parameters: a key of `COUNTED`."""
    return model.num_params()[COUNTED[counting]]


def write_run_config(path: Path, config: RunConfig, about: str = "A run of `qwen-jax train pretrain`.") -> None:
    """Writes a configuration as a Python file for `qwen-jax train pretrain --config`.

    Args:
      path: of the file; one that is there is replaced.
      config: of the run. Its values must be numbers, texts, tuples, mappings and dataclasses, as those of our own are.
      about: the docstring of the file.

    Raises:
      InputError: the file cannot be written, or a value has no source.
    """
    imports: dict[str, set[str]] = {}
    body = _source(config, imports, 1)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    quoted = about.replace("\\", "\\\\").replace('"""', "'''")
    text = f'"""{quoted}"""\n\n' + "\n".join(lines) + f"\n\n\ndef config() -> RunConfig:\n    return {body}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another path.") from None


def _source(value: Any, imports: dict[str, set[str]], depth: int) -> str:
    """A Python expression of a value; modules that it needs are added to `imports`."""
    pad, end = "    " * (depth + 1), "    " * depth
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        imports.setdefault(kind.__module__, set()).add(kind.__qualname__)
        given = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
        defaults = {f.name: _default(f) for f in dataclasses.fields(value)}
        parts = [f"{n}={_source(v, imports, depth + 1)}" for n, v in given if not _same(v, defaults[n])]
        short = f"{kind.__qualname__}({', '.join(parts)})"
        if len(short) + len(end) < 100 and "\n" not in short:
            return short
        return f"{kind.__qualname__}(\n" + "".join(f"{pad}{part},\n" for part in parts) + f"{end})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_source(v, imports, depth)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(_source(one, imports, depth) for one in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Fraction):
        imports.setdefault("fractions", set()).add("Fraction")
        return repr(value)
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(float(value)) if abs(value) != float("inf") and value == value else f"float({str(value)!r})"
    raise InputError(
        f"A {type(value).__name__} cannot be written as Python: {value!r}. Use a number, text or dataclass."
    )


def _default(field: "dataclasses.Field[Any]") -> Any:
    """What a field has if it is not given; the field itself, which equals no value, if it must be given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
