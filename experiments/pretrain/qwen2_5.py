"""The pre-training recipes of the Qwen2.5 technical report (arXiv:2412.15115, sections 3.2 and 3.3), stage by stage.

    qwen-jax train pretrain --config experiments/pretrain/qwen2_5.py:standard --set data.web-4k=DIR data.code-4k=DIR ...
    qwen-jax train pretrain --config experiments/pretrain/qwen2_5.py:turbo    --set ...
    qwen-jax train pretrain --config experiments/pretrain/qwen2_5.py:million  --set ...

`million` is that of the open 1M-token models (arXiv:2501.15383, section 3.2).

The reports give lengths, RoPE bases and the share of rows at the maximal length. They give neither steps, nor batch
sizes, nor learning rates, nor mixture weights: those here are placeholders of a
usual size, to be set for the data at hand.
Each data set is built with the length of the stage that uses it, `web-4k` by `qwen-jax data build --length 4096`.
Hardware: meant for pods (see the meshes); `qwen-jax plan` says what fits. Nothing here has been run at full size.
"""

from qwen_jax.published import published
from train.config import RunConfig, Stage
from train.optimizer import Schedule
from train.step import StepConfig

# Rows of a step hold about this many tokens in every stage.
_TOKENS = 4 * 2**20


def _stage(
    steps: int,
    length: int,
    theta: float,
    mixture: dict[str, float],
    schedule: Schedule | None = None,
    mesh: dict[str, int] | None = None,
) -> Stage:
    """A stage after the first: the learning rate stays where the first one ended."""
    schedule = schedule or Schedule(steps, 3e-5, schedule="wsd")
    return Stage(schedule, length, _TOKENS // length, mixture, rope_theta=theta, mesh=mesh)


def standard() -> RunConfig:
    """All dense models but Turbo: 4,096 tokens with base 1e4, then 32,768 with base 1e6 (by ABF)."""
    return RunConfig(
        output="runs/qwen2.5-7b",
        model=published("qwen2.5-7b"),
        tokenizer="tokenizers/qwen2.5",
        data={name: f"data/{name}" for name in ("web-4k", "code-4k", "math-4k", "long-32k", "short-32k")},
        stages=(
            _stage(
                *(200_000, 4096, 1e4, {"web-4k": 0.7, "code-4k": 0.2, "math-4k": 0.1}),
                Schedule(200_000, 3e-4, warmup_steps=2000, final_fraction=0.1),
            ),
            _stage(5_000, 32_768, 1e6, {"long-32k": 0.4, "short-32k": 0.6}),
        ),
        mesh={"fsdp": 64, "tensor": 2},
    )


def _long(output: str, bases: dict[int, float], share: float) -> RunConfig:
    """Stages of growing length after `standard`.

    `long-N` holds documents of at least N tokens, so that each fills its rows; `short-N` shorter ones, packed. Where a
    step has fewer rows than there are devices, the context axis splits them: each of the 64 has 65,536 tokens in every
    stage.

    Args:
      output: folder of the run.
      bases: the RoPE base of each length.
      share: of rows at the maximal length.
    """
    meshes = {131_072: {"fsdp": 32, "context": 2}, 262_144: {"fsdp": 16, "context": 4}}
    return RunConfig(
        output=output,
        model=published("qwen2.5-7b"),
        tokenizer="tokenizers/qwen2.5",
        initial="runs/qwen2.5-7b/checkpoints/200000",
        data={f"{kind}-{n}": f"data/{kind}-{n}" for n in bases for kind in ("long", "short")},
        stages=tuple(
            _stage(1000, n, base, {f"long-{n}": share, f"short-{n}": 1 - share}, mesh=meshes.get(n, {"fsdp": 64}))
            for n, base in bases.items()
        ),
        step=StepConfig(remat="full"),
    )


def turbo() -> RunConfig:
    """Qwen2.5-Turbo: 32,768 to 262,144 tokens with base 1e7; 40% of the rows at the maximal length, 60% shorter."""
    return _long("runs/qwen2.5-turbo", {n: 1e7 for n in (32_768, 65_536, 131_072, 262_144)}, 0.4)


def million() -> RunConfig:
    """Qwen2.5-7B-1M: 65,536, 131,072 and 262,144 tokens with bases 1e6, 5e6 and 1e7; 75% at the maximal length.

    Up to a million tokens the model is extended by dual-chunk attention, without training: export it with
    `config.with_dual_chunk()`.
    """
    return _long("runs/qwen2.5-7b-1m", {65_536: 1e6, 131_072: 5e6, 262_144: 1e7}, 0.75)
