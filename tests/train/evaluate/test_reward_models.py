"""Reward benchmarks: the published forms are read, and the published formulas hold."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.evaluate import reward_figures, reward_models
from train.evaluate import reward_sets as rewards


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(text: str) -> dict[str, Any]:
    return {"llm_name": "a model", "answer": text, "score": 1.0}


USER = [{"role": "user", "content": "Why?", "language": "English"}]


def write_all(root: Path) -> None:
    """A few items of each benchmark. The length of an answer is to be its score."""
    subsets = [name for of in rewards.SECTIONS.values() for name in of]
    core = [
        {"prompt": "Why?", "chosen": "xx", "rejected": "x" if i % 2 else "xxx", "subset": name, "id": i}
        for i, name in enumerate(subsets)
    ]
    write(root / "reward_bench/data/filtered-00000-of-00001.parquet", core)
    write(root / "reward_bench/data/raw-00000-of-00001.parquet", core * 2)
    for name in rewards.PRIOR_SETS:
        row = {"prompt": USER, "chosen": "xx", "rejected": "x", "subset": "else"}
        write(root / f"reward_bench_prior/data/{name}-00000-of-00001-0a.parquet", [row])
    for goal in ("Helpfulness/Chat/Discussion", "Harmlessness/S1"):
        pair = {"pair_uid": "7", "conversation_input": USER, "chosen": answer("xx"), "reject": answer("x")}
        lost = {**pair, "pair_uid": "8", "chosen": answer("x"), "reject": answer("xx")}
        best = {"bon_uid": "7", "conversation_input": USER, "bon_best": answer("xxx")}
        losers = [answer("x"), answer("xx")]
        write(root / f"rmb/Pairwise_set/{goal}.json", [pair, pair | {"pair_uid": "9"}, lost])
        rows = [{**best, "loser_list": losers}, {**best, "bon_uid": "8", "loser_list": [*losers, answer("xxx")]}]
        write(root / f"rmb/BoN_set/{goal}.json", rows)
    votes = [
        {"question_id": str(i), "prompt": "Why?", "response_1": "x", "response_2": "xx", "winner": winner}
        for i, winner in enumerate(["model_a", "model_b", "model_b", "tie", "tie (bothbad)"])
    ]
    write(root / "ppe/human_preference/test.parquet", votes)
    for part in list(rewards.PPE_PARTS)[1:]:
        responses = {"response_1": "x", "response_2": "xx", "response_3": "xxx"}
        row = {"question_id": "1", "prompt": "Why?", "scores": [False, True, False], **responses}
        write(root / f"ppe/{part}/data.parquet", [{**row, "sampled_conflict_pairs": [[0, 1], [1, 2]]}])
    chat = [{"role": "user", "content": "Why?"}]
    row = {name: [*chat, {"role": "assistant", "content": name[:6]}] for name in ("chosen", "rejected")}
    write(root / "preference/mine/test.jsonl", [row])


def encode(prompt: Any, text: str) -> list[int]:
    return [len(prompt), *text.encode()]


def by_length(texts: Any) -> list[float]:
    return [float(len(text)) for text in texts]


def run(root: Path, out: Path, score: Any = by_length, **more: Any) -> dict[str, Any]:
    sets = rewards.find_sets(root)
    return reward_models.evaluate_rewards(
        sets, encode, score, out, {"model": "m"}, **{"longest": 100, "draws": 50, **more}
    )


def values(summary: dict[str, Any], benchmark: str) -> dict[str, float]:
    return {name: figure["value"] for name, figure in summary["benchmarks"][benchmark]["figures"].items()}


# --- the published formulas ---

# Table 15 of arXiv:2412.15115, two of its columns.
PUBLISHED = {
    "reward-bench": [[95.80, 87.10, 91.50, 93.60, 92.00], [97.50, 85.70, 95.10, 98.10, 94.10]],
    "rmb": [[48.85, 68.70, 50.92, 70.84, 59.83], [61.02, 75.28, 52.00, 69.96, 64.57]],
    "ppe": [[59.28, 62.66, 56.56, 65.12, 49.15, 69.69, 60.64], [64.32, 63.40, 59.14, 69.73, 55.62, 70.20, 63.62]],
}


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_totals_are_those_of_the_published_table(benchmark: str) -> None:
    """From the published numbers of sections, columns and parts follow the published totals."""
    names = reward_figures.TABLE[benchmark]
    for row in PUBLISHED[benchmark]:
        given = dict(zip(names, row, strict=True))
        means: dict[str, np.ndarray] = {}
        for name, value in given.items():
            if name in rewards.SECTIONS:
                means |= {part: np.array([value]) for part in rewards.SECTIONS[name]}
            elif benchmark == "rmb" and "(" in name:
                goal, kind = name.rstrip(")").split(" (")
                means[f"{kind}_set/{goal}/x"] = np.array([value])
            elif benchmark == "ppe" and name != "Objective-Avg":
                part = next(part for part, shown in rewards.PPE_PARTS.items() if shown == name)
                means[part] = np.array([value] if part == "human_preference" else [value, 1.0, 0, 0, 0])
        found = reward_figures.figures(benchmark, means, dict.fromkeys(means, 1))
        for name, value in given.items():
            assert float(found[name]) == pytest.approx(value, abs=0.0051), name


# Rewards of the chosen and the rejected answer and the verdict, as RMB's repository records them for ArmoRM-Llama3-8B
# (eval/result/ArmoRM-Llama3-8B-v0.1_result.json, pairs 9218 to 9254, some of them).
RECORDED = [
    (0.1767578125, 0.169921875, 1),
    (0.1923828125, 0.203125, 0),
    (0.1865234375, 0.1708984375, 1),
    (0.125, 0.1669921875, 0),
    (0.154296875, 0.125, 1),
    (0.162109375, 0.1669921875, 0),
    (0.2109375, 0.1904296875, 1),
]


@pytest.mark.parametrize(("chosen", "rejected", "right"), RECORDED)
def test_verdicts_are_those_that_rmb_records(chosen: float, rejected: float, right: int) -> None:
    ranking = rewards.Ranking("1", "Pairwise_set/Helpfulness/x", (), ("a", "b"), ((0, 1),))
    assert reward_figures.item_row(ranking, [chosen, rejected]).tolist() == [right]


def test_sections_weight_subsets_by_their_published_numbers() -> None:
    """math-prm counts as much as all six sets of code; the prior sets count as half a section."""
    rng = print_seed()
    means = {part: rng.random(1) for of in rewards.SECTIONS.values() for part in of}
    means |= {part: rng.random(1) for part in rewards.PRIOR_SETS}
    found = reward_figures.figures("reward-bench", means, {})
    code = np.mean([means[part][0] for part in means if part.startswith("hep-")])
    assert float(found["Reasoning"]) == pytest.approx((means["math-prm"][0] + code) / 2)
    easy, length, hard = (means[f"alpacaeval-{name}"][0] for name in ("easy", "length", "hard"))
    bench = 28 * means["mt-bench-easy"][0] + 40 * means["mt-bench-med"][0]
    assert float(found["Chat"]) == pytest.approx((100 * easy + 95 * length + 95 * hard + bench) / 358)
    prior = np.mean([means[part][0] for part in rewards.PRIOR_SETS])
    sections = [float(found[name]) for name in rewards.SECTIONS]
    assert float(found["Score with Prior Sets"]) == pytest.approx((2 * sum(sections) + prior) / 9)
    # A set that is missing is no zero: the figure is that of the others, or none.
    del means["math-prm"], means["donotanswer"]
    rest = reward_figures.figures("reward-bench", means, {})
    assert float(rest["Reasoning"]) == pytest.approx(code)
    assert "math-prm has 0 of 447" in reward_figures.incomplete("reward-bench", dict.fromkeys(means, 1))["Reasoning"]
    assert "Score" not in reward_figures.figures("reward-bench", {"math-prm": np.array([1.0])}, {})


def test_best_of_k_is_the_mean_over_all_subsets() -> None:
    rng = print_seed()
    for n in (1, 4, 7):
        # Few values, so that there are ties.
        scores, right = rng.integers(0, 4, n).astype(float), rng.integers(0, 2, n).astype(float)
        curve = reward_figures.best_of_k(scores, right)
        for k in range(1, n + 1):
            subsets = [list(chosen) for chosen in itertools.combinations(range(n), k)]
            best = [right[[i for i in of if scores[i] == scores[of].max()]].mean() for of in subsets]
            assert curve[k - 1] == pytest.approx(np.mean(best))


def test_intervals_cover_and_shrink() -> None:
    """The interval of a mean covers the truth about 95 times of 100, and is that of the normal law."""
    rng = print_seed()
    inside = 0
    for trial in range(200):
        rows = (rng.random((150, 1)) < 0.7).astype(float)
        low, high = np.quantile(reward_figures.resampled_means(rows, 300, trial, "x"), (0.025, 0.975))
        inside += low <= 0.7 <= high
    # Four standard deviations of a binomial with p = 0.94, and 300 draws are few.
    assert 174 <= inside <= 200


# --- whole runs ---


def test_all_benchmarks_with_an_answer_for_each_item(tmp_path: Path) -> None:
    write_all(tmp_path / "data")
    summary = run(tmp_path / "data", tmp_path / "out")
    subsets = [name for of in rewards.SECTIONS.values() for name in of]
    won = {name: bool(i % 2) for i, name in enumerate(subsets)}
    bench = values(summary, "reward-bench")
    for section, weights in rewards.SECTIONS.items():
        expected = sum(weights[name] for name in weights if won[name]) / sum(weights.values())
        assert bench[section] == pytest.approx(expected)
    assert bench["Prior Sets"] == 1.0
    rmb = values(summary, "rmb")
    # A tie with the best of n is not right.
    assert rmb["Helpfulness (BoN)"] == rmb["Harmlessness (BoN)"] == 0.5
    assert rmb["Helpfulness (Pairwise)"] == pytest.approx(2 / 3)
    assert summary["benchmarks"]["rmb"]["ties"] == 2
    ppe = values(summary, "ppe")
    assert ppe["Human Preference"] == pytest.approx(2 / 3)
    assert ppe["MATH"] == ppe["Objective-Avg"] == ppe["MATH: AUC"] == 0.5
    assert ppe["MATH: best of 3"] == 0.0
    assert ppe["MATH: greatest best of k"] == pytest.approx(1 / 3)
    assert values(summary, "preference") == {"mine": 0.0}
    # What is told of the data.
    assert all(not of["missing"] for of in summary["benchmarks"].values())
    assert "alpacaeval-easy has 1 of 100" in summary["benchmarks"]["reward-bench"]["figures"]["Chat"]["incomplete"]
    for of in summary["benchmarks"].values():
        assert all(len(file["sha256"]) == 64 for file in of["files"].values())
        assert not any("raw-" in name for name in of["files"])
    table = (tmp_path / "out/table.md").read_text()
    assert "| Helpfulness (BoN) | 50.00 |" in table
    assert "| Chat | 34.36* |" in table


def test_a_killed_run_goes_on_and_leaves_the_same_files(tmp_path: Path) -> None:
    """No text is scored twice, in one run or after an interruption; results are byte-identical."""
    write_all(tmp_path / "data")
    run(tmp_path / "data", tmp_path / "whole")
    scored: list[tuple[int, ...]] = []

    def dies(texts: Any) -> list[float]:
        if len(scored) >= 2:
            raise KeyboardInterrupt
        scored.extend(tuple(text.tolist()) for text in texts)
        return by_length(texts)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data", tmp_path / "killed", dies, group=2)
    with (tmp_path / "killed/scores.jsonl").open("a") as file:
        file.write('{"text": "cut')

    def lives(texts: Any) -> list[float]:
        scored.extend(tuple(text.tolist()) for text in texts)
        return by_length(texts)

    run(tmp_path / "data", tmp_path / "killed", lives, group=2)
    assert len(scored) == len({*scored})
    for name in ("results.jsonl", "summary.json", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_items_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Published files may name two items alike; both count."""
    rows = [{"prompt": "Why?", "chosen": "x" * n, "rejected": "xx", "id": "7"} for n in (1, 3)]
    write(tmp_path / "data/preference/mine.jsonl", rows)
    assert values(run(tmp_path / "data", tmp_path / "out"), "preference") == {"mine": 0.5}
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["mine.jsonl/7", "mine.jsonl/7#2"]


