"""mC4's rule for pages: three lines of 200 characters or more, in any language (arXiv:2010.11934).

It takes the place of C4's rules for lines, which are made for English; no line is deleted.

    LongLines()(document)   # Kept(...) or Dropped("c4.few_long_lines")
"""

from dataclasses import dataclass

from data_pipeline.document import Document
from data_pipeline.step import Dropped, Finding, Kept, Verdict


@dataclass(frozen=True, slots=True)
class LongLines:
    """Keeps the pages with enough long lines."""

    min_lines: int = 3
    """Fewest long lines."""
    min_characters: int = 200
    """Fewest characters of a long line."""
    name: str = "c4"
    """Name in manifests and in the funnel."""

    def __call__(self, document: Document) -> Verdict:
        """Keep the document as it is, or drop it."""
        if self._long_lines(document.text) < self.min_lines:
            return Dropped("c4.few_long_lines")
        return Kept(document)

    def findings(self, document: Document) -> list[Finding]:
        """Return the number of long lines."""
        number = self._long_lines(document.text)
        limit = f"at least {self.min_lines} of {self.min_characters} characters"
        return [Finding("c4.few_long_lines", number, limit, number >= self.min_lines)]

    def _long_lines(self, text: str) -> int:
        return sum(len(line) >= self.min_characters for line in text.split("\n"))
