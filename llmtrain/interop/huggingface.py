"""Models from Hugging Face folders and back, a piece of a tensor at a time.

    model = load_model("Qwen2.5-0.5B", torch.float32)
    logits = model(input_ids)                       # [B, S, V]
    save_model(model, "copy")

Invariant: weights are moved, never computed: what is written here and read here (or in
transformers) in the same type is the same bits, but for muP, whose factor on the hidden states is
folded into the final norm.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import row_ranges
from llmtrain.config.model import ModelConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interop.families import Family, choose_family, read_config, write_config
from llmtrain.interop.layout import EMBEDDING, Place, check_tensors, layout_of, shapes_there
from llmtrain.interop.merged import Merged, Source
from llmtrain.interop.safetensors import TensorFolder, read_json
from llmtrain.interop.shards import ShardWriter
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.mup import output_multiplier
from llmtrain.model.transformer import Transformer

CONFIG = "config.json"
GENERATION = "generation_config.json"
_NORM = "model.norm.weight"
LARGEST_FP16 = 65504.0
"""Beyond it fp16 has only infinity."""


class CausalModel(Transformer):
    """A Transformer that gives logits where it is called as transformers' models are."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        extent: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return logits [B, S, V] of ``input_ids`` [B, S], each row one text from its start.

        With ``positions`` it is the forward of ``Transformer``, which gives hidden states.
        """
        if positions is not None:
            return super().forward(x, positions, document_ids, cache, extent)
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.logits(super().forward(x, positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceFolder:
    """A folder whose config is understood and whose tensors are all there."""

    fields: Mapping[str, Any]
    """Its ``config.json``."""
    family: Family
    """Its model type."""
    model: ModelConfig
    """The model, as wide as the folder has it."""
    tensors: TensorFolder
    """Its tensors."""

    def layout(self) -> dict[str, Place]:
        """Return where our parameters stand."""
        return layout_of(self.model, self.family, self.model.vocab_size)

    def rows(self, place: Place, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Read rows of one of our parameters; padding is zeros."""
        end = min(stop, place.rows)
        if place.order is None:
            found = self.tensors.rows(place.name, place.start + start, place.start + end)
        else:
            first = place.start
            whole = self.tensors.rows(place.name, first, first + place.rows)
            found = whole[torch.tensor(place.order[start:end])]
        found = found.to(dtype)
        if end == stop:
            return found
        padding = found.new_zeros(stop - max(start, end), *place.shape[1:])
        return torch.cat((found, padding)) if end > start else padding


def open_folder(path: Path) -> HuggingFaceFolder:
    """Understand a folder and check that it is whole; no weight is read.

    Raises:
        ConfigError: fields of its config that our model cannot follow.
        CheckpointError: files or tensors are missing, cut, too many or of another shape.
    """
    fields = read_json(path / CONFIG)
    try:
        family, model = read_config(fields)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path / CONFIG} holds values of another kind than a model's ({error!r}); download it "
            "again"
        ) from None
    folder = HuggingFaceFolder(
        fields=fields, family=family, model=model, tensors=TensorFolder(path)
    )
    check_tensors(folder.tensors, folder.layout(), tied=model.tie_word_embeddings)
    return folder


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> CausalModel:
    """Load a Hugging Face folder as a model on the CPU, in ``dtype``.

    Raises:
        ConfigError: fields of its config that our model cannot follow.
        CheckpointError: files or tensors are missing, cut, too many or of another shape.
    """
    folder = open_folder(Path(path))
    with torch.device("meta"):
        model = CausalModel(folder.model).to(dtype)
    model.to_empty(device="cpu")
    places = folder.layout()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = places[name]
            for start, stop in row_ranges(place.shape, dtype, place.order is not None):
                parameter[start:stop] = folder.rows(place, start, stop, dtype)
    return model.eval()


class InMemory:
    """The parameters of a whole model as a source."""

    def __init__(self, model: Transformer) -> None:
        """Take the parameters of ``model``."""
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.dtypes = {name: p.dtype for name, p in self._parameters.items()}

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the whole parameter."""
        parameter = self._parameters[name]
        yield (0,) * parameter.dim(), parameter.cpu()


def save_model(
    model: Transformer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a whole model as a new Hugging Face folder, in ``dtype`` or as it is.

    Raises:
        ConfigError: the folder holds something, or no model type can spell the model.
    """
    family = choose_family(model.config)
    with made_whole(Path(path)) as folder:
        write_model(
            InMemory(model), model.config, family, folder, dtype=dtype,
            max_shard_bytes=max_shard_bytes, vocab_size=model.config.vocab_size,
        )  # fmt: skip


def write_model(
    source: Source,
    model: ModelConfig,
    family: Family,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    vocab_size: int,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and the weights into ``folder``, the first ``vocab_size`` rows.

    An adapter is merged into its matrices. ``kept`` are further fields of the config. Raises
    CheckpointError where the source has holes.
    """
    if model.adapter is not None:
        source, model = Merged(source, model.adapter), replace(model, adapter=None)
    places = layout_of(model, family, vocab_size)
    own = {place.name: source.dtypes[name] for name, place in places.items()}
    layouts = {name: (dtype or own[name], shape) for name, shape in shapes_there(places).items()}
    with ShardWriter(folder, layouts, max_shard_bytes) as shards:
        for name, place in places.items():
            factor = output_multiplier(model) if name == _NORM else 1.0
            count = 0
            for offsets, piece in source.pieces(name):
                _put(shards, place, offsets, piece if factor == 1.0 else piece * factor, dtype)
                count += piece.numel()
            if count != math.prod(place.shape):
                raise CheckpointError(
                    f"the checkpoint holds {count:,} of the {math.prod(place.shape):,} numbers of "
                    f"{name}; use another checkpoint"
                )
    saved = str(dtype or own[EMBEDDING]).removeprefix("torch.")
    fields = {**write_config(model, family), "torch_dtype": saved, **(kept or {})}
    write_json(folder / CONFIG, {**fields, "vocab_size": vocab_size})


def _put(
    shards: ShardWriter,
    place: Place,
    offsets: tuple[int, ...],
    piece: Tensor,
    dtype: torch.dtype | None,
) -> None:
    """Write what of a rectangle is no padding."""
    start, column = offsets[0], offsets[1] if len(offsets) > 1 else 0
    stop = min(start + piece.shape[0], place.rows)
    if stop <= start:
        return
    if dtype == torch.float16 and float(piece.abs().amax()) > LARGEST_FP16:
        raise ConfigError(
            f"dtype=fp16 ends at {LARGEST_FP16:.0f}, {place.name} holds "
            f"{float(piece.abs().amax()):.6g}; use dtype=bf16"
        )
    shards.put(place.name, place.rows_there(start, stop), piece[: stop - start], column)


@contextmanager
def made_whole(to: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the name ``to`` once it is filled, and not otherwise.

    Raises:
        ConfigError: there is something at ``to``.
        CheckpointError: the disk is full or may not be written.
    """
    to = Path(os.path.abspath(to))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already; name a new folder, or remove it first")
    aside = to.with_name(f".tmp-{to.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if to.exists():
            to.rmdir()
        aside.rename(to)
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face's are laid out."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
