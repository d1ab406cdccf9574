"""`qwen-jax quantize`: a checkpoint with weights of 4 or 8 bits."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_jax.cli.common import Count, sibling
from qwen_jax.units import binary_size


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Round the weights of a model to 4 or 8 bits, layer by layer, into a new Hugging Face folder.

    Which method? gptq and awq need a text (--calibration) and lose least at 4 bits: both choose the codes so that each
    layer's outputs on this text change little. gptq rounds one input after the other and corrects the rest; awq gives
    large inputs finer steps. rtn rounds each weight to the nearest code, at once and without a text. fp8 and int8 halve
    a bfloat16 model with hardly any loss; products then run in float8 or int8 where the hardware has them.

    Which group? So many inputs share a scale. Smaller groups lose less and take more bytes: 128 adds 0.16 bits to each
    weight of 4 bits, 32 adds 0.6. A group must divide the inputs of every projection.

    Which files? gptq and rtn write GPTQ files, awq writes AWQ files (both load in transformers, vLLM and SGLang), int8
    and fp8 write compressed-tensors (vLLM, SGLang); --format changes it. Embedding, head, norms, biases and routers
    stay as they are.

    The text should be like what the model will read. It is cut into 128 rows of 2,048 tokens, the first ones of the
    file; the original papers use as many. Experts that are sent few of them are named.

    One layer is in memory at a time, beside its inputs on all rows (4 bytes x rows x length x hidden size). Finished
    layers are kept in .NAME.quantize beside the new folder: the same command, after it was stopped, goes on with the
    next layer and gives the same bytes. quantize_report.json in the new folder has the error of every matrix.

    Usual calls: `qwen-jax quantize Qwen2.5-7B-Instruct Qwen2.5-7B-Int4 --method gptq --calibration text.jsonl`, and
    `qwen-jax quantize Qwen2.5-7B-Instruct Qwen2.5-7B-FP8 --method fp8`.

    Args:
        src: Checkpoint folder, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct.
        dst: The new folder.
        method: gptq, awq, rtn (nearest), fp8 or int8.
        bits: Of a weight; by default 4, and 8 for fp8 and int8.
        group: Inputs that share a scale, 0 for all of an output; by default 128, and 0 for fp8 and int8.
        calibration: Text file, or JSON lines (.jsonl) with a field text. With rtn, fp8 and int8 it only measures.
        calibration_rows: Rows of tokens.
        calibration_length: Tokens of a row.
        desc_act: gptq rounds the largest inputs first. Loses less, most of all with large groups; some kernels are
            slower with it, and vLLM since 0.30 reads it only with --group 0.
        sym: No zero points: the default except for awq.
        asym: Zero points: the codes of a group span its smallest to its largest weight. As GPTQ files these are of
            the version gptq_v2, which fewer programs read (vLLM does not).
        format: Of the files.
        damping: Of GPTQ, as a part of the mean diagonal of the Hessian. More is safer and corrects less.
        clip: awq searches how much of the range of a group is kept.
        batch: Rows that are run together; fewer need less memory.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NEW_DIR")]
    method: Literal["gptq", "awq", "rtn", "fp8", "int8"]
    bits: Literal[4, 8] | None = None
    group: Count = None
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    calibration_rows: int = 128
    calibration_length: int = 2048
    desc_act: bool = False
    sym: bool = False
    asym: bool = False
    format: Literal["gptq", "awq", "compressed-tensors"] | None = None
    damping: float = 0.01
    clip: bool = True
    batch: int = 8

    def run(self) -> int:
        from qwen_jax.errors import InputError

        if self.sym and self.asym:
            raise InputError("Give --sym or --asym, not both.")
        convert = sibling("convert.quantize")
        symmetric = True if self.sym else False if self.asym else None
        recipe = convert.Recipe(
            self.method, self.bits, self.group, symmetric, self.desc_act, self.format, self.damping, self.clip
        )
        text = None
        if self.calibration is not None:
            text = convert.CalibrationText(self.calibration, self.calibration_rows, self.calibration_length)
        report = convert.quantize(self.src, self.dst, recipe, text, batch=self.batch, progress=True)
        print(f"{self.dst}: {binary_size(report.bytes_after)}, from {binary_size(report.bytes_before)}")
        what = "outputs" if text is not None else "weights"
        print(f"Change of {what}, as a part of their norm (in brackets: by rounding to nearest)")
        for kind, (error, nearest) in report.by_kind().items():
            print(f"  {kind:10s} {error:.2%} ({nearest:.2%})")
        few = sum(outcome.all_rows for outcome in report.outcomes)
        if few:
            print(f"{few} matrices of experts saw too few tokens of their own and were given all of them.")
        return 0
