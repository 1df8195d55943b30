"""What a launch comes to on every target, and what is refused before anything starts."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmtrain.cli import NEEDS_A_PERSON, main
from llmtrain.config.launch import split
from llmtrain.config.load import config_hash, load
from llmtrain.config.run import RunConfig
from llmtrain.run.directory import ExitReason
from tests.end_to_end.commands import TINY, make_store

SCHEMAS = Path(__file__).parent / "schemas"
CPU = ("cluster=cpu", "cluster.num_nodes=2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "a", 1)


Dry = Callable[..., str]


@pytest.fixture
def dry(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Dry:
    """What a dry run prints; the folder it runs in stays empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str, status: int = 0) -> str:
        found = main(["launch", "dry_run=true", *TINY, f"data.sources.a={store}", *words])
        said = capsys.readouterr()
        assert found == status, said.err
        assert list(Path.cwd().iterdir()) == []
        return said.out if status == 0 else said.err

    return run


def test_words_of_launch_and_of_training_are_told_apart() -> None:
    words = ["target=slurm", "launch.partition=gpu", "+cluster.environment.A=b", "launches=1"]
    own, training = split([*words, "dry_run=true", "model=llama3_8b", "~cluster.port"])
    assert own == ["launch=slurm", *words[1:3], "dry_run=true", "~cluster.port"]
    assert training == ["launches=1", "model=llama3_8b"]


def test_one_rank_is_a_process_and_several_are_torchrun(dry: Dry) -> None:
    alone = shlex.split(dry("name=x"))
    assert alone[:4] == [sys.executable, "-m", "llmtrain", "train"]
    assert "name=x" in alone
    assert "dry_run=true" not in alone
    several = shlex.split(dry("parallel.pp=2", "cluster.environment.OMP_NUM_THREADS='3'"))
    assert several[:5] == [
        "env",
        "OMP_NUM_THREADS=3",
        sys.executable,
        "-m",
        "torch.distributed.run",
    ]
    assert several[5:7] == ["--standalone", "--nproc-per-node=2"]
    assert several[-1].startswith("name=2x16-")


def test_the_run_is_named_as_training_would_name_it(dry: Dry, store: Path) -> None:
    from llmtrain.prepare import resolve

    config = load("train", [*TINY, f"data.sources.a={store}"], RunConfig)
    assert shlex.split(dry())[-1] == f"name={resolve(config).name}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=slrum"], "launch=slrum is not an option of launch; did you mean slurm?"),
        (["launch.partition=x"], "launch.partition has no meaning for kind=local"),
        (["target=slurm", "modle.x=1", *CPU], "unknown key modle.x"),
        (["target=slurm"], "cluster.gpus_per_node=auto counts the GPUs of this machine"),
        (["cluster.num_nodes=2"], "target=local is this machine alone"),
        (["target=torchrun", "cluster.num_nodes=2"], "set launch.head=ADDRESS:PORT"),
        (["target=torchrun", "launch.node=1"], "launch.node=1 is none of cluster.num_nodes=1"),
        (["target=torchrun", "launch.head=n0"], "launch.head=n0 is no address:port"),
        (["target=slurm", *CPU, "parallel.tp=4"], "parallel.tp=4"),
        (["target=slurm", *CPU, "launch.account='a\nb'"], "has several lines; sbatch takes one"),
        (["target=slurm", *CPU, "launch.time_limit=soon"], "launch.time_limit=soon is no time"),
        (["target=slurm", *CPU, "data.sources.b=/nowhere"], "/nowhere does not exist"),
        (["target=slurm", *CPU, "launch.template=/nowhere"], "cannot be read: No such file"),
        (["target=deepspeed", "launch.include=n0"], "set hostfile"),
        (["target=deepspeed", "launch.hostfile=/nowhere"], "launch.hostfile=/nowhere cannot"),
        (["target=kubernetes", *CPU], "launch.image is required"),
        (["target=kubernetes", *CPU, "launch.image=i"], "is in the container and lost with it"),
        (["target=skypilot", "cluster.gpus_per_node=2"], "set launch.accelerators=H100:2"),
        (["--multirun", "optimizer.lr=1,2"], "launch.array=["),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    dry: Dry, words: list[str], message: str
) -> None:
    assert message in dry(*words, status=2)


def test_ranks_that_no_layout_fits_are_refused(dry: Dry) -> None:
    words = [
        "target=slurm",
        *CPU,
        "cluster.ranks_per_node=3",
        "parallel.pp=2",
        "parallel.dp_shard=1",
    ]
    assert "makes 2 ranks, started were 6" in dry(*words, status=2)


