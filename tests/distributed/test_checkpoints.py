"""Ranks save, fail and refuse together."""

from pathlib import Path

from llmtrain.train import archive
from llmtrain.train.checkpoint import load_model_weights
from tests.distributed.checkpoints import full_disk_on_one_rank, restore_damaged
from tests.world import RankPool


def test_a_disk_full_on_one_rank_fails_the_save_on_all_and_keeps_the_old(
    ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    results = ranks.run(full_disk_on_one_rank, str(folder), size=2)
    assert results == [(True, False, True, 1.0)] * 2
    assert [step for step, _ in archive.scan(folder)] == [1]
    weights = load_model_weights(tmp_path)
    assert {name: tensor.unique().tolist() for name, tensor in weights.items()} == {
        "layer0.weight": [1.0],
        "layer1.weight": [2.0],
    }

    for path in (folder / "step-000000001").glob("__*"):
        path.write_bytes(path.read_bytes()[:-1])
    messages = ranks.run(restore_damaged, str(folder), size=2)
    assert messages[0] == messages[1]
    assert "is whole" in messages[0]
