"""Preference runs by the real command: the margin rises, resume is exact, the reference is kept."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from tests.end_to_end.commands import TINY, Command, losses, make_store, rows, saved_state
from tests.preferences import make_pairs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
DPO = (
    "training.objective=dpo", "training.dpo.beta=0.3", "data.packing=best_fit",
    "training.num_tokens=3072", "checkpoint.every_steps=6", "evaluation.every_steps=6",
    "monitor.document_loss_steps=[2]",
)  # fmt: skip
"""12 steps."""


class Workplace:
    """A folder with stores of pairs and the runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_pairs(folder / "pairs", 1)
        make_pairs(folder / "held", 2, num_pairs=20)
        make_store(folder / "plain", 3)

    def train(self, name: str, *words: str, code: int = 0, ranks: int = 1) -> str:
        """Start or go on with a run; returns what was printed."""
        command = Command(
            ["train", *TINY, *DPO, f"name={name}", f"runs_dir={self.folder}/runs",
             f"data.sources.pairs={self.folder}/pairs",
             f"data.validation.held={self.folder}/held", *words],
            self.folder / f"{name}.log", ranks,
        )  # fmt: skip
        assert command.wait() == code, command.output
        return command.output

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("preferences"))
    place.train("whole")
    place.train("parts", "training.stop_at_step=6")
    return place


def test_the_reward_margin_rises(place: Workplace) -> None:
    found = rows(place.run("whole"))
    margins = [row["rewards"]["margin"] for row in found]
    assert found[0]["rewards"] == dict.fromkeys(found[0]["rewards"], 0.0)  # not nearly
    assert margins[-1] > 0.5
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    last = found[-1]
    assert last["rewards"]["accuracy"] > 0.95
    assert last["rewards"]["chosen"] > 0 > last["rewards"]["rejected"]
    assert last["logps"]["chosen"] > last["logps"]["rejected"]
    first, final = (row for row in found if "validation_loss" in row)
    assert final["validation_loss"]["held"] < first["validation_loss"]["held"] < np.log(2)
    assert final["validation_margin"]["held"] > first["validation_margin"]["held"]
    assert final["validation_accuracy"]["held"] >= 0.8
    assert final["validation_tokens"] == {"held": 20}
    printed = (place.folder / "whole.log").read_text()
    assert "reference: scoring 80 pairs with the weights the run starts with" in printed
    assert f"| margin {margins[-1]:.4f} | accuracy {last['rewards']['accuracy']:.1%} |" in printed


def test_losses_of_documents_are_those_of_the_texts(place: Workplace) -> None:
    path = place.run("whole") / "document_loss" / "step-000000002.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    row = rows(place.run("whole"))[1]
    texts = [line for line in lines if "targets" in line]
    assert len(texts) == 2 * row["source_tokens"]["pairs"]
    total = sum(line["loss"] * line["targets"] for line in texts)
    logps = row["logps"]["chosen"] + row["logps"]["rejected"]
    assert total == pytest.approx(-logps * row["source_tokens"]["pairs"], rel=1e-4)


def test_resume_is_exact_and_asks_nothing_again(place: Workplace) -> None:
    copytree(place.run("parts"), place.run("resumed"))
    reference = place.run("parts") / "reference"
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    output = place.train("resumed")
    assert "scoring" not in output.partition("resumed from")[2]
    assert losses(place.run("resumed")) == losses(place.run("whole"))
    want, found = (saved_state(place.run(name), 12) for name in ("whole", "resumed"))
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before


def test_a_lost_reference_is_not_made_again(place: Workplace) -> None:
    copytree(place.run("parts"), place.run("lost"))
    for path in (place.run("lost") / "reference").iterdir():
        path.unlink()
    output = place.train("lost", code=2, ranks=2)
    assert "is missing: it holds what the weights this run began with say of" in output


def test_a_foreign_reference_is_refused(place: Workplace) -> None:
    copytree(place.run("parts"), place.run("foreign"))
    path = next((place.run("foreign") / "reference").iterdir())
    np.save(path, np.load(path) + 1)
    assert "is not the reference this run began with" in place.train("foreign", code=2)


def test_a_store_that_comes_late_has_no_reference(place: Workplace) -> None:
    copytree(place.run("parts"), place.run("late"))
    make_pairs(place.folder / "new", 4, num_pairs=5)
    output = place.train("late", f"data.validation.new={place.folder}/new", code=2)
    assert "new was not there when this run began" in output


def test_what_is_no_pair_or_too_long_is_refused(place: Workplace) -> None:
    output = place.train("plain", f"data.validation.held={place.folder}/plain", code=2)
    assert "plain has 60 of 60 documents that are no pair of answers" in output
    make_pairs(place.folder / "long", 5, num_pairs=9, window_tokens=16)
    words = ("training.sequence_length=16", f"data.sources.pairs={place.folder}/long")
    output = place.train("long", *words, code=2)
    assert "data.sources.pairs: " in output
    assert "of 9 pairs that are longer than training.sequence_length=16" in output


def test_pairs_are_no_text_to_learn_from(place: Workplace) -> None:
    output = place.train("text", "training.objective=next_token", "training.dpo=null", code=2)
    assert "pairs holds pairs of answers, and training.objective=next_token would" in output
