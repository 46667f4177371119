"""What several GPUs should gain: time of the gradient exchange and efficiency, computed.

    python scripts/scaling.py                                the tables of docs/scaling.md
    python scripts/scaling.py --images-per-second 2400       with the speed of your GPU on resnext50_32x4d
    python scripts/scaling.py --images-per-second 908.4 --of resnext101_32x4d --images 128 --nvlink 300
    python scripts/scaling.py --network 200 50               other networks between the nodes
    python scripts/scaling.py --chart FILE.png               draws efficiency over the number of GPUs
    python scripts/scaling.py --measure                      times 1, 2 and 3 gloo processes on this machine

All but the last are arithmetic on stated constants: nothing in them is measured. They say what to expect
of a cluster before it is rented, and what limits it: bytes, latency or the last bucket. --measure starts real
processes with torchrun and holds the same formulas against the clock.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.errors import UserError, run_command

NETWORKS = (
    "resnet50",
    "resnext50_32x4d",
    "resnet101",
    "resnext101_32x4d",
    "resnext101_64x4d",
    "resnext101_32x8d",
    "resnext152_32x4d",
    "resnext101_32x16d",
)
EXAMPLE = "resnext50_32x4d"  # in tables of one network
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE = 8
GLOBAL_BATCH = 256  # of the recipe
CLASSES, PIXELS = 1000, 224

BACKWARD_SHARE = 2 / 3  # of a step: gradients of inputs and of weights, against one forward pass
FLOOR_IMAGES = 16  # a step of fewer images takes no less time
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes: DistributedDataParallel's defaults

# NCCL's own estimates (src/graph/tuning.cc, protocol "Simple"), seconds: of each call, and of each hop.
BASE_LATENCY = 8.4e-6
RING_NVLINK, RING_NETWORK = 3.4e-6, 14e-6
TREE_NVLINK, TREE_NETWORK = 4.0e-6, 14e-6
TREE_BANDWIDTH = 0.92 * 0.7  # of a ring's, for buffers of 16 to 64 MB

PAUSES = (0.02, 0.05, 0.1, 0.2)  # seconds of the backward passes that --measure only pretends


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
    elif arguments.measure:
        print(measure(arguments))
    else:
        networks = load_networks()
        setup = Setup(
            images=arguments.images or 32,
            speed=arguments.images_per_second,
            macs=next(network.macs for network in networks if network.name == arguments.of),
            links=tuple(Links(arguments.nvlink * 1e9, speed * 1e9 / 8) for speed in arguments.network),
        )
        print("\n\n".join(tables(networks, setup)))
        if arguments.chart:
            draw(networks, setup, Path(arguments.chart))


def parse_arguments() -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def number(
        name: str, default: Any, unit: str, help: str, kind: type = float, several: bool = False
    ) -> None:
        parser.add_argument(
            name,
            type=positive(name, kind),
            default=default,
            metavar=unit,
            help=help,
            nargs="+" if several else None,
        )

    number("--images-per-second", 1001.0, "X", "of one GPU in training; default: 1001 (timm, RTX 3090)")
    parser.add_argument("--of", default=EXAMPLE, metavar="NETWORK", help=f"the one of X; default: {EXAMPLE}")
    number("--images", None, "N", "on each GPU; default: 32, with --measure 4", int)
    number("--nvlink", 450.0, "GB/s", "of a GPU inside a node, one direction; default: 450")
    number(
        "--network",
        [400.0, 100.0, 25.0],
        "Gbit/s",
        "of a node to the others, one direction; default: 400 100 25",
        several=True,
    )
    parser.add_argument("--chart", metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument("--measure", action="store_true", help="time processes here; the rest is for this")
    number("--processes", [1, 2, 3], "N", "how many; default: 1 2 3", int, several=True)
    number(
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
    number("--pixels", 64, "N", "side of its pictures; default: 64", int)
    number("--rounds", 5, "N", "starts of each number of processes; default: 5", int)
    number("--repeats", 5, "N", "timings of each kind in a start; default: 5", int)
    number("--timeout", 300, "S", "seconds for each start; default: 300", int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # where a process of --measure writes its times
    arguments = parser.parse_args()
    if arguments.of not in NETWORKS:
        raise UserError(f"--of: must be one of {', '.join(NETWORKS)}, not {arguments.of!r}")
    if arguments.chart and Path(arguments.chart).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--chart {arguments.chart}: the name must end in .png, .svg or .pdf")
    if arguments.chart and not Path(arguments.chart).resolve().parent.is_dir():
        raise UserError(f"--chart {arguments.chart}: its folder does not exist; make it, or choose another")
    return arguments


def positive(option: str, kind: type) -> Callable[[str], float]:
    """A reader of an option's numbers."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            what = "whole number" if kind is int else "number"
            raise UserError(f"{option}: must be a {what} above 0, not {text!r}")
        return value

    return read


