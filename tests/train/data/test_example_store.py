"""The store of tokenized examples: what is read is what was tokenized, once; counts; what is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import train.data.example_store as module
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import ChatTemplate, Tokenizer, render_example
from tests.helpers.conversations import TOOL, chat_tokenizer, random_conversation
from train.data.example_store import ExampleStore, open_store, random_keys, select, split
from train.data.examples import Example, ExampleOptions, Pair


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(count: int) -> list[dict[str, Any]]:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return [{"messages": random_conversation(rng, True), "tools": [TOOL] if n % 2 else None} for n in range(count)]


def text_pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {n}: ", "chosen": "yes " * (n % 7 + 1), "rejected": "no " * (n % 5), "margin": n / 4}
        for n in range(count)
    ]


def test_a_store_holds_what_the_renderer_gives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ids and masks of every example, over several files and groups; lengths, counts and origins are theirs."""
    records = chats(300)
    files = [write_lines(tmp_path / "a.jsonl", records[:280]), write_lines(tmp_path / "b.jsonl", records[280:])]
    store = open_store(files, tokenizer, tmp_path / "stores")
    assert len(store) == 300
    for n, record in enumerate(records):
        expected = render_example(tokenizer, record["messages"], record["tools"])
        example = store[n]
        assert isinstance(example, Example)
        assert (example.ids.dtype, example.trained.dtype) == (np.int32, bool)
        assert example.ids.tolist() == expected.ids
        assert example.trained.tolist() == expected.trained
        assert store.lengths[n].tolist() == [len(expected.ids)]
        assert store.trained[n].tolist() == [sum(expected.trained[1:])]
    assert store.sources.tolist() == [0] * 280 + [1] * 20
    assert store.where(281) == f"{files[1]}, line 2"
    assert (store.info.tokens, store.info.trained) == (store.lengths.sum(), store.trained.sum())
    assert "300 examples" in store.info.describe()


def test_pairs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Both answers contain the prompt, of which nothing is trained."""
    records = text_pairs(20)
    store = open_store([write_lines(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "stores")
    assert store.kind == "pairs"
    assert store.lengths.shape == (20, 2)
    for n, record in enumerate(records):
        pair = store[n]
        assert isinstance(pair, Pair)
        assert pair.margin == record["margin"]
        for answer, column in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            assert tokenizer.decode(answer.ids[~answer.trained]) == record["prompt"]
            assert tokenizer.decode(answer.ids[answer.trained]) == record[column] + "<|endoftext|>"


def test_a_store_is_reused_until_anything_changes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content decides, not the name or the time of the file; tokenizer, template and options count too."""
    path = write_lines(tmp_path / "a.jsonl", chats(5))
    store = open_store([path], tokenizer, tmp_path / "stores")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    other_template = chat_tokenizer()
    source = other_template.chat_template.source().replace("You are Qwen", "You are someone")
    other_template.__dict__["chat_template"] = ChatTemplate(source)
    changed = write_lines(tmp_path / "changed.jsonl", chats(5))
    different = [
        open_store([path], tokenizer, tmp_path / "stores", options=ExampleOptions(newline=True)),
        open_store([path], other_template, tmp_path / "stores"),
        open_store([changed], tokenizer, tmp_path / "stores"),
        open_store([path, changed], tokenizer, tmp_path / "stores"),
    ]
    assert len({store.fingerprint, *(other.fingerprint for other in different)}) == 5

    def fail(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(module, "encode_parts", fail)
    again = open_store([moved], tokenizer, tmp_path / "stores", kind="sft")
    assert again.fingerprint == store.fingerprint
    assert again.where(4) == f"{moved}, line 5"
    assert np.array_equal(again.answers(4)[0].ids, store.answers(4)[0].ids)


def test_a_failed_start_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*chats(3), {"messages": [{"role": "user", "content": "?"}]}])
    with pytest.raises(InputError, match=r"a.jsonl, line 4: expected an assistant's turn"):
        open_store([path], tokenizer, tmp_path / "stores")
    assert not list((tmp_path / "stores").iterdir())


def test_a_process_that_was_slower_uses_the_other_store(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", chats(3))
    write = module._write

    def both(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        monkeypatch.setattr(module, "_write", write)
        open_store([path], tokenizer, tmp_path / "stores")

    monkeypatch.setattr(module, "_write", both)
    assert len(open_store([path], tokenizer, tmp_path / "stores")) == 3
    assert len(list((tmp_path / "stores").iterdir())) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "store.json"])
