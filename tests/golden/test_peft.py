"""PEFT's LoRA and ours: the same loss, gradients and logits, and folders both can read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from torch import Tensor

from llmtrain.checkpoint.archive import locate
from llmtrain.checkpoint.start import check_scale, start_from
from llmtrain.checkpoint.stored_run import find_run
from llmtrain.cli import main
from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.batch import StepBatch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.eval.trained import load_run
from llmtrain.interop.adapters import write_adapter
from llmtrain.interop.families import choose_family
from llmtrain.interop.huggingface import InMemory, open_folder
from llmtrain.model.adapter import LORA_B, base_name
from llmtrain.model.init import initialize_
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.distributed.layouts import MODEL, MODELS
from tests.golden.test_huggingface import loaded, theirs
from tests.golden.test_transformers import SIZES, relative

pytestmark = pytest.mark.filterwarnings(  # PEFT asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TOLERANCE = 1e-5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ALL[:4]
CASES = {
    "llama3": {"target_modules": ALL, "r": 4, "lora_alpha": 12},
    "qwen2_tied": {
        "target_modules": ["q_proj", "v_proj"],
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
    },
    "glm4": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 4},
}
"""By the name of a model in test_huggingface.py: settings of PEFT."""


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place with transformers' model in ``theirs`` and PEFT's adapter of it in ``lora``."""
    theirs(request.param).save_pretrained(tmp_path / "theirs")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **CASES[request.param])
    model = peft.get_peft_model(loaded(tmp_path / "theirs"), config)
    spread(model)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


