"""What ends a text: end ids of every file, stop strings with and without special tokens, logits that are not finite."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import GenerationConfig

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import Completion, Engine, SamplingParams, load_generation_defaults, settings
from qwen_jax.inference.completion import Ending, Row
from qwen_jax.inference.sampling import NOT_FINITE
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_bpe
from tests.helpers.scripted import TURN_END, A, B, C, edit_json, make_scripted


def load_engine(folder: Path, **options: Any) -> Engine:
    """As in the README."""
    mesh = make_mesh({})
    config, params = convert.load(folder, mesh, options.get("dtype", "float32"))
    return Engine(config, params, mesh, **{"tokenizer": load_tokenizer(folder), "dtype": "float32", **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The text after "a" is "b<|im_end|>cccc…"."""
    return make_scripted(tmp_path, {A: B, B: TURN_END, TURN_END: C, C: C})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(make_scripted(tmp_path_factory.mktemp("engine"), {A: B, B: TURN_END, TURN_END: C, C: C}))


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_end_ids_of_every_file_end_a_text(folder: Path, where: str) -> None:
    if where == "tokenizer_config.json":
        edit_json(folder / where, eos_token="<|im_end|>")
    else:
        edit_json(folder / where, eos_token_id=[TURN_END])
    (one,) = load_engine(folder).generate(["a"], max_new_tokens=6)
    assert (one.token_ids, one.text, one.finish_reason) == ([B, TURN_END], "b", "stop")


def test_an_empty_list_in_generation_config_takes_nothing_away(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=TURN_END)
    edit_json(folder / "generation_config.json", eos_token_id=[])
    assert load_engine(folder).generate("a", max_new_tokens=6)[0].finish_reason == "stop"


def test_a_call_and_an_engine_may_have_end_ids_of_their_own(engine: Engine) -> None:
    assert len(engine.generate("a", max_new_tokens=6)[0].token_ids) == 6, "no file names <|im_end|> as an end"
    for ids in (TURN_END, [TURN_END], np.int64(TURN_END), np.array([TURN_END, 7]), (TURN_END,)):
        assert engine.generate("a", max_new_tokens=6, eos_token_ids=ids)[0].token_ids == [B, TURN_END]
    for ids in ([], (), np.array([], np.int32)):
        assert engine.generate("a", max_new_tokens=6, eos_token_ids=ids)[0].finish_reason == "length"


@pytest.mark.parametrize("ids", [[1.0], 1.5, [True], "7", ["7"], [320], -1, [[1]], [None]])
def test_end_ids_that_are_none_are_refused(engine: Engine, ids: Any) -> None:
    with pytest.raises(InputError, match="eos_token_ids"):
        engine.generate("a", eos_token_ids=ids)


def test_an_end_id_outside_the_vocabulary_is_named_and_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[5000, TURN_END, -1])
    settings._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        assert load_engine(folder).generate("a", max_new_tokens=6)[0].finish_reason == "stop"
    assert "eos_token_id [5000, -1] is outside the vocabulary of 320" in caplog.text


# --- stop strings ---


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("<|im_end|>", "b", 2),
        (["<|im_end|>"], "b", 2),
        ("b<|im_end|>", "", 2),
        ("<|im_end|>c", "b", 3),
        ("b<|im_end|>cc", "", 4),
        ("nd|>cc", "bccccc", 7),
        (["cc", "<|im_end|>cccc"], "b", 4),
        (["ccc", "<|im_end|>cc"], "b", 4),
        ("bc", "", 3),
        (["never", "<|im_start|>"], "bccccc", 7),
    ],
)
def test_stop_strings_with_special_tokens(engine: Engine, stop: Any, text: str, tokens: int) -> None:
    """The special token is not in the text, and still stops it; a stream gives no more of it."""
    settings = {"max_new_tokens": 7, "stop": stop}
    (one,) = engine.generate(["a"], **settings)
    assert (one.text, len(one.token_ids)) == (text, tokens)
    assert one.finish_reason == ("stop" if tokens < 7 else "length")
    for chunk in (1, 3):
        engine.chunk = chunk
        assert "".join(piece.text for piece in engine.stream("a", **settings)) == text


