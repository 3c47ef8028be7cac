r"""How mathematical answers are written, taken apart without a LaTeX parser. Used by `math.py`.

`x = 1.6\times10^{-19}\text{ m}` has a name, a number and a unit; `\{1, 2\}` has members. What only changes how an answer
looks goes first (`bare_math`); what stood in \text{} and the like then stands between ⟨ and ⟩.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_LARGEST_POWER = 400  # of ten: a larger one is babble, and costs memory
# a single letter only of other scripts; Greek is mathematics
_WORD = re.compile(r"[^\W\d_]{3,}|[^\W\d_a-zA-ZͰ-Ͽ]+")
_FUNCTION_WORDS = re.compile(r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|exp|sqrt|deg", re.IGNORECASE)
# what people type instead of LaTeX
_TYPED = str.maketrans({"−": "-", "–": "-", "π": r"\pi ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ",
                        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in "})  # fmt: skip
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_UNRAISED = str.maketrans(_RAISED, "0123456789-+")
_ROOT = re.compile(r"√\s*([0-9]+|[a-z])|(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)")
# pattern -> what stands for it, in this order
_LOOKS = [
    (re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\[,!])(?=[0-9]{3}(?![0-9]))"), ""),  # between thousands
    (re.compile(r"\\\$"), "＄"),
    (re.compile(r"\$|(?<!\\)\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])"), " "),
    (re.compile(r"(?<!\\)\\[!,;:> ]|\\q?quad(?![A-Za-z])|~"), " "),
    (re.compile(r"^([A-Za-z](?:_\w)?)\s*(?:\\approx|≈)"), r"\1="),
    (re.compile(r"(?<=\S)\s*(?:\\approx|≈).*$|\\approx|≈", re.DOTALL), ""),  # rounded after the value itself
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(\\[lg]eq)slant(?![A-Za-z])"), r"\1"),
    (
        re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"),
        r"⟨\1⟩",
    ),
    (re.compile(rf"[{_RAISED}]+"), lambda m: "^{" + m[0].translate(_UNRAISED) + "}"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"(?:°|⟨?\s*deg(?:ree)?s?)[\s⟨⟩]*(Celsius|Fahrenheit)\s*⟩?"), lambda m: "°" + m[1][0]),
    (re.compile(r"\\varnothing(?![A-Za-z])|∅"), r"\\emptyset"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<=[0-9}\)])\s*,?\s*⟨?\s*(?<![A-Za-z])(?:and|or)\s*⟩?\s*(?=[-0-9\\(]|[a-z]\s*=)"), ", "),
    (re.compile(r"\s*;\s*"), ", "),
    (re.compile(r"\s*[.,;]\s*$"), ""),
]
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ ][0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_TEN = r"10\s*(?:\^|\*\*)\s*[{(]?\s*([+-]?[0-9]{1,4})\s*[})]?"
_DECIMAL = re.compile(rf"({_DIGITS})(?:\s*(?:\\times|\\cdot|\*|x)\s*{_TEN}|[eE]([+-]?[0-9]{{1,4}}))?|{_TEN}")
_FRACTION = re.compile(
    r"(?:([0-9]{1,9})\s*)?\\frac\s*\{\s*([0-9]{1,9})\s*\}\s*\{\s*([0-9]{1,9})\s*\}"
    r"|(?:([0-9]{1,9})\s+)?([0-9]{1,9})\s*/\s*([0-9]{1,9})"
)
# every name of a unit, without a plural's s; the first one of each line stands for all
_NAMES = """m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|g gram|kg kilogram
|mg milligram|s sec second|min minute|h hr hour|L l liter litre|mL ml milliliter millilitre|inch in|ft foot feet|mi mile
|lb pound|day|year|week|month|＄ dollar USD|€ euro EUR|£ GBP|cent|% \\% percent percentage pct|° degree deg|rad radian
|mph|N newton|J joule|W watt|V volt|A ampere amp|C coulomb|T tesla|H henry|F farad|K kelvin|Hz hertz|Pa pascal
|mol|Ω ohm|unit|°C|°F"""
_UNITS = {name: line.split()[0] for line in _NAMES.replace("\n", "").split("|") for name in line.split()}
# without \text{}, a single letter is a variable
_PLAIN_UNIT = "|".join(
    sorted((re.escape(u) + "s?" for u in _UNITS if len(u) > 1 or not u.isalpha()), key=len)
)
# what stands after a number and is no unit, nor what is counted: it changes the value, or is part of a sentence
_OTHER_WORDS = r"""an the and or nor not no none never neither but if than then else so only also
is are was were be been isn\W?t aren\W?t can cannot can\W?t could may might maybe perhaps possibly should would must will
wrong false incorrect invalid impossible undefined true right correct answer more less fewer most least at to from off
about around roughly nearly almost approximately exactly left remaining below above under over before after between up down
positive negative plus minus times divided squared cubed pi half halves third thirds quarter quarters dozens? score
[不非没無无否或和是]+.*"""
_NO_UNIT = re.compile(
    rf"(?<!\^)(?<!\^-)[0-9]|(?<!\w)(?:{'|'.join(sorted(set(_OTHER_WORDS.split())))})(?!\w)", re.IGNORECASE
)
_LETTER_OR_FUNCTION = re.compile(
    rf"(?<![°\w])(?<!° )(?:[A-Za-z]|{_FUNCTION_WORDS.pattern})(?![^\W\d_])", re.IGNORECASE
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9}}])\s*(⟨?)\s*({'|'.join(_SCALES)})(?![A-Za-z])\s*(⟩?)", re.IGNORECASE)
_PER = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
# the number base of 204_5; words without \text{}, and the letter of a unit after a space, follow a plain number
_BASE = re.compile(r"([0-9]+)\s*_\s*\{?\s*⟨?\s*([0-9]{1,2}|[a-z]+)\s*⟩?\s*\}?")
_PLAIN_TAIL = re.compile(
    rf"(.*[0-9])(\s+[mgshLNJWVACTHFK]{_PER}(?:\s*/\s*[A-Za-z]+{_PER})?|\s+[^\W\d_]{{3,}}(?:\s+[^\W\d_]+)*|\s*[^\W\d_a-zA-Zα-ωΑ-Ω]+)",
    re.DOTALL,
)
_MICRO = r"(?:\\mu\s*|[µμ]\s*)"
_FACTOR = (
    rf"(?:(?:{_MICRO}|⟨k⟩)?(?:⟨[^⟩]*⟩|Ω|(?<=[\s⟩])\\Omega(?![A-Za-z]))|(?<=\s){_MICRO}[A-Za-z](?![A-Za-z])"
    rf"|(?<![A-Za-z\\])(?:{_PLAIN_UNIT})){_PER}"
)
_TAIL = re.compile(
    rf"(.*?[0-9}})\].a-zA-Z])(\s*°\s*(?:[CF]|⟨[CF]⟩)|\s*{_FACTOR}(?:\s*(?:\\cdot|\*|/)?\s*{_FACTOR}|\s*/\s*[a-z]+{_PER})*)",
    re.DOTALL,
)
# Celsius is no degree of an angle
_UNIT_SIGN = re.compile(r"([/()]|°\s*[CF]\b|[^\W\d_]+|[^\s\w^.,-])(?:\^\s*(-?[0-9]))?")
_HEAD = re.compile(r"([+-]?)\s*([＄€£])\s*(.+)", re.DOTALL)
_ONE_NAME = r"(?:\\?[A-Za-z]+|⟨[^⟩]*⟩)(?:_(?:\{\w+\}|\w))?(?:\([a-z](?:,\s*[a-z])*\))?"
_NAME = re.compile(
    rf"({_ONE_NAME}(?:\s*:\s*{_ONE_NAME})*)\s*(?:=|\\in(?![A-Za-z]))\s*(?:[^<>,]*=)?\s*([^=<>]+)"
)
_ORDER = re.compile(r"((?:\\leq?|\\geq?|\\lt|\\gt|\\neq?)(?![A-Za-z])|<=|>=|!=|<|>)")
_ORDERS = {
    r"\leq": "<=",
    r"\le": "<=",
    r"\lt": "<",
    r"\geq": ">=",
    r"\ge": ">=",
    r"\gt": ">",
    r"\neq": "!=",
    r"\ne": "!=",
}
_RELATION = re.compile(r"=|\\in(?![A-Za-z])|" + _ORDER.pattern)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[\])]?", re.DOTALL
)
_BRACKETS = {"(": ")", "[": "])", "{": "}"}


def is_relation(text: str) -> bool:
    return bool(_RELATION.search(text))


class Listed(NamedTuple):
    """An answer that has members."""

    kind: str  # equal for what can be compared member by member
    members: tuple[str, ...]
    ordered: bool = True


def bare_math(text: str) -> str:
    r"""Without what only changes looks: $, \left, \text, spaces, thousands separators; typed signs as LaTeX."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text).translate(_TYPED).replace("＄", "$")
    for pattern, instead in _LOOKS:
        text = pattern.sub(instead, text.strip())
    return _SCALE.sub(_power_of_ten, text).strip()


