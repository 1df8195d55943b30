"""Settings of the rules that look for something in a page: addresses, words, secrets, quality."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.config.checks import check_positive, check_unread
from llmtrain.errors import ConfigError

PiiAction = Literal["keep", "replace", "drop"]
"""What is done about a kind of personal data: nothing, replace each, or drop the document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlFilterConfig:
    """Pages whose address is on a block list, or made of words that are, go."""

    bundled: bool = True
    """Whether the small lists of this package (adult, gambling, link spam) apply."""
    domains: tuple[str, ...] = ()
    """Further lists of domains, one per line or as a hosts file, plain or .gz, .bz2, .xz, .zst; of
    a folder, the files named domains. A domain blocks what is below it too."""
    urls: tuple[str, ...] = ()
    """Further lists of addresses, one per line, plain or compressed; of a folder, the files named
    urls."""
    words: tuple[str, ...] = ()
    """Further lists of words of which one between separators of the address is enough."""
    soft_words: tuple[str, ...] = ()
    """Further lists of words of which ``soft_threshold`` different ones are needed."""
    subwords: tuple[str, ...] = ()
    """Further lists of words that count anywhere in the address, separators aside."""
    soft_threshold: int = 2
    """Different soft words that end a page."""

    def __post_init__(self) -> None:
        """Refuse thresholds that are none."""
        check_positive(soft_threshold=self.soft_threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class PiiConfig:
    """Personal data and secrets in texts."""

    email: PiiAction = "replace"
    """E-mail addresses."""
    ip: PiiAction = "replace"
    """IPv4 addresses; of the public internet only, unless ``public_ips_only`` is off."""
    phone: PiiAction = "keep"
    """Phone numbers in international and North American notation; the least certain kind."""
    iban: PiiAction = "replace"
    """Bank accounts: IBANs of the length their country has and with a right checksum."""
    credit_card: PiiAction = "replace"
    """Card numbers with the prefix and length of a known issuer and a right checksum."""
    secret: PiiAction = "replace"
    """Private keys, and access tokens in the known formats of providers."""
    public_ips_only: bool = True
    """Whether private, loopback, documentation and other special addresses stay as they are."""
    email_replacements: tuple[str, ...] = ("email@example.com", "firstname.lastname@example.org")
    """What stands in for e-mail addresses, in turn within a document."""
    ip_replacements: tuple[str, ...] = (
        "22.214.171.124", "126.96.36.199", "188.8.131.52",
        "184.108.40.206", "220.127.116.11", "18.104.22.168",
    )  # fmt: skip
    """What stands in for IP addresses, in turn within a document; the defaults are FineWeb's."""
    phone_replacements: tuple[str, ...] = ("+1 555 0100",)
    """What stands in for phone numbers, in turn within a document."""
    iban_replacements: tuple[str, ...] = ("XX00 0000 0000 0000",)
    """What stands in for bank accounts, in turn within a document."""
    credit_card_replacements: tuple[str, ...] = ("0000 0000 0000 0000",)
    """What stands in for card numbers, in turn within a document."""
    secret_replacements: tuple[str, ...] = ("<SECRET>",)
    """What stands in for keys and tokens, in turn within a document."""

    def __post_init__(self) -> None:
        """Refuse kinds that are replaced by nothing."""
        problems = [
            f"{kind}_replacements is empty while {kind}=replace; give at least one text"
            for kind in ("email", "ip", "phone", "iban", "credit_card", "secret")
            if getattr(self, kind) == "replace" and not getattr(self, f"{kind}_replacements")
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """A score of the text's quality, and which documents it keeps."""

    scorer: Literal["linear", "command"] = "linear"
    """What scores: a model made by ``llmtrain-data classifier``, or a program of yours."""
    model: str | None = None
    """File of the linear model; needed with scorer=linear."""
    command: tuple[str, ...] = ()
    """Program and arguments; it reads lines {"texts": [...]} and answers {"scores": [...]}."""
    command_time_limit_s: float = 300.0
    """Seconds the program may take for one batch of at most 256 texts, its start included."""
    keep: Literal["all", "threshold", "pareto"] = "threshold"
    """Which documents stay: all (only scored), those at or above the threshold, or a random choice
    that favours high scores, as for GPT-3."""
    threshold: float = 0.5
    """Smallest score that stays with keep=threshold."""
    alpha: float = 9.0
    """Shape of the Pareto distribution with keep=pareto; a document stays where a draw from it, by
    a hash of the document's id, is above 1 - score."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(command_time_limit_s=self.command_time_limit_s, alpha=self.alpha)
        if self.scorer == "linear":
            check_unread(self, "command command_time_limit_s", "scorer=command")
        else:
            check_unread(self, "model", "scorer=linear")
        if self.keep != "threshold":
            check_unread(self, "threshold", "keep=threshold")
        if self.keep != "pareto":
            check_unread(self, "alpha", "keep=pareto")


@dataclass(frozen=True, kw_only=True, slots=True)
class BadWordsConfig:
    """Pages with words of a list go."""

    path: str | None = None
    """File with one word or phrase per line, or folder with a file LANGUAGE.txt (or LANGUAGE) for
    each language; null leaves the rule out, and the manifest says so."""
    language: str = "en"
    """Language of the list when it is one file, and of documents whose language nobody has
    identified; ja, th and zh match inside words."""
    max_share: float = 0.0
    """Largest share of a page's words that may be on the list; 0 drops at the first, as C4."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0.0 <= self.max_share < 1.0:
            raise ConfigError(f"max_share={self.max_share}; use a number in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminationConfig:
    """Text of evaluation sets goes."""

    benchmarks: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Name of an evaluation set -> its files, folders or globs: JSONL with one example per line
    (.gz and .zst too), or text with an empty line between examples."""
    fields: tuple[str, ...] = ()
    """Fields of JSONL rows that make an example, in order; none takes every field with text."""
    ngram: int = 13
    """Words in a row that count as overlap; case and punctuation do not matter."""
    min_share: float = 0.0
    """Share of an example's n-grams that has to stand in a document; at 0, one n-gram is enough."""
    action: Literal["drop", "cut"] = "drop"
    """Whether the document goes, or the overlap with ``window`` characters on both sides."""
    window: int = 200
    """Characters cut before and after an overlap."""
    min_piece_characters: int = 200
    """Shorter pieces between cuts go as well."""
    max_pieces: int = 10
    """Documents that are cut into more pieces are dropped."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(ngram=self.ngram, max_pieces=self.max_pieces)
        if self.action == "drop":
            check_unread(self, "window min_piece_characters max_pieces", "action=cut")
        problems = []
        if not 0.0 <= self.min_share <= 1.0:
            problems.append(f"min_share={self.min_share}; use a number in [0, 1]")
        if self.window < 0 or self.min_piece_characters < 0:
            problems.append(
                f"window={self.window} and min_piece_characters={self.min_piece_characters}; "
                "use numbers of 0 or more"
            )
        if problems:
            raise ConfigError(problems)
