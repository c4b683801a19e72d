"""Names of images and classes: unfit characters, and names that differ in Unicode form alone."""

import re
import unicodedata

IN_UTF8 = "rename it, or set LC_ALL=C.UTF-8 if the locale is not UTF-8"
"""The fix for a name that is not UTF-8 text. Under LANG=C, no non-ASCII name is."""
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_fit(name: str) -> bool:
    """Return whether a name is UTF-8 text without control characters, which break a line."""
    return _UNFIT.search(name) is None


def is_utf8(text: str) -> bool:
    """Return whether text can be written as UTF-8; names of files may have other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """Return a name with its unfit characters replaced, for messages and records."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", name)


def normal_form(name: str) -> str:
    """Return a name in the Unicode form NFC, in which equal texts have equal characters."""
    return unicodedata.normalize("NFC", name)


def differ_in_form(first: str, second: str) -> bool:
    """Return whether two names show the same text but have other characters, as NFC and NFD do."""
    return first != second and normal_form(first) == normal_form(second)