@pytest.mark.parametrize("seed", range(60))
def test_any_stop_strings_cut_at_the_first_place_they_end(seed: int) -> None:
    """Against the definition: the fewest tokens whose text, with special tokens or without, holds one of them."""
    rng = np.random.default_rng(seed)
    tokenizer = train_bpe(["abab abc é日"] * 3, 300)
    special = [tokenizer.id_to_token(i) for i in sorted(tokenizer.special_ids)]
    tokens = rng.choice([*tokenizer.encode("ab bé日 c"), *sorted(tokenizer.special_ids)[:3]], 30).tolist()

    def text(count: int, skip: bool) -> str:
        return StreamDecoder(tokenizer, skip_special_tokens=skip).push(tokens[:count])

    stop = []
    for whole in (text(30, skip=True), text(30, skip=False)):
        start = int(rng.integers(0, max(1, len(whole))))
        stop.append(whole[start : start + int(rng.integers(1, 30))] or "x")
    skip = [not any(name in one for name in special) for one in stop]
    ends = [n for n in range(1, 31) if any(one in text(n, s) for one, s in zip(stop, skip, strict=True))]
    completion, _ = run_row(tokenizer, tokens, stop)
    assert completion.finish_reason == ("stop" if ends else "length")
    assert len(completion.token_ids) == (ends[0] if ends else 30)
    if ends:
        shown = text(ends[0], skip=True)
        cuts = [shown.find(one) for one, s in zip(stop, skip, strict=True) if s and one in shown]
        assert completion.text is not None
        assert shown.startswith(completion.text)
        assert len(completion.text) <= min(cuts, default=len(shown))
        if all(skip):
            assert len(completion.text) == min(cuts)
    # A stop string that stays is what was cut off, and changes nothing else.
    included, stopped_by = run_row(tokenizer, tokens, stop, include=True)
    assert dataclasses.replace(included, text=completion.text) == completion
    assert completion.text is not None
    assert included.text is not None
    if not ends:
        assert included.text == completion.text
    elif skip[stop.index(stopped_by)]:
        assert included.text == completion.text + stopped_by
    else:
        assert text(ends[0], skip=True).startswith(included.text)
        assert included.text.startswith(completion.text)


@pytest.mark.parametrize(
    ("stop", "text"),
    [("<|im_end|>", "b"), ("b<|im_end|>", "b"), ("<|im_end|>c", "bc"), ("b<|im_end|>cc", "bcc"), ("bc", "bc")],
)
def test_of_a_stop_string_that_stays_special_tokens_are_left_out(stop: str, text: str) -> None:
    tokenizer = train_bpe(["abc"], 278)
    completion, _ = run_row(tokenizer, [B, TURN_END, C, C, C], [stop], include=True)
    assert completion.text == text


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_an_end_id_that_stays_is_in_the_text_unless_it_is_a_special_token(
    stop: tuple[str, ...], incremental: bool
) -> None:
    tokenizer = train_bpe(["abc"], 278)
    for end, included, expected in ((C, True, "bc"), (C, False, "b"), (TURN_END, True, "b")):
        ending = Ending(frozenset([end]), stop, 9, included)
        row = Row([0], ending, tokenizer, logprobs=False, incremental=incremental, dtype="float32")
        row.add(np.array([B, end, A]), None)
        completion = row.completion()
        assert (completion.text, completion.token_ids, row.stopped_by) == (expected, [B, end], end)


def run_row(tokenizer: Tokenizer, tokens: list[int], stop: list[str], include: bool = False) -> tuple[Completion, str]:
    """Feeds tokens one by one; checks that the pieces given on the way and the rest are the text.

    Returns:
      The completion, and the stop string that ended it.
    """
    ending = Ending(frozenset(), tuple(stop), len(tokens), include)
    row = Row([0], ending, tokenizer, logprobs=False, incremental=True, dtype="float32")
    given = ""
    for token in tokens:
        row.add(np.array([token]), None)
        if row.finish_reason:
            break
        given += row.new_text()
    completion = row.completion()
    assert completion.text is not None
    assert given + row.rest(completion.text) == completion.text
    return completion, str(row.stopped_by)


def test_an_end_id_is_not_part_of_the_text_even_if_it_is_no_special_token(engine: Engine) -> None:
    for stop in ((), ("never",), ("<|im_start|>",)):
        (one,) = engine.generate(["a"], max_new_tokens=5, eos_token_ids=[C], stop=stop)
        assert (one.text, one.finish_reason) == ("b", "stop")
        pieces = engine.stream("a", max_new_tokens=5, eos_token_ids=[C], stop=stop)
        assert "".join(piece.text for piece in pieces) == "b"


# --- one where a list is expected ---


