"""The first step on preferences: loss, rewards and gradients of TRL's DPOTrainer."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from llmtrain.build import engine_of
from llmtrain.checkpoint.start import start_from
from llmtrain.checkpoint.stored_run import find_run
from llmtrain.cli import main
from llmtrain.config.data import DataConfig
from llmtrain.config.engine import EngineConfig
from llmtrain.config.objective import DpoConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import OptimizerConfig, TrainingConfig
from llmtrain.data.loader import Batches
from llmtrain.data.pack_blocks import read_packing
from llmtrain.data.plan import plan_of
from llmtrain.data.roles import ANSWER, texts
from llmtrain.data.store import TokenStore
from llmtrain.engine.step import no_limits
from llmtrain.interop.huggingface import open_folder
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.reference import Preferences
from tests.golden.test_huggingface import loaded, shake, theirs
from tests.golden.test_transformers import TOLERANCE, relative
from tests.preferences import EOS_ID, make_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning"),
]
NUM_PAIRS = 6
EOS = "</s>"
BETA = 0.3


def trainer(folder: Path, store: TokenStore, vocab_size: int) -> Any:
    """TRL's trainer over the pairs of ``store``, as text of a word for each token."""
    import trl

    words = {f"t{token}": token for token in range(vocab_size) if token != EOS_ID} | {EOS: EOS_ID}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    pairs = []
    for number in range(store.num_documents):
        start, end = store.document_span(number)
        tokens, roles = store.tokens(start, end), store.roles(start, end)
        chosen, rejected = (tokens[text] for text in texts(roles))
        asked = int((roles & ANSWER).argmax())
        pairs.append({
            "prompt": say(tokens[:asked]) + " ",
            "chosen": say(chosen[asked:-1]) + " ",
            "rejected": say(rejected[asked:-1]) + " ",
        })  # fmt: skip
    return trl.DPOTrainer(
        model=loaded(folder / "policy"),
        ref_model=loaded(folder / "reference"),
        args=trl.DPOConfig(
            str(folder / "trl"), beta=BETA, per_device_train_batch_size=NUM_PAIRS, use_cpu=True,
            report_to="none", bf16=False, activation_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS
        ),
    )  # fmt: skip


def say(tokens: Any) -> str:
    return " ".join(f"t{token}" for token in tokens)


def first_step(
    folder: Path, store: TokenStore
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Our loss, rewards and gradients; the reference is asked of another model than is trained."""
    config = RunConfig(
        model=find_run(str(folder / "run_policy")).config.model,
        parallel=ParallelConfig(dp_shard=1),
        engine=EngineConfig(device="cpu"),
        training=TrainingConfig(
            num_tokens=10**6, sequence_length=32, micro_batch_size=1,
            global_batch_tokens=32 * read_packing(store, "pairs", 32).num_windows,
            objective="dpo", dpo=DpoConfig(beta=BETA),
        ),
        optimizer=OptimizerConfig(grad_clip_norm=1e9),
        data=DataConfig(sources={"pairs": str(store.path)}, packing="best_fit"),
    )  # fmt: skip
    alone = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, store=None)
    with World(config.parallel, config.engine, alone) as world:
        plan = plan_of(config, {"pairs": store})
        preferences = Preferences(config, plan, world, folder / "kept", lambda *_: None)
        engine = engine_of(config, world, 1, preferences.observe)
        start_from(str(folder / "run_reference"), engine, config.model)
        preferences.open(engine, None, 0)
        start_from(str(folder / "run_policy"), engine, config.model)
        batches = Batches(plan, micro_batch_size=1, prefetch=0, pairs=preferences.sources)
        result = engine.train_step(batches.at(0), 1e-3, no_limits(world.device))
        assert result.target_tokens.item() == NUM_PAIRS
        rewards = {
            name: result.metrics[f"pair_{name}_reward_sum"].item() / NUM_PAIRS
            for name in ("chosen", "rejected")
        }
        return (result.loss_sum / result.target_tokens).item(), rewards, engine.gradients()


def test_first_loss_rewards_and_gradients(tmp_path: Path) -> None:
    model = theirs("llama1")
    for name in ("policy", "reference"):
        shake(model)
        model.save_pretrained(tmp_path / name)
        words = [f"from={tmp_path / name}", f"run={tmp_path}/run_{name}"]
        assert main(["import", *words]) == 0
    vocab_size = model.config.vocab_size
    store = make_pairs(tmp_path / "pairs", 5, num_pairs=NUM_PAIRS, vocab_size=vocab_size)
    other = trainer(tmp_path, store, vocab_size)
    inputs = other._prepare_inputs(next(iter(other.get_train_dataloader())))
    loss = other.compute_loss(other.model.train(), inputs)
    loss.backward()
    measured = {name: values[-1] for name, values in other._metrics["train"].items()}

    ours, rewards, gradients = first_step(tmp_path, store)

    assert ours == pytest.approx(loss.item(), rel=TOLERANCE)
    assert abs(ours - 0.6931) > 0.01  # the reference is another model
    for name, value in rewards.items():
        assert value == pytest.approx(measured[f"rewards/{name}"], rel=1e-5), name
    layout = open_folder(tmp_path / "policy").layout()
    expected = dict(other.model.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        theirs_, order = expected[name].grad, layout[name].order
        theirs_ = theirs_ if order is None else theirs_[torch.tensor(order)]
        assert relative(gradient, theirs_) <= TOLERANCE, name
