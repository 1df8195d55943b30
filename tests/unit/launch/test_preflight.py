"""The look at a node, hostfiles and templates: what is wrong is named."""

import socket
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_inclusion_exclusion

from llmtrain.config.load import config_hash, load
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.launch import preflight as looking
from llmtrain.launch.hostfile import chosen, read_hostfile
from llmtrain.launch.shell import fill, fill_yaml

WORDS = ("training.num_tokens=1e6",)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "store").mkdir()
    return [*WORDS, f"runs_dir={tmp_path}", f"data.sources.a={tmp_path / 'store'}"]


def test_a_node_that_is_ready_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    hash = config_hash(load("train", words, RunConfig))
    assert looking.main(["node=n7", f"config={hash}", "gpus=0", "--", *words]) == 0
    assert "n7: INFO ready" in capsys.readouterr().err
    assert [p for p in Path(words[1].partition("=")[2]).iterdir() if p.name != "store"] == []


def test_every_problem_names_the_node(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking.gpus, "listed", lambda _: [])
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        given = ["node=n7", "config=0123", "gpus=8", f"port={port}", "head=nobody.invalid"]
        more = ["data.sources.b=[/nowhere/1,s3://bucket/2]", "tokenizer.path=/nowhere/t"]
        assert looking.main([*given, "--", *words, *more]) == 2
        assert looking.main(["gpus=8", "--", *words]) == 1  # another node may have them
        capsys.readouterr()
        looking.main([*given, "--", *words, *more])
    said = [x for x in capsys.readouterr().err.splitlines() if "WARNING" not in x]
    expected = [
        "n7: the same words come to configuration", "n7: 0 GPUs, the launch needs 8",
        "n7: tokenizer.path=/nowhere/t is not there", "n7: data.sources.b=/nowhere/1 is not there",
        f"n7: port {port} cannot be used (Address already in use)",
        "n7: nobody.invalid, where the ranks meet, has no address here",
    ]  # fmt: skip
    assert len(said) == len(expected)
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True)), said


def test_other_code_on_a_node_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert looking.main(["node=n7", "--", *WORDS, "modle.x=1"]) == 2
    assert capsys.readouterr().err.startswith("n7: unknown key modle.x")


def test_what_the_doctor_calls_bad_stops_and_a_warning_does_not(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.doctor.finding import Finding

    found = [("m", Finding(name="x", value="1", verdict="bad", advice="do y")),
             ("m", Finding(name="z", value="2", verdict="warn", advice="do w"))]  # fmt: skip
    monkeypatch.setattr(looking.command, "examine", lambda _: found)
    assert looking.preflight(words) == ["x: 1; do y"]


HOSTS = {"n0": 4, "n1": 2, "n2": 1}


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("n1", ""), ("n2@n0:0,2", ""), ("n0:3,1", ""), ("", "n1"), ("", "n0:0@n2"),
     ("", "n0:0,1,2,3")],
)  # fmt: skip
def test_hosts_are_chosen_as_deepspeed_chooses_them(include: str, exclude: str) -> None:
    expected = parse_inclusion_exclusion(HOSTS, include, exclude)
    found = chosen(HOSTS, include, exclude)
    assert found == {host: sorted(slots) for host, slots in expected.items()}
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("n7", "", "launch.include names n7; the hosts are n0, n1, n2"),
        ("", "n1:2", "launch.exclude names slot 2 of n1, which has 2"),
        ("n1:x", "", "'n1:x' is not of the form host:0,2"),
        ("", "n0@n1@n2", "leaves no host"),
    ],
)
def test_a_filter_that_fits_no_host_is_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(HOSTS, include, exclude)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"), ("n0 slots=2\nn0 slots=2", "line 2: n0 is named twice"),
        ("# x\n\nn0 2", "line 3: 'n0 2' is not of the form"),
    ],
)  # fmt: skip
def test_a_hostfile_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nn0 slots=4  # big\n\n10.0.0.2   slots=1\n")
    assert read_hostfile(tmp_path / "hosts") == {"n0": 4, "10.0.0.2": 1}


def test_a_template_is_filled_whole() -> None:
    assert fill("a {{x}}\n{{y}}\n\n$z\n", {"x": "1", "y": "", "z": "-"}) == "a 1\n\n$z\n"
    with pytest.raises(ConfigError, match="no value for w; it may name x"):
        fill("{{w}}", {"x": "1"})
    text = "a: {{x}}\nb: {{none}}\nc: [{{none}}, 'v{{x}}']\nd: {{script}}\n"
    values = {"x": 3, "none": None, "script": "one\ntwo: 'x'\n"}
    assert fill_yaml(text, values) == "a: 3\nc:\n- v3\nd: |\n  one\n  two: 'x'\n"
    with pytest.raises(ConfigError, match="not YAML"):
        fill_yaml("a: [", {})
