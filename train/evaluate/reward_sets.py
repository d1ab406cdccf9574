"""Benchmarks of reward models: which files they have, and the answers that a reward model is to rank.

Four benchmarks are read from below a data root, in the forms in which they are published:

| name | folder | content |
|---|---|---|
| reward-bench | reward_bench | allenai/reward-bench (`filtered`); allenai/pref-test-sets in reward_bench_prior |
| rmb | rmb | RMB_dataset of Zhou-Zoey/RMB-Reward-Model-Benchmark: Pairwise_set and BoN_set |
| ppe | ppe | lmarena-ai/PPE-*: one folder for each of `PPE_PARTS` |
| preference | preference | a folder or file for each set of pairs: prompt, chosen, rejected |

Sources: RewardBench (Lambert et al. 2024, arXiv:2403.13787), RMB (Zhou et al. 2024, arXiv:2410.09893), PPE (Frick et
al. 2024, arXiv:2410.14872).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import Row, find_tables, read_rows
from train.evaluate.task import Message

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        # math-prm has 447 pairs, and counts as much as all of the code.
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""RewardBench's sections: the weight of each subset, which is its number of pairs but for math-prm."""

REWARD_BENCH_COUNTS: Mapping[str, int] = {
    **{name: count for subsets in SECTIONS.values() for name, count in subsets.items()},
    "math-prm": 447,
}
"""Pairs of each subset of RewardBench as published."""

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
"""The sets of earlier work that RewardBench's leaderboard counts together with weight 0.5."""

PPE_PARTS: Mapping[str, str] = {
    "human_preference": "Human Preference",
    "ifeval": "IFEval",
    "gpqa": "GPQA",
    "math": "MATH",
    "mbpp_plus": "MBPP-Plus",
    "mmlu_pro": "MMLU-Pro",
}
"""Folders below `ppe`, and the column of the report's table that each fills."""

