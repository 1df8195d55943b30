"""What the machine refuses, as one sentence: a package that is not installed, a disk that is full.

These are no faults of the pipeline: they are not tried again, and the user sees no traceback.

    raise refusal(error) or error
"""

import errno
import os

from llmtrain.errors import ConfigError, DataError, LLMTrainError

_ADVICE = {
    errno.ENOSPC: "free some space and give the same command again, it goes on where it stopped",
    errno.EDQUOT: "free some space and give the same command again, it goes on where it stopped",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a path this user may use, or change its permissions",
    errno.EPERM: "give a path this user may use, or change its permissions",
    errno.EEXIST: "a file stands where a folder has to be: give another path",
    errno.ENOTDIR: "a file stands where a folder has to be: give another path",
    errno.EISDIR: "a folder stands where a file has to be: give another path",
    errno.ENOENT: "it was moved while it was needed, or its folder cannot be made there",
    errno.ENAMETOOLONG: "give a shorter path",
}
"""What to change, by the number of the error."""
_OWN_PACKAGES = ("data_pipeline", "llmtrain")
_EXTRAS = {"ray": "data,ray", "submitit": "data,slurm", "cloudpickle": "data,slurm"}
"""Packages that are no part of ``llmtrain[data]`` -> the extras they come with."""


def refusal(error: ImportError | OSError) -> LLMTrainError | None:
    """Return what to tell the user, or None if the error is a fault of ours."""
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package in ("", *_OWN_PACKAGES):
            return None
        return ConfigError(
            f"the data pipeline needs the package {package}, which is not installed; run: "
            f"pip install 'llmtrain[{_EXTRAS.get(package, 'data')}]'"
        )
    if error.errno not in _ADVICE:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return DataError(f"{where}{os.strerror(error.errno)}; {_ADVICE[error.errno]}")
