"""scaling.py: the cost model on cases worked out by hand, its table, and measurements of real processes."""

import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from commands import ROOT, call, message, run_python

from resnext import resnext50_32x4d

sys.path.insert(0, str(ROOT / "scripts"))
import scaling

LINKS = (50e9, 12.5e9, 3.125e9)  # bytes/s: 400, 100 and 25 Gbit/s
IMAGE = 1 / 1001  # seconds


@pytest.fixture(scope="module")
def buckets():
    return scaling.bucket_bytes(scaling.gradient_bytes(scaling.load_network("resnext50_32x4d", "meta")))


def parse(text):
    """The tables of a Markdown text, as lists of rows of cells; every row must be as long as its head."""
    found, last = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            if not last.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        last = line
    for rows in found:
        assert set(rows[1]) == {"---"}
        assert len(rows) > 2 and len({len(row) for row in rows}) == 1
    return found


# ---------------------------------------------------------------------------- formulas


def test_gradients_are_four_bytes_a_parameter(buckets):
    assert sum(buckets) == 25_028_904 * 4


def test_a_bucket_is_closed_by_the_gradient_that_fills_it():
    mib = 1 << 20
    sizes = [mib // 2, mib, 16 * mib, 10 * mib, 20 * mib, 3 * mib]
    assert scaling.bucket_bytes(sizes) == [3 * mib // 2, 26 * mib, 23 * mib]
    assert scaling.bucket_bytes([5]) == [5]
    assert scaling.bucket_bytes([2 * mib]) == [2 * mib]


def test_buckets_are_those_of_the_real_thing(buckets):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _, real = scaling.time_steps(resnext50_32x4d(), torch.randn(2, 3, 32, 32), repeats=1)
    finally:
        dist.destroy_process_group()
    assert real == buckets


def test_bytes_of_a_ring():
    assert [scaling.ring_bytes(gpus, 120) for gpus in (1, 2, 3, 4)] == [0, 120, 160, 180]


def test_latency_of_a_ring():
    # 14 hops in a node; 30 hops, of which 2 leave the first node and the second
    assert scaling.ring_latency(8) == pytest.approx((8.4 + 14 * 3.4) * 1e-6)
    assert scaling.ring_latency(16) == pytest.approx((8.4 + 28 * 3.4 + 2 * 14) * 1e-6)


def test_seconds_of_an_all_reduce():
    assert scaling.all_reduce_seconds(1, 1e9, 400e9) == 0
    assert scaling.all_reduce_seconds(8, 1e9, 400e9) == pytest.approx(scaling.ring_latency(8) + 1.75 / 400)
    assert scaling.all_reduce_seconds(16, 1e9, 10e9) == pytest.approx(scaling.ring_latency(16) + 1.875 / 10)


@pytest.mark.parametrize(
    ("buckets", "backward", "exposed"),
    [
        ([1.0, 1.0, 1.0], 10.0, 1.0),  # all but the last are hidden
        ([5.0, 5.0, 2.0], 6.0, 6.0),  # the backward pass hides half of it
        ([5.0, 5.0, 2.0], 0.0, 12.0),  # nothing to hide behind
        ([3.0], 10.0, 3.0),  # one bucket is sent when all is done
        ([0.0, 0.0], 1.0, 0.0),
    ],
)
def test_exposed_time(buckets, backward, exposed):
    assert scaling.exposed_seconds(buckets, backward) == exposed


def test_efficiency():
    two = [10**9, 10**9]
    bucket = scaling.all_reduce_seconds(4, 1e9, 1e9)  # 1.5 s and latency
    assert scaling.efficiency(two, 4, 3.0, 3, 1e9, 1) == pytest.approx(9 / (9 + bucket))
    assert scaling.efficiency(two, 4, 0.5, 3, 1e9, 1) == pytest.approx(1.5 / (1.5 + 2 * bucket - 1))
    # the time of 6 images for 3
    assert scaling.efficiency(two, 4, 3.0, 3, 1e9, 6) == pytest.approx(9 / (18 + bucket))


@pytest.mark.parametrize("link", LINKS)
def test_efficiency_falls_with_every_doubling(buckets, link):
    split_batch = [scaling.efficiency(buckets, gpus, IMAGE, 32, link, 1) for gpus in scaling.GPUS]
    assert split_batch[0] == 1.0
    assert all(0 < after < before for before, after in pairwise(split_batch))


def test_a_floor_halves_what_more_gpus_gain(buckets):
    linear, floor = (
        [scaling.efficiency(buckets, gpus, IMAGE, 256 / gpus, LINKS[0], limit) for gpus in scaling.GPUS]
        for limit in (1, 16)
    )
    assert linear[0] == floor[0] == 1.0
    assert linear[:5] == floor[:5]  # 16 images and more
    assert all(low < high / 1.5 for low, high in zip(floor[5:], linear[5:], strict=True))


# ---------------------------------------------------------------------------- command line


def test_prints_a_table_that_the_document_has():
    result = call(scaling.main)
    assert result.status == 0, result.error
    assert result.output.startswith("**Computed, not measured.** resnext50_32x4d: 100.1 MB of gradients")
    (table,) = parse(result.output)
    assert [row[1] for row in table[2:]] == ["400", "100", "25"] * 3
    assert {row[2] for row in table[2:]} == {"100.0"}
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for block in result.output.split("\n\n"):
        assert block.strip() in document, "made by `python scripts/scaling.py`: " + block[:200]


def test_options_replace_the_assumptions():
    slow = ["--images-per-second", "500", "--images", "64", "--nvlink", "0.1", "--network", "200"]
    output = call(scaling.main, "--config", "resnet50.yaml", *slow).output
    assert "128.0 ms for 64 images" in output
    (table,) = parse(output)
    assert [row[:2] for row in table[2:]] == [
        ["weak: 64 on each GPU", "200"],
        ["strong: 256 in all", "200"],
        ["strong, floor of 16", "200"],
    ]
    assert float(table[2][5]) < 10  # 8 GPUs over 0.1 GB/s


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images-per-second", "0"], ["--images-per-second", "above 0", "'0'"]),
        (["--images-per-second", "fast"], ["--images-per-second", "'fast'"]),
        (["--nvlink", "-450"], ["--nvlink", "'-450'"]),
        (["--nvlink", "nan"], ["--nvlink", "'nan'"]),
        (["--network", "400", "inf"], ["--network", "'inf'"]),
        (["--images", "1.5"], ["--images", "whole number"]),
        (["--repeats", "0"], ["--repeats", "'0'"]),
        (["--config", "resnet50.yaml"], ["--images-per-second", "resnext50_32x4d"]),
        (["--config", "nothing.yaml", "--images-per-second", "9"], ["nothing.yaml"]),
        (["--measure"], ["--measure", "torchrun"]),
    ],
)
def test_wrong_values_end_with_one_message(options, words):
    text = message(call(scaling.main, *options))
    assert all(word in text for word in words), text


# ---------------------------------------------------------------------------- processes


def test_measures_two_processes(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [ROOT / "scripts" / "scaling.py", "--measure", "--config", "demo.yaml", "--repeats", "2"]
    options = ["--images", "2", "--pixels", "8", "--megabytes", "0.1", "0.4"]
    result = run_python(*torchrun, *script, *options, cwd=tmp_path)
    assert result.status == 0, result.error
    assert result.output.startswith("2 processes, ") and result.output.count("2 processes") == 1
    all_reduce, step = parse(result.output)
    assert [row[0] for row in all_reduce[2:4]] == ["0.1", "0.4"]
    for size, seconds, speed in all_reduce[2:]:  # with 2 processes each sends so many bytes
        assert float(speed) == pytest.approx(float(size) / float(seconds.split()[0]), rel=0.05)
    assert "A step of demo.yaml, 2 images of 8 pixels in each process, ms" in result.output
    alone, synced, exposed, computed, backward, efficiency = (float(cell.split()[0]) for cell in step[2])
    assert exposed == pytest.approx(synced - alone, abs=0.1) and computed > 0
    assert 0 < backward < 100
    assert efficiency == pytest.approx(100 * alone / synced, abs=0.1)
