"""Reading examples: every format of file and of columns gives the same examples, and bad input is named."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.trained import encode_parts
from tests.helpers.conversations import TOOL, chat_tokenizer, random_conversation
from train.data.examples import DEFAULTS, ExampleOptions, Kind, read_examples
from train.data.tables import find_tables

USER, REPLY = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}
OTHER = {"role": "assistant", "content": "No."}
QUESTION = {"role": "user", "content": "And then?"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_as(name: str, folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / name
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode() + b"\n\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif name == "list.json":
        path.write_text(json.dumps(records, indent=1))
    elif name.endswith((".jsonl", ".json")):
        path.write_bytes(b"\xef\xbb\xbf" + lines)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
    elif name.endswith(".arrow"):
        pa.feather.write_feather(pa.Table.from_pylist(records), path, compression="uncompressed")
    else:  # As `Dataset.save_to_disk` writes it: streams whose order is in state.json.
        path.mkdir()
        half = len(records) // 2
        files = []
        for n, part in enumerate((records[:half], records[half:])):
            files.append({"filename": f"data-{1 - n}.arrow"})
            table = pa.Table.from_pylist(part)
            with pa.OSFile(str(path / f"data-{1 - n}.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
                to.write_table(table)
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
    return path


def text_of(
    tokenizer: Tokenizer, paths: list[Path], kind: Kind | None = None, options: ExampleOptions = DEFAULTS
) -> list[list[list[tuple[str, bool]]]]:
    """For each example, each answer: runs of text that are trained or not."""
    result = []
    for raw in read_examples(find_tables(paths), kind):
        answers = []
        for ids, trained in encode_parts(tokenizer, raw.parts(tokenizer, options)):
            grouped = itertools.groupby(zip(ids, trained, strict=True), lambda token: token[1])
            answers.append([(tokenizer.decode([i for i, _ in group]), on) for on, group in grouped])
        result.append(answers)
    return result


def trained_of(*arguments: Any, **options: Any) -> list[list[list[str]]]:
    runs = text_of(*arguments, **options)
    return [[[text for text, on in answer if on] for answer in answers] for answers in runs]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "saved"]
)
def test_files_of_every_format_give_the_same_examples(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    """Columns of Arrow hold nulls for keys that only other records have: they change nothing."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    records = []
    for n in range(10):
        messages = random_conversation(rng, tools=False)
        call = {"function": {"name": "look_up", "arguments": {"n": n, f"key{n % 3}": "x"}}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "21"},
            REPLY,
        ]
        records.append({"id": n, "messages": messages, "tools": json.dumps([TOOL]) if n % 2 else None})
    expected = text_of(tokenizer, [write_as("plain.jsonl", tmp_path, records)])
    assert text_of(tokenizer, [write_as(name, tmp_path, records)]) == expected
    assert len(expected) == 10


