"""Names of classes: their Unicode form, and those that are whole numbers."""

import re
import unicodedata

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


def one_form(name: str) -> str:
    """A name in Unicode's composed form (NFC). Folders of a Mac name the same letters by other characters."""
    return unicodedata.normalize("NFC", name)


def is_whole(name: str) -> bool:
    """Whether a name is a whole number."""
    return WHOLE_NUMBER.fullmatch(name) is not None
