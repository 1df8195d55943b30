"""From YAML groups and command-line overrides to frozen dataclasses, strictly.

Hydra only composes; after ``build`` there is no DictConfig and no default behind a typo: an unknown
key, a wrong type or a missing value is a problem, and one ConfigError holds all of them.

    config = load("train", ["model=llama_demo", "training.num_tokens=1e6"], RunConfig)
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import blake3
import yaml

import llmtrain
from llmtrain.config.strict import build, key_of, nearest
from llmtrain.errors import ConfigError

__all__ = [
    "build", "compose", "config_hash", "config_root", "from_yaml", "groups", "load",
    "options", "root_groups", "sweep_overrides", "to_plain", "to_yaml", "write_yaml",
]  # fmt: skip

T = TypeVar("T")


def config_root() -> Path:
    """Folder of the YAML groups: inside the package in a wheel, beside it in a checkout."""
    package = Path(llmtrain.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "__init__.py").is_file():
            return folder
    raise ConfigError(f"no conf/ folder in or beside {package}; install llmtrain again")


def groups(config_dirs: Sequence[Path] = ()) -> list[str]:
    """Names of the config groups (folders of YAML files), sorted."""
    found = set[str]()
    for root in (config_root(), *config_dirs):
        found.update(str(p.parent.relative_to(root)) for p in root.rglob("*.yaml"))
    return sorted(found - {"."})


def options(group: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """Names that ``group=NAME`` accepts, sorted."""
    roots = (config_root(), *config_dirs)
    return sorted({p.stem for root in roots for p in (root / group).glob("*.yaml")})


@functools.cache
def root_groups(root: str) -> Mapping[str, str | None]:
    """Groups that ``conf/<root>.yaml`` chooses from, with the option each has by default."""
    tree = yaml.safe_load((config_root() / f"{root}.yaml").read_text(encoding="utf-8"))
    entries = [e for e in tree.get("defaults", []) if isinstance(e, dict)]
    return {str(group): option for entry in entries for group, option in entry.items()}


def load(
    root: str, overrides: Sequence[str], schema: type[T], config_dirs: Sequence[Path] = ()
) -> T:
    """Compose ``conf/<root>.yaml`` with ``overrides`` and build ``schema`` from it.

    Raises:
        ConfigError: problems of overrides and of values, all of them.
    """
    given = _sorted_out(root, overrides, config_dirs)
    try:
        config = build(schema, _compose(root, given, config_dirs))
    except ConfigError as error:
        raise ConfigError([*given.problems, *error.problems]) from error
    if given.problems:
        raise ConfigError(given.problems)
    return config


def compose(
    root: str, overrides: Sequence[str], config_dirs: Sequence[Path] = ()
) -> dict[str, object]:
    """Hydra's composition of ``conf/<root>.yaml``, interpolations resolved, as plain containers.

    An override may name a key the YAML does not spell out (``data.sources.mine=DIR``): whether the
    key exists is for ``build`` to say, against the dataclasses.

    Raises:
        ConfigError: an override that cannot be read, or a group option that does not exist.
    """
    given = _sorted_out(root, overrides, config_dirs)
    if given.problems:
        raise ConfigError(given.problems)
    return _compose(root, given, config_dirs)


def sweep_overrides(
    root: str, overrides: Sequence[str], config_dirs: Sequence[Path] = ()
) -> list[str]:
    """Overrides as Hydra's own command line takes them: ``++`` on every value.

    Raises:
        ConfigError: every override that cannot be read or names no option of its group.
    """
    given = _sorted_out(root, overrides, config_dirs, sweep=True)
    if given.problems:
        raise ConfigError(given.problems)
    lines = [value.input_line for value in given.values]
    return [*given.choices, *(x if x.startswith("~") else f"++{x.lstrip('+')}" for x in lines)]


@dataclass
class _Given:
    """Overrides, sorted out."""

    choices: list[str]
    """Group choices and hydra's own settings: Hydra applies them."""
    values: list[Any]
    """Parsed ``key=value`` and ``~key``: applied after the composition, in order."""
    problems: list[str]
    """What is wrong with the others."""


