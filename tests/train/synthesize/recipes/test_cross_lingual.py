# The texts are those of several languages.
# ruff: noqa: RUF001
"""Cross-lingual: what is in another language, has lost something or means something else is dropped, the rest kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.mistakes import FORMAL, drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.synthesize.generator import Answer, Request
from train.synthesize.item import content_key
from train.synthesize.marks import changed_mark, marks_of
from train.synthesize.recipes import cross_lingual
from train.synthesize.recipes.cross_lingual import LANGUAGES, pipeline
from train.synthesize.run import RunOptions, run

# What is asked of a topic, and what is answered, in each language; {0} is the topic and {1} a number.
ASKED = {
    "en": "Please tell me what the {0} is, and give me {1} reasons why they should have it for {{name}} in `{0}_x`.",
    "de": "Bitte sag mir, was das {0} ist, und nenne mir auch {1} Gründe für {{name}} in `{0}_x`, die nicht neu sind.",
    "fr": "Je veux savoir ce que c'est que le {0}, avec {1} raisons pour {{name}} dans `{0}_x`, et pas plus.",
    "ru": "Скажи мне, что такое {0}, и назови ещё {1} причины для {{name}} в `{0}_x`, это очень нужно.",
}
SAID = {
    "en": "It is the best that they have, and {0} has been there for {1} years with all of them.",
    "de": "Das ist das Beste, was sie haben, und {0} ist schon seit {1} Jahren bei uns und auch bei ihnen.",
    "fr": "C'est le plus beau dans la ville, et {0} est là pour vous avec {1} ans de plus que nous.",
    "ru": "Это лучшее, что у нас есть, и {0} уже {1} лет с нами, как и было для всех.",
}
TRANSLATIONS = ("good", "number", "name", "placeholder", "english", "topic", "list", "half", "cut", "empty", "refused")
RESPONSES = ("good", "other", "english", *FORMAL)
FOREIGN = [text[:8] for code, text in ASKED.items() if code != "en"]
CODES = {name: code for code, name in LANGUAGES.items()}


def topic_of(text: str) -> str:
    found = re.search(r"topic[a-z]+", text)
    return found[0] if found else ""


class Translator(ScriptedGenerator):
    """Plays all roles, gives vectors, and remembers its mistakes.

    Attributes:
      translations, responses: by text: what is wrong with it.
      unread: comparisons of which the judge said nothing that can be read.
    """

    def __init__(self, share_right: float = 0.4, unread: float = 0.0):
        super().__init__(self.play, "translator")
        self.translations: dict[str, str] = {}
        self.responses: dict[str, str] = {}
        self._share_right, self._unread = share_right, unread

    async def embed(self, text: str) -> list[float] | None:
        return self.vector(text)

    def vector(self, text: str) -> list[float]:
        """Vectors of a topic and what is said of it are the same in all languages."""
        other = "(other)" in text
        seed = content_key(topic_of(text) or text, other)
        return [int(seed[i : i + 2], 16) - 127.5 for i in range(0, 64, 2)]

    def play(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if prompt.startswith("Here are"):
            if rng.random() < self._unread:
                return "I think so."
            first, second = (
                topic_of(part) for part in re.split("came back:|Second answer:", prompt.split("\n\n", 1)[1])[:2]
            )
            same = first == second and "(other)" not in prompt
            return f"Point 1 {{is}} seen.\n{json.dumps({'same': same, 'difference': '?'})}"
        if prompt.startswith("Translate"):
            language = CODES[prompt.split("into ")[1].split(".")[0]]
            return self._translate(
                prompt.split("and add nothing.\n\n")[1].split("\n\nAnswer with a JSON")[0], language, rng
            )
        language = next(code for code, text in ASKED.items() if prompt.startswith(text[:8]))
        kind = "good" if rng.random() < self._share_right else rng.choice(RESPONSES)
        if language == "en":
            kind = "good"
        spoken = SAID["en" if kind == "english" else language]
        text = spoken.format(topic_of(prompt), rng.randrange(10**6))
        text += " (other)" if kind == "other" else ""
        made = FORMAL[kind](text) if kind in FORMAL and kind != "german" else text
        if kind == "german" and language == "de":
            kind = "good"
        elif kind == "german":
            made = SAID["de"].format(topic_of(prompt), rng.randrange(10**6))
        self.responses[made if isinstance(made, str) else made.text] = kind
        return made

    def _translate(self, text: str, language: str, rng: Any) -> str | Answer:
        forms = ASKED if "`" in text else SAID
        number = re.findall(r"\d+", text.replace("{name}", ""))[0]
        if language == "en":
            # Back: what came out wrong comes back wrong.
            back = forms["en"].format(topic_of(text), number) + (" (other)" if "(other)" in text else "")
            return json.dumps({"translation": back})
        kind = "good" if rng.random() < self._share_right else rng.choice(TRANSLATIONS)
        topic = topic_of(text) + ("q" if kind == "topic" else "")
        made = forms["en" if kind == "english" else language].format(topic, number)
        if kind == "topic":
            made = made.replace(f"`{topic}_x`", f"`{topic[:-1]}_x`")
        if kind == "number":
            made = made.replace(number, number + "1", 1)
        if kind == "name":
            made = made.replace("_x`", "_y`")
        if kind == "placeholder":
            made = made.replace("{name}", "{Name}")
        self.translations[made] = kind
        written = json.dumps([made] if kind == "list" else {"translation": made})
        return FORMAL[kind](written) if kind in FORMAL else written[: len(written) // 2] if kind == "half" else written


def questions(folder: Path, count: int, seed: int) -> str:
    path = folder / "questions.jsonl"
    letters = [f"topic{''.join(chr(97 + int(d)) for d in str(seed * 1000 + i))}" for i in range(count)]
    rows = [ASKED["en"].format(topic, 2 + i % 7) for i, topic in enumerate(letters)]
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": row}]}) + "\n" for row in rows))
    return str(path)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def models(pipeline_models: Any, model: Any) -> dict[str, Any]:
    return dict.fromkeys(pipeline_models, model)


@pytest.mark.parametrize("case", range(3))
def test_only_what_means_the_same_is_kept_and_all_of_it(case: int, tmp_path: Path) -> None:
    files = (questions(tmp_path, 40, int(print_seed().integers(1 << 20))),)
    made = pipeline(files=files, languages=("de", "fr", "ru", "en"), samples=3, translations=2, keep=3)
    translator = Translator()
    with reachable(models(made.models, translator), over_http=case == 0) as given:
        summary = run(made, given, tmp_path / "run", RunOptions(16))
    kept = set()
    for row in rows_of(tmp_path / "run", "sft"):
        user, assistant = (message["content"] for message in row["messages"])
        assert translator.translations[user] == "good"
        assert translator.responses[assistant] == "good"
        assert row["language"] in ("de", "fr", "ru")
        kept.add((user, assistant))
    # Recall: every good response to a good translation.
    good = {text for text, kind in translator.responses.items() if kind == "good"}
    asked = {str(r.messages[-1]["content"]) for r in translator.asked}
    asked_good = {text for text, kind in translator.translations.items() if kind == "good" and text in asked}
    expected = sum(
        topic_of(text) in {topic_of(a) for a in asked_good} for text in good if not text.startswith("It is the best")
    )
    print(f"precision 1, recall {len(kept)}/{expected}, {len(asked_good)} good translations of 120")
    assert len(kept) == expected > 60
    # The original is asked, too.
    assert {translator.translations.get(text) for text in asked if text[:8] in FOREIGN} == {"good"}
    audits = summary["audits"]
    assert audits["judge"]["wrong"][1] == audits["embeddings"]["wrong"][1] == audits["marks"]["wrong"][1] == 0
    for row in rows_of(tmp_path / "run", "pairs"):
        assert translator.responses[row["chosen"][0]["content"]] == "good"
        assert translator.responses[row["rejected"][0]["content"]] == "other"
    assert len(list(read_examples([tmp_path / "run" / "sft.jsonl"]))) == len(kept)


@pytest.mark.parametrize("system", ["translate", "keep"])
def test_system_messages_are_translated_once_and_other_beginnings_counted(system: Any, tmp_path: Path) -> None:
    seed = int(print_seed().integers(1 << 20))
    path = Path(questions(tmp_path, 30, seed))
    texts = [SAID["en"].format(topic, 4) for topic in ("topica", "topicb")]
    rows = [json.loads(line)["messages"] for line in path.open()]
    for number, messages in enumerate(rows):
        if number % 3:
            messages.insert(0, {"role": "system", "content": texts[number % 3 - 1]})
    others = [[{"role": "assistant", "content": f"Hello {i}."}] for i in range(4)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in [*rows, *others]))
    made = pipeline(files=(str(path),), languages=("de", "fr"), samples=1, system=system)
    translator = Translator(1.0)
    summary = run(made, models(made.models, translator), tmp_path / "run")
    assert summary["stages"][0]["rejected"] == {"the conversation does not begin with a user": 4}
    found = rows_of(tmp_path / "run", "sft")
    by_language = [tuple(row["messages"][0]["content"] for row in found if row["language"] == x) for x in ("de", "fr")]
    for language, texts_there in zip(("de", "fr"), by_language, strict=True):
        expected = {text if system == "keep" else SAID[language].format(topic_of(text), 4) for text in texts}
        assert {text for text in texts_there if text[:8] not in FOREIGN} == expected
    assert sum([m["role"] for m in row["messages"]] == ["system", "user", "assistant"] for row in found) == 40
    assert len(found) == 60
    # Of the same text in all conversations there is one translation, which is one request.
    prompts = [str(request.messages[-1]["content"]) for request in translator.asked]
    for text in texts:
        asked = [prompt for prompt in prompts if prompt.startswith("Translate") and text in prompt]
        assert len(asked) == (2 if system == "translate" else 0)
    # The response is asked for under the message that stands in the data.
    answered = [r for r in translator.asked if r.messages[-1]["content"][:8] in FOREIGN]
    assert {len(request.messages) for request in answered} == {1, 2}


def test_a_system_message_with_another_meaning_is_not_kept(tmp_path: Path) -> None:
    def changes(request: Request) -> str | Answer:
        text = str(request.messages[-1]["content"])
        if text.startswith("Translate") and "topicz" in text and "into German" in text:
            return json.dumps({"translation": SAID["de"].format("topicy", 4)})
        return Translator(1.0).play(request)

    path = Path(questions(tmp_path, 5, int(print_seed().integers(1 << 20))))
    rows = [json.loads(line)["messages"] for line in path.open()]
    system = {"role": "system", "content": SAID["en"].format("topicz", 4)}
    path.write_text("".join(json.dumps({"messages": [system, *messages]}) + "\n" for messages in rows))
    made = pipeline(files=(str(path),), languages=("de",), embeddings=False)
    summary = run(made, models(made.models, ScriptedGenerator(changes)), tmp_path / "run")
    assert summary["stages"][1]["rejected"] == {"system message: another meaning after translating back": 5}


def test_what_the_judge_does_not_say_is_not_kept(tmp_path: Path) -> None:
    files = (questions(tmp_path, 20, int(print_seed().integers(1 << 20))),)
    made = pipeline(files=files, languages=("de",), embeddings=False)
    assert made.models == ("generator", "judge")
    summary = run(made, models(made.models, Translator(1.0, unread=1.0)), tmp_path / "run")
    assert summary["stages"][1]["rejected"] == {"not judged": 20}


def test_vectors_are_asked_for_once(tmp_path: Path) -> None:
    class Counting(Translator):
        vectors = 0

        async def embed(self, text: str) -> list[float] | None:
            self.vectors += 1
            return await super().embed(text)

    files = (questions(tmp_path, 10, int(print_seed().integers(1 << 20))),)
    made = pipeline(files=files, languages=("de", "fr"))
    first, second = Counting(), Counting()
    run(made, models(made.models, first), tmp_path / "run")
    for path in (tmp_path / "run" / "parts").glob("*/*"):
        path.unlink()
    content = (tmp_path / "run" / "sft.jsonl").read_bytes()
    run(made, models(made.models, second), tmp_path / "run")
    assert (tmp_path / "run" / "sft.jsonl").read_bytes() == content
    assert first.vectors > 20
    assert (second.vectors, second.asked) == (0, [])


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    class Nonsense(ScriptedGenerator):
        async def embed(self, text: str) -> list[float] | None:
            return [1.0, 0.0]

    files = (questions(tmp_path, 20, int(print_seed().integers(1 << 20))),)
    made = pipeline(files=files, languages=("de", "sw"))
    summary = run(made, models(made.models, Nonsense(nonsense)), tmp_path / "run")
    assert [output["rows"] for output in summary["outputs"]] == [0, 0]


@pytest.mark.parametrize("name", ["judge", "embeddings", "marks"])
def test_checks_that_let_everything_pass_end_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind(Translator):
        async def embed(self, text: str) -> list[float] | None:
            return [1.0] if name == "embeddings" else await super().embed(text)

    def judge(request: Request) -> str | Answer:
        return '{"same": true}' if name == "judge" else Translator(1.0).play(request)

    if name == "marks":
        monkeypatch.setattr(cross_lingual, "changed_mark", lambda before, after: None)
    files = (questions(tmp_path, 120, int(print_seed().integers(1 << 20))),)
    made = pipeline(files=files, languages=("de", "fr"), samples=1)
    given = {"generator": Blind(1.0), "judge": ScriptedGenerator(judge, "judge"), "embedder": Blind()}
    with pytest.raises(InputError, match=f"The check {name} cannot be trusted: it passed"):
        run(made, given, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for content, message in (
        ("", "no record|empty"),
        ('{"text": "What?"}\n', "expected the column messages, or prompt"),
        ('{"prompt": " "}\n', "expected an instruction that is not empty"),
        ('{"prompt": "a", "completion": 3}\n', "a text as its response"),
        ('{"messages": [{"role": "user"}]}\n', "expected messages with role and content"),
        ('{"messages": [{"role": "system", "content": "x"}]}\n', "no record"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            pipeline(files=(str(path),))
    path.write_text('{"prompt": "a"}\n')
    for options in (
        {"languages": ()}, {"languages": ("xx",)}, {"languages": ("de", "de")}, {"samples": 0}, {"translations": 0},
        {"least_similarity": 2.0}, {"temperature": float("nan")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(files=(str(path),), **options)  # type: ignore[arg-type]
    made = pipeline(files=(str(path),), languages=("de",))
    text = json.dumps({"translation": "Das ist für dich und nicht für mich, aber auch gut."})
    with pytest.raises(InputError, match="gives no embeddings"):
        run(made, models(made.models, ScriptedGenerator(lambda request: text)), tmp_path / "run")


def test_marks_of_texts() -> None:
    text = "Use `a b` and {x} {{ y }} %s <NAME> [CITY] $HOME at https://a.b/c?d=1, in 1,234.5 s.\n```py\nx = 3\n```"
    found = marks_of(text)
    assert sorted(kind for kind, _ in found) == [
        "code", "code block", "link", "number", "placeholder", "placeholder", "placeholder", "placeholder",
        "placeholder", "placeholder",
    ]  # fmt: skip
    assert changed_mark(text, text.replace("1,234.5", "1.234,5")) is None
    assert changed_mark("12 days", "\u0661\u0662 \u064a\u0648\u0645\u0627") is None
    for old, new, kind in (
        ("x = 3", "x = 4", "code block"), ("`a b`", "`a c`", "code"), ("d=1", "d=2", "link"),
        ("{x}", "{z}", "placeholder"),
        ("<NAME>", "name", "placeholder"), ("1,234.5", "1,234.6", "number"), ("%s", "s", "placeholder"),
    ):  # fmt: skip
        assert changed_mark(text, text.replace(old, new)) == kind


def test_two_hundred_translations_a_second(tmp_path: Path) -> None:
    made = pipeline(files=(questions(tmp_path, 150, 7),), languages=("de", "fr"), samples=1)
    scripted = models(made.models, Translator(1.0))
    rate = best_rate(300, lambda attempt: run(made, scripted, tmp_path / str(attempt)), enough=200)
    assert len(rows_of(tmp_path / "0", "sft")) == 300
    assert rate > 200
