"""The command line as its users have it: real commands, odd input, a second run, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import replaced, tiny
from tracked_runs import fresh_store

from colddiff.config import RunConfig
from colddiff.files import write_json
from colddiff.journal import read_records
from colddiff.presets import labelled, preset
from colddiff.run_folder import RunFolder
from jobs.launch import base_config, main
from jobs.status import find_runs, row
from jobs.tasks import AlreadyRunningError, claim, is_claimed

ROOT = Path(__file__).parent.parent
Launch = Callable[..., int]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration file; nothing outside it is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = replaced(tiny(steps=12, validate_every=6), "evaluation", samples=20, images=12)
    (tmp_path / "tiny.json").write_text(config.to_json())
    return tmp_path


@pytest.fixture
def with_store(place: Path) -> None:
    """MLflow's database is there already, as after a first launch."""
    fresh_store(place)


def the_run(place: Path) -> RunFolder:
    (folder,) = find_runs(place / "runs", ())
    return folder


def found(said: str, name: str) -> str:
    """What a launch's table says it found of a run."""
    (line,) = [line for line in said.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split(maxsplit=1)[1]


def train(*extra: str) -> int:
    return main(["train", "--config", "tiny.json", "--cluster", "debug", *extra])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, jobs.launch\n"
        "try: jobs.launch.main(['train', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'mlflow', 'sklearn', 'pandas', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--degradation.T", "--seeds", "--data-root", "mnist-student", "default: 20"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--preset", "mnits"], "Did you mean 'mnist'"),
        (["train", "--config", "absent.json"], "'absent.json' is no file"),
        (["train", "--degradation.T", "0"], "degradation.T = 0 is not allowed"),
        (["train", "--degradation.kernel-sise", "3"], "--degradation.kernel-size"),
        (["train", "--preset", "mnist", "--data-root", "nowhere"], "nowhere/MNIST/raw"),
        pytest.param(
            ["train", "--training.device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (["trian"], "train"),
        (["evaluate", "absent"], "'absent' names no run"),
        (["evaluate"], "no trained run below runs"),
        (["generate", "--levels", "3-x"], "3-x"),
        (["status", "absent"], "'absent' names no run"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    assert code == 2
    assert said in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in place.iterdir()) == ["tiny.json"]


def test_preset_and_config_give_the_defaults_of_the_other_options() -> None:
    config, rest = base_config(["train", "--preset=mnist", "--training.steps", "5"])
    assert (config.preset, config.degradation.T, config.data.name) == ("mnist", 20, "mnist")
    assert rest == ["train", "--training.steps", "5"]


def test_train_evaluate_and_a_second_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    assert train() == 0
    folder = the_run(place)
    assert folder.is_trained and folder.evaluation.exists()
    assert row(folder).state == "evaluated"
    said = capfd.readouterr().out
    assert found(said, folder.path.name) == "new" and "mlflow ui --backend-store-uri" in said
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("colddiff")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["degradation.T"] == "4"
    kinds = json.loads(folder.evaluation.read_text())["kinds"]
    assert run.data.metrics["eval/direct/rmse"] == kinds["direct"]["rmse"]
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    journal = [r for r in read_records(folder.journal)[0] if "train/loss" in r.metrics]
    assert [(m.step, m.value, m.timestamp) for m in losses] == [
        (r.step, r.metrics["train/loss"], r.timestamp_ms) for r in journal
    ]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "evaluation.json", "ema.safetensors", "samples"} <= names
    before = folder.journal.read_bytes(), folder.evaluation.read_bytes()
    assert train() == 0
    assert found(capfd.readouterr().out, folder.path.name) == "complete"
    assert (folder.journal.read_bytes(), folder.evaluation.read_bytes()) == before
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.usefixtures("with_store")
def test_evaluate_generate_status_and_sync(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("--no-evaluate") == 0
    folder = the_run(place)
    assert not folder.evaluation.exists()
    assert main(["evaluate", "--cluster", "debug", "--evaluation.levels", "4-2-0"]) == 0
    assert "sampled[4-2-0]" in json.loads(folder.evaluation.read_text())["kinds"]
    name = folder.path.name[:12]  # the beginning of a name is enough
    assert main(["generate", name, "--n", "7", "--cluster", "debug"]) == 0
    (made,) = folder.samples.glob("generated-*.npz")
    assert np.load(made)["images"].shape == (7, 16, 16, 1)
    assert main(["generate", name, "--levels", "20-0", "--cluster", "debug"]) == 2
    capfd.readouterr()
    assert main(["status"]) == 0
    table = capfd.readouterr().out
    assert folder.path.name in table and "12/12" in table and "direct RMSE" in table
    assert main(["sync"]) == 0
    assert main(["sync"]) == 0
    assert "0 metric values and 0 artifacts sent" in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("with_store")
def test_evaluate_goes_back_to_what_is_asked_for(place: Path) -> None:
    """A value that equals the default was still asked for."""
    assert train("--no-evaluate") == 0
    folder = the_run(place)
    asked = ["evaluate", "--cluster", "debug", "--evaluation.samples"]
    assert main([*asked, "15", "--evaluation.split", "train"]) == 0
    assert main([*asked, "30", "--evaluation.split", "test"]) == 0
    done = json.loads(folder.evaluation.read_text())
    assert (done["split"], done["samples"]) == ("test", 30)
    assert folder.config.evaluation.images == 12  # not asked for: as the run has it


@pytest.mark.usefixtures("with_store")
def test_a_renamed_run_folder_is_still_that_run(place: Path) -> None:
    assert train("--no-evaluate") == 0
    folder = the_run(place)
    folder.path.rename(place / "runs" / "mine")
    assert main(["evaluate", "mine", "--cluster", "debug"]) == 0
    assert (place / "runs/mine/evaluation.json").exists()
    assert not folder.path.exists()


@pytest.mark.usefixtures("no_backoff")
def test_a_dead_tracking_server_stops_no_training(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dead = ["--tracking-uri", "http://127.0.0.1:9"]
    assert train(*dead, "--no-evaluate") == 0
    assert the_run(place).is_trained
    assert "The runs go on" in capfd.readouterr().out
    assert main(["sync", *dead]) == 1
    captured = capfd.readouterr()
    assert "error: " in captured.err and "Traceback" not in captured.err
    assert main(["sync"]) == 0  # the default store takes the whole record
    assert "metric values" in capfd.readouterr().out


def test_an_overridden_preset_does_not_carry_its_name(place: Path) -> None:
    overridden = ["--preset", "demo", "--model.dim", "4", "--training.steps", "60"]
    assert main(["train", *overridden, "--dry-run"]) == 0
    assert labelled(preset("demo")).preset == "demo"
    seed = replaced(preset("demo"), "training", seed=5)
    assert labelled(seed).preset == "demo"
    assert labelled(replaced(seed, "model", dim=4)).preset == "demo (changed)"


@pytest.mark.usefixtures("with_store")
def test_sync_settles_runs_whose_process_is_gone(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    new = RunFolder.create(place / "runs", tiny(seed=9))
    assert train("--no-evaluate") == 0
    folder = next(f for f in find_runs(place / "runs", ()) if f.path != new.path)
    folder.write_status("running", 5, 12)  # as a kill -9 leaves it
    assert main(["sync"]) == 0
    assert f"{new.path.name}: not started yet" in capfd.readouterr().out
    (run,) = MlflowClient(f"sqlite:///{place}/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED"


def test_dry_run_makes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("--dry-run", "--seeds", "1", "2") == 0
    assert capfd.readouterr().out.count("  train  new") == 2
    assert sorted(path.name for path in place.iterdir()) == ["tiny.json"]


@pytest.mark.usefixtures("with_store")
def test_a_run_that_somebody_works_on_is_left_alone(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.from_json((place / "tiny.json").read_text())
    folder = RunFolder.create(place / "runs", config)
    code = (
        "import sys; from pathlib import Path; from colddiff.run_folder import RunFolder;"
        "from jobs.tasks import claim; lock = claim(RunFolder(Path(sys.argv[1])));"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert is_claimed(folder)
    with pytest.raises(AlreadyRunningError, match="another process"):
        claim(folder, timeout_s=0.1)
    assert train() == 0
    assert found(capfd.readouterr().out, folder.path.name) == "running"
    assert not folder.journal.exists()
    holder.kill()  # a lock dies with its process
    holder.communicate()
    assert not is_claimed(folder)


def test_status_tells_a_run_whose_process_is_gone(place: Path) -> None:
    config = RunConfig.from_json((place / "tiny.json").read_text())
    folder = RunFolder.create(place / "runs", config)
    assert row(folder).state == "new"
    folder.write_status("running", 5, 12)
    assert row(folder).state == "interrupted"
    assert "5/12" in row(folder).cells()


@pytest.mark.usefixtures("with_store")
def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_does(place: Path) -> None:
    config = tiny(steps=4000, checkpoint_every=4000, validate_every=0)
    (place / "tiny.json").write_text(config.to_json())
    command = [
        *(sys.executable, str(ROOT / "jobs/launch.py"), "train", "--config", "tiny.json"),
        *("--cluster", "debug", "--no-evaluate"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE)
    journal = place / "runs" / config.run_id / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "stopped by SIGINT" in output and "The same command goes on" in output
    assert "Traceback" not in output
    status = the_run(place).status()
    assert status is not None and status.state == "interrupted"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    short = replaced(config, "training", steps=config.training.steps)
    assert short.run_id == config.run_id  # the same command means the same run
    process = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and the_run(place).status() == status:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    attempts = json.loads(the_run(place).environment.read_text())["attempts"]
    assert [a["resumed_from_step"] for a in attempts] == [0, status.step]


def test_local_jobs_go_on_in_the_background_one_after_the_other(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "tiny.json", "--seeds", "0", "1"]
    assert main(words) == 0
    folders = find_runs(place / "runs", ())
    assert len(folders) == 2
    capfd.readouterr()
    assert main([*words, "--wait"]) == 0  # which finds them queued or running, and follows
    assert "new" not in capfd.readouterr().out
    assert [row(folder).state for folder in folders] == ["evaluated", "evaluated"]
    first, second = (f.status() for f in folders)
    assert first is not None and second is not None
    attempts = [json.loads(f.environment.read_text())["attempts"] for f in folders]
    assert [len(each) for each in attempts] == [1, 1]
    starts = [each[0]["started_ms"] for each in attempts]
    assert starts[1] > first.updated_ms or starts[0] > second.updated_ms


def test_status_shows_rate_and_time_left_of_a_running_run(place: Path) -> None:
    config = RunConfig.from_json((place / "tiny.json").read_text())
    folder = RunFolder.create(place / "runs", config)
    write_json(
        folder.path / "status.json",
        {"state": "running", "step": 4, "steps": 12, "message": "", "updated_ms": 0},
    )
    line = {"step": 4, "timestamp_ms": 1, "metrics": {"speed/images_per_second": 0.5}}
    folder.journal.write_text(json.dumps(line) + "\n")
    with claim(folder):
        shown = row(folder)
    assert shown.state == "running"
    assert shown.seconds_left == pytest.approx(8 * 8 / 0.5)
    assert shown.cells()[4:6] == ("0", "2min")


@pytest.mark.parametrize("option", ["--at-once", "--ranks"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_impossible_numbers_of_local_jobs_are_refused_in_time(
    option: str, more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--preset", "demo", "--runs", str(tmp_path / "runs"), option, "-2", *more]
    assert main(words) == 2
    name = option.strip("-").replace("-", "_")
    assert f"error: {name} = -2 is not allowed" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "gpu"], "--profile is not allowed with --cluster local"),
        (["--sbatch", "time=1"], "--sbatch is not allowed with --cluster local"),
        (["--cluster", "debug", "--ranks", "2"], "--ranks is not allowed with --cluster debug"),
        (["--cluster", "slurm", "--at-once", "2"], "on Slurm the profile says how many GPUs"),
    ],
)
def test_options_of_another_cluster_are_refused(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path / "runs"), "--offline"]
    assert main(["train", "--preset", "demo", *runs, *words]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "runs" / "jobs.jsonl").exists()
