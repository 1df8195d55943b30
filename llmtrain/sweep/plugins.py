"""What ``hydra/sweeper=NAME`` and ``hydra/launcher=NAME`` stand for here, for Hydra to find.

Invariant: a class is imported when the composed configuration names it, so that nobody else pays
for Optuna or submitit. Hydra takes plugins from the namespace ``hydra_plugins`` alone, which it
reads as a whole at every start: the module of that name is made here, once it is needed.

    register("hydra_plugins.llmtrain.OptunaSweeper")
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

from llmtrain.errors import ConfigError

PACKAGE = "hydra_plugins"
MODULE = "llmtrain"
PLUGINS: Mapping[str, str] = {
    "OptunaSweeper": "llmtrain.sweep.optuna_sweeper:OptunaSweeper",
    "StudySweeper": "llmtrain.study.sweeper:StudySweeper",
    "LocalLauncher": "llmtrain.sweep.launchers:LocalLauncher",
    "SlurmLauncher": "llmtrain.sweep.launchers:SlurmLauncher",
}
"""``module:class`` by the last part of the ``_target_`` in a file of conf/hydra/."""


def register(target: str) -> None:
    """Let Hydra find the class of a ``_target_``, where it is one of these.

    Raises:
        ConfigError: a package it needs is not installed.
    """
    from hydra.core.plugins import Plugins

    place, _, name = target.rpartition(".")
    if place != f"{PACKAGE}.{MODULE}" or name not in PLUGINS:
        return
    plugins = Plugins.instance()  # has read the namespace by now
    module, _, attribute = PLUGINS[name].partition(":")
    try:
        plugin = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "llmtrain":
            raise
        raise ConfigError(
            f"{name} needs {error.name}, which is not installed; run pip install 'llmtrain[sweep]'"
        ) from error
    plugin.__module__ = place
    setattr(_module(place), name, plugin)
    plugins.register(plugin)


def _module(place: str) -> ModuleType:
    """The module of the namespace that holds the classes of this package."""
    try:
        package = import_module(PACKAGE)
    except ModuleNotFoundError:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    module = sys.modules.setdefault(place, ModuleType(place))
    setattr(package, MODULE, module)
    return module
