"""Personal data that has a form: e-mail addresses, phone numbers, card numbers, IBANs, IP addresses.

The recognisers are Presidio's (https://microsoft.github.io/presidio/supported_entities/), called without its language
engine: card numbers count with a right check digit (Luhn) alone, IBANs with a right checksum and their country's form,
e-mail addresses with a public domain, phone numbers as phonenumbers finds them valid. Nothing here asks the network.

A recogniser looks at the longest stretch that might be something, and where that is none it looks no further: what
follows an address without a blank, or a number in groups, hides it. So what begins as one is shown to it once more, by
itself and ever shorter (`_second_looks`).
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bert_ray.errors import JobError

PATTERNS = ("card", "email", "iban", "ip", "phone")

# A result below this is a hint that wants further evidence ("::", the unspecified IPv6 address, has 0.1).
_LEAST_SCORE = 0.3
# What phonenumbers calls no country: numbers are those that carry a country code.
_NO_REGION = "ZZ"

# A long text is looked at in parts, so that time grows with its length and no more. What begins in a part is found
# with the part's surroundings: nothing here is longer than an e-mail address, 254 characters (RFC 5321, 4.5.3.1.3).
_PART_CHARS, _AROUND_CHARS = 2_000, 400

_A_DIGIT = re.compile(r"\d")

# What begins as a find, to be looked at a second time, and where it may end. An e-mail address may end before each sign
# in its domain.
_ADDRESS = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@([\w.-]{1,254})", re.ASCII)
_DOMAIN_ENDS = re.compile(r"[._-]|$")
# An IBAN, in any case, may end behind each of its groups.
_ACCOUNT = re.compile(r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{1,30}){1,12}", re.ASCII)
_GROUP_ENDS = re.compile(r"(?<=[A-Z0-9])(?![A-Z0-9])")
# Digits in groups; a card's number may begin and end with each. Issuers by their first digits (ISO/IEC 7812; of 16
# digits Visa, Mastercard, Discover, JCB, UnionPay; of 15 American Express, of 14 Diners; UnionPay up to 19).
_NUMBERS = re.compile(r"(?<![\d.])\d+(?:[ -]\d+)*")
_DIGITS = re.compile(r"\d+")
_CARD = re.compile(
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|35\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}|(?:62|81)\d{14,17}"
)
# Of so many ends each is tried, from the last one on: no domain has as many labels, nor an account as many groups.
_MOST_ENDS = 14
# IPv4 with zeros in front, and what a colon hides an IPv6 address before.
_PADDED = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_COLON = re.compile(r":(?=\s|$)")


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
            for start, end, score in self._recognisers[name](around) if _possible(name, around) else ():
                if score >= _LEAST_SCORE and part <= start + begin < part + _PART_CHARS:
                    yield Match(start=start + begin, end=end + begin, label=name.upper(), score=score)


def _possible(name: str, text: str) -> bool:
    """Whether a text has what a pattern cannot do without: most texts have nothing, and looking costs time."""
    if name == "email":
        return "@" in text
    return _A_DIGIT.search(text) is not None or (name == "ip" and (text.count(":") >= 7 or "::" in text))


# Start, end and score of each find.
_Finds = list[tuple[int, int, float]]
_Find = Callable[[str], _Finds]


@lru_cache(maxsize=64)
def _recogniser(name: str, regions: tuple[str, ...]) -> _Find:
    from presidio_analyzer import predefined_recognizers as known

    if name == "phone":
        import phonenumbers

        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise JobError(f"options.regions: {region!r} is no region of phone numbers; give US, GB, DE, CN, …")
        phone = known.PhoneRecognizer(supported_regions=regions or (_NO_REGION,))
        return lambda text: [_plain(found) for found in phone.analyze(text, phone.supported_entities)]
    if name == "email":
        return _looking_twice(name, _in_any_script(_offline_email()))
    makers = {"card": "CreditCardRecognizer", "iban": "IbanRecognizer", "ip": "IpRecognizer"}
    return _looking_twice(name, _in_any_script(getattr(known, makers[name])()))


def _plain(found: Any) -> tuple[int, int, float]:
    return found.start, found.end, float(found.score)


def _looking_twice(name: str, find: _Find) -> _Find:
    def find_twice(text: str) -> _Finds:
        found = find(text)
        seen = {place for start, end, _ in found for place in range(start, end)}
        return found + [item for item in _second_looks(name, find, text) if seen.isdisjoint(range(item[0], item[1]))]

    return find_twice


def _second_looks(name: str, find: _Find, text: str) -> Iterator[tuple[int, int, float]]:
    """Finds among what begins as one."""
    if name == "email":
        for match in _ADDRESS.finditer(text):
            ends = [match.start(1) + end.start() for end in _DOMAIN_ENDS.finditer(match[1])]
            yield from _longest(find, text, match.start(), ends, within=match.start(1))
    elif name == "iban":
        upper = text.upper()
        upper = upper if len(upper) == len(text) else text
        for match in _ACCOUNT.finditer(upper):
            ends = [match.start() + end.start() for end in _GROUP_ENDS.finditer(match[0])]
            yield from _longest(find, upper, match.start(), ends, within=match.start() + 4)
    elif name == "card":
        yield from _cards(text)
    else:
        without = _COLON.sub(" ", text)
        if without != text:
            yield from find(without)
        for match in _PADDED.finditer(text):
            address = ".".join(str(int(part)) for part in match[0].split("."))
            if address != match[0] and _is_address(address):
                yield match.start(), match.end(), 1.0


def _longest(find: _Find, text: str, start: int, ends: list[int], within: int) -> Iterator[tuple[int, int, float]]:
    """The find in the longest beginning of a stretch that has one over the place `within`."""
    for end in reversed(ends[:_MOST_ENDS]):
        for begin, stop, score in find(text[start:end]):
            if start + begin < within < start + stop and score >= _LEAST_SCORE:
                yield start + begin, start + stop, score
                return


def _cards(text: str) -> Iterator[tuple[int, int, float]]:
    """Numbers of cards within longer rows of numbers, whose check digit is right."""
    for row in _NUMBERS.finditer(text):
        groups, last = [(row.start() + group.start(), group[0]) for group in _DIGITS.finditer(row[0])], -1
        for first, (start, _) in enumerate(groups):
            digits = ""
            for place, group in itertools.islice(groups, first, None):
                digits += group
                if len(digits) > 19:
                    break
                if start > last and _CARD.fullmatch(digits) and _check_digit()(digits):
                    last = place + len(group) - 1
                    yield start, last + 1, 1.0


@lru_cache
def _check_digit() -> Callable[[str], bool]:
    """Presidio's check of a card's number."""
    from presidio_analyzer.predefined_recognizers import CreditCardRecognizer

    return CreditCardRecognizer().validate_result  # type: ignore[no-any-return]


def _is_address(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _in_any_script(recogniser: Any) -> _Find:
    """Also finds what touches a letter of a script without blanks, which is a part of the word to the recognisers."""
    import regex

    ascii_flags = regex.DOTALL | regex.MULTILINE | regex.IGNORECASE | regex.ASCII

    def find(text: str) -> _Finds:
        found = recogniser.analyze(text, recogniser.supported_entities)
        if not text.isascii():
            found = found + recogniser.analyze(text, recogniser.supported_entities, regex_flags=ascii_flags)
        return [_plain(item) for item in found]

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
