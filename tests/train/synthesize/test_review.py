"""Labels of pairs: what is shown to whom, what survives a crash, and what is exported."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from tests.helpers.review import open_review, prefer, request, text_rows, values, write_rows
from tests.helpers.runs import print_seed
from train.data.examples import read_examples
from train.synthesize.review import COMMENT_CHARACTERS, Labels, Review, export, left_and_right, open_labels
from train.synthesize.review_pairs import read_pairs

ROOT = Path(__file__).parents[3]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# One record of each form of preference pairs; the prompts, and answers that repeat them, are as treacherous as may be.
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q ", "chosen": "Q Q yes", "rejected": "Q no"},
    "texts without a prompt": {"chosen": "Who? I am", "rejected": "Who? You are"},
    "messages": {"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")], "tools": "[]"},
    "messages with their prompt": {
        "chosen": [user("Q"), assistant("a"), user("R"), assistant("yes")],
        "rejected": [user("Q"), assistant("a"), user("R"), assistant("no"), user("why"), assistant("so")],
    },
    "as in UltraFeedback": {
        "prompt": "Q",
        "chosen": [user("Q"), assistant("yes")],
        "rejected": [user("Q"), assistant("no")],
    },
    "tools": {
        "prompt": [user("Q")],
        "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
        "rejected": [assistant("no")],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_exported_is_what_was_read(form: str, turned: bool, tmp_path: Path) -> None:
    """Readers of pairs find the same answers, the preferred one first; other columns stay, and all labels."""
    record = {**FORMS[form], "source": {"n": 1}, "margin": 0.5}
    path = write_rows(tmp_path / "pairs.jsonl", [record])
    review = open_review(path)
    (pair,) = review.pairs
    (before,) = read_examples([path], "pairs")
    prefer(review, "ann", pair, pair.ids[turned], comment="so")
    counts = export(review, tmp_path / "out.jsonl")
    assert (counts.written, counts.turned) == (1, int(turned))
    (after,) = read_examples([tmp_path / "out.jsonl"], "pairs")
    assert after.answers == before.answers[:: -1 if turned else 1]
    assert after.unread == {"source", "labels"}
    assert after.margin == (0.0 if turned else 0.5)
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["source"] == {"n": 1}
    (label,) = row["labels"]
    assert (label["labeller"], label["overall"], label["comment"]) == ("ann", "chosen", "so")
    assert set(label["criteria"].values()) == {"chosen"}


@pytest.mark.parametrize("messages", [False, True])
def test_candidates_are_shown_pairwise(messages: bool, tmp_path: Path) -> None:
    """Each two different responses once; an answer that repeats the prompt keeps it, in a file that is read again."""
    responses = ["Q?", "no", "Q?", "maybe"]
    record = {"prompt": [user("Q?")] if messages else "Q?", "responses": responses, "topic": "t"}
    path = write_rows(tmp_path / "candidates.jsonl", [record])
    found = read_pairs(path)
    assert found.left_out() == "2 repeated (shown once), 1 of equal responses (left out)"
    review = open_review(path)
    for pair in review.pairs:
        prefer(review, "ann", pair, pair.ids[1])
    assert export(review, tmp_path / "out.jsonl").turned == 0  # The file prefers none of them.
    read = [[_text(answer) for answer in raw.answers] for raw in read_examples([tmp_path / "out.jsonl"], "pairs")]
    assert read == [["no", "Q?"], ["maybe", "Q?"], ["maybe", "no"]]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "chosen", "rejected", "topic", "labels"} for row in rows)


def _text(answer: Any) -> str:
    return str(answer.completion if hasattr(answer, "completion") else answer.messages[-1]["content"])


def test_parquet(tmp_path: Path) -> None:
    """The same pairs as in JSON lines have the same keys."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [user(str(i))], "chosen": [assistant("a")], "rejected": [assistant("b")]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    lines = read_pairs(write_rows(tmp_path / "pairs.jsonl", rows))
    assert [pair.key for pair in read_pairs(tmp_path / "pairs.parquet").pairs] == [pair.key for pair in lines.pairs]


