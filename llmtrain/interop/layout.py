"""Where every parameter of a model stands in a Hugging Face checkpoint.

Names and shapes are the same on both sides but for four things: a padded vocabulary has more rows
here, a family may keep gate and up as one matrix, may have the dims of a head in another order
(rotary.py), and tied embeddings have no matrix of their own for the head.

    places = layout_of(model, family, vocab_size=32000)
    places["model.layers.0.mlp.up_proj.weight"]    # rows F.. of model.layers.0.mlp.gate_up_proj
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrain.config.model import ModelConfig
from llmtrain.errors import CheckpointError
from llmtrain.interop.families import Family
from llmtrain.interop.rotary import head_order
from llmtrain.interop.safetensors import TensorFolder
from llmtrain.model.parameters import parameter_table

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GATE_OR_UP = re.compile(r"(.*\.mlp\.)(gate|up)_proj\.weight")
_QUERY_OR_KEY = re.compile(r".*\.self_attn\.[qk]_proj\.(weight|bias)")
_TABLES = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The rows of one of our parameters in a Hugging Face checkpoint."""

    name: str
    """Tensor they stand in."""
    shape: tuple[int, ...]
    """Shape of our parameter, padding included."""
    start: int = 0
    """Row there of our first row."""
    rows: int
    """How many of our rows stand there, the first ones; the others are padding."""
    order: Sequence[int] | None = None
    """Row there, from ``start`` on, of each of ours; None where it is the same."""

    def rows_there(self, start: int, stop: int) -> Sequence[int]:
        """Rows there of our rows ``start`` to ``stop``, which are no padding."""
        if self.order is None:
            return range(self.start + start, self.start + stop)
        return [self.start + row for row in self.order[start:stop]]


def layout_of(model: ModelConfig, family: Family, vocab_size: int) -> dict[str, Place]:
    """Return the place of every stored parameter; ``vocab_size`` is the one without padding."""
    order = head_order(model.head_size, model.rotary_size) if family.partial_rotary else None
    places: dict[str, Place] = {}
    for info in parameter_table(model):
        if info.tied_to is not None:
            continue
        rows = vocab_size if info.name in (EMBEDDING, HEAD) else info.shape[0]
        place = Place(name=info.name, shape=info.shape, rows=rows)
        if family.fused and (found := _GATE_OR_UP.fullmatch(info.name)):
            name = f"{found[1]}gate_up_proj.weight"
            start = 0 if found[2] == "gate" else rows
            place = Place(name=name, shape=info.shape, rows=rows, start=start)
        elif order is not None and _QUERY_OR_KEY.fullmatch(info.name):
            heads = range(0, rows, model.head_size)
            whole = [head + dim for head in heads for dim in order]
            place = Place(name=info.name, shape=info.shape, rows=rows, order=whole)
        places[info.name] = place
    return places


def shapes_there(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a Hugging Face checkpoint and their shapes, in the model's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places.values():
        rows = max(place.start + place.rows, shapes.get(place.name, (0,))[0])
        shapes[place.name] = (rows, *place.shape[1:])
    return shapes


def check_tensors(folder: TensorFolder, places: Mapping[str, Place], *, tied: bool) -> None:
    """Compare what a folder holds with what the model needs.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or one too many.
    """
    expected = shapes_there(places)
    missing = [name for name in expected if name not in folder.tensors]
    if missing:
        raise CheckpointError(
            f"{folder.folder} lacks {len(missing)} of the {len(expected)} tensors that its "
            f"config.json asks for, the first is {missing[0]}; download it again"
        )
    for name, shape in expected.items():
        found = folder.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{folder.folder} holds {name} of shape {list(found)}, its config.json makes "
                f"{list(shape)}; use the config.json that belongs to these weights"
            )
    extra = [n for n in folder.tensors if n not in expected and not _TABLES.fullmatch(n)]
    if tied and HEAD in extra:
        _check_tied(folder)
        extra.remove(HEAD)
    if extra:
        raise CheckpointError(
            f"{folder.folder} holds {len(extra)} tensors that the model of its config.json has no "
            f"place for, the first is {extra[0]}; use the config.json that belongs to these weights"
        )


def _check_tied(folder: TensorFolder) -> None:
    """Refuse a head that is stored beside tied embeddings and is another matrix."""
    head, embedding = folder.tensors[HEAD], folder.tensors[EMBEDDING]
    rows = 1024
    same = head.shape == embedding.shape and all(
        folder.rows(HEAD, i, min(i + rows, head.shape[0])).equal(
            folder.rows(EMBEDDING, i, min(i + rows, head.shape[0]))
        )
        for i in range(0, head.shape[0], rows)
    )
    if not same:
        raise CheckpointError(
            f"{folder.folder} has tie_word_embeddings=true and a {HEAD} that is not its "
            f"{EMBEDDING}; set tie_word_embeddings=false in config.json"
        )
