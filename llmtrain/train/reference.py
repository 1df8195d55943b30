"""What the reference model says of the pairs of a run: asked once, of the weights it starts with.

Before the first step the run's own engine scores every pair of its stores, forward only, on the
run's own layout; no second model is held, then or later. The log-probabilities are kept in
RUN/reference, a file a store, and every checkpoint names the digests of these files. A mirror of
the checkpoints has them too.

Invariant: a run that goes on reads them; from weights that were trained they are never made.

    preferences = Preferences(config, plan, world, run.path / "reference", observe)
    engine = engine_of(config, world, num_sources, preferences.observe)
    preferences.open(engine, checkpoints.restored, progress.step, checkpoints)   # pairs have theirs
"""

import io
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import blake3
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.checkpoint.archive import Checkpoint
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.objects import from_first_rank
from llmtrain.config.parallel import microbatches_per_rank
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.manifest import sync
from llmtrain.data.pairs import FloatArray, PairBatches, PairStore, places_of
from llmtrain.data.plan import BatchPlan
from llmtrain.data.store import open_sources
from llmtrain.errors import CheckpointError
from llmtrain.parallel.mesh import World
from llmtrain.train.evaluation import Evaluator
from llmtrain.train.loss import Observer
from llmtrain.train.preference_loss import document_sums

logger = logging.getLogger(__name__)

RECORD = "reference"
"""What checkpoints call the digests of the files: fingerprint of the store -> blake3."""
SAY_EVERY_S = 30.0
"""Seconds between lines about scores in the making."""