COLUMNS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "messages": ({"messages": [USER, REPLY, QUESTION, OTHER]}, [["Hi.<|im_end|>", "No.<|im_end|>"]]),
    "prompt and completion": ({"prompt": [USER, REPLY, QUESTION], "completion": [OTHER]}, [["No.<|im_end|>"]]),
    "texts": ({"prompt": "2 + 2 = ", "completion": "4"}, [["4<|endoftext|>"]]),
    "no prompt": ({"prompt": "", "completion": "text"}, [["text<|endoftext|>"]]),
    "pair": (
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        [["Hi.<|im_end|>"], ["No.<|im_end|>"]],
    ),
    "pair with the prompt repeated": (
        {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        [["Hi.<|im_end|>"], ["No.<|im_end|>"]],
    ),
    "pair with a common beginning": (
        {"chosen": [USER, REPLY, QUESTION, REPLY], "rejected": [USER, REPLY, QUESTION, OTHER], "margin": 1},
        [["Hi.<|im_end|>"], ["No.<|im_end|>"]],
    ),
    "ultrafeedback": (
        {"prompt": "Hello?", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "messages": [USER, REPLY]},
        [["Hi.<|im_end|>"], ["No.<|im_end|>"]],
    ),
    "pair of texts": ({"prompt": "Q: ", "chosen": "a", "rejected": "b"}, [["a<|endoftext|>"], ["b<|endoftext|>"]]),
    "pair of texts with the prompt": (
        {"prompt": "Q: ", "chosen": "Q: a", "rejected": "Q: b"},
        [["a<|endoftext|>"], ["b<|endoftext|>"]],
    ),
    "texts with a common beginning": (
        {"chosen": "Q: I like\ncats", "rejected": "Q: I like\ncars very much"},
        [["cats<|endoftext|>"], ["cars very much<|endoftext|>"]],
    ),
    "texts that differ inside a word": (
        {"chosen": "I like cats", "rejected": "I like cars"},
        [[" cats<|endoftext|>"], [" cars<|endoftext|>"]],
    ),
    "one text begins the other": (
        {"chosen": "yes it is", "rejected": "yes it is so"},
        [[" is<|endoftext|>"], [" is so<|endoftext|>"]],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    """What is trained of each form of columns; the prompt of a pair is the same in both answers."""
    record, expected = COLUMNS[name]
    kind: Kind | None = "pairs" if name == "ultrafeedback" else None
    path = write_lines(tmp_path / "a.jsonl", [record])
    assert trained_of(tokenizer, [path], kind=kind) == [expected]
    (answers,) = text_of(tokenizer, [path], kind=kind)
    assert len({tuple(answer[0]) for answer in answers}) == 1


def test_options_reach_the_renderer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    typed = {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [USER, REPLY, USER, typed]}])
    options = ExampleOptions(trained="last", newline=True)
    assert trained_of(tokenizer, [path], options=options) == [[[typed["content"] + "<|im_end|>\n"]]]
    (raw,) = read_examples([path])
    for on in (False, True):
        ((ids, _),) = encode_parts(tokenizer, raw.parts(tokenizer, ExampleOptions(parse_special=on)))
        assert (tokenizer.control_ids["<tool_call>"] in ids) == on


def test_margin_and_unread_columns(tmp_path: Path) -> None:
    record = {"chosen": "a b", "rejected": "a c", "margin": 0.25, "score": 3, "source": None}
    (raw,) = read_examples([write_lines(tmp_path / "a.jsonl", [record])])
    assert (raw.kind, raw.margin, raw.unread) == ("pairs", 0.25, {"score", "source"})