# ---------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Network:
    """What the exchange depends on; `buckets` are bytes, in the order they are sent."""

    name: str
    parameters: int
    macs: int  # of one image, forward
    buckets: tuple[int, ...]

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters  # fp32, whatever train.precision is


@dataclass(frozen=True)
class Links:
    """Bytes/s in one direction: of a GPU inside its node, and of a whole node to the others."""

    nvlink: float
    network: float


@dataclass(frozen=True)
class Setup:
    """The assumptions that options change: a speed in images/s, and the multiply-adds of its network."""

    images: int  # on each GPU
    speed: float
    macs: int
    links: tuple[Links, ...]

    def image_seconds(self, network: Network) -> float:
        """Seconds of training on one image: the known speed, by the ratio of multiply-adds."""
        return network.macs / self.macs / self.speed


def load_networks() -> list[Network]:
    """Counted on the networks themselves, without memory for their weights."""
    import torch

    from resnext.config import find_config, read_config
    from resnext.model import build_model, complexity

    found = []
    for name in NETWORKS:
        with torch.device("meta"):
            model = build_model(read_config(find_config(f"{name}.yaml")).model, CLASSES)
        found.append(Network(name, *complexity(model, PIXELS), bucket_bytes(arrivals(model))))
    return found


def arrivals(model: Any) -> list[int]:
    """Bytes of the gradients in the order in which a backward pass makes them; the model is on `meta`."""
    import torch

    sizes: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: sizes.append(4 * p.numel()))
    model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    return sizes


def bucket_bytes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Bytes of DistributedDataParallel's buckets: a bucket is closed by the gradient that fills it."""
    buckets, filled, limit = [], 0, FIRST_BUCKET
    for size in sizes:
        filled += size
        if filled >= limit:
            buckets.append(filled)
            filled, limit = 0, BUCKET
    return (*buckets, filled) if filled else tuple(buckets)


def ring_bytes(gpus: int, size: float) -> float:
    """Bytes that each GPU sends, and receives, when `size` bytes are all-reduced in a ring."""
    return 2 * (gpus - 1) / gpus * size


def ring_latency(gpus: int) -> float:
    """Seconds that 2(N-1) hops take, of which 2(nodes-1) cross the network."""
    crossing = 2 * (math.ceil(gpus / GPUS_PER_NODE) - 1)
    return BASE_LATENCY + (2 * (gpus - 1) - crossing) * RING_NVLINK + crossing * RING_NETWORK


def ring_seconds(gpus: int, size: float, links: Links) -> float:
    """Seconds of an all-reduce of `size` bytes in a ring through all GPUs."""
    return ring_latency(gpus) + ring_bytes(gpus, size) / slowest_link(gpus, links) if gpus > 1 else 0.0