def test_what_is_too_long_or_missing_is_said_and_no_zero(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "x" * n, "rejected": "x"} for n in (5, 500)]
    write(tmp_path / "data/preference/mine.jsonl", rows)
    summary = run(tmp_path / "data", tmp_path / "out")
    found = summary["benchmarks"]["preference"]
    assert values(summary, "preference") == {"mine": 1.0}
    assert (found["too_long"], found["items"]) == (1, 2)
    assert set(summary["benchmarks"]) == {"preference"}
    assert len(summary["missing"]["rmb"]) == 4
    assert "IFEval" in " ".join(summary["missing"]["ppe"])
    problem = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()][1]
    assert problem["score"] is None
    assert "501 tokens" in problem["problem"]
    with pytest.raises(InputError, match=r"No data of a reward benchmark was found(.|\n)*reward_bench"):
        run(tmp_path / "nowhere", tmp_path / "else")


@pytest.mark.parametrize(
    ("path", "row", "message"),
    [
        (
            "reward_bench/filtered.jsonl",
            {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "d"},
            "no subset 'd'",
        ),
        ("reward_bench/filtered.jsonl", {"prompt": "a", "chosen": "b", "subset": "math-prm"}, "column rejected"),
        ("rmb/BoN_set/Helpfulness/x.json", {"conversation_input": USER, "bon_best": "x"}, "'answer'"),
        ("rmb/Pairwise_set/Helpfulness/x.json", {"conversation_input": []}, "conversation_input"),
        ("ppe/human_preference/x.jsonl", {"prompt": "a", "winner": "b"}, "winner"),
        ("ppe/math/x.jsonl", {"prompt": "a", "scores": [1, 2]}, "whether it is right"),
        ("ppe/math/x.jsonl", {"prompt": "a", "scores": [1, 0], "response_1": "a"}, "response_2"),
    ],
)
def test_another_form_names_file_and_record(tmp_path: Path, path: str, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "data" / path, [row])
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "data", tmp_path / "out")
    assert Path(path).name in str(error.value)
    assert str(error.value).split(":")[0].endswith(" 1")
