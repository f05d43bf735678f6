"""Reads numbers with units: `1,234.50`, `\\$18`, `62.5\\%`, `5 \\text{ cm}`, `42 eggs`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

# A minus after a word, a digit or a bracket is a subtraction, not a sign.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
PLAIN = re.compile(
    r"([-+]?)\s*([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"((?:\.[0-9]+)?)\.?((?:[eE][-+]?[0-9]{1,3})?)"
)
UNITS = {
    name: unit
    for unit, names in {
        "%": "% percent pct percentage",
        "degree": "degree degrees deg \u00b0 \\circ",
        "dollar": "$ dollar dollars usd",
        "cent": "cent cents \u00a2",
        "euro": "\u20ac euro euros eur",
        "pound": "\u00a3 pounds-sterling",
        "yen": "\u00a5 yen",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mile miles",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds",
        "ounce": "oz ounce ounces",
        "second": "s sec secs second seconds",
        "minute": "min mins minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years",
        "ml": "ml milliliter milliliters millilitre millilitres",
        "liter": "l liter liters litre litres",
        "km/h": "km/h kmh kph",
        "mph": "mph",
        "m/s": "m/s",
    }.items()
    for name in names.split()
}
MULTIPLES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6}
MULTIPLES |= {"billion": 10**9, "trillion": 10**12}
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"}
FUNCTIONS |= {"tanh", "log", "exp", "min", "max", "gcd", "lcm", "mod", "det", "lim", "sqrt", "and"}
CURRENCY = re.compile(r"([-+]?)\s*(\\?\$|[\u20ac\u00a3\u00a5])\s*")
TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|textit)\s*"
UNIT_AT_END = re.compile(
    r"(?:\^\s*\{?\s*(?P<circle>\\circ)\s*\}?|\s*\\?(?P<sign>[%\u00b0\u00a2])"
    rf"|\s*{TEXT}\{{(?P<text>[^{{}}]*)\}}\s*(?P<power>(?:\^\{{?[23]\}}?)?)"
    r"|(?P<words>(?:(?<=[\d})])(?=[A-Za-z]{2})|(?<=[\d})]) +)[A-Za-z][A-Za-z /.'-]*)"
    r"(?P<power_of_words>(?:\^\{?[23]\}?)?))\s*$"
)
BASE = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")


class Quantity(NamedTuple):
    """A number and what it counts: a name of UNITS, `base N`, or nothing that is known."""

    value: Decimal
    unit: str


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, None where there is none."""
    numbers = [number for number in NUMBER.findall(text) if number]
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


def split_unit(text: str, *, letters: bool = False) -> tuple[str, str]:
    """Return a value without its unit, and the unit: "" where it has none that is known.

    Args:
        text: a value, perhaps with a unit.
        letters: whether `5 m` is metres and not five times m.
    """
    text = text.strip()
    based = BASE.fullmatch(text)
    if based:
        return based[1], f"base {based[2]}"
    money = CURRENCY.match(text)
    if money:
        amount = split_unit(text[money.end() :])[0]
        return money[1] + amount, UNITS[money[2].lstrip("\\")]
    found = UNIT_AT_END.search(text)
    if not found or not text[: found.start()].strip():
        return text, ""
    value = text[: found.start()].rstrip(" \\")
    if found["circle"] or found["sign"]:
        return value, UNITS[found["circle"] or found["sign"]]
    words = (found["words"] or found["text"]).strip().rstrip(".").lower()
    power = found["power"] or found["power_of_words"] or ""
    if found["words"] and _mathematical(words, value, letters):
        return text, ""
    unit = UNITS.get(words, UNITS.get(words.split(" ")[0], "") if " " in words else "")
    return value, unit + power.strip("^{}") if unit else ""


def _mathematical(words: str, value: str, letters: bool) -> bool:
    """Tell whether letters after a value are symbols or functions rather than a unit."""
    if words in UNITS and (letters or len(words) > 1):
        return False
    parts = re.findall("[a-z]+", words)
    return (
        any(char.isalpha() for char in value.replace("\\frac", ""))
        or len(parts[0]) < 3
        or not FUNCTIONS.isdisjoint(parts)
    )


def quantity(text: str, *, letters: bool = False) -> Quantity | None:
    """Return a text as a plain number with its unit, None if it is anything else.

    Args:
        text, letters: as for `split_unit`.
    """
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    value, unit = split_unit(text, letters=letters)
    found = PLAIN.fullmatch(value.strip())
    if found is None:
        return None
    sign, whole, decimals, exponent = found.groups()
    number = Decimal(f"{sign}{whole.replace(',', '') or '0'}{decimals}{exponent}")
    for word in re.findall("[a-z]+", text.lower()):
        number *= MULTIPLES.get(word, 1)
    return Quantity(number, unit)


def units_agree(gold: str, found: str) -> bool:
    """Tell whether two units fit one answer: a unit may be left out, but not exchanged."""
    return not gold or not found or gold == found


def same_quantity(gold: Quantity, found: Quantity) -> bool:
    """Tell whether two quantities are equal; `10%` is 0.1, and 10 only if the gold has no unit."""
    if gold.unit == "%" != found.unit:
        return not found.unit and found.value * 100 == gold.value
    if found.unit == "%" != gold.unit:
        return not gold.unit and found.value in (gold.value, gold.value * 100)
    return units_agree(gold.unit, found.unit) and gold.value == found.value
