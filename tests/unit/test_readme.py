import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def tree():
    """Paths the README's tree names."""
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", README, re.DOTALL)[1]
    folders, found = [], set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        found.add("".join(folders[:depth]) + name)
    return found


def modules():
    for package in ("llmtrain", "data_pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                yield str(path.relative_to(ROOT))


def test_every_module_has_its_line():
    assert sorted(set(modules()) - tree()) == []


def test_every_line_has_its_file():
    assert sorted(name for name in tree() if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_commands_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    from data_pipeline.cli import COMMANDS as DATA
    from llmtrain.cli import COMMANDS as TRAIN

    known = {"llmtrain": set(TRAIN), "llmtrain-data": set(DATA)}
    assert set(known) == set(scripts)
    named = re.findall(r"^(?: {4}|.*`)(llmtrain(?:-data)?) ([a-z]+)", README, re.MULTILINE)
    assert [pair for pair in named if pair[1] not in known[pair[0]]] == []
    assert len(named) > 5
