import sys

import pytest

from llmtrain.engine.deepspeed.runtime import attach
from llmtrain.errors import ConfigError


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"package deepspeed, .* pip install 'llmtrain\[deepspee"):
        attach(timeout_s=600.0)
