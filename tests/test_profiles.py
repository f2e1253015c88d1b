"""Site profiles: what they may say, where they are found, and the batch script they become."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.slurm.slurm import _make_sbatch_string

from jobs.profiles import PROJECT_FOLDER, Profile, load_profile

ALL: dict[str, Any] = {
    "partition": "gpu,preemptible",
    "account": "lab",
    "qos": "high",
    "constraint": "a100|h100",
    "exclude": "node[03,17]",
    "nodelist": "node[1-9]",
    "gpus": 2,
    "gres": "lscratch:100",
    "cpus": 6,
    "mem": "48G",
    "time": "1-06:30:00",
    "nodes": 3,
    "tasks_per_node": 2,
    "array_parallelism": 5,
    "setup": ["module load cuda", "conda activate colddiff"],
    "python": "apptainer exec --nv image.sif python",
    "mail_user": "me@example.org",
    "mail_type": "FAIL,TIME_LIMIT",
    "signal_delay_s": 300,
    "max_requeues": 7,
    "sbatch": {"reservation": "summer school", "no-kill": True, "nice": 100},
    "srun_args": ["--mpi=none"],
}
"""Every field, none at its default."""


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No profile of whoever runs the tests is found."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "colddiff" / "profiles"
    folder.mkdir(parents=True)
    return folder


def profile(**values: Any) -> Profile:
    return Profile.from_dict(values)


def script(made: Profile, **more: Any) -> list[str]:
    return _make_sbatch_string("python", "/logs", **made.parameters("train"), **more).splitlines()


def options(made: Profile) -> set[str]:
    """What follows #SBATCH, but for the lines that submitit always writes of the logs."""
    own = ("--error=", "--output=", "--open-mode=")
    lines = [line.removeprefix("#SBATCH ") for line in script(made) if line.startswith("#SBATCH ")]
    return {line for line in lines if not line.startswith(own)}


DEFAULT = {
    "--cpus-per-task=8",
    "--gpus-per-node=1",
    "--job-name=train",
    "--mem=32G",
    "--nodes=1",
    "--ntasks-per-node=1",
    "--requeue",
    "--signal=USR2@120",
    "--time=240",
}


def test_the_default_asks_for_one_gpu_and_nothing_of_the_site() -> None:
    assert options(Profile()) == DEFAULT
    assert script(Profile())[-1] == (
        "srun --unbuffered --output /logs/%j_%t_log.out --error /logs/%j_%t_log.err "
        "--cpus-per-task=8 --kill-on-bad-exit=1 python"
    )
    assert load_profile("") == Profile()


def test_every_field_reaches_the_script() -> None:
    made = profile(**ALL)
    assert set(ALL) == {item.name for item in dataclasses.fields(Profile)}
    assert all(getattr(made, name) != getattr(Profile(), name) for name in ALL)
    assert options(made) == {
        "--partition=gpu,preemptible",
        "--account=lab",
        "--qos=high",
        "--constraint='a100|h100'",
        "--exclude='node[03,17]'",
        "--nodelist='node[1-9]'",
        "--gpus-per-node=2",
        "--gres=lscratch:100",
        "--cpus-per-task=6",
        "--mem=48G",
        "--time=1830",
        "--nodes=3",
        "--ntasks-per-node=2",
        "--mail-user=me@example.org",
        "--mail-type=FAIL,TIME_LIMIT",
        "--signal=USR2@300",
        "--reservation='summer school'",
        "--no-kill",
        "--nice=100",
        "--requeue",
        "--job-name=train",
    }
    text = script(made, map_count=30)
    assert "#SBATCH --array=0-29%5" in text
    setup = text.index("module load cuda")
    assert text[setup + 1] == "conda activate colddiff"
    assert "--cpus-per-task=6 --kill-on-bad-exit=1 --mpi=none python" in text[-1]
    assert setup < len(text) - 1


def test_submitits_executor_takes_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda _: 2))
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(**profile(**ALL).parameters("train"))
    text = executor._make_submission_file_text("python", "id")
    assert "#SBATCH --mem=48G\n" in text
    assert "wckey" not in text
    assert executor._num_tasks() == 6


def test_without_gpus_no_gpu_is_mentioned() -> None:
    made = profile(gpus=0, tasks_per_node=4)
    gpu = {"--gpus-per-node=1", "--ntasks-per-node=1"}
    assert options(made) == DEFAULT - gpu | {"--ntasks-per-node=4"}
    assert (made.gpus_per_node, made.processes_per_node) == (0, 4)
    assert profile(gpus=0).processes_per_node == 1