def _sorted_out(
    root: str, overrides: Sequence[str], config_dirs: Sequence[Path], sweep: bool = False
) -> _Given:
    """Parse overrides; one that names a group of ``root`` (or appends one) is a choice."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not (config_root() / f"{root}.yaml").is_file():
        raise ConfigError(f"no root config {config_root() / root}.yaml")
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder")
    parser, own, known = OverridesParser.create(), root_groups(root), groups(config_dirs)
    given = _Given([], [], [])
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            given.problems.append(
                f"cannot read the override '{text}'; write key=value (quote text with spaces, "
                "commas or brackets: 'key=\"some text\"')"
            )
            continue
        key, many = override.key_or_group, override.is_sweep_override()
        choice = key in own or (key in known and text.startswith("+") and text[1] != "+")
        problem = None
        if many and not sweep:
            problem = f"{text} has several values; add --multirun to run each, or quote it"
        elif choice and not override.is_delete():
            chosen = [*override.sweep_string_iterator()] if many else override.value()
            problem = _bad_option(key, chosen, config_dirs)
        if problem is not None:
            given.problems.append(problem)
        elif choice or key.startswith("hydra"):
            given.choices.append(text)
        else:
            given.values.append(override)
    return given


def _compose(root: str, given: _Given, config_dirs: Sequence[Path]) -> dict[str, object]:
    """Let Hydra choose the files, then set the values."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if config_dirs:
            paths = ",".join(f"'file://{Path(d).resolve()}'" for d in config_dirs)
            composed = _choose(root, f"hydra.searchpath=[{paths}]", *given.choices)
        else:
            composed = deepcopy(_shipped(root, *given.choices))
        for override in given.values:
            key, value = override.key_or_group, override.value()
            if override.is_delete():
                _delete(composed, key)
            else:
                OmegaConf.update(composed, key, value, merge=True, force_add=True)
        tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"conf/{root}.yaml holds a {type(tree).__name__}, expected keys")
    return {str(key): value for key, value in tree.items()}


_OF_HYDRA = tuple(
    f"hydra/{name}"
    for name in (
        "output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env"
    )
)  # fmt: skip
"""Groups about Hydra itself, which only a sweep needs; to read them takes half of the time."""


def _choose(root: str, *choices: str) -> Any:
    """Hydra's DictConfig of the files that ``choices`` name."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    named = {choice.lstrip("+~").partition("=")[0] for choice in choices}
    unread = [f"~{group}" for group in _OF_HYDRA if group not in named]
    with initialize_config_dir(str(config_root()), version_base="1.3"):
        return hydra_compose(root, overrides=[*choices, *unread])


# The files beside the code do not change while it runs, and Hydra takes 0.1 s to read them.
_shipped = functools.cache(_choose)


def _delete(composed: Any, path: str) -> None:
    """Take a key out, as ``~key`` asks for."""
    from omegaconf import OmegaConf, open_dict

    section, _, key = path.rpartition(".")
    parent = OmegaConf.select(composed, section) if section else composed
    if not OmegaConf.is_dict(parent) or key not in parent:
        raise ConfigError(f"~{path} deletes nothing: the configuration does not set {path}")
    with open_dict(parent):
        del parent[key]


def _bad_option(group: str, value: Any, dirs: Sequence[Path]) -> str | None:
    """The problem with ``group=value``, or None; null leaves the group out."""
    choices = options(group, dirs)
    names = value if isinstance(value, list) else [value]
    bad = [n for n in names if n is not None and str(n) not in choices]
    if not bad:
        return None
    return f"{group}={bad[0]} is not an option of {group}{nearest(str(bad[0]), choices)}"


def _one_line(error: BaseException) -> str:
    """Hydra's message as one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def to_plain(config: Any) -> Any:
    """A config as dicts, lists and scalars, in field order."""
    if is_dataclass(config) and not isinstance(config, type):
        return {key_of(f.name): to_plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """A config (dataclass or plain tree) as YAML; the same config gives the same text."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=1000)


def write_yaml(config: Any, path: Path) -> None:
    """Write a config by rename, its hash in the first line; readers see the old file or this."""
    beside = path.with_name(f".tmp-{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(f"# config {config_hash(config)}\n{to_yaml(config)}")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def from_yaml(text: str) -> dict[str, object]:
    """Read back what ``to_yaml`` wrote (or a user edited) as a plain tree for ``build``."""
    from omegaconf import OmegaConf

    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"the YAML holds a {type(tree).__name__}, expected keys")
    return {str(key): value for key, value in tree.items()}


def config_hash(config: Any) -> str:
    """16 hex digits of blake3 over the sorted content: equal configs have equal hashes."""
    text = json.dumps(to_plain(config), sort_keys=True, ensure_ascii=True)
    return blake3.blake3(text.encode()).hexdigest(length=8)
