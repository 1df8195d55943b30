"""The Trainer of transformers, as a side of the training benchmark.

Its fastest settings on a CPU: sdpa attention, fused AdamW, autocast for bf16. Packed documents are
told by ``position_ids``, from which it makes the masks.

    /data/peer-train/bin/python benchmarks/peers/train_transformers.py < requests.jsonl
"""

import tempfile
from typing import Any

import torch
from train_side import Case, Meter, begin, fill, rows_of, start_weights
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of all steps, as the Trainer takes them; a batch is made at its first row."""

    def __init__(self, case: Case) -> None:
        self._case, self._step, self._rows = case, -1, rows_of(case, 0)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, row = divmod(index, self._case.rows)
        if step != self._step:
            self._step, self._rows = step, rows_of(self._case, step)
        tokens, targets = self._rows.tokens[row], self._rows.targets[row]
        item = {"input_ids": tokens, "labels": targets, "shift_labels": targets}
        if self._case.document_tokens is not None:
            item["position_ids"] = self._rows.positions[row]
        return item


class Told(Trainer):
    """Tells the loss of each step."""

    last_loss = torch.tensor(0.0)

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.last_loss = super().training_step(*arguments, **named)
        return self.last_loss


class Watch(TrainerCallback):
    """Hands every step to the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.trainer = meter, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.done(self.trainer.last_loss.item())


def model_of(case: Case) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=case.vocab_size, hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size, num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads, num_key_value_heads=case.num_heads,
        max_position_embeddings=case.sequence_length, rms_norm_eps=case.eps,
        rope_parameters={"rope_type": "default", "rope_theta": case.rope_theta},
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fill(model, start_weights(case))
    return model


def main() -> None:
    case, meter = begin()
    watch = Watch(meter)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=case.rows, max_steps=10**6,
            learning_rate=case.lr, lr_scheduler_type="constant", optim="adamw_torch_fused",
            adam_beta2=0.95, weight_decay=0.1, max_grad_norm=case.clip, use_cpu=True,
            bf16=case.precision == "bf16", torch_compile=case.compile, logging_steps=10,
            report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = Told(
            model=model_of(case), args=settings, train_dataset=Data(case), callbacks=[watch]
        )
        watch.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main()
