"""Where tasks run: in this process (debug), as this machine's background jobs (local), on Slurm."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs import slurm
from jobs.tasks import AnyTask

if TYPE_CHECKING:
    from jobs.pack import PackedTask
    from jobs.profiles import Profile

Cluster = Literal["local", "slurm", "debug"]


@dataclass(frozen=True)
class Submitted:
    """A submitted job and where its output goes."""

    job_id: str
    stdout: Path
    stderr: Path
    script: Path | None = None
    """The batch script."""


def run_here(tasks: Sequence[Callable[[], str]]) -> list[str]:
    """Run the tasks in this process, in order; exceptions and Ctrl-C come through untouched.

    submitit's DebugExecutor is not used: it opens a debugger on exceptions, which hangs where
    nobody sits at a terminal.
    """
    return [task() for task in tasks]


@dataclass(frozen=True)
class SlurmJobs:
    """Jobs of one kind for Slurm, as arrays: one element a task."""

    tasks: Sequence[AnyTask | PackedTask]
    profile: Profile
    folder: Path
    """Of submitit's pickles, and of the logs."""
    code: Path | None = None
    """The code snapshot to run from; None for the installed one."""
    dependency: str = ""
    """As ``sbatch --dependency``; never satisfiable ones end the job."""

    def scripts(self) -> list[str]:
        """The batch scripts, one an array."""
        made = []
        for part in self._parts():
            executor = self._executor()
            if len(part) > 1:
                executor.parameters["map_count"] = len(part)
            # submitit shows no script before it submits it: these two are its own way to make one.
            command = executor._submitit_command_str
            made.append(executor._make_submission_file_text(command, "preview"))
        return made

    def verdicts(self) -> list[str]:
        """What Slurm says to each script: when it would start. Raises ``RefusedError``."""
        self._refuse_endless_wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        said = []
        for text in self.scripts():
            with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".sh") as script:
                script.write(text)
                script.flush()
                said.append(slurm.try_submission(Path(script.name)))
        return said

    def _refuse_endless_wait(self) -> None:
        """Many sites accept a time limit above the partition's, and let the job wait for ever."""
        from jobs.profile_values import to_minutes

        partitions = self.profile.partition.split(",")
        limits = {name: slurm.time_limit(name) for name in partitions}
        most = [to_minutes(limit) for limit in limits.values()]
        if all(minutes is not None and self.profile.minutes > minutes for minutes in most):
            listed = ", ".join(f"{name or 'default'}: {limit}" for name, limit in limits.items())
            raise slurm.RefusedError(
                f"time = {self.profile.time!r} is above the limit of the partition ({listed}): "
                "the job would wait for ever. The run resumes after its time limit, so a shorter "
                "one will do"
            )

    def submit(self) -> Iterator[list[tuple[AnyTask | PackedTask, Submitted]]]:
        """Hand them to Slurm, array by array: what was yielded is submitted, come what may.

        Raises:
            slurm.RefusedError: where Slurm refuses, in its own words.
        """
        import submitit

        for part in self._parts():
            executor = self._executor()
            try:
                with executor.batch():
                    jobs = [executor.submit(task) for task in part]
            except submitit.core.utils.FailedJobError as error:
                raise slurm.RefusedError(
                    f"Slurm refuses the jobs: {slurm.words(str(error))}"
                ) from None
            submitted = [
                Submitted(job.job_id, job.paths.stdout, job.paths.stderr, self._script(job.job_id))
                for job in jobs
            ]
            yield list(zip(part, submitted, strict=True))

    def _script(self, job_id: str) -> Path:
        return self.folder / f"{job_id.partition('_')[0]}_submission.sh"

    def _parts(self) -> Iterator[Sequence[AnyTask | PackedTask]]:
        most = slurm.max_array_size() if len(self.tasks) > 1 else 1
        for start in range(0, len(self.tasks), most):
            yield self.tasks[start : start + most]

    def _executor(self) -> Any:
        import submitit

        executor = submitit.SlurmExecutor(
            self.folder,
            max_num_timeout=self.profile.max_requeues,
            python=self.profile.python or None,
        )
        parameters = self.profile.parameters(f"colddiff-{self.tasks[0].kind}")
        lines = [*self._code_lines(), *(parameters.pop("setup", None) or ())]
        if self.dependency:
            extra = dict(parameters.pop("additional_parameters", {}))
            # Otherwise a job whose condition can never come true stays in the queue for ever.
            parameters["additional_parameters"] = extra | {"kill-on-invalid-dep": "yes"}
            parameters["dependency"] = self.dependency
        # Rank 0 evaluates when the others have left: no site's WaitTime may end it then.
        parameters["srun_args"] = [*parameters["srun_args"], "--wait=0"]
        executor.update_parameters(**parameters, setup=lines)
        return executor

    def _code_lines(self) -> list[str]:
        if self.code is None:
            return []
        code = shlex.quote(str(self.code))
        # The working folder must not come first: it may hold the sources as they are by then.
        return ["export PYTHONSAFEPATH=1", f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"]
