"""Every setting is documented, read by something, and every YAML key is a setting."""

import pkgutil
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import data_pipeline.config as pipeline_settings
import llmtrain
from llmtrain.cli import COMMANDS
from llmtrain.config.docs import SCHEMAS, field_docs, page
from llmtrain.config.load import build, config_root, load, options, root_groups
from llmtrain.config.model import ModelConfig
from llmtrain.config.resume import changes
from llmtrain.config.run import RunConfig
from llmtrain.config.strict import arms
from llmtrain.config.study import StudyConfig

PIPELINE = [
    value
    for found in pkgutil.iter_modules(pipeline_settings.__path__, f"{pipeline_settings.__name__}.")
    for value in vars(import_module(found.name)).values()
    if is_dataclass(value) and value.__module__ == found.name
]
CONF = config_root()
REPOSITORY = Path(llmtrain.__file__).parent.parent

NEEDED = {
    "train": ["training.num_tokens=1e6"],
    "generate": ["run=runs/x"],
    "eval": ["run=runs/x"],
    "import": ["from=hf", "run=runs/x"],
    "export": ["run=runs/x", "to=hf"],
    "report": ["run=runs/x"],
    "trace": ["run=runs/x", "step=1"],
}
"""What the roots leave open."""


def below(schema: Any) -> Iterator[Any]:
    """A dataclass and those of its fields."""
    yield schema
    for hint in get_type_hints(schema).values():
        for arm in arms(hint):
            if is_dataclass(arm):
                yield from below(arm)


EVERY: list[Any] = sorted(
    {s for root in (*SCHEMAS.values(), StudyConfig) for s in below(root)} | set(PIPELINE),
    key=lambda schema: f"{schema.__module__}.{schema.__name__}",
)


@pytest.mark.parametrize("schema", EVERY, ids=lambda schema: schema.__name__)
def test_every_field_has_a_docstring(schema: Any) -> None:
    docs = field_docs(schema)
    assert [f.name for f in fields(schema) if f.name not in docs] == []
    assert all(text.endswith(".") for text in docs.values())


def test_every_field_is_read_somewhere() -> None:
    sources = [
        *(REPOSITORY / "llmtrain").rglob("*.py"),
        *(REPOSITORY / "data_pipeline").rglob("*.py"),
    ]
    reading = [p for p in sources if p.name != "docs.py"]
    text = "\n".join(p.read_text(encoding="utf-8") for p in reading)
    read = set(re.findall(r"\.(\w+)\b", text))
    unread = [f"{s.__name__}.{f.name}" for s in EVERY for f in fields(s) if f.name not in read]
    assert unread == []


def section_keys(group: str) -> set[str]:
    """Fields a file of ``conf/<group>`` may set, of any section that has the group's name."""
    found = set[str]()
    for root in (*SCHEMAS.values(), *PIPELINE):
        hint = get_type_hints(root).get(group)
        for arm in arms(hint) if hint is not None else ():
            if is_dataclass(arm):
                found |= {f.name for f in fields(arm)}
    return found


def test_every_yaml_key_is_a_field() -> None:
    wrong = []
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if group in (".", "experiment") or group.startswith("hydra/"):
            continue  # roots and experiments are built whole, below; Hydra's in tests/unit/sweep
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: {k}" for k in tree if k not in section_keys(group) | {"defaults"}]
    assert wrong == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_root_loads_with_every_option_of_its_groups(command: str) -> None:
    schema, needed = COMMANDS[command].schema, NEEDED.get(command, [])
    load(command, needed, schema)
    chosen = root_groups(command)
    for group, default in chosen.items():
        names = options(group)
        assert names, f"conf/{group}/ is empty"
        assert default is None or default in names


@pytest.mark.parametrize("model", options("model"))
def test_every_model_builds(model: str) -> None:
    tree = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    assert build(ModelConfig, tree, "model").num_hidden_layers > 0


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_loads(experiment: str) -> None:
    assert load("train", [f"experiment={experiment}"], RunConfig).training.num_tokens > 0


def test_the_experiment_comes_last_and_the_root_itself_first() -> None:
    for command in ("train", "parity"):
        defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
        assert defaults[0] == "_self_"
        assert defaults[-1] == {"experiment": None}


def test_no_yaml_asks_the_clock_or_the_environment() -> None:
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "${now:" not in text, path
        assert "${oc.env:" not in text, path
        hydras = path.is_relative_to(CONF / "hydra")  # Hydra makes its own plugins from them
        assert hydras or "_target_" not in text, path


def test_commands_and_their_schemas_agree() -> None:
    assert {name: c.schema for name, c in COMMANDS.items()} == dict(SCHEMAS)


def test_the_settings_page_is_current() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m llmtrain.config.docs > docs/config.md"


def test_marks_of_a_resume_reach_every_leaf() -> None:
    config = load("train", ["experiment=demo", "data.sources.a=/a"], RunConfig)
    fatal, allowed = changes({}, config)
    paths = [line.split(":")[0] for line in fatal]
    assert "training.seed" in paths
    assert "model.hidden_size" in paths
    assert "data.sources.a" in paths
    assert "optimizer.lr: absent -> 0.003" in allowed