def tree_latency(gpus: int) -> float:
    """Seconds up and down a tree: a chain inside each node, a binary tree of the nodes."""
    inside = min(gpus, GPUS_PER_NODE) - 1
    levels = math.log2(math.ceil(gpus / GPUS_PER_NODE))
    return BASE_LATENCY + 2 * (inside * TREE_NVLINK + levels * TREE_NETWORK)


def tree_seconds(gpus: int, size: float, links: Links) -> float:
    """The same over a tree, where every byte goes up once and comes down once."""
    speed = TREE_BANDWIDTH * slowest_link(gpus, links)
    return tree_latency(gpus) + 2 * size / speed if gpus > 1 else 0.0


def slowest_link(gpus: int, links: Links) -> float:
    """Bytes/s of the link that holds up the others; one flow enters and one leaves each node."""
    return links.nvlink if gpus <= GPUS_PER_NODE else min(links.nvlink, links.network)


def all_reduce_seconds(gpus: int, size: float, links: Links) -> float:
    """The quicker of ring and tree, which is how NCCL chooses."""
    return min(ring_seconds(gpus, size, links), tree_seconds(gpus, size, links))


def exposed_seconds(buckets: Sequence[float], backward: float) -> float:
    """Seconds that a step waits for an exchange whose buckets take so long, one after the other.

    All but the last are sent while the backward pass goes on; the last is full when it ends.
    """
    return max(buckets[-1], sum(buckets) - backward)


def step_seconds(
    network: Network, gpus: int, compute: float, links: Links, exchange: Callable = all_reduce_seconds
) -> float:
    """Seconds of a step in which each GPU computes for `compute` s."""
    buckets = [exchange(gpus, size, links) for size in network.buckets]
    return compute + exposed_seconds(buckets, BACKWARD_SHARE * compute)


def weak_efficiency(
    network: Network, gpus: int, compute: float, links: Links, exchange: Callable = all_reduce_seconds
) -> float:
    """Speed of N GPUs over N times that of one, where each computes for `compute` s a step."""
    return compute / step_seconds(network, gpus, compute, links, exchange)


def strong_efficiency(network: Network, gpus: int, image: float, links: Links, floor: int) -> float:
    """The same where they share the recipe's global batch, at `image` s for each image.

    A step takes the time of `floor` images at least.
    """
    compute = image * max(GLOBAL_BATCH / gpus, floor)
    return image * GLOBAL_BATCH / gpus / step_seconds(network, gpus, compute, links)


# ---------------------------------------------------------------------------- tables


def tables(networks: Sequence[Network], setup: Setup) -> list[str]:
    """All tables in Markdown, with their headings."""
    example = next(network for network in networks if network.name == EXAMPLE)
    images, fastest = f"{setup.images} images on each GPU", setup.links[0]
    return [
        "**Computed, not measured.**",
        titled("Networks", network_table(networks, setup)),
        titled("MB that each GPU sends, and receives, in a step; ring", bytes_table(networks)),
        titled("Time of a step's all-reduces, ms; ring, before any overlap", seconds_table(networks, setup)),
        titled(
            f"Ring and tree: {EXAMPLE}, {images}, {gbit(fastest)}", algorithm_table(example, setup, fastest)
        ),
        *(
            titled(
                f"Efficiency, %: {images}, {gbit(links)} between nodes", weak_table(networks, setup, links)
            )
            for links in setup.links
        ),
        titled(f"Efficiency, %: {images}, faster GPUs, {EXAMPLE}", speed_table(example, setup)),
        titled(f"Efficiency, %: global batch of {GLOBAL_BATCH}, {EXAMPLE}", strong_table(example, setup)),
        titled(
            f"Efficiency, %: global batch of {GLOBAL_BATCH}, {gbit(fastest)}, floor of {FLOOR_IMAGES} images",
            strong_networks_table(networks, setup, fastest),
        ),
    ]


