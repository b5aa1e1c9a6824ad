"""Network addresses: which are this machine's own, and how one is shown to a person."""

from __future__ import annotations

import ipaddress
import re


def is_local(host: str) -> bool:
    """Whether `host`, a name or an IP address, is this machine's loopback: nobody else can be behind it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def masked(text: str) -> str:
    """`text` without the passwords of the URIs in it. What only might be part of a password goes too."""
    text = re.sub(r"(://[^/@:\s]*):.*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|token|secret)\w*=)[^&\s'\"]*", r"\1***", text)
