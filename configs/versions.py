"""Version of this package, and the public address that it was installed from."""

import json
import re
from importlib import metadata

PACKAGE = "tessella"


def own_version() -> str:
    """Version of this package; "unknown" for a clone that is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


def origin_address() -> str | None:
    """What `pip install` was given, as `git+https://…@commit`; None if that was a folder or an index.

    pip records it (PEP 610). A name and a password in the address are left out.
    """
    try:
        recorded = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    version = recorded.get("vcs_info", {})
    if not version.get("commit_id") or not str(recorded.get("url", "")).startswith("https://"):
        return None
    address = re.sub("(?<=://)[^/@]*@", "", recorded["url"])
    return f"{version.get('vcs', 'git')}+{address}@{version['commit_id']}"