def _power_of_ten(found: re.Match[str]) -> str:
    marks = (found[1] + found[3]).replace("⟨⟩", "")
    return rf"\times10^{{{_SCALES[found[2].lower()]}}}{marks}"


def unmarked(text: str) -> str:
    """As it was written, without ⟨ and ⟩."""
    return text.replace("⟨", "").replace("⟩", "")


def is_words(text: str) -> bool:
    """Whether it is no formula: it holds a word of three letters or of other scripts, or is only what stood in \\text{}."""
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " ", text)
    return any(not _FUNCTION_WORDS.fullmatch(word) for word in _WORD.findall(bare)) or bool(
        re.fullmatch(r"(?:⟨[^⟩]*⟩\s*)+", text)
    )


def split_name(text: str) -> tuple[str, str]:
    r"""`x = 5` and `x \in A` as name and value, of `x = 2 + 3 = 5` the last; the name is empty where there is none."""
    found = _NAME.fullmatch(text)
    return (found[1], found[2].strip()) if found else ("", text)


def last_side(text: str) -> str | None:
    """What stands last in `2 + 3 = 5`; None where the text is no equation, or several."""
    sides = _split(text, "=")
    return sides[-1] if len(sides) > 1 and len(_split(text, ",")) == 1 and not _ORDER.search(text) else None


