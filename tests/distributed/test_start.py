"""Layouts of both engines start from an import, and what they save goes out as what came in."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from llmtrain.cli import main
from llmtrain.config.load import write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.interop.huggingface import save_model
from llmtrain.interop.safetensors import TensorFolder
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout
from tests.distributed.starts import start_and_save
from tests.world import RankPool

CHOSEN = ["pp2 tp2", "bf16 fsdp2", "deepspeed zero0 pp2", "deepspeed zero3 dp2"]


def config_of(layout: Layout) -> RunConfig:
    """A layout with a model that a Hugging Face type can spell: Qwen3 with all its biases."""
    config = layout.config
    return replace(config, model=replace(config.model, attention_output_bias=True))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder ``hf`` of the layouts' model and its import ``run``."""
    folder = tmp_path_factory.mktemp("origin")
    model = Transformer(config_of(SINGLE).model)
    initialize_model(model, model.config, seed=11)
    save_model(model, folder / "hf")
    assert main(["import", f"from={folder}/hf", f"run={folder}/run"]) == 0
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found = TensorFolder(folder)
    return {name: found.rows(name, 0, t.shape[0]) for name, t in found.tensors.items()}


def run_folder(path: Path, layout: Layout) -> Path:
    """A run folder as ``llmtrain train`` leaves it, without checkpoints."""
    path.mkdir()
    write_yaml(config_of(layout), path / "config.yaml")
    return path


@pytest.mark.parametrize("name", CHOSEN)
def test_import_to_layout_to_export(
    ranks: RankPool, deepspeed_ranks: RankPool, origin: Path, tmp_path: Path, name: str
) -> None:
    layout = LAYOUTS[name]
    pool = {"native": ranks, "deepspeed": deepspeed_ranks}[layout.engine.kind]
    run = run_folder(tmp_path / "run", layout)
    words = (str(origin / "run"), str(run / "checkpoints"))
    config = config_of(layout)
    results = pool.run(start_and_save, config, *words, size=layout.size)
    loss, carried = results[0]
    assert all(abs(other - loss) <= 1e-6 * loss for other, _ in results)
    assert carried["huggingface"]["vocab_size"] == config.model.vocab_size

    assert main(["export", f"run={run}", f"to={tmp_path}/out", "dtype=fp32"]) == 0
    before, after = tensors(origin / "hf"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[key].equal(tensor) for key, tensor in before.items())
