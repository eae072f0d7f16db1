r"""Answers: found in a model's text, and compared with the right one.

A prompt asks for a *stated* answer: "The answer is 72.", "The answer is (B)." or `\boxed{72}`. Every extractor takes
the last stated answer of a text. Only a text that ended by itself (`ended=True`) has fallbacks, named in each
docstring: a text that was cut at the token limit has no last sentence that could be read as its answer, and a number
or a letter that touches the cut may not be whole. Where no rule finds anything the prediction is None: wrong.

Only the answer itself is read: what stands behind the thoughts (:func:`without_thoughts`), and before a question that
the model asks after its answer. Full-width characters are read as the usual ones.

>>> extract_number("48 / 2 = 24, so the answer is 24? No: 24 + 48 = 72. **Answer: $1,072.00**")
'1072.00'
>>> answers_match("1072.00", "1072", "number")
True
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

from ...integrations.loading.thoughts import without_thoughts
from .math_verifier import MathVerifier

Comparison = Literal["text", "number", "math"]

_verifier = MathVerifier()


def answers_match(prediction: str | None, answer: str, comparison: str) -> bool:
    r"""Whether a prediction says the same as the right answer.

    Args:
        prediction: what an extractor found; None is wrong.
        answer: the right answer.
        comparison: "text": the same string (an option's letter). "number": the same value, exactly
            (:func:`number_value`). "math": the same meaning, by math-verify: 1/2 = 0.5, (x + 1)^2 = x^2 + 2x + 1,
            \sqrt{117} = 3\sqrt{13}. Works in every thread and always returns (:class:`MathVerifier`).

    Raises:
        ValueError: an unknown comparison, or a right answer that is no number where numbers are compared.
        ImportError: math-verify is not installed.

    >>> answers_match("18.0", "18", "number"), answers_match("0.33", "1/3", "number")
    (True, False)
    """
    if comparison not in get_args(Comparison):
        raise ValueError(f"`comparison` must be one of {get_args(Comparison)}, got {comparison!r}.")
    right = number_value(answer) if comparison == "number" else None
    if comparison == "number" and right is None:
        raise ValueError(f"Numbers are compared, but the right answer {answer!r} is none.")
    if prediction is None or comparison == "text":
        return prediction == answer
    if comparison == "number":
        return number_value(prediction) == right
    if "=" not in answer:
        prediction = _without_calculation(prediction)
    if prediction.strip() == answer.strip():
        return True
    return _verifier.equal(_for_math_verify(prediction), _for_math_verify(answer))


# --- What of a text is its answer ---------------------------------------------------------------------------

# What the instruction of every task begins with.
REASON = "Reason step by step."
# The start of a line that asks something new: "Question:", "**Problem 2:**", "### Problem 2", the turn of a user.
_NEW_QUESTION = re.compile(
    r"^[ \t#>*_]*(?:(?i:(?:question|problem|exercise)[ \t]*#?\d*)|Q[ \t]*\d*|User|Human|(?i:instruction))[*_ \t]*:"
    r"|^#+[ \t]*(?i:question|problem|exercise)[ \t]*#?\d*[ \t]*$"
    rf"|^{re.escape(REASON)}"
    r"|(?:<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>|<\|turn>)user\b|<\|user\|>|\[INST\]",
    re.MULTILINE,
)
_NON_ASCII = re.compile(r"[^\x00-\x7f]")


def _usual_form(match: re.Match[str]) -> str:
    """A full-width, half-width, small or styled character as the usual one; a fraction in one character as three.

    Other compatibility forms stay: in 10² the 2 is an exponent, and ℝ is no R.
    """
    form, usual = unicodedata.decomposition(match[0]).partition(" ")[0], unicodedata.normalize("NFKC", match[0])
    if form == "<fraction>":
        gap = " " if match.string[: match.start()][-1:].isdigit() else ""
        return gap + usual.replace("⁄", "/")
    is_styled = form == "<font>" and match[0] >= "\U0001d400"
    return usual if is_styled or form in ("<wide>", "<narrow>", "<small>") else match[0]


def _read(text: str, ended: bool, find: Callable[[str, bool], str | None]) -> str | None:
    """What `find(text, ended)` finds in the answer that a text gives. Every extractor reads through this function.

    Thoughts are left out. Behind an answer, a base model often goes on with a question of its own and answers that:
    if anything is found before the first new question, it counts, and was complete. If not, the model is taking the
    question apart, or repeats it before it answers, and the whole text is read.
    """
    answer = without_thoughts(_NON_ASCII.sub(_usual_form, text))
    if answer is None:
        return None
    question = _NEW_QUESTION.search(answer)
    first = find(answer[: question.start()], True) if question else None
    return find(answer, ended) if first is None else first


# --- Statements: "The answer is" ----------------------------------------------------------------------------

_MARKUP = r"[\s*_`\"“”'‘’~≈]"
_OPENING = r"(?:[(\[{$€£¥]|\\[(\[$]|\\(?:boxed|text|math)[a-z]*\s*\{)"  # what may open around an answer
_DENIAL = r"(?:not|never|cannot|neither|nor)\b"
# "The answer is", "**Answer**: ", "the correct answer to the question would be", "Final answer =", "####".
_STATED = re.compile(
    r"(?<!wrong )(?<!incorrect )\b(?:answer|(?:correct|right|best) (?:option|choice))\b"
    rf"(?:\s+(?!is\b|{_DENIAL})\w+){{0,5}}?{_MARKUP}*"
    r"(?:\b(?:is|was|be|equals|becomes|comes to|comes out to)\b(?:\s*:)?|[:=])|####|<answer>",
    re.IGNORECASE,
)


def _is_whole(text: str, end: int, ended: bool) -> bool:
    """Whether what ends at `end` is known to be complete: a text that was cut must go on after it."""
    return ended or bool(text[end:].lstrip(",/"))


# --- Boxes --------------------------------------------------------------------------------------------------

# A box that opens, one without braces, an escaped character, a brace.
_BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*)(?:\{|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]", re.DOTALL)


def _boxes(text: str) -> list[tuple[int, str]]:
    """Start and content of every complete box, in the order of their starts."""
    boxes = []
    open_braces: list[re.Match[str]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match["bare"]))
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append(match)
        elif match[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening["box"]:
                boxes.append((opening.start(), text[opening.end() : match.start()].strip()))
    return sorted(boxes)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` (or `\fbox{...}`, `\boxed 5`), nested braces included.

    >>> print(extract_boxed(r"so $\boxed{\frac{1}{2}}$, which is not \boxed{\frac{1}{"))
    \frac{1}{2}
    """
    return _read(text, True, _last_box)


def _last_box(text: str, ended: bool = True) -> str | None:
    boxes = _boxes(text)  # a complete box is complete even where the text was cut
    return boxes[-1][1] if boxes else None


# --- Numbers ------------------------------------------------------------------------------------------------

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
# A sign and a currency in either order, a whole number before a fraction, digits, a denominator: -$1,234.50, 2 1/2.
_NUMBER = rf"[-−–]?(?:\\?[$€£¥]\s?)?[-−–]?(?:\d+ (?=\d+/\d))?{_DIGITS}(?:\s?[/⁄]\s?\d+(?:\.\d+)?)?"
# A minus may stand apart from its number, where it can't mean a subtraction: "The answer is - 5", "x = - 5".
_SIGNED_NUMBER = rf"(?:[-−]\s(?=[$€£¥\\.\d]))?{_NUMBER}"
# Not inside a word; the minus of 10-3 is no sign.
_ANY_NUMBER = re.compile(rf"(?<![^\W_])(?<!\d\.)(?P<number>(?:(?<==\s)[-−]\s(?=[$€£¥\\.\d]))?{_NUMBER})")
_VALUE = re.compile(rf"(?P<sign>-?)(?:(?P<whole>\d+) )?(?P<digits>{_DIGITS})(?:/(?P<denominator>[\d.]+))?")
_BEFORE_NUMBER = (
    rf"(?:{_MARKUP}|{_OPENING}|\b(?:approximately|about|around|roughly|exactly|only|just|simply|now|then|therefore|thus"
    r"|equal to|a total of)\b)*+"
)
_STATED_NUMBER = re.compile(rf"{_BEFORE_NUMBER}(?P<number>{_SIGNED_NUMBER})")
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=>])|≈|\\approx\b|\bequals\b")
# "x = 5", "f(2) = 5", but not the first line of a working: "x = 5\ny = 3".
_NAMED = r"[A-Za-z](?:\([^()]{0,9}\))?\s*=(?!.{0,200}[^.\s][ \t]*\n.{0,200}=)"
# A calculation begins with a number, maybe in brackets, with a command of LaTeX, or with a name.
_CALCULATION = re.compile(rf"{_BEFORE_NUMBER}(?=(?:[-−]\s?)?(?:{_OPENING}|\s)*{_NUMBER}|\\[A-Za-z]|√|{_NAMED})")
_LONGEST_CALCULATION = 400  # characters
# Where it ends: with its line (the next may begin with an equals sign), its sentence, or with what is only remarked.
_CALCULATION_ENDS = re.compile(
    r"\n(?!\s*&?\s*=)|[;—]|:\s|\s[-–]\s(?=[a-z])|(?<!\\),\s|[.!?][*_\"”’')\]}$]*(?=\s(?!\s*=)|$)|\banswer\b|####|\\(?:boxed|fbox)\b"
    r"|\b(?:because|since|as|where|which|when|if|so|or|leaving)\b"
    rf"|\band\s+(?:(?:that|this|it|he|she|they|we|the)\b|{_NUMBER}\s*[-−+*/×÷·])",
    re.IGNORECASE,
)
_OPERATOR = r"(?:[-−–+*/×÷·^]|\\times\b|\\cdot\b|\\div\b)"
# What shows that a number is not the value, but the beginning of another calculation: "3x", "9*2", "48 in all + 24".
_CALCULATION_GOES_ON = re.compile(rf"[xyzn]\b|{_OPERATOR}\s?[$(\d]|[^(]*?\s(?:{_OPERATOR}|x)\s+(?:{_OPENING}|\s)*\d")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))")
# Groups of three digits behind one to three: 12 000, 12\,000, 12{,}000, also repeated. Not in "2020 300 people",
# "555 123 4567", "4 250ml cups", "2 100-gram bars" or 5 125/1000.
_SEPARATOR = r"(?:\{,\}|,?\\[,!]|\\ |[ ~\u00a0\u2009\u202f])"
_THOUSANDS = re.compile(
    rf"(?<![\w.,/^])(?<!\d[ ~])[1-9]\d{{0,2}}(?:{_SEPARATOR}\d{{3}})+(?!\w|-\w|,\d|[ ~]\d|\s?/\s?\d{{3}})"
)


