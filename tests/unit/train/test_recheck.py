"""What the evidence of the ranks says of them."""

from collections.abc import Sequence

import torch

from llmtrain.train.recheck import Evidence, checksum, judge
from llmtrain.train.twice import Found

SOUND: dict[tuple[str, tuple[int, ...]], int] = {("model.a", (0,)): 5, ("model.b", (0,)): 7}


def part(
    held: dict[tuple[str, tuple[int, ...]], int] = SOUND,
    found: Sequence[Found] = (),
    host: str = "n0",
    joined: int | None = None,
) -> Evidence:
    return Evidence(host, held, found, joined)


def test_a_single_bit_changes_the_checksum() -> None:
    values = torch.linspace(-1, 1, 64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        plain = values.to(dtype)
        before = checksum(plain).item()
        bits = plain.view(torch.uint8)
        for bit in range(8):
            bits[bit] ^= 1 << bit
            assert checksum(plain).item() != before
            bits[bit] ^= 1 << bit
        assert checksum(plain).item() == before


def test_the_rank_that_differs_from_most_is_named() -> None:
    odd = {**SOUND, ("model.b", (0,)): 8}
    assert judge([part(), part(), part()]) == ""
    assert judge([part(), part(odd, host="n1"), part()]) == (
        "rank 1 on n1 differs from its replicas in the bits of model.b"
    )
    assert judge([part(), part(odd, host="n1")]) == (
        "rank 0 on n0 and rank 1 on n1 differ among themselves in the bits of model.b"
    )


def test_ranks_that_hold_other_rectangles_are_not_compared() -> None:
    assert judge([part({("model.a", (0,)): 1}), part({("model.a", (4,)): 2})]) == ""


def test_the_first_thing_computed_with_two_results_is_named() -> None:
    wrong = [(3, "layer 1's output"), (4, "layer 1's gradient of its input")]
    assert judge([part(found=wrong), part()]) == (
        "rank 0 on n0 computed layer 1's output twice with other bits"
    )


def test_of_ranks_that_compute_together_the_one_where_it_began_is_named() -> None:
    """Ranks 0 and 1 share every block; rank 0 was sent what rank 1 had computed."""
    victim, culprit = [(5, "layer 1's gradient of its input")], [(4, "layer 1's gradient of w")]
    assert judge([part(found=victim, joined=0), part(found=culprit, joined=0)]) == (
        "rank 1 on n0 computed layer 1's gradient of w twice with other bits"
    )
    assert judge([part(found=victim, joined=0), part(found=victim, host="n1", joined=0)]) == (
        "rank 0 on n0 or rank 1 on n1 computed layer 1's gradient of its input twice with other "
        "bits"
    )
