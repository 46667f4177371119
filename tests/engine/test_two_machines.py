"""Two machines: network namespaces with an address and a host name each, joined by a cable (veth).

Needs root and Linux's `ip`; marked slow, `pytest -m slow tests/test_two_machines.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from runs import assert_same_run, rows
from torchrun import (
    MARK,
    ROOT,
    assert_no_survivors,
    kill_marked,
    surroundings,
    wait_for,
)

SETTINGS = """
model: {stem: cifar, depth: 11, cardinality: 4, base_width: 4}
data: {dataset: glyphs, image_size: 16, train_images: 205, val_images: 101}
train: {epochs: 12, batch_size: 24}
optimizer: {lr: 0.05}
run: {log_interval: 4, save_interval: 3, device: cpu, tensorboard: false, timeout: 60}
"""


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def can_make_machines() -> bool:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    made = ip("netns", "add", "resnext-try")
    return made and ip("netns", "del", "resnext-try")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_machines(), reason="needs root and network namespaces"),
]


class Machine:
    """One of two, with the address 10.77.0.NUMBER."""

    def __init__(self, number: int, folder: Path):
        self.number, self.folder, self.mark = number, folder, uuid.uuid4().hex
        self.space = f"resnext-{os.getpid()}-{number}"
        self.process: subprocess.Popen | None = None

    def start(self, output: Path) -> None:
        """`torchrun --nnodes=2` as on a real machine."""
        setup = 'mount --bind "$HOSTS" /etc/hosts; hostname "$NAME"; exec "$@"'
        command = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "sh", "-c", setup, "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += [
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.77.0.1:29500",
            "--rdzv-id=1",
            "--max-restarts=3",
        ]
        command += ["train.py", "--config", self.folder / "tiny.yaml", "--output", output, "--resume"]
        # A new torchrun cannot join a later round while rounds share a store.
        names = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        names |= {"HOSTS": str(self.folder / "hosts"), "NAME": f"machine{self.number}", MARK: self.mark}
        with open(self.folder / f"{self.number}.txt", "a") as file:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=surroundings(**names),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return (self.folder / f"{self.number}.txt").read_text()


@pytest.fixture
def machines(tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 machine1\n10.77.0.2 machine2\n")
    both = [Machine(number, tmp_path) for number in (1, 2)]
    first, second = (machine.space for machine in both)
    try:
        for machine in both:
            assert ip("netns", "add", machine.space)
        assert ip("link", "add", "cable1", "netns", first, "type", "veth", "peer", "cable2", "netns", second)
        for machine in both:
            cable = f"cable{machine.number}"
            assert ip("-n", machine.space, "addr", "add", f"10.77.0.{machine.number}/24", "dev", cable)
            assert ip("-n", machine.space, "link", "set", cable, "up")
            assert ip("-n", machine.space, "link", "set", "lo", "up")
        yield both
    finally:
        for machine in both:
            kill_marked(machine.mark)
            ip("netns", "del", machine.space)


def finish(machines: list[Machine]) -> None:
    for machine in machines:
        assert machine.process.wait(200) == 0, machine.text()
        assert_no_survivors(machine.mark)


def test_two_machines_and_one_that_is_killed_and_restarted(machines, tmp_path):
    first, second = machines
    for machine in machines:
        machine.start(tmp_path / "whole")
    finish(machines)
    assert "# processes: 2\n" in (tmp_path / "whole" / "config.yaml").read_text()
    assert "finished: 12 epochs" in first.text() + second.text()

    broken = tmp_path / "broken"
    for machine in machines:
        machine.start(broken)
    assert wait_for(lambda: (broken / "metrics.jsonl").exists() and len(rows(broken)) > 8, 100), first.text()
    kill_marked(second.mark)  # all of it at once, as when the power fails
    assert second.process.wait(20) == -signal.SIGKILL
    assert first.process.poll() is None
    assert wait_for(lambda: "another process is gone" in first.text(), 70), first.text()
    time.sleep(20)  # no machine is back sooner, and torchrun takes 15 s to give it up
    second.start(broken)
    finish(machines)
    assert "continuing from" in first.text() + second.text()
    assert_same_run(broken, tmp_path / "whole")


def test_both_machines_stop_together(machines, tmp_path):
    for machine in machines:
        machine.start(tmp_path / "run")
    log = tmp_path / "run" / "log.txt"
    assert wait_for(lambda: log.exists() and "epoch 2/12" in log.read_text(), 100), machines[0].text()
    for machine in machines:  # as srun does: torchrun alone would wait 5 minutes for the other torchrun
        machine.process.send_signal(signal.SIGTERM)  # `ip netns exec` has become torchrun
    for machine in machines:
        machine.process.wait(60)
        assert_no_survivors(machine.mark)
    assert log.read_text().count("stopped by SIGTERM") == 1
    for machine in machines:
        machine.start(tmp_path / "run")
    finish(machines)
    assert "finished: 12 epochs" in log.read_text()
