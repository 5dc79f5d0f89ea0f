"""Pages of the KV pool: who owns them, and which hold a prefix that a later request may reuse. No JAX.

A page is in exactly one of three places: free; owned (one or more requests count on it); or cached: nobody owns it, but
it still holds a prefix and is handed out last, least recently used first. Only full pages of committed tokens ever get
a key, so nobody can share a page that holds drafts.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

# Named by the page tables of idle slots and wherever a table has no page yet: written, never read.
SINK = 0

ROOT = b""


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full page: its own tokens and, through its parent's key, all before them.

    A cryptographic hash, because a collision would show one user another one's context.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference counts of all pages, and the prefix cache on top of them."""

    def __init__(self, num_pages: int, page_size: int, *, caches_prefixes: bool = True):
        """Args: as named; page 0 is `SINK` and is never handed out.

        Raises:
            ValueError: fewer than two pages, or empty pages.
        """
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"{num_pages=} must be at least 2 (one is the sink) and {page_size=} at least 1")
        self.page_size = page_size
        self.num_usable = num_pages - 1
        self._caches_prefixes = caches_prefixes
        self._free = deque(range(1, num_pages))
        self._owners = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # without owner, oldest first

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: the free, and the cached ones it would evict."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody owns but that still hold a prefix."""
        return len(self._cached)

    def allocate(self, num_pages: int) -> list[int] | None:
        """That many pages for one owner, or None and no change if there are not enough."""
        if num_pages > self.num_available:
            return None
        pages = []
        for _ in range(num_pages):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._owners[page] = 1
            pages.append(page)
        return pages

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Takes ownership of the pages that hold the longest known prefix, and returns them in order.

        Args:
            keys: of the request's full pages, in order.
        """
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
            self._cached.pop(page, None)
            self._owners[page] += 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Lets later requests find an owned page: it is full, and every token in it is committed.

        If another page holds the same prefix already, that one stays the one to be found.
        """
        assert self._owners[page] == 1 and page not in self._key_of
        if self._caches_prefixes and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one ownership of each page of a request, which holds them in order."""
        # The end of a prefix is no use without its start, so it must be evicted first.
        for page in reversed(pages):
            self._owners[page] -= 1
            assert self._owners[page] >= 0
            if self._owners[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Empties the prefix cache; pages in use stay with their owners but are no longer found."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._page_of.clear()

    def check(self, owned: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless each page is in exactly one place and `owned` is what they hold. For tests."""
        owners = [0] * len(self._owners)
        for pages in owned:
            assert len(set(pages)) == len(pages), "a request lists a page twice"
            for page in pages:
                owners[page] += 1
        assert owners == self._owners, "ownership differs from what requests hold"
        in_use = {page for page, count in enumerate(owners) if count}
        free, cached = set(self._free), set(self._cached)
        assert SINK not in in_use | free | cached
        assert len(free) == len(self._free)
        assert len(in_use) + len(free) + len(cached) == self.num_usable == len(in_use | free | cached)
        assert cached <= self._key_of.keys()
        assert not free & self._key_of.keys()
        assert {key: page for page, key in self._key_of.items()} == self._page_of
