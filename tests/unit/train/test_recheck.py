"""What the evidence of the ranks says of them."""

import torch

from llmtrain.train.recheck import Evidence, checksum, judge

SOUND = {("model.a", (0,)): 5, ("model.b", (0,)): 7}
CALLS = [(0, 1, 2), (1, 2, 3)]


def part(
    held: dict[tuple[str, tuple[int, ...]], int] = SOUND,
    again: list[tuple[int, int, int]] = CALLS,
    host: str = "n0",
) -> Evidence:
    return Evidence(host, held, (CALLS, again))


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


def test_the_block_with_two_outputs_for_one_input_is_named_and_not_those_behind_it() -> None:
    """Rank 1 was sent other numbers the second time, as a later stage is."""
    wrong = [(0, 1, 2), (1, 2, 9)]
    victim = [(0, 9, 4), (1, 4, 5)]
    assert judge([part(again=wrong), part(again=victim)]) == (
        "rank 0 on n0 computed layer 1 twice with other bits"
    )
