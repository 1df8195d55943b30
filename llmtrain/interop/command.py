"""``llmtrain import`` and ``llmtrain export``.

An import is a run folder: ``checkpoints/step-000000000`` with the weights, ``tokenizer/`` with the
tokenizer's files, ``config.yaml`` with which ``llmtrain generate``, ``eval`` and ``export`` read it
as any run, and ``conf/experiment/imported.yaml`` with which training goes on from it. What has no
place in our configuration (ids of special tokens, settings of generation, rows before padding)
travels in the checkpoints, so that the export of any descendant has it again.

    llmtrain import from=Qwen2.5-0.5B run=runs/qwen
    llmtrain import from=Qwen2.5-0.5B run=runs/mine tokenizer=tokenizer    # a new vocabulary
    llmtrain train --config-dir runs/qwen/conf experiment=imported data.sources.mine=stores/mine ...
    llmtrain export run=runs/more to=qwen-more
    llmtrain export run=runs/lora to=qwen-lora adapter=true base=Qwen2.5-0.5B    # for PEFT
"""

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.start import ORIGIN, adapter_facts, check_weights
from llmtrain.checkpoint.stored_run import StoredRun, find_run
from llmtrain.checkpoint.weights import NewWeight, StoredWeights, write_weights
from llmtrain.config.data import TokenizerConfig
from llmtrain.config.interop import ExportConfig, ImportConfig
from llmtrain.config.load import to_plain, to_yaml, write_yaml
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import TrainingConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interop.adapters import open_adapter, write_adapter
from llmtrain.interop.families import KEPT, SPECIAL_IDS, choose_family
from llmtrain.interop.huggingface import (
    GENERATION,
    HuggingFaceFolder,
    made_whole,
    open_folder,
    write_json,
    write_model,
)
from llmtrain.interop.layout import EMBEDDING, HEAD, layout_of
from llmtrain.interop.safetensors import read_json
from llmtrain.interop.tokenizer_files import bring_in, take_out, tokenizer_in
from llmtrain.interop.vocabulary import NewVocabulary, new_vocabulary
from llmtrain.run.directory import RunDirectory
from llmtrain.tokenizer.files import JSON_FILE, MODEL_FILE
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip
_USUAL_LENGTH = 2048
_IDS = re.compile(r"_token_id$|_ids$|suppress_tokens$")
"""Settings of generation that name ids."""


