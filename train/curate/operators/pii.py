"""Masks personal data and secrets: addresses, telephone numbers, cards, accounts and keys."""

import dataclasses
import ipaddress
import re
from collections.abc import Callable

import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.operator import Compute, Operator

KINDS = ("secret", "email", "iban", "card", "phone", "ip")
"""What can be masked, in the order in which it is looked for."""

_PLACEHOLDERS = dict(
    secret="<KEY>", email="<EMAIL>", iban="<IBAN>", card="<CARD>", phone="<PHONE>", ip="<IP_ADDRESS>"
)  # fmt: skip

# All repetitions are bounded, and no pattern begins inside of what it could have matched: the time is linear. What must
# not come before the first character is checked after it, because `re` finds a first character fast.
_DOMAIN = re.compile(r"((?:[A-Za-z0-9-]{1,63}\.){1,8})([A-Za-z]{2,12})(?![\w(\[@-]|\.\w)")
# Of an address, from its end.
_LOCAL = re.compile(r"[\w.+%-]{1,64}(?![\w.+%/-])")
# Domains that exist most often; what else looks like an address in code is a file, an attribute or a decorator.
_DOMAINS = frozenset(
    "com org net edu gov mil int info biz name app dev cloud online site tech xyz shop email company systems science "
    "ac ad ae ag ai am ar at au az ba bd be bg bh bo br by ca cc cd ch ci cl cm cn co cr cu cy cz de dk do dz ec ee eg "
    "es et eu fi fr ge gg gh gr gt hk hn hr hu id ie il in io iq ir is it jm jo jp ke kh kr kw kz la lb li lk lt lu lv "
    "ma mc me mk mm mn mo mt mx my mz na ng ni nl no np nz om pa pe ph pk pl pr ps pt qa ro ru sa se sg si sk sn su sv "
    "th tn tr tt tv tw tz ua ug uk us uy uz ve vn za zm zw".split()
)
_NO_PERSON = frozenset("git svn hg user username name email you your.name me foo bar someone example".split())
_RESERVED = re.compile(r"(?:^|\.)(?:example|test|invalid|localhost|domain|yourdomain|email|mail|host|server)\.", re.I)

_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
# Length of the account number by country: SWIFT, IBAN Registry.
_IBAN_LENGTHS = {
    country: size
    for size, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

_CARD = re.compile(
    r"[0-9](?<![\w.,+-].)(?:[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{3}([ -])[0-9]{6}\2[0-9]{5}|[0-9]{12,18})"
    r"(?!\w|[.,-]\w)"
)
_CARD_WORD = re.compile(r"\b(?:cards?|visa|mastercard|amex|american express|credit|debit|pan)\b", re.I)
# Prefixes and lengths of the issuers: ISO/IEC 7812.
_CARD_ISSUER = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9][0-9]|7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}"
    r"|6(?:011|5[0-9][0-9]|4[4-9][0-9])[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}|3(?:0[0-5]|[68][0-9])[0-9]{11}|62[0-9]{14,17}"
)

_PHONE = re.compile(r"\+(?<![\w+.)\]}*/].)[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?!\w|[ .,-][0-9]|[ -]?[*/+=]| - )")
# Country codes: ITU-T E.164.
_COUNTRY = re.compile(
    r"1|7|2(?:0|7|1[12368]|[2346][0-9]|5[0-8]|9[01789])|3(?:[0-469]|5[0-9]|7[0-9]|8[0-35-79])|4(?:[013-9]|2[013])"
    r"|5(?:[1-8]|0[0-9]|9[0-9])|6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|8(?:[1246]|5[02356]|8[06])|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68])"
)
# Ten digits after the 1; neither area nor exchange begins with 0 or 1, and those of 555 are fictional.
_NORTH_AMERICA = re.compile(r"1(?!555)[2-9][0-9]{2}(?!555)[2-9][0-9]{6}")

_IPV4 = re.compile(r"[0-9](?<![\w.+-].)[0-9]{0,2}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w+-]|\.\w|/[0-9])")
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:]|\.\w|[%/]\w)")
_VERSION = re.compile(
    r"(?:version|release|revision|section|chapter|build|v|ver|rev|[=<>~!]=|[<>~^])[\s:\"'(]{0,3}$", re.IGNORECASE
)
# Special-purpose networks: RFC 6890 with its updates. `ipaddress.is_global` differs between versions of Python.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "
        "2001::/23 2001:db8::/32 2002::/16 3fff::/20".split(),
    )
)

