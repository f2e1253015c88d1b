"""Studies: what they are made of, and that they are created once and opened by many."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tiny import replaced, tiny

from colddiff.config import GenerationConfig
from colddiff.presets import preset
from sweeps.samplers import build_pruner
from sweeps.space import SpaceName, reference, suggest
from sweeps.study import StudyConfig, create_study, defining, open_study, read_study


def small(runs: Path, **changes: Any) -> StudyConfig:
    settings: dict[str, Any] = {"name": "s", "base": tiny(), "runs": str(runs), "trials": 10}
    return StudyConfig(**(settings | changes))


def run_trials(study: optuna.Study, config: StudyConfig, count: int) -> list[dict[str, Any]]:
    """Trials with a value made up from their parameters."""
    for _ in range(count):
        trial = study.ask()
        suggest(config.space, trial, config.base, config.keep)
        number = float(len(str(sorted(trial.params.items()))))
        study.tell(trial, [number] * len(study.directions))
    return [trial.params for trial in study.trials]


def test_configurations_come_back_from_json(tmp_path: Path) -> None:
    config = small(
        tmp_path,
        space="paper",
        objective="pareto",
        generation=GenerationConfig(n=9, seed=2),
        base=replaced(tiny(), "evaluation", levels=("4-0",)),
    )
    assert StudyConfig.from_json(config.to_json()) == config
    assert config.sampler == "nsga2"
    assert small(tmp_path).sampler == "tpe"
    assert config.folder == tmp_path / "studies/s"
    assert config.storage_url == f"journal://{tmp_path}/studies/s/journal.log"
    values = json.loads(config.to_json())
    with pytest.raises(ValueError, match=r"unknown field 'sampelr'. Did you mean 'sampler'"):
        StudyConfig.from_json(json.dumps(values | {"sampelr": "tpe"}))
    with pytest.raises(ValueError, match="not a study"):
        StudyConfig.from_json("{")


def test_the_runs_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert StudyConfig(base=tiny()).runs == str(tmp_path / "runs")


NO_VALIDATION = replaced(tiny(), "data", validation=0)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "../other"}, "name = '../other' is not allowed"),
    ({"name": ""}, "name = '' is not allowed"),
    ({"space": "shedule"}, "space = 'shedule' is not allowed: it must be one of schedule, steps"),
    ({"objective": "fid"}, "one of restoration, direct, generation, pareto"),
    ({"sampler": "cmaes"}, "one of auto, tpe, gp, nsga2, random, grid"),
    ({"trials": 0}, "trials = 0 is not allowed: it must be at least 1"),
    ({"seed": -1}, "seed = -1"),
    ({"base": NO_VALIDATION}, "base.data.validation = 0 is not allowed: it must be at least 1"),
    (
        {"base": replaced(tiny(), "data", name="fashion-mnist"), "objective": "generation"},
        "base.data.name = 'fashion-mnist' is not allowed: it must be digits or mnist",
    ),
    (
        {"objective": "generation", "generation": GenerationConfig(n=100, levels="4-0")},
        "generation.levels = '4-0' is not allowed",
    ),
    ({"objective": "generation", "generation": GenerationConfig(n=1)}, "generation.n = 1"),
    ({"objective": "direct", "space": "levels"}, "one that trains networks, for direct"),
    ({"objective": "direct", "base": NO_VALIDATION}, "at least 1 for the objective direct"),
    (
        {"space": "recipe", "keep": ("width",)},
        "keep = 'width' is not allowed: it must be one of lr",
    ),
    ({"objective": "pareto", "space": "recipe"}, "one that varies the network calls"),
    ({"objective": "pareto", "pruner": "median"}, "Optuna prunes with one objective only"),
    ({"space": "levels", "pruner": "median"}, "none for the space levels: its trials do not train"),
    (
        {"base": replaced(tiny(), "training", validate_every=0), "pruner": "hyperband"},
        "pruner = 'hyperband' is not allowed: it must be none for a base with",
    ),
    (
        {"base": NO_VALIDATION, "objective": "generation", "pruner": "median"},
        "none for a base without data.validation images",
    ),
    ({"base": replaced(tiny(), "degradation", kind="noise")}, "blur for the space schedule"),
    ({"storage": "sqlite:///s.db"}, "SQLite's locks do not hold on network file systems"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(tmp_path, **changes)


def test_a_study_begins_with_the_reference(tmp_path: Path) -> None:
    config = small(tmp_path)
    study = create_study(config)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING]
    worker = open_study(config, 3)
    trial = worker.ask()
    assert trial.number == 0
    assert suggest("schedule", trial, config.base).run_id == config.base.run_id
    assert trial.params == reference("schedule", config.base)
    assert study.user_attrs["value_names"] == ["sampled RMSE (validation)"]
    assert study.user_attrs["config"]["base"]["degradation"]["sigma"] == 2.0
    assert read_study(tmp_path, "s") == config
    with pytest.raises(ValueError, match="there is no study 'other' in"):
        read_study(tmp_path, "other")


def test_what_is_kept_is_in_no_trial_and_defines_the_study(tmp_path: Path) -> None:
    config = small(tmp_path, space="recipe", keep=("dim", "lr"))
    create_study(config)
    create_study(small(tmp_path, space="recipe", keep=("lr", "dim", "lr")))  # is the same
    trials = run_trials(open_study(config, 0), config, 6)
    assert all(params.keys() == {"loss", "lr_schedule", "ema_decay"} for params in trials)
    with pytest.raises(ValueError, match="keep: .* there, 'nothing' here"):
        create_study(small(tmp_path, space="recipe"))
    assert "keep" not in defining(small(tmp_path))  # studies that are older than it go on


def test_directions_are_the_objectives(tmp_path: Path) -> None:
    for changes, expected in (
        ({"metric": "ssim"}, ["MAXIMIZE"]),
        ({"objective": "generation"}, ["MINIMIZE"]),
        ({"objective": "pareto"}, ["MINIMIZE", "MINIMIZE"]),
    ):
        study = create_study(small(tmp_path, name=f"s{len(str(changes))}", **changes))  # type: ignore[arg-type]
        assert [direction.name for direction in study.directions] == expected


def test_the_same_study_is_found_and_may_be_extended(tmp_path: Path) -> None:
    config = small(tmp_path, space="recipe")
    create_study(config)
    run_trials(open_study(config, 0), config, 2)
    longer = dataclasses.replace(config, trials=99)
    assert len(create_study(longer).trials) == 2
    assert read_study(tmp_path, "s").trials == 99


@pytest.mark.parametrize("forgotten", ["nothing", "study.json", "the trials' store"])
def test_a_different_study_of_that_name_is_refused(forgotten: str, tmp_path: Path) -> None:
    """Whichever of its two records is left."""
    config = small(tmp_path)
    create_study(config)
    if forgotten == "study.json":
        config.file.unlink()
    elif forgotten != "nothing":
        (config.folder / "journal.log").unlink()
    other = small(tmp_path, sampler="gp", base=replaced(tiny(), "degradation", sigma=3.0))
    message = (
        r"different study 's' already \(base.degradation.sigma: 2.0 there, 3.0 here; "
        r"sampler: 'tpe' there, 'gp' here\): give this one another name"
    )
    with pytest.raises(ValueError, match=message):
        create_study(other)


def test_a_study_of_recipes_is_also_defined_by_the_levels_it_samples(tmp_path: Path) -> None:
    for space, allowed in (("recipe", False), ("schedule", True)):
        config = small(tmp_path, name=space, space=space)
        create_study(config)
        base = replaced(tiny(), "evaluation", levels=("4-0",))
        other = dataclasses.replace(config, base=base)
        if allowed:
            create_study(other)
        else:
            with pytest.raises(ValueError, match="sampled"):
                create_study(other)


def test_what_was_killed_between_its_steps_is_completed(tmp_path: Path) -> None:
    config = small(tmp_path)
    create_study(config)
    journal = config.folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        config.file.unlink(missing_ok=True)
        journal.write_bytes(b"".join(lines[:kept]))
        study = create_study(config)
        assert [trial.state for trial in study.trials] == [TrialState.WAITING]
        assert open_study(config, 0).ask().number == 0


def test_a_study_keeps_its_storage(tmp_path: Path) -> None:
    """Else the same command without --storage would begin it anew, beside its workers."""
    kept = small(tmp_path, storage=str(tmp_path / "elsewhere.log"))
    create_study(kept)
    with pytest.raises(ValueError, match="the trials of the study 's' are in journal://"):
        create_study(small(tmp_path))
    assert StudyConfig.from_json(kept.file.read_text()) == kept
    assert not (kept.folder / "journal.log").exists()


def test_paths_of_storages_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, kept in (
        ("trials.log", f"journal://{tmp_path}/trials.log"),
        ("sqlite:///s.db", f"sqlite:///{tmp_path}/s.db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("", ""),
    ):
        assert small(tmp_path, storage=given, one_machine=True).storage == kept


def test_a_study_belongs_to_one_folder_of_runs(tmp_path: Path) -> None:
    """Whose leases say who works on which trial: others would take live trials for orphans."""
    shared = str(tmp_path / "shared.log")
    create_study(small(tmp_path / "ann", storage=shared))
    with pytest.raises(ValueError, match="belongs to another folder of runs"):
        create_study(small(tmp_path / "ben", storage=shared))
    create_study(small(tmp_path / "ann", storage=shared))


def test_a_study_does_not_shrink(tmp_path: Path) -> None:
    config = small(tmp_path, trials=9)
    create_study(config)
    with pytest.raises(ValueError, match="trials = 8 is not allowed: 9 are wanted"):
        create_study(dataclasses.replace(config, trials=8))
    create_study(dataclasses.replace(config, trials=10))
    assert StudyConfig.from_json(config.file.read_text()).trials == 10


def test_a_study_must_be_created_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no study 's' in its storage: create it before"):
        open_study(small(tmp_path), 0)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_workers_sample_differently_and_again_after_a_restart(sampler: Any, tmp_path: Path) -> None:
    """The same worker at the same point of a study suggests the same."""
    config = small(tmp_path, sampler=sampler, space="recipe")
    create_study(config)
    run_trials(open_study(config, 0), config, 1)
    suggested = []
    together = [open_study(config, worker) for worker in (0, 1)]
    for study in (*together, None):
        trial = (study or open_study(config, 1)).ask()
        suggest("recipe", trial, config.base)
        suggested.append(trial.params["lr"])
    assert len(set(suggested)) == 3
    again = dataclasses.replace(config, name="again")
    create_study(again)
    run_trials(open_study(again, 0), again, 1)
    trial = open_study(again, 0).ask()
    suggest("recipe", trial, again.base)
    assert trial.params["lr"] == suggested[0]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
@pytest.mark.parametrize("space", ["levels", "recipe"])
def test_samplers_go_on_after_their_random_start(
    sampler: Any, space: SpaceName, tmp_path: Path
) -> None:
    """Without a warning, inside the space."""
    config = small(tmp_path, sampler=sampler, space=space, trials=20)
    create_study(config)
    worker = open_study(config, 0)
    assert len(run_trials(worker, config, 14)) == 14
    if sampler == "nsga2":
        assert worker.sampler.population_size == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "gp", "random"])
def test_samplers_of_several_objectives(sampler: Any, tmp_path: Path) -> None:
    config = small(tmp_path, sampler=sampler, space="levels", objective="pareto")
    create_study(config)
    run_trials(open_study(config, 0), config, 13)
    assert open_study(config, 0).best_trials


def test_a_grid_is_visited_whole_by_workers_that_ask_and_tell(tmp_path: Path) -> None:
    config = small(tmp_path, sampler="grid", space="levels", trials=17)
    create_study(config)
    params: list[dict[str, Any]] = []
    for worker in range(17):
        params = run_trials(open_study(config, worker), config, 1)
    visited = {tuple(sorted(each.items())) for each in params}
    assert len(params) == 17
    assert len(visited) == 4 * 4
    with pytest.raises(ValueError, match=r"trials = 18 .* at most 17: the grid's 16 points"):
        create_study(dataclasses.replace(config, trials=18))


def test_hyperband_stops_the_worse_and_none_stops_nothing(tmp_path: Path) -> None:
    base = replaced(preset("demo"), "training", validate_every=100)
    for pruner in ("hyperband", "median", "none"):
        config = StudyConfig(
            name=pruner, base=base, pruner=pruner, space="recipe", sampler="random",  # type: ignore[arg-type]
            runs=str(tmp_path),
        )  # fmt: skip
        create_study(config)
        study = open_study(config, 0)
        pruned = []
        for k in range(12):
            trial = study.ask()
            suggest("recipe", trial, config.base)
            for step in range(100, 1300, 100):
                trial.report(0.1 + 0.01 * k, step)
                if trial.should_prune():
                    pruned.append((k, step))
                    break
            study.tell(trial, 0.1, skip_if_finished=True)
        assert bool(pruned) is (pruner != "none")
        if pruner == "median":  # five trials first, and a fifth of the training
            assert min(k for k, _ in pruned) >= 5
            assert min(step for _, step in pruned) >= 240
        assert not any(k == 0 for k, _ in pruned)


def test_pruners_fit_the_training(tmp_path: Path) -> None:
    hyperband = build_pruner(small(tmp_path, pruner="hyperband"))
    assert (hyperband._min_resource, hyperband._max_resource) == (10, 30)  # type: ignore[attr-defined]


CREATOR = """
    import sys
    from pathlib import Path
    from sweeps.study import StudyConfig, create_study

    create_study(StudyConfig.from_json(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.parametrize("scheme", ["journal", "sqlite"])
def test_several_launchers_create_one_study(scheme: str, tmp_path: Path) -> None:
    sqlite = {"storage": f"sqlite:///{tmp_path}/s.db", "one_machine": True}
    config = small(tmp_path, **(sqlite if scheme == "sqlite" else {}))
    (tmp_path / "wanted.json").write_text(config.to_json())
    command = [sys.executable, "-c", textwrap.dedent(CREATOR), str(tmp_path / "wanted.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [each.wait(120) for each in processes] == [0] * 4
    assert len(open_study(config, 0).trials) == 1


def test_importing_a_studys_configuration_is_quick() -> None:
    """It is what the command line's --help needs."""
    code = "import sys, sweeps.study; print([m for m in ('torch', 'optuna') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
