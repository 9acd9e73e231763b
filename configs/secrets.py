"""What secrets look like. They do not belong in messages, uploads and configurations.

A configuration is saved in the folder of the run, uploaded and given to trackers.
"""

import re
from collections.abc import Iterator
from typing import Any

NAMES = r"(token|passwd|password|passphrase|secret|credentials?|api_?key|access_?key)"
SECRET_KEY = re.compile(rf"{NAMES}\Z", re.IGNORECASE)
SECRET_ITEM = re.compile(rf"{NAMES}(['\"]?\s*[:=]).*", re.IGNORECASE | re.DOTALL)

# Kinds of secrets in any text. Bounded repetitions keep the search linear in long lines.
SECRETS = {
    "a token": re.compile(r"hf_[A-Za-z0-9]{20,}"),
    "a password in an address": re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)"),
    "a token in an address": re.compile(
        r"[?&][\w.-]{0,40}(token|key|secret|password|signature|sig|credential)=[^&\s\"']+", re.IGNORECASE
    ),
}
ADVICE = (
    "a secret must not stand in a configuration, which is saved and uploaded; leave it out, and log in with "
    "`hf auth login`, or set HF_TOKEN"
)


def names_secret(key: str) -> bool:
    """Whether the value of a key is a secret, for instance `training_arguments.hub_token`."""
    return bool(SECRET_KEY.search(key))


def redacted(text: str) -> str:
    """A text with stars in place of its secrets."""
    for pattern in SECRETS.values():
        text = pattern.sub("***", text)
    return text


def redacted_value(text: str) -> str:
    """A value, written as text, with stars also in place of all that follows the key of a secret."""
    return SECRET_ITEM.sub(r"\1\2 ***", redacted(text))


def secret_keys(values: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of all secrets in nested plain values."""
    if names_secret(key) or (isinstance(values, str) and redacted(values) != values):
        yield key
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from secret_keys(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secret_keys(value, key)
