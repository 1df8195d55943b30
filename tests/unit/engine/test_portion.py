from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llmtrain.engine.portion import Portion, take
from llmtrain.parallel.region import rectangles

WHOLE = torch.arange(20.0).view(5, 4)


def portion(start: int, length: int) -> tuple[Portion, torch.Tensor]:
    """A run of the flattened tensor, and the storage behind it."""
    storage = torch.zeros(length)
    cut = rectangles((5, 4), start, length)
    chunks = [
        (region, storage[part].view([s.stop - s.start for s in region])) for region, part in cut
    ]
    return Portion((5, 4), chunks, like=storage), storage


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_read_into_other_cuts(tmp_path: Path) -> None:
    dcp.save({"weight": WHOLE.clone()}, checkpoint_id=tmp_path, no_dist=True)
    mine, storage = portion(6, 9)
    dcp.load({"weight": mine}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(storage, WHOLE.flatten()[6:15])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_portions_are_written_where_they_lie(tmp_path: Path) -> None:
    mine, storage = portion(0, 20)
    storage.copy_(WHOLE.flatten())
    dcp.save({"weight": mine}, checkpoint_id=tmp_path, no_dist=True)
    read = {"weight": torch.zeros(5, 4)}
    dcp.load(read, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(read["weight"], WHOLE)


def test_take_cuts_whole_tensors_to_the_portion() -> None:
    mine, storage = portion(3, 7)
    take(mine, WHOLE)
    assert torch.equal(storage, WHOLE.flatten()[3:10])


def test_a_portion_has_no_arithmetic() -> None:
    mine, _ = portion(0, 20)
    assert mine.shape == (5, 4)
    with pytest.raises(NotImplementedError, match="use its chunks"):
        _ = mine + 1
