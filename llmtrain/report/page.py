"""One self-contained HTML page of a run, of several runs beside each other, or of a sweep.

The page loads nothing: styles, the script that draws and the numbers are inside, so it can be
mailed or archived. It reads what the runs wrote and changes none of it; no torch is imported.

    llmtrain report run=runs/demo
    llmtrain report 'run=[runs/a,runs/b]'
    llmtrain report run=runs/my-sweep
"""

import gc
import logging
from pathlib import Path

from llmtrain.config.commands import ReportConfig
from llmtrain.errors import ConfigError
from llmtrain.report import compare_page, run_page, sweep_page
from llmtrain.report.compare_record import read_several
from llmtrain.report.record import read_run
from llmtrain.report.sweep_record import is_sweep, read_sweep

logger = logging.getLogger(__name__)


def main(config: ReportConfig) -> int:
    """Write the page and say where.

    Raises:
        ConfigError: there is nothing to describe, or the page cannot be written there.
    """
    paths = [Path(run) for run in ([config.run] if isinstance(config.run, str) else config.run)]
    # Rows are many and hold no cycles: looking for some takes a third of the time.
    gc.disable()
    try:
        text, default = _page(paths, None if config.data is None else Path(config.data))
    finally:
        gc.enable()
    out = Path(config.out) if config.out is not None else default
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder; name a file in it, as {out / 'report.html'}")
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}; use another") from error
    logger.info("report: %s", out)
    return 0


def _page(paths: list[Path], data: Path | None) -> tuple[str, Path]:
    """The page and where it goes unless told otherwise."""
    sweeps = [path for path in paths if is_sweep(path)]
    if data is not None and (len(paths) > 1 or sweeps):
        raise ConfigError(f"data={data} is for the page of one run; leave it out here")
    if len(paths) == 1:
        path = paths[0]
        if sweeps:
            return sweep_page.render(read_sweep(path)), path / "report.html"
        return run_page.render(read_run(path, data)), path / "report.html"
    if sweeps:
        raise ConfigError(f"{sweeps[0]} is a sweep, not a run; describe it alone: run={sweeps[0]}")
    runs = read_several(paths)
    return compare_page.render(runs), paths[0].parent / "compare.html"