def test_what_a_restart_does_not_cure_is_not_started_again(dry: Dry) -> None:
    script = dry("target=slurm", *CPU, "parallel.pp=2")
    assert "{{" not in script
    assert "|| not_ready $?" in script
    assert "--signals-to-handle=SIGINT" in script  # Slurm's SIGTERM reaches torchrun too
    body = script.partition("not_ready() {")[2].partition("\n}\n")[0]
    function = f"not_ready() {{{body}\n}}\n"
    for count, code, said in ((0, 1, ""), (1, 1, "again\n"), (1, 2, ""), (20, 1, "")):
        words = f"SLURM_RESTART_COUNT={count}; queue_again() {{ echo again; }}; {function}"
        done = subprocess.run(
            ["bash", "-c", f"{words} not_ready {code}"], check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, said)


def test_nodes_meet_over_c10d(dry: Dry) -> None:
    words = ["target=torchrun", *CPU, "launch.head=10.0.0.1:7000", "launch.node=1"]
    found = shlex.split(dry(*words, "launch.address=10.0.0.2", "parallel.pp=2"))
    assert {
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:7000",
        "--rdzv-conf=is_host=0,read_timeout=600",
        "--local-addr=10.0.0.2",
        "--nproc-per-node=1",
    } <= set(found)


