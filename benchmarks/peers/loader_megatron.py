"""Megatron-Core's GPTDataset and BlendedDataset as a side of the loader benchmark.

Built by its own builder with its compiled helpers, from a cold index cache; read through torch's
DataLoader in this process. Position ids and masks do not restart at documents, which lets the
dataset cache them: its fastest setting.

    python benchmarks/peers/loader_megatron.py < requests.jsonl
"""

import logging
import shutil
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
from loader_side import answer_as, prefixes
from megatron.core.datasets import helpers_cpp  # noqa: F401  compiled, else the builder would
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader


def batches(
    sources: Mapping[str, Mapping[str, Any]], sequence_length: int, batch_size: int,
    num_batches: int, scratch: str,
) -> Iterator[dict[str, torch.Tensor]]:  # fmt: skip
    """Inputs, labels, loss masks and position ids."""
    shutil.rmtree(f"{scratch}/megatron", ignore_errors=True)
    tokenizer = types.SimpleNamespace(
        vocab_size=32_000, eod=2, pad=-1, unique_identifiers={"class": "none"}
    )
    blend = prefixes(sources)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=sequence_length, split="1,0,0",
        blend=([path for path, _ in blend], [share for _, share in blend]),
        path_to_cache=f"{scratch}/megatron", tokenizer=tokenizer, mmap_bin_files=True,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [num_batches * batch_size, 0, 0], lambda: True, config
    )
    dataset = builder.build()[0]
    return iter(DataLoader(dataset, batch_size=batch_size, drop_last=True))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # BlendedDataset asks which rank saves its index
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    answer_as(batches, lambda batch: list(batch["tokens"].shape))