class Preferences:
    """The pairs of a run, for training and held out, and their reference."""

    def __init__(
        self, config: RunConfig, plan: BatchPlan, world: World, folder: Path, observe: Observer
    ) -> None:
        """Look at the pairs of all stores; ``observe`` is who else is shown the tokens' losses.

        Raises:
            DataError: a document is no pair, or one is longer than a window.
        """
        self._config = config
        self._world = world
        self._folder = folder
        self._others = observe
        self._seen: list[tuple[Tensor, StepBatch]] | None = None
        length = config.training.sequence_length
        self.sources = tuple(PairStore(order.store, length) for order in plan.orders)
        """Those of training, in the order of the plan."""
        validation = config.data.validation if config.evaluation.every_steps is not None else {}
        self._validation = {
            name: PairStore(store, length)
            for name, store in open_sources(
                validation, config.data.cache_dir, check=False
            ).items()
        }  # fmt: skip
        self.held_out = None
        if self._validation:
            self.held_out = self._batches(self._validation, config.evaluation.windows_per_source)
        self._digests: dict[str, str] = {}
        self._mirrored = False

    @property
    def facts(self) -> dict[str, dict[str, str]]:
        """What a checkpoint carries of it: the digests of the files."""
        return {RECORD: dict(self._digests)}

    def observe(self, losses: Tensor, batch: StepBatch) -> None:
        """Take what the loss shows while the reference is made; the others get it at other times.

        Of equal losses on tensor-parallel ranks those of the first count.
        """
        if self._seen is None:
            self._others(losses, batch)
        elif self._world.tp_rank == 0:
            self._seen.append((losses.detach(), batch))

    def open(
        self,
        engine: Evaluator,
        restored: Checkpoint | None,
        step: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Give every pair its reference; every rank calls it after the weights are there.

        The mirror of ``checkpoints`` gets the files, and gives those that are not here.

        Raises:
            CheckpointError: on every rank, where the run goes on from ``restored`` and a file is
                lost, not the run's own, or would have to be made from the weights of ``step``.
        """
        known: dict[str, str] = {} if restored is None else restored.meta["carried"].get(RECORD, {})
        self._digests = known | self._digests
        stores = {one.store.fingerprint: one for one in (*self.sources, *self._validation.values())}
        missing = list[PairStore]()
        for fingerprint, one in stores.items():
            if one.reference is not None:  # a rollback
                continue
            if fingerprint in known:
                self._read(fingerprint, one, known[fingerprint], checkpoints)
            elif step == 0:
                missing.append(one)
            else:
                raise CheckpointError(
                    f"{one.store.name} was not there when this run began, its reference would be "
                    f"that of step {step}; take it out, or start a new run"
                )
        if missing:
            self._make(missing, engine)
        for one in (*self.sources, *self._validation.values()):
            one.reference = stores[one.store.fingerprint].reference
        if checkpoints is not None and not self._mirrored:
            self._mirrored = True
            for fingerprint in stores:
                checkpoints.keep_beside(self._path(fingerprint))

    def _read(
        self, fingerprint: str, pairs: PairStore, digest: str, checkpoints: Checkpoints | None
    ) -> None:
        path = self._path(fingerprint)

        def scores() -> FloatArray:
            if not path.exists() and checkpoints is not None:
                checkpoints.bring_beside(path, digest)
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing: it holds what the weights this run began with say of "
                    f"{pairs.store.name}, and they are trained since; restore it, or start a new "
                    "run"
                )
            content = path.read_bytes()
            if blake3.blake3(content).hexdigest() != digest:
                raise CheckpointError(
                    f"{path} is not the reference this run began with (blake3 differs from the "
                    "checkpoint's); restore it, or start a new run"
                )
            kept: FloatArray = np.load(io.BytesIO(content)).astype(np.float64)
            return kept

        pairs.reference = from_first_rank(scores)

    def _make(self, stores: Sequence[PairStore], engine: Evaluator) -> None:
        """Score the pairs of ``stores`` with the engine, write them down, and note the digests."""
        started = time.perf_counter()
        count = sum(one.num_pairs for one in stores)
        logger.info("reference: scoring %d pairs with the weights the run starts with", count)
        for one in stores:
            fingerprint = one.store.fingerprint
            one.reference = self._scores(one, engine)
            write = partial(_write, self._path(fingerprint), one.reference)
            self._digests[fingerprint] = from_first_rank(write)
        took_s = time.perf_counter() - started
        logger.info("reference: %d pairs in %.1f s, kept in %s", count, took_s, self._folder)

    def _scores(self, pairs: PairStore, engine: Evaluator) -> FloatArray:
        """Log-probabilities of the answers of every pair, [P, 2], on every rank."""
        scores, said = np.zeros((pairs.num_pairs, 2)), time.perf_counter()
        batches = self._batches({pairs.store.name: pairs})
        for index in range(len(batches)):
            batch = batches.at(index)
            found = self._observed(batch, engine)
            if found is not None:
                for one, pieces in batches.parts(index):
                    documents, row, chosen = places_of(batch, one, pieces)
                    scores[documents] = np.stack([found[row, chosen], found[row, chosen + 1]], 1)
            if time.perf_counter() - said > SAY_EVERY_S:
                said = time.perf_counter()
                logger.info("reference: %d of %d batches", index + 1, len(batches))
        # Of every pair one rank has the scores, the others 0.
        whole = self._world.sum(torch.from_numpy(scores).to(self._world.device))
        return whole.cpu().numpy()

    def _observed(self, batch: StepBatch, engine: Evaluator) -> npt.NDArray[np.float64] | None:
        """Log-probabilities by row and number of the text, [R, N]; None where no loss is seen."""
        rows = torch.arange(batch.tokens.shape[0], dtype=torch.int32)
        self._seen = []
        engine.eval_step(replace(batch, row_ids=rows).to(self._world.device))
        seen, self._seen = self._seen, None
        found = np.zeros((len(rows), int(batch.document_ids.max()) + 1))
        for losses, part in seen:
            sums = document_sums(-losses, part).cpu().numpy()[:, : found.shape[1]]
            if part.row_ids is not None:
                found[part.row_ids.cpu().numpy(), : sums.shape[1]] = sums
        return found if seen else None

    def _batches(
        self, stores: Mapping[str, PairStore], max_windows: int | None = None
    ) -> PairBatches:
        """Batches of the shape of the last ones of training."""
        training, world = self._config.training, self._world
        return PairBatches(
            stores,
            sequence_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            num_microbatches=microbatches_per_rank(
                self._config.parallel, training.global_batch_size, world.dp_size,
                training.micro_batch_size,
            ),
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            max_windows=max_windows,
        )  # fmt: skip

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint[:16]}.npy"


def preferences_of(
    config: RunConfig, plan: BatchPlan, world: World, run: Path, observe: Observer
) -> Preferences | None:
    """Make the preferences of a run whose folder is ``run``; None where it has another objective.

    Raises:
        DataError: as the constructor does.
    """
    if config.training.objective != "dpo":
        return None
    return Preferences(config, plan, world, run / "reference", observe)


def _write(path: Path, scores: FloatArray) -> str:
    """Write the scores aside, then under their name; return the digest of the file.

    Raises:
        CheckpointError: the disk does not take them.
    """
    content = io.BytesIO()
    np.save(content, scores, allow_pickle=False)
    beside = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.getvalue())
        sync(beside)
        beside.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}); make room for its {content.tell():,} bytes, or "
            "use another runs_dir"
        ) from error
    return blake3.blake3(content.getvalue()).hexdigest()
