"""LaTeX in replies and answers: what stands in a box, and whether a formula is a number and nothing more.

"\\frac12" is 1/2, "5\\text{ cm}^2" is 5, and "\\text{Yes}" is Yes. Anything else, such as "5x" or "2\\sqrt{3}", is no
number but a text. What a reply commits to is decided in verify.py.
"""

import re

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"
_FRACTION = re.compile(r"(?<!\d)\\frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))(?!\d)")
# The power of a unit, which is no number of its own. (A bare m may be a variable.)
_POWER = re.compile(r"(\\(?:text|mathrm|mbox)\{[^{}\d]*\}|\d\s*(?:[cmk]m|ft|in))\s*\^\s*(?:\{[23]\}|[23])(?!\d)")
_MATH = re.compile(r"\\[(\[](?:[^\\]|\\[^()\[\]])*\\[)\]]|\$\$[^$]*\$\$|\$(?=\S)[^$]*(?<=\S)\$(?!\d)|"
                   r"(?<!\S)[^\s\\]*\\[A-Za-z]{2}\S*")  # \(...\), \[...\], $$...$$, $...$, or a word with a command
STYLED = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\{([^{}]*)\}")
_BESIDE = re.compile(  # what may stand beside a number: units, in \text or bare. "5xyz" and "5pi" have none
    rf"\\(?:text[a-z]*|mathrm|mbox)\{{[^{{}}\d]*\}}?|\\end\{{[^{{}}]*\}}|[{CJK}]|"
    r"(?:°|\^\{?\\circ\}?)(?:\s*[CF]\b)?|(?<![A-Za-z\\])(?:km/h|m/s|[cmk]m|[mk]g|m[lL]|ft|in|lb|oz|hr)\b|"
    r"(?<=[\s,])[^\W\d_]{3,}")
_UP_TO_EQUALS = re.compile(r"\A.*(?:(?<![<>!])=|≈|\\approx(?![A-Za-z]))", re.S)  # of "x = 5", but not of "x >= 5"
_SPACING = re.compile(r"\\[()\[\],;:! ]|[\s$~]")


def spelled_out(text):
    """LaTeX's 1/2, 1,000, 50%, $5 and cm^2 as they are written without it."""
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text.replace(r"\fbox", r"\boxed"))
    text = _FRACTION.sub(r"\1\2/\3\4", re.sub(r"\\(?:text|math)[a-z]*\{([-+]?[\d.,]+)\}", r"\1", text))
    text = re.sub(r"\{,\}|,\\!|(?<=\d)\\,(?=\d{3}(?!\d))", ",", re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text))
    return _POWER.sub(r"\1", text).replace(r"\$", "$").replace(r"\%", "%")


def boxes(text):
    """[(start, end), ...] of what stands in each \\boxed{...}. The last one may lack its closing brace."""
    found, depth = [], 0
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if depth == 0 and brace[1]:
            found.append((brace.end(), len(text)))
            depth = 1
        elif depth > 0:
            depth += -1 if brace[0] == "}" else 1
            if depth == 0:
                found[-1] = (found[-1][0], brace.start())
    return found


def is_plain(text):
    """True if there is nothing but numbers, their units and punctuation: no variable, root, power or factorial."""
    return re.search(r"[^\W\d]|[√^|]|(?<!\\)!|[-+]\s*[-+(]", _BESIDE.sub(" ", _UP_TO_EQUALS.sub("", text))) is None


def is_part(reply, number):
    """True if this number is only a part of what is in the box, or of the formula that it stands in."""
    parts = boxes(reply) or [m.span() for m in _MATH.finditer(reply) if m.start() <= number.start() < m.end()]
    return not all(is_plain(reply[start:end]) for start, end in parts)


def without_markup(reply, words):
    """No \\text{} or $, and a boxed word spelled as in `words`. "" if there is another formula or a second box."""
    latex, reply = "\\" in reply or "$" in reply, STYLED.sub(r"\1", reply)
    found = boxes(reply)
    if len(found) > 1:
        return ""
    if latex:
        start, end = found[0] if found else (0, len(reply))
        held = [_SPACING.sub("", text) for text in (reply[start:end], _UP_TO_EQUALS.sub("", reply[start:end]))]
        if same := [word for word in words if _SPACING.sub("", word) in held]:
            reply = reply[:start] + same[0] + reply[end:]
        elif found and re.search(r"\\[A-Za-z]", reply[start:end]):
            return ""
    paired = reply.count("$") > 1 and "$" not in "".join(words)  # a single one is a price
    return re.sub(r"\\[()\[\]]|\$" if paired else r"\\[()\[\]]", "", reply)
