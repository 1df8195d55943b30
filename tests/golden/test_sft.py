"""The first step on chat data: loss and gradients of TRL's SFTTrainer on the same conversations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from torch import Tensor

from data_pipeline.cli import main as data_main
from llmtrain.checkpoint.start import start_from
from llmtrain.checkpoint.stored_run import find_run
from llmtrain.cli import main
from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.assemble import assemble_windows
from llmtrain.data.batch import StepBatch
from llmtrain.data.packing import PackedOrder
from llmtrain.data.store import TokenStore
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.chats import CHATS, TEMPLATE, chat_tokenizer, rows

TOLERANCE = 1e-5
WINDOW = 768
QWEN = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_training.jinja"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaMA as transformers saves it, and a tokenizer."""
    folder = chat_tokenizer(tmp_path_factory.mktemp("base") / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=406, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW,
        bos_token_id=400, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = [f"from={folder}", f"run={folder.parent / 'run'}"]
    assert main(["import", *words]) == 0
    return folder


def batch_of(store: Path) -> StepBatch:
    """Every window of a packed store, as one step of two micro-batches."""
    order = PackedOrder(TokenStore.open(store), "chat", seed=1, window_tokens=WINDOW)
    windows = np.arange(order.num_windows)
    units = order.num_windows + order.num_windows % 2
    return assemble_windows(
        [order], np.zeros_like(windows, dtype=np.int32), windows, unit_tokens=WINDOW,
        sequence_length=WINDOW, num_microbatches=2, num_units=units,
    )  # fmt: skip


def ours(run: Path, batch: StepBatch) -> tuple[float, int, Mapping[str, Tensor]]:
    """Loss, number of targets and gradients of the engine's first step."""
    config = find_run(str(run)).config
    alone = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, store=None)
    single, cpu = ParallelConfig(dp_shard=1), EngineConfig(device="cpu")
    with World(single, cpu, alone) as world:
        engine = make_engine(
            config.model, single, cpu, world, seed=0, loss=pretraining_loss(1, 512),
            optimizer_factory=optimizer_factory(OptimizerConfig()), grad_clip_norm=1e9,
        )  # fmt: skip
        start_from(str(run), engine, config.model)
        result = engine.train_step(batch, 1e-3, no_limits(world.device))
        count = int(result.target_tokens.item())
        return result.loss_sum.item() / count, count, engine.gradients()


def theirs(
    base: Path, data: list[dict[str, Any]], out: Path, template: str | None, **settings: Any
) -> tuple[float, int, Mapping[str, Tensor]]:
    """The same of TRL: its tokenization, its collator, its loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    args = trl.SFTConfig(
        output_dir=str(out), use_cpu=True, report_to=[], max_length=None, bf16=False,
        activation_checkpointing=False, **settings,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), args=args,
        train_dataset=datasets.Dataset.from_list(data, on_mixed_types="use_json"),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    named = trainer.model.named_parameters()
    return loss.item(), count, {name: p.grad for name, p in named if p.grad is not None}


def check(
    found: tuple[float, int, Mapping[str, Tensor]],
    expected: tuple[float, int, Mapping[str, Tensor]],
) -> None:
    assert found[1] == expected[1]
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        error = (found[2][name] - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE, (name, error)


@pytest.mark.parametrize("template", [TEMPLATE, QWEN], ids=["own", "qwen2_5"])
def test_conversations(template: Path, base: Path, tmp_path: Path) -> None:
    """All turns of the assistant, tool calls among them; packed here, padded there."""
    chats = [row for row in rows(CHATS) if "messages" in row][18:34]
    for row in chats:  # as templates ask
        row.setdefault("tools", None)
        for call in (c for m in row["messages"] for c in m.get("tool_calls") or ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    words = [f"tokenizer={base}", f"chat_template={template}", f"sequence_length={WINDOW}"]
    data = [f"input={tmp_path / 'chats.jsonl'}", f"out={tmp_path / 'store'}"]
    assert data_main(["chat", *words, *data]) == 0
    expected = theirs(base, chats, tmp_path, template.read_text(), assistant_only_loss=True)
    check(ours(base.parent / "run", batch_of(tmp_path / "store")), expected)


def test_completions(base: Path, tmp_path: Path) -> None:
    """Plain prompts whose completion alone is learned, with the EOS behind it."""
    data = [row for row in rows(CHATS) if "completion" in row]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, data)))
    words = [f"tokenizer={base}", f"sequence_length={WINDOW}", f"out={tmp_path / 'store'}"]
    assert data_main(["chat", *words, f"input={tmp_path / 'chats.jsonl'}"]) == 0
    check(
        ours(base.parent / "run", batch_of(tmp_path / "store")), theirs(base, data, tmp_path, None)
    )
