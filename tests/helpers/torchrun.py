"""Several processes for tests: real torchrun, and jobs that start what torchrun starts, but faster.

`Torchrun` is real torchrun, in which every process needs seconds to import torch. `Processes` forks the
ranks of a job from one process that has imported everything. They are real processes with the environment
that torchrun gives them, and if one fails, the others are ended as torchrun does it. Every job is bounded in
time. Its processes bear a mark in their environment, by which survivors are found.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESNEXT_TEST_JOB"
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Return whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def marked(mark: str) -> dict[int, str]:
    """Return process number → command line of everything alive that was started with this mark."""
    found = {}
    entry = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's process, or ended meanwhile
            if entry in (path / "environ").read_bytes().split(b"\0"):  # a zombie has none
                words = (path / "cmdline").read_bytes().split(b"\0")
                found[int(path.name)] = b" ".join(words).decode(errors="replace").strip()
    return found


def kill_marked(mark: str) -> None:
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_no_survivors(mark: str, besides: Iterable[int] = (), seconds: float = 20) -> None:
    """Assert that everything with this mark has ended, or will soon."""
    besides = set(besides)
    ended = wait_for(lambda: marked(mark).keys() <= besides, seconds)
    assert ended, {pid: line for pid, line in marked(mark).items() if pid not in besides}


def surroundings(**more: str) -> dict[str, str]:
    """Return the environment of a job, without what another launcher has left in ours."""
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return plain | {"OMP_NUM_THREADS": "1"} | more


@dataclass(frozen=True)
class Ended:
    """How a job ended; lists are by rank. A negative status is the signal that killed the process."""

    statuses: list[int]
    outputs: list[str]
    errors: list[str]

    @property
    def messages(self) -> list[str]:
        """The `error: …` messages of all processes."""
        return error_lines("".join(self.errors))

    def finished(self) -> "Ended":
        """Assert that all went well."""
        assert set(self.statuses) == {0} and not any(self.errors), self
        return self

    def failed(self) -> str:
        """Assert that the job failed with status 2 and one message; return it."""
        # Ranks that torchrun was quicker to end have got SIGTERM.
        assert 2 in self.statuses and set(self.statuses) <= {2, -signal.SIGTERM}, self
        assert len(self.messages) == 1 and "Traceback" not in "".join(self.errors), self
        return self.messages[0]

    def __str__(self) -> str:
        parts = zip(self.statuses, self.outputs, self.errors, strict=True)
        return "\n".join(f"--- rank {r}: status {s}\n{o}\n{e}" for r, (s, o, e) in enumerate(parts))


def error_lines(text: str) -> list[str]:
    """Return our `error: …` messages in standard error, where torchrun writes too."""
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------- torchrun itself

# Records what torchrun does not tell about a process: its number and its exit status. Because of the shell in
# between, a test of torchrun's own death cannot use it.
KEEP_STATUS = """
trap : TERM INT HUP USR1
sh -c 'echo $$ > "$0.new"; mv "$0.new" "$0"; exec "$@"' "$STATUS_FOLDER/$RANK.pid" "$@"
status=$?
echo $status > "$STATUS_FOLDER/$RANK.status"
exit $status
"""


class Torchrun:
    """`torchrun --standalone --nproc-per-node=RANKS OPTIONS ARGUMENTS`; a context manager that ends it.

    Its files go to `folder`, which is also where it runs.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *arguments: object,
        options: Sequence[str] = (),
        keep_status: bool = True,
        **environment: str,
    ):
        self.mark, self.count = uuid.uuid4().hex, ranks
        self.files = folder / f"torchrun-{self.mark[:8]}"
        self.files.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", *options]
        if keep_status:
            (self.files / "keep_status.sh").write_text(KEEP_STATUS)
            command += ["--no-python", "sh", str(self.files / "keep_status.sh"), sys.executable]
        with open(self.files / "out", "wb") as out, open(self.files / "err", "wb") as err:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                cwd=folder,
                env=surroundings(**{MARK: self.mark, "STATUS_FOLDER": str(self.files)} | environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        self.process.wait(20)

    @property
    def output(self) -> str:
        return (self.files / "out").read_text()

    @property
    def error(self) -> str:
        return (self.files / "err").read_text()

    def pid(self, rank: int) -> int:
        """Return the process number of a rank, once it is there."""
        path = self.files / f"{rank}.pid"
        assert wait_for(lambda: path.exists() or self.process.poll() is not None), self.error
        return int(path.read_text())

    def statuses(self) -> list[int]:
        """Return the exit statuses of the ranks; 128 + number for a signal."""
        return [int((self.files / f"{rank}.status").read_text()) for rank in range(self.count)]

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end of torchrun and of everything that it started; return torchrun's status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s\n{self.output}\n{self.error}") from None
        assert_no_survivors(self.mark)
        return status


# ---------------------------------------------------------------------------- without torchrun


class Job:
    """A running job of `Processes`."""

    def __init__(self, owner: "Processes", number: int, pids: list[int], store: object):
        self.owner, self.number, self.pids = owner, number, pids
        self.store = store  # must live as long as the job

    def wait(self) -> Ended:
        """Wait until all ranks and their workers have ended; AssertionError if they took too long."""
        statuses = self.owner.answer()
        names = [self.owner.folder / f"{self.number}.{rank}" for rank in range(len(self.pids))]
        texts = [[Path(f"{name}.{kind}").read_text() for name in names] for kind in ("out", "err")]
        ended = Ended(statuses, *texts)
        assert None not in statuses, f"took too long\n{ended}"
        assert_no_survivors(self.owner.mark, [self.owner.process.pid])
        return ended


class Processes:
    """Starts jobs one at a time; a context manager that ends them.

    A job is `main` of train.py or evaluate.py with its arguments, or a function "module:name" of
    tests/helpers with JSON values. `watch` acts inside the processes, see ranks.watch.
    """

    def __init__(self, folder: Path):
        self.folder, self.mark, self.jobs = folder, uuid.uuid4().hex, 0
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "server.err", "wb") as error:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                env=surroundings(**{MARK: self.mark}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        self.process.communicate(timeout=20)

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, (self.folder / "server.err").read_text()
        return json.loads(line)

    def start(
        self,
        ranks: int,
        what: str,
        *arguments: object,
        watch: dict[str, Any] | None = None,
        cwd: Path | None = None,
        seconds: float = 120,
    ) -> Job:
        """Start a job. A job of one process starts as `python` does, without torchrun's environment."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        values = list(arguments) if ":" in what else [str(argument) for argument in arguments]
        job = {"number": self.jobs, "ranks": ranks, "what": what, "arguments": values, "watch": watch or {}}
        job |= {"port": store.port, "seconds": seconds, "files": str(self.folder)}
        job |= {"cwd": str(cwd or self.folder)}
        self.jobs += 1
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Job(self, job["number"], self.answer(), store)

    def run(self, ranks: int, what: str, *arguments: object, **options: Any) -> Ended:
        return self.start(ranks, what, *arguments, **options).wait()


def serve() -> None:
    """Fork the ranks of jobs; this process has no threads and computes nothing."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
    first = ("train", "evaluate", "data.training", "data.glyphs", "data.file_loaders")
    for name in (*first, "resnext.engine.report", "resnext.engine.trainer"):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                run_rank(job, rank)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(ends(pids, job["seconds"])), flush=True)


