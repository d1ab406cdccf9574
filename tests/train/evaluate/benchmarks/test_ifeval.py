"""IFEval: the numbers of lm-eval's own code on drawn responses, and its file form."""

import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, verdicts_of, write_lines
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.ifeval import TASKS, share
from train.rewards.instruction_kinds import KINDS

(TASK,) = TASKS
# Instructions whose published check needs neither a detector of languages nor the sentences of nltk.
INSTRUCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["river", "stone"]}),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "at least"}),
    ("keywords:frequency", {"keyword": "stone", "frequency": 2, "relation": "less than"}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}),
    ("detectable_format:constrained_response", {}),
    ("keywords:forbidden_words", {"forbidden_words": ["cloud"]}),
    ("keywords:letter_frequency", {"letter": "o", "let_frequency": 9, "let_relation": "at least"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 14, "relation": "less than"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("startend:end_checker", {"end_phrase": "river stone"}),
    ("startend:quotation", {}),
    ("punctuation:no_comma", {}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "river"},
    ),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "Stone"}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "River"}),
]
WORDS = ("river", "rivers", "Riverside", "stone", "cloud", "moss", "green", "old")
FORMS = (
    "{}",
    "Sure thing!\n{}",
    "* {}\n* {}",
    "{}\n***\n{}",
    "<<{}>>\n{}",
    '"{}"',
    "{} [name], {}",
    "{}\nP.S. {}",
    "{}\nP.S {}",
    "{}\np. s. {}",
    "{} P.P.S. {}",
    "SECTION 1\n{}\nSECTION 2\n{}",
    "Section 1 {} SECTION2 {}",
    "My answer is yes. {} My answer is no.",
    "{} My answer is maybe.",
    "A *{}* here",
    '["{}"]',
    "{}\nHope it helps, friend",
    "**{}**\n{} river stone",
    "{}\n\n{}",
    "{}\n\n\n\nriver, {}",
    "\n\n{}\n\n'River' {}",
    "{}******{}",
    "******{}\n*******{}",
    "{}******\n******{}",
    "stone******stone",
    "",
)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's code of IFEval. What it imports and does not use here is replaced."""
    pytest.importorskip("lm_eval")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    tokenizer = types.SimpleNamespace(tokenize=lambda text: re.findall(r"\w+", text))
    nltk = types.SimpleNamespace(
        data=types.SimpleNamespace(find=lambda name: name),
        tokenize=types.SimpleNamespace(RegexpTokenizer=lambda pattern: tokenizer),
    )
    for name, module in (("nltk", nltk), ("langdetect", None), ("immutabledict", None)):
        stand_in = module or types.SimpleNamespace(immutabledict=dict, LangDetectException=ValueError)
        monkeypatch.setitem(sys.modules, name, stand_in)
    utils = importlib.import_module("lm_eval.tasks.ifeval.utils")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return utils


def response(rng: np.random.Generator) -> str:
    text = str(rng.choice(FORMS))
    while "{}" in text:
        text = text.replace("{}", " ".join(rng.choice(WORDS, rng.integers(1, 7))), 1)
    return text


def test_the_numbers_are_those_of_lm_eval(oracle: Any, tmp_path: Path) -> None:
    rng = print_seed()
    records, texts = [], {}
    for key in range(600):
        chosen = [INSTRUCTIONS[i] for i in rng.choice(len(INSTRUCTIONS), rng.integers(1, 4), replace=False)]
        kinds, given = zip(*chosen, strict=True)
        records.append({"key": key, "prompt": "Write.", "instruction_id_list": kinds, "kwargs": given})
        texts[str(key)] = response(rng)
    items = items_of(TASK, write_lines(tmp_path / "data.jsonl", records))
    found = verdicts_of(TASK, items, lambda item, number, request: texts[item.id])
    names = {"prompt_strict": "prompt_level_strict_acc", "prompt_loose": "prompt_level_loose_acc"}
    names |= {"instruction_strict": "inst_level_strict_acc", "instruction_loose": "inst_level_loose_acc"}
    theirs = {str(one["key"]): oracle.process_results(one, [texts[str(one["key"])]]) for one in records}
    for name_of, verdict in found.items():
        ours = {name: verdict.details.get(name, verdict.scores[name]) for name in names}
        expected = {name: theirs[name_of][other] for name, other in names.items()}
        assert ours == expected, (texts[name_of], verdict.details)
    for name in ("instruction_strict", "instruction_loose"):
        whole = share([verdict.details[name] for verdict in found.values()])
        assert whole == pytest.approx(oracle.agg_inst_level_acc([one[names[name]] for one in theirs.values()]))
    # Both outcomes occur, and the loose form forgives something.
    strict = sum(verdict.scores["prompt_strict"] or 0 for verdict in found.values())
    assert 0 < strict < sum(verdict.scores["prompt_loose"] or 0 for verdict in found.values()) < 600


def test_the_documentation_names_the_kinds_that_differ() -> None:
    """The table of docs/benchmarks.md has a row for each kind that is not compared with the published program."""
    text = (Path(__file__).parents[4] / "docs" / "benchmarks.md").read_text()
    table = text.partition("| kind that is checked in another way |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+:\w+)`", table))
    assert named == set(KINDS) - {kind for kind, _ in INSTRUCTIONS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kwargs": []}, r"data\.jsonl, line 1: expected key"),
        ({"instruction_id_list": ["keywords:none"]}, r"line 1: There is no instruction 'keywords:none'"),
        ({"kwargs": [{"keyword": "a"}]}, "line 1: The instruction punctuation:no_comma has the arguments keyword"),
    ],
)
def test_wrong_lines_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    with pytest.raises(InputError, match=message):
        items_of(TASK, write_lines(tmp_path / "data.jsonl", [record | change]))