# Text that a key contains, and the pattern of the key.
_TOKENS = (
    ("AKIA", r"AKIA[0-9A-Z]{16}"),
    ("ASIA", r"ASIA[0-9A-Z]{16}"),
    ("ghp_", r"ghp_[A-Za-z0-9]{36}"),
    ("gho_", r"gho_[A-Za-z0-9]{36}"),
    ("ghs_", r"ghs_[A-Za-z0-9]{36}"),
    ("ghu_", r"ghu_[A-Za-z0-9]{36}"),
    ("ghr_", r"ghr_[A-Za-z0-9]{36,76}"),
    ("github_pat_", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    ("glpat-", r"glpat-[A-Za-z0-9_-]{20}"),
    ("xox", r"xox[abeoprs]-[0-9A-Za-z-]{20,200}"),
    ("AIza", r"AIza[0-9A-Za-z_-]{35}"),
    ("GOCSPX-", r"GOCSPX-[0-9A-Za-z_-]{28}"),
    ("_live_", r"[rs]k_live_[0-9A-Za-z]{24,99}"),
    ("T3BlbkFJ", r"sk-[A-Za-z0-9_-]{20,80}T3BlbkFJ[A-Za-z0-9_-]{20,80}"),
    ("sk-ant-", r"sk-ant-[A-Za-z0-9_-]{40,120}"),
    ("hf_", r"hf_[A-Za-z]{34}"),
    ("npm_", r"npm_[A-Za-z0-9]{36}"),
    ("pypi-AgEIcHlwaS5vcmc", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,400}"),
    ("SG.", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
)
_PEM = r"-----BEGIN (?:[A-Z]{1,12} ){0,2}PRIVATE KEY-----[^-]{64,20000}-----END (?:[A-Z]{1,12} ){0,2}PRIVATE KEY-----"
_KEYS = (
    *((mark, re.compile(rf"(?<![A-Za-z0-9_]){pattern}(?![A-Za-z0-9_])")) for mark, pattern in _TOKENS),
    ("PRIVATE KEY-----", re.compile(_PEM)),
)


@dataclasses.dataclass(frozen=True)
class MaskPII(Operator):
    """Replaces personal data and secrets by placeholders such as <EMAIL>, and counts them by kind.

    Precision comes first: what has a checksum is checked, and what also occurs in code needs more evidence.

    secret: keys of well-known services, by prefix and length, and private keys in PEM.
    email: under a common top-level domain, but for reserved domains such as example.com, and git@.
    iban: with the length of the country and the right checksum.
    card: with issuer, length and Luhn's checksum; in groups of digits, or after a word such as "card", at most 64
      characters before.
    phone: in international form, with a country code that exists. The numbers 555 are fictional.
    ip: public IPv4 and IPv6 addresses, but no versions and networks. A version follows "version" and the like, begins
      with 0, 1 or 2, or has a first part below 20 and others below 100, such as 8.8.4.4. A network ends with .0 or
      .255, or is followed by / and a number.

    Attributes:
      kinds: some of `KINDS`.
    """

    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise InputError(f"Unknown kinds of personal data: {', '.join(unknown)}. Known are {', '.join(KINDS)}.")

    @property
    def makes(self) -> pa.Schema:
        """The text, and a count for each kind."""
        counts = [pa.field(f"pii_{kind}", pa.int32()) for kind in self.kinds]
        return pa.schema([pa.field("text", pa.large_string()), *counts])

    def start(self) -> Compute:
        finders = [_FINDERS[kind] for kind in self.kinds]
        placeholders = [_PLACEHOLDERS[kind] for kind in self.kinds]

        def mask(text: str, counts: list[int]) -> str:
            # What was masked may have kept its neighbour from being seen.
            while True:
                before = text
                for number, (find, placeholder) in enumerate(zip(finders, placeholders, strict=True)):
                    if spans := find(text):
                        counts[number] += len(spans)
                        text = _replaced(text, spans, placeholder)
                if text == before:
                    return text

        def compute(table: pa.Table) -> pa.Table:
            texts: list[str] = []
            columns: list[list[int]] = [[] for _ in self.kinds]
            for text in table["text"].to_pylist():
                counts = [0] * len(self.kinds)
                texts.append(mask(text, counts))
                for column, count in zip(columns, counts, strict=True):
                    column.append(count)
            return pa.table([texts, *columns], schema=self.makes)

        return compute


_Spans = list[tuple[int, int]]


def _replaced(text: str, spans: _Spans, placeholder: str) -> str:
    parts, last = [], 0
    for begin, end in spans:
        parts += [text[last:begin], placeholder]
        last = end
    return "".join([*parts, text[last:]])


def _secrets(text: str) -> _Spans:
    found = (match for mark, pattern in _KEYS if mark in text for match in pattern.finditer(text))
    spans = [match.span() for match in found if "EXAMPLE" not in match[0]]
    result: _Spans = []
    for span in sorted(spans):
        if not result or span[0] >= result[-1][1]:
            result.append(span)
    return result


def _emails(text: str) -> _Spans:
    spans: _Spans = []
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL.match(text[max(at - 65, 0) : at][::-1]) if domain else None
        if domain and local and _is_person(local[0][::-1], domain[1], domain[2]):
            spans.append((at - local.end(), domain.end()))
        at = text.find("@", at + 1)
    return spans


def _is_person(local: str, domain: str, top: str) -> bool:
    return (
        top.lower() in _DOMAINS
        and (top.islower() or top.isupper())
        and not local.startswith(".")
        and local.lower() not in _NO_PERSON
        and not _RESERVED.search(domain)
    )


def _ibans(text: str) -> _Spans:
    spans: _Spans = []
    for match in _IBAN.finditer(text):
        # Words in capitals may follow a number that is in groups.
        for end in range(match.end(), match.start() + 14, -1):
            number = text[match.start() : end].replace(" ", "")
            if len(number) == _IBAN_LENGTHS.get(number[:2]) and not text[end - 1].isspace():
                if int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1:
                    spans.append((match.start(), end))
                break
    return spans


def _cards(text: str) -> _Spans:
    spans: _Spans = []
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        grouped = match[1] or match[2]
        if not _CARD_ISSUER.fullmatch(digits) or not _luhn(digits):
            continue
        if grouped or _CARD_WORD.search(text, max(match.start() - 64, 0), match.start()):
            spans.append(match.span())
    return spans


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _phones(text: str) -> _Spans:
    if "+" not in text:
        return []
    spans: _Spans = []
    for match in _PHONE.finditer(text):
        digits = "".join(filter(str.isdigit, match[0]))
        country = _COUNTRY.match(digits)
        if not country or not 9 <= len(digits) <= 15 or match[0].count("(") != match[0].count(")"):
            continue
        if country[0] == "1" and not _NORTH_AMERICA.fullmatch(digits):
            continue
        # One point makes a decimal number, and digits without groups may be any number.
        groups = len(re.findall(r"[0-9]+", match[0]))
        decimal = match[0].count(".") == 1 and groups == 2
        made_up = len(set(digits[2:])) < 3 or digits.startswith("12345678")
        if decimal or made_up or (groups == 1 and len(digits) < 11):
            continue
        spans.append(match.span())
    return spans


def _addresses(text: str) -> _Spans:
    spans: _Spans = []
    for match in _IPV4.finditer(text):
        parts = match[0].split(".")
        if any((len(part) > 1 and part[0] == "0") or int(part) > 255 for part in parts):
            continue
        first, *others = map(int, parts)
        if first < 3 or (first < 20 and max(others) < 100) or others[-1] in (0, 255):
            continue
        if _VERSION.search(text, max(match.start() - 12, 0), match.start()):
            continue
        if _public(match[0]):
            spans.append(match.span())
    if ":" in text:
        spans += [match.span() for match in _IPV6.finditer(text) if _public(match[0])]
    return sorted(spans)


def _public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not any(parsed in network for network in _SPECIAL)


_FINDERS: dict[str, Callable[[str], _Spans]] = {
    "secret": _secrets,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "phone": _phones,
    "ip": _addresses,
}
