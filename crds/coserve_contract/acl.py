"""The Redis user of an endpoint: its own keys, and only the commands that agents and feeders send (also from within
scripts).

SCAN, KEYS, RANDOMKEY and DBSIZE would show other endpoints' keys, whatever the key pattern; so there are none, and
nothing administrative.
"""

from __future__ import annotations

import hashlib

from coserve_contract.keys import Keys

COMMANDS = (
    "ping",
    "client|setname",
    "eval",
    "evalsha",
    "get",
    "mget",
    "set",
    "del",
    "exists",
    "pexpire",
    "time",
    "hmget",
    "hgetall",
    "zadd",
    "zrem",
    "xadd",
    "xlen",
    "xrange",
    "xtrim",
)


def acl_username(endpoint_uid: str) -> str:
    """The user's name."""
    return f"cs-{Keys(endpoint_uid).endpoint_uid}"


def acl_setuser(endpoint_uid: str, *passwords: str) -> tuple[str, ...]:
    """The whole command ACL SETUSER, which replaces what the user was; passwords, of which any will do, go as hashes.

    Send it at every reconnect: users are lost when Redis restarts.
    """
    hashes = (f"#{hashlib.sha256(password.encode()).hexdigest()}" for password in passwords)
    rules = ("reset", "on", *hashes, f"~{Keys(endpoint_uid).prefix}*", *(f"+{name}" for name in COMMANDS))
    return ("ACL", "SETUSER", acl_username(endpoint_uid), *rules)


def acl_deluser(endpoint_uid: str) -> tuple[str, ...]:
    """The whole command ACL DELUSER, for when the endpoint is gone."""
    return ("ACL", "DELUSER", acl_username(endpoint_uid))
