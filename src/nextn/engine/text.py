"""OutputText: tokens in, releasable text out.

Hides characters that are split over tokens, and text held back because a stop string may be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a lossy decoder shows for the first bytes of an unfinished character


class OutputText:
    """The text of one output as its tokens arrive.

    Args:
        decode: token ids to text; must be the concatenation of the tokens' bytes, decoded lossily.
        stop: strings that end the text, which then ends before the first of them.

    Example:
        >>> stream = OutputText(lambda ids: "".join(map(chr, ids)), stop=("END",))
        >>> [stream.push(ord(letter)) for letter in "aEND"], stream.text
        ([False, False, False, True], 'a')
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._pending: list[int] = []  # tokens since the last clean character boundary
        self._shown = 0  # characters of the pending tokens' text that are in self.text already
        self._released = 0
        self.text = ""

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop string is now complete, in which case ``text`` ends before it."""
        self._pending.append(token)
        decoded = self._decode(self._pending)
        # Only the last character can still change: an unfinished one shows as a single replacement character.
        is_clean = not decoded.endswith(_REPLACEMENT)
        added = decoded[self._shown :] if is_clean else decoded[self._shown : -1]
        self._shown += len(added)
        if is_clean:
            self._pending.clear()
            self._shown = 0
        return self._extend(added)

    def finish(self) -> bool:
        """Add what an unfinished character left behind; returns whether that completed a stop string."""
        rest = self._decode(self._pending)[self._shown :] if self._pending else ""
        self._pending.clear()
        self._shown = 0
        return self._extend(rest)

    def take(self, *, is_final: bool) -> str:
        """The text that may be shown now and was not yet; all of it if ``is_final``."""
        end = len(self.text) if is_final else len(self.text) - self._held_back()
        taken = self.text[self._released : end]
        self._released = max(end, self._released)
        return taken

    def _extend(self, added: str) -> bool:
        if not added:
            return False
        start = max(len(self.text) - self._longest_stop + 1, 0)
        self.text += added
        found = [place for place in (self.text.find(stop, start) for stop in self._stop) if place >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _held_back(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop if len(stop) > length):
                return length
        return 0