def _plain(text: str) -> str:
    r"""Fractions of LaTeX and all separators of thousands as plain ones: `2\frac{1}{2}` is "2 1/2", 12 000 12,000."""

    def fraction(match: re.Match[str]) -> str:
        gap = " " if text[: match.start()][-1:].isdigit() else ""
        return f"{gap}{match[1] or match[3]}/{match[2] or match[4]}"

    return _with_separator(",", _LATEX_FRACTION.sub(fraction, text))


def _with_separator(separator: str, text: str) -> str:
    """The separators of thousands, but for commas, replaced."""
    return _THOUSANDS.sub(lambda match: re.sub(_SEPARATOR, separator, match[0]), text)


def _cleaned(number: str) -> str:
    """A match of `_NUMBER` without currency and commas, with an ASCII minus."""
    bare = re.sub(r"[$€£¥\\,]", "", re.sub(r"[−–]", "-", number)).strip()
    return re.sub(r"\s*[/⁄]\s*", "/", re.sub(r"^-\s*", "-", bare))


def number_value(text: str) -> Fraction | None:
    r"""The value of a number that stands alone, or None if it is none.

    Thousands separators, a currency, a closing period, the sign of a percentage or of degrees do not matter: 50% has
    the value 50, since the sets that ask for percentages give them as plain numbers. Fractions and mixed numbers have
    their exact value.

    >>> number_value("-$1,234.50"), number_value(r"2\frac{1}{2}"), number_value("50%"), number_value("seven")
    (Fraction(-2469, 2), Fraction(5, 2), Fraction(50, 1), None)
    """
    plain = _plain(_NON_ASCII.sub(_usual_form, text.strip())).rstrip(".")
    number = re.sub(r"\s*(?:\\?%|°|\^\{?\\circ\}?)$", "", plain)
    match = _VALUE.fullmatch(_cleaned(number)) if re.fullmatch(_SIGNED_NUMBER, number) else None
    if match is None:
        return None
    try:
        value = Fraction(match["digits"]) / Fraction(match["denominator"] or 1) + Fraction(match["whole"] or 0)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or 1/0
        return None
    return -value if match["sign"] else value


