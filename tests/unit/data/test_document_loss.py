"""Files of the losses of documents: whole or absent, and the worst document first."""

from pathlib import Path

import pytest

from llmtrain.data.document_loss import (
    DocumentLoss,
    document_losses_path,
    read_document_losses,
    worst,
    write_document_losses,
)
from llmtrain.errors import DataError


def line(document: int, loss: float | None) -> DocumentLoss:
    return DocumentLoss(row=1, document=document, source="web", targets=3, loss=loss)


LINES = (line(0, 0.1 + 0.2), line(1, None), line(2, 9.5))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_document_losses(tmp_path, 7) is None
    path = write_document_losses(tmp_path, 7, LINES)
    assert path == tmp_path / "document_loss" / "step-000000007.jsonl"
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert read_document_losses(tmp_path, 7) == LINES


def test_the_worst_come_first_and_what_is_not_finite_before_them() -> None:
    assert [found.document for found in worst(LINES)] == [1, 2, 0]


@pytest.mark.parametrize("text", ['{"row": 1', '{"row": 1}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = document_losses_path(tmp_path, 7)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DataError, match=r"07\.jsonl is damaged, it holds no losses of"):
        read_document_losses(tmp_path, 7)


def test_a_part_of_a_file_is_never_seen(tmp_path: Path) -> None:
    write_document_losses(tmp_path, 7, LINES)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_document_losses(tmp_path, 7, [LINES[0], line(1, float("nan"))])
    assert read_document_losses(tmp_path, 7) == LINES