def network_table(networks: Sequence[Network], setup: Setup) -> str:
    head = ["network", "parameters", "GMACs", "gradients, MB", "buckets", "last bucket, MB", "ms an image"]
    rows = []
    for network in networks:
        image = 1e3 * setup.image_seconds(network)
        row = [network.name, f"{network.parameters:,}", f"{network.macs / 1e9:.2f}"]
        row += [
            f"{network.gradient_bytes / 1e6:.1f}",
            len(network.buckets),
            f"{network.buckets[-1] / 1e6:.1f}",
        ]
        times = (image, setup.images * image, BACKWARD_SHARE * setup.images * image)
        rows.append([*row, f"{times[0]:.2f}", f"{times[1]:.1f}", f"{times[2]:.1f}"])
    return markdown([*head, f"step of {setup.images}, ms", "of it backward, ms"], rows)


def bytes_table(networks: Sequence[Network]) -> str:
    def cells(network: Network) -> list[str]:
        return [f"{ring_bytes(gpus, network.gradient_bytes) / 1e6:,.1f}" for gpus in GPUS[1:]]

    return markdown(["GPUs", *map(thousands, GPUS[1:])], [[n.name, *cells(n)] for n in networks])


def seconds_table(networks: Sequence[Network], setup: Setup) -> str:
    columns = [(GPUS_PER_NODE, setup.links[0])]
    columns += [(gpus, links) for gpus in (64, 1024) for links in setup.links]
    names = ["NVLink", *(gbit(links) for _, links in columns[1:])]
    rows = []
    for network in networks:
        times = [sum(ring_seconds(gpus, size, links) for size in network.buckets) for gpus, links in columns]
        rows.append([network.name, *(f"{1e3 * seconds:.1f}" for seconds in times)])
    rows.append(["of it latency of each bucket", *(f"{1e3 * ring_latency(gpus):.2f}" for gpus, _ in columns)])
    head = [f"{gpus:,} GPUs, {name}" for (gpus, _), name in zip(columns, names, strict=True)]
    return markdown(["network", *head], rows)


def algorithm_table(network: Network, setup: Setup, links: Links) -> str:
    compute = setup.images * setup.image_seconds(network)
    kinds = (ring_seconds, tree_seconds, all_reduce_seconds)
    rows = []
    for gpus in GPUS[3:]:
        seconds = (ring_latency(gpus), tree_latency(gpus), *(kind(gpus, BUCKET, links) for kind in kinds[:2]))
        shares = [weak_efficiency(network, gpus, compute, links, kind) for kind in kinds]
        rows.append([f"{gpus:,}", *(f"{1e3 * value:.2f}" for value in seconds), *map(percent, shares)])
    head = ["GPUs", "latency, ring, ms", "latency, tree, ms", "25 MiB, ring, ms", "25 MiB, tree, ms"]
    return markdown([*head, "efficiency, ring, %", "tree, %", "the quicker, %"], rows)


def weak_table(networks: Sequence[Network], setup: Setup, links: Links) -> str:
    rows = [[n.name, *map(percent, weak_row(n, setup, links))] for n in networks]
    return markdown(["GPUs", *map(thousands, GPUS)], rows)


def weak_row(network: Network, setup: Setup, links: Links, factor: float = 1.0) -> list[float]:
    """Efficiencies over GPUS on GPUs that are `factor` times as fast as assumed."""
    compute = setup.images * setup.image_seconds(network) / factor
    return [weak_efficiency(network, gpus, compute, links) for gpus in GPUS]


def speed_table(network: Network, setup: Setup) -> str:
    speed = 1 / setup.image_seconds(network)
    rows = [
        [gbit(links), f"{factor * speed:,.0f}", *map(percent, weak_row(network, setup, links, factor))]
        for links in setup.links
        for factor in (1, 2, 4)
    ]
    return markdown(["between nodes", "images/s of one GPU", *map(thousands, GPUS)], rows)