@pytest.mark.parametrize(
    ("gres", "gpus", "flags"),
    [
        ("gpu:a100:4", 4, {"--gres=gpu:a100:4"}),
        ("gpu:2", 2, {"--gres=gpu:2"}),
        ("gpu", 1, {"--gres=gpu"}),
        ("lscratch:5,gpu:h100:2", 2, {"--gres=lscratch:5,gpu:h100:2"}),
        ("lscratch:5", 1, {"--gres=lscratch:5", "--gpus-per-node=1"}),
    ],
)
def test_gpus_of_a_type_are_a_generic_resource(gres: str, gpus: int, flags: set[str]) -> None:
    made = profile(gres=gres)
    assert (made.gpus_per_node, made.processes_per_node) == (gpus, gpus)
    assert {line for line in options(made) if "gpu" in line or "gres" in line} == flags
    assert f"--ntasks-per-node={gpus}" in options(made)


def test_memory_for_each_core_or_gpu_replaces_that_of_the_node() -> None:
    for option in ("mem-per-cpu", "mem-per-gpu"):
        assert options(Profile().overridden([f"{option}=4G"])) == DEFAULT - {"--mem=32G"} | {
            f"--{option}=4G"
        }


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("89:01", 90),
        ("4:00:00", 240),
        ("0:00:30", 1),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("2-12:29:59", 3630),
        ("4:00", 4),  # Slurm means minutes and seconds
    ],
)
def test_times_as_slurm_writes_them(time: str, minutes: int) -> None:
    assert profile(time=time, signal_delay_s=1).minutes == minutes


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"time": "0"}, ("time = '0'", "at least a minute")),
        ({"time": "4h"}, ("time = '4h'", '"4:00:00"')),
        ({"time": "1-"}, ("time = '1-'",)),
        ({"time": "UNLIMITED"}, ("time = 'UNLIMITED'",)),
        ({"time": 90}, ("time = 90", "a text in quotes")),
        ({"time": "2"}, ("signal_delay_s = 120", "at most 119")),
        ({"signal_delay_s": 70_000, "time": "9-0"}, ("signal_delay_s = 70000", "at most 65535")),
        ({"signal_delay_s": 0}, ("signal_delay_s = 0", "at least 1")),
        ({"mem": "32 GB"}, ("mem = '32 GB'", '"32G"')),
        ({"mem": "1.5G"}, ("mem = '1.5G'",)),
        ({"mem": "-1"}, ("mem = '-1'",)),
        ({"gpus": -1}, ("gpus = -1", "at least 0")),
        ({"gpus": True}, ("gpus = True", "a whole number")),
        ({"gpus": "2"}, ("gpus = '2'", "a whole number")),
        ({"cpus": 0}, ("cpus = 0", "at least 1")),
        ({"cpus": 1.5}, ("cpus = 1.5", "a whole number")),
        ({"nodes": 0}, ("nodes = 0", "at least 1")),
        ({"array_parallelism": 0}, ("array_parallelism = 0", "at least 1")),
        ({"max_requeues": -1}, ("max_requeues = -1", "at least 0")),
        ({"tasks_per_node": -1}, ("tasks_per_node = -1", "at least 0")),
        ({"gpus": 2, "tasks_per_node": 3}, ("tasks_per_node = 3", "0 or 2")),
        ({"partition": "a\nb"}, ("partition = 'a\\nb'", "one line")),
        ({"setup": "module load cuda"}, ("setup = 'module load cuda'", "a list of texts")),
        ({"srun_args": [1]}, ("srun_args = (1,)", "a list of texts")),
        ({"mail_type": "FAIL,TIMELIMIT"}, ("mail_type", "STAGE_OUT", "mean 'TIME_LIMIT'")),
        ({"sbatch": "reservation=x"}, ("sbatch = 'reservation=x'", "a table")),
        ({"sbatch": {"nice": 1.5}}, ("sbatch = {'nice': 1.5}", "whole numbers")),
        ({"sbatch": {"no-kill": False}}, ("sbatch", "true for flags")),
        ({"sbatch": {"cpus-per-task": 3}}, ("cpus-per-task", "profile's cpus")),
        ({"sbatch": {"gpus": 3}}, ("option gpus", "profile's gpus")),
        ({"sbatch": {"array": "0-3"}}, ("option array", "array-parallelism")),
        ({"sbatch": {"b": "x"}}, ("'b'", "long name")),
        ({"sbatch": {}, "gpu": 1}, ("unknown key 'gpu'", "mean 'gpus'")),
        ({"cpus-per-task": 3}, ("unknown key 'cpus-per-task'", "mean 'cpus'")),
        ({"ntasks_per_node": 3}, ("unknown key 'ntasks_per_node'", "mean 'tasks_per_node'")),
        ({"timeout": "4:00:00"}, ("unknown key 'timeout'", "mean 'time'")),
        ({"gpus-per-node": 1}, ("unknown key 'gpus-per-node'", "mean 'gpus'")),
        ({"acount": "x"}, ("unknown key 'acount'", "mean 'account'")),
        ({"reservation": "x"}, ("unknown key 'reservation'", "[sbatch]")),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^\S") as caught:
        profile(**values)
    for word in words:
        assert word in str(caught.value)


