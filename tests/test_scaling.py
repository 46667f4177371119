"""scaling.py: formulas on cases worked out by hand, tables; measure_scaling.py: of real processes."""

import os
import sys
import time
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import ROOT, call, message, run_python, run_script

from resnext import resnext50_32x4d

sys.path.insert(0, str(ROOT / "scripts"))
import measure_scaling
import scaling

SCRIPT = "scripts/measure_scaling.py"
TINY = ["--config", "demo.yaml", "--images", "2", "--pixels", "8", "--megabytes", "0.1", "0.4"]


@pytest.fixture(scope="module")
def networks():
    return {network.name: network for network in scaling.load_networks()}


def setup(images=32, macs=4_230_479_872):
    links = tuple(scaling.Links(450e9, gbit * 1e9 / 8) for gbit in (400, 100, 25))
    return scaling.Setup(images=images, speed=1001.0, macs=macs, links=links)


def parse(text):
    """Headings → tables, as lists of cells; every row must be as long as its head."""
    found, title = {}, None
    for line in text.splitlines():
        if line.startswith("**"):
            title = line.strip("*")
        elif line.startswith("|"):
            assert line.endswith("|")
            found.setdefault(title, []).append([cell.strip() for cell in line[1:-1].split("|")])
    for rows in found.values():
        assert set(rows[1]) == {"---"}
        assert len(rows) > 2 and len({len(row) for row in rows}) == 1
    return found


# ---------------------------------------------------------------------------- formulas


def test_gradients_are_four_bytes_a_parameter(networks):
    assert list(networks) == list(scaling.NETWORKS)
    example = networks["resnext50_32x4d"]
    assert example.gradient_bytes == 25_028_904 * 4
    assert example.macs == setup().macs
    for network in networks.values():
        assert sum(network.buckets) == network.gradient_bytes


