"""A sweep of real training runs, two at a time, killed half-way, against runs nobody disturbed."""

from pathlib import Path

from tests.end_to_end import commands
from tests.end_to_end.sweeps import Sweep, states, values

RATES = ("1e-3", "1e-2")


def test_a_killed_sweep_ends_with_the_losses_of_undisturbed_runs(
    warm: Path, tmp_path: Path
) -> None:
    shared = [
        *commands.TINY, f"data.sources.a={commands.make_store(tmp_path / 'store', 1)}",
        f"runs_dir={tmp_path / 'runs'}", "checkpoint.every_steps=5", "training.num_tokens=7680",
    ]  # fmt: skip
    given = [*shared, "name=lr", "hydra.launcher.jobs=2", f"cluster.python={warm}",
             f"optimizer.lr={','.join(RATES)}"]  # fmt: skip
    folder = tmp_path / "runs" / "lr"
    first = Sweep(given, tmp_path / "first.log")
    first.until(lambda: any(commands.saved_steps(folder / f"trial-00{n}") for n in (0, 1)))
    first.kill()

    second = Sweep(given, tmp_path / "second.log")
    assert second.wait() == 0, second.output
    assert states(folder) == {"trial-000": "done", "trial-001": "done"}
    assert all(f"trial-00{n} goes on" in second.output for n in (0, 1))
    alone = undisturbed(shared, tmp_path)
    for number, rate in enumerate(RATES):
        assert commands.losses(folder / f"trial-00{number}") == alone[rate]
    tails = [list(losses.values())[-2:] for losses in alone.values()]
    assert [value for *_, value in values(folder)] == [sum(tail) / len(tail) for tail in tails]
    best = min(range(2), key=lambda n: sum(tails[n]))
    assert second.output.index(f"\ntrial-00{best} ") < second.output.index(f"\ntrial-00{1 - best} ")


def undisturbed(words: list[str], folder: Path) -> dict[str, dict[int, float]]:
    """Losses of a run of its own for each rate."""
    runs = {
        rate: commands.Command(
            ["train", *words, f"name=alone-{rate}", f"optimizer.lr={rate}"],
            folder / f"alone-{rate}.log",
        )
        for rate in RATES
    }
    for run in runs.values():
        assert run.wait() == 0, run.output
    return {rate: commands.losses(folder / "runs" / f"alone-{rate}") for rate in RATES}