def _is_list_marker(text: str, start: int, end: int) -> bool:
    """Whether a number is the "2." that a line begins with."""
    line = text[:start].rpartition("\n")[2]
    return not line.strip(" \t#*>_-") and bool(re.match(r"[.)][*_]*[ \t]+\S", text[end:]))


def extract_number(text: str, ended: bool = True) -> str | None:
    r"""The number that a text gives as its answer, without currency, commas and unit: "-3", "1234.50", "1/2".

    In this order:

    1. The last stated number: "The answer is 72", "Answer: 72", "#### 72", "<answer>72</answer>", `\boxed{72}`. Of a
       calculation there, the result: "The answer is 20% of 360 = 72". Nothing but markup, a currency or a word like
       "about" may stand between.
    2. If the text ended by itself, its last number, the markers of a list left out.

    Args:
        text: the completion.
        ended: False if it was cut at the token limit.

    >>> extract_number("3 apples and 4 pears, so 7")
    '7'
    >>> extract_number("The answer is $1,234.50 (about 12 a day).")
    '1234.50'
    """
    return _read(text, ended, _find_number)


def _find_number(text: str, ended: bool) -> str | None:
    text = _plain(text)
    stated = []
    for statement in _STATED.finditer(text):
        match = _stated_number(text, statement.end(), ended)
        if match and _is_whole(text, match.end(), ended) and not _is_list_marker(text, *match.span("number")):
            stated.append((match.start("number"), match["number"]))
    for start, content in _boxes(text):
        match = _result(content, 0) or _STATED_NUMBER.match(content) or _ANY_NUMBER.search(content)
        if match:
            stated.append((start, match["number"]))
    if stated:
        return _cleaned(max(stated)[1])
    if not ended:
        return None
    found = list(_ANY_NUMBER.finditer(text))
    found = [match for match in found if not _is_list_marker(text, *match.span())] or found
    return _cleaned(found[-1]["number"]) if found else None


