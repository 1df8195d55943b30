import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.parallel.region import inner, rectangles, sizes, whole


@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rectangles_fill_exactly_the_run(shape: tuple[int, ...], cut: tuple[float, float]) -> None:
    total = torch.Size(shape).numel()
    start, stop = sorted(round(part * total) for part in cut)
    run = torch.arange(start, stop)
    whole_tensor = torch.full(shape, -1)
    found = list(rectangles(shape, start, stop - start))
    for region, part in found:
        assert (whole_tensor[region] == -1).all(), "no element twice"
        whole_tensor[region] = run[part].view(sizes(region))
    expected = torch.full((total,), -1)
    expected[start:stop] = run
    assert torch.equal(whole_tensor.flatten(), expected)
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_part_of_a_part_lies_in_the_whole() -> None:
    outer = (slice(34, 67), slice(0, 20))
    assert inner(outer, (slice(17, 33), slice(0, 20))) == (slice(51, 67), slice(0, 20))
    assert inner(whole((4,)), (slice(1, 2),)) == (slice(1, 2),)
