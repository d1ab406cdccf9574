"""Personal data: what is planted is masked and counted, code and prose stay, and hostile texts take linear time."""

import random
import time
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.pii import KINDS, MaskPII
from train.data.text import standard_library


def masked(*texts: str) -> list[str]:
    made: list[str] = applied(MaskPII(), documents(texts))["text"].to_pylist()
    return made


def with_luhn(digits: str) -> str:
    for last in "0123456789":
        total = sum(
            int(digit) if place % 2 == 0 else sum(divmod(2 * int(digit), 10))
            for place, digit in enumerate(reversed(digits + last))
        )
        if total % 10 == 0:
            return digits + last
    raise AssertionError


def iban(country: str, account: str) -> str:
    number = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    return f"{country}{98 - number % 97:02d}{account}"


def planted(rng: random.Random) -> dict[str, str]:
    """One of each kind, drawn anew."""

    def some(characters: str, count: int) -> str:
        return "".join(rng.choices(characters, k=count))

    digits, letters = "0123456789", "abcdefghijklmnopqrstuvwxyz"
    mixed = digits + letters + letters.upper()
    card = with_luhn(rng.choice(["4", "51", "6011"]).ljust(4, "7") + some(digits, 11))
    account = iban("DE", some(digits, 18))
    last = rng.randrange(1, 255)
    # A number of fewer than three digits is taken for one that is made up.
    phone = "".join(rng.sample("23456789", 3)) + some(digits, 3)
    return {
        "email": f"{some(letters, 5)}.{some(letters, 6)}@{some(letters, 8)}.{rng.choice(['com', 'de', 'co.uk'])}",
        "iban": rng.choice([account, " ".join(account[i : i + 4] for i in range(0, 22, 4))]),
        "card": rng.choice([" ", "-"]).join(card[i : i + 4] for i in range(0, 16, 4)),
        "phone": rng.choice(["+49 30 {}", "+44 (0) 20{}", "+81-3-{}", "+1 415 2{}", "+33.1.{}.9"]).format(phone),
        "ip": rng.choice([f"84.123.{some('12', 2)}.{last}", f"2a02:{some('123456789', 4)}::{some('abcdef', 3)}"]),
        "secret": rng.choice(
            [
                "ghp_" + some(mixed, 36),
                "AKIA" + some(digits + letters.upper(), 16),
                "AIza" + some(mixed, 35),
                "sk-" + some(mixed, 20) + "T3BlbkFJ" + some(mixed, 20),
                "-----BEGIN PRIVATE KEY-----\n" + some(mixed + "+/\n", 400) + "\n-----END PRIVATE KEY-----",
            ]
        ),
    }


def test_all_that_is_planted_is_masked_and_counted() -> None:
    seed = print_seed()
    rng = random.Random(int(seed.integers(1 << 30)))
    texts, expected, counts = [], [], []
    marks = dict(email="<EMAIL>", iban="<IBAN>", card="<CARD>", phone="<PHONE>", ip="<IP_ADDRESS>", secret="<KEY>")
    for _ in range(200):
        values = planted(rng)
        kinds = rng.choices(KINDS, k=rng.randrange(5))
        parts = [(kind, rng.choice(["Write to {}.", "({})", "it is {},", '"{}"', "{}\n", "= {} "])) for kind in kinds]
        texts.append("".join(f"Words {form.format(values[kind])} more. " for kind, form in parts))
        expected.append("".join(f"Words {form.format(marks[kind])} more. " for kind, form in parts))
        counts.append({f"pii_{kind}": kinds.count(kind) for kind in KINDS})
    made = check_laws(MaskPII(), documents(texts), seed)
    assert made["text"].to_pylist() == expected
    assert made.drop_columns(["text"]).to_pylist() == counts


