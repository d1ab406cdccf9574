"""Our half of the learning comparison: `train.run.pretrain` of `small.py`, once for each seed.

    python -m experiments.learning.ours --folder learning-run --seeds 0 1

Leaves `ours-SEED/` with the run's log, and in `ours-SEED/initial/` the weights that it began with, as a Hugging Face
folder, which `torch_loop.py` begins with too. `--set` changes fields of the configuration, as in `qwen-jax train
pretrain`.
"""

import argparse
from pathlib import Path

import jax

from convert.huggingface import export
from experiments.command import save_after
from experiments.learning.small import config
from qwen_jax.parallel.sharding import make_mesh
from train.config import RunConfig, set_fields
from train.run import pretrain
from train.state import init_state


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """What both halves are asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="learning-run", help="with the data; takes the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="change fields")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one seed may take")
    return parser


def configuration(args: argparse.Namespace, seed: int) -> RunConfig:
    """The run of a seed, with the changes of the command line."""
    run = config(args.folder, seed)
    run = set_fields(run, *args.set)
    return run


def save_initial(run: RunConfig) -> None:
    """Writes the weights that `pretrain` begins with, which are a function of the seed, unless they are there."""
    folder = Path(run.output) / "initial"
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(run.mesh_axes(0))
    with jax.set_mesh(mesh):
        export(init_state(run.next_token(0).model, run.optimizer_config(), run.seed, mesh).params, run.model, folder)


def main() -> None:
    parser = command_line(__doc__)
    args = parser.parse_args()
    for seed in args.seeds:
        run = configuration(args, seed)
        save_initial(run)
        # `pretrain` answers SIGTERM by saving; the same command goes on from there.
        timer = save_after(args.limit)
        try:
            stopped = pretrain(run)
        finally:
            timer.cancel()
        if stopped:
            raise SystemExit(f"Seed {seed} was not finished after {args.limit:g} s; the same command goes on with it.")


if __name__ == "__main__":
    main()
