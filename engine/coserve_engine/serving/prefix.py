"""Names for what a page of the KV cache holds, so that a request can begin with pages that another one computed.

Keys and values at a position depend on all tokens up to it and on the adapter, bit for bit and on nothing else. The
key of a page is therefore a hash over the key of the page before it, the page's tokens, and, at the root, the adapter
version and which load of it this is, as a folder may have changed (the hash chain of vLLM's automatic prefix caching).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from coserve_engine.messages import AdapterVersion

KEY_BYTES = 16


def root_key(adapter: AdapterVersion | None, load: int) -> bytes:
    """The key before the first page: the same for two requests only if they use the same weights."""
    name = b"base" if adapter is None else f"adapter\0{adapter.uid}\0{adapter.number}\0{load}".encode()
    return hashlib.blake2b(name, digest_size=KEY_BYTES).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a whole page of tokens that follows the page (or root) with key `parent`."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class KeyChain:
    """The keys of a growing sequence's whole pages; each page is hashed once. `load` is that of the adapter."""

    def __init__(self, adapter: AdapterVersion | None, page: int, load: int = 0) -> None:
        self._last, self._page = root_key(adapter, load), page
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], length: int) -> None:
        """Hash the whole pages of the first `length` of `tokens` that are not hashed yet."""
        for index in range(len(self.keys), length // self._page):
            self._last = page_key(self._last, tokens[index * self._page : (index + 1) * self._page])
            self.keys.append(self._last)
