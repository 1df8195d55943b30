"""Our reader and writer of safetensors beside the package; whatever is damaged has its sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmtrain.errors import CheckpointError
from llmtrain.interop.safetensors import DTYPES, INDEX, SINGLE, TensorFolder
from llmtrain.interop.shards import ShardWriter

TENSORS = {
    "half": torch.randn(7, 3).bfloat16(), "row": torch.arange(5.0),
    "double": torch.randn(2, 4, 3).double(),
    "empty": torch.zeros(0, 4), "small": torch.randn(3, 2).half(),
}  # fmt: skip


def test_rows_are_those_of_the_package(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    folder = TensorFolder(tmp_path)
    assert folder.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert folder.tensors[name].shape == tensor.shape
        for start in range(len(tensor)):
            for stop in range(start, len(tensor) + 1):
                assert folder.rows(name, start, stop).equal(tensor[start:stop])


@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_the_package_reads_what_was_written_in_pieces(tmp_path: Path, limit: int) -> None:
    layouts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with ShardWriter(tmp_path, layouts, limit) as shards:
        shards.put("small", [2, 0], TENSORS["small"][[2, 0]])
        for column in (2, 0, 1):
            part = TENSORS["half"][:, column : column + 1]
            shards.put("half", range(7), part.float(), column)
        shards.put("small", [1], TENSORS["small"][1:2])
        shards.put("row", range(3, 5), TENSORS["row"][3:])
        shards.put("row", range(3), TENSORS["row"][:3])
        shards.put("double", range(2), TENSORS["double"])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 5, 60: 4, 10_000: 1}[limit]
    assert (tmp_path / INDEX).exists() == (limit < 10_000)
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == TENSORS.keys()
    assert all(found[name].equal(tensor) for name, tensor in TENSORS.items())
    assert TensorFolder(tmp_path).tensors.keys() == TENSORS.keys()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file(TENSORS, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in [*range(20), header - 1, header, header + 1, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as found:
            TensorFolder(tmp_path)
        assert "\n" not in str(found.value)


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    folder = TensorFolder(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ends inside double"):
        folder.rows("double", 0, 2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, names: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        TensorFolder(sharded)


def test_an_index_that_lies_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"names c in two\.safetensors"):
        TensorFolder(sharded)
    write_index(sharded, [])
    with pytest.raises(CheckpointError, match="has no weight_map"):
        TensorFolder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match="holds a twice"):
        TensorFolder(sharded)


def test_pickles_and_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="download the weights"):
        TensorFolder(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match="a pickle"):
        TensorFolder(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        TensorFolder(tmp_path / "none")


def test_quantized_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="holds a as I8"):
        TensorFolder(tmp_path)


def test_a_header_of_wrong_sizes_is_refused(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"a of shape \[3\] 8 bytes, expected 12"):
        TensorFolder(tmp_path)


def test_types_have_one_name() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
