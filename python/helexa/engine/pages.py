"""Who holds which page of the KV cache: exact counts, no tensors.

A page is *used* while a sequence holds it, *cached* while only the prefix cache keeps it, and *free*
otherwise; the three counts always sum to the size of the pool. Page 0 is the scratch page: it belongs to
nobody, and padding rows write to it.
"""

SCRATCH_PAGE = 0


class PagePool:
    """Allocates the pages 1 … num_pages and counts their holders."""

    def __init__(self, num_pages: int, page_tokens: int):
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_cached = 0
        self._holders = [0] * (num_pages + 1)
        self._kept = bytearray(num_pages + 1)
        # The page freed last is handed out first: its memory is committed already.
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free) - self.num_cached

    def pages_for(self, num_tokens: int) -> int:
        """The number of pages that hold num_tokens tokens."""
        return -(-num_tokens // self.page_tokens)

    def holders(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._holders[page]

    def allocate(self) -> int:
        """A free page, held once; the caller has made sure that there is one."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more sequence holds the page."""
        if self._holders[page] == 0:
            assert self._kept[page], f"page {page} is free and cannot be retained"
            self.num_cached -= 1
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One sequence fewer holds the page."""
        assert self._holders[page] > 0, f"page {page} is released more often than it was held"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if self._kept[page]:
                self.num_cached += 1
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """The prefix cache keeps the page, which a sequence holds now."""
        assert self._holders[page] > 0, f"page {page} must be held to become cached"
        assert not self._kept[page], f"page {page} is kept already"
        self._kept[page] = 1

    def drop(self, page: int) -> None:
        """The prefix cache lets the page go; it is free at once if no sequence holds it."""
        assert self._kept[page], f"page {page} is not kept"
        self._kept[page] = 0
        if self._holders[page] == 0:
            self.num_cached -= 1
            self._free.append(page)
