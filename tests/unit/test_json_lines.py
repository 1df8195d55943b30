"""Files of JSON lines of which a crash has cut a line short."""

from pathlib import Path

from llmtrain import json_lines


def test_a_cut_line_is_as_if_not_written_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, {"step": 1, "text": "é"})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "te')
    assert json_lines.read(path) == [{"step": 1, "text": "é"}]

    json_lines.append(path, {"step": 3})

    assert json_lines.read(path) == [{"step": 1, "text": "é"}, {"step": 3}]
