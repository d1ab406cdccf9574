"""Splits English text into words and punctuation marks.

The rules are those of English treebanks, which filters of web text are tuned with: marks at both ends of a run are
words of their own ("(well," has three), and so are clitics ("do n't") and some marks inside ("end.Next", "well-known",
"x=y"). Abbreviations, faces and addresses stay whole.
"""
# ruff: noqa: RUF001 (marks of many scripts)

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator

_MARKS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\",”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
# Marks that are words of their own at both ends of a run, and what is before a full stop that is one, both in ASCII.
_ASCII_MARKS = ",:;!?()[]{}<>_#*&'\"`"
_BEFORE_STOP = frozenset("abcdefghijklmnopqrstuvwxyz0123456789%-+|" + _ASCII_MARKS)
# Times that marks and full stops alternate at the end of a run before it is looked at from both ends.
_STEPS = 6
_CURRENCY = r"[$£€¥฿﷼₠-₿]"
_UNITS = (
    r"[kcdmn]?m|[kcdm]?m[²³]|km/?h|mph|m/s|ha|µm|yd|in|ft|[kmµ]?g|lb|oz|[hk]?Pa|mbar|[kmgt]b|[kKMGT]B|[TGMK%]|"
    r"[кдсмн]?м|[кдсм]?м[²³]|[км]?г|м/с|км/ч|к?Па|мбар|[КкМмГгТт]б|[КМГТ]Б"
)

# Words that keep their last full stop or their apostrophe, as single words.
_WHOLE = """
    Adm. Bros. co. Co. Corp. Dr. Gen. Gov. Inc. Jr. Ltd. Messrs. Mr. Mrs. Ms. Mt. Ph.D. Prof. Rep. Rev. Sen. St.
    Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov. Dec. a.m. p.m. e.g. E.g. E.G. i.e. I.e. I.E. vs. v.s.
    Ala. Ak. Ariz. Ark. Calif. Colo. Conn. D.C. Del. Fla. Ga. Ia. Id. Ill. Ind. Kan. Kans. Ky. La. Mass. Md. Mich. Minn.
    Miss. Mo. Mont. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Okla. Ore. Pa. S.C. Tenn. Va. Wash. Wis.
    'bout 'cause 'Cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'd 'em 'll 'nuff 're 's 'S '' ma'am Ma'am o'clock O'clock
    doin' Doin' goin' Goin' havin' Havin' lovin' Lovin' nothin' Nothin' nuthin' Nuthin' ol' Ol' somethin' Somethin'
    and/or w/o C++ <space> — ä. ö. ü.
""".split()
# Two words that are written as one, cut at the bar.
_JOINED = "can|not gon|na got|ta let|'s c'm|on y'|all not|'ve how|'d|'y".split()
# Such a form without its apostrophe is a common word of its own.
_COMMON = {"ill", "its", "hell", "shell", "shed", "were", "well", "whore", "lets"}


@functools.cache
def _rules() -> "_Rules":
    return _Rules()


def split_words(text: str) -> Iterator[str]:
    """Yields the words and punctuation marks of a text."""
    return itertools.chain.from_iterable(map(_rules().split, text.split()))


def splitter() -> Callable[[str], list[str]]:
    """A function that returns the words and marks of a run without white space; together they are the run."""
    return _rules().split


