"""Which part of a whole parameter a rank holds, as arithmetic on slices.

Invariant: regions are in the coordinates of the whole logical parameter, whatever cut it: tensor
parallelism first, FSDP2 inside that part, or ZeRO's flat partitions.

    inner(outer=(slice(34, 67), slice(0, 20)), part=(slice(0, 17), slice(0, 20)))
    rectangles((5, 4), start=6, length=9)    # a run of the flattened parameter
"""

import math
from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Region = tuple[slice, ...]
"""One slice with start and stop for each dim of the whole parameter."""


def whole(shape: tuple[int, ...]) -> Region:
    """Give the region of the whole parameter."""
    return tuple(slice(0, size) for size in shape)


def sizes(region: Region) -> tuple[int, ...]:
    """Give the shape of a region."""
    return tuple(part.stop - part.start for part in region)


def inner(outer: Region, part: Region) -> Region:
    """Give in coordinates of the whole the ``part`` of what lies in ``outer``."""
    return tuple(
        slice(o.start + p.start, o.start + p.stop) for o, p in zip(outer, part, strict=True)
    )


def held(parameter: Tensor, outer: Region) -> Region:
    """Tell which region this rank holds of a parameter, FSDP2 having cut ``outer`` or nothing."""
    if not isinstance(parameter, DTensor):
        return outer
    return inner(outer, fsdp_slices(parameter))


def fsdp_slices(parameter: DTensor) -> Region:
    """Tell which slice of a DTensor this rank's part is; empty on ranks that got nothing."""
    coordinate = parameter.device_mesh.get_coordinate()
    slices = list(whole(tuple(parameter.shape)))
    for position, (placement, size) in enumerate(
        zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    ):
        if isinstance(placement, Shard) and coordinate is not None:
            length = parameter.shape[placement.dim]
            chunk = -(-length // size)
            start = min(length, coordinate[position] * chunk)
            slices[placement.dim] = slice(start, min(length, start + chunk))
    return tuple(slices)


def local_part(tensor: Tensor) -> Tensor:
    """Give the plain tensor this rank holds; shares storage."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def rectangles(shape: tuple[int, ...], start: int, length: int) -> Iterator[tuple[Region, slice]]:
    """Cut a run of the flattened parameter into rectangles.

    Yields:
        A region and the slice of the run that fills it, in order; at most 2 * dims - 1 of them.
    """
    done = 0
    while done < length:
        region, size = _largest(shape, start + done, length - done)
        yield region, slice(done, done + size)
        done += size


def _largest(shape: tuple[int, ...], start: int, length: int) -> tuple[Region, int]:
    """Give the largest rectangle that begins at flat index ``start``, and its size."""
    for dim in range(len(shape)):
        row = math.prod(shape[dim + 1 :])
        if start % row == 0 and length >= row:
            first = start // row % shape[dim]
            count = min(length // row, shape[dim] - first)
            lead = _index(shape[:dim], start // row // shape[dim])
            fixed = tuple(slice(i, i + 1) for i in lead)
            region = (*fixed, slice(first, first + count), *whole(shape[dim + 1 :]))
            return region, count * row
    return (), 1  # a parameter without dims


def _index(shape: tuple[int, ...], flat: int) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))