def import_main(config: ImportConfig) -> int:
    """Make a run folder from a Hugging Face folder."""
    source, run = Path(config.from_), Path(os.path.abspath(config.run))
    folder = open_folder(source)
    surgery = _surgery(config, folder)
    ids = folder.model.vocab_size if surgery is None else len(surgery.sources)
    rows = -(-ids // config.vocab_multiple) * config.vocab_multiple
    model = replace(folder.model, vocab_size=rows)
    adapter = config.adapter and open_adapter(Path(config.adapter), model, folder.family)
    with made_whole(run) as aside:
        tokenizer = bring_in(Path(config.tokenizer or source), aside / "tokenizer")
        path = None if tokenizer is None else str(run / tokenizer.relative_to(aside))
        if tokenizer is None:
            logger.warning("%s has no tokenizer; set tokenizer.path in what trains on it", source)
        else:
            _check_rows(load_tokenizer(tokenizer).vocab_size, model.vocab_size, str(source))
        origin = {**_kept_fields(source, folder, surgery), "vocab_size": ids, "padded_to": rows}
        weights = _new_weights(folder, model, DTYPES[config.dtype], surgery)
        if adapter:
            weights += adapter.weights(DTYPES[config.dtype])
            model = adapter.model
        carried = {ORIGIN: origin, **adapter_facts(model)}
        write_weights(RunDirectory(aside).checkpoints, weights, carried=carried)
        _write_configs(aside, run, model, path)
        RunDirectory(aside).record(name=run.name, created=time.time(), **{ORIGIN: origin})
    count = sum(math.prod(weight.shape) for weight in weights)
    logger.info(
        "%s is %s, %d parameters in %d tensors; train on it with: llmtrain train --config-dir %s "
        "experiment=imported data.sources.NAME=DIR training.num_tokens=N",
        run, folder.family.model_type, count, len(weights), run / "conf",
    )  # fmt: skip
    return 0


def _check_rows(needed: int, rows: int, where: str) -> None:
    """Refuse a tokenizer with ids beyond the vocabulary."""
    if needed > rows:
        raise ConfigError(
            f"the tokenizer of {where} has {needed} ids, the vocabulary has {rows} rows; give the "
            "tokenizer that belongs to the model"
        )


def _surgery(config: ImportConfig, folder: HuggingFaceFolder) -> NewVocabulary | None:
    """Match the new tokenizer with that of the folder, where one is asked for."""
    if config.tokenizer is None:
        return None
    own, new = tokenizer_in(Path(config.from_)), Path(config.tokenizer)
    if not any((new / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        raise ConfigError(
            f"tokenizer={new} holds no {MODEL_FILE} and no {JSON_FILE}; give a folder with one of "
            "them"
        )
    if own is None:
        raise ConfigError(
            f"{config.from_} has no tokenizer, so nothing tells which token a row of its embedding "
            f"stands for; put its tokenizer there before tokenizer={config.tokenizer}"
        )
    _check_rows(load_tokenizer(own).vocab_size, folder.model.vocab_size, config.from_)
    surgery = new_vocabulary(own, tokenizer_in(new) or new)
    logger.info(
        "%s: %d of its %d tokens keep their rows, the others are means of their pieces",
        new, surgery.num_kept, len(surgery.sources),
    )  # fmt: skip
    return surgery


def _kept_fields(
    source: Path, folder: HuggingFaceFolder, surgery: NewVocabulary | None
) -> dict[str, Any]:
    """What exports give back of the two configs; not the ids of a tokenizer that is replaced."""
    path, fields = source / GENERATION, dict(folder.fields)
    generation = read_json(path) if path.is_file() else None
    if surgery is not None:
        eos = {"eos_token_id": surgery.eos_id}
        fields = {k: v for k, v in fields.items() if k not in SPECIAL_IDS} | eos
        if generation is not None:
            generation = {k: v for k, v in generation.items() if not _IDS.search(k)} | eos
    return {"config": fields, "generation_config": generation}


def _new_weights(
    folder: HuggingFaceFolder,
    model: ModelConfig,
    dtype: torch.dtype | None,
    surgery: NewVocabulary | None,
) -> list[NewWeight]:
    """List the parameters of ``model``, made of the folder's tensors as they are written."""
    weights = []
    for name, place in layout_of(model, folder.family, folder.model.vocab_size).items():
        kept = dtype or folder.tensors.tensors[place.name].dtype
        rows = partial(folder.rows, place, dtype=kept)
        if surgery is not None and name in (EMBEDDING, HEAD):
            rows = partial(surgery.rows, folder.tensors, place, kept)
        weights.append(NewWeight(
            name=name, shape=place.shape, dtype=kept, whole=place.order is not None, rows=rows,
        ))  # fmt: skip
    return weights


def _write_configs(aside: Path, run: Path, model: ModelConfig, tokenizer: str | None) -> None:
    """Write ``config.yaml`` and the experiment that goes on from the run."""
    length = min(_USUAL_LENGTH, model.max_position_embeddings)
    config = RunConfig(
        name=run.name, runs_dir=str(run.parent), model=model,
        tokenizer=TokenizerConfig(path=tokenizer),
        training=TrainingConfig(
            num_tokens=length, sequence_length=length, global_batch_tokens=length
        ),
    )  # fmt: skip
    write_yaml(config, RunDirectory(aside).config_yaml)
    experiment = aside / "conf" / "experiment" / "imported.yaml"
    experiment.parent.mkdir(parents=True)
    tree = {
        "model": to_plain(model), "tokenizer": {"path": tokenizer},
        "checkpoint": {"start_from": str(run)},
    }  # fmt: skip
    head = (
        "# @package _global_\n"
        f"# Starts with the weights of {run}: llmtrain train --config-dir {run / 'conf'}\n"
        "# experiment=imported data.sources.NAME=DIR training.num_tokens=N\n"
    )
    experiment.write_text(head + to_yaml(tree), encoding="utf-8")


def export_main(config: ExportConfig) -> int:
    """Write a checkpoint as a Hugging Face folder, or its adapter as a PEFT folder."""
    found = find_run(config.run, config.step)
    model, path = found.config.model, found.checkpoint.path
    stored = StoredWeights(path)
    check_weights(path, stored.shapes, model)
    origin: Mapping[str, Any] = found.checkpoint.meta.get("carried", {}).get(ORIGIN, {})
    fields: Mapping[str, Any] = origin.get("config", {})
    family = choose_family(model, fields.get("model_type"))
    rows = _rows_to_keep(config, model, origin)
    to = Path(config.to)
    if config.adapter:
        with made_whole(to) as folder:
            write_adapter(
                stored, model, family, folder, dtype=DTYPES[config.dtype], base=config.base
            )
        logger.info("%s is the adapter of step %d of %s", to, found.checkpoint.step, config.run)
        return 0
    with made_whole(to) as folder:
        ids = _take_tokenizer(found, config, folder, rows)
        kept = {**ids, **{name: fields[name] for name in KEPT if name in fields}}
        write_model(
            stored, model, family, folder, dtype=DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes, vocab_size=rows, kept=kept,
        )  # fmt: skip
        generation = origin.get("generation_config") or {"_from_model_config": True, **ids}
        write_json(folder / GENERATION, generation)
    logger.info(
        "%s is step %d of %s as %s, vocabulary of %d rows",
        to, found.checkpoint.step, config.run, family.architecture, rows,
    )  # fmt: skip
    return 0


def _rows_to_keep(config: ExportConfig, model: ModelConfig, origin: Mapping[str, Any]) -> int:
    """How many rows of the vocabulary are no padding."""
    if config.vocab_size is not None:
        if config.vocab_size > model.vocab_size:
            raise ConfigError(
                f"vocab_size={config.vocab_size} is more than the {model.vocab_size} rows of "
                f"{config.run}; leave it out"
            )
        return config.vocab_size
    padded = origin.get("padded_to") == model.vocab_size
    return int(origin["vocab_size"]) if padded else model.vocab_size


def _take_tokenizer(
    found: StoredRun, config: ExportConfig, folder: Path, rows: int
) -> dict[str, int]:
    """Write the run's tokenizer; returns its special ids."""
    path = found.config.tokenizer.path
    if path is None:
        if config.chat_template is not None:
            raise ConfigError(
                f"chat_template={config.chat_template} has no tokenizer to go with: "
                f"{found.directory.config_yaml} has tokenizer.path=null; set it there"
            )
        logger.warning("%s names no tokenizer, so none is exported", config.run)
        return {}
    if not Path(path).exists():
        raise CheckpointError(
            f"{found.directory.config_yaml} has tokenizer.path={path}, which is not there; put the "
            "tokenizer back or correct the path"
        )
    _check_rows(load_tokenizer(path).vocab_size, rows, path)
    return take_out(path, folder, config.chat_template)
