"""Runs with a mirror that lose their disk: what an empty machine goes on from."""

from pathlib import Path
from shutil import rmtree

import pytest
import torch

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.mirror_folder import MirrorFolder
from llmtrain.checkpoint.retention import Keep
from llmtrain.data.plan import plan_of
from llmtrain.data.store import TokenStore
from tests.end_to_end.commands import losses, make_store, saved_state, saved_steps, status
from tests.end_to_end.poison import write_documents
from tests.end_to_end.test_guard import NUM_DOCUMENTS, Place
from tests.end_to_end.test_preferences import Workplace
from tests.end_to_end.test_recheck import EVERY, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_an_empty_machine_gets_the_history_of_a_run_that_went_back(tmp_path: Path) -> None:
    """It goes back to step 5, then to 0, and stops: what it saved at step 5 is undone."""
    place = Place(tmp_path)
    clean = tmp_path / "clean"
    plan = plan_of(place.config("clean", f"data.sources.web={clean}"), {
        "web": TokenStore.open(clean)
    })  # fmt: skip
    good = {window for step in range(7) for window in plan.windows(step).windows.tolist()}
    store = write_documents(
        tmp_path / "spoilt", NUM_DOCUMENTS, sorted({*range(NUM_DOCUMENTS)} - good)
    )
    mirror = f"file://{tmp_path}/mirror"
    code = place.train(
        "stopped", place.poisonous_weights(), "guard.on_spike=[rollback]", "guard.max_rollbacks=2",
        f"data.sources.web={store}", f"checkpoint.mirror={mirror}",
    )  # fmt: skip
    assert code == 4
    assert [one["to_step"] for one in place.events("stopped", "rollback")] == [5, 0]
    here = archive.locate(place.run("stopped"))
    found = Mirror(mirror, Keep(last=3)).fetch(tmp_path / "empty")
    assert found is not None
    assert found.meta == here.meta
    assert found.step == 0
    assert found.meta["line"] == [5, 0]
    assert found.meta["journal"]["skips"]
    assert MirrorFolder(mirror).steps() == [0]


def test_what_may_be_corrupt_does_not_come_back(tmp_path: Path) -> None:
    make_store(tmp_path / "store", seed=0)
    words = ("guard.recheck_every_steps=6", f"checkpoint.mirror=file://{tmp_path}/mirror")
    assert train(tmp_path, "stopped", *words) == 0  # under a launcher
    assert status(tmp_path / "stopped")["reason"] == "corrupted"
    assert MirrorFolder(f"file://{tmp_path}/mirror").steps() == [EVERY]


def test_a_preference_run_goes_on_from_a_mirror(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror"
    place.train("whole")
    place.train("moved", "training.stop_at_step=6", mirror)
    rmtree(place.run("moved"))
    output = place.train("moved", mirror)
    assert "scoring" not in output.partition("resumed from")[2]
    assert saved_steps(place.run("moved")) == [6, 12]
    assert losses(place.run("moved")) == {
        step: loss for step, loss in losses(place.run("whole")).items() if step > 6
    }
    want, found = (saved_state(place.run(name), 12) for name in ("whole", "moved"))
    assert all(torch.equal(want[name], found[name]) for name in want)
    for path in (tmp_path / "mirror/reference").iterdir():
        path.write_bytes(b"of another run")
    rmtree(place.run("moved"))
    assert "is missing: it holds what the weights" in place.train("moved", mirror, code=2)