@pytest.mark.parametrize(
    "text",
    [
        "version 84.12.13.14, v84.12.13.14, Chrome/84.12.13.14x, pip install a==84.12.13.14, section 3.2.1.4, 1.2.3.4",
        "10.1.2.3 192.168.1.77 127.0.0.1 172.20.1.1 169.254.9.9 203.0.113.7 84.1.2.0 84.1.2.8/24 300.1.1.1",
        "OID 1.3.6.1.4.1.311 and 1.3.101.112; 84.12.13.14.15; 084.12.13.14",
        "fe80::1 ::1 2001:db8::77 12:34:56 std::vector a::b::c fade::bead 2001:0db8:0:0::1 20:30:40 [2:3] 2020:1:1",
        "git@github.com:org/repo.git user@example.com me@test.org x@self.w A@B.T icon@2x.png x@w.at[0] @decorator.it",
        "a@b pkg@1.2.3 root@localhost x @ y.com name@company.example.org admin@server.local",
        "+1234567890 x = +12345678901.5 1+4930123456789 +0 30 1234567 +1 555 123 4567 +999 123 456 789",
        "3.14159265358979 +4.93012345678901 +49 2020-01-01T00:00:00+0100 @@ -1,20 +300,12 @@ +49 30 123 456 789 01 4",
        "1234 5678 9012 3456 4111-1111-1111-1112 4111111111111111 0.4111111111111111 id=4111111111111111",
        "DE89370400440532013001 GB00WEST12345698765432 AB12 CD34 EF56 IN THE YEAR US12 ABCD EFGH IJKL",
        "AKIAIOSFODNN7EXAMPLE ghp_short sk-learn sk-ant-hill hf_hub_download xoxo AIzaShort npm_config_prefix",
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA\n-----END PUBLIC KEY-----",
        "<EMAIL> <IP_ADDRESS> <PHONE> <CARD> <IBAN> <KEY>",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert masked(text) == [text]


def test_a_card_without_groups_needs_its_word() -> None:
    card = with_luhn("411111111111112")
    assert masked(f"my credit card is {card}", f"object {card}") == ["my credit card is <CARD>", f"object {card}"]


def test_code_hardly_changes() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    texts = [Path(path).read_text("utf-8", "ignore") for path in rng.sample(standard_library(), 60)]
    made = applied(MaskPII(), documents(texts))
    # Authors' addresses are real. Nothing else is in there; ipaddress.py and others have made-up addresses.
    for kind in ("secret", "iban", "card", "phone"):
        assert sum(made[f"pii_{kind}"].to_pylist()) == 0
    assert sum(made["pii_ip"].to_pylist()) <= 8
    before, after = sum(map(len, texts)), sum(map(len, made["text"].to_pylist()))
    assert abs(before - after) < 0.001 * before


def test_hostile_texts_take_linear_time() -> None:
    pieces = [
        "a",
        "@",
        "a@",
        "a.",
        "a@a.",
        "1",
        "1.",
        "1.1.1.1.",
        "+1",
        "+1 ",
        "2001:",
        "1 ",
        "4111 ",
        "DE",
        "DE89 ",
        "AB12CD34",
    ]
    pieces += [
        "+49-(",
        "-----BEGIN PRIVATE KEY-----\n",
        "ghp_",
        "sk-",
        "xoxb-",
        "SG.",
        "AKIA",
        "%",
        "é",
        "sk-T3BlbkFJ",
        "A" * 64 + "@",
    ]
    compute = MaskPII().start()
    for piece in pieces:
        table = documents([piece * (150_000 // len(piece))])
        begin = time.process_time()
        compute(table.select(["text"]))
        # Most take 0.02 s; what is quadratic takes minutes.
        assert time.process_time() - begin < 2, piece


def test_options() -> None:
    made = applied(MaskPII(("email",)), documents(["a.b@web.de at 84.12.13.14"]))
    assert made.to_pylist() == [{"text": "<EMAIL> at 84.12.13.14", "pii_email": 1}]
    with pytest.raises(InputError, match="Unknown kinds of personal data: name"):
        MaskPII(("email", "name"))
