"""Measure the layouts of the parity suite and write the worst figures into a page.

python -m tests.distributed.parity_table docs/parallelism.md                  # every layout
python -m tests.distributed.parity_table docs/parallelism.md "fsdp2 tp2"      # these rows alone
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.figures import Figures, Suite
from tests.distributed.layouts import LAYOUTS, Layout
from tests.world import (
    DEEPSPEED,
    DEEPSPEED_ENVIRONMENT,
    RankError,
    RankPool,
    RankTimeoutError,
)

START = "<!-- made by python -m tests.distributed.parity_table docs/parallelism.md -->\n"
END = "<!-- end of the parity table -->\n"
HEAD = (
    "| layout | ranks | loss | worst gradient | in fp64 | 20 losses | worst parameter |\n"
    "|---|---|---|---|---|---|---|\n"
)


def row(layout: Layout, figures: Figures) -> list[str]:
    """One row of the table."""
    numbers = [f"{x:.1e}" for x in (figures.loss, figures.gradient, figures.fp64, figures.curve)]
    if figures.fp64 == 0:
        numbers[2] = ""
    return [layout.name, str(layout.size), *numbers, f"`{figures.parameter}`"]


def page(text: str, rows: Sequence[Sequence[str]]) -> str:
    """``text`` with the table between the two marks made of ``rows``."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"{before}{START}{HEAD}{lines}{END}{after}"


def rows_of(text: str) -> list[list[str]]:
    """The rows that a page has."""
    between = text.partition(START)[2].partition(END)[0].removeprefix(HEAD)
    return [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in between.splitlines()
    ]


def main(path: Path, names: Sequence[str]) -> int:
    """Measure, name what is out of tolerance, and write the page where nothing is."""
    kept = {cells[0]: cells for cells in rows_of(path.read_text())}
    rows, failed = dict[str, list[str]](), list[str]()
    with RankPool() as native, RankPool(DEEPSPEED, DEEPSPEED_ENVIRONMENT) as deepspeed:
        suite = Suite({"native": native, "deepspeed": deepspeed})
        for layout in LAYOUTS.values():
            if names and layout.name not in names:
                rows[layout.name] = kept[layout.name]
                continue
            started = time.perf_counter()
            try:
                figures = suite.measure(layout)
            except (RankError, RankTimeoutError) as error:
                failed.append(f"{layout.name}: {error}")
            else:
                rows[layout.name] = row(layout, figures)
                failed += [f"{layout.name}: {', '.join(x)}" for x in [figures.beyond()] if x]
            print(f"{layout.name}: {time.perf_counter() - started:.1f} s", flush=True)
    if failed:
        print(*failed, sep="\n")
        return 1
    path.write_text(page(path.read_text(), list(rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
