"""``llmtrain generate``: prompts from files, chats, stops, JSON lines, text while it is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.tokenizer.tokenizer import load
from tests.run_folder import make_run

TEXTS = ["A store holds the tokens of a source.\nIt is written once.", "def read(path):\n" * 9]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generate"), TEXTS)


def generated(run: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of a call that writes JSON lines."""
    out = run.parent / "out.jsonl"
    words = ("generate", f"run={run}", "format=jsonl", f"out={out}", "max_new_tokens=12", *words)
    assert main(list(words)) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_do_not_depend_on_the_batch(run: Path) -> None:
    words = ('prompt=["A store","def"]', "num_samples=3", "seed=5")
    rows = generated(run, *words, "batch_size=4")
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, sample) for prompt in ("A store", "def") for sample in range(3)
    ]
    assert len({row["completion"] for row in rows}) > 3
    assert generated(run, *words, "batch_size=1") == rows


def test_a_stop_text_and_a_stop_token_end_it(run: Path) -> None:
    tokenizer = load(run.parent / "tok")
    (free,) = generated(run, "prompt=A store", "temperature=0")
    assert (free["ended"], len(free["ids"])) == ("length", 12)
    assert free["completion"] == tokenizer.decode(free["ids"])
    text = next(c for c in free["completion"][3:] if c.isalnum() or c in "():.,*+-/<>[]{}#$%&!?;")
    (cut,) = generated(run, "prompt=A store", "temperature=0", f"stop=['{text}']")
    assert cut["completion"] == free["completion"].split(text)[0]
    assert cut["ended"] == "stop"
    token = free["ids"][5]
    (ended,) = generated(run, "prompt=A store", "temperature=0", f"stop_tokens=[{token}]")
    assert ended["ids"] == free["ids"][: free["ids"].index(token)]
    assert ended["ended"] == "end"


def test_streamed_text_is_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", f"run={run}", 'prompt=["A store","It"]', "max_new_tokens=9"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "stream=true"]) == 0
    assert capsys.readouterr().out == text


def test_prompts_and_conversations_of_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "prompts.jsonl"
    chat = [{"role": "user", "content": "Where?"}]
    file.write_text(
        json.dumps({"prompt": "It", "id": 7}) + "\n\n" + json.dumps({"messages": chat}) + "\n"
    )
    assert main(["generate", f"run={run}", f"prompts_file={file}"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    template = run.parent / "tok" / "chat_template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    try:
        first, second = generated(run, f"prompts_file={file}")
        assert (first["prompt"], first["id"]) == ("It", 7)
        assert second["prompt"] == "[user]Where?[answer]"
        (row,) = generated(run, "chat=true", "system=Brief", "prompt=Where?")
        assert row["prompt"] == "[system]Brief[user]Where?[answer]"
    finally:
        template.unlink()
    file.write_text('{"prompt": "It"}\n{"text": "It"}\n')
    assert main(["generate", f"run={run}", f"prompts_file={file}"]) == 2
    assert "prompts.jsonl:2 is no prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stop_tokens=['<|eot|>']"], "no token of its own"),
        (["min_p=2"], "min_p=2.0 must lie between 0 and 1"),
        (["repetition_penalty=0"], "repetition_penalty=0.0 must be above 0"),
        (["prompts_file=x", "prompt=y"], "leave one of them out"),
        (["system=x"], "add chat=true"),
        (["prompts_file=nowhere.txt"], "prompts_file=nowhere.txt cannot be read"),
        (["parallel.tp=2"], "started were 1"),
    ],
)
def test_refusals(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["generate", f"run={run}", "max_new_tokens=8", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
