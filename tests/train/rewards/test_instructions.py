# The languages are many.
# ruff: noqa: RUF001
"""The 25 kinds of instructions: followed and not followed by hand, and followed by construction."""

import json
import string
import time
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.rewards import load_reward
from train.rewards.instruction_kinds import KINDS, count_sentences
from train.rewards.instructions import check_instruction
from train.rewards.languages import is_english, language_of

# Kind, arguments, responses that follow it, responses that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["red", "blue sky"]}, ["A RED car, a Blue sky."], ["red", "hundred blue skys"]),
    ("keywords:existence", {"keywords": ["c++"]}, ["I like C++."], ["I like c."]),
    (
        "keywords:frequency", {"keyword": "red", "frequency": 2, "relation": "at least"},
        ["Red red.", "red, red, red"], ["red", "red hundred"],
    ),
    (
        "keywords:frequency", {"keyword": "red", "frequency": 2, "relation": "less than"},
        ["red hundred", "blue"], ["red red"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["red", "not"]}, ["hundred knots"], ["It is NOT.", "red-hot"]),
    (
        "keywords:letter_frequency", {"letter": "A", "let_frequency": 3, "let_relation": "at least"},
        ["aAa", "banana"], ["aa"],
    ),
    (
        "keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, ["# a"], ["##"],
    ),
    (
        "language:response_language", {"language": "de"},
        ["Das ist ein Haus und es ist sehr schön."], ["This is a house and it is very nice.", "123", "这是房子"],
    ),
    (
        "length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "a\n\nb\n\nc"], ["One. Two", "Dr. A. B. Smith has 3.5 cars, i.e. few."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs", {"num_paragraphs": 2},
        ["a\n\nb\n***\nc", "***\na\n***\nb\n***"], ["a\n\nb", "a\n***\n***\nb", "a***b***c", "a ****** b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a b, c!"], ["a - b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["a b c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
        ["a\n\nwell, b", 'a\n\n\n"WELL" b'], ["well a\n\nb", "a\n\nwell b\n\nc", "a\n\nwells b", "a\nwell b"],
    ),
    (
        "detectable_content:number_placeholders", {"num_placeholders": 2},
        ["[name] at [your address]", "[a][b][c]"], ["[name]", "[] [ ] [a]", "[a\nb] [c]"],
    ),
    (
        "detectable_content:postscript", {"postscript_marker": "P.S."},
        ["Hi.\nP.S. Bye", "Hi.\n**p. s.** Bye", "P.S: bye"], ["Hi. P.S. Bye", "Hi.\nP.P.S. Bye", "Hi\nP.S.", "PS"],
    ),
    (
        "detectable_content:postscript", {"postscript_marker": "P.P.S"},
        ["Hi.\nP.P.S Bye", "Hi.\nP.P.S. Bye"], ["Hi.\nP.S. Bye"],
    ),
    (
        "detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["a\n* b\n  - c", "- a\n- b"], ["* a", "* a\n* b\n* c", "*a*\n*b*", "* * *\n- - -"],
    ),
    (
        "detectable_format:constrained_response", {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["yes", "My answer is yes", "My answer is yes. My answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections", {"num_highlights": 2},
        ["*a b* and **c**", "*a* *b* *c*"], ["*a*", "* a\n* b\n", "** ** and *\n*", "***\n***"],
    ),
    (
        "detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\n**Section 2**\nb"],
        ["SECTION 1\na\nSECTION 1\nb", "SECTION 1 and SECTION 2", "SECTION\nSECTION"],
    ),
    (
        "detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "3"],
        ["{a: 1}", "So: {}", "NaN", "{"],
    ),
    ("detectable_format:title", {}, ["<<Joy>>\nla"], ["<Joy>", "<< >>", "<<\nJoy>>", "<<>>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******", "a***b", "a******b******c"]),
    (
        "combination:repeat_prompt", {"prompt_to_repeat": "Say hi."},
        ["Say hi.\n\nHi", "say hi. Hi"], ["Hi", "Say hi.", "I say: Say hi. Hi"],
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. The end. ", '"a the END."'], ["The end. So", "The end"]),
    ("startend:quotation", {}, ['"a"', ' "a "b" c"\n'], ['"a', 'a"', '"', '""', "'a'"]),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
        ["I am HERE", "NATO and U.S. law", "A B C"], ["Hi THERE", "AI-based", "123 4"],
    ),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"},
        ["Hi there"], ["I am"],
    ),
    (
        "change_case:english_capital", {},
        ["THIS IS THE END.", "HELLO WORLD 3"],
        ["THIS is THE END.", "DAS IST EIN HAUS UND ES IST NICHT SCHÖN", "123", "ДОМ"],
    ),
    ("change_case:english_lowercase", {}, ["this is the end."], ["This is the end.", "das ist ein haus", "123"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


def test_every_kind_has_cases() -> None:
    assert {kind for kind, *_ in CASES} == set(KINDS)
    assert len(KINDS) == 25


@pytest.mark.parametrize(("kind", "arguments", "right", "wrong"), CASES, ids=[case[0] for case in CASES])
def test_kinds(kind: str, arguments: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert check_instruction(kind, arguments, text), text
        # A response that follows an instruction strictly follows it loosely too.
        assert check_instruction(kind, arguments, text, loose=True), text
    for text in [*wrong, "", " \n"]:
        assert not check_instruction(kind, arguments, text), text


def test_long_hostile_texts_take_no_time() -> None:
    """No kind is quadratic in what a policy may write; the longest of these took a minute when one was."""
    reward: Any = load_reward("instructions", loose=True)
    texts = ["\n" * 40_000, "* " * 20_000, "[" * 40_000, "<<" * 20_000, "P.S. " * 8_000, ".\n" * 20_000]
    begin = time.perf_counter()
    for kind, arguments in {case[0]: case[1] for case in CASES}.items():
        ids, given = [[kind]] * len(texts), [[arguments]] * len(texts)
        prompts = [[{"role": "user", "content": "x"}]] * len(texts)
        reward(completions=texts, finished=[True] * len(texts), prompts=prompts, instruction_id_list=ids, kwargs=given)
    assert time.perf_counter() - begin < 20


def test_texts_that_follow_by_construction() -> None:
    """Counts of random texts are exact: the bound that is met fails one further."""
    rng = print_seed()

    def word() -> str:
        # No vowels: no random word is one of those that are counted.
        return "".join(rng.choice(list("bcdfgk"), int(rng.integers(3, 9))))

    def check(kind: str, text: str, **arguments: Any) -> bool:
        return check_instruction(kind, arguments, text)

    for _ in range(50):
        n, words = int(rng.integers(1, 8)), [word() for _ in range(40)]
        key = "zebra"
        with_key = [*words, *[str(rng.choice([key, "Zebra", "ZEBRA"])) for _ in range(n)]]
        rng.shuffle(with_key)
        text = " ".join(with_key)
        for relation, expected in (("at least", (True, False)), ("less than", (False, True))):
            for bound, result in zip((n, n + 1), expected, strict=True):
                assert check("keywords:frequency", text, keyword=key, frequency=bound, relation=relation) is result
                assert check("length_constraints:number_words", text, num_words=bound + 40, relation=relation) is result
                sentences = " ".join(f"{word().capitalize()} {word()}{'.!?'[i % 3]}" for i in range(n))
                found = check("length_constraints:number_sentences", sentences, num_sentences=bound, relation=relation)
                assert found is result
                letters = text.replace("z", "").replace("Z", "") + "z" * n
                found = check(
                    "keywords:letter_frequency", letters, letter="z", let_frequency=bound, let_relation=relation
                )
                assert found is result
                capitals = " ".join([*words, *[word().upper() for _ in range(n)]])
                kind = "change_case:capital_word_frequency"
                assert check(kind, capitals, capital_frequency=bound, capital_relation=relation) is result
        assert check("keywords:existence", text, keywords=[key, words[0]])
        assert not check("keywords:forbidden_words", text, forbidden_words=[words[1], key])
        assert check("keywords:forbidden_words", " ".join(words), forbidden_words=[key])
        parts = [f"{word()} {word()}" for _ in range(n)]
        for count in (n, n + 1):
            right = count == n
            assert check("length_constraints:number_paragraphs", "\n***\n".join(parts), num_paragraphs=count) is right
            bullets = "\n".join(f"{rng.choice(['*', '-'])} {part}" for part in parts)
            assert check("detectable_format:number_bullet_lists", bullets, num_bullets=count) is right
            marked = " and ".join(f"[{part}]" for part in parts)
            assert check("detectable_content:number_placeholders", marked, num_placeholders=count) is right
            stars = " and ".join(f"*{part}*" for part in parts)
            assert check("detectable_format:number_highlighted_sections", stars, num_highlights=count) is right
            sections = "\n".join(f"Part {i}\n{part}" for i, part in enumerate(parts))
            found = check("detectable_format:multiple_sections", sections, section_spliter="Part", num_sections=count)
            assert found is right
        nth = int(rng.integers(1, n + 1))
        asked = {"num_paragraphs": n, "nth_paragraph": nth, "first_word": parts[nth - 1].split()[0]}
        assert check("length_constraints:nth_paragraph_first_word", "\n\n".join(parts), **asked)
        assert check("combination:repeat_prompt", f"{text}\n{parts[0]}", prompt_to_repeat=text)
        assert check("startend:end_checker", f"{text} {parts[0]}", end_phrase=parts[0])
        value = {word(): [n, word()], word(): None}
        assert check("detectable_format:json_format", json.dumps(value))


def test_loose_takes_away_what_models_add() -> None:
    asked: dict[str, Any] = {"prompt_to_repeat": "Say hi."}
    for text in ("Sure!\nSay hi.\nHi", "**Say hi.**\nHi", "Sure!\n*Say* hi.\nHi\nBye"):
        assert not check_instruction("combination:repeat_prompt", asked, text)
        assert check_instruction("combination:repeat_prompt", asked, text, loose=True)
    assert not check_instruction("startend:quotation", {}, "", loose=True)
    assert check_instruction("startend:quotation", {}, 'Sure:\n"a"\nBye', loose=True)


def test_rewards_of_prompts_and_of_instructions() -> None:
    ids = ["punctuation:no_comma", "keywords:existence"]
    # As tables hold them: all arguments of all kinds, None where there is none, integers as floats.
    arguments: list[dict[str, Any]] = [{"keywords": None, "num_words": None}, {"keywords": ["red"], "num_words": None}]
    texts = ["red", "red,", "blue,", "red"]
    columns = {"instruction_id_list": [ids] * 4, "kwargs": [arguments] * 4}
    finished = [True, True, True, False]
    assert load_reward("instructions")(completions=texts, finished=finished, **columns) == [1, 0, 0, 0]
    each: Any = load_reward("instructions", each="instruction")
    assert each(completions=texts, finished=finished, **columns) == [1, 0.5, 0, 0]
    as_text = {name: [json.dumps(x) for x in values] for name, values in columns.items()}
    assert each(completions=texts, finished=finished, **as_text) == [1, 0.5, 0, 0]
    assert each(completions=["a"], finished=[True], instruction_id_list=[[]], kwargs=[[]]) == [None]
    loose = load_reward("instructions", loose=True)
    assert loose(completions=["Sure, red:\nred"], finished=[True], instruction_id_list=[ids], kwargs=[arguments]) == [1]
    assert check_instruction("length_constraints:number_words", {"num_words": 2.0, "relation": "at least"}, "a b")


def test_bad_instructions() -> None:
    for kind, arguments, words in (
        ("keywords:nothing", {}, "There is no instruction"),
        ("keywords:existence", {}, "has the arguments none; expected keywords"),
        ("punctuation:no_comma", {"n": 1}, "arguments n; expected none"),
        ("keywords:existence", {"keywords": "red"}, "expected a list of texts"),
        ("keywords:existence", {"keywords": []}, "expected a list of texts"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "expected an integer"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "around"}, "'less than' or 'at least'"),
        ("startend:end_checker", {"end_phrase": " "}, "expected a text"),
    ):
        with pytest.raises(InputError, match=words):
            check_instruction(kind, arguments, "")
    reward = load_reward("instructions")
    for ids, given in (("{", []), ([1], [{}]), (["punctuation:no_comma"], []), (["punctuation:no_comma"], [3])):
        with pytest.raises(InputError, match="completion 0: expected"):
            reward(completions=["a"], finished=[False], instruction_id_list=[ids], kwargs=[given])
    with pytest.raises(InputError, match="prompt or instruction"):
        load_reward("instructions", each="word")


def test_sentences() -> None:
    for text, count in (
        ("", 0), ("...", 0), ("Hi", 1), ("Hi. Ho.", 2), ("Wait... what?!", 2), ('He said "Go." Then he left.', 2),
        ("Mr. and Mrs. B. Jones paid 3.50 at 5 p.m. today.", 1), ("1. One.\n2. Two.", 2), ("好。再见！", 2),
        ("A title\n\nA sentence.", 2), ("So do I. Good.", 2), ("See example.com for more.", 1),
    ):  # fmt: skip
        assert count_sentences(text) == count, text


# The same sentence in each language: the weather is nice today, and we go to the park with the children.
SENTENCES = {
    "en": "The weather is nice today and we will go to the park with our children.",
    "es": "El tiempo es muy bueno hoy y vamos a ir al parque con los niños.",
    "pt": "O tempo está muito bom hoje e nós vamos ao parque com as crianças.",
    "fr": "Il fait très beau aujourd'hui et nous allons au parc avec les enfants.",
    "de": "Das Wetter ist heute sehr schön und wir gehen mit den Kindern in den Park.",
    "it": "Il tempo è molto bello oggi e andiamo al parco con i bambini.",
    "pl": "Pogoda jest dzisiaj bardzo ładna i idziemy do parku z dziećmi.",
    "vi": "Hôm nay thời tiết rất đẹp và chúng tôi sẽ đi công viên với các con.",
    "sw": "Hali ya hewa ni nzuri sana leo na tutaenda kwenye bustani pamoja na watoto.",
    "fi": "Sää on tänään hyvin kaunis ja me menemme puistoon lasten kanssa.",
    "nl": "Het weer is vandaag erg mooi en we gaan met de kinderen naar het park.",
    "sv": "Vädret är mycket fint idag och vi ska gå till parken med barnen.",
    "tr": "Bugün hava çok güzel ve biz çocuklar ile parka gideceğiz.",
    "id": "Cuaca hari ini sangat bagus dan kami akan pergi ke taman dengan anak-anak.",
    "ru": "Сегодня очень хорошая погода, и мы пойдём в парк с детьми.",
    "uk": "Сьогодні дуже гарна погода, і ми підемо в парк з дітьми.",
    "bg": "Днес времето е много хубаво и ние ще отидем в парка с децата.",
    "hi": "आज मौसम बहुत अच्छा है और हम बच्चों के साथ पार्क में जाएंगे।",
    "mr": "आज हवामान खूप छान आहे आणि आम्ही मुलांसोबत उद्यानात जाणार आहोत.",
    "ne": "आज मौसम धेरै राम्रो छ र हामी बच्चाहरूसँग पार्कमा जानेछौं।",
    "ar": "الطقس جميل جدا اليوم وسوف نذهب إلى الحديقة مع الأطفال.",
    "fa": "امروز هوا خیلی خوب است و ما با بچه‌ها به پارک می‌رویم.",
    "ur": "آج موسم بہت اچھا ہے اور ہم بچوں کے ساتھ پارک جائیں گے۔",
    "ja": "今日は天気がとても良いので、子供たちと公園に行きます。",
    "zh": "今天天气很好，我们要和孩子们一起去公园。",
    "ko": "오늘 날씨가 매우 좋아서 아이들과 함께 공원에 갈 것입니다.",
    "th": "วันนี้อากาศดีมากและเราจะไปสวนสาธารณะกับเด็กๆ",
    "he": "מזג האוויר יפה מאוד היום ואנחנו נלך לפארק עם הילדים.",
    "el": "Ο καιρός είναι πολύ καλός σήμερα και θα πάμε στο πάρκο με τα παιδιά.",
    "bn": "আজ আবহাওয়া খুব সুন্দর এবং আমরা বাচ্চাদের সাথে পার্কে যাব।",
    "ta": "இன்று வானிலை மிகவும் நன்றாக உள்ளது, நாங்கள் குழந்தைகளுடன் பூங்காவிற்குச் செல்வோம்.",
    "te": "ఈ రోజు వాతావరణం చాలా బాగుంది మరియు మేము పిల్లలతో పార్కుకు వెళ్తాము.",
    "kn": "ಇಂದು ಹವಾಮಾನ ತುಂಬಾ ಚೆನ್ನಾಗಿದೆ ಮತ್ತು ನಾವು ಮಕ್ಕಳೊಂದಿಗೆ ಉದ್ಯಾನವನಕ್ಕೆ ಹೋಗುತ್ತೇವೆ.",
    "gu": "આજે હવામાન ખૂબ સરસ છે અને અમે બાળકો સાથે પાર્કમાં જઈશું.",
    "pa": "ਅੱਜ ਮੌਸਮ ਬਹੁਤ ਵਧੀਆ ਹੈ ਅਤੇ ਅਸੀਂ ਬੱਚਿਆਂ ਨਾਲ ਪਾਰਕ ਜਾਵਾਂਗੇ।",
    "ml": "ഇന്ന് കാലാവസ്ഥ വളരെ നല്ലതാണ്, ഞങ്ങൾ കുട്ടികളോടൊപ്പം പാർക്കിൽ പോകും.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_languages(language: str) -> None:
    """In either case, with digits and a foreign name in it."""
    text = SENTENCES[language]
    for variant in (text, text.upper(), f"1. {text}\n2. {text} (Qwen)"):
        assert language_of(variant) == language
        assert is_english(variant) == (language == "en")
        assert check_instruction("language:response_language", {"language": language}, variant)
        other = "en" if language != "en" else "fr"
        assert not check_instruction("language:response_language", {"language": other}, variant)


def test_texts_of_no_language() -> None:
    for text in ("", "123 + 4", string.punctuation):
        assert language_of(text) is None
        assert not is_english(text)
    assert language_of("Hello World") is None
    assert is_english("Hello World")