def test_mail_types_are_slurms_in_any_case() -> None:
    assert "--mail-type=fail,end" in options(profile(mail_type="fail,end"))


# Files


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_users_profile_comes_before_the_projects(user_folder: Path) -> None:
    assert load_profile("gpu").partition == ""
    write(user_folder / "gpu.toml", 'partition = "mine"')
    assert load_profile("gpu") == profile(partition="mine")


def test_users_profiles_lie_in_their_home_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "colddiff" / "profiles"
    folder.mkdir(parents=True)
    write(folder / "home.toml", "cpus = 3")
    assert load_profile("home").cpus == 3
    write(tmp_path / "other.toml", "cpus = 5")
    assert load_profile("~/other.toml").cpus == 5


def test_a_path_is_a_path(
    tmp_path: Path, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(user_folder / "site.toml", "cpus = 1")
    write(tmp_path / "site.toml", "cpus = 2")
    write(tmp_path / "site", "cpus = 3")
    found = [load_profile(name).cpus for name in ("site", "site.toml", "./site")]
    assert found == [1, 2, 3]
    with pytest.raises(ValueError, match=r"'\./absent\.toml' is no file"):
        load_profile("./absent.toml")


def test_an_unknown_name_lists_the_known(user_folder: Path) -> None:
    write(user_folder / "mine.toml", "")
    known = "no profile 'gpuu'. Did you mean 'gpu'? Known are cpu, example, gpu, mine"
    with pytest.raises(ValueError, match=re.escape(known)) as caught:
        load_profile("gpuu")
    assert str(user_folder) in str(caught.value)
    assert str(PROJECT_FOLDER) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpus = 4\ngpus = = 2\n", ("line 2",)),
        ('cpus = "four"', ("cpus = 'four'",)),
        ("time = 04:00:00", ("time = ", "a text in quotes")),
        ('gpus = 2\ngres = "gpu:a100:2"', ("gpus = 2", "gres = 'gpu:a100:2'")),
        ("[sbatch]\nmem_per_cpu = 4.5", ("sbatch",)),
        ("caf\xe9 = 1", ("",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(
    text: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: ")) as caught:
        load_profile(str(path))
    for word in words:
        assert word in str(caught.value)


def test_a_table_of_sbatch_options_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", '[sbatch]\nwckey = "x"\nno_kill = true\nnice = 5\n')
    assert options(load_profile(str(path))) == DEFAULT | {"--wckey=x", "--no-kill", "--nice=5"}


def test_the_shipped_profiles() -> None:
    assert {path.name for path in PROJECT_FOLDER.iterdir()} == {
        "cpu.toml",
        "gpu.toml",
        "example.toml",
    }
    assert load_profile("gpu") == Profile()
    assert not [line for line in options(load_profile("cpu")) if "gpu" in line or "gres" in line]


def test_the_example_has_every_key_at_its_default() -> None:
    assert load_profile("example") == Profile()
    text = (PROJECT_FOLDER / "example.toml").read_text()
    keys = re.findall(r"^\[?(\w+)(?: =|\])", text, re.MULTILINE)
    assert sorted(keys) == sorted(item.name for item in dataclasses.fields(Profile))


# Overrides


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("partition=high", "partition", "high"),
        ("--partition=high", "partition", "high"),
        ("p=high", "partition", "high"),
        ("partition=", "partition", ""),
        ("constraint=a=b", "constraint", "a=b"),
        ("gpus=2", "gpus", 2),
        ("gpus-per-node=2", "gpus", 2),
        ("cpus-per-task=2", "cpus", 2),
        ("c=2", "cpus", 2),
        ("mem=8G", "mem", "8G"),
        ("time=90", "time", "90"),
        ("nodes=2", "nodes", 2),
        ("N=2", "nodes", 2),
        ("array-parallelism=2", "array_parallelism", 2),
        ("array_parallelism=2", "array_parallelism", 2),
        ("signal-delay-s=60", "signal_delay_s", 60),
        ("setup=module load x", "setup", ("module load x",)),
        ("reservation=x", "sbatch", {"reservation": "x"}),
        ("mem_per_cpu=4G", "sbatch", {"mem-per-cpu": "4G"}),
        ("no-kill", "sbatch", {"no-kill": True}),
    ],
)
def test_an_override_changes_one_field(option: str, name: str, value: Any) -> None:
    before = profile(partition="low")
    after = before.overridden([option])
    assert getattr(after, name) == value
    assert type(getattr(after, name)) is type(value)
    assert after == dataclasses.replace(before, **{name: value})


def test_overrides_together_and_on_a_loaded_profile() -> None:
    assert load_profile("cpu", ["ntasks-per-node=2"]).processes_per_node == 2
    made = Profile().overridden(["time=1", "signal-delay-s=10", "setup=a", "setup=b", "cpus=1"])
    assert (made.minutes, made.setup, made.cpus) == (1, ("a", "b"), 1)
    assert profile(setup=["a"]).overridden(["setup="]).setup == ()
    table = profile(sbatch={"reservation": "x", "no-kill": True})
    assert table.overridden(["reservation=", "nice=5"]).sbatch == {"no-kill": True, "nice": "5"}
    assert table.sbatch == {"reservation": "x", "no-kill": True}
    assert profile(gpus=4).overridden(["gres=gpu:a100:2"]).gpus_per_node == 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("gpus=a100:2", ("gpus = 'a100:2'", "a whole number")),
        ("gpus=--2", ("gpus = '--2'",)),
        ("cpus=0", ("cpus = 0", "at least 1")),
        ("time=soon", ("time = 'soon'",)),
        ("mem=lots", ("mem = 'lots'",)),
        ("partition", ("partition", "needs a value")),
        ("z=1", ("'z'", "long name")),
        ("array=0-3", ("array-parallelism",)),
        ("output=x", ("output", "logs")),
        ("error=x", ("error", "logs")),
        ("open-mode=append", ("open-mode", "log")),
        ("signal=USR1@60", ("signal-delay-s",)),
        ("requeue", ("max-requeues",)),
        ("no-requeue", ("max-requeues",)),
        ("dependency=afterok:1", ("chains",)),
        ("job-name=x", ("comment",)),
        ("job_name=x", ("comment",)),
        ("ntasks=4", ("tasks-per-node",)),
        ("parsable", ("sbatch",)),
    ],
)
def test_what_cannot_be_overridden_is_said(option: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="^--sbatch") as caught:
        Profile().overridden([option])
    for word in words:
        assert word in str(caught.value)


