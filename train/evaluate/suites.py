"""Suites: the benchmarks of the Qwen2.5 report with its numbers of solved examples, and which of them can run here.

The lists are those of "Qwen2.5 Technical Report" (arXiv:2412.15115), sections 5.1 and 5.2; numbers of shots that it
does not repeat are those of the evaluation of Qwen2 (arXiv:2407.10671, section 5.1). Prompts are those of lm-eval or
ours, and not the team's: scores are comparable with one another, and with the report's only as far as prompts allow.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from qwen_jax.errors import InputError

Side = Literal["ours", "lm-eval", "none"]
"""Who has the task; "none" if nobody here has it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A benchmark of a suite.

    Attributes:
      benchmark: its name in the report.
      part: of the report's tables.
      side: who has the task.
      task: its name there; "" if nobody has it.
      shots: solved examples in a prompt, in the report.
      data: for tasks of lm-eval, the data sets on the Hub, which are folders below the data root.
      note: how what runs here differs from the report.
    """

    benchmark: str
    part: str
    side: Side
    task: str
    shots: int
    data: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Some benchmarks.

    Attributes:
      name: what `--tasks` calls it.
      chat: whether prompts have the form of a conversation.
      entries: in the order of the report.
    """

    name: str
    chat: bool
    entries: tuple[Entry, ...]


def _theirs(benchmark: str, part: str, task: str, shots: int, *data: str, note: str = "") -> Entry:
    return Entry(benchmark, part, "lm-eval", task, shots, data, note)


def _ours(benchmark: str, part: str, task: str, shots: int, note: str = "") -> Entry:
    return Entry(benchmark, part, "ours", task, shots, (), note)


def _none(benchmark: str, part: str, shots: int, note: str) -> Entry:
    return Entry(benchmark, part, "none", "", shots, (), note)


_PLUS = "EvalPlus, the mean of HumanEval(+) and MBPP(+)"
# Its Python is HumanEval itself.
_MULTIPL_E = ("cpp", "java", "php", "typescript", "csharp", "bash", "javascript")
_M3EXAM = ("afrikaans", "chinese", "italian", "javanese", "portuguese", "swahili", "thai", "vietnamese")
_CODES = {"typescript": "ts", "csharp": "cs", "bash": "sh", "javascript": "js"}
_MGSM = "lm-eval's tag holds solutions in each language and in English"
_GPQA = "which of its sets is not stated; the main set here"

_BASE = Suite(
    "qwen2.5-base",
    False,
    (
        _theirs("MMLU", "general", "mmlu", 5, "cais/mmlu"),
        _theirs("MMLU-Pro", "general", "mmlu_pro", 5, "TIGER-Lab/MMLU-Pro"),
        _theirs(
            "MMLU-redux",
            "general",
            "mmlu_redux_generative",
            5,
            "fxmarty/mmlu-redux-2.0-ok",
            note="lm-eval's is generative and of version 2.0, without questions that are marked as wrong",
        ),
        _theirs("BBH", "general", "bbh_cot_fewshot", 3, "SaylorTwift/bbh"),
        _theirs("ARC-C", "general", "arc_challenge", 25, "allenai/ai2_arc"),
        _theirs("TruthfulQA", "general", "truthfulqa_mc2", 0, "truthfulqa/truthful_qa"),
        _theirs("WinoGrande", "general", "winogrande", 5, "allenai/winogrande"),
        _theirs("HellaSwag", "general", "hellaswag", 10, "Rowan/hellaswag"),
        _theirs("GPQA", "mathematics and science", "gpqa_main_n_shot", 5, "Idavidrein/gpqa", note=_GPQA),
        _ours("TheoremQA", "mathematics and science", "theorem_qa", 5),
        _theirs("GSM8K", "mathematics and science", "gsm8k", 4, "openai/gsm8k"),
        _theirs("MATH", "mathematics and science", "minerva_math", 4, "EleutherAI/hendrycks_math"),
        _ours("HumanEval", "coding", "humaneval", 0, _PLUS),
        _ours("HumanEval+", "coding", "humaneval_plus", 0, _PLUS),
        _ours("MBPP", "coding", "mbpp", 0, _PLUS),
        _ours("MBPP+", "coding", "mbpp_plus", 0, _PLUS),
        *(
            _ours(f"MultiPL-E {language}", "coding", f"multipl_e_humaneval_{_CODES.get(language, language)}", 0)
            for language in _MULTIPL_E
        ),
        *(
            _ours(f"M3Exam {language}", "multilingual exams", f"m3exam_{language}", 5)
            for language in (
                "afrikaans",
                "chinese",
                "italian",
                "javanese",
                "portuguese",
                "swahili",
                "thai",
                "vietnamese",
            )
        ),
        _none("IndoMMLU", "multilingual exams", 3, "neither here nor in lm-eval"),
        _none("ruMMLU", "multilingual exams", 5, "neither here nor in lm-eval"),
        _theirs(
            "translated MMLU", "multilingual exams", "m_mmlu", 5, "alexandrainst/m_mmlu", note="Okapi's translations"
        ),
        _theirs("Belebele", "multilingual understanding", "belebele", 5, "facebook/belebele"),
        _theirs("XCOPA", "multilingual understanding", "xcopa", 5, "cambridgeltl/xcopa"),
        _theirs("XWinograd", "multilingual understanding", "xwinograd", 5, "Muennighoff/xwinograd"),
        _theirs("XStoryCloze", "multilingual understanding", "xstorycloze", 0, "juletxara/xstory_cloze"),
        _theirs("PAWS-X", "multilingual understanding", "pawsx", 5, "google-research-datasets/paws-x"),
        _theirs("MGSM", "multilingual mathematics", "mgsm_cot_native", 8, "juletxara/mgsm", note=_MGSM),
        _none("Flores-101", "multilingual translation", 5, "flores_chat_SOURCE_TARGET here is for chat models"),
    ),
)