def test_a_bucket_is_closed_by_the_gradient_that_fills_it():
    mib = 1 << 20
    sizes = [mib // 2, mib, 16 * mib, 10 * mib, 20 * mib, 3 * mib]
    assert scaling.bucket_bytes(sizes) == (3 * mib // 2, 26 * mib, 23 * mib)
    assert scaling.bucket_bytes([5]) == (5,)
    assert scaling.bucket_bytes([2 * mib]) == (2 * mib,)


def test_buckets_are_those_of_the_real_thing(networks):
    model = resnext50_32x4d()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _, buckets = measure_scaling.time_steps(model, torch.randn(2, 3, 32, 32), repeats=1)
    finally:
        dist.destroy_process_group()
    assert tuple(buckets) == networks["resnext50_32x4d"].buckets


def test_bytes_of_a_ring():
    assert [scaling.ring_bytes(gpus, 120) for gpus in (1, 2, 3, 4)] == [0, 120, 160, 180]


def test_latency_of_ring_and_tree():
    # 14 hops in a node; 30 hops, of which 2 leave the first node and the second
    assert scaling.ring_latency(8) == pytest.approx((8.4 + 14 * 3.4) * 1e-6)
    assert scaling.ring_latency(16) == pytest.approx((8.4 + 28 * 3.4 + 2 * 14) * 1e-6)
    # 7 hops up and 7 down; with 8 nodes 3 levels more, up and down
    assert scaling.tree_latency(8) == pytest.approx((8.4 + 14 * 4) * 1e-6)
    assert scaling.tree_latency(64) == pytest.approx((8.4 + 14 * 4 + 6 * 14) * 1e-6)


def test_seconds_of_an_all_reduce():
    links = scaling.Links(nvlink=400e9, network=10e9)
    assert scaling.ring_seconds(1, 1e9, links) == scaling.tree_seconds(1, 1e9, links) == 0
    assert scaling.ring_seconds(8, 1e9, links) == pytest.approx(scaling.ring_latency(8) + 1.75 / 400)
    assert scaling.ring_seconds(16, 1e9, links) == pytest.approx(scaling.ring_latency(16) + 1.875 / 10)
    tree = scaling.tree_latency(16) + 2 / (0.92 * 0.7) / 10
    assert scaling.tree_seconds(16, 1e9, links) == pytest.approx(tree)
    assert scaling.all_reduce_seconds(16, 1e9, links) == scaling.ring_seconds(16, 1e9, links)
    assert scaling.all_reduce_seconds(1024, 1e6, links) == scaling.tree_seconds(1024, 1e6, links)


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


def test_a_step_and_its_efficiency():
    network = scaling.Network("two buckets", 0, 0, buckets=(10**9, 10**9))
    links = scaling.Links(nvlink=1e9, network=1e9)
    bucket = scaling.ring_seconds(4, 1e9, links)  # 1.5 s and latency
    assert scaling.step_seconds(network, 4, 9.0, links) == pytest.approx(9 + bucket)
    assert scaling.step_seconds(network, 4, 1.5, links) == pytest.approx(1.5 + 2 * bucket - 1)
    assert scaling.weak_efficiency(network, 4, 9.0, links) == pytest.approx(9 / (9 + bucket))


def test_efficiency_falls_with_every_doubling(networks):
    known = setup()
    for links in known.links:
        for network in networks.values():
            shares = scaling.weak_row(network, known, links)
            assert shares[0] == 1.0
            assert all(0 < after < before for before, after in pairwise(shares))


def test_a_shared_batch_ends_where_each_gpu_has_one_image(networks):
    known = setup()
    network = networks["resnext50_32x4d"]
    linear, floor = (scaling.strong_row(network, known, known.links[0], limit) for limit in (1, 16))
    assert len(linear) == len(floor) == 9  # 1 ... 256
    assert linear[0] == floor[0] == 1.0
    assert linear[:5] == floor[:5]  # 16 images and more
    assert all(low < high / 1.5 for low, high in zip(floor[5:], linear[5:], strict=True))


def test_time_of_an_image_goes_by_multiply_adds(networks):
    known = setup()
    assert known.image_seconds(networks["resnext50_32x4d"]) == pytest.approx(1 / 1001)
    ratio = networks["resnext101_64x4d"].macs / networks["resnext50_32x4d"].macs
    assert known.image_seconds(networks["resnext101_64x4d"]) == pytest.approx(ratio / 1001)


def test_fit_finds_latency_and_bandwidth():
    sizes = (10**6, 10**7, 10**8)
    exact = {str(size): [0.002 + scaling.ring_bytes(3, size) / 5e8] * 3 for size in sizes}
    assert measure_scaling.fit(3, exact) == pytest.approx((0.002, 5e8))
    assert measure_scaling.fit(2, {"1000000": [0.004]}) == pytest.approx((0.0, 10**6 / 0.004))
    falling = {"1000000": [0.001], "10000000": [0.02]}  # a latency below 0 would fit best
    assert measure_scaling.fit(2, falling)[0] == 0.0


# ---------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def printed(networks):
    with mock.patch.object(scaling, "load_networks", lambda: list(networks.values())):
        result = call(scaling.main)
    assert result.status == 0, result.error
    return result.output


def test_prints_tables(printed):
    assert printed.startswith("**Computed, not measured.**\n")
    found = parse(printed)
    assert len(found) == 10
    counts = {row[0]: row[1] for row in found["Networks"][2:]}
    assert counts["resnext50_32x4d"] == "25,028,904" and counts["resnext101_32x16d"] == "194,026,792"
    bytes_sent = next(rows for title, rows in found.items() if title.startswith("MB that each"))
    row = next(row for row in bytes_sent if row[0] == "resnext50_32x4d")
    assert row[1:4] == ["100.1", "150.2", "175.2"]
    weak = [
        rows for title, rows in found.items() if title.startswith("Efficiency, %: 32 images on each GPU, ")
    ]
    assert [rows[0][-1] for rows in weak[:3]] == ["1,024"] * 3
    assert {row[1] for rows in weak[:3] for row in rows[2:]} == {"100.0"}
    shared = next(rows for title, rows in found.items() if "global batch of 256, resnext50" in title)
    assert [row[1] for row in shared[-3:]] == ["1", "impossible", "impossible"]


def test_the_document_has_these_tables(printed):
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for block in printed.split("\n\n"):
        assert block.strip() in document, "made by `python scripts/scaling.py`: " + block[:200]


def test_options_replace_the_assumptions(networks, monkeypatch):
    monkeypatch.setattr(scaling, "load_networks", lambda: list(networks.values()))
    options = ["--images-per-second", "500", "--of", "resnet50", "--images", "64", "--network", "200"]
    found = parse(call(scaling.main, *options).output)
    row = next(row for row in found["Networks"] if row[0] == "resnet50")
    assert row[6:8] == ["2.00", "128.0"]
    titles = [title for title in found if "between nodes" in title]
    assert titles == ["Efficiency, %: 64 images on each GPU, 200 Gbit/s between nodes"]


def test_draws_a_chart(networks, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "load_networks", lambda: list(networks.values()))
    assert call(scaling.main, "--chart", tmp_path / "chart.png").status == 0
    assert (tmp_path / "chart.png").stat().st_size > 5000


def test_help_and_errors_do_not_load_torch():
    code = "import sys; sys.path.insert(0, 'scripts'); import scaling; print('torch' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).output == "False\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images-per-second", "0"], ["--images-per-second", "above 0", "'0'"]),
        (["--images-per-second", "fast"], ["--images-per-second", "'fast'"]),
        (["--nvlink", "-450"], ["--nvlink", "'-450'"]),
        (["--nvlink", "nan"], ["--nvlink", "'nan'"]),
        (["--network", "400", "inf"], ["--network", "'inf'"]),
        (["--images", "1.5"], ["--images", "whole number"]),
        (["--of", "resnet18"], ["--of", "resnet18", "resnext50_32x4d"]),
        (["--chart", "chart.txt"], ["--chart", ".png"]),
        (["--chart", "no/such/folder/chart.png"], ["no/such/folder"]),
        (["--processes", "0"], ["--processes", "'0'"]),
        (["--rounds", "0"], ["--rounds", "'0'"]),
        (["--config", "nothing.yaml"], ["nothing.yaml"]),
    ],
)
def test_wrong_values_end_with_one_message(options, words):
    measures = options[0] in ("--processes", "--rounds", "--config")
    text = message(call((measure_scaling if measures else scaling).main, *options))
    assert all(word in text for word in words), text