PAIR = {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}
BAD: dict[str, tuple[list[Any], str]] = {
    "unknown role": ([{"messages": [{"role": "bot", "content": ""}]}], "expected role system, user, assistant, tool"),
    "no content": ([{"messages": [USER, {"role": "assistant"}]}], "expected 'content'"),
    "no turn": ([{"messages": [USER]}], "expected an assistant's turn"),
    "no answer": ([{"prompt": [USER], "completion": []}], "'completion': expected at least one message"),
    "answer of a user": ([{"prompt": [USER], "completion": [USER, QUESTION]}], "begins with a message of role user"),
    "unclosed": (
        [{"messages": [USER, {"role": "assistant", "content": "<tool_call>\n{}"}]}],
        "without its </tool_call>",
    ),
    "arguments": (
        [{"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}],
        "tool call 0: 'arguments' is not JSON",
    ),
    "same answers": ([{**PAIR, "rejected": [REPLY]}], "chosen and rejected are the same"),
    "same conversations": ([{"chosen": [USER, REPLY], "rejected": [USER, REPLY]}], "chosen and rejected are the same"),
    "same texts": ([{"chosen": "a b", "rejected": "a b"}], "chosen and rejected are the same"),
    "other prompts": ([{"chosen": [USER, REPLY], "rejected": [QUESTION, REPLY]}], "differ in message 0.*role user"),
    "other prompt": ([{**PAIR, "chosen": [QUESTION, REPLY]}], "the prompts differ"),
    "other text prompt": (
        [{"prompt": "Why?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}],
        "'prompt' is 'Why\\?', but chosen and rejected answer 'Hello\\?'",
    ),
    "half a prompt": ([{"prompt": "Q", "chosen": "Q a", "rejected": "b"}], "beginning of chosen only"),
    "no common beginning": ([{"chosen": "a b", "rejected": "c d"}], "no common beginning"),
    "ends early": ([{"chosen": [USER, REPLY], "rejected": [USER]}], "'rejected' has ended"),
    "mixed forms": ([{"prompt": "Q", "completion": [REPLY]}], "completion is messages, prompt is text"),
    "tools beside text": ([{"prompt": "Q", "completion": "A", "tools": [TOOL]}], "'tools' stands beside plain text"),
    "tools not JSON": ([{"messages": [USER, REPLY], "tools": "["}], "'tools' is not JSON"),
    "tools malformed": ([{"messages": [USER, REPLY], "tools": [{"name": "f"}]}], "tool 0: expected"),
    "margin": ([{**PAIR, "margin": "1"}], "expected 'margin' as a finite number"),
    "unknown columns": (
        [{"text": "a"}],
        "found the columns text, expected one of: messages; prompt, completion; prompt",
    ),
    "both kinds": ([{**PAIR, "messages": [USER, REPLY]}], "can be read as messages or as prompt, chosen, rejected"),
    "no object": ([[1]], "expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    records, message = BAD[name]
    path = write_lines(tmp_path / "bad.jsonl", records)
    with pytest.raises(InputError, match=rf"(?s)^{re.escape(str(path))}, line 1: .*{message}"):
        text_of(tokenizer, [path])


def test_a_mixture_of_columns_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"messages": [USER, REPLY]}])
    second = write_lines(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "A"}])
    with pytest.raises(InputError, match=r"b.jsonl, line 1: expected the columns messages as in .*a.jsonl, line 1"):
        text_of(tokenizer, [first, second])


def test_bad_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def check(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            text_of(tokenizer, [tmp_path / name])

    check("empty.jsonl", b"\n\n", "empty.jsonl has no examples")
    check("empty.json", b"[]", "empty.json has no examples")
    check("cut.jsonl", b'{"messages": [', "cut.jsonl, line 1: not JSON")
    check("late.jsonl", b'\n{"prompt": "a", "completion": "b"}\n{', "late.jsonl, line 3: not JSON")
    check("binary.jsonl", b"\xff\xfe", "line 1: text is not UTF-8")
    check("broken.jsonl.gz", gzip.compress(b"{}" * 1000)[:20], "cannot be read beyond record 0")
    check("broken.parquet", b"PAR1", "cannot be read beyond record 0")
    check("broken.arrow", b"ARROW1xx", "cannot be read beyond record 0")
    check("table.csv", b"a,b", "expected one of .jsonl")
    with pytest.raises(InputError, match="No such file"):
        find_tables([tmp_path / "missing.jsonl"])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".hidden.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"nothing has no files that are not hidden\. Give files of examples"):
        find_tables([tmp_path / "empty.jsonl", tmp_path / "nothing"])
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"has the splits train, test\. Give the folder of one"):
        find_tables([tmp_path / "splits"])


def test_a_chat_without_template_is_an_error(tmp_path: Path) -> None:
    """Plain text needs no template; messages do."""
    tokenizer = chat_tokenizer()

    class Without(type(tokenizer)):  # type: ignore[misc]
        @property
        def chat_template(self) -> Any:
            raise InputError("the tokenizer has no chat template")

    tokenizer.__class__ = Without
    plain = write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    assert trained_of(tokenizer, [plain]) == [[["A<|endoftext|>"]]]
    chat = write_lines(tmp_path / "b.jsonl", [{"messages": [USER, REPLY]}])
    with pytest.raises(InputError, match=r"b.jsonl, line 1: the tokenizer has no chat template"):
        trained_of(tokenizer, [chat])
