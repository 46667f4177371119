"""What kills, stops or starves the processes of a run: what users see, that nothing is lost, that all end.

For single processes, see test_resume.py, test_checkpoint.py, test_workers.py and test_bad_input.py. Every job
here is bounded in time, and no process may survive it (see torchrun.py).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, draw_folders
from run_files import assert_same_run, read, row_count, rows
from torchrun import Ended, Job, Processes, Torchrun, assert_no_survivors, surroundings, wait_for

from resnext.engine.checkpoint import read_checkpoint, read_latest

EPOCHS = 4
SETTINGS = f"""
model: {{stem: cifar, depth: 11, cardinality: 4, base_width: 4}}
data: {{dataset: glyphs, image_size: 16, train_images: 210, val_images: 101}}
train: {{epochs: {EPOCHS}, batch_size: 24}}
optimizer: {{lr: 0.05}}
run: {{log_interval: 2, save_interval: 2, device: cpu, tensorboard: false, timeout: 60}}
"""
LONG = "train.epochs=400"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def whole(processes, config, tmp_path_factory) -> Path:
    """The run of 3 processes that no signal and no fault reached; look, don't touch."""
    output = tmp_path_factory.mktemp("whole") / "run"
    processes.run(3, "train", "--config", config, "--output", output).finished()
    return output


class Run:
    """A run of 3 processes in a directory of its own."""

    def __init__(self, processes: Processes, config: Path, output: Path, whole: Path):
        self.processes, self.output, self.whole = processes, output, whole
        self.arguments = ["--config", str(config), "--output", str(output)]

    def start(self, *more: str) -> Job:
        return self.processes.start(3, "train", *self.arguments, *more)

    def start_faulty(self, fault: str, rank: int, *more: str) -> Job:
        return self.processes.start(3, "faults:drive", fault, rank, [*self.arguments, *more])

    def at_work(self, rows: int = 5) -> None:
        """Wait until the run has written rows."""
        assert wait_for(lambda: row_count(self.output) >= rows, 100)

    def resume(self) -> None:
        """Resume the run; it must end with the bits of `whole`."""
        self.start("--resume").wait().finished()
        assert_same_run(self.output, self.whole)


@pytest.fixture
def run(processes, config, whole, tmp_path) -> Run:
    return Run(processes, config, tmp_path / "run", whole)


def badly(ended: Ended, *words: str, besides: tuple[int, ...] = ()) -> Ended:
    """Expect that all ranks failed, or got SIGTERM after another had, and that one message has the words."""
    others = {status for rank, status in enumerate(ended.statuses) if rank not in besides}
    assert others <= {2, -signal.SIGTERM}, ended
    assert len(ended.messages) == 1 and all(word in ended.messages[0] for word in words), ended
    return ended


# ---------------------------------------------------------------------------- killed, hung


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_process(rank, run):
    job = run.start(LONG)
    run.at_work()
    os.kill(job.pids[rank], signal.SIGKILL)
    ended = badly(job.wait(), "another process ended", "--resume", besides=(rank,))
    assert ended.statuses[rank] == -signal.SIGKILL
    run.resume()


def test_the_message_of_a_killed_process_is_not_lost(run):
    """Though torchrun sends SIGTERM to all others before it is written."""
    job = run.start_faulty("busy", 0, LONG)
    run.at_work()
    os.kill(job.pids[2], signal.SIGKILL)
    badly(job.wait(), "another process ended", "--resume", besides=(2,))


def test_a_killed_process_is_restarted_by_torchrun(run, whole, tmp_path):
    command = ("train.py", *run.arguments, "--resume")
    with Torchrun(repository(tmp_path), 3, *command, options=["--max-restarts=2"]) as job:
        run.at_work()
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.wait() == 0, job.error
        assert "continuing from" in job.output and f"finished: {EPOCHS} epochs" in job.output
    assert_same_run(run.output, whole)


def test_torchrun_is_killed(run, tmp_path):
    """Its processes notice, save and exit."""
    with Torchrun(repository(tmp_path), 3, "train.py", *run.arguments, LONG, keep_status=False) as job:
        run.at_work()
        job.process.kill()
        job.process.wait(10)
        assert_no_survivors(job.mark)
        assert "stopped by SIGTERM" in (run.output / "log.txt").read_text()
    run.resume()


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_all_are_killed_at_random_moments(times, run):
    """Also while they start, save or validate; what remains is whole, and continues to the same bits."""
    checkpoints, moments = run.output / "checkpoints", random.Random(times)
    for _ in range(times):
        job = run.start("--resume")
        time.sleep(moments.uniform(0.2, 3))
        for pid in job.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.wait()
        if (checkpoints / "last.pt").exists():
            lines: list[str] = []
            read_latest(checkpoints / "last.pt", lines.append)
            assert not lines
        if (checkpoints / "best.pt").exists():
            read_checkpoint(checkpoints / "best.pt")
    run.resume()


