"""Personal data: FineWeb's e-mail and IP stretches, checksums, secrets, and exact edits."""

import ipaddress
import re
import time
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config.content import PiiConfig
from data_pipeline.document import Document, identity
from data_pipeline.filters.pii import PII, Pii
from data_pipeline.filters.pii_patterns import (
    find_cards,
    find_emails,
    find_ibans,
    find_ipv4,
    find_phones,
)
from data_pipeline.filters.pii_scan import AT, CODE, DOTTED, LONG, PHONE, scan
from data_pipeline.filters.secret_tokens import FORMATS, find_secrets
from data_pipeline.manifest import Counts
from data_pipeline.step import Dropped, Kept
from data_pipeline.transform import count_edit
from llmtrain.errors import ConfigError

ALL = PiiConfig(phone="replace")
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
BYTE = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
EMAIL = re.compile(rf"\b{ATOM}(?:\.{ATOM})*@(?:{LABEL}\.)+{LABEL}")
"""What FineWeb looks for, less addresses in square brackets; it searches the whole text."""
IPV4 = re.compile(rf"(?:{BYTE}\.){{3}}{BYTE}")
KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEow" * 20 + "\n-----END RSA PRIVATE KEY-----"
SECRETS = [
    KEY,
    KEY.replace("RSA PRIVATE", "PGP PRIVATE").replace("KEY-", "KEY BLOCK-"),
    "PuTTY-User-Key-File-2: ssh-rsa\n" + "AAAAB3" * 30 + "\nPrivate-MAC: " + "0a" * 20,
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "aB3" * 12,
    "github_pat_" + "a" * 22 + "_" + "b" * 59,
    "glpat-" + "x" * 20,
    "xoxb-123456789012-abcdefghijklmnop",
    "AIza" + "Sy" * 17 + "x",
    "sk_live_" + "a1" * 12,
    "sk-proj-" + "a" * 24 + "T3BlbkFJ" + "b" * 24,
    "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "npm_" + "a" * 36,
    "pypi-AgEIcHlwaS5vcmc" + "a" * 60,
    "SG." + "a" * 22 + "." + "b" * 43,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV",
]


def document(text: str, **more: str) -> Document:
    return Document(id="0", source="s", text=text, edits=identity(text), **more)


def edited(text: str, config: PiiConfig = ALL) -> str:
    """Return the text with placeholders after proving the edit map and the counts."""
    verdict = Pii(config)(document(text))
    assert isinstance(verdict, Kept)
    after = verdict.document
    counts = Counts()
    count_edit(counts, "pii", text, after.text, after.edits, verdict.deleted)
    assert counts.inserted == verdict.inserted
    assert len(text) == len(after.text) + sum(verdict.deleted.values()) - verdict.inserted
    return after.text


def found(finder: Callable[[str], Iterable[tuple[int, int]]], text: str) -> list[str]:
    """Return what a finder finds; of stretches that overlap, the first counts."""
    result: list[str] = []
    done = 0
    for start, end in sorted(finder(text)):
        if start >= done:
            result.append(text[start:end])
            done = end
    return result


@settings(max_examples=400)
@given(st.text(alphabet="ab9.@-_+!é \n", max_size=40))
@example("a!b@c.de é!b@c.de a..b@c.de .x@y.zz -@a.b --@x.y a@b.c.@d.e")
def test_emails_are_the_stretches_fineweb_replaces(text: str) -> None:
    assert list(find_emails(text)) == [match.span() for match in EMAIL.finditer(text)]


def test_an_email_may_have_an_address_in_brackets() -> None:
    assert found(find_emails, "to root@[8.8.8.8]!") == ["root@[8.8.8.8]"]


