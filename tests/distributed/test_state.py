"""What one layout saves another continues, on either engine: the same tensors, the same losses."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.layouts import LAYOUTS, SINGLE, Layout
from tests.distributed.rig import relative
from tests.distributed.states import load, load_incomplete, read, save
from tests.world import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

LAYERS = 4
"""Blocks of the model, enough for every schedule."""
KIND = (SINGLE.model, SINGLE.optimizer)


def pairs() -> list[tuple[str, str]]:
    """Twelve pairs drawn at random, three of each order of engines; six layouts save.

    Of layouts on four ranks at most: eight on two cores would cost minutes.
    """
    drawn = random.Random(3)
    small = [x for x in LAYOUTS.values() if x.size <= 4 and (x.model, x.optimizer) == KIND]
    fp32 = [x for x in small if x.engine.precision == "fp32"]
    plain = {
        kind: [x.name for x in fp32 if x.engine.kind == kind] for kind in ("native", "deepspeed")
    }
    found = []
    for saving in plain:
        savers = drawn.sample(plain[saving], 3)
        for loading in plain:
            others = drawn.sample([x for x in plain[loading] if x not in savers], 3)
            found += [(savers[i], other) for i, other in enumerate(others)]
    return found


RELATED = [
    ("tied pp2 zbv", "tied fsdp2"),
    ("tied fsdp2", "tied pp2 1f1b"),
    ("muon fsdp2 tp2", "muon pp2 dp2"),
    ("bf16 pp2 1f1b", "bf16 fsdp2"),
]
"""Pairs with other parameters, states or types."""


class Savers:
    """Runs each layout that saves once."""

    def __init__(self, pools: dict[str, RankPool], folder: Path) -> None:
        self.pools = pools
        self.folder = folder
        self.losses: dict[str, list[float]] = {}

    def run(self, layout: Layout, body: Callable[..., list[float]], *paths: Path) -> list[float]:
        pool = self.pools[layout.engine.kind]
        config = replace(layout, layers=LAYERS).config
        results = pool.run(body, config, *map(str, paths), size=layout.size)
        return results[0]

    def saved(self, name: str) -> tuple[Path, list[float]]:
        """Folder of the state of a layout, and the losses it went on with."""
        folder = self.folder / name
        if name not in self.losses:
            self.losses[name] = self.run(LAYOUTS[name], save, folder)
        return folder, self.losses[name]


@pytest.fixture(scope="module")
def savers(
    ranks: RankPool, deepspeed_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Savers:
    pools = {"native": ranks, "deepspeed": deepspeed_ranks}
    return Savers(pools, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(("saving", "loading"), [*pairs(), *RELATED])
def test_another_layout_continues_with_the_same_state(
    saving: str, loading: str, savers: Savers, tmp_path: Path
) -> None:
    folder, want = savers.saved(saving)
    got = savers.run(LAYOUTS[loading], load, folder, tmp_path / "again")

    before, after = read(folder), read(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(name.startswith("optim.") and before[name].any() for name in before)
    tolerance = 1e-5 if saving.startswith("bf16") else 1e-6
    assert relative(got, want) <= tolerance


@pytest.mark.parametrize("name", ["pp2 fsdp2", "pp2 tp2 zbv", "deepspeed zero2 dp2"])
def test_same_layout_continues_bit_by_bit(name: str, savers: Savers) -> None:
    folder, want = savers.saved(name)
    assert savers.run(LAYOUTS[name], load, folder) == want


def test_incomplete_state_is_refused(ranks: RankPool) -> None:
    (message,) = ranks.run(load_incomplete, SINGLE.config, size=1)
    assert message.startswith(
        "the checkpoint lacks 1 tensors of this model, first model.model.norm.weight;"
    )