def test_deepspeed_reaches_every_host_itself(dry: Dry, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n0 slots=2\nn1 slots=2\nn2 slots=2\n")
    words = ["target=deepspeed", "cluster=cpu", f"launch.hostfile={hosts}", "launch.exclude=n1"]
    looks_and_starts = [shlex.split(x.removeprefix("# every host first: "))
                        for x in dry(*words, "parallel.pp=2").splitlines()]  # fmt: skip
    assert [x[:4] for x in looks_and_starts] == [
        ["ssh", "-o", "BatchMode=yes", host] for host in ("n0", "n2") * 2
    ]
    look, _, first, second = (x[4] for x in looks_and_starts)
    assert "llmtrain.launch.preflight node=n0" in look
    for number, start in enumerate((first, second)):
        assert f"cd {Path.cwd()} && exec env OMP_NUM_THREADS=1" in start
        assert "--exclude=n1 --master_addr n0 --master_port 29500 --no_ssh" in start
        assert f"--force_multi --node_rank {number} --module llmtrain train" in start
        assert "env DS_ACCELERATOR=cpu" in start
    one = dry(*words, "launch.launcher=pdsh", "preflight=false", "launch.head=10.0.0.7")
    assert "--master_addr 10.0.0.7" in one
    assert "--launcher pdsh --module llmtrain train" in one
    spaces = dry(*words, "launch.launcher=pdsh", "name='a b'", status=2)
    assert "would not arrive as it is" in spaces
    srun = dry(*words, "launch.launcher=slurm", "preflight=false")
    assert "--nodelist=n0,n2 bash -c 'exec env OMP_NUM_THREADS=1" in srun
    assert '--node_rank "$SLURM_PROCID"' in srun
    alone = dry("target=deepspeed", "cluster=cpu", "parallel.pp=2")
    assert "--num_gpus 2 --master_port 29500 --module llmtrain train" in alone


def test_a_batch_script_holds_all_that_was_asked_for(dry: Dry, store: Path) -> None:
    script = dry(
        "target=slurm", "cluster=infiniband", "cluster.num_nodes=2", "cluster.cpus_per_node=96",
        "launch.partition=gpu", "launch.account=lab", "launch.time_limit=1-00:00:00",
        "launch.nodelist=n[0-1]", "launch.options={mail-user: 'me@example.org'}", "name='big one'",
        "launch.setup=['module load cuda','. activate']", "runs_dir='/tmp/shared runs'",
        "training.global_batch_tokens=1024",
    )  # fmt: skip
    lines = script.splitlines()
    for line in (
        "#SBATCH --job-name=big-one", "#SBATCH --partition=gpu", "#SBATCH --account=lab",
        "#SBATCH --time=1-00:00:00", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=96", "#SBATCH --nodelist='n[0-1]'", "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120", "#SBATCH --mail-user=me@example.org", "module load cuda",
        "#SBATCH --exclusive", ". activate", "export SRUN_CPUS_PER_TASK=96",
        "run='/tmp/shared runs/big one'",
    ):  # fmt: skip
        assert line in lines, script
    why = "export NCCL_IB_HCA=mlx5  # which network cards NCCL may use"
    assert why in lines
    assert 'bash -c "$train" node 8 "${words[@]}" &' in script
    training = [*TINY, f"data.sources.a={store}", "name='big one'", "runs_dir='/tmp/shared runs'"]
    training += ["training.global_batch_tokens=1024", "checkpoint.grace_s=120"]  # as the signal
    assert words_of(script) == (training, hash_of(training))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_job_may_start_on_fewer_nodes_where_the_layout_can(dry: Dry) -> None:
    words = ("target=slurm", *CPU, "launch.min_nodes=1", "cluster.ranks_per_node=1")
    script = dry(*words, "name=fewer", "checkpoint.grace_s=40")
    assert "#SBATCH --nodes=1-2" in script.splitlines()
    assert "srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1" in script
    assert "--nnodes=$SLURM_JOB_NUM_NODES" in script
    assert "checkpoint.grace_s=120" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    refused = dry(*words, "parallel.pp=2", status=2)
    assert "launch.min_nodes, on 1 nodes: " in refused
    assert "is more than cluster.num_nodes=2" in dry(*words[:3], "launch.min_nodes=3", status=2)


def words_of(script: str, task: str = "") -> tuple[list[str], str]:
    """Words and hash as the shell reads them."""
    start, end = script.index("\npython="), script.index("# Where the ranks meet")
    show = script[start:end] + 'printf "%s\\0" "$hash" "${words[@]}"'
    done = subprocess.run(
        ["bash", "-c", show], capture_output=True, text=True, check=True,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": task},
    )  # fmt: skip
    found, *words = done.stdout.split("\0")[:-1]
    return words, found


def hash_of(words: list[str]) -> str:
    return config_hash(load("train", words, RunConfig))


def test_every_task_of_an_array_is_a_run_of_its_own(dry: Dry) -> None:
    words = [
        "target=slurm",
        *CPU,
        "launch.array=['optimizer.lr=1e-3 training.seed=1','optimizer.lr=2e-3']",
    ]
    script = dry(*words, "launch.array_parallel=1", "name=sweep")
    assert "#SBATCH --array=0-1%1" in script
    assert "#SBATCH --job-name=sweep" in script
    first, second = (words_of(script, task) for task in "01")
    assert "training.seed=1" in first[0]
    assert "optimizer.lr=2e-3" in second[0]
    assert first[1] == hash_of(first[0]) != second[1] == hash_of(second[0])
    assert first[0][-1].startswith("name=sweep-")
    assert first[0][-1] != second[0][-1]
    requeue = next(x for x in script.splitlines() if x.lstrip().startswith("scontrol requeue"))
    for more, id in (({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}, "7_1")):
        said = subprocess.check_output(
            ["bash", "-uc", requeue.replace("scontrol", "echo")], text=True,
            env={"SLURM_JOB_ID": "7", **more},
        )  # fmt: skip
        assert said == f"requeue {id}\n"  # 7 alone would be all tasks of the array 7
    same = "launch.array=['optimizer.lr=1e-3','optimizer.lr=0.001']"
    assert "the same run as another task" in dry(*words[:3], same, status=2)
    wrong = "launch.array=['optimizer.lr=1e-3','optimizer.lr=0']"
    assert "launch.array, optimizer.lr=0: optimizer.lr=0.0 must be" in dry(
        *words[:3], wrong, status=2
    )


def test_nodes_of_several_kinds_are_one_job(dry: Dry) -> None:
    groups = (
        "launch.groups=[{num_nodes: 1, ranks_per_node: 4, partition: a},"
        "{num_nodes: 2, ranks_per_node: 2}]"
    )
    words = ["target=slurm", "cluster.gpus_per_node=4", "training.global_batch_tokens=1024"]
    script = dry(*words, groups)
    directives = script[: script.index("# Made by")]
    first, second = directives.split("#SBATCH hetjob\n")
    assert all(option in first for option in ("--partition=a", "--gpus-per-node=4", "--signal"))
    assert all(option in second for option in ("--nodes=2", "--gpus-per-node=2"))
    assert "--signal" not in second
    assert "--nnodes=3" in script
    assert 'gpus=$ranks port="$port"' in script  # of each node its own
    assert "srun --het-group=0 --nodes=1 --ntasks-per-node=1" in script
    assert 'bash -c "$train" node 2 "${words[@]}" &' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


NASTY = """name="a $HOME `id` it's \\"x\\" $$y $(PATH)\nz\""""
"""A run whose name holds whatever a shell or Kubernetes would act on."""


def test_words_reach_the_ranks_as_they_were_written(dry: Dry) -> None:
    assert NASTY in shlex.split(dry(NASTY))
    line = NASTY.replace("\n", " ")  # the name is in a path, which sbatch takes on one line
    assert line in words_of(dry("target=slurm", *CPU, line))[0]
    manifest = yaml.safe_load(dry(*KUBERNETES[:-1], NASTY))
    (group,) = manifest["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    read = re.sub(
        r"\$\$|\$\(PATH\)", lambda x: {"$$": "$"}.get(x[0], "/bin"), container["command"][2]
    )
    assert NASTY in shlex.split(read[read.index("-m llmtrain train ") :])
    assert manifest["metadata"]["name"] == "a-home-id-it-s-x-y-path-z"


@pytest.mark.parametrize(("name", "label"), [("2x16-ab", "run-2x16-ab"), ("_", "run")])
def test_a_service_of_kubernetes_begins_with_a_letter(dry: Dry, name: str, label: str) -> None:
    assert f"\n  name: {label}\n" in dry(*KUBERNETES[:-1], f"name={name}")


KUBERNETES = (
    "target=kubernetes", "cluster=infiniband", "cluster.num_nodes=2", "launch.image=me/llmtrain:1",
    "launch.volumes={scratch: /data}", "runs_dir=/data/runs", "data.sources.a=/data/stores/web",
    "training.global_batch_tokens=1024", "name='big one'",
)  # fmt: skip


def valid(value: object, name: str, part: str | None = None) -> None:
    """Refuse what the published schema refuses."""
    content = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.Draft202012Validator(content if part is None else content[part]).validate(value)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["launch.queue=q", "launch.service_account=s", "launch.secrets=[wandb]",
         "launch.node_selector={gpu: h100}", 'launch.resources={rdma/hca: "8"}',
         "cluster.memory_gib=900", "cluster.cpus_per_node=96",
         "launch.tolerations=[nvidia.com/gpu]"],
    ],
)  # fmt: skip
def test_a_jobset_is_what_the_schema_asks_for(dry: Dry, more: list[str]) -> None:
    manifest = yaml.safe_load(dry(*KUBERNETES, *more))
    valid(manifest, "jobset")
    (group,) = manifest["spec"]["replicatedJobs"]
    assert group["template"]["spec"]["parallelism"] == 2
    pod = group["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "scratch", "mountPath": "/data"} in container["volumeMounts"]
    assert ("envFrom" in container, "serviceAccountName" in pod) == (bool(more), bool(more))
    script = container["command"][2]
    assert "head=big-one-node-0-0.big-one\n" in script
    assert "run='/data/runs/big one'" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_jobset_fails_where_another_start_would_end_the_same_way(dry: Dry) -> None:
    spec = yaml.safe_load(dry(*KUBERNETES))["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (group,) = spec["replicatedJobs"]
    (rule,) = group["template"]["spec"]["podFailurePolicy"]["rules"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    hopeless = {reason.code for reason in ExitReason if reason.code in (2, NEEDS_A_PERSON)}
    assert set(rule["onExitCodes"]["values"]) == hopeless
    assert ExitReason.FAILED.code not in hopeless


def test_the_schema_of_a_jobset_notices_faults(dry: Dry) -> None:
    text = dry(*KUBERNETES)
    for old, new in (
        ("parallelism: 2", "parallelism: two"), ("restartPolicy", "restartPolice"),
        ("mountPath", "mountAt"), ("maxRestarts", "restarts"), ("  image:", "  imgae:"),
    ):  # fmt: skip
        assert old in text
        with pytest.raises(jsonschema.ValidationError):
            valid(yaml.safe_load(text.replace(old, new)), "jobset")


def test_a_task_of_skypilot_is_what_its_schema_asks_for(dry: Dry) -> None:
    task = yaml.safe_load(dry(
        "target=skypilot", "cluster=infiniband", "cluster.num_nodes=2", "launch.infra=aws",
        "launch.accelerators=H100:8", "launch.use_spot=true", "cluster.cpus_per_node=96",
        "launch.mounts={/runs: s3://bucket/runs}", "runs_dir=/runs",
        "training.global_batch_tokens=1024",
    ))  # fmt: skip
    valid(task, "skypilot", "task")
    valid(task["resources"], "skypilot", "resources")
    assert task["resources"]["accelerators"] == "H100:8"
    assert "node=$SKYPILOT_NODE_RANK\n" in task["run"]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    small = yaml.safe_load(dry("target=skypilot", "cluster=cpu"))
    valid(small["resources"], "skypilot", "resources")
    assert "accelerators" not in small["resources"]


def test_a_dry_run_takes_less_than_a_second_and_no_torch(store: Path) -> None:
    code = (
        "import sys, json, time; from llmtrain.cli import main; status = main(sys.argv[1:]);"
        "print(json.dumps([status, 'torch' in sys.modules, time.process_time()]))"
    )
    words = ["launch", "dry_run=true", "target=slurm", *CPU, *TINY, f"data.sources.a={store}"]
    bare = "import hydra, numpy, time; print(time.process_time())"
    best = 9.0
    for _ in range(5):  # other programs on the machine cost processor time too
        floor = float(subprocess.check_output([sys.executable, "-c", bare]))
        limit = max(1.0, 3.0 * floor)
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        status, with_torch, seconds = json.loads(done.stdout.splitlines()[-1])
        assert (status, with_torch) == (0, False)
        if (best := seconds) < limit:
            break
    assert best < limit