_FORMATS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A prompt with answers that a reward model is to rank.

    Attributes:
      id: in its benchmark, the same in every run.
      part: of the benchmark, such as a subset of RewardBench.
      prompt: messages before the answer.
      answers: texts.
      pairs: (better, worse) indices of answers; each pair is one comparison.
      right: for each answer whether it is correct, where the benchmark says so; () elsewhere.
    """

    id: str
    part: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    right: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class RewardSet:
    """What was found of a benchmark.

    Attributes:
      name: of the benchmark.
      files: that were found, in order.
      missing: what of it is not there, in words.
      read: reads the rankings of a file.
    """

    name: str
    files: tuple[Path, ...]
    missing: tuple[str, ...]
    read: Callable[[Path], Iterator[Ranking]]


def find_sets(root: Path) -> list[RewardSet]:
    """Looks for the benchmarks below a data root; what is not there is named in `missing`, and read as nothing.

    Args:
      root: folder with the folders of the benchmarks.
    """
    return [_reward_bench(root), _rmb(root), _ppe(root), _preference(root)]


def _reward_bench(root: Path) -> RewardSet:
    place = root / "reward_bench_prior"
    # The data set has the splits raw and filtered; the benchmark is the latter.
    core = [path for path in _tables(root / "reward_bench") if not path.name.startswith("raw")]
    prior = _tables(place)
    found = {name: [path for path in prior if _set_name(path, place, name)] for name in PRIOR_SETS}
    missing = [] if core else [f"{root / 'reward_bench'}: the split filtered of allenai/reward-bench"]
    missing += [f"{place}: {name} of allenai/pref-test-sets" for name, paths in found.items() if not paths]
    names = {path: name for name, paths in found.items() for path in paths}

    def read(path: Path) -> Iterator[Ranking]:
        for row in read_rows(path):
            # The prior sets have a column subset of another meaning.
            part = names.get(path) or _text(row, "subset")
            if path not in names and part not in REWARD_BENCH_COUNTS:
                raise InputError(
                    f"{row.where}: RewardBench has no subset {part!r}. Expected one of "
                    f"{', '.join(REWARD_BENCH_COUNTS)}."
                )
            yield _pair(row, f"{part}/{row.values.get('id', row.number)}", part)

    return RewardSet("reward-bench", (*core, *names), tuple(missing), read)


def _set_name(path: Path, folder: Path, name: str) -> bool:
    """Whether a file is of a set: its name or the name of a folder on the way begins so."""
    return any(part == name or part.startswith((f"{name}-", f"{name}.")) for part in path.relative_to(folder).parts)


def _rmb(root: Path) -> RewardSet:
    folder = root / "rmb"
    files = [path for path in _tables(folder) if {"Pairwise_set", "BoN_set"} & {*path.relative_to(folder).parts}]
    missing = []
    for kind in ("Pairwise_set", "BoN_set"):
        for goal in ("Helpfulness", "Harmlessness"):
            if not any({kind, goal} <= {*path.relative_to(folder).parts} for path in files):
                missing.append(f"{folder / kind / goal}: that folder of RMB_dataset")

    def read(path: Path) -> Iterator[Ranking]:
        parts = path.relative_to(folder).with_suffix("").parts
        kind = "Pairwise_set" if "Pairwise_set" in parts else "BoN_set"
        part = "/".join(parts[parts.index(kind) :])
        for row in read_rows(path):
            prompt = _messages(row, "conversation_input")
            if kind == "Pairwise_set":
                answers = [_answer(row, name, row.values.get(name)) for name in ("chosen", "reject")]
            else:
                answers = [_answer(row, "bon_best", row.values.get("bon_best")), *_losers(row)]
            pairs = tuple((0, i) for i in range(1, len(answers)))
            uid = row.values.get("pair_uid" if kind == "Pairwise_set" else "bon_uid", row.number)
            yield Ranking(f"{part}/{uid}", part, prompt, tuple(answers), pairs)

    return RewardSet("rmb", tuple(files), tuple(missing), read)


def _ppe(root: Path) -> RewardSet:
    folder = root / "ppe"
    found = {part: _tables(folder / part) for part in PPE_PARTS}
    missing = [f"{folder / part}: PPE's {PPE_PARTS[part]}" for part, paths in found.items() if not paths]
    parts = {path: part for part, paths in found.items() for path in paths}

    def read(path: Path) -> Iterator[Ranking]:
        part = parts[path]
        for row in read_rows(path):
            made = _human(row, part) if part == "human_preference" else _correctness(row, part)
            if made is not None:
                yield made

    return RewardSet("ppe", tuple(parts), tuple(missing), read)


def _preference(root: Path) -> RewardSet:
    folder = root / "preference"
    files = _tables(folder)
    missing = () if files else (f"{folder}: files of pairs with prompt, chosen and rejected",)

    def read(path: Path) -> Iterator[Ranking]:
        part = path.relative_to(folder).parts[0].partition(".")[0]
        for row in read_rows(path):
            yield _pair(row, f"{path.relative_to(folder)}/{row.values.get('id', row.number)}", part)

    return RewardSet("preference", tuple(files), missing, read)


def _tables(folder: Path) -> list[Path]:
    """Files of records below a folder, in order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    named = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(_FORMATS)]
    # What download tools and `datasets` leave beside the data.
    kept = [p for p in named if not p.name.startswith((".", "dataset_info", "state", "dataset_dict"))]
    kept = [p for p in kept if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return find_tables(kept) if kept else []


def _pair(row: Row, name: str, part: str) -> Ranking:
    """A prompt with a chosen and a rejected answer; these are texts, or conversations with the prompt in them."""
    values = row.values
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        first, second = _messages(row, "chosen"), _messages(row, "rejected")
        if len(first) < 2 or first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
            raise InputError(f"{row.where}: expected chosen and rejected to end with a message of the assistant.")
        return Ranking(name, part, first[:-1], (first[-1]["content"], second[-1]["content"]), ((0, 1),))
    return Ranking(name, part, _prompt(row), (_text(row, "chosen"), _text(row, "rejected")), ((0, 1),))


def _human(row: Row, part: str) -> Ranking | None:
    """A vote between two answers; None for a tie, which PPE's accuracy leaves out."""
    names = ("response_1", "response_2") if "response_1" in row.values else ("response_a", "response_b")
    winner = row.values.get("winner")
    if isinstance(winner, str) and winner.startswith("tie"):
        return None
    if winner not in ("model_a", "model_b"):
        raise InputError(f"{row.where}: expected winner to be model_a, model_b or a tie, got {winner!r}.")
    answers = tuple(_text(row, name) for name in names)
    pair = (0, 1) if winner == "model_a" else (1, 0)
    # A question may have been asked of several pairs of models.
    return Ranking(f"{part}/{row.values.get('question_id', '')}/{row.number}", part, _prompt(row), answers, (pair,))


def _correctness(row: Row, part: str) -> Ranking:
    """Answers of one model that are right or wrong."""
    right = row.values.get("scores")
    if not isinstance(right, list) or not right or not all(value in (0, 1) for value in right):
        raise InputError(f"{row.where}: expected scores to list for each response whether it is right.")
    answers = tuple(_text(row, f"response_{i + 1}") for i in range(len(right)))
    pairs = []
    for pair in row.values.get("sampled_conflict_pairs") or []:
        if len(pair) != 2 or not all(isinstance(i, int) and 0 <= i < len(right) for i in pair):
            raise InputError(f"{row.where}: expected sampled_conflict_pairs of two responses each, got {pair!r}.")
        first, second = pair
        if right[first] == right[second]:
            raise InputError(f"{row.where}: the pair {pair} of sampled_conflict_pairs is no conflict: equal scores.")
        pairs.append((first, second) if right[first] else (second, first))
    name = f"{part}/{row.values.get('question_id', '')}/{row.values.get('model_name', '')}/{row.number}"
    return Ranking(name, part, _prompt(row), answers, tuple(pairs), tuple(map(bool, right)))


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise InputError(
            f"{row.where}: expected a text in the column {column}, got {type(value).__name__}; its columns are "
            f"{', '.join(map(str, row.values))}."
        )
    return value


def _prompt(row: Row) -> tuple[Message, ...]:
    """The column prompt: a text, which is a message of the user, or messages."""
    if isinstance(row.values.get("prompt"), list):
        return _messages(row, "prompt")
    return ({"role": "user", "content": _text(row, "prompt")},)


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row.values.get(column)
    if (
        not isinstance(value, list)
        or not value
        or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    ):
        raise InputError(f"{row.where}: expected messages with role and content in the column {column}.")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _answer(row: Row, column: str, value: Any) -> str:
    if not isinstance(value, Mapping) or not isinstance(value.get("answer"), str):
        raise InputError(f"{row.where}: expected an object with a text 'answer' in the column {column}.")
    return value["answer"]


def _losers(row: Row) -> Sequence[str]:
    value = row.values.get("loser_list")
    if not isinstance(value, list) or not value:
        raise InputError(f"{row.where}: expected answers in the column loser_list.")
    return [_answer(row, "loser_list", one) for one in value]
