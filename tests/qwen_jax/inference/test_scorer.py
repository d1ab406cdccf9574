"""A reward model's scores are those of transformers, alone or beside others, and `qwen-jax score` prints them."""

import io
import json
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

import convert
from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.inference.scorer import Scorer
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.reward import make_reward_checkpoint

KINDS = ("linear", "mlp")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A folder and a torch module of each kind."""
    seed = secrets.randbits(16)
    print("seed", seed)
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 320, "eos_token_id": 256}
    found = {kind: (root / kind, make_reward_checkpoint(root / kind, kind, seed=seed, **sizes)) for kind in KINDS}
    for folder, _ in found.values():
        train_bpe(["abc"], 278).save(folder)
    return found


def texts(count: int = 9) -> list[np.ndarray]:
    """Ids from 2 on: id 1 is transformers' padding, at which it never scores."""
    rng = np.random.default_rng()
    return [rng.integers(2, 320, n) for n in (1, 2, 130, *rng.integers(1, 60, count - 3))]


def theirs(kind: str, model: Any, ids: np.ndarray) -> float:
    tokens = torch.as_tensor(ids, dtype=torch.long)[None]
    with torch.no_grad():
        return float(model(tokens).logits[0, 0] if kind == "linear" else model(tokens)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers_single_or_packed(
    kind: str, models: dict[str, tuple[Path, Any]], mesh: Mesh
) -> None:
    folder, model = models[kind]
    config, params = convert.load(folder, mesh, "float32")
    scorer, given = Scorer(config, params, mesh, dtype="float32"), texts()
    expected = np.array([theirs(kind, model, ids) for ids in given])
    packed = scorer.score(given)
    assert packed.dtype == np.float32
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(packed, expected, atol=1e-5)
    np.testing.assert_allclose([scorer.score([ids])[0] for ids in given[:4]], expected[:4], atol=1e-5)
    # Another order, and several batches.
    several = Scorer(config, params, mesh, dtype="float32", tokens_per_batch=128)
    np.testing.assert_allclose(several.score(given[::-1]), expected[::-1], atol=1e-5)
    assert scorer.score([]).shape == (0,)
    # Dual-chunk attention: one text a row, and short ones are not changed.
    alone = Scorer(config.with_dual_chunk(trained_length=512), params, mesh, dtype="float32")
    np.testing.assert_allclose(alone.score(given[:4]), expected[:4], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_transformers_batches_padded_on_either_side(
    side: str, models: dict[str, tuple[Path, Any]], mesh: Mesh
) -> None:
    folder, model = models["linear"]
    given = texts()
    length = max(map(len, given))
    padding = [np.ones(length - len(ids), int) for ids in given]
    rows = [np.concatenate([p, x] if side == "left" else [x, p]) for p, x in zip(padding, given, strict=True)]
    tokens = torch.as_tensor(np.stack(rows))
    mask = (tokens != 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions).logits[:, 0].numpy()
    config, params = convert.load(folder, mesh, "float32")
    np.testing.assert_allclose(Scorer(config, params, mesh, dtype="float32").score(given), expected, atol=1e-5)


def test_a_text_may_end_with_the_padding_id(models: dict[str, tuple[Path, Any]], mesh: Mesh) -> None:
    """The score is at the last token whatever its id is, where transformers takes the one before."""
    folder, model = models["linear"]
    config, params = convert.load(folder, mesh, "float32")
    ids = np.array([5, 6, 7, 1])
    with torch.no_grad():
        hidden = model.model(torch.as_tensor(ids)[None]).last_hidden_state
        expected = float(model.score(hidden)[0, -1, 0])
    got = Scorer(config, params, mesh, dtype="float32").score([ids])[0]
    assert abs(got - expected) < 1e-5
    assert abs(got - theirs("linear", model, ids)) > 1e-3


@pytest.mark.parametrize(
    ("axes", "stacked"), [({"data": 2, "fsdp": 2}, True), ({"fsdp": 2, "tensor": 2}, False)], ids=str
)
def test_scores_do_not_depend_on_the_mesh_or_the_layout(
    axes: dict[str, int], stacked: bool, models: dict[str, tuple[Path, Any]]
) -> None:
    folder, model = models["mlp"]
    mesh, given = make_mesh(axes), texts()
    config, params = convert.load(folder, mesh, "float32", Options(stacked=stacked))
    expected = [theirs("mlp", model, ids) for ids in given]
    np.testing.assert_allclose(Scorer(config, params, mesh, dtype="float32").score(given), expected, atol=1e-5)


def test_bad_texts_and_models_are_refused(models: dict[str, tuple[Path, Any]], mesh: Mesh) -> None:
    config, params = convert.load(models["linear"][0], mesh, "float32")
    scorer = Scorer(config, params, mesh, dtype="float32")
    for bad, message in (([], "Text 1 has 0 tokens"), ([3] * 513, "has 513 tokens"), ([320], "text 1 has 320")):
        with pytest.raises(InputError, match=message):
            scorer.score([[1], bad])
    broken = {**params, "norm": jax.tree.map(lambda x: x * np.nan, params["norm"])}
    with pytest.raises(InputError, match="score of text 0 is not finite"):
        Scorer(config, broken, mesh, dtype="float32").score([[1]])


# --- the command ---------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: Any, stdin: bytes = b"") -> tuple[int, list[Any], str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = main(["score", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def test_the_command_scores_each_form_of_a_record(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = models["linear"]
    tokenizer: Tokenizer = train_bpe(["abc"], 278)
    user, assistant = {"role": "user", "content": "ab?"}, {"role": "assistant", "content": "é, c"}
    chat = tokenizer.encode_chat([user, assistant], add_generation_prompt=False)
    records = [
        ({"messages": [user, assistant]}, chat),
        ({"prompt": [user], "completion": [assistant]}, chat),
        ({"prompt": "ab", "completion": "c"}, [*tokenizer.encode("abc"), tokenizer.eos_id]),
        ({"text": "abc", "source": "x"}, tokenizer.encode("abc")),
    ]
    lines = [json.dumps(record) for record, _ in records]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    status, found, err = run(capsys, "--model", folder, "--input", file)
    assert status == 0, err
    assert [(r["line"], r["tokens"]) for r in found] == [
        (n, len(ids)) for n, (_, ids) in zip((1, 3, 4, 5), records, strict=True)
    ]
    expected = [theirs("linear", model, np.array(ids)) for _, ids in records]
    np.testing.assert_allclose([r["score"] for r in found], expected, atol=1e-5)
    # From standard input, to a file.
    status, printed, _ = run(capsys, folder, "--output", tmp_path / "out.jsonl", stdin=file.read_bytes())
    assert (status, printed) == (0, [])
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected the keys messages or prompt and completion or text.*found list"),
        ('{"text": "a", "messages": []}', "found messages, text"),
        ('{"chosen": "a"}', "found chosen"),
        ('{"messages": "hello"}', "expected messages as a list of messages"),
        ('{"text": ["a"]}', "expected text as a text"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "texts, or both as lists"),
        ('{"messages": [{"role": "judge", "content": "b"}]}', "line 2: message 0: expected role.*judge"),
        ('{"text": "a", "tools": [{}]}', "'tools' stands beside plain text"),
        (json.dumps({"text": "ab" * 300}), "expected 1 to 512 tokens, the model's context, got 600"),
        ('{"text": ""}', "expected 1 to 512 tokens, the model's context, got 0"),
    ],
)
def test_bad_lines_are_named_before_anything_is_scored(
    line: str, message: str, models: dict[str, tuple[Path, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed, err = run(capsys, models["linear"][0], stdin=b'{"text": "a"}\n' + line.encode() + b"\n")
    assert (status, printed) == (1, [])
    assert re.search(message, err), err


def test_a_language_model_and_missing_input_are_refused(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf_checkpoint(tmp_path / "language")
    train_bpe(["abc"], 160 + 118).save(tmp_path / "language")
    folder = models["linear"][0]
    for argv, message in (
        ((tmp_path / "language",), "language model, which has no score head"),
        ((folder, "--input", tmp_path / "none.jsonl"), "does not exist"),
        ((folder,), "Standard input is empty"),
        ((folder, "--mesh", "context=2"), "Only training uses the context axis"),
    ):
        status, printed, err = run(capsys, *argv)
        assert (status, printed) == (1, [])
        assert message in err
