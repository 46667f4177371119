"""What kills, stops or starves the processes of a run: what users see, that nothing is lost, that all end.

Of single processes, these are in test_resume.py, test_checkpoint.py, test_workers.py and test_bad_input.py.
Every job here is bounded in time, and what survives it is looked for (see torchrun.py).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, draw_folders
from torchrun import (
    Ended,
    Job,
    Processes,
    Torchrun,
    assert_no_survivors,
    assert_same_run,
    read,
    rows,
    surroundings,
    wait_for,
)

from resnext.engine.checkpoint import read_checkpoint, read_latest

EPOCHS = 4
SETTINGS = f"""
model: {{stem: cifar, depth: 11, cardinality: 4, base_width: 4}}
data: {{dataset: glyphs, image_size: 16, train_images: 210, val_images: 101}}
train: {{epochs: {EPOCHS}, batch_size: 24}}
optimizer: {{lr: 0.05}}
run: {{log_interval: 2, save_interval: 2, device: cpu, tensorboard: false, timeout: 60}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(processes, config, tmp_path_factory) -> Path:
    """The run of 3 processes that nothing befell; look, don't touch."""
    output = tmp_path_factory.mktemp("whole") / "run"
    well(processes.run(3, "train", "--config", config, "--output", output))
    return output


def well(ended: Ended) -> Ended:
    assert set(ended.statuses) == {0} and not any(ended.errors), ended
    return ended


def badly(ended: Ended, *words: str, besides: tuple[int, ...] = ()) -> Ended:
    """All failed, or were told to end as another had; and one message has the words."""
    others = {status for rank, status in enumerate(ended.statuses) if rank not in besides}
    assert others <= {2, -signal.SIGTERM}, ended
    assert len(ended.messages) == 1 and all(word in ended.messages[0] for word in words), ended
    return ended


def at_work(output: Path, number: int = 5) -> None:
    """Wait until a run has so many rows."""
    path = output / "metrics.jsonl"
    assert wait_for(lambda: path.exists() and path.read_text().count("\n") >= number, 100)


def go_on(processes: Processes, config: Path, output: Path, *more: str) -> None:
    well(processes.run(3, "train", "--config", config, "--output", output, "--resume", *more))


# ---------------------------------------------------------------------------- killed, hung


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_process(rank, processes, config, whole, tmp_path):
    job = processes.start(3, "train", "--config", config, "--output", tmp_path / "run", "train.epochs=400")
    at_work(tmp_path / "run")
    os.kill(job.pids[rank], signal.SIGKILL)
    ended = badly(job.wait(), "another process is gone", "--resume", besides=(rank,))
    assert ended.statuses[rank] == -signal.SIGKILL
    go_on(processes, config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_the_message_of_a_killed_process_is_not_lost(processes, config, tmp_path):
    """Though torchrun tells all others to end before it is written."""
    job = faulty(processes, "busy", 0, "--config", config, "--output", tmp_path / "run", "train.epochs=400")
    at_work(tmp_path / "run")
    os.kill(job.pids[2], signal.SIGKILL)
    badly(job.wait(), "another process is gone", "--resume", besides=(2,))


def test_a_killed_process_is_restarted_by_torchrun(config, whole, tmp_path):
    arguments = ("train.py", "--config", config, "--output", tmp_path / "run", "--resume")
    with Torchrun(repository(tmp_path), 3, *arguments, options=["--max-restarts=2"]) as job:
        at_work(tmp_path / "run")
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.wait() == 0, job.error
        assert "continuing from" in job.output and f"finished: {EPOCHS} epochs" in job.output
    assert_same_run(tmp_path / "run", whole)


def test_torchrun_is_killed(config, processes, whole, tmp_path):
    """Its processes notice, save and leave."""
    output = tmp_path / "run"
    arguments = ("train.py", "--config", config, "--output", output, "train.epochs=400")
    with Torchrun(repository(tmp_path), 3, *arguments, keep_status=False) as job:
        at_work(output)
        job.process.kill()
        job.process.wait(10)
        assert_no_survivors(job.mark)
        assert "stopped by SIGTERM" in (output / "log.txt").read_text()
    go_on(processes, config, output)
    assert_same_run(output, whole)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_all_are_killed_at_random_moments(times, processes, config, whole, tmp_path):
    """Also while they start, save or validate; what remains is always whole, and goes on to the same bits."""
    output, moments = tmp_path / "run", random.Random(times)
    checkpoints = output / "checkpoints"
    longest = 3.0
    for _ in range(times):
        job = processes.start(3, "train", "--config", config, "--output", output, "--resume")
        time.sleep(moments.uniform(0.2, longest))
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
    go_on(processes, config, output)
    assert_same_run(output, whole)


def test_a_hanging_process(processes, config, whole, tmp_path):
    output = tmp_path / "run"
    job = processes.start(
        3, "train", "--config", config, "--output", output, "train.epochs=400", "run.timeout=3"
    )
    at_work(output)
    os.kill(job.pids[1], signal.SIGSTOP)
    ends = [Path(f"/proc/{job.pids[rank]}") for rank in (0, 2)]
    assert wait_for(lambda: all(stopped(path) for path in ends), 40)
    os.kill(job.pids[1], signal.SIGKILL)
    badly(job.wait(), "did not answer within 3 s (run.timeout)", besides=(1,))
    go_on(processes, config, output)
    assert_same_run(output, whole)


def stopped(path: Path) -> bool:
    """A process that is gone, or waits for its parent to ask how it ended."""
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------------------- in one of the processes


def drive(fault: str, rank: int, arguments: list[str]) -> None:
    """train.py with a fault in one process; runs inside `Processes`."""
    import shutil

    import resnext.distributed
    import resnext.engine.checkpoint
    import resnext.engine.trainer
    import train
    from resnext.errors import run_main

    if int(os.environ.get("RANK", "0")) == rank:
        original = resnext.engine.trainer.train_step
        if fault == "loss":

            def not_a_number(training, *rest):
                return original(training, *rest) * (float("nan") if training.progress.global_step == 7 else 1)

            resnext.engine.trainer.train_step = not_a_number
        elif fault == "disk":

            def full(*_):
                raise OSError(28, "No space left on device")

            def then_full(training, *rest):
                if training.progress.global_step == 7:
                    resnext.engine.checkpoint.os.fsync = full
                return original(training, *rest)

            resnext.engine.trainer.train_step = then_full
        elif fault == "memory":
            shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1000, 1000, 0)
        elif fault == "bug":

            def broken(*_):
                raise RuntimeError("a bug of ours")

            resnext.engine.trainer.train_step = broken
    if fault == "busy":  # a machine on which torchrun's SIGTERM is quicker than a message
        report_error = resnext.distributed.report_error

        def late(error):
            time.sleep(2)
            report_error(error)

        resnext.distributed.report_error = late
    sys.argv = ["train.py", *arguments]
    run_main(train.main)


def faulty(processes: Processes, fault: str, rank: int, *arguments: object) -> Job:
    return processes.start(3, "test_faults:drive", fault, rank, [str(argument) for argument in arguments])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite(rank, processes, config, whole, tmp_path):
    """One process has it; all stop at the same step, and nothing is saved after it."""
    output = tmp_path / "run"
    job = faulty(processes, "loss", rank, "--config", config, "--output", output)
    badly(job.wait(), "the loss is nan at epoch 1, step 8", "last.pt", "optimizer.lr")
    assert read(output)["progress"]["step"] == 6
    go_on(processes, config, output)
    assert_same_run(output, whole)


def test_a_full_disk(processes, config, whole, tmp_path):
    output = tmp_path / "run"
    job = faulty(processes, "disk", 0, "--config", config, "--output", output)
    badly(job.wait(), "No space left on device")
    assert read(output)["progress"]["step"] == 6
    go_on(processes, config, output)
    assert_same_run(output, whole)


def test_a_bug_in_one_process_has_its_traceback(processes, config, tmp_path):
    ended = faulty(processes, "bug", 1, "--config", config, "--output", tmp_path / "run").wait()
    assert "RuntimeError: a bug of ours" in ended.errors[1] and ended.statuses[1] == 1
    assert all("another process is gone" in message for message in ended.messages)


@pytest.fixture
def pictures(tmp_path) -> Path:
    draw_folders(tmp_path / "pictures", {"ant": 20, "bee": 20})
    return tmp_path / "pictures"


FILES = ("data.dataset=folder", "data.pipeline=fast", "data.workers=1", "data.train_images=null")
FILES += ("data.val_images=null", "train.batch_size=6", "run.save_interval=null")


def test_shared_memory_is_too_small(processes, config, pictures, tmp_path):
    output = tmp_path / "run"
    arguments = ("--config", config, "--output", output, "--data", pictures, *FILES)
    badly(faulty(processes, "memory", 2, *arguments).wait(), "data.workers: ", "/dev/shm", "--shm-size")
    assert not (output / "checkpoints").exists()


def test_a_file_vanishes(processes, config, pictures, tmp_path):
    """In mid-run; the one process that misses it says so, once."""
    arguments = ("--config", config, "--output", tmp_path / "run", "--data", pictures, *FILES)
    job = processes.start(3, "train", *arguments, "train.epochs=400")
    at_work(tmp_path / "run")
    (pictures / "train" / "bee" / "3.png").unlink()
    badly(job.wait(), "bee/3.png: cannot be read (No such file or directory)")


def test_a_killed_loader_worker(processes, config, pictures, tmp_path):
    arguments = ("--config", config, "--output", tmp_path / "run", "--data", pictures, *FILES)
    job = processes.start(3, "train", *arguments, "train.epochs=400")
    at_work(tmp_path / "run")
    children = Path(f"/proc/{job.pids[1]}/task/{job.pids[1]}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    badly(job.wait(), "data.workers: DataLoader worker (pid", "lower data.workers")


# ---------------------------------------------------------------------------- around them


def test_two_runs_in_one_directory(processes, config, whole, tmp_path):
    """The second is refused once, and the first does not notice."""
    output = tmp_path / "run"
    with Processes(tmp_path / "others") as others:
        first = others.start(3, "train", "--config", config, "--output", output, "run.save_interval=2")
        at_work(output)
        second = processes.run(3, "train", "--config", config, "--output", output, "--resume")
        badly(second, "another process is training there; stop it first")
        well(first.wait())
    assert_same_run(output, whole)


def test_the_console_is_gone(config, whole, tmp_path):
    """The reader of a pipe leaves; the run goes on to its end."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["train.py", "--config", str(config), "--output", str(output)]
    job = subprocess.Popen(
        command, cwd=ROOT, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(120) == 0
    assert_same_run(output, whole)


def test_tensorboard_cannot_be_written(processes, config, whole, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "tensorboard").write_text("in the way")
    for name in ("config.yaml", "log.txt"):  # a directory of ours, in which nothing was saved yet
        (output / name).touch()
    go_on(processes, config, output, "run.tensorboard=true")
    assert "warning: TensorBoard's files cannot be written" in (output / "log.txt").read_text()
    assert rows(output) == rows(whole)


# ---------------------------------------------------------------------------- SLURM

SRUN = """#!/bin/sh
exec "$@"
"""
SCONTROL = """#!/bin/sh
case $1 in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def test_a_preempted_job_saves_and_requeues_itself(processes, config, whole, tmp_path):
    """scripts/train.sbatch with stand-ins for SLURM's commands, which cannot be had here."""
    output, requeued = tmp_path / "run", tmp_path / "requeued"
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    environment = surroundings(
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        REQUEUED=str(requeued),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="here",
        SLURM_JOB_NUM_NODES="1",
        SLURM_GPUS_ON_NODE="3",
    )
    command = ["bash", "scripts/train.sbatch", str(config), "--output", str(output)]
    folder = repository(tmp_path)
    with open(tmp_path / "out.txt", "w") as out:
        job = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            at_work(output)
            job.send_signal(signal.SIGUSR1)
            assert job.wait(60) == 0
            assert requeued.read_text() == "7\n"
            assert "stopped by SIGTERM" in (output / "log.txt").read_text()
            again = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=out, timeout=120)
            assert again.returncode == 0
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert requeued.read_text() == "7\n"
    assert_same_run(output, whole)


def repository(folder: Path) -> Path:
    """A folder in which train.py is found, and nothing else of the repository's root gets in the way."""
    place = folder / "root"
    place.mkdir(exist_ok=True)
    for name in ("train.py", "resnext", "data", "configs", "scripts"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    return place
