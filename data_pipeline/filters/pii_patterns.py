"""Where personal data stands in a text: e-mail, IP addresses, phones, bank accounts, cards.

E-mail and IPv4 addresses are FineWeb's (datatrove's PII formatter, arXiv:2406.17557): the same
stretches match. Numbers with a checksum are believed only where it is right. No finder takes more
than linear time, whatever the text.

    list(find_emails("write to jo@example.net."))  # [(9, 23)]
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from ipaddress import IPv4Network

Span = tuple[int, int]
"""Start and end of a stretch, in characters."""

_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+/=?^_`{|}~-."
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_IPV4 = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}")
_EMAIL_DOMAIN = re.compile(rf"@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:{_OCTET}\.){{3}}{_OCTET}\])")
_DOTTED_DIGITS = re.compile(r"[0-9][0-9.]{5,}[0-9]")
_INTERNATIONAL = re.compile(r"\+[1-9][0-9]{0,3}(?:[ .()/-]{0,2}[0-9]){6,14}")
_BRACKETED = re.compile(r"\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}")
_AMERICAN = re.compile(r"[2-9][0-9]{2}([.-])[2-9][0-9]{2}\1[0-9]{4}")
_IBAN = re.compile(r"[A-Z][A-Z][0-9]{2}(?: ?[0-9A-Z]){11,30}")
_CARD = re.compile(r"[0-9][0-9]{3}(?:[0-9]{9,}|([ -])[0-9]{4,6}(?:\1[0-9]{2,5}){1,3})")
_UNASSIGNED_CODES = frozenset({"28", "83", "89"})
_MOST_PHONE_GROUPS = 6

_SPECIAL_NETWORKS = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "240.0.0.0/4",
)  # fmt: skip
"""Not globally reachable, in order (IANA's registry of special-purpose IPv4 addresses)."""
_STARTS = [int(IPv4Network(network)[0]) for network in _SPECIAL_NETWORKS]
_ENDS = [int(IPv4Network(network)[-1]) for network in _SPECIAL_NETWORKS]

_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BI": 27, "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27,
    "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31,
    "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
"""Characters of an IBAN by country (the registry of ISO 13616)."""

_CARD_ISSUERS = (
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"3(?:0[0-5]|[689])"), (14,)),  # Diners Club
    (re.compile(r"6011|65|64[4-9]|62"), (16, 17, 18, 19)),  # Discover, UnionPay
    (re.compile(r"35(?:2[89]|[3-8])"), (16, 17, 18, 19)),  # JCB
)
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
"""Sum of the digits of twice a digit."""


def find_emails(text: str) -> Iterator[Span]:
    """Yield the stretches FineWeb takes for e-mail addresses, in order."""
    low = 0
    place = text.find("@")
    while place >= 0:
        domain = _EMAIL_DOMAIN.match(text, place)
        start = -1 if domain is None else _local_start(text, low, place)
        if domain is not None and start >= 0:
            yield start, domain.end()
            low = domain.end()
        else:
            low = place + 1
        place = text.find("@", low)


def _local_start(text: str, low: int, end: int) -> int:
    """Return where the local part that ends at ``end`` begins, -1 if there is none.

    It is made of dotted atoms and begins at a word boundary, not before ``low``.
    """
    start = low + len(text[low:end].rstrip(_LOCAL))
    start = max(start, text.rfind("..", start, end) + 2 if ".." in text[start:end] else start)
    if start >= end or text[end - 1] == ".":
        return -1
    before = start > 0 and _in_word(text[start - 1])
    for place in range(start, end):
        now = _in_word(text[place])
        if now != before and text[place] != ".":
            return place
        before = now
    return -1


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def find_ipv4(text: str, *, public_only: bool) -> Iterator[Span]:
    """Yield the stretches FineWeb takes for IPv4 addresses, in order."""
    for digits in _DOTTED_DIGITS.finditer(text):
        if text.count(".", *digits.span()) >= 3:
            for match in _IPV4.finditer(text, *digits.span()):
                if _is_address(match[0], public_only):
                    yield match.span()


def _is_address(dotted: str, public_only: bool) -> bool:
    """Whether four numbers are an address: no leading zeros, and public if that is asked for."""
    number = 0
    for octet in dotted.split("."):
        if len(octet) > 1 and octet[0] == "0":
            return False
        number = number << 8 | int(octet)
    if not public_only:
        return True
    place = bisect_right(_STARTS, number) - 1
    return number > _ENDS[place] or dotted in ("192.0.0.9", "192.0.0.10")


def find_phones(text: str) -> Iterator[Span]:
    """Yield phone numbers: +, country code and at most 15 digits; (NNN) NNN-NNNN, NNN-NNN-NNNN.

    The second form may be found again inside the first.
    """
    for match in _INTERNATIONAL.finditer(text) if "+" in text else ():
        digits = re.sub(r"[^0-9]", "", match[0])
        if (
            len(digits) <= 15
            and digits[:2] not in _UNASSIGNED_CODES
            and len(re.findall(r"[0-9]+", match[0])) <= _MOST_PHONE_GROUPS
            and _alone(text, match.span())
        ):
            yield match.span()
    for pattern in (_BRACKETED, _AMERICAN):
        for match in pattern.finditer(text):
            if _alone(text, match.span()):
                yield match.span()


def find_ibans(text: str) -> Iterator[Span]:
    """Yield bank accounts whose length is their country's and whose remainder mod 97 is 1."""
    match = _IBAN.search(text)
    while match:
        length = _IBAN_LENGTHS.get(match[0][:2], 0)
        start, end = match.start(), _after(text, match.start(), match.end(), length)
        account = text[start:end].replace(" ", "")
        digits = "".join(str(int(c, 36)) for c in account[4:] + account[:4])
        if len(account) == length and _alone(text, (start, end)) and int(digits) % 97 == 1:
            yield start, end
            match = _IBAN.search(text, end)
        else:
            match = _IBAN.search(text, start + 2)


def _after(text: str, start: int, end: int, count: int) -> int:
    """Return the place after ``count`` characters that are no blanks, at most ``end``."""
    while start < end and count > 0:
        count -= text[start] != " "
        start += 1
    return start


def find_cards(text: str) -> Iterator[Span]:
    """Yield card numbers of a known issuer's prefix and length whose Luhn checksum is right."""
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        known = any(len(digits) in sizes and p.match(digits) for p, sizes in _CARD_ISSUERS)
        if known and _alone(text, match.span(), match[1] or "") and _luhn(digits):
            yield match.span()


def _luhn(digits: str) -> bool:
    values = [int(digit) for digit in digits[::-1]]
    return (sum(values[0::2]) + sum(_DOUBLED[value] for value in values[1::2])) % 10 == 0


def _alone(text: str, span: Span, separator: str = "") -> bool:
    """Whether a number is no part of a longer word, number or row of numbers."""
    before, after = text[max(0, span[0] - 2) : span[0]], text[span[1] : span[1] + 2]
    joints = f"-.{separator}"
    if before and (_in_word(before[-1]) or before[-1] == "+"):
        return False
    if after and _in_word(after[0]):
        return False
    return not (
        (len(before) == 2 and before[1] in joints and before[0].isdigit())
        or (len(after) == 2 and after[0] in joints and after[1].isdigit())
    )
