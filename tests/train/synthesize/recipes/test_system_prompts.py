"""System prompts: conversations that break a rule are dropped, the others kept; and scores over system prompts."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.mistakes import FORMAL, drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.rewards.instructions import InstructionReward
from train.synthesize.generator import Answer, Request
from train.synthesize.made_system_prompts import broken_rule, make_system_prompt
from train.synthesize.recipes import system_prompts
from train.synthesize.recipes.system_prompts import pipeline
from train.synthesize.run import RunOptions, run
from train.synthesize.system_prompts_evaluation import evaluate_system_prompts, robustness

SAID = {
    "en": "This is what we have for you and it is good",
    "de": "Das ist für dich und mich und auch gut, aber nicht neu".replace(",", ""),
    "fr": "Je suis avec vous dans la ville et pour les autres aussi",
    "es": "Lo que hay para ti es muy bueno y también para los otros",
    "it": "Questo è per te e anche per gli altri che sono nella casa",
}
KINDS = ("good", "rule", "style", *(kind for kind in FORMAL if kind != "german"))


class Assistant:
    """Plays all roles, and remembers its mistakes.

    Attributes:
      kinds: by answer: what is wrong with it.
      rules: by system prompt.
    """

    def __init__(self, made: Any, share_right: float = 0.4):
        self.kinds: dict[str, str] = {}
        self._by_source = {item["prompt"]: item["rules"] for item in made.source()}
        self._share_right = share_right

    def rules(self, prompt: str) -> Any:
        # One prompt may be the beginning of another.
        return self._by_source[max((known for known in self._by_source if known in prompt), key=len)]

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if prompt.startswith("Here is a system prompt"):
            return self._rewrite(prompt.split("Add no rule.\n\n")[1].split("\n\nAnswer with")[0], rng)
        if prompt.startswith("Write one message"):
            return json.dumps({"message": f"What is number {rng.randrange(10**6)}?"}) if rng.random() < 0.8 else "{"
        if prompt.startswith("Here are the system prompt"):
            answer = prompt.split("Answer:\n")[1].split("\n\nFirst check")[0]
            follows = self.kinds.get(answer) in ("good", "rule")
            return f"Rule 1 {{so}}.\n{json.dumps({'follows': follows, 'broken': '?'})}"
        kind = "good" if rng.random() < self._share_right else rng.choice(KINDS)
        rules = dict(self.rules(str(request.messages[0]["content"])))
        if kind == "rule" and not rules:
            kind = "style"
        text = self._answer(rules, kind, rng)
        self.kinds[text] = kind
        return FORMAL[kind](text) if kind in FORMAL else text

    def _answer(self, rules: dict[str, Any], kind: str, rng: random.Random) -> str:
        language = rules.get("language:response_language", {}).get("language", "en")
        text = f"{SAID[language]} {rng.randrange(10**9)}."
        if "detectable_format:title" in rules:
            text = f"<<{rng.randrange(10)}>>\n{text}"
        if "startend:end_checker" in rules:
            text += " " + rules["startend:end_checker"]["end_phrase"]
        if kind == "rule":
            broken = rng.choice(sorted(rules))
            text = {
                "language:response_language": lambda: text.replace(
                    SAID[language], SAID["de" if language != "de" else "en"]
                ),
                "keywords:forbidden_words": lambda: rules[broken]["forbidden_words"][0] + " " + text,
                "length_constraints:number_words": lambda: " ".join(map(str, range(200))) + " " + text,
                "startend:end_checker": lambda: text + " And more.",
                "punctuation:no_comma": lambda: "Well, " + text,
                "detectable_format:title": lambda: text.replace("<<", "").replace(">>", ""),
            }[broken]()
        return text

    def _rewrite(self, prompt: str, rng: random.Random) -> str:
        kind = rng.choice(("good", "number", "list", "half"))
        text = "Remember this. " + prompt + (" Use 7 words." if kind == "number" else "")
        made = json.dumps([text] if kind == "list" else {"prompt": text})
        return made[: len(made) // 2] if kind == "half" else made


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


@pytest.mark.parametrize("case", range(3))
def test_only_answers_that_keep_to_the_prompt_are_kept_and_all_of_them(case: int, tmp_path: Path) -> None:
    made = pipeline(prompts=40, conversations=3, samples=2, keep=2, seed=int(print_seed().integers(1 << 30)))
    assistant = Assistant(made)
    scripted = {name: ScriptedGenerator(assistant, name) for name in made.models}
    with reachable(scripted, over_http=case == 0) as models:
        summary = run(made, models, tmp_path, RunOptions(16))
    kept = set()
    for row in rows_of(tmp_path, "sft"):
        system, user, answer = row["messages"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert assistant.kinds[answer["content"]] == "good"
        assert broken_rule(assistant.rules(system["content"]), answer["content"]) is None
        assert "Use 7 words" not in system["content"]
        kept.add(answer["content"])
    good = {text for text, kind in assistant.kinds.items() if kind == "good"}
    print(f"precision 1, recall {len(kept)}/{len(good)}")
    assert kept == good
    assert len(kept) > 40
    for row in rows_of(tmp_path, "pairs"):
        assert assistant.kinds[row["chosen"][0]["content"]] == "good"
        assert assistant.kinds[row["rejected"][0]["content"]] in ("rule", "style")
    prompts = rows_of(tmp_path, "grpo")
    columns = {name: [row[name] for row in prompts] for name in ("instruction_id_list", "kwargs")}
    rewards = InstructionReward()(["" for _ in prompts], [True for _ in prompts], **columns)
    assert all(reward in (0.0, 1.0) for reward in rewards)
    assert summary["audits"]["judge"]["wrong"][1] == summary["audits"]["rules"]["wrong"][1] == 0
    assert len(list(read_examples([tmp_path / "sft.jsonl"]))) == len(kept)


def test_hundreds_of_system_prompts_are_different() -> None:
    seed = int(print_seed().integers(1 << 30))
    texts = {make_system_prompt(random.Random(f"{seed} {i}")).text for i in range(500)}
    assert len(texts) > 400


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    made = pipeline(prompts=20, seed=int(print_seed().integers(1 << 30)))
    summary = run(made, {name: ScriptedGenerator(nonsense, name) for name in made.models}, tmp_path)
    assert [output["rows"] for output in summary["outputs"]] == [0, 0, 0]


@pytest.mark.parametrize("name", ["judge", "rules"])
def test_checks_that_let_everything_pass_end_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pipeline(prompts=60, conversations=4, seed=int(print_seed().integers(1 << 30)))
    assistant = Assistant(made, 0.9)
    judge = ScriptedGenerator(lambda _: '{"follows": true}' if name == "judge" else '{"follows": false}', "judge")
    if name == "rules":
        monkeypatch.setattr(system_prompts, "broken_rule", lambda rules, text: None)
    with pytest.raises(InputError, match=f"The check {name} cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(assistant), "judge": judge}, tmp_path / "run", RunOptions(16))


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for content, message in (("", "no record|empty"), ('{"prompt": "a"}\n', "column question")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            pipeline(questions=(str(path),))
    for options in ({"prompts": 0}, {"conversations": 0}, {"samples": 0}, {"rewritten": 2.0}, {"temperature": -1.0}):
        with pytest.raises(InputError):
            pipeline(**options)  # type: ignore[arg-type]


def test_two_hundred_conversations_a_second(tmp_path: Path) -> None:
    made = pipeline(prompts=60, conversations=8, samples=1, rewritten=0.0)
    assistant = Assistant(made, 1.0)
    models = {name: ScriptedGenerator(assistant, name) for name in made.models}
    run(made, models, tmp_path / "first")
    count = len(rows_of(tmp_path / "first", "sft"))
    assert best_rate(count, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200) > 200


def test_scores_over_system_prompts() -> None:
    """A model that is right where a table says so has the means of the table; without a change there is no variance."""
    rng = print_seed()
    right = rng.random((4, 30)) < np.array([[1.0], [0.8], [0.5], [0.0]])
    prompts = [f"prompt {i}" for i in range(4)]
    questions = [{"question": f"question {i}", "answer": str(i)} for i in range(30)]

    def answer(request: Request) -> str:
        i, j = (int(str(message["content"]).split()[1]) for message in request.messages)
        return str(j if right[i, j] else -1)

    def score(question: Any, text: str) -> float:
        return float(text == question["answer"])

    found = asyncio.run(evaluate_system_prompts(ScriptedGenerator(answer), prompts, questions, score))
    assert found.scores == pytest.approx(tuple(right.mean(1)))
    assert found.mean == pytest.approx(right.mean())
    assert found.variance == pytest.approx(right.mean(1).var())
    assert found.spread == pytest.approx(right.var(0).mean())
    assert (found.best, found.worst, found.missing) == (0, 3, 0)
    same = robustness(np.repeat(rng.random((1, 9)), 5, 0))
    assert (same.variance, same.spread) == pytest.approx((0.0, 0.0))
    assert robustness(np.array([[1.0, np.nan], [np.nan, np.nan]])).scores == (1.0, None)
    with pytest.raises(InputError, match="No answer has a score"):
        robustness(np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="at least two system prompts"):
        asyncio.run(evaluate_system_prompts(ScriptedGenerator(answer), prompts[:1], questions, score))


def test_what_the_check_of_rules_is_tried_on_breaks_each_rule() -> None:
    seed = int(print_seed().integers(1 << 30))
    for i in range(300):
        for rule in make_system_prompt(random.Random(f"{seed} {i}")).rules:
            assert broken_rule([rule], system_prompts._breaking([rule])) is not None
