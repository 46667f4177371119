"""Several processes for tests: torchrun as a user starts it, and what torchrun starts without torchrun.

`Torchrun` is the real thing, and takes as long to start as it takes torch to be imported by each process.
`Processes` forks the processes of a job from one that has imported everything: real processes, with the
environment that torchrun gives them and a store that outlives them, started in a moment, and ended as it
does when one of them fails. Every job is bounded in time, and what belongs to one bears a mark in its
environment, by which survivors are found.
"""

import atexit
import hashlib
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


# ---------------------------------------------------------------------------- processes


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def marked(mark: str) -> dict[int, str]:
    """Process number → command line of everything alive that was started with this mark."""
    found = {}
    entry = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (path / "environ").read_bytes().split(b"\0"):  # a zombie has none
                words = (path / "cmdline").read_bytes().split(b"\0")
                found[int(path.name)] = b" ".join(words).decode(errors="replace").strip()
        except OSError:  # another user's, or gone
            continue
    return found


def kill_marked(mark: str) -> None:
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def assert_no_survivors(mark: str, besides: Iterable[int] = (), seconds: float = 20) -> None:
    """Nothing with this mark is left, or will be soon."""
    besides = set(besides)
    if not wait_for(lambda: marked(mark).keys() <= besides, seconds):
        left = {pid: line for pid, line in marked(mark).items() if pid not in besides}
        raise AssertionError(f"still alive: {left}")


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a job, without what another launcher has left there."""
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

    def __str__(self) -> str:
        parts = zip(self.statuses, self.outputs, self.errors, strict=True)
        return "\n".join(f"--- rank {r}: status {s}\n{o}\n{e}" for r, (s, o, e) in enumerate(parts))


def error_lines(text: str) -> list[str]:
    """Our `error: …` messages out of standard error, where torchrun writes too."""
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------- torchrun itself

# Keeps what torchrun does not tell of a process: its number, and the status that it ended with. The shell
# stands in between, so that a test of torchrun's own death cannot use it.
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
        """The process of a rank; waits until it is there."""
        path = self.files / f"{rank}.pid"
        assert wait_for(lambda: path.exists() or self.process.poll() is not None), self.error
        return int(path.read_text())

    def statuses(self) -> list[int]:
        """The exit statuses of the ranks; 128 + number for a signal."""
        return [int((self.files / f"{rank}.status").read_text()) for rank in range(self.count)]

    def wait(self, seconds: float = 120) -> int:
        """The end of torchrun, its status, and of everything that it started."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s\n{self.output}\n{self.error}") from None
        assert_no_survivors(self.mark)
        return status


# ---------------------------------------------------------------------------- without torchrun


class Job:
    """A running job of `Processes`."""

    def __init__(self, owner: "Processes", number: int, pids: list[int], store: Any):
        self.owner, self.number, self.pids, self.store = owner, number, pids, store

    def wait(self) -> Ended:
        """All of them ended, and nothing is left of them; an AssertionError where they took too long."""
        statuses = self.owner.answer()
        files = self.owner.folder
        texts = [
            [(files / f"{self.number}.{rank}.{kind}").read_text() for rank in range(len(self.pids))]
            for kind in ("out", "err")
        ]
        ended = Ended(statuses, *texts)
        assert None not in statuses, f"took too long\n{ended}"
        assert_no_survivors(self.owner.mark, [self.owner.process.pid])
        return ended