@settings(max_examples=300)
@given(st.text(alphabet="0125.9 x", max_size=40))
@example("1.2.3.4.5 1.2.3.456 300.1.1.1 8.8.8.008 1..2.3.4.5 255.255.255.255")
def test_ip_addresses_are_the_stretches_fineweb_replaces(text: str) -> None:
    def valid(dotted: str) -> bool:
        return all(octet == "0" or octet[0] != "0" for octet in dotted.split("."))

    expected = [match.span() for match in IPV4.finditer(text) if valid(match[0])]
    assert list(find_ipv4(text, public_only=False)) == expected


@given(st.integers(0, 2**32 - 1))
@example(int(ipaddress.IPv4Address("100.127.255.255")))
@example(int(ipaddress.IPv4Address("223.255.255.255")))
def test_addresses_that_are_not_public_stay(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    assert bool(list(find_ipv4(str(address), public_only=True))) == address.is_global


def test_special_networks_stay_and_may_go() -> None:
    text = "127.0.0.1 10.1.2.3 192.168.1.1 172.31.0.1 169.254.1.1 198.51.100.7 255.255.255.255"
    assert edited(text) == text
    assert edited("192.0.0.8 192.0.0.9") == "192.0.0.8 22.214.171.124"
    assert edited(text.split()[0], PiiConfig(public_ips_only=False)) == "22.214.171.124"


def test_placeholders_take_turns_from_the_first_in_every_document() -> None:
    text = "a@b.cd c@d.ef g@h.ij 1.1.1.1 8.8.8.8"
    expected = (
        "email@example.com firstname.lastname@example.org email@example.com "
        "22.214.171.124 126.96.36.199"
    )
    step = Pii(PiiConfig())
    for _ in range(2):
        verdict = step(document(text))
        assert isinstance(verdict, Kept)
        assert verdict.document.text == expected
        assert verdict.deleted == {"pii.email": 18, "pii.ip": 14}
    assert edited(expected) == expected  # placeholders stay as they are


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("IBAN DE89 3704 0044 0532 0130 00 BIC", ["DE89 3704 0044 0532 0130 00"]),
        ("GB82WEST12345698765432.", ["GB82WEST12345698765432"]),
        ("DE89 3704 0044 0532 0130 01", []),  # wrong checksum
        ("DE89 3704 0044 0532 0130", []),  # too short
        ("XX89370400440532013000", []),  # no country
        ("ADE89370400440532013000", []),  # inside a word
        ("NL91ABNA0417164300 FR1420041010050500013M02606", ["NL91ABNA0417164300",
         "FR1420041010050500013M02606"]),
    ],
)  # fmt: skip
def test_ibans_have_their_countrys_length_and_a_right_checksum(
    text: str, numbers: list[str]
) -> None:
    assert found(find_ibans, text) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("4111 1111 1111 1111", ["4111 1111 1111 1111"]),
        ("card:5500-0000-0000-0004,", ["5500-0000-0000-0004"]),
        ("378282246310005", ["378282246310005"]),
        ("3782 822463 10005", ["3782 822463 10005"]),
        ("4111111111111112", []),  # wrong checksum
        ("9111111111111111", []),  # no issuer
        ("14111111111111111", []),  # longer number
        ("4111 1111-1111 1111", []),  # mixed separators
        ("2020 4111 1111 1111 1111", []),  # a row of numbers
        ("4111 1111 1111 1111 2020", []),
        ("0.4111111111111111", []),  # decimals
    ],
)
def test_cards_have_an_issuer_and_a_right_checksum(text: str, numbers: list[str]) -> None:
    assert found(find_cards, text) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("call +49 30 901820, now", ["+49 30 901820"]),
        ("+1 (212) 555-1234", ["+1 (212) 555-1234"]),
        ("(212) 555-1234 or 212-555-1234 or 212.555.1234", ["(212) 555-1234", "212-555-1234",
         "212.555.1234"]),
        ("+1 2 3 4 5 6 7 8", []),  # a sum
        ("x+4930901820", []),
        ("+28 123 456 789", []),  # no such country code
        ("212-555.1234", []),
        ("1212-555-1234", []),
        ("2026-11-2212 and 10.1000/182-555-1234", []),
    ],
)  # fmt: skip
def test_phone_numbers(text: str, numbers: list[str]) -> None:
    assert found(find_phones, text) == numbers


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_of_known_formats_go(secret: str) -> None:
    assert edited(f"token: {secret}, see") == "token: <SECRET>, see"
    half = f"token: {secret[: len(secret) // 2]}, see"
    assert edited(half) == half


