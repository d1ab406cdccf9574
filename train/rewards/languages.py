# The words are those of many languages.
# ruff: noqa: RUF001
"""Tells in which language a text is written, by its script and its commonest words. Small, and the same every time."""

import functools
import re
import unicodedata
from collections import Counter

# Languages that a script alone tells.
_BY_SCRIPT = {
    "HANGUL": "ko", "THAI": "th", "GREEK": "el", "HEBREW": "he", "BENGALI": "bn", "TAMIL": "ta", "TELUGU": "te",
    "KANNADA": "kn", "GUJARATI": "gu", "GURMUKHI": "pa", "MALAYALAM": "ml",
}  # fmt: skip

# Frequent words, most of them of one language. Words that languages share count for each of them.
_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to in is that it for was with as his on be at by had not are but from or have an they "
        "which you were her she there would their we him been has when who will more if out so said what up "
        "its about into than them can only other new some could time these two may then do first any my now "
        "such like our over me even most made after also how your i this all one did a very should just "
        "because here where why don't",
        "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me "
        "si sin sobre este ya entre cuando todo esta ser son dos también fue había era muy años hasta desde "
        "está mi porque qué sólo han yo hay vez puede todos así nos ni parte tiene él uno donde bien tiempo "
        "mismo ese ahora cada vida",
        "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem "
        "à seu sua ou ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois "
        "sem mesmo aos ter seus quem nas me esse eles estão você tinha foram essa num nem suas meu às minha "
        "têm numa pelos elas são pode",
        "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont la les "
        "aux avec son mais comme ou si leur y dont elle nous été cette vous tout ont fait ces être sa deux "
        "même aussi bien peut sans où très je lui ses on ils entre après c'est d'un d'une qu'il l'on j'ai "
        "n'est était",
        "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden "
        "aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
        "oder aber vor zur bis mehr durch man sein wurde sei ich wir ihr du kann wenn schon doch sehr hier "
        "diese dieser mich mir uns",
        "it": "di e il la che in a per un è una del con le non i da sono si della alla al dei lo come più anche nel "
        "ma su gli ha delle se o questo dal nella ed io mi ci cui suo loro essere stato molto tutto quando "
        "perché così due era fu questa tra fare dopo solo dove ogni proprio sua nei degli lui lei noi cosa "
        "può dell'anno c'è",
        "pl": "w i z na do się nie to że jest o a jak po przez od co dla ale za czy są tak ich już tylko może przy "
        "jego jej był było była być który która które ze pod oraz przed gdy także bardzo ja mnie my tego tej "
        "tym ten te ma nad jako lub sobie więc między gdzie można wszystko jednak kiedy każdy każdego swoje",
        "vi": "và của là có trong được cho một không các với những người này đã để khi từ cũng như đến về nhiều tôi "
        "bạn ra nhưng sẽ tại vào trên năm rất hơn theo phải nó làm ở thì mà còn lại hay nếu đó vì ông bà "
        "chúng ta mình họ",
        "sw": "na ya wa kwa ni katika za la kuwa cha yake hii huo hiyo kama wao yao sana pia lakini au kila watu "
        "mtu wake siku hivyo ili moja mimi wewe yeye sisi ninyi hii hizo hilo hapa huko vya baada kabla "
        "wakati kutoka hadi ambayo ambao alikuwa ilikuwa kwamba bila zaidi yangu wetu",
        "fi": "ja on ei se että oli hän mutta joka ovat myös kun niin tai sen ole jos kuin vain minä sinä me te he "
        "tämä hyvin siitä olla voi ollut sekä kanssa nyt mukaan kaikki vielä jo siis mitä hänen jossa olisi "
        "olen noin koska sitten näin tässä ovat eivät eikä ennen jälkeen",
        # Not in IFEval; they keep their texts from being taken for a neighbour's.
        "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als dan maar bij door ze uit nog "
        "naar worden heeft wordt hij haar over tot je kan wel geen meer werd deze dit veel zij hebben moet "
        "wat ik wij",
        "sv": "och i att det som en på är av för med den till inte har de ett om men var jag så kan han hon vi ska "
        "från när sig eller nu också efter vid skulle bara under mycket varit finns detta alla där",
        "id": "yang dan di dengan untuk dari ini pada tidak dalam adalah itu akan ke oleh juga saya kami anda ada "
        "sebagai bisa atau dapat karena lebih mereka telah tersebut sudah orang seperti banyak tahun kita "
        "harus",
        "tr": "ve bir bu da de için ile çok daha olarak gibi o ne var en ama kadar ben olan sonra değil mi her ya "
        "şey olduğu ki onun sen biz kendi ancak içinde göre nasıl zaman hem",
    }.items()
}  # fmt: skip
_CYRILLIC_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "ru": "и в не на что я с он как это по но они к у мы из за то так же от было бы для вы она его о ещё все "
        "есть когда только мне или уже если ее их был до быть чтобы этот очень при",
        "uk": "і в не на що я з він як це по але вони до у ми із за то так же від було для ви вона його про ще все "
        "є коли тільки мені або вже якщо її їх був та бути щоб цей дуже при й та",
        "bg": "и в не на че аз с той като това по но те към у ние от за то така да беше бихме вие тя го още всичко "
        "е когато само ми или вече ако я ги бил до бъде този много при се са ще си",
    }.items()
}  # fmt: skip
_DEVANAGARI_WORDS = {
    "hi": frozenset(
        "है हैं के का की में और से को ने पर यह था थी थे लिए नहीं भी एक हो कि जो तो ही इस वह कर हम मैं आप".split()
    ),
    "mr": frozenset(
        "आहे आहेत आणि च्या ची चा ला मध्ये हे ही हा तो ती ते नाही या व केले होते होती होता मी तुम्ही आम्ही पण एक जे असे".split()
    ),
    "ne": frozenset(
        "छ छन् र को का की मा लाई ले हो यो त्यो थियो थिए पनि गर्न भएको गरेको एक हुन्छ म तपाईं हामी तर भने लागि छैन".split()
    ),
}  # fmt: skip
# Letters that Urdu, and Persian, have and Arabic does not; and those that only Urdu has.
_PERSIAN, _URDU, _ARABIC = frozenset("پچژگکی"), frozenset("ٹڈڑںےہھ"), frozenset("ةىيكإأ")


