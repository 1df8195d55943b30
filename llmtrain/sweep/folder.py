"""The folder of a sweep: which sweep it is, in ``sweep.json``, and who is at work on it.

Invariant: a folder holds one sweep for good; words that choose other runs are refused there, those
that only say where trials run, how many, or how often, may change.

    identity(fixed=["experiment=mine"], swept=["optimizer.lr=1e-3,3e-3"], sweeper={...})
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.launch import OWN
from llmtrain.config.load import config_hash
from llmtrain.errors import ConfigError
from llmtrain.run.directory import read_json, write_json
from llmtrain.sweep.objective import Objective

SWEEP_JSON = "sweep.json"

MAY_CHANGE = ("num_trials", "max_batch_size")
"""Settings of a sweeper that may change when the sweep goes on."""
_PLACE = ("name", "runs_dir")


def identity(
    fixed: Sequence[str], swept: Sequence[str], sweeper: Mapping[str, Any], objective: Objective
) -> dict[str, Any]:
    """What makes a sweep the one it is."""
    settings = {name: value for name, value in sweeper.items() if name not in MAY_CHANGE}
    return {
        "words": [word for word in shared(fixed) if not _is_place(word)],
        "swept": sorted(word.lstrip("+") for word in swept),
        "sweeper": settings,
        "objective": {"metric": objective.metric, "direction": objective.direction},
    }


def shared(fixed: Sequence[str]) -> list[str]:
    """Words of every trial: those of the sweep without its own place."""
    return [word for word in fixed if _key(word) not in _PLACE]


def default_name(found: Mapping[str, Any]) -> str:
    """Name of a sweep that was given none: the same words find it again."""
    return f"sweep-{config_hash(dict(found))[:8]}"


def settle(
    folder: Path,
    found: Mapping[str, Any],
    *,
    command: Sequence[str],
    sweeper: str,
    launcher: str,
    parameters: Sequence[str],
) -> None:
    """Write ``sweep.json``, or see that it is of this sweep.

    Raises:
        ConfigError: the folder holds another sweep, or a run.
    """
    path = folder / SWEEP_JSON
    if path.exists():
        if (changed := _changed(read_json(path)["identity"], found)) is not None:
            raise ConfigError(
                f"{folder} holds another sweep ({changed}); put it back, or start another sweep "
                "with name=NEW"
            )
    elif (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds a run, no sweep; start the sweep with name=NEW")
    write_json(path, {
        "command": list(command), "sweeper": sweeper, "launcher": launcher,
        "objective": found["objective"], "parameters": list(parameters), "identity": dict(found),
    })  # fmt: skip


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference, as ``what: was -> is``."""
    for name in now:
        was, is_ = before.get(name), now[name]
        if was == is_:
            continue
        if isinstance(was, list):
            gone = [word for word in was if word not in is_] or ["nothing"]
            new = [word for word in is_ if word not in was] or ["nothing"]
            return f"{' '.join(gone)} -> {' '.join(new)}" if gone != new else "words in other order"
        differing = sorted(k for k in {*(was or {}), *is_} if (was or {}).get(k) != is_.get(k))
        key = differing[0]
        return f"{name}.{key}: {(was or {}).get(key)} -> {is_.get(key)}"
    return None


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _is_place(word: str) -> bool:
    """Whether a word only says where trials run."""
    return _key(word).partition(".")[0] in OWN
