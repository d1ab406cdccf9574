"""Repair of broken Unicode text, by ftfy."""

import dataclasses
import re
import unicodedata

import pyarrow as pa

from train.curate.operator import Compute, Operator
from train.data.documents import optional_library

# Characters without a glyph that carry nothing: soft hyphen, zero-width space, word joiner. The zero-width joiner and
# non-joiner stay: emoji, Persian and the scripts of India need them.
_INVISIBLE = dict.fromkeys(map(ord, "\xad\u180e\u200b\u2060"))
# What is changed wherever it stands, all of ASCII as bytes: control characters but for tab, line feed and form feed.
_CONTROL = bytes([*range(9), 0x0B, *range(0x0D, 0x20), 0x7F])
_SUSPICIOUS = re.compile(
    "[\0-\x08\x0b\r\x0e-\x1f\x7f-\x9f\xad\u180e\u200b\u2028\u2029\u2060\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
# What ftfy's search for mojibake needs to find anything: two characters in a row of scripts that encodings of one byte
# have, or U+FFFD, of which the second is no small Cyrillic letter; or one of four letters.
_SCRIPTS, _LETTERS = r"\u0450-\u052f\u1e00-\u2fff\uf8ff-\ufb0f\ufffd", r"\xc2\xc3\u0152\u0153"
_PAIR = re.compile(rf"[\x80-\u044f{_SCRIPTS}][\x80-\u042f{_SCRIPTS}]|[{_LETTERS}]")
# Each round repairs what the one before has uncovered; two are enough for all but contrived texts.
_ROUNDS = 16


@dataclasses.dataclass(frozen=True)
class RepairUnicode(Operator):
    """Repairs mojibake, control characters and escapes of terminals, line ends and invisible characters, and makes NFC.

    Quotation marks, ligatures, full-width characters and HTML entities stay as they are: they are no damage, and to
    change them would harm source code and Chinese. Lines that need nothing are found by checks that are faster than
    ftfy, and are the same afterwards. `unicode_repaired` says whether the text has changed.
    """

    version = 2
    makes = pa.schema([pa.field("text", pa.large_string()), pa.field("unicode_repaired", pa.bool_())])

    def start(self) -> Compute:
        ftfy = optional_library("ftfy", "broken encodings")
        badness = optional_library("ftfy.badness", "broken encodings").BADNESS_RE
        # Lines are repaired one by one, and this finds mojibake at the beginning of any line of a text.
        is_bad = re.compile(badness.pattern, badness.flags | re.MULTILINE).search
        config = ftfy.TextFixerConfig(
            unescape_html=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            explain=False,
        )

        def clean(text: str) -> bool:
            if text.isascii():
                data = text.encode()
                return len(data.translate(None, _CONTROL)) == len(data)
            if _SUSPICIOUS.search(text) or not unicodedata.is_normalized("NFC", text):
                return False
            return not (_PAIR.search(text) and is_bad(text))

        def repaired(line: str) -> str:
            if clean(line):
                return line
            # An invisible character can be a part of mojibake, so it goes last.
            fixed: str = ftfy.fix_text(line, config)
            return unicodedata.normalize("NFC", fixed.translate(_INVISIBLE))

        def repair(text: str) -> str:
            if clean(text):
                return text
            for _ in range(_ROUNDS):
                before = text
                if "\r" in text:
                    text = text.replace("\r\n", "\n").replace("\r", "\n")
                text = "\n".join(map(repaired, text.split("\n")))
                if text == before:
                    break
            return text

        def compute(table: pa.Table) -> pa.Table:
            texts = table["text"].to_pylist()
            results = [repair(text) for text in texts]
            changed = [result != text for result, text in zip(results, texts, strict=True)]
            return pa.table([results, changed], schema=self.makes)

        return compute