def language_of(text: str) -> str | None:
    """The language of a text as an ISO 639-1 code.

    It knows the languages of IFEval: ar, bg, bn, de, en, es, fa, fi, fr, gu, he, hi, it, ja, kn, ko, ml, mr, ne, pa,
    pl, pt, ru, sw, ta, te, th, uk, ur, vi; and zh, el, id, nl, sv, tr. A text in several languages has that of most
    letters.

    Returns:
      None where the text has no letters, or none of the words of a known language.
    """
    scripts = Counter[str]()
    for character, count in Counter(text).items():
        if character.isalpha() and (script := _script(character)):
            scripts[script] += count
    japanese = scripts.pop("HIRAGANA", 0) + scripts.pop("KATAKANA", 0)
    han = scripts.pop("CJK", 0)
    # Japanese mixes both; Chinese has no kana but in names. A Chinese character is worth about three letters.
    if japanese + han:
        scripts["HAN"] = 3 * han + japanese
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script == "HAN":
        return "ja" if japanese > 0.05 * han else "zh"
    if script in _BY_SCRIPT:
        return _BY_SCRIPT[script]
    words = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower().replace("’", "'"))
    if script == "LATIN":
        return _by_words(words, _LATIN)
    if script == "CYRILLIC":
        return _by_letters(text.lower(), {"ru": "ыэё", "uk": "іїєґ", "bg": ""}) or _by_words(words, _CYRILLIC)
    if script == "DEVANAGARI":
        # Its vowel signs are no letters for `\w`, so words are what stands between spaces and punctuation.
        return _by_words(re.split(r"[\s।,.!?;:\"'()-]+", text), _DEVANAGARI)
    if script == "ARABIC":
        counts = {"ur": _URDU, "fa": _PERSIAN, "ar": _ARABIC}
        found = {language: sum(character in letters for character in text) for language, letters in counts.items()}
        if found["ur"] > 0.02 * scripts["ARABIC"]:
            return "ur"
        return "fa" if found["fa"] > found["ar"] else "ar"
    return None


def is_english(text: str) -> bool:
    """Whether a text is in English, or in Latin letters and in no language that is recognised (a few words, a name)."""
    return language_of(text) == "en" or (
        language_of(text) is None and any(character.isalpha() and _script(character) == "LATIN" for character in text)
    )


@functools.lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0]


def _languages_by_word(known: dict[str, frozenset[str]]) -> dict[str, list[str]]:
    """The languages that know a word, by word."""
    found: dict[str, list[str]] = {}
    for name, common in known.items():
        for word in common:
            found.setdefault(word, []).append(name)
    return found


_LATIN, _CYRILLIC, _DEVANAGARI = map(_languages_by_word, (_WORDS, _CYRILLIC_WORDS, _DEVANAGARI_WORDS))


def _by_words(words: list[str], languages: dict[str, list[str]]) -> str | None:
    """The language that knows most of the words; None if none knows any, or two know as many."""
    counts = Counter(name for word in words for name in languages.get(word, ()))
    first, *others = counts.most_common(2) or [("", 0)]
    return first[0] if first[1] and not (others and others[0][1] == first[1]) else None


def _by_letters(text: str, known: dict[str, str]) -> str | None:
    """The language whose own letters the text has; None if it has those of several or of none."""
    counts = {name: sum(text.count(letter) for letter in letters) for name, letters in known.items()}
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] > 0.8 * sum(counts.values()) and counts[name] else None