def test_order_is_random_and_always_the_same(tmp_path: Path) -> None:
    """For each labeller half of the pairs are turned, independently of the file and of other labellers."""
    rng = print_seed()
    seed, n = int(rng.integers(2**31)), 2000
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", text_rows(n))).pairs
    turned = {name: [left_and_right(pair, name, seed) == pair.ids for pair in pairs] for name in ("ann", "bob", "ann ")}
    for sides in turned.values():
        assert abs(sum(sides) / n - 0.5) < 6 * 0.5 / n**0.5
    same = sum(a == b for a, b in zip(turned["ann"], turned["bob"], strict=True))
    assert abs(same / n - 0.5) < 6 * 0.5 / n**0.5
    assert [left_and_right(pair, "ann", seed) == pair.ids for pair in pairs] == turned["ann"]
    assert [left_and_right(pair, "ann", seed + 1) == pair.ids for pair in pairs] != turned["ann"]
    # The file's own preference neither changes the order nor is it sent.
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in text_rows(n)]
    others = read_pairs(write_rows(tmp_path / "swapped.jsonl", swapped)).pairs
    for one, other in zip(pairs, others, strict=True):
        assert one.key == other.key
        assert left_and_right(one, "ann", seed) == left_and_right(other, "ann", seed)
    a, b = (Review(x, Labels(tmp_path / "none.jsonl"), seed).show("ann", 7) for x in (pairs, others))
    assert a == b
    assert not {"chosen", "rejected", "source", "row 7"} & set(json.dumps(a).replace('"', " ").split())


def test_the_newest_label_counts_and_open_pairs_come_in_turn(tmp_path: Path) -> None:
    review = open_review(write_rows(tmp_path / "pairs.jsonl", text_rows(4)))
    assert review.progress("ann") == {"pairs": 4, "labelled": 0, "skipped": 0, "left": 4}
    review.add(values(review.show("ann", 1), "ann", None))
    review.add(values(review.show("ann", 2), " ann ", "left", comment="first"))
    assert review.progress("ann") == {"pairs": 4, "labelled": 1, "skipped": 1, "left": 2}
    assert review.progress("bob")["left"] == 4
    assert [review.next_open("ann", after) for after in (-1, 0, 3)] == [0, 3, 0]
    given = review.show("ann", 2)["label"]
    assert given["comment"] == "first"
    assert set(given["choices"].values()) == {"left"}
    assert review.show("bob", 2)["label"] is None
    # A label may be changed, and a skipped pair be labelled; nothing is removed from the file.
    review.add(values(review.show("ann", 2), "ann", "tie"))
    review.add(values(review.show("ann", 1), "ann", "right"))
    assert len(review.labels.path.read_text().splitlines()) == 4
    for again in (review, open_review(tmp_path / "pairs.jsonl")):
        assert again.progress("ann") == {"pairs": 4, "labelled": 2, "skipped": 0, "left": 2}
        assert again.show("ann", 2)["label"]["choices"]["overall"] == "tie"
    # With another seed the same answer is marked, on whichever side it stands.
    chosen = review.show("ann", 1)["right"]["id"]
    for seed in range(8):
        shown = open_review(tmp_path / "pairs.jsonl", seed).show("ann", 1)
        assert shown[shown["label"]["choices"]["overall"]]["id"] == chosen


def test_two_processes_may_add_to_a_file(tmp_path: Path) -> None:
    """Each sees what the other one has added."""
    path = write_rows(tmp_path / "pairs.jsonl", text_rows(6))
    one, other = open_review(path), open_review(path)
    for at in range(6):
        review = (one, other)[at % 2]
        review.add(values(review.show("ann", at), "ann", "left"))
        assert (
            one.progress("ann")
            == other.progress("ann")
            == {"pairs": 6, "labelled": at + 1, "skipped": 0, "left": 5 - at}
        )