def _stated_number(text: str, start: int, ended: bool) -> re.Match[str] | None:
    """The number that is stated at `start`, of a calculation the result; None where that was cut off."""
    first = _STATED_NUMBER.match(text, start)
    if first and re.match(r"[-−]\s", first["number"]) and "\n" in text[start : first.start("number")]:
        return None  # a list
    calculation = _CALCULATION.match(text, start)
    result = _result(text, calculation.end()) if calculation else None
    if first and not result and not ended:
        end = _calculation_end(text, first.end())
        equals = _EQUALS.search(text, first.end(), end)
        if end == len(text) and _CALCULATION_GOES_ON.match(text, first.end(), equals.start() if equals else end):
            return None
    return result or first


def _calculation_end(text: str, start: int) -> int:
    limit = min(len(text), start + _LONGEST_CALCULATION)
    stop = _CALCULATION_ENDS.search(text, start, limit)
    return stop.start() if stop else limit


def _result(text: str, start: int) -> re.Match[str] | None:
    """The value behind the last equals sign of a calculation that begins at `start`: 18 of "9 * 2 = 18 eggs".

    None where the last value is another calculation, the 48 + 24 of "72 = 48 + 24", or where the equation is only
    remarked: "12 (x = 3)", "12 for x = 3", "25% = 0.25", "1/3 ≈ 0.33".
    """
    end = _calculation_end(text, start)
    for sign in [*_EQUALS.finditer(text, start, end)][::-1]:
        before, behind = text[start : sign.start()], end
        value = _STATED_NUMBER.match(text, sign.end(), behind)
        end = sign.start()
        remarked = (
            sum(map(before.count, "([")) > sum(map(before.count, ")]"))
            or re.search(r"[A-Za-z]{2,}\s+[A-Za-z]\s*$", before)
            or re.fullmatch(rf"{_DIGITS if sign[0] == '=' else _NUMBER}\s*\\?%?[\s$\\)]*", before)
        )
        if value and not remarked and not _CALCULATION_GOES_ON.match(text, value.end(), behind):
            return value
    return None


# --- Options ------------------------------------------------------------------------------------------------

_BEFORE_OPTION = re.compile(
    rf"(?:{_MARKUP}|{_OPENING}|\b(?:the|option|choice|letter|answer|most|likely|probably|clearly|definitely|therefore"
    r"|thus|then|indeed)\b)*",
    re.IGNORECASE,
)
_AFTER_OPTION = re.compile(r"[)\]}*_`\"”'’$.]*")
# "A" and "I" are words too: "the answer is A because" names an option, "Answer: A dog" does not.
_WORD_FOLLOWS = re.compile(r"\s+(?!(?:because|since|as|is|and|or|for|which|with|by|due|but|so|not)\b)[a-z]")
_OTHER_OPTION = re.compile(
    r"\s*(?P<comma>,)?\s*(?:\\text\s*\{\s*)?(?(comma)(?:\b(?:or|and)\b)?|(?:\bor\b|\band\b|/|&))\s*\}?"
)
_ABOUT_THE_OTHER = re.compile(r"[)\]}*]*\s+(?:is|are|was|has|does|being)\b")