def named_tuple(text: str, *, by_name: bool) -> str | None:
    """`x = 1, y = 2` as (1,2), `x = 1, y = 2; x = 3, y = 4` as (1,2),(3,4); None for all else, such as x_1 = 1, x_2 = 2.

    In the order of the text or, `by_name`, of the alphabet.
    """
    named = [split_name(member) for member in _split(text, ",")]
    names = [name.split("_")[0] for name, _ in named]
    width = len(set(names))
    if width < 2 or "" in names or names != names[:width] * (len(names) // width):
        return None
    groups = [named[i : i + width] for i in range(0, len(named), width)]
    if by_name:
        groups = [sorted(group) for group in groups]
    return ",".join(f"({','.join(value for _, value in group)})" for group in groups)


def interval(text: str) -> tuple[str, str] | None:
    """`0 < x <= 1` as its variable and (0,1], `x > 5` as x and (5,\\infty); None for all else."""
    order = listed(text)
    signs = order.kind.split() if order else []
    if not order or not 0 < len(signs) < 3 or not set(signs) <= {"<", "<="}:
        return None
    members = list(order.members)
    if len(members) == 2:  # the open side has no end
        at_first = bool(re.fullmatch(_ONE_NAME, members[0]))
        members.insert(0 if at_first else 2, r"-\infty" if at_first else r"\infty")
        signs.insert(0 if at_first else 1, "<")
    low, name, high = members
    if not re.fullmatch(_ONE_NAME, name):
        return None
    return name, f"{'(' if signs[0] == '<' else '['}{low},{high}{')' if signs[1] == '<' else ']'}"


def split_unit(text: str) -> tuple[str, str]:
    r"""`5\text{ cm}^2` as value and unit; the unit is empty where there is none.

    Each unit by one of its names; what is counted is one as well, and so is the base of 204_5.
    """
    if head := _HEAD.fullmatch(text):
        return head[1] + head[3], head[2]
    if base := _BASE.fullmatch(text):
        return base[1], f"base {base[2]}"
    tail = _TAIL.fullmatch(text)
    if not tail and (tail := _PLAIN_TAIL.fullmatch(text)) and number_of(tail[1]) is None:
        tail = None
    if not tail or not re.search(r"[0-9]|\\[A-Za-z]", tail[1]):
        return text.replace("°", ""), ""
    unit = re.sub(_MICRO, "µ", re.sub(r"\\cdot|\*", " ", tail[2]))
    unit = re.sub(r"\s+", " ", re.sub(r"[{}⟨⟩]", "", unit)).strip()
    unit = re.sub(r"\s*\^\s*", "^", unit).replace(r"\Omega", "Ω").replace(r"\%", "%")
    if _NO_UNIT.search(unit) or any(word not in _UNITS for word in _LETTER_OR_FUNCTION.findall(unit)):
        return text, ""
    return tail[1].replace("°", ""), _one_unit(unit)


def _one_unit(text: str) -> str:
    r"""One way to write a unit: `m s^-1`, `m/s` and `meters per second` are m·s^-1."""
    text = re.sub(r"\b(?:square|sq) (\S+)", r"\1^2", re.sub(r"\bcubic (\S+)", r"\1^3", text))
    powers: dict[str, int] = {}
    signs, sign = [1], 1  # of the brackets that are open, and of what comes next
    for found in _UNIT_SIGN.finditer(re.sub(r"\bper\b", "/", text)):
        sign_or_name = found[1]
        if sign_or_name == "/":
            sign = -1
        elif sign_or_name == "(":
            signs.append(signs[-1] * sign)
            sign = 1
        elif sign_or_name == ")":
            signs = signs[:-1] or [1]
        else:
            name = _unit(sign_or_name)
            powers[name] = powers.get(name, 0) + signs[-1] * sign * int(found[2] or 1)
            sign = 1
    return "·".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()))


