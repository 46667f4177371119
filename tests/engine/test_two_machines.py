"""Two machines: network namespaces, each with an address and a host name, joined by a cable (veth).

Needs root and Linux's `ip`. Marked slow: `pytest -m slow tests/engine/test_two_machines.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_files import assert_same_run, row_count
from torchrun import MARK, ROOT, assert_no_survivors, kill_marked, surroundings, wait_for

SETTINGS = """
model: {stem: cifar, depth: 11, cardinality: 4, base_width: 4}
data: {dataset: glyphs, image_size: 16, train_images: 205, val_images: 101}
train: {epochs: 12, batch_size: 24}
optimizer: {lr: 0.05}
run: {log_interval: 4, save_interval: 3, device: cpu, tensorboard: false, timeout: 60}
"""


def ip(command: str) -> bool:
    return subprocess.run(["ip", *command.split()], capture_output=True).returncode == 0


def can_create_machines() -> bool:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return ip("netns add resnext-try") and ip("netns del resnext-try")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_create_machines(), reason="needs root and network namespaces"),
]


class Machine:
    """One of two, with the address 10.77.0.NUMBER."""

    process: subprocess.Popen

    def __init__(self, number: int, folder: Path):
        self.number, self.folder, self.mark = number, folder, uuid.uuid4().hex
        self.space = f"resnext-{os.getpid()}-{number}"

    def start(self, output: Path) -> None:
        """Start `torchrun --nnodes=2` as on a real machine."""
        setup = 'mount --bind "$HOSTS" /etc/hosts; hostname "$NAME"; exec "$@"'
        command = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "sh", "-c", setup, "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=1"]
        command += ["--max-restarts=3", "train.py", "--config", str(self.folder / "tiny.yaml")]
        command += ["--output", str(output), "--resume"]
        # A new torchrun cannot join a later round while rounds share a store.
        names = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", MARK: self.mark}
        names |= {"HOSTS": str(self.folder / "hosts"), "NAME": f"machine{self.number}"}
        with open(self.folder / f"{self.number}.txt", "a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=surroundings(**names), stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return (self.folder / f"{self.number}.txt").read_text()


@pytest.fixture
def machines(tmp_path) -> Iterator[list[Machine]]:
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 machine1\n10.77.0.2 machine2\n")
    both = [Machine(number, tmp_path) for number in (1, 2)]
    first, second = (machine.space for machine in both)
    try:
        assert ip(f"netns add {first}") and ip(f"netns add {second}")
        assert ip(f"link add cable1 netns {first} type veth peer cable2 netns {second}")
        for number, space in ((1, first), (2, second)):
            assert ip(f"-n {space} addr add 10.77.0.{number}/24 dev cable{number}")
            assert ip(f"-n {space} link set cable{number} up") and ip(f"-n {space} link set lo up")
        yield both
    finally:
        for machine in both:
            kill_marked(machine.mark)
            ip(f"netns del {machine.space}")


def run_on(machines: list[Machine], output: Path) -> None:
    for machine in machines:
        machine.start(output)


def finish(machines: list[Machine]) -> None:
    for machine in machines:
        assert machine.process.wait(200) == 0, machine.text()
        assert_no_survivors(machine.mark)


def test_two_machines_and_one_that_is_killed_and_restarted(machines, tmp_path):
    first, second = machines
    run_on(machines, tmp_path / "whole")
    finish(machines)
    assert "# processes: 2\n" in (tmp_path / "whole" / "config.yaml").read_text()
    assert "finished: 12 epochs" in first.text() + second.text()

    broken = tmp_path / "broken"
    run_on(machines, broken)
    assert wait_for(lambda: row_count(broken) > 8, 100), first.text()
    kill_marked(second.mark)  # all of it at once, as in a power failure
    assert second.process.wait(20) == -signal.SIGKILL
    assert first.process.poll() is None
    assert wait_for(lambda: "another process ended" in first.text(), 70), first.text()
    time.sleep(20)  # no machine restarts faster, and torchrun needs 15 s to give it up
    second.start(broken)
    finish(machines)
    assert "continuing from" in first.text() + second.text()
    assert_same_run(broken, tmp_path / "whole")


def test_both_machines_stop_together(machines, tmp_path):
    run_on(machines, tmp_path / "run")
    log = tmp_path / "run" / "log.txt"
    assert wait_for(lambda: log.exists() and "epoch 2/12" in log.read_text(), 100), machines[0].text()
    for machine in machines:  # as srun does: torchrun alone would wait 5 minutes for the other torchrun
        machine.process.send_signal(signal.SIGTERM)  # `ip netns exec` has become torchrun
    for machine in machines:
        machine.process.wait(60)
        assert_no_survivors(machine.mark)
    assert log.read_text().count("stopped by SIGTERM") == 1
    run_on(machines, tmp_path / "run")
    finish(machines)
    assert "finished: 12 epochs" in log.read_text()