class Processes:
    """Starts jobs one at a time; a context manager that ends them.

    A job is `main` of train.py or evaluate.py with its arguments, or a function "module:name" of tests/
    with JSON values. `watch` is for what happens inside a process, see `watched`.
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
        """Start a job; one of a single process is started as `python`, without torchrun's environment."""
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
    """In the process that others are forked from: no threads here, and nothing computed."""
    sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("helpers", "engine"))]
    for name in (
        "train",
        "evaluate",
        "data.loaders",
        "data.datasets",
        "resnext.engine.report",
        "resnext.engine.trainer",
    ):
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
    """The statuses of children, None for one that was killed; when one fails, the others get SIGTERM."""
    end = time.monotonic() + seconds
    statuses: dict[int, int | None] = {}
    told = False
    while len(statuses) < len(pids):
        for pid in [pid for pid in pids if pid not in statuses]:
            if (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
            elif time.monotonic() > end:
                send_to_group(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        if any(statuses.values()) and not told:
            told = True
            for pid in [pid for pid in pids if pid not in statuses]:
                send_to_group(pid, signal.SIGTERM)
        time.sleep(0.1)  # as torchrun
    return [statuses[pid] for pid in pids]


def send_to_group(pid: int, number: signal.Signals) -> None:
    """To a child and its workers; to the child alone where it has no group of its own yet."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)


def run_rank(job: dict[str, Any], rank: int) -> NoReturn:
    """All of a forked process. Its end is the interpreter's, but for the second that freeing all takes."""
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
    """What torchrun and the shell prepare: session, environment, files, folder."""
    os.setsid()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if job["ranks"] > 1 or job["watch"].get("group"):
        size = str(job["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{job['files']}/{job['number']}.{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, f"{job['files']}/{job['number']}.{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags, 0o644), descriptor)
    os.chdir(job["cwd"])
    watched(rank, **job["watch"])


def run_job(what: str, arguments: list[Any]) -> None:
    if ":" in what:
        module, name = what.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
        return
    from resnext.errors import run_main

    sys.argv = [f"{what}.py", *arguments]
    run_main(importlib.import_module(what).main)


def watched(
    rank: int, group: bool = False, pictures: str | None = None, stop: dict[str, Any] | None = None
) -> None:
    """What a job's processes do on the side.

    `pictures`: a folder for the hashes of what each training step sees, a file for each rank (see
    `seen_pictures`). `stop`: {"rank", "signal"} and "step" or "batch": that rank sends itself the signal
    ahead of that training step, or that validation batch, of this process's. `group`: a single process has
    the environment of torchrun too.
    """
    from resnext.engine import evaluator, trainer

    def counted(function: Callable, act: Callable[..., None]) -> Callable:
        count = 0

        def wrapper(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            act(count, *arguments)
            return function(*arguments)

        return wrapper

    def write(_: int, training: Any, images: Any, labels: Any, rate: float, total: int) -> None:
        progress = training.progress
        random_uint64 = [digest([image, label]) for image, label in zip(images, labels, strict=True)]
        with open(Path(pictures) / f"{rank}.jsonl", "a") as file:
            row = {"step": progress.global_step, "lr": rate, "images": total, "pictures": random_uint64}
            print(json.dumps(row), file=file)

    def stop_at(wanted: int) -> Callable[..., None]:
        def act(count: int, *_: Any) -> None:
            if count == wanted:
                os.kill(os.getpid(), getattr(signal, stop["signal"]))

        return act

    if pictures:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        trainer.train_step = counted(trainer.train_step, write)
    if stop and stop["rank"] == rank:
        if "step" in stop:
            trainer.train_step = counted(trainer.train_step, stop_at(stop["step"]))
        else:
            evaluator.sum_crops = counted(evaluator.sum_crops, stop_at(stop["batch"]))


def seen_pictures(folder: Path) -> list[dict[str, Any]]:
    """What the steps saw: {"step", "lr", "images", "pictures"}, the ranks' pictures one after another."""
    ranks = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
    steps = zip(*([json.loads(line) for line in path.open()] for path in ranks), strict=True)
    found = []
    for rows in steps:
        common = [{name: row[name] for name in ("step", "lr", "images")} for row in rows]
        assert all(other == common[0] for other in common)
        found.append(common[0] | {"pictures": [picture for row in rows for picture in row["pictures"]]})
    return found


# ---------------------------------------------------------------------------- what a run leaves


def digest(tensors: Iterable[Any]) -> str:
    """Hash of tensors, bit for bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def rows(output: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the times, the only part that may differ."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def read(output: Path, name: str = "last.pt") -> dict[str, Any]:
    import torch

    return torch.load(output / "checkpoints" / name, weights_only=True)


def tensors(content: dict[str, Any]) -> dict[str, Any]:
    """Weights, running statistics, momentum and averages of a checkpoint, by name."""
    found = {f"model/{name}": tensor for name, tensor in content["model"].items()}
    found |= {f"ema/{name}": tensor for name, tensor in (content["ema"] or {}).items()}
    for number, entry in content["optimizer"]["state"].items():
        found[f"momentum/{number}"] = entry["momentum_buffer"]
    return found


def fingerprint(output: Path, name: str = "last.pt") -> str:
    """Hash of all `tensors` of a checkpoint."""
    return digest(tensors(read(output, name)).values())


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two finished runs agree in every row and every bit."""
    assert rows(ours) == rows(theirs)
    for name in ("last.pt", "best.pt"):
        first, second = read(ours, name), read(theirs, name)
        a, b = tensors(first), tensors(second)
        assert a.keys() == b.keys()
        different = [name for name in a if digest([a[name]]) != digest([b[name]])]
        assert not different, f"{name}: {different}"
        progress = [{k: v for k, v in c["progress"].items() if k != "seconds"} for c in (first, second)]
        assert progress[0] == progress[1]


if __name__ == "__main__":
    serve()