def _unit(name: str) -> str:
    name = "".join(name.split())
    return (
        _UNITS.get(name)
        or _UNITS.get(name.lower().removesuffix("s"))
        or _UNITS.get(name.lower())
        or name.lower().removesuffix("s")
    )


def number_of(text: str) -> Fraction | None:
    r"""The number that the text is: 1,234.5, 1.6\times10^{-19}, 1e-5, 3/4, 3\frac{1}{2}, 3 1/2; None for all else."""
    text = text.strip()
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-" if sign < 0 else "+").strip()
    if len(text) > 60:
        return None
    if found := _FRACTION.fullmatch(text):
        whole, top, bottom = (
            int(n or 0) for n in (found[1] or found[4], found[2] or found[5], found[3] or found[6])
        )
        return sign * (whole + Fraction(top, bottom)) if bottom else None
    if not (found := _DECIMAL.fullmatch(text)):
        return None
    power = int(found[2] or found[3] or found[4] or 0)
    if abs(power) > _LARGEST_POWER:
        return None
    return sign * Fraction(re.sub("[, ]", "", found[1] or "1")) * Fraction(10) ** power


def listed(text: str) -> Listed | None:
    """The members of a matrix, an order, a union, a pair, an interval, a set or a list without brackets; None for all else."""
    if found := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\|\\cr", found[2].strip().removesuffix("\\\\"))]
        shape = [len(row) for row in rows]
        return Listed(f"matrix {shape}", tuple(cell.strip() for row in rows for cell in row))
    sides = _ORDER.split(text)
    if len(sides) > 1:
        members, signs = sides[::2], [_ORDERS.get(sign, sign) for sign in sides[1::2]]
        if signs[0].startswith(">"):
            members, signs = members[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
        return Listed(" ".join(signs), tuple(each.strip() for each in members), signs != ["!="])
    if len(sets := _split(text, "\\cup")) > 1:
        return Listed("union", _different(sets), ordered=False)
    inner = text.replace("\\{", "{").replace("\\}", "}")
    if inner[:1] in _BRACKETS and inner[-1:] in _BRACKETS[inner[0]] + ")" and _is_closed(inner[1:-1]):
        members = _split(inner[1:-1], ",")
        if inner[0] == "{":
            return Listed("set", _different(members), ordered=False)
        return Listed(inner[0] + inner[-1], members) if len(members) > 1 else None
    members = _split(inner, ",")
    return Listed("set", _different(members), ordered=False) if len(members) > 1 else None


def _is_closed(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, sign: str) -> tuple[str, ...]:
    """What stands between the signs that are in no brackets."""
    parts = [""]
    for piece in text.split(sign):
        if parts[-1] and not _is_closed(parts[-1]):
            parts[-1] += sign + piece
        elif parts == [""]:
            parts = [piece]
        else:
            parts.append(piece)
    return tuple(part.strip() for part in parts)


def _different(members: tuple[str, ...]) -> tuple[str, ...]:
    """Each once: a set says nothing twice."""
    return tuple({"".join(member.split()): member for member in members}.values())