def test_labels_survive_a_killed_server(tmp_path: Path) -> None:
    """What was answered is there after SIGKILL, also behind half a line that a crash leaves."""
    path = write_rows(tmp_path / "pairs.jsonl", text_rows(4))
    command = [sys.executable, "-m", "qwen_jax", "data", "review", str(path), "--json", "--labeller", "ann"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        labels = tmp_path / "pairs.jsonl.labels.jsonl"
        assert (started["pairs"], started["labels"]) == (4, str(labels))
        _, found, _ = request(started["url"], "GET", "/api/pair?labeller=ann")
        for _ in range(3):
            status, found, _ = request(
                started["url"], "POST", "/api/label", values(found["pair"], "ann", "left"), Connection="close"
            )
            assert status == 200
        process.send_signal(signal.SIGKILL)
    assert len(labels.read_text().splitlines()) == 3
    with labels.open("r+b") as file:
        file.truncate(labels.stat().st_size - 60)
    pairs = read_pairs(path)
    review = Review(pairs.pairs, open_labels(labels, pairs))
    assert review.progress("ann") == {"pairs": 4, "labelled": 2, "skipped": 0, "left": 2}
    assert review.next_open("ann") == 2
    review.add(values(review.show("ann", 2), "ann", "right"))
    assert review.progress("ann")["labelled"] == 3
    assert Review(pairs.pairs, open_labels(labels, pairs)).progress("ann")["labelled"] == 3


def test_a_majority_decides(tmp_path: Path) -> None:
    """More than half of all labels must prefer an answer; ties and skipped pairs count for none of them."""
    review = open_review(write_rows(tmp_path / "pairs.jsonl", text_rows(8)))
    # a is the chosen answer, b the other one, t a tie, - a skipped pair.
    votes = ["aab", "ab", "at", "ttb", "b", "-", "abt", "bb-"]
    for pair, given in zip(review.pairs, votes, strict=True):
        for number, vote in enumerate(given):
            if vote == "-":
                at = review.pairs.index(pair)
                review.add(values(review.show(f"n{number}", at), f"n{number}", None))
            else:
                prefer(review, f"n{number}", pair, {"a": pair.ids[0], "b": pair.ids[1], "t": None}[vote])
    expected = {1: (3, 2, 1, 3, 1), 2: (2, 1, 1, 3, 2), 3: (1, 0, 1, 1, 5)}
    for least, (written, turned, tie, divided, too_few) in expected.items():
        counts = export(review, tmp_path / "out.jsonl", least)
        assert (counts.written, counts.turned, counts.tie, counts.divided, counts.too_few) == (
            written,
            turned,
            tie,
            divided,
            too_few,
        )
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert Counter(label["overall"] for label in row["labels"]) == {"chosen": 2, "rejected": 1}
    with pytest.raises(InputError, match="nothing to write"):
        export(review, tmp_path / "out.jsonl", 4)


def test_bad_files(tmp_path: Path) -> None:
    good = {"prompt": "Q", "responses": ["a", "b"]}
    for record, message in (
        ({"responses": ["a", "b"]}, "line 2: expected the columns prompt and responses"),
        ({"prompt": "Q", "responses": ["a"]}, "at least two answers, got 1"),
        ({"prompt": "Q", "responses": "ab"}, "at least two answers, got str"),
        ({"prompt": "Q", "responses": ["a", 1]}, "line 2: expected all columns as text or all as messages"),
        ({"prompt": [user("Q")], "responses": ["a", [user("b")]]}, "line 2: 'rejected' begins with a message of role"),
    ):
        path = write_rows(tmp_path / "pairs.jsonl", [good, record])
        with pytest.raises(InputError, match=message):
            read_pairs(path)
    with pytest.raises(InputError, match="no two different answers"):
        read_pairs(write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Q", "responses": ["a", "a"]}]))
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", [good]))
    with pytest.raises(InputError, match="is the file that is labelled"):
        open_labels(tmp_path / "pairs.jsonl", pairs)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "mine"}])
    with pytest.raises(InputError, match="holds no labels"):
        Labels(other)
    assert other.read_text() == '{"text": "mine"}\n'
    with pytest.raises(InputError, match=r"the label of 'ann' with the key 'k': expected 'left' as text"):
        Labels(write_rows(tmp_path / "labels.jsonl", [{"key": "k", "labeller": "ann"}]))
    with pytest.raises(InputError, match="Labels cannot be written"):
        Labels(tmp_path / "nowhere" / "labels.jsonl").check_writable()