def test_gpus_cannot_be_given_beside_those_in_gres() -> None:
    made = profile(gres="gpu:a100:4")
    with pytest.raises(ValueError, match=re.escape("gres = 'gpu:a100:4'")):
        made.overridden(["gpus=2"])
    assert made.overridden(["gres=", "gpus=2"]).gpus_per_node == 2


@pytest.mark.parametrize(
    ("gres", "one"),
    [
        ("", ""),
        ("gpu", "gpu"),
        ("gpu:4", "gpu:1"),
        ("gpu:a100:4", "gpu:a100:1"),
        ("lscratch:100,gpu:a100:4", "lscratch:100,gpu:a100:1"),
    ],
)
def test_what_cannot_be_shared_gets_one_process(gres: str, one: str) -> None:
    made = profile(gres=gres, nodes=3)
    assert (made.single.gres, made.single.nodes) == (one, 1)
    assert made.single.processes_per_node == 1
    several = profile(gpus=0 if gres else 4, gres=gres, tasks_per_node=0)
    assert several.single.processes_per_node == 1


def test_ranks_of_a_node_do_not_keep_a_profile_from_being_single() -> None:
    made = profile(gpus=4, tasks_per_node=4)
    assert (made.single.gpus, made.single.processes_per_node) == (1, 1)


# Keeping


def test_a_profile_survives_json() -> None:
    for made in (Profile(), profile(**ALL)):
        assert Profile.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert profile(**ALL).to_dict() == ALL


def test_profiles_are_fixed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Profile().cpus = 3  # type: ignore[misc]
    assert hash(profile(**ALL)) == hash(profile(**ALL))