def ends(pids: list[int], seconds: float) -> list[int | None]:
    """Return the statuses of children, None if killed after `seconds`; if one fails, end the others."""
    end = time.monotonic() + seconds
    statuses: dict[int, int | None] = {}
    terminated = False
    while len(statuses) < len(pids):
        for pid in [pid for pid in pids if pid not in statuses]:
            if (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
            elif time.monotonic() > end:
                send_to_group(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        if any(statuses.values()) and not terminated:
            terminated = True
            for pid in [pid for pid in pids if pid not in statuses]:
                send_to_group(pid, signal.SIGTERM)
        time.sleep(0.1)  # as torchrun
    return [statuses[pid] for pid in pids]


def send_to_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a child and its workers, or to the child alone if it has no group of its own yet."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)


def run_rank(job: dict[str, Any], rank: int) -> NoReturn:
    """Run a forked process to its end, which skips only the second that freeing all memory takes."""
    status: Any = 1
    try:
        prepare_rank(job, rank)
        status = run_job(job["what"], job["arguments"]) or 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare_rank(job: dict[str, Any], rank: int) -> None:
    """Prepare what torchrun and the shell prepare: session, environment, files, folder."""
    os.setsid()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if job["ranks"] > 1 or job["watch"].get("group"):
        size = str(job["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    written = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['files']}/{job['number']}.{rank}.{kind}", written, 0o644), descriptor)
    os.chdir(job["cwd"])
    importlib.import_module("ranks").watch(rank, **job["watch"])


def run_job(what: str, arguments: list[Any]) -> None:
    if ":" in what:
        module, name = what.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
        return
    from resnext.errors import run_main

    sys.argv = [f"{what}.py", *arguments]
    run_main(importlib.import_module(what).main)


if __name__ == "__main__":
    serve()
