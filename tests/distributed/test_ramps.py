"""Runs whose batches and rows grow on the way: every layout computes what one process computes."""

from pathlib import Path

import pytest

from llmtrain.config.run import broken_rules
from llmtrain.data.document_loss import DocumentLoss, read_document_losses
from tests.distributed.layouts import Layout, native, zero
from tests.distributed.ramps import CHOSEN, SAVED, Ramped, ramped, ramped_config
from tests.distributed.rig import relative
from tests.world import RankPool

LAYOUTS = (
    native("dp2", dp_replicate=2),
    native("fsdp2", dp_shard=2),
    native("tp2", tp=2),
    native("cp2 ring", cp=2, cp_method="ring"),
    native("cp2 ulysses", cp=2, cp_method="ulysses"),
    native("cp2 tp2 all_gather", cp=2, tp=2),
    native("pp2 gpipe", pp=2, schedule="gpipe"),
    native("pp2 interleaved_1f1b", pp=2, schedule="interleaved_1f1b"),
    native("pp2 interleaved_zero_bubble", pp=2, schedule="interleaved_zero_bubble"),
    native("pp2 zbv", pp=2, schedule="zbv"),
    native("pp2 dualpipev", pp=2, schedule="dualpipev"),
    native("pp2 fsdp2 1f1b", pp=2, dp_shard=2),
    zero(2, " dp2", dp_shard=2),
    zero(3, " dp2", dp_shard=2),
    zero(1, " pp2 dp2", pp=2, dp_shard=2),
)

Found = tuple[Ramped, dict[int, tuple[DocumentLoss, ...]]]


class Runs:
    """Runs layouts over the ramps, and one process once for each number of blocks."""

    def __init__(self, pools: dict[str, RankPool], folder: Path) -> None:
        self.pools = pools
        self.folder = folder
        self.references: dict[str, Found] = {}

    def run(self, layout: Layout) -> Found:
        folder = self.folder / layout.name
        pool = self.pools[layout.engine.kind]
        config = ramped_config(layout)
        assert broken_rules(config, layout.size) == []
        answers = pool.run(ramped, config, str(folder), size=layout.size)
        assert all(answer == answers[0] for answer in answers)
        return answers[0], {step: read_document_losses(folder, step) or () for step in CHOSEN}

    def reference(self, layout: Layout) -> Found:
        alone = layout.reference
        if alone.name not in self.references:
            self.references[alone.name] = self.run(alone)
        return self.references[alone.name]


@pytest.fixture(scope="module")
def runs(
    ranks: RankPool, deepspeed_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    pools = {"native": ranks, "deepspeed": deepspeed_ranks}
    return Runs(pools, tmp_path_factory.mktemp("ramps"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_agrees_with_one_process_over_ramps(layout: Layout, runs: Runs) -> None:
    """A step of the tail was chosen only the first time: choosing changes no bit."""
    want, documents = runs.reference(layout)
    got, found = runs.run(layout)
    assert relative(got.losses, want.losses) <= 1e-6
    assert relative(got.grad_norms, want.grad_norms) <= 5e-6
    assert got.tail == got.losses[SAVED:]
    for step in CHOSEN:
        places = [(x.row, x.document, x.source, x.targets) for x in found[step]]
        assert places == [(x.row, x.document, x.source, x.targets) for x in documents[step]]
        losses, others = ([x.loss or 0.0 for x in y] for y in (found[step], documents[step]))
        assert relative(losses, others) <= 1e-5
        total, targets = got.sums[step]
        assert sum(x.targets for x in found[step]) == targets
        assert sum(x.targets * (x.loss or 0.0) for x in found[step]) == pytest.approx(total, 1e-6)
