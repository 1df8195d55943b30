"""Private keys and access tokens in texts, by the formats their issuers publish.

Every format begins with fixed characters: a text without them is passed over at the speed of a
substring search, and a pattern is tried only where they stand.

    list(find_secrets("token = ghp_..."))  # [(8, 48)]
"""

import re
from collections.abc import Iterator, Mapping

_PRIVATE_KEY = (
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]|-(?!----BEGIN)){64,20000}?"
    r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
)
_PUTTY_KEY = (
    r"PuTTY-User-Key-File-[23]:(?:[^P]|P(?!uTTY-User-Key)){64,20000}?"
    r"Private-MAC: [0-9a-f]{40,64}"
)
_END = r"(?![A-Za-z0-9_-])"
_FORMATS = {
    "-----BEGIN ": _PRIVATE_KEY,
    "PuTTY-User-Key-File-": _PUTTY_KEY,
    "AKIA": r"AKIA[A-Z2-7]{16}" + _END,
    "ASIA": r"ASIA[A-Z2-7]{16}" + _END,
    "ghp_": r"ghp_[A-Za-z0-9]{36}" + _END,
    "gho_": r"gho_[A-Za-z0-9]{36}" + _END,
    "ghu_": r"ghu_[A-Za-z0-9]{36}" + _END,
    "ghs_": r"ghs_[A-Za-z0-9]{36}" + _END,
    "ghr_": r"ghr_[A-Za-z0-9]{36,76}" + _END,
    "github_pat_": r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}" + _END,
    "glpat-": r"glpat-[A-Za-z0-9_-]{20,64}" + _END,
    "xoxb-": r"xoxb-[0-9]{9,14}-[A-Za-z0-9-]{12,80}" + _END,
    "xoxp-": r"xoxp-[0-9]{9,14}-[A-Za-z0-9-]{12,120}" + _END,
    "xapp-": r"xapp-[0-9]-[A-Z0-9]{9,14}-[0-9]{9,14}-[a-f0-9]{64}" + _END,
    "hooks.slack.com/services/": (
        r"hooks\.slack\.com/services/T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{24}" + _END
    ),
    "AIza": r"AIza[A-Za-z0-9_-]{35}" + _END,
    "GOCSPX-": r"GOCSPX-[A-Za-z0-9_-]{28}" + _END,
    "sk_live_": r"sk_live_[A-Za-z0-9]{24,99}" + _END,
    "rk_live_": r"rk_live_[A-Za-z0-9]{24,99}" + _END,
    "sk-": r"sk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,80}T3BlbkFJ[A-Za-z0-9_-]{20,80}" + _END,
    "sk-ant-": r"sk-ant-(?:api|admin)[0-9]{2}-[A-Za-z0-9_-]{80,120}" + _END,
    "hf_": r"hf_[A-Za-z]{34}" + _END,
    "npm_": r"npm_[A-Za-z0-9]{36}" + _END,
    "pypi-AgE": r"pypi-AgE[A-Za-z0-9_-]{60,250}" + _END,
    "SG.": r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}" + _END,
    "dop_v1_": r"dop_v1_[a-f0-9]{64}" + _END,
    "shpat_": r"shpat_[a-fA-F0-9]{32}" + _END,
    "eyJ": r"eyJ[A-Za-z0-9_-]{12,2000}+\.eyJ[A-Za-z0-9_-]{12,4000}+\.[A-Za-z0-9_-]{20,1000}" + _END,
    "AccountKey=": r"AccountKey=([A-Za-z0-9+/]{86}==)",
    "://": (
        r"://[A-Za-z0-9._%+-]{1,64}:(?!(?i:pass|passwd|password|pwd|secret|token|changeme|x+)@)"
        r"([^\s/:@<>\"'`{}$\[\]()*]{6,128})@[A-Za-z0-9]"
    ),
}
FORMATS: Mapping[str, re.Pattern[str]] = {
    literal: re.compile(pattern) for literal, pattern in _FORMATS.items()
}
"""Fixed characters a secret begins with -> its form; group 1, where there is one, is the secret:
private keys, tokens of cloud, code hosting, chat, payment and model providers, signed JSON web
tokens, passwords in addresses."""


def find_secrets(text: str, literals: int = -1) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every secret; of those that overlap, in no order of places.

    ``literals`` tells with bit i whether the i-th of ``FORMATS`` has to be looked for.
    """
    for i, (literal, pattern) in enumerate(FORMATS.items()):
        if not literals >> i & 1:
            continue
        place = text.find(literal)
        while place >= 0:
            match = None
            if not _continues_word(text, place):
                match = pattern.match(text, place)
            if match is None:
                place = text.find(literal, place + 1)
                continue
            yield match.span(1) if pattern.groups else match.span()
            place = text.find(literal, match.end())


def _continues_word(text: str, place: int) -> bool:
    """Whether the characters at a place go on with a word that began before."""
    if place == 0 or not text[place].isalnum():
        return False
    before = text[place - 1]
    return before.isalnum() or before in "_-"
