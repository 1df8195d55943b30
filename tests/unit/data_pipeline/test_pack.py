"""``llmtrain-data pack``: the same counts on any number of workers, told and kept."""

import json
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.config.commands import PackConfig
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.tokens import pack
from data_pipeline.tokens.pack import pack_with
from llmtrain.data import pack_blocks
from llmtrain.data.packing import PackedOrder
from tests.stores import random_documents, write_store


def test_pack_tells_and_keeps_the_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "a", random_documents(200, 60), num_shards=2)
    assert main(["pack", f"store={store.path}", "sequence_length=64"]) == 0
    told = json.loads(capsys.readouterr().out)
    order = PackedOrder(store, "a", seed=1, window_tokens=64)
    assert told["packing"] == str(tmp_path / "a" / "pack-00000064.json")
    assert (told["windows"], told["blocks"]) == (order.num_windows, 2)
    assert told["padding"] == round(1 - store.num_tokens / (64 * order.num_windows), 6)
    lengths = [store.document(i).size for i in range(store.num_documents)]
    assert told["cut_documents"] == sum(length > 64 for length in lengths)
    starts = [store.document_span(i)[0] for i in range(store.num_documents)]
    crossing = sum(
        start // 64 != (start + n - 1) // 64 for start, n in zip(starts, lengths, strict=True)
    )
    assert told["cut_documents_share_concat"] == crossing / store.num_documents
    assert told["cut_documents_share"] < told["cut_documents_share_concat"]


def test_the_number_of_tasks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_blocks, "BLOCK_TOKENS", 500)
    monkeypatch.setattr(pack_blocks, "BLOCK_WINDOWS", 1)
    store = write_store(tmp_path / "a", random_documents(200, 60))
    config = PackConfig(store=str(store.path), sequence_length=64)
    told = pack_with(config, InlineExecutor())
    kept = Path(told["packing"]).read_bytes()
    monkeypatch.setattr(pack, "TASK_BLOCKS", 3)
    assert pack_with(config, InlineExecutor()) == told
    assert Path(told["packing"]).read_bytes() == kept
    assert told["blocks"] > 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["store=absent", "sequence_length=64"], "absent does not exist"),
        (["store=absent", "sequence_length=0"], "sequence_length=0"),
    ],
)
def test_wrong_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", *words]) == 2
    assert message in capsys.readouterr().err