class _Rules:
    """The compiled rules."""

    def __init__(self) -> None:
        above = [chr(code) for code in range(0x80, 0x1FB00)]
        upper, lower = (_class(filter(test, above)) for test in (str.isupper, str.islower))
        icons = f"[{_class(char for char in above if unicodedata.category(char) == 'So')}]"
        letter, quotes, marks = r"[^\W\d_]", re.escape(_QUOTES), re.escape(_MARKS)
        # A letter that is not a capital may end a sentence, one that is not small may begin it.
        small, capital = rf"(?<={letter})(?<![A-Z{upper}])", rf"(?![a-z{lower}]){letter}"
        capitals = rf"(?<={letter * 2})(?<![a-z{lower}])(?<![a-z{lower}].)"
        self._prefix = re.compile(rf"\.\.+|[CA]\$|US\$|[§%=—–{marks}{quotes}]|{_CURRENCY}|\+(?!\d)|{icons}")
        self._suffix = re.compile(
            rf"(?:\.\.+|……|[{marks}{quotes}—–]|['’][sS]|{icons}|(?<=[0-9])(?:\+|[CA]\$|US\$|{_CURRENCY}|{_UNITS})"
            rf"|(?:(?<=[0-9%²\-+|{marks}{quotes}])|{small}|{capitals})\.|(?<=°[FfCcKk])\.)$"
        )
        self._infix = re.compile(
            rf"\.\.+|…|{icons}|(?<=[0-9])[+\-*^](?=[0-9-])|(?:(?<=[{quotes}])|{small})\.(?=[{quotes}]|{capital})"
            rf"|(?<={letter}),(?={letter})|(?<=[^\W_])(?:--?-?|–|——?|~|[:<>=/])(?={letter})"
        )
        label = r"[A-Za-z0-9\u00a1-\uffff]"
        self._address = re.compile(
            rf"(?:[\w+\-.]{{2,}}://)?(?:\S+@)?(?:(?:{label}(?:[A-Za-z0-9\u00a1-\uffff_-]{{0,62}}{label})?\.)+"
            rf"(?:(?![A-Z{upper}]){letter}){{2,63}}|(?!10\.|127\.|169\.254\.|192\.168\.)"
            r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.\d{1,3}){3})(?::\d{2,5})?(?:[/?#]\S*)?"
        )
        self._host = re.compile(r"[\w.\-+\u00a1-\uffff]+(?:[:/?#]|$)")
        # For ASCII: the same rules, where a search skips to the next mark.
        self._ascii_infix = re.compile(
            r"[.+\-*^,~:<>=/](?:(?<=\.)\.+|(?<=[0-9][+\-*^])(?=[0-9-])|(?<=[a-z\"',`]\.)(?=[A-Z\"',`])"
            r"|(?<=[A-Za-z],)(?=[A-Za-z])|(?<=[A-Za-z0-9]-)-?-?(?=[A-Za-z])|(?<=[A-Za-z0-9][~:<>=/])(?=[A-Za-z]))"
        )
        self._ascii_start = re.compile(r"[%=$.+]|[CA]\$|US\$").match
        self._ascii_end = re.compile(rf"(?:[.+%$]|'[sS]|[0-9](?:{_UNITS}))$").search
        self._special: dict[str, list[str]] = {}
        self._longest = 0
        # What the rules for marks alone make of the specials, by first word.
        self._broken: dict[str, list[list[str]]] = {}
        broken: dict[str, list[list[str]]] = {}
        special = _specials()
        for run in special:
            words = self._thoroughly(run)
            if len(words) > 1:
                broken.setdefault(words[0], []).append(words)
        self._special, self._broken = special, broken
        self._pairs = {tuple(words[:2]) for entries in broken.values() for words in entries}
        self._has = self._pairs.__contains__
        self._longest = max(map(len, special))

    def split(self, run: str) -> list[str]:
        """The words of a run: a quick way that most runs take, and one that knows all rules."""
        special = self._special
        if run in special:
            return special[run]
        if run.isalpha():
            return [run]
        if not run.isascii():
            return self._thoroughly(run)

        # Marks at both ends.
        body = run.lstrip(_ASCII_MARKS)
        begin = len(run) - len(body)
        for _ in range(_STEPS):
            rest = body.rstrip(_ASCII_MARKS)
            if rest[-1:] == "." and rest not in special:
                capitals = rest[-3:-1]
                if rest[-2:-1] in _BEFORE_STOP or (len(capitals) == 2 and capitals.isupper() and capitals.isalpha()):
                    rest = rest[:-1]
            if len(rest) == len(body):
                break
            body = rest
        else:
            return self._thoroughly(run)
        words = [*run[:begin]]
        if not body:
            pass
        elif body in special:
            words += special[body]
        elif body.isalpha():
            words.append(body)
        elif self._ascii_start(body) or self._ascii_end(body, max(0, len(body) - 6)):
            return self._thoroughly(run)
        else:
            words += self._inside(body, self._ascii_infix)
        end = begin + len(body)
        if end < len(run):
            words += run[end:]
        # Specials that are made of several marks and words; two may overlap.
        pairs = (
            0 if self._pairs.isdisjoint(itertools.pairwise(words)) else sum(map(self._has, itertools.pairwise(words)))
        )
        return self._thoroughly(run) if pairs > 1 else self._joined(words) if pairs else words

    def _thoroughly(self, run: str) -> list[str]:
        """The words of a run by all rules."""
        begin, end = 0, len(run)
        before: list[str] = []
        after: list[str] = []
        whole = None
        # Takes marks away from both ends until a special run or none is left.
        while begin < end:
            first = self._prefix.match(run, begin, end)
            rest = first.end() if first else begin
            if first:
                before.append(first.group())
                if (whole := self._known(run, rest, end)) is not None:
                    begin = rest
                    break
            # A suffix other than dots has at most 5 characters.
            search = max(rest, end - 5)
            while search > rest and run[search] == "." == run[search - 1]:
                search -= 1
            last = self._suffix.search(run, search, end) if rest < end else None
            cut = last.start() if last else end
            if last:
                # With a special run before this suffix, the prefix stays where it is.
                if (whole := self._known(run, begin, cut)) is not None:
                    if first:
                        before.pop()
                    after.append(last.group())
                    end = cut
                    break
                after.append(last.group())
            if not (first or last):
                break
            begin, end = rest, cut
            if (whole := self._known(run, begin, end)) is not None:
                break
        core = run[begin:end]
        if whole is not None:
            middle = list(whole)
        elif not core:
            middle = []
        else:
            middle = self._inside(core, self._infix)
        words = before + middle + after[::-1]
        return self._joined(words) if len(words) > 1 and self._broken else words

    def _known(self, run: str, begin: int, end: int) -> list[str] | None:
        """The words of a special part."""
        return self._special.get(run[begin:end]) if 0 < end - begin <= self._longest else None

    def _inside(self, core: str, infix: re.Pattern[str]) -> list[str]:
        """Splits at marks between letters or digits, unless it is an address."""
        words: list[str] = []
        start = 0
        for match in infix.finditer(core):
            if match.start() == 0:
                continue
            if start == 0 and "." in core and self._is_address(core):
                break
            if match.start() > start:
                words.append(core[start : match.start()])
            words.append(match.group())
            start = match.end()
        if start < len(core):
            words.append(core[start:])
        return words

    def _is_address(self, core: str) -> bool:
        """Whether it is a URL, a host or an electronic mail address; a quick look is enough for most code."""
        return bool((self._host.match(core) or "@" in core) and self._address.fullmatch(core))

    def _joined(self, words: list[str]) -> list[str]:
        """Puts specials together that were split; where they overlap, the longest and then the first one stays."""
        found = [
            (-len(entry), at, entry)
            for at, word in enumerate(words[:-1])
            if word in self._broken
            for entry in self._broken[word]
            if words[at : at + len(entry)] == entry
        ]
        if not found:
            return words
        taken: set[int] = set()
        chosen: dict[int, list[str]] = {}
        for _, at, entry in sorted(found):
            span = range(at, at + len(entry))
            if span[0] not in taken and span[-1] not in taken:
                chosen[at] = entry
            taken.update(span)
        result, at = [], 0
        while at < len(words):
            if at in chosen:
                result += self._special["".join(chosen[at])]
                at += len(chosen[at])
            else:
                result.append(words[at])
                at += 1
        return result


def _class(characters: Iterator[str]) -> str:
    """Characters as ranges for a class of a regular expression; none of them has a meaning there."""
    codes = sorted(map(ord, characters))
    ranges = []
    for _, group in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        members = [code for _, code in group]
        ranges.append(f"{chr(members[0])}-{chr(members[-1])}")
    return "".join(ranges)


def _specials() -> dict[str, list[str]]:
    """Runs that the rules for marks do not decide, and their words."""
    result = {run: [run] for run in (*_WHOLE, *_faces(), *(f"{chr(code)}." for code in range(97, 123)))}
    # Contractions, with and without an apostrophe.
    subjects = {
        "i": "m ma ll ll've d d've ve",
        "you we they": "ll ll've d d've ve re",
        "he she it": "ll ll've d d've s",
        "who what when where why how there": "s ll ll've re ve d d've",
        "that": "s ll ll've d d've",
        "this": "s ll ll've re ve d d've",
        "these those": "ll ll've re ve d d've",
        "could might must should would": "ve",
    }
    parts = [
        (word, f"'{part}") for group, tails in subjects.items() for word in group.split() for part in tails.split()
    ]
    parts += [(word, "n't") for word in "ai are is was were have has dare".split()]
    for word in "ca could do does did had may might must need ought sha should wo would".split():
        parts += [(word, "n't"), (word, "n't've")]
    pieces = [[word, *re.findall(r"n't|'\w+", part.replace("'ma", "'m'a"))] for word, part in parts]
    pieces += [joined.split("|") for joined in _JOINED]
    for words in pieces:
        words = [word.replace("'m'a", "'ma") for word in words]
        for first in (words[0], words[0].capitalize()):
            form = [first, *words[1:]]
            result["".join(form)] = form
            plain = [word.replace("'", "") for word in form]
            if "'" in "".join(form) and "".join(plain).lower() not in _COMMON:
                result["".join(plain)] = plain
    for hour, half in itertools.product(range(1, 13), ("a.m.", "p.m.", "am", "pm")):
        result[f"{hour}{half}"] = [str(hour), half]
    curly = {run.replace("'", "’"): [word.replace("'", "’") for word in words] for run, words in result.items()}
    return {**curly, **result}


def _faces() -> Iterator[str]:
    """Faces made of eyes, an optional nose, and a mouth, and upright ones."""
    mouths = [")", "))", ")))", "(", "((", "(((", *"]}/|03PpOoXxD*>"]
    yield from map("".join, itertools.product(":", ("", "-"), mouths))
    yield from map("".join, itertools.product((":'", ":'-"), "()"))
    yield from map("".join, itertools.product("([", ("", "-"), ":"))
    yield from (
        ":1 ;) ;-) =) (= =( =[ [= =] ]= =/ =| =3 =D ;D ;-D 8) 8-) (-8 8D 8-D (; (-; ): )-: >:( >:o :o) (o: :()"
    ).split()
    yield from "xD XD xDD XDD <3 <33 <333 </3 ^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- -__- @_@".split()
    for left, mouth, right in itertools.product("oO0vV", "_.", "oO0vV"):
        if left.lower() + right.lower() != "vo":
            yield left + mouth + right
