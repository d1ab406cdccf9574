"""Languages: real sentences are recognised, short texts are not guessed, and a function of the user can take over."""

# ruff: noqa: RUF001

from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.language import Language

# Written for this test; codes are those of CLD3.
SENTENCES = {
    "en": [
        "The committee will meet again next week to decide which of the proposals can be paid for.",
        "When the rain had stopped, the children ran out to look for snails in the garden.",
    ],
    "de": [
        "Der Ausschuss trifft sich nächste Woche wieder, um über die Vorschläge zu entscheiden.",
        "Als der Regen aufgehört hatte, liefen die Kinder hinaus, um im Garten Schnecken zu suchen.",
    ],
    "fr": [
        "Le comité se réunira de nouveau la semaine prochaine pour examiner les propositions.",
        "Quand la pluie eut cessé, les enfants coururent chercher des escargots dans le jardin.",
    ],
    "es": ["El comité se reunirá de nuevo la próxima semana para decidir qué propuestas se pueden pagar."],
    "pt": ["A comissão volta a reunir-se na próxima semana para decidir quais propostas não serão pagas."],
    "it": ["Il comitato si riunirà di nuovo la prossima settimana per decidere quali proposte finanziare."],
    "nl": ["De commissie komt volgende week weer bijeen om te beslissen welke voorstellen worden betaald."],
    "sv": ["Kommittén träffas igen nästa vecka för att besluta vilka av förslagen som kan betalas."],
    "fi": ["Valiokunta kokoontuu ensi viikolla uudelleen päättämään, mitkä ehdotukset voidaan rahoittaa."],
    "pl": ["Komisja zbierze się ponownie w przyszłym tygodniu, aby zdecydować, które wnioski opłacić."],
    "cs": ["Výbor se příští týden znovu sejde, aby rozhodl, které z návrhů může zaplatit."],
    "hu": ["A bizottság jövő héten újra összeül, hogy eldöntse, mely javaslatokat lehet kifizetni."],
    "tr": ["Komisyon, hangi önerilerin ödenebileceğine karar vermek için gelecek hafta yeniden toplanacak."],
    "ru": ["Комитет снова соберётся на следующей неделе, чтобы решить, какие предложения можно оплатить."],
    "uk": ["Комітет знову збереться наступного тижня, щоб вирішити, які пропозиції можна оплатити."],
    "el": ["Η επιτροπή θα συνεδριάσει ξανά την επόμενη εβδομάδα για να αποφασίσει ποιες προτάσεις θα πληρωθούν."],
    "ar": ["ستجتمع اللجنة مرة أخرى في الأسبوع المقبل لتقرر أي المقترحات يمكن دفع تكاليفها."],
    "fa": ["کمیته هفته آینده دوباره تشکیل جلسه می‌دهد تا تصمیم بگیرد کدام پیشنهادها پرداخت شوند."],
    "iw": ["הוועדה תתכנס שוב בשבוע הבא כדי להחליט על אילו מן ההצעות אפשר לשלם."],
    "hi": ["समिति अगले सप्ताह फिर बैठक करेगी और तय करेगी कि किन प्रस्तावों के लिए पैसा दिया जा सकता है।"],
    "th": ["คณะกรรมการจะประชุมอีกครั้งในสัปดาห์หน้าเพื่อตัดสินใจว่าจะจ่ายเงินให้ข้อเสนอใดบ้าง"],
    "vi": ["Ủy ban sẽ họp lại vào tuần tới để quyết định đề xuất nào có thể được chi trả."],
    "ja": ["委員会は来週もう一度集まり、どの提案に資金を出すかを決めることになっています。"],
    "ko": ["위원회는 다음 주에 다시 모여 어떤 제안에 비용을 지불할 수 있는지 결정할 예정입니다."],
    "zh": ["委员会下周将再次开会，决定哪些建议可以得到资助。", "雨停以后，孩子们跑到花园里去找蜗牛，玩了很久才回家。"],
}


def test_sentences_of_25_languages() -> None:
    pairs = [(language, text) for language, texts in SENTENCES.items() for text in texts]
    made = check_laws(Language(), documents([text for _, text in pairs]), print_seed())
    found = made["language"].to_pylist()
    wrong = [(right, got) for (right, _), got in zip(pairs, found, strict=True) if right != got]
    assert not wrong
    reliable = made["language_reliable"].to_pylist()
    assert sum(reliable) >= 0.9 * len(pairs)
    assert all((p >= 0.7) == r for p, r in zip(made["language_probability"].to_pylist(), reliable, strict=True))


def test_what_has_too_few_letters_has_no_language() -> None:
    texts = [
        "",
        "Hello world",
        "你好",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
        "https://example.com/a/very/long/address " * 9,
    ]
    made = check_laws(Language(), documents(texts), print_seed())
    for name in made.column_names:
        assert made[name].null_count == len(texts)


def test_a_long_text_is_judged_by_all_of_its_parts() -> None:
    text = "Licence. " * 60 + " ".join(SENTENCES["de"]) * 100 + "Licence. " * 60
    assert applied(Language(), documents([text]))["language"].to_pylist() == ["de"]
    begin = "".join(SENTENCES["en"]) * 3
    assert applied(Language(max_characters=400), documents([begin + "".join(SENTENCES["ru"]) * 300]))[
        "language"
    ].to_pylist() == ["ru"]


def test_a_function_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def scripts(text):\n    return ('zh', 0.9) if '的' in text else ('xx', 0.5) if 'a' in text else None\n"
    )
    operator = Language(f"{file}:scripts", min_bytes=1)
    made = check_laws(operator, documents(["我的", "banana", "other"]), print_seed())
    assert made.to_pylist() == [
        {"language": "zh", "language_probability": pytest.approx(0.9), "language_reliable": True},
        {"language": "xx", "language_probability": 0.5, "language_reliable": False},
        {"language": None, "language_probability": None, "language_reliable": None},
    ]
    before = dict(operator.settings())
    file.write_text("def scripts(text):\n    return 'zh'\n")
    assert dict(operator.settings()) != before
    with pytest.raises(InputError, match=r"must return \(language, probability"):
        applied(operator, documents(["我的"]))
    with pytest.raises(InputError, match=r"no function other. It has: scripts"):
        Language(f"{file}:other").start()
    with pytest.raises(InputError, match=r"does not exist"):
        Language(f"{tmp_path}/none.py:scripts").start()
    for wrong in ("scripts", "file.py", ":scripts", "file.py:"):
        with pytest.raises(InputError, match=r"as FILE.py:function"):
            Language(wrong)
    with pytest.raises(InputError, match="min_bytes"):
        Language(min_bytes=0)