def strong_row(network: Network, setup: Setup, links: Links, floor: int) -> list[float]:
    """Efficiencies over those of GPUS that have an image each."""
    image = setup.image_seconds(network)
    return [strong_efficiency(network, gpus, image, links, floor) for gpus in GPUS if gpus <= GLOBAL_BATCH]


def strong_table(network: Network, setup: Setup) -> str:
    kinds = [(links, floor) for floor in (1, FLOOR_IMAGES) for links in setup.links]
    columns = [strong_row(network, setup, links, floor) for links, floor in kinds]
    gains = [gpus * share for gpus, share in zip(GPUS, columns[len(setup.links)], strict=False)]
    rows = []
    for gpus, gain, *shares in zip(GPUS, gains, *columns, strict=False):
        images = GLOBAL_BATCH // gpus
        step = 1e3 * images * setup.image_seconds(network)
        rows.append([gpus, images, f"{step:.1f}", *map(percent, shares), f"{gain:.1f}x"])
    for gpus in GPUS[len(rows) :]:
        rows.append([f"{gpus:,}", "impossible", *["–"] * (len(kinds) + 2)])
    head = [f"{gbit(links)}, {'linear' if floor == 1 else 'floor'}" for links, floor in kinds]
    last = f"gain, {gbit(setup.links[0])}, floor"
    return markdown(["GPUs", "images on each", "linear step, ms", *head, last], rows)


def strong_networks_table(networks: Sequence[Network], setup: Setup, links: Links) -> str:
    rows = [[n.name, *map(percent, strong_row(n, setup, links, FLOOR_IMAGES))] for n in networks]
    return markdown(["GPUs", *GPUS[: len(rows[0]) - 1]], rows)


def titled(title: str, table: str) -> str:
    return f"**{title}**\n\n{table}"


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def gbit(links: Links) -> str:
    return f"{8 * links.network / 1e9:g} Gbit/s"


def thousands(number: int) -> str:
    return f"{number:,}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def draw(networks: Sequence[Network], setup: Setup, path: Path) -> None:
    """Efficiency over GPUs: with so many images on each, and with a shared global batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (weak, strong) = pyplot.subplots(1, 2, figsize=(8.5, 3.5), sharey=True, layout="constrained")
    example = next(network for network in networks if network.name == EXAMPLE)
    counts = [gpus for gpus in GPUS if gpus <= GLOBAL_BATCH]
    for number, links in enumerate(setup.links):
        style = {"color": f"C{number}", "markersize": 3}
        columns = list(zip(*(weak_row(network, setup, links) for network in networks), strict=True))
        lowest, highest = ([100 * limit(column) for column in columns] for limit in (min, max))
        weak.fill_between(GPUS, lowest, highest, color=f"C{number}", alpha=0.2, linewidth=0)
        weak.plot(GPUS, [100 * x for x in weak_row(example, setup, links)], "o-", label=gbit(links), **style)
        for floor, line in ((1, "--"), (FLOOR_IMAGES, "o-")):
            strong.plot(counts, [100 * x for x in strong_row(example, setup, links, floor)], line, **style)
    weak.set(title=f"{setup.images} images on each GPU", ylabel="efficiency, %", ylim=(0, 103))
    strong.set(title=f"global batch of {GLOBAL_BATCH}; dashed: no floor")
    weak.legend(title="between nodes", loc="lower left")
    for axes, ticks in ((weak, GPUS[::2]), (strong, counts[::2])):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{gpus:,}" for gpus in ticks])
        axes.set_xlabel(f"GPUs, {GPUS_PER_NODE} in a node")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Computed, not measured: {EXAMPLE}; shaded: range of {len(networks)} networks", fontsize=10
    )
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


# ---------------------------------------------------------------------------- measuring


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
    title = f"A step of {arguments.config.removesuffix('.yaml')}, {arguments.images or 4} pictures of "
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
    command += [
        "--images",
        arguments.images or 4,
        "--pixels",
        arguments.pixels,
        "--repeats",
        arguments.repeats,
    ]
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
