"""The reference of all settings, read from the dataclasses and their docstrings.

python -m llmtrain.config.docs > docs/config.md
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from llmtrain.config.bench import BenchConfig
from llmtrain.config.commands import ParityConfig, ReportConfig
from llmtrain.config.doctor import DoctorConfig
from llmtrain.config.generate import EvalConfig, GenerateConfig
from llmtrain.config.interop import ExportConfig, ImportConfig
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.load import to_plain
from llmtrain.config.plan import PlanConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.selftest import SelftestConfig
from llmtrain.config.strict import arms, key_of, show
from llmtrain.config.study import StudyConfig
from llmtrain.config.trace import TraceConfig

SCHEMAS: Mapping[str, Any] = {
    "train": RunConfig,
    "parity": ParityConfig,
    "plan": PlanConfig,
    "bench": BenchConfig,
    "generate": GenerateConfig,
    "eval": EvalConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "trace": TraceConfig,
    "launch": LaunchConfig,
    "selftest": SelftestConfig,
    "doctor": DoctorConfig,
}
"""Schema of every command."""

HEAD = """\
# Settings

Made from the dataclasses in `llmtrain/config/` by `python -m llmtrain.config.docs`.

`llmtrain COMMAND key=value` sets a field, `group=NAME` chooses a file of `conf/<group>/`. The
defaults below are those of the dataclasses; `llmtrain COMMAND --cfg job` shows what a command line
comes to, files of `conf/` included. Fields marked **fixed** keep their value for the life of a run:
the same command with another value is refused; any other field may change when a run goes on.
"""


def field_docs(schema: Any) -> dict[str, str]:
    """Field name -> its docstring, on one line; fields without one are left out."""
    found = dict[str, str]()
    for owner in reversed(schema.__mro__):
        if is_dataclass(owner):
            found |= {name: doc for name, (_, doc) in _members(owner).items() if doc}
    return found


def page() -> str:
    """The whole reference as Markdown."""
    parts = [HEAD]
    shown = set[tuple[str, Any]]()
    for command, schema in SCHEMAS.items():
        takes_a_run = command in ("parity", "plan")
        own = [n for n in _names(schema) if not (takes_a_run and n in _names(RunConfig))]
        parts.append(f"## llmtrain {command}\n\n{_first_line(schema)}\n")
        if takes_a_run:
            parts.append(
                "Every field of `llmtrain train` may stand there; read are `model`, `parallel`, "
                "`engine`, `training` and `optimizer`, and:\n"
            )
        parts.append(_table(schema, "", own, fixed=False))
        parts += [
            text for name in own for text in _sections(schema, name, f"{name}.", shown, False)
        ]  # fmt: skip
    parts.append(f"## hydra.sweeper of a ready study\n\n{_first_line(StudyConfig)}\n")
    parts += _sections(StudyConfig, "study", "study.", shown, False)
    return "\n".join(parts)


def _sections(
    schema: Any, name: str, prefix: str, shown: set[tuple[str, Any]], fixed: bool
) -> list[str]:
    """Headed tables of the dataclasses below one field; a union has one for each of its kinds."""
    texts, fixed = list[str](), fixed or _is_fixed(schema, name)
    sections = [arm for arm in arms(get_type_hints(schema)[name]) if is_dataclass(arm)]
    for arm in sections:
        if (prefix, arm) not in shown:
            shown.add((prefix, arm))
            table = _table(arm, prefix, _names(arm), fixed)
            kind = f", kind={_kind(arm)}" if len(sections) > 1 else ""
            texts.append(f"### {prefix[:-1]}{kind}\n\n{_first_line(arm)}\n\n{table}")
            for inner in _names(arm):
                texts += _sections(arm, inner, f"{prefix}{inner}.", shown, fixed)
    return texts


def _table(schema: Any, prefix: str, names: list[str], fixed: bool) -> str:
    """Rows of the fields that are no sections."""
    docs, types, hints = field_docs(schema), _types(schema), get_type_hints(schema)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for item in fields(schema):
        plain = not any(is_dataclass(arm) for arm in arms(hints[item.name]))
        if item.name in names and plain:
            mark = " **fixed**" if fixed or _is_fixed(schema, item.name) else ""
            meaning = docs[item.name].replace("|", "\\|")
            kind = re.sub(r"Literal\[(.*?)\]", r"\1", types[item.name]).replace("|", "\\|")
            name = prefix + key_of(item.name)
            rows.append(f"| `{name}` | {kind} | {_default(item)} | {meaning}{mark} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _kind(arm: Any) -> str:
    """The tag of a dataclass in a union of several."""
    (kind,) = get_args(get_type_hints(arm)["kind"])
    return str(kind)


def _is_fixed(schema: Any, name: str) -> bool:
    return any(f.name == name and "resume" in f.metadata for f in fields(schema))


def _names(schema: Any) -> list[str]:
    return [f.name for f in fields(schema)]


def _first_line(schema: Any) -> str:
    return str(inspect.getdoc(schema)).splitlines()[0]


def _default(item: Any) -> str:
    if item.default is not MISSING:
        return f"`{show(to_plain(item.default))}`" if item.default != "" else "empty"
    return "required" if item.default_factory is MISSING else "empty"


def _types(schema: Any) -> dict[str, str]:
    found = dict[str, str]()
    for owner in reversed(schema.__mro__):
        if is_dataclass(owner):
            found |= {name: kind for name, (kind, _) in _members(owner).items()}
    return found


def _members(schema: Any) -> dict[str, tuple[str, str]]:
    """Annotated names in the class body -> (annotation, docstring that follows)."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    if not isinstance(body, ast.ClassDef):
        return {}
    found = dict[str, tuple[str, str]]()
    for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return found


if __name__ == "__main__":
    sys.stdout.write(page())
