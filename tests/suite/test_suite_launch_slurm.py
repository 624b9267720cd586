"""Arrays of jobs: how large they are and how many jobs run at a time, on a SLURM of two shell scripts."""

from __future__ import annotations

import os

import pytest

from s2sam.suite import launch_slurm
from s2sam.suite.launch_slurm import slurm_runner

pytest.importorskip("submitit", reason="pip install 's2sam[slurm]'")

#: notes the array, and runs its jobs in the background; a single job says "one"
SBATCH = """#!/bin/bash
array=$(sed -n 's/^#SBATCH --array=//p' "$1")
echo "${array:-one}" >> arrays
id=$(wc -l < arrays)
cp "$1" script$id
(
    sleep 0.3
    if [ -n "$array" ]; then
        seq $(echo "${array%\\%*}" | tr - " ") | xargs -P "${array#*%}" -I{} \\
            env SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID={} SLURM_JOB_ID=1$id{} bash script$id
    else
        SLURM_JOB_ID=$id bash script$id
    fi
) > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
#: what the scripts call: srun --unbuffered --output FILE --error FILE COMMAND
SRUN = '#!/bin/bash\nshift 5\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM in the folder of the test, which is also the current one; looked at often."""
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/bash\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(launch_slurm.POLL, "slurm", 0.1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def timed(monkeypatch):
    """`timed(seconds)`: jobs wait so long instead of training, and tell when they began and ended."""

    def make(seconds):
        class Timed:  # defined here it travels to the job by value
            def __call__(self, name, config):
                import time

                begun = time.time()
                time.sleep(seconds)
                return name, {"begun": begun, "ended": time.time()}, ""

        monkeypatch.setattr(launch_slurm, "Task", Timed)

    return make


def most_at_a_time(outcomes):
    spans = [(final["begun"], final["ended"]) for _, final, _ in outcomes]
    return max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans)


def test_large_tables_are_submitted_in_parts(slurm, timed):
    timed(0.3)
    names = [f"run{index}" for index in range(5)]
    runner = slurm_runner(slurm / "jobs", array_size=2)
    outcomes = list(runner(dict.fromkeys(names), 2))
    assert (slurm / "arrays").read_text().split() == ["0-1%2", "0-1%2", "one"]
    assert sorted(name for name, _, _ in outcomes) == names
    assert most_at_a_time(outcomes) <= 2


def test_an_array_has_at_most_1000_jobs_and_runs_so_many_at_a_time(slurm, monkeypatch):
    import submitit

    sizes = []

    class Done:
        def __init__(self, name):
            self.name = name

        def done(self):
            return True

        def exception(self):
            return None

        def result(self):
            return self.name, {}, ""

    def map_array(self, task, names, configs):
        sizes.append((len(names), self._executor.parameters["array_parallelism"]))
        return [Done(name) for name in names]

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)
    names = [str(index) for index in range(2160)]
    outcomes = list(slurm_runner(slurm / "jobs")(dict.fromkeys(names), 8))
    assert sizes == [(1000, 8), (1000, 8), (160, 8)]
    assert [name for name, _, _ in outcomes] == names


def test_on_this_machine_as_many_jobs_run_as_are_asked_for(tmp_path, timed):
    timed(1.5)  # long enough for the next to begin meanwhile, were it allowed to
    outcomes = list(slurm_runner(tmp_path / "jobs", cluster="local")(dict.fromkeys("ab"), 1))
    assert sorted(name for name, _, _ in outcomes) == ["a", "b"]
    assert most_at_a_time(outcomes) == 1


def test_jobs_of_this_machine_end_with_the_runner(tmp_path, monkeypatch):
    class Slow:
        def __call__(self, name, config):
            import time

            time.sleep(0 if name == "a" else 60)
            return name, {}, ""

    monkeypatch.setattr(launch_slurm, "Task", Slow)
    submitted, submit = [], launch_slurm._submit

    def remember(*arguments):
        jobs = submit(*arguments)
        submitted.extend(jobs)
        return jobs

    monkeypatch.setattr(launch_slurm, "_submit", remember)
    outcomes = slurm_runner(tmp_path / "jobs", cluster="local")(dict.fromkeys("ab"), 2)
    assert next(outcomes) == ("a", {}, "")
    assert [job.done() for job in submitted] == [True, False]
    outcomes.close()
    submitted[1].wait()  # far less than a minute