# ---------------------------------------------------------------------------- processes


def processes_of(marker):
    """Ids of live processes whose command line has the text."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    if marker.encode() in file.read():
                        found.append(int(entry.name))
            except OSError:  # gone meanwhile
                continue
    return found


def test_measures_two_processes(tmp_path):
    options = [*TINY, "--processes", "2", "--rounds", "1", "--repeats", "1"]
    result = run_script(SCRIPT, *options, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert result.status == 0, result.error
    assert "cores, Python 3." in result.output
    found = parse(result.output)
    assert [row[0] for row in found["all_reduce over gloo, ms"][2:4]] == ["0.1", "0.4"]
    waits = found["The exchange of a backward pass that only waits, ms"][2:]
    assert [row[:2] for row in waits] == [["2", pause] for pause in ("20", "50", "100", "200")]
    for row in waits:  # asleep for so long at least
        assert float(row[2].split()[0]) >= float(row[1])
    steps = found["A step of demo, 2 pictures of 8 pixels in each process, ms"][2:]
    assert [row[0] for row in steps] == ["2"]
    assert not processes_of(str(tmp_path))


def test_a_start_that_takes_too_long_is_ended(tmp_path):
    options = [*TINY, "--processes", "2", "--timeout", "1"]
    result = run_script(SCRIPT, *options, cwd=tmp_path, TMPDIR=str(tmp_path))
    text = message(result)
    assert "--timeout" in text and "2 processes" in text
    deadline = time.monotonic() + 20
    while processes_of(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(str(tmp_path))