def spread(model: Any) -> None:
    """Give A and B values that matter: B starts at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.1)


def with_adapter(base: Path, adapter: Path, trainable: bool = False) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base), adapter, is_trainable=trainable)


def tokens(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator())


def test_folders_both_ways(folder: Path) -> None:
    words = [f"from={folder}/theirs", f"adapter={folder}/lora", f"run={folder}/run"]
    assert main(["import", *words, "vocab_multiple=64"]) == 0
    ours = load_run(str(folder / "run")).model
    adapted = with_adapter(folder / "theirs", folder / "lora").eval()
    batch = tokens(adapted)
    expected = adapted(input_ids=batch).logits
    positions = torch.arange(batch.shape[1]).expand_as(batch)
    found = ours.logits(ours(batch, positions))[..., : expected.shape[-1]]
    assert relative(found, expected) <= TOLERANCE
    assert relative(expected, loaded(folder / "theirs")(input_ids=batch).logits) > 0.01

    words = [f"run={folder}/run", "dtype=fp32"]
    assert (
        main(["export", *words, f"to={folder}/out", "adapter=true", f"base={folder}/theirs"]) == 0
    )
    again = with_adapter(folder / "theirs", folder / "out").eval()
    assert relative(again(input_ids=batch).logits, expected) <= TOLERANCE
    before, after = (
        peft.get_peft_model_state_dict(m, save_embedding_layers=False) for m in (adapted, again)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert main(["export", *words, f"to={folder}/merged"]) == 0
    assert relative(loaded(folder / "merged")(input_ids=batch).logits, expected) <= TOLERANCE


REFUSED: Mapping[str, Mapping[str, Any]] = {
    "use_dora=true": {"use_dora": True},
    "bias=all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "layers_to_transform": {"layers_to_transform": [0], "layers_pattern": "layers"},
}


def test_matrices_that_are_one_elsewhere_cannot_be_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GLM's gate_up_proj; what it is told is to merge."""
    adapter = AdapterConfig(targets=("q_proj", "up_proj"))
    model = replace(MODELS["glm"], adapter=adapter)
    family = choose_family(model)
    with pytest.raises(ConfigError, match=r"glm4, which keeps it in .*gate_up_proj"):
        write_adapter(InMemory(Transformer(model)), model, family, tmp_path, dtype=None)
    theirs("glm4").save_pretrained(tmp_path / "theirs")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_up_proj"])
    peft.get_peft_model(loaded(tmp_path / "theirs"), config).save_pretrained(tmp_path / "lora")
    words = [f"from={tmp_path}/theirs", f"adapter={tmp_path}/lora", f"run={tmp_path}/run"]
    assert main(["import", *words]) == 2
    assert "is no adapter of this model" in capsys.readouterr().err


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_plain_lora_is_refused(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs("llama3").save_pretrained(tmp_path / "theirs")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **REFUSED[said])
    peft.get_peft_model(loaded(tmp_path / "theirs"), config).save_pretrained(tmp_path / "lora")
    words = [f"from={tmp_path}/theirs", f"adapter={tmp_path}/lora", f"run={tmp_path}/run"]
    assert main(["import", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


WRONG: Mapping[str, Mapping[str, Any]] = {
    "layers_to_transform=0": {"layers_to_transform": 0},
    "r=true": {"r": True},
    "lora_alpha=null": {"lora_alpha": None},
    "use_rslora=false, expected true or false": {"use_rslora": "false"},
}


def test_values_of_another_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs("llama3").save_pretrained(tmp_path / "theirs")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(loaded(tmp_path / "theirs"), config).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    good = json.loads(path.read_text())
    words = [f"from={tmp_path}/theirs", f"adapter={tmp_path}/lora", f"run={tmp_path}/run"]
    for said, fields in WRONG.items():
        path.write_text(json.dumps({**good, **fields}))
        assert main(["import", *words]) == 2
        assert said in capsys.readouterr().err
    off = {"layers_to_transform": [], "alpha_pattern": {}, "use_dora": False, "loftq_config": None}
    path.write_text(json.dumps({**good, **off}))
    assert main(["import", *words]) == 0


def first_step(
    run: Path, batch: Tensor, quantize_base: Literal["nf4"] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the native engine, started from a run folder; targets follow tokens."""
    model = find_run(str(run)).config.model
    assert model.adapter is not None
    model = replace(model, adapter=replace(model.adapter, quantize_base=quantize_base))
    row = batch[:, :-1]
    step = StepBatch(
        tokens=row, targets=batch[:, 1:], positions=torch.arange(row.shape[1]).expand_as(row),
        document_ids=torch.zeros_like(row), loss_weight=torch.ones(row.shape),
        source_ids=torch.zeros_like(row), num_microbatches=2,
    )  # fmt: skip
    alone = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, store=None)
    single, cpu = ParallelConfig(dp_shard=1), EngineConfig(device="cpu")
    with World(single, cpu, alone) as world:
        engine = make_engine(
            model, single, cpu, world, seed=0, loss=pretraining_loss(1, 64),
            optimizer_factory=optimizer_factory(OptimizerConfig()), grad_clip_norm=1e9,
        )  # fmt: skip
        start_from(str(run), engine, model)
        result = engine.train_step(step, 1e-3, no_limits(world.device))
        loss = (result.loss_sum / result.target_tokens).item()
        return loss, engine.gradients()


def their_first_step(model: Any, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of PEFT's model."""
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.item(), {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_an_adapter_goes_on_with_its_own_scale(tmp_path: Path) -> None:
    theirs("llama3").save_pretrained(tmp_path / "theirs")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, lora_alpha=16)
    peft.get_peft_model(loaded(tmp_path / "theirs"), config).save_pretrained(tmp_path / "lora")
    words = [f"from={tmp_path}/theirs", f"adapter={tmp_path}/lora", f"run={tmp_path}/run"]
    assert main(["import", *words]) == 0
    model = find_run(str(tmp_path / "run")).config.model
    assert model.adapter is not None
    found = locate(tmp_path / "run")
    for fields in ({"alpha": 32.0}, {"use_rslora": True}):
        other = replace(model, adapter=replace(model.adapter, **fields))
        with pytest.raises(CheckpointError, match=r"alpha=16 and use_rslora=false \(scale 4\)"):
            check_scale(found.path, found.meta["carried"], other)
    same = replace(model.adapter, alpha=8.0, use_rslora=True)
    check_scale(found.path, found.meta["carried"], replace(model, adapter=same))


def test_first_loss_and_gradients(folder: Path) -> None:
    words = [f"from={folder}/theirs", f"adapter={folder}/lora", f"run={folder}/run"]
    assert main(["import", *words]) == 0
    model = with_adapter(folder / "theirs", folder / "lora", trainable=True)
    batch = tokens(model)
    loss, expected = their_first_step(model, batch)
    ours, gradients = first_step(folder / "run", batch)
    assert ours == pytest.approx(loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys()
    there = open_folder(folder / "theirs").layout()
    for name, gradient in expected.items():
        order = there[base_name(name)].order if name.endswith(LORA_B) else None
        same = gradient if order is None else gradient[torch.tensor(order)]
        assert relative(gradients[name], same) <= TOLERANCE, name


def test_qlora_on_a_base_that_transformers_has_quantized(tmp_path: Path) -> None:
    """Widths are whole blocks: others bitsandbytes' CPU kernel expands wrongly (ops/nf4.py)."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(
        tmp_path / "theirs"
    )
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", quantization_config=packing, dtype=torch.float32, device_map="cpu"
    )
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, lora_alpha=8)
    model = peft.get_peft_model(base, settings).train()  # else some CPUs expand to bf16
    spread(model)
    model.save_pretrained(tmp_path / "lora")
    words = [f"from={tmp_path}/theirs", f"adapter={tmp_path}/lora", f"run={tmp_path}/run"]
    assert main(["import", *words]) == 0
    batch = tokens(model)
    loss, expected = their_first_step(model, batch)
    ours, gradients = first_step(tmp_path / "run", batch, "nf4")
    assert ours == pytest.approx(loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(gradients[name], gradient) <= TOLERANCE, name
    whole, _ = first_step(tmp_path / "run", batch)
    assert abs(whole / loss - 1) > 10 * TOLERANCE  # 4 bits are not all bits


def test_fresh_adapters_are_spread_alike() -> None:
    """Ours draws other numbers than PEFT, from the same distribution; both have B at zero."""
    drawn = (
        peft.tuners.lora.layer.Linear(torch.nn.Linear(4000, 8), "default", peft.LoraConfig(), r=50)
        .lora_A["default"]
        .weight
    )
    ours = torch.empty(50, 4000)
    model = MODEL
    whole = (slice(0, 50), slice(0, 4000))
    initialize_(ours, "model.layers.0.self_attn.q_proj.lora_A.weight", (50, 4000), whole, model, 0)
    quantiles = torch.linspace(0, 1, 9)
    for found in (drawn, ours):
        spread = torch.quantile(found.detach().flatten()[:100_000], quantiles) * 4000**0.5
        assert torch.allclose(spread, torch.linspace(-1, 1, 9), atol=0.02)
