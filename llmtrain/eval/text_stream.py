r"""The text of a continuation while its tokens arrive: whole characters, cut at stop strings.

A token may hold a part of a character, and a stop string may begin in one token and end in
another. What cannot be shown yet is held back: bytes until they are a character, and an ending that
may turn out to be the beginning of a stop string.

Invariant: what ``push`` and ``finish`` return together is ``text``; it never shrinks, and it is the
text of all tokens, up to the first stop string.

    stream = TextStream(tokenizer.decode, before=prompt_ids, stop=("\n\n",))
    for token in new_ids:
        sys.stdout.write(stream.push(token))
        if stream.stopped: break
    sys.stdout.write(stream.finish())
"""

from collections.abc import Callable, Sequence

_PART = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""
_CONTEXT = 8
"""Tokens before the new ones that are decoded with them: some decoders drop a first space."""


class TextStream:
    """Text of one continuation."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        """Continue ``before``, whose text is not shown, until one of ``stop``."""
        self._decode = decode
        self._ids = list(before)[-_CONTEXT:]
        self._start, self._read = 0, len(self._ids)
        self._stop = tuple(text for text in stop if text)
        self._longest = max(map(len, self._stop), default=0)
        self._shown = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns the text that is certain now and was not before."""
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(_PART) or not fresh:
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._extend(fresh)
        return self._show(len(self.text) if self.stopped else len(self.text) - self._undecided())

    def finish(self) -> str:
        """Return what was held back: nothing more comes."""
        if not self.stopped:
            self._extend(self._fresh())
            self._start = self._read = len(self._ids)
        return self._show(len(self.text))

    def _fresh(self) -> str:
        """Decode what was not read; a little of what was goes with it."""
        known = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _extend(self, fresh: str) -> None:
        first = max(0, len(self.text) - self._longest + 1)
        self.text += fresh
        found = [at for at in (self.text.find(stop, first) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _undecided(self) -> int:
        """Count the last characters that may begin a stop string."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            ending = self.text[-size:]
            if any(stop.startswith(ending) for stop in self._stop):
                return size
        return 0

    def _show(self, end: int) -> str:
        fresh = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh
