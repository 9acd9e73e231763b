"""JSON objects that carry a checksum of themselves: damage is found when they are read.

The checksum protects against damage and edits by mistake, not against a person who computes it anew.
"""

import json
from typing import Any

import xxhash

from configs.checksums import Damaged

SEAL = "xxh3_128"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values and, as the last key, their checksum."""
    return {**values, SEAL: xxhash.xxh3_128_hexdigest(json.dumps(values).encode())}


def unsealed(values: Any, source: Any) -> dict[str, Any]:
    """Inverse of `sealed`, after JSON was written and read.

    Args:
        values: what was read.
        source: names the file in messages.

    Raises:
        Damaged: the checksum is missing, or the values have changed.
    """
    if not isinstance(values, dict) or SEAL not in values:
        raise Damaged(f"{source}: its checksum is missing; another program or an earlier version wrote this file")
    rest = {name: value for name, value in values.items() if name != SEAL}
    if sealed(rest) != values:
        raise Damaged(f"{source}: the contents of this file have changed since it was written")
    return rest