def test_bad_labels(tmp_path: Path) -> None:
    """Each is refused with the reason, and nothing is written."""
    review = open_review(write_rows(tmp_path / "pairs.jsonl", text_rows(2)))
    good = values(review.show("ann", 0), "ann", "left")
    for changes, message in (
        ({"extra": 1}, "unknown field 'extra'"),
        ({"date": "2020-01-01"}, "the server sets it"),
        ({"overall": "both"}, "'overall' as left, tie, right"),
        ({"overall": None}, "expected no criteria"),
        ({"criteria": {"truthfulness": "left"}}, "'helpfulness' as left, tie or right, got None"),
        ({"criteria": {**good["criteria"], "style": "left"}}, "'criteria' as an object"),
        ({"criteria": [1]}, "'criteria' as an object"),
        ({"seconds": -1}, "'seconds' as a number"),
        ({"seconds": float("nan")}, "'seconds' as a number"),
        ({"seconds": True}, "'seconds' as a number"),
        ({"seconds": 10**400}, "'seconds' as a number"),
        ({"labeller": "  "}, "labeller's name"),
        ({"labeller": "a\nb"}, "labeller's name"),
        ({"labeller": "x" * 65}, "labeller's name"),
        ({"comment": "x" * (COMMENT_CHARACTERS + 1)}, "a comment of at most"),
        ({"comment": None}, "'comment' as text"),
        ({"key": "other"}, "there is no pair with the key 'other'"),
        ({"left": good["right"]}, "are not the ids of the answers"),
    ):
        with pytest.raises(InputError, match=message):
            review.add({**good, **changes})
    assert not review.labels.path.exists()
    assert review.add(good).seconds == 1.5


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", text_rows(3))
    labels = tmp_path / "pairs.jsonl.labels.jsonl"
    pairs = read_pairs(path)
    review = Review(pairs.pairs, Labels(labels))
    for name in ("ann", "bob"):
        for pair in pairs.pairs[:2]:
            prefer(review, name, pair, pair.ids[1])
    assert main(["data", "review", str(path), "--report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["labelled"] for one in report["labellers"]] == [2, 2]
    assert report["labellers"][0]["agrees_with_file"] == 0
    assert main(["data", "review", str(path), "--report", "--labels", str(labels)]) == 0
    assert "ann and bob: 2 common pairs" in capsys.readouterr().out
    out = tmp_path / "out.jsonl"
    assert main(["data", "review", str(path), "--export", str(out), "--min-labels", "2"]) == 0
    assert "2 pairs, 2 of them against the file's own preference" in capsys.readouterr().out
    assert main(["data", "review", str(path), "--export", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["too_few"] == 1
    again = write_rows(tmp_path / "again.jsonl", [json.loads(line) for line in out.read_text().splitlines()])
    for arguments, message in (
        ([str(path), "--report", "--export", str(out)], "Give one of them"),
        ([str(again), "--report"], "again.jsonl.labels.jsonl does not exist"),
        ([str(again), "--export", str(tmp_path / "x"), "--labels", str(labels)], "has a column 'labels'"),
        ([str(path), "--export", str(out), "--min-labels", "0"], "min-labels must be at least 1"),
        ([str(path), "--export", "/nowhere/x"], "Cannot write /nowhere/x"),
        ([str(path), "--port", "70000"], "expected a port from 0 to 65535"),
        ([str(path), "--labeller", " "], "labeller's name"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        assert main(["data", "review", *arguments]) == 1
        assert message in capsys.readouterr().err
