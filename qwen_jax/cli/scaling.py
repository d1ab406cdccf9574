"""`qwen-jax scaling`: laws fitted to tables of runs, and what they predict. `scaling sweep` is in its own file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_jax.errors import InputError

Mapping = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=COLUMN")]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit a scaling law to a table of runs. Writes law.json and pictures to the output folder, if one is given.

    Args:
        runs: CSV or Parquet file with a row for each run. See docs/scaling.md for its columns.
        law: loss is L = E + A / N^a + B / D^b.
        columns: Names of columns in the file, such as params=N tokens=D*1e9.
        where: Only rows with these values, such as dataset=c4.
        output: Folder of law.json and the pictures.
        json: Print the law as a JSON object.
    """

    runs: Path
    law: Literal["loss"] = "loss"
    columns: Mapping = ()
    where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE")] = ()
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    json: bool = False

    def run(self) -> int:
        return {"loss": _fit_loss}[self.law](self)


def _fit_loss(options: Fit) -> int:
    raise InputError("Not there yet.")