def test_a_hanging_process(run):
    job = run.start(LONG, "run.timeout=3")
    run.at_work()
    os.kill(job.pids[1], signal.SIGSTOP)
    assert wait_for(lambda: all(has_ended(job.pids[rank]) for rank in (0, 2)), 40)
    os.kill(job.pids[1], signal.SIGKILL)
    badly(job.wait(), "did not answer within 3 s (run.timeout)", besides=(1,))
    run.resume()


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite(rank, run):
    """One rank has it; all stop at the same step, and nothing is saved after it."""
    job = run.start_faulty("loss", rank)
    badly(job.wait(), "the loss is nan at epoch 1, step 8", "last.pt", "optimizer.lr")
    assert read(run.output)["progress"]["step"] == 6
    run.resume()


def test_a_full_disk(run):
    badly(run.start_faulty("disk", 0).wait(), "No space left on device")
    assert read(run.output)["progress"]["step"] == 6
    run.resume()


def test_a_bug_in_one_process_has_its_traceback(run):
    ended = run.start_faulty("bug", 1).wait()
    assert "RuntimeError: a bug of ours" in ended.errors[1] and ended.statuses[1] == 1
    assert all("another process ended" in message for message in ended.messages)


FILES = ("data.dataset=folder", "data.pipeline=fast", "data.workers=1", "data.train_images=null")
FILES += ("data.val_images=null", "train.batch_size=6", "run.save_interval=null")


@pytest.fixture
def run_on_files(run, tmp_path) -> Run:
    """A run on images in tmp_path/images."""
    draw_folders(tmp_path / "images", {"ant": 20, "bee": 20})
    run.arguments += ["--data", str(tmp_path / "images"), *FILES]
    return run


def test_shared_memory_is_too_small(run_on_files):
    ended = run_on_files.start_faulty("memory", 2).wait()
    badly(ended, "data.workers: ", "/dev/shm", "--shm-size")
    assert not (run_on_files.output / "checkpoints").exists()


def test_a_file_vanishes(run_on_files, tmp_path):
    """In mid-run; the one rank that misses it reports it, once."""
    job = run_on_files.start(LONG)
    run_on_files.at_work()
    (tmp_path / "images" / "train" / "bee" / "3.png").unlink()
    badly(job.wait(), "bee/3.png: cannot be read (No such file or directory)")


def test_a_killed_loader_worker(run_on_files):
    job = run_on_files.start(LONG)
    run_on_files.at_work()
    children = Path(f"/proc/{job.pids[1]}/task/{job.pids[1]}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    badly(job.wait(), "data.workers: DataLoader worker (pid", "lower data.workers")


# ---------------------------------------------------------------------------- around them


def test_two_runs_in_one_directory(run, tmp_path):
    """The second is refused once, and the first does not notice."""
    with Processes(tmp_path / "others") as others:
        first = others.start(3, "train", *run.arguments)
        run.at_work()
        second = run.start("--resume").wait()
        badly(second, "another process is training there; stop it first")
        first.wait().finished()
    assert_same_run(run.output, run.whole)


def test_the_console_is_gone(run):
    """The reader of a pipe leaves; the run continues to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    job = subprocess.Popen(
        [*command, "train.py", *run.arguments],
        cwd=ROOT,
        env=surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(120) == 0
    assert_same_run(run.output, run.whole)


def test_tensorboard_cannot_be_written(run):
    run.output.mkdir()
    (run.output / "tensorboard").write_text("in the way")
    for name in ("config.yaml", "log.txt"):  # a directory of ours, in which nothing was saved yet
        (run.output / name).touch()
    run.start("--resume", "run.tensorboard=true").wait().finished()
    assert "warning: TensorBoard's files cannot be written" in (run.output / "log.txt").read_text()
    assert rows(run.output) == rows(run.whole)


# ---------------------------------------------------------------------------- SLURM

# Stand-ins for the commands that scripts/train.sbatch calls.
COMMANDS = {
    "srun": 'exec "$@"',
    "scontrol": 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$REQUEUED" ;; esac',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
SLURM |= {"SLURM_GPUS_ON_NODE": "3"}


def test_a_preempted_job_saves_and_requeues_itself(run, config, tmp_path):
    requeued = tmp_path / "requeued"
    (tmp_path / "bin").mkdir()
    for name, line in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "scripts/train.sbatch", str(config), "--output", str(run.output)]
    with open(tmp_path / "out.txt", "w") as out:
        options = {"cwd": repository(tmp_path), "stdout": out, "stderr": out}
        options["env"] = surroundings(PATH=path, REQUEUED=str(requeued), **SLURM)
        job = subprocess.Popen(command, start_new_session=True, **options)
        try:
            run.at_work()
            job.send_signal(signal.SIGUSR1)
            assert job.wait(60) == 0
            assert requeued.read_text() == "7\n"
            assert "stopped by SIGTERM" in (run.output / "log.txt").read_text()
            assert subprocess.run(command, timeout=120, **options).returncode == 0
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert requeued.read_text() == "7\n"
    assert_same_run(run.output, run.whole)


def repository(folder: Path) -> Path:
    """Return a folder that has train.py, and nothing else of the repository's root that gets in the way."""
    place = folder / "root"
    place.mkdir(exist_ok=True)
    for name in ("train.py", "resnext", "data", "configs", "scripts"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    return place
