"""CaseOps, published as lossless_caps_caseops_v1: text in lower case, its capitals written as operators.

    TITLE    U+E001    the next word starts with a capital     The, I     TITLE the, TITLE i
    ALLCAPS  U+E002    the next word is all capitals           NASA       ALLCAPS nasa
    CAPNEXT  U+E003    the next letter is a capital            iPhone     i CAPNEXT phone
    ESC      U+E004    the next character stands for itself    U+E001     ESC U+E001

A word is a maximal run of ASCII letters; other letters stay as they are and end a word. decode(encode(text)) is
`text` for every text, but `decode` also accepts spellings that `encode` never writes (CAPNEXT for TITLE).

An operator holds no text; every other character, and an operator after ESC, holds its UTF-8 bytes. The lenient
decoder follows this for any text, so bytes can be counted token by token whether the text is well-formed or not.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from golfgpt.errors import InputError

OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001\ue002\ue003\ue004"
OPERATOR_BYTES = 3
"""UTF-8 bytes of an escaped operator."""
_NAMES = dict(zip(OPERATORS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))
_OPERATOR = re.compile(f"([{OPERATORS}])")
_CAPITALS = re.compile("[A-Z][A-Za-z]*")  # starts with a charset, which `re` searches at 0.2 GB/s
_LETTERS = re.compile("[A-Za-z]*")
_TO_CAPNEXT = {ord(letter): CAPNEXT + letter.lower() for letter in string.ascii_uppercase}


def encode(text: str) -> str:
    """`text` with operators for its capitals; English text grows by 2 %."""
    return _CAPITALS.sub(_encode_capitals, _OPERATOR.sub(ESC + r"\1", text))


def _encode_capitals(match: re.Match) -> str:
    """A word from its first capital on."""
    word, start = match[0], match.start()
    if "a" <= match.string[start - 1 : start] <= "z":
        return word.translate(_TO_CAPNEXT)
    lower = word.lower()
    if len(word) > 1 and word.isupper():
        return ALLCAPS + lower
    return TITLE + lower[0] + word[1:].translate(_TO_CAPNEXT)


def decode(text: str, *, strict: bool = True) -> str:
    """The text that `text` encodes. Raises InputError naming the character where `text` is malformed; with
    `strict` False, operators that cannot apply are dropped instead."""
    plain, *rest = _OPERATOR.split(text)
    out, at = [plain], len(plain)
    word_mode, capnext, escape, allcaps = "", False, False, False
    in_word = _is_letter(plain[-1:])

    def refuse(what: str) -> None:
        if strict:
            raise InputError(f"malformed CaseOps text at character {at}: {what}; expected what caseops.encode writes")

    for operator, plain in zip(rest[::2], rest[1::2], strict=True):  # `plain` holds no operator, and may be empty
        if escape:
            if word_mode:
                refuse(f"an escaped {_NAMES[operator]} after {_NAMES[word_mode]}")
            out.append(operator)
            word_mode, escape, allcaps, in_word = "", False, False, False
        elif operator == ESC:
            escape = True
        elif operator == CAPNEXT:
            if capnext:
                refuse("CAPNEXT twice")
            capnext = True
        else:
            if word_mode or capnext or in_word:
                before = _NAMES[word_mode] if word_mode else "CAPNEXT" if capnext else "a letter"
                refuse(f"{_NAMES[operator]} after {before}")
            word_mode = word_mode if in_word else operator
        at, end = at + 1, at + 1 + len(plain)
        if plain and escape:
            in_word, escape = _is_letter(plain[0]), False
            if not in_word:
                if word_mode:
                    refuse(f"escaped {plain[0]!r} after {_NAMES[word_mode]}")
                word_mode, allcaps = "", False
            out.append(plain[0])
            plain, at = plain[1:], at + 1
        if plain:
            if _is_letter(plain[0]):
                upper = bool(capnext or (allcaps if in_word else word_mode))
                if not in_word:
                    word_mode, allcaps = "", word_mode == ALLCAPS
                capnext = False
                capitals = _LETTERS.match(plain).end() if allcaps else int(upper)
                out += plain[:capitals].upper(), plain[capitals:]
                allcaps = allcaps and capitals == len(plain)
            else:
                if word_mode or capnext:
                    refuse(f"{plain[0]!r} after {_NAMES[word_mode or CAPNEXT]}")
                word_mode, capnext, allcaps = "", False, False
                out.append(plain)
            in_word = _is_letter(plain[-1])
        at = end
    if word_mode or capnext or escape:
        refuse(f"the end after {_NAMES[word_mode or (CAPNEXT if capnext else ESC)]}")
    return "".join(out)


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def escaped(symbols: np.ndarray, operators: Sequence[int]) -> list[int]:
    """Indices into `symbols` (T,) of operators that are text because an ESC stands before them. `operators` are the
    four in the order of OPERATORS, as `symbols` has them: code points or token ids."""
    found: list[int] = []
    literal = -1  # index of what the last ESC makes literal
    for i in np.flatnonzero(symbols == operators[-1]).tolist():
        if i != literal:
            literal = i + 1
            if literal < len(symbols) and symbols[literal] in operators:
                found.append(literal)
    return found


def original_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes (int64, one for each character) of encoded `text` that are bytes of the original."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    operators = [ord(operator) for operator in OPERATORS]
    counts = 1 + sum((points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    counts[np.isin(points, operators)] = 0
    counts[escaped(points, operators)] = OPERATOR_BYTES
    return counts