_INSTRUCT = Suite(
    "qwen2.5-instruct",
    True,
    (
        _theirs("MMLU-Pro", "general", "mmlu_pro", 5, "TIGER-Lab/MMLU-Pro"),
        _theirs("MMLU-redux", "general", "mmlu_redux_generative", 0, "fxmarty/mmlu-redux-2.0-ok", note="version 2.0"),
        _ours("LiveBench 0831", "general", "live_bench_2408", 0),
        _theirs("GPQA", "mathematics and science", "gpqa_main_cot_zeroshot", 0, "Idavidrein/gpqa", note=_GPQA),
        _ours("MATH", "mathematics and science", "math_instruct", 0),
        _theirs("GSM8K", "mathematics and science", "gsm8k", 4, "openai/gsm8k"),
        _ours("HumanEval", "coding", "humaneval_instruct", 0),
        _ours("MBPP", "coding", "mbpp_instruct", 0),
        *(
            _ours(
                f"MultiPL-E {language}", "coding", f"multipl_e_humaneval_{_CODES.get(language, language)}_instruct", 0
            )
            for language in _MULTIPL_E
            if language != "csharp"
        ),
        _none("MultiPL-E csharp", "coding", 0, "the sandbox cannot run its tests"),
        _ours("LiveCodeBench 2305-2409", "coding", "live_code_bench_2305_2409", 0),
        _ours("IFEval strict-prompt", "alignment", "ifeval_chat", 0),
        _ours("Arena-Hard", "alignment", "arena_hard", 0),
        _ours("MT-Bench", "alignment", "mt_bench", 0),
        _theirs("KMMLU", "multilingual", "kmmlu", 5, "HAERAE-HUB/KMMLU"),
        _theirs("TurkishMMLU", "multilingual", "turkishmmlu", 5, "AYueksel/TurkishMMLU"),
        _theirs("Okapi MMLU", "multilingual", "m_mmlu", 5, "alexandrainst/m_mmlu"),
        *(
            _ours(f"MGSM {language}", "multilingual", f"mgsm_chat_{language}", 0)
            for language in ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
        ),
        _none("AMMLU, JMMLU, IndoMMLU", "multilingual", 5, "neither here nor in lm-eval"),
        _none("multilingual IFEval", "multilingual", 0, "the report's own translations, which are not published"),
        _none("BLEnD", "multilingual", 0, "neither here nor in lm-eval"),
    ),
)

SUITES = {suite.name: suite for suite in (_BASE, _INSTRUCT)}


def suite(name: str) -> Suite:
    """The suite of a name. Raises InputError if there is none."""
    if name not in SUITES:
        raise InputError(f"No suite is called {name}; expected {' or '.join(SUITES)}.")
    return SUITES[name]


FilesOf = Callable[[str], Sequence[str] | None]
"""The paths below the data root that a task of ours reads, by its name; None if there is no such task."""


def missing(entry: Entry, root: Path | None, files_of: FilesOf) -> str | None:
    """Why a benchmark cannot run here; None if it can.

    Args:
      entry: of a suite.
      root: the data root; None if there is none.
      files_of: what tasks of ours read.
    """
    if entry.side == "none":
        return f"no task: {entry.note}"
    paths = entry.data
    if entry.side == "ours":
        found = files_of(entry.task)
        if found is None:
            return f"no task: {entry.task} is not registered"
        paths = tuple(found)
    if root is None:
        return f"no data: give --data-root with {', '.join(paths)}" if paths else None
    absent = [path for path in paths if not (root / path).exists()]
    return f"no data: expected {', '.join(str(root / path) for path in absent)}" if absent else None