def test_words_that_begin_like_secrets_stay() -> None:
    text = "disk-AKIAxx sk-learn task-1 https://user@example.org/eyJ://a:b@ xhf_ -----BEGIN "
    text += "http://user:Password@a.b"
    assert list(find_secrets(text)) == []
    assert (
        edited("db=postgres://bob:hunter2!@db.local/x") == "db=postgres://bob:<SECRET>@db.local/x"
    )


def test_a_stretch_belongs_to_one_kind() -> None:
    verdict = Pii(ALL)(document("ssh://bob:s3cret@host.example.net:22/"))
    assert isinstance(verdict, Kept)
    assert verdict.deleted == {"pii.secret": 6}


def test_kinds_may_drop_documents_or_be_left_alone() -> None:
    text = "a@b.cd 8.8.8.8"
    assert Pii(PiiConfig(ip="drop"))(document(text)) == Dropped("pii.ip")
    assert edited(text, PiiConfig(email="keep", ip="keep")) == text
    findings = {f.rule: f for f in Pii(PiiConfig(ip="drop")).findings(document(text))}
    assert findings["pii.email"].value == 1
    assert findings["pii.email"].passed
    assert not findings["pii.ip"].passed
    step = Pii(PiiConfig(email_replacements=("",)))
    assert step(document(" jo@example.net ")) == Dropped("pii.empty")
    with pytest.raises(ConfigError, match="email_replacements is empty"):
        PiiConfig(email_replacements=())
    assert PII.build(config=ALL).name == "pii"


PIECES = st.sampled_from(
    ["a@b.cd", "8.8.8.8", "DE89370400440532013000", "4111 1111 1111 1111", "+49 30 901820",
     "ghp_" + "a" * 36, " ", "-", "x", "é", ".", "12"]
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(PIECES, max_size=10).map("".join))
def test_every_edit_is_proved_and_nothing_the_scan_passes_over_is_missed(text: str) -> None:
    edited(text)
    traces = scan(text)
    found_kinds = {
        AT: find_emails(text), DOTTED: find_ipv4(text, public_only=False), CODE: find_ibans(text),
        LONG: find_cards(text), PHONE: find_phones(text),
    }  # fmt: skip
    for mark, spans in found_kinds.items():
        assert traces.marks & mark or not list(spans)
    assert list(find_secrets(text)) == list(find_secrets(text, traces.literals))


@pytest.mark.parametrize("secret", SECRETS)
def test_the_scan_sees_every_secret(secret: str) -> None:
    assert list(find_secrets(secret, scan(secret).literals)) == [(0, len(secret))]


def test_the_scan_knows_every_literal() -> None:
    for i, literal in enumerate(FORMATS):
        assert scan(f"é {literal}").literals >> i & 1


@pytest.mark.parametrize(
    "text",
    ["a-" * 100_000 + "..b@c.de", "1." * 100_000, "a@" * 100_000, "AB12" * 50_000,
     "1234 " * 40_000, "a@" + "b-" * 100_000, "eyJ-" * 45_000, "eyJ." * 45_000,
     "-----BEGIN RSA PRIVATE KEY-----\n" * 6_000, "PuTTY-User-Key-File-2: " * 8_000,
     "a@b.cd 8.8.8.8 +49 30 901820 " * 6_000],
    ids=["local part", "dots", "ats", "iban", "numbers", "domain", "tokens", "parts",
         "keys", "more keys", "all"],
)  # fmt: skip
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    start = time.process_time()
    edited(text)
    assert time.process_time() - start < 5.0
