"""Personal data that has a form: e-mail addresses, phone numbers, card numbers, IBANs, IP addresses.

The recognisers are Presidio's (https://microsoft.github.io/presidio/supported_entities/), called without its language
engine: card numbers count with a right check digit (Luhn) alone, IBANs with a right checksum and their country's form,
e-mail addresses with a public domain, phone numbers as phonenumbers finds them valid. Nothing here asks the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bert_ray.errors import JobError

PATTERNS = ("card", "email", "iban", "ip", "phone")

# A result below this is a hint that wants further evidence ("::", the unspecified IPv6 address, has 0.1).
_LEAST_SCORE = 0.3

# A long text is looked at in parts, so that time grows with its length and no more. What begins in a part is found
# with the part's surroundings: nothing here is longer than an e-mail address, 254 characters (RFC 5321, 4.5.3.1.3).
_PART_CHARS, _AROUND_CHARS = 2_000, 400

_A_DIGIT = re.compile(r"\d")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Match:
    """A find.

    Attributes:
        start, end: code points, end exclusive.
        label: the pattern's name in capitals.
        score: from 0 to 1; 1 where a check digit or the like was right.
    """

    start: int
    end: int
    label: str
    score: float


class Patterns:
    """Finds patterns in texts."""

    def __init__(self, names: Sequence[str], regions: Sequence[str]) -> None:
        """Set up.

        Args:
            names: of PATTERNS.
            regions: two-letter countries whose phone numbers are known without a country code ("US", "GB").

        Raises:
            JobError: an unknown name or region, or Presidio is not installed.
        """
        if strange := sorted(set(names) - set(PATTERNS)):
            raise JobError(f"options.patterns: {strange[0]!r} is none of {', '.join(PATTERNS)}")
        self.names = tuple(names)
        try:
            self._recognisers = {name: _recogniser(name, tuple(regions)) for name in self.names}
        except ImportError as error:
            raise JobError(
                f"options.patterns needs Presidio ({error}): pip install 'bert-ray[pii]', or give patterns: [] to mask "
                "entities alone"
            ) from error

    def find(self, text: str) -> list[Match]:
        """What stands in a text, sorted; finds of two patterns may overlap."""
        wanted = [name for name in self.names if _possible(name, text)]
        return sorted({match for name in wanted for match in self._found(name, text)})

    def _found(self, name: str, text: str) -> Iterator[Match]:
        for part in range(0, max(1, len(text)), _PART_CHARS):
            begin = max(0, part - _AROUND_CHARS)
            around = text[begin : part + _PART_CHARS + _AROUND_CHARS]
            for result in self._recognisers[name](around) if _possible(name, around) else ():
                start, end = result.start + begin, result.end + begin
                if result.score >= _LEAST_SCORE and part <= start < part + _PART_CHARS:
                    yield Match(start=start, end=end, label=name.upper(), score=float(result.score))


def _possible(name: str, text: str) -> bool:
    """Whether a text has what a pattern cannot do without: most texts have nothing, and looking costs time."""
    if name == "email":
        return "@" in text
    return _A_DIGIT.search(text) is not None or (name == "ip" and (text.count(":") >= 7 or "::" in text))


@lru_cache(maxsize=64)
def _recogniser(name: str, regions: tuple[str, ...]) -> Callable[[str], list[Any]]:
    from presidio_analyzer import predefined_recognizers as known

    if name == "phone":
        import phonenumbers

        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise JobError(f"options.regions: {region!r} is no region of phone numbers; give US, GB, DE, CN, …")
        # Any one region finds the numbers that carry a country code.
        phone = known.PhoneRecognizer(supported_regions=regions or ("US",))
        return lambda text: phone.analyze(text, phone.supported_entities)
    if name == "email":
        return _in_any_script(_offline_email())
    makers = {"card": "CreditCardRecognizer", "iban": "IbanRecognizer", "ip": "IpRecognizer"}
    return _in_any_script(getattr(known, makers[name])())


def _in_any_script(recogniser: Any) -> Callable[[str], list[Any]]:
    """Also finds what touches a letter of a script without blanks, which is a part of the word to the recognisers."""
    import regex

    ascii_flags = regex.DOTALL | regex.MULTILINE | regex.IGNORECASE | regex.ASCII

    def find(text: str) -> list[Any]:
        found = recogniser.analyze(text, recogniser.supported_entities)
        if not text.isascii():
            found = found + recogniser.analyze(text, recogniser.supported_entities, regex_flags=ascii_flags)
        return found

    return find


def _offline_email() -> Any:
    """Presidio's recogniser with the list of public suffixes that tldextract brings along; its own fetches one."""
    import tldextract
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    split = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

    class OfflineEmail(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return split(pattern_text).fqdn != ""

    return OfflineEmail()