def test_a_damaged_store_is_an_error(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", chats(3))
    folder = open_store([path], tokenizer, tmp_path / "stores").folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    with pytest.raises(InputError, match=f"{folder}"):
        ExampleStore(folder)


def test_progress_and_notes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Columns that are not read and control tokens that are trained as plain text are told."""
    typed = {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"}
    records = [{"messages": [{"role": "user", "content": "a"}, typed], "score": 1} for _ in range(30)]
    console = Console(record=True, file=(tmp_path / "out").open("w"))
    store = open_store([write_lines(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "stores", progress=console)
    assert "MB" in console.export_text()
    assert (store.info.unread, store.info.literal) == (("score",), 30)
    assert "30 examples have control tokens typed into trained text" in store.info.describe()


def test_select_counts_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each example is used, dropped, or trains nothing; and what is cut is told."""
    records = [{"prompt": "p" * n, "completion": "c" * (n % 9)} for n in range(40)]
    store = open_store([write_lines(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "stores")
    lengths = store.lengths[:, 0]
    assert lengths.max() > 20
    chosen = select(store, 20)
    assert chosen.untrained == (0,)  # Only the end of the text, which is the first token.
    assert chosen.dropped == tuple(np.flatnonzero(lengths > 20).tolist())
    assert sorted([*chosen.units.tolist(), *chosen.dropped, *chosen.untrained]) == list(range(40))
    assert f"{len(chosen.dropped)} of 40 examples are left out because they are longer" in chosen.describe(store)
    assert "a.jsonl, line 1" in chosen.describe(store)
    cut = select(store, 20, too_long="truncate")
    assert sorted([*cut.units.tolist(), *cut.untrained]) == list(range(40))
    assert set(cut.truncated) == {i for i in chosen.dropped if store.answers(i)[0].trained[1:20].any()}
    assert set(cut.untrained) == {0, *chosen.dropped} - set(cut.truncated)
    assert cut.lengths.max() == 20
    with pytest.raises(InputError, match=r"a.jsonl, line \d+: the example has \d+ tokens, and a row has 20"):
        select(store, 20, too_long="error")
    with pytest.raises(
        InputError, match=r"rows of 2 tokens: 1 of 40 .* trained \(.*a.jsonl, line 1\); 39 of 40 .* line 2;"
    ):
        select(store, 2)
    assert select(store, 20, units=np.array([3, 1])).units.tolist() == [3, 1]


def test_pairs_are_cut_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": "p", "chosen": "c" * n, "rejected": "r" * (30 - n)} for n in range(1, 30)]
    store = open_store([write_lines(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "stores")
    for length in (9, 16, 25):
        cut = select(store, length, too_long="truncate")
        assert (cut.lengths.sum(axis=1) <= length).all()
        assert (cut.lengths.sum(axis=1) == length).all()
        assert (cut.lengths <= store.lengths[cut.units]).all()
        assert (cut.lengths.min(axis=1) >= np.minimum(store.lengths[cut.units].min(axis=1), length // 2)).all()


def test_answers_that_are_the_same_are_no_pair(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An error where they are rendered alike; left out and counted where what fits of them is the same."""
    said = {"role": "user", "content": "Hello?"}
    answers = [{"role": "assistant", "content": text} for text in ("caf\u00e9", "cafe\u0301")]
    record = {"prompt": [said], "chosen": answers[:1], "rejected": answers[1:]}
    with pytest.raises(InputError, match=r"a.jsonl, line 2: chosen and rejected are the same tokens"):
        open_store([write_lines(tmp_path / "a.jsonl", [*text_pairs(1), record])], tokenizer, tmp_path / "stores")
    texts = [
        {"prompt": "p", "chosen": "c" * 20 + end, "rejected": "c" * 20 + other}
        for end, other in (("a", "b"), ("a", "b" * 30))
    ] + [{"prompt": "p", "chosen": "c", "rejected": "d" * 40}]
    store = open_store([write_lines(tmp_path / "b.jsonl", texts)], tokenizer, tmp_path / "stores")
    cut = select(store, 12, too_long="truncate")
    assert (cut.units.tolist(), cut.untrained, cut.truncated) == ([2], (0, 1), (2,))
    assert "2 of 3 examples are left out because" in cut.describe(store)
    whole = select(store, int(store.lengths.sum(axis=1).max()), too_long="truncate")
    assert whole.units.tolist() == [0, 1, 2]


def test_split_and_keys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every example is in one part; the keys are those that were written down, in any version of NumPy."""
    store = open_store([write_lines(tmp_path / "a.jsonl", chats(20))], tokenizer, tmp_path / "stores")
    train, held = split(store, 0.2, seed=1)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(20))
    assert len(held) == 4
    assert held.tolist() == split(store, 0.2, seed=1)[1].tolist() != split(store, 0.2, seed=2)[1].tolist()
    with pytest.raises(InputError, match="above 0 and below 1"):
        split(store, 1.0, seed=1)
    assert random_keys(1, 2, 3).tolist() == KEYS


KEYS = [5705853004827290377, 6584680345644299050, 680768428710196683]