def _option_at(text: str, position: int, letters: str) -> tuple[str, int] | None:
    """The letter of an option that stands at `position`, markup and words like "option" skipped, and where it ends.

    A small letter needs a bracket, "(b)" or "b)", or has to be the last thing of its line.
    """
    start = _BEFORE_OPTION.match(text, position).end()  # type: ignore[union-attr]
    letter, after = text[start : start + 1], text[start + 1 :]
    if not letter or letter.upper() not in letters or re.match(r"\w|[-'’]\w", after):
        return None
    if letter.islower() and not re.match(r"[)\]}]|\.?\s*(?:\n|$|</)", after):
        return None
    if letter in "AI" and _WORD_FOLLOWS.match(after):
        return None
    return letter.upper(), start + 1


def _is_undecided(text: str, end: int, letters: str) -> bool:
    """Whether an option that ends at `end` goes on with others: "(A), (B), or (C)", but not "(A), (C) is wrong"."""
    first, listed = end, False
    while joint := _OTHER_OPTION.match(text, _AFTER_OPTION.match(text, end).end()):  # type: ignore[union-attr]
        option = _option_at(text, joint.end(), letters)
        if option is None:
            break
        end, listed = option[1], listed or joint["comma"] is not None
    if _ABOUT_THE_OTHER.match(text, end):
        return False
    if listed and _WORD_FOLLOWS.match(text, _AFTER_OPTION.match(text, end).end()):  # type: ignore[union-attr]
        return False
    return end > first


def _only(found: list[tuple[str, ...]]) -> str | None:
    """The letter that all matches agree on."""
    letters = {letter for groups in found for letter in groups if letter}
    return letters.pop() if len(letters) == 1 else None


def extract_option(text: str, letters: str, ended: bool = True) -> str | None:
    r"""The letter of the option that a text gives as its answer.

    In this order:

    1. The last stated option: "The answer is (B)", "**Answer: B**", "correct answer: **(C) Paris**",
       "<answer>B</answer>", `\boxed{\text{(B)}}`. One that is not decided, "The answer is (A), (B), or (C)", is no
       answer, and nothing further is looked for.

    If the text ended by itself (options that are denied, "not (A)", left out):

    2. The last option that is called right or chosen: "option B is the best", "(B) is correct", "I choose (B)".
    3. A last line that is nothing but a letter.
    4. The one letter that lines begin with: "B", "B. Paris", "(B) Paris, because".
    5. The one letter that is marked anywhere: "(B)", "**B**", "option B".

    Where 4 and 5 find several letters, there is no answer: a text that goes through all options ends without a choice.

    Args:
        text: the completion.
        letters: the options' letters, capital: "ABCD".
        ended: False if it was cut at the token limit.

    >>> extract_option("A. because the sun is a star, so the answer is D", "ABCD")
    'D'
    >>> print(extract_option("Because bats are mammals, (A) and (C) are alike.", "ABCD"))
    None
    """
    return _read(text, ended, lambda answer, whole: _find_option(answer, letters, whole)) or None


def _find_option(text: str, letters: str, ended: bool) -> str | None:
    """The letter, "" where the answer is not decided, None where there is none."""
    stated: list[tuple[int, str]] = []
    for statement in _STATED.finditer(text):
        option = _option_at(text, statement.end(), letters)
        if option and _is_whole(text, option[1], ended):
            stated.append((option[1], "" if _is_undecided(text, option[1], letters) else option[0]))
    for start, content in _boxes(text):
        if option := _option_at(content, 0, letters):
            stated.append((start, "" if _is_undecided(content, option[1], letters) else option[0]))
    if stated:
        return max(stated, key=lambda item: item[0])[1]
    if not ended:
        return None
    marked = rf"\(([{letters}])\)|\b(?i:option|choice)\s+[(*]*([{letters}])\b|\*\*([{letters}])\b[^*\n]*\*\*"
    text = re.sub(rf"\b(?:not|cannot be|can['’]t be|isn['’]t|rather than|instead of)\s+(?:{marked})", "", text)
    named = rf"(?:{marked}|\b([{re.sub('[AI]', '', letters)}])\b)"
    chosen = re.findall(
        rf"{named}[)*]*\s+(?:is|must be|would be|should be|seems)\s+(?:(?:the|most|clearly|therefore|probably)\s+)*"
        rf"(?:correct|right|true|best|answer)\b|\b(?i:choose|pick|select|go with|going with)\s+(?:the\s+)?{named}",
        text,
    )
    if chosen:
        return _only(chosen[-1:])
    last = re.fullmatch(rf"[\W_]*([{letters}])[\W_]*", text.strip().rpartition("\n")[2], re.IGNORECASE)
    if last:
        return last[1].upper()
    lines = re.findall(
        rf"^[ \t#*>_-]*(?:\(([{letters}])\)|([{letters}])(?:[).:]|\*\*|[ \t]*$))(?!\W*is (?:not|in|wrong|false))",
        text,
        re.MULTILINE,
    )
    return _only(lines) if lines else _only(re.findall(marked, text))


