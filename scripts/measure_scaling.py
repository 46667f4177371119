"""Time 1, 2 and 3 gloo processes on this machine, and hold the formulas of scaling.py against the clock.

    python scripts/measure_scaling.py
    python scripts/measure_scaling.py --processes 1 2 --config demo.yaml --pixels 20 --rounds 3

Starts real processes with torchrun: all-reduces of several sizes, backward passes that only wait, and steps
of a network, with the exchange of gradients and without.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # its own folder too, for python -P
from scaling import CLASSES, EXAMPLE, add_number, exposed_seconds, markdown, percent, ring_bytes, titled

from resnext.errors import UserError, command_parser, run_command

PAUSES = (0.02, 0.05, 0.1, 0.2)  # seconds of the backward passes that --measure only pretends


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
    else:
        print(measure(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_number(parser, "--images", 4, "N", "of a step, in each process; default: 4", int)
    add_number(parser, "--processes", [1, 2, 3], "N", "how many; default: 1 2 3", int, several=True)
    add_number(
        parser,
        "--megabytes",
        [0.001, 1.0, 5.0, 25.0, 100.0],
        "MB",
        "all-reduced; default: 0.001 1 5 25 100",
        several=True,
    )
    parser.add_argument(
        "--config",
        default=f"{EXAMPLE}.yaml",
        metavar="NAME",
        help=f"network of the steps; default: {EXAMPLE}",
    )
    add_number(parser, "--pixels", 64, "N", "side of its pictures; default: 64", int)
    add_number(parser, "--rounds", 5, "N", "starts of each number of processes; default: 5", int)
    add_number(parser, "--repeats", 5, "N", "timings of each kind in a start; default: 5", int)
    add_number(parser, "--timeout", 300, "S", "seconds for each start; default: 300", int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # where one of the processes writes its times
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> str:
    """Start the processes in turn, several times, and hold medians against the formulas; Markdown."""
    from resnext.config import find_config, read_config

    read_config(find_config(arguments.config))  # its errors ahead of the first start
    load = os.getloadavg()[0]
    results: dict[int, list[dict]] = {processes: [] for processes in arguments.processes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for processes in results:
                results[processes].append(start(processes, arguments, Path(folder)))
    merged = {processes: merge(found) for processes, found in results.items()}
    fits = {n: fit(n, found["all_reduce"]) for n, found in merged.items() if n > 1}
    title = f"A step of {arguments.config.removesuffix('.yaml')}, {arguments.images} pictures of "
    parts = [
        f"{next(iter(results.values()))[0]['hardware']}, load {load:.1f} at the start. "
        f"{arguments.rounds} starts of each number of processes in turn, {arguments.repeats} timings of each "
        "kind; medians, in brackets the quartiles.",
        titled("all_reduce over gloo, ms", all_reduce_table(merged, fits)),
        titled("The exchange of a backward pass that only waits, ms", pause_table(merged, fits)),
        titled(f"{title}{arguments.pixels} pixels in each process, ms", step_table(merged, fits)),
    ]
    return "\n\n".join(parts if fits else [parts[0], parts[3]])


def start(processes: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """Seconds as the first of so many processes wrote them."""
    from resnext.distributed import _end_with_parent

    target = folder / "times.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [__file__, "--worker", target, "--config", arguments.config, "--timeout", arguments.timeout]
    for name in ("images", "pixels", "repeats"):
        command += [f"--{name}", getattr(arguments, name)]
    command += ["--megabytes", *arguments.megabytes]
    # One thread each, so that a process alone has no more of the machine than one of two.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        torchrun = subprocess.Popen(
            [*map(str, command)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_end_with_parent,  # torchrun ends its processes when it is ended
        )
        try:
            torchrun.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--timeout: {processes} processes were not done within {arguments.timeout} s; raise it, or "
                "measure less (--megabytes, --pixels, --repeats)"
            ) from None
        finally:
            end(torchrun)
        if torchrun.returncode or not target.is_file():
            log.seek(0)
            raise RuntimeError(f"{processes} processes failed:\n{log.read()[-5000:]}")
    return json.loads(target.read_text(encoding="utf-8"))


def end(torchrun: subprocess.Popen) -> None:
    """Stop it if it still runs; it gives its processes 30 s."""
    torchrun.terminate()
    try:
        torchrun.wait(40)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


def work(arguments: argparse.Namespace) -> None:
    """One of the processes: time all-reduces and steps; the first writes what the slowest needed."""
    import torch

    from resnext.distributed import process_group, rank
    from resnext.reporting import environment

    torch.set_num_threads(1)
    with process_group(arguments.timeout):
        found: dict[str, Any] = {"all_reduce": time_all_reduce(arguments.megabytes, arguments.repeats)}
        pauses = [time_pauses(pause, max(arguments.megabytes), arguments.repeats) for pause in PAUSES]
        found["pauses"] = [seconds for seconds, _ in pauses]
        found["steps"], buckets = time_network(arguments)
        found["buckets"] = {"pauses": pauses[0][1], "steps": buckets}
        if rank() == 0:
            versions = environment(torch.device("cpu"))
            cores = len(os.sched_getaffinity(0))
            programs = f"Python {versions['python']}, torch {versions['torch']}"
            found["hardware"] = f"{versions['device'].partition(',')[0]}, {cores} cores, {programs}, loopback"
            Path(arguments.worker).write_text(json.dumps(found), encoding="utf-8")


Steps = tuple[dict[str, list[float]], list[int]]  # kind → seconds; bytes of the buckets


def time_all_reduce(megabytes: Sequence[float], repeats: int) -> dict[str, list[float]]:
    """Bytes → seconds of all_reduce, the sizes in turn, after one to warm up."""
    import torch
    import torch.distributed as dist

    buffers = [torch.zeros(max(1, round(size * 1e6 / 4))) for size in megabytes]
    seconds: dict[str, list[float]] = {str(buffer.nbytes): [] for buffer in buffers}
    for _ in range(1 + repeats):
        for buffer in buffers:
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(buffer)
            seconds[str(buffer.nbytes)].append(time.perf_counter() - begun)
    return {size: slowest(values[1:]) for size, values in seconds.items()}


def time_network(arguments: argparse.Namespace) -> Steps:
    """time_steps of a configured network on noise."""
    import torch

    from resnext.config import find_config, read_config
    from resnext.model import build_model

    torch.manual_seed(0)
    model = build_model(read_config(find_config(arguments.config)).model, CLASSES)
    images = torch.randn(arguments.images, 3, arguments.pixels, arguments.pixels)
    layout = torch.channels_last
    return time_steps(
        model.to(memory_format=layout), images.contiguous(memory_format=layout), arguments.repeats
    )


def time_pauses(pause: float, megabytes: float, repeats: int) -> Steps:
    """time_steps of 16 layers that sleep for `pause` s in all where a GPU would compute.

    Sleeping leaves the cores to the exchange, as a GPU does; a CPU that computes does not.
    """
    import torch
    from torch import nn

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight):
            context.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            (weight,) = context.saved_tensors
            time.sleep(pause / layers)
            return gradient, torch.zeros_like(weight)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(max(1, round(megabytes * 1e6 / 4 / layers))))

        def forward(self, x):
            return Pause.apply(x, self.weight)

    layers = 16
    return time_steps(
        nn.Sequential(*(Layer() for _ in range(layers))), torch.zeros(1, requires_grad=True), repeats
    )


def time_steps(model: Any, images: Any, repeats: int) -> Steps:
    """A forward and backward pass with exchange and without, in turn; "forward" is of the latter."""
    import torch
    import torch.distributed as dist

    from resnext.state import distribute

    device = torch.device("cpu")
    model = distribute(model, device, dist.group.WORLD)
    seconds: dict[str, list[float]] = {"exchanged": [], "alone": [], "forward": []}
    for _ in range(2 + repeats):  # the buckets are cut in the second
        for kind, context in (("exchanged", contextlib.nullcontext), ("alone", model.no_sync)):
            model.zero_grad(set_to_none=True)
            dist.barrier()
            begun = time.perf_counter()
            with context():
                loss = model(images).square().mean()
                if kind == "alone":
                    seconds["forward"].append(time.perf_counter() - begun)
                loss.backward()
            seconds[kind].append(time.perf_counter() - begun)
    sizes = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    found = {kind: slowest(values[2:]) for kind, values in seconds.items()}
    return found, [int(size) for size in sizes.split(",")]


def slowest(seconds: Sequence[float]) -> list[float]:
    """Of each timing, the longest among the processes: the others wait for it."""
    from resnext.distributed import gather

    return [max(values) for values in zip(*gather(list(seconds)), strict=True)]


def merge(results: Sequence[dict]) -> dict:
    """The timings of several starts, joined."""

    def joined(parts: Sequence[dict]) -> dict:
        return {kind: list(chain(*(part[kind] for part in parts))) for kind in parts[0]}

    return {
        "all_reduce": joined([result["all_reduce"] for result in results]),
        "pauses": [joined(parts) for parts in zip(*(result["pauses"] for result in results), strict=True)],
        "steps": joined([result["steps"] for result in results]),
        "buckets": {kind: results[0]["buckets"][kind] for kind in ("pauses", "steps")},
    }


Fit = tuple[float, float]  # latency in s; bytes/s that each process sends, and receives


def fit(processes: int, seconds: dict[str, list[float]]) -> Fit:
    """Latency and bandwidth that come closest to the medians, by least squares of relative errors."""
    points = [(ring_bytes(processes, int(size)), statistics.median(v)) for size, v in seconds.items()]
    rows = [(1 / measured, sent / measured) for sent, measured in points]  # latency·x + y/bandwidth = 1
    xx, xy, yy = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(column) for column in zip(*rows, strict=True))
    latency = (x * yy - y * xy) / (xx * yy - xy * xy) if len(rows) > 1 else 0.0
    if latency <= 0:  # noise
        return 0.0, yy / y
    return latency, xy / (x - latency * xx)


def fitted(processes: int, size: float, found: Fit) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    return found[0] + ring_bytes(processes, size) / found[1]


def all_reduce_table(merged: dict[int, dict], fits: dict[int, Fit]) -> str:
    first, *others = fits
    head = ["MB", *chain(*((f"{n} processes", "fit") for n in fits)), *(f"{n} over {first}" for n in others)]
    rows: list[list[str]] = []
    for size in merged[first]["all_reduce"]:
        times = {n: merged[n]["all_reduce"][size] for n in fits}
        cells = chain(*((spread(times[n]), milliseconds(fitted(n, int(size), fits[n]))) for n in fits))
        ratios = [statistics.median(times[n]) / statistics.median(times[first]) for n in others]
        rows.append([f"{int(size) / 1e6:g}", *cells, *(f"{ratio:.2f}" for ratio in ratios)])
    latencies = chain(*(("", f"{1e3 * fits[n][0]:.2f}") for n in fits))
    speeds = chain(*(("", f"{fits[n][1] / 1e9:.2f}") for n in fits))
    own = [ring_bytes(n, 1) / ring_bytes(first, 1) for n in others]
    blank = [""] * (2 * len(fits))
    base = fits[first][0]
    grown = [f"{fits[n][0] / base:.2f}" if base else "–" for n in others]
    rows.append(["latency, ms", *latencies, *grown])
    rows.append(["GB/s sent by each", *speeds, *(f"{fits[n][1] / fits[first][1]:.2f}" for n in others)])
    rows.append(["bytes sent by each", *blank, *(f"{ratio:.2f}" for ratio in own)])
    whole = [f"{n / first * ratio:.2f}" for n, ratio in zip(others, own, strict=True)]
    rows.append(["bytes sent by all", *blank, *whole])
    return markdown(head, rows)


def pause_table(merged: dict[int, dict], fits: dict[int, Fit]) -> str:
    rows = []
    for n in merged:
        for pause, found in zip(PAUSES, merged[n]["pauses"], strict=True):
            rows.append(
                [
                    n,
                    f"{1e3 * pause:.0f}",
                    *exposed_cells(n, found, merged[n]["buckets"]["pauses"], fits.get(n)),
                ]
            )
    return markdown(["processes", "sleep", *EXPOSED_HEAD], rows)


def step_table(merged: dict[int, dict], fits: dict[int, Fit]) -> str:
    first = next(iter(merged))
    alone = statistics.median(merged[first]["steps"]["alone"])
    rows = []
    for n, found in merged.items():
        share = 1 - statistics.median(found["steps"]["forward"]) / statistics.median(found["steps"]["alone"])
        efficiency = alone / statistics.median(found["steps"]["exchanged"])
        cells = exposed_cells(n, found["steps"], found["buckets"]["steps"], fits.get(n))
        rows.append([n, f"{percent(share)} %", *cells, f"{percent(efficiency)} %"])
    last = f"efficiency against {first}"
    return markdown(["processes", "backward's share", *EXPOSED_HEAD, last], rows)


EXPOSED_HEAD = ("without exchange", "with", "exposed, measured", "formula", "all buckets", "last bucket")


def exposed_cells(processes: int, found: dict, sizes: Sequence[int], speed: Fit | None) -> list[str]:
    """Cells under EXPOSED_HEAD; the last three follow from bytes of the buckets and the fit of all_reduce."""
    exchanged, alone, forward = (statistics.median(found[k]) for k in ("exchanged", "alone", "forward"))
    cells = [spread(found["alone"]), spread(found["exchanged"]), f"{1e3 * (exchanged - alone):.0f}"]
    if speed is None:
        return [*cells, "–", "–", "–"]
    buckets = [fitted(processes, size, speed) for size in sizes]
    values = (exposed_seconds(buckets, alone - forward), sum(buckets), buckets[-1])
    return cells + [f"{1e3 * value:.0f}" for value in values]


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in ms."""
    several = seconds if len(seconds) > 1 else [*seconds] * 2
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return f"{milliseconds(middle)} ({milliseconds(low)}–{milliseconds(high)})"


def milliseconds(seconds: float) -> str:
    """Three digits of it."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


if __name__ == "__main__":
    run_command(main)