def test_a_single_prompt_or_stop_string_is_a_list_of_one(engine: Engine) -> None:
    (expected,) = engine.generate(["ab"], max_new_tokens=3, stop=["cc"])
    for prompts in ("ab", b"ab", [b"ab"], [A, B], (A, B), np.array([A, B]), np.array([[A, B]]), [np.int32(A), B]):
        assert engine.generate(prompts, max_new_tokens=np.int64(3), stop="cc") == [expected]
    assert engine.generate(np.array([[A, B], [B, C]]), max_new_tokens=2)[0].prompt_token_ids == [A, B]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[64.9]]}, "token id of prompt 0 must be an integer, got 64.9"),
        ({"prompts": [[64.0]]}, "must be an integer"),
        ({"prompts": np.array([64.0])}, "must be an integer"),
        ({"prompts": [[True]]}, "must be an integer"),
        ({"prompts": [["64"]]}, "must be an integer"),
        ({"prompts": [[-1]]}, r"token id -1; ids must be in \[0, 278\)"),
        ({"prompts": [64.0]}, "must be text or a list of token ids"),
        ({"prompts": None}, "Expected prompts"),
        ({"prompts": ["a", 3]}, "Prompt 1 must be text or a list"),
        ({"prompts": ""}, "empty"),
        ({"prompts": ["a"], "stop": [3]}, "stop string must be a string"),
        ({"prompts": ["a"], "stop": b"x"}, "stop string must be a string"),
        ({"prompts": ["a"], "stop": ["x", ""]}, "must not be empty"),
        ({"prompts": ["a"], "max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"prompts": ["a"], "max_new_tokens": True}, "max_new_tokens must be an integer"),
    ],
    ids=str,
)
def test_things_of_another_type_are_refused(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(**arguments)


# --- logits that are not finite ---


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, logprobs=True)])
def test_a_row_that_meets_nan_ends_with_an_error_and_the_others_go_on(engine: Engine, sampling: SamplingParams) -> None:
    """The norm's weight times an embedding of NaN: only texts that come to token B are lost."""
    params = dict(engine.params)
    table = np.array(params["embed"]["weight"])
    table[B] = np.nan
    params["embed"] = {"weight": jax.device_put(table, params["embed"]["weight"].sharding)}
    broken = object.__new__(Engine)
    broken.__dict__.update({**engine.__dict__, "params": params, "chunk": 4})
    lost, kept = broken.generate(["a", "c"], dataclasses.replace(sampling, temperature=0.0), max_new_tokens=6)
    assert (lost.finish_reason, lost.token_ids, lost.text) == ("error", [B], "b")
    assert lost.error is not None
    assert "after 1 new tokens are not finite" in lost.error
    assert "check the checkpoint" in lost.error
    assert (kept.finish_reason, kept.error, kept.token_ids) == ("length", None, [C] * 6)
    for completion in (lost, kept):
        json.dumps(dataclasses.asdict(completion), allow_nan=False)
        assert completion.logprobs is None or len(completion.logprobs) == len(completion.token_ids)
    *_, last = broken.stream("a", max_new_tokens=6)
    assert last.completion is not None
    assert dataclasses.replace(last.completion, logprobs=lost.logprobs) == lost
    (nothing,) = broken.generate(["ab"], max_new_tokens=6)
    assert (nothing.finish_reason, nothing.token_ids, nothing.text) == ("error", [], "")


def test_float16_overflow_advises_bfloat16() -> None:
    row = Row([0], Ending(frozenset(), (), 5), None, logprobs=False, incremental=False, dtype="float16")
    row.add(np.array([3, NOT_FINITE, 0]), None)
    completion = row.completion()
    assert (completion.token_ids, completion.finish_reason) == ([3], "error")
    assert completion.error is not None
    assert "use bfloat16" in completion.error


# --- generation_config.json ---


def test_every_option_of_transformers_is_known() -> None:
    """Honoured, refused or without effect on the text; anything else is ignored with a warning."""
    known = {*settings._READ, *settings._UNSUPPORTED, *settings._UNSUPPORTED_SAMPLING, *settings._WITHOUT_EFFECT}
    assert not vars(GenerationConfig()).keys() - known
    assert len(known) == sum(
        map(len, (settings._READ, settings._UNSUPPORTED, settings._UNSUPPORTED_SAMPLING, settings._WITHOUT_EFFECT))
    )


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        ({"do_sample": True, "top_k": -1}, SamplingParams(temperature=1.0, top_k=-1)),
        ({"do_sample": True, "top_k": 0}, SamplingParams(temperature=1.0)),
        ({"do_sample": True, "top_p": 0.0}, SamplingParams(temperature=1.0, top_k=50, top_p=0.0)),
        ({"do_sample": True, "top_k": None, "min_p": None}, SamplingParams(temperature=1.0, top_k=50)),
        ({"do_sample": None, "temperature": 0.5}, SamplingParams()),
        ({"presence_penalty": 0.0, "frequency_penalty": 0, "num_return_sequences": 1}, SamplingParams()),
        (
            {"num_beams": 1, "typical_p": 1.0, "stop_strings": [], "bad_words_ids": [], "min_length": 0},
            SamplingParams(),
        ),
        ({"do_sample": False, "typical_p": 0.3, "epsilon_cutoff": 0.1}, SamplingParams()),
    ],
    ids=str,
)
def test_values_that_mean_off_are_off(folder: Path, content: dict[str, Any], sampling: SamplingParams) -> None:
    edit_json(folder / "generation_config.json", **content)
    assert load_generation_defaults(folder, convert.open_source(folder).config).sampling == sampling


def test_max_length_counts_prompt_and_new_tokens(folder: Path) -> None:
    config = convert.open_source(folder).config
    edit_json(folder / "generation_config.json", max_length=20)
    defaults = load_generation_defaults(folder, config)
    assert (defaults.new_tokens(5, 512), defaults.new_tokens(19, 512), defaults.new_tokens(5, 12)) == (15, 1, 7)
    with pytest.raises(InputError, match=r"max_length=20 .*Give max_new_tokens"):
        defaults.new_tokens(20, 512)
    edit_json(folder / "generation_config.json", max_new_tokens=100)
    assert load_generation_defaults(folder, config).new_tokens(40, 512) == 100
    assert load_generation_defaults(folder, config).new_tokens(500, 512) == 12


def test_an_unknown_option_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "generation_config.json", xtc_threshold=0.1)
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        load_generation_defaults(folder, convert.open_source(folder).config)
    assert "unknown options are ignored: xtc_threshold" in caplog.text