# --- Mathematics --------------------------------------------------------------------------------------------

_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BEFORE_EXPRESSION = re.compile(f"{_MARKUP}*")
_SENTENCE = re.compile(r"[^\n]{1,300}?(?=\.(?:\s|$)|,?\s(?:because|since|which|where)\b|\n|$|</answer>)")


def extract_math(text: str, ended: bool = True) -> str | None:
    r"""The expression that a text gives as its answer, as it stands there (LaTeX or plain).

    In this order:

    1. The content of the last complete `\boxed{...}`: :func:`extract_boxed`.
    2. The last statement: the formula, or else the rest of the sentence, after "The answer is" or "Answer:".
    3. If the text ended by itself, its last formula ($...$, \(...\), \[...\]), or else its last number.

    Args:
        text: the completion.
        ended: False if it was cut at the token limit.

    >>> print(extract_math(r"Hence $x = 2$. The final answer is $\frac{3}{4}$. I hope that helps."))
    \frac{3}{4}
    """
    return _read(text, ended, _find_math)


def _find_math(text: str, ended: bool) -> str | None:
    boxed = _last_box(text)
    if boxed:
        return boxed
    for statement in [*_STATED.finditer(text)][::-1]:
        start = _BEFORE_EXPRESSION.match(text, statement.end()).end()  # type: ignore[union-attr]
        match = _FORMULA.match(text, start) or _SENTENCE.match(text, start)
        if match and _is_whole(text, match.end(), ended) and (expression := _expression(match)):
            return expression
    if not ended:
        return None
    formulas = list(_FORMULA.finditer(text))
    return _expression(formulas[-1]) if formulas else _find_number(text, ended)


def _expression(match: re.Match[str]) -> str:
    """What stands in a formula's delimiters, or all of a sentence, without markup."""
    content = next((group for group in match.groups() if group), match[0])
    return content.strip(" \n*`$").rstrip(".")


def _without_calculation(expression: str) -> str:
    """The 4 of "12 miles / 3 hours = 4 miles per hour"; any other expression as it is."""
    value = _result(expression, 0) if _STATED_NUMBER.match(expression) else None
    unit = r"(?:\s+[A-Za-z]{2,}|\s*\\text\s*\{[^{}]*\})*\s*\.?"
    is_number = value and re.fullmatch(unit, expression[value.end() :])
    return value["number"] if value and is_number else expression


# What math-verify does not read, or reads as something else, and what it reads instead.
_FOR_MATH_VERIFY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\s*\{\s*\\?\$\s*\}|\\textdollar\b|\\?[$€£¥]", ""),
        (r"\^\{\s*(?:°|\\degree)\s*\}|\^?(?:°|\\degree\b)", r"^{\\circ}"),
        (r"(?<![\w.,/^])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"–", "-"),
        (r"⁄", "/"),
        (r"·", r"\\cdot "),
        (r"∞", r"\\infty "),
        (r"√\s*(?:\(([^()]+)\)|(\d+|[A-Za-z]))", r"\\sqrt{\1\2}"),
        (r"(?<=\d)\s*\\?(?:dollars?|cents?)\b", ""),
        (r"(?<=\d)\.\s*$", ""),
    )
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


def _for_math_verify(text: str) -> str:
    r"""The same expression in the notation that math-verify reads: `\$12 000` is 12000, `1 1/2` is 1\frac{1}{2}."""
    text = _with_separator("", _NON_ASCII.sub(_usual_form, text))
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    for pattern, replacement in _FOR_MATH_VERIFY:
        text = pattern.sub(replacement, text)
    return text
