"""What several GPUs should gain: time of the gradient exchange and efficiency, computed.

    python scripts/scaling.py                                the tables of docs/scaling.md
    python scripts/scaling.py --images-per-second 2400       with the speed of your GPU on resnext50_32x4d
    python scripts/scaling.py --images-per-second 908.4 --of resnext101_32x4d --images 128 --nvlink 300
    python scripts/scaling.py --network 200 50               other networks between the nodes
    python scripts/scaling.py --chart FILE.png               draws efficiency over the number of GPUs

Arithmetic on stated constants: nothing in it is measured. It says what to expect of a cluster before it is
rented, and what limits it: bytes, latency or the last bucket. measure_scaling.py holds the same formulas
against the clock.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.errors import UserError, command_parser, run_command

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


def main() -> None:
    arguments = parse_arguments()
    networks = load_networks()
    setup = Setup(
        images=arguments.images,
        speed=arguments.images_per_second,
        macs=next(network.macs for network in networks if network.name == arguments.of),
        links=tuple(Links(arguments.nvlink * 1e9, speed * 1e9 / 8) for speed in arguments.network),
    )
    print("\n\n".join(tables(networks, setup)))
    if arguments.chart:
        draw(networks, setup, Path(arguments.chart))


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_number(
        parser, "--images-per-second", 1001.0, "X", "of one GPU in training; default: 1001 (timm, RTX 3090)"
    )
    parser.add_argument("--of", default=EXAMPLE, metavar="NETWORK", help=f"the one of X; default: {EXAMPLE}")
    add_number(parser, "--images", 32, "N", "on each GPU; default: 32", int)
    add_number(parser, "--nvlink", 450.0, "GB/s", "of a GPU inside a node, one direction; default: 450")
    add_number(
        parser,
        "--network",
        [400.0, 100.0, 25.0],
        "Gbit/s",
        "of a node to the others, one direction; default: 400 100 25",
        several=True,
    )
    parser.add_argument("--chart", metavar="FILE", help=".png, .svg or .pdf")
    arguments = parser.parse_args()
    if arguments.of not in NETWORKS:
        raise UserError(f"--of: must be one of {', '.join(NETWORKS)}, not {arguments.of!r}")
    if arguments.chart and Path(arguments.chart).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--chart {arguments.chart}: the name must end in .png, .svg or .pdf")
    if arguments.chart and not Path(arguments.chart).resolve().parent.is_dir():
        raise UserError(f"--chart {arguments.chart}: its folder does not exist; make it, or choose another")
    return arguments


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    default: Any,
    unit: str,
    help: str,
    kind: type = float,
    several: bool = False,
) -> None:
    """An option that takes a number above 0, or several."""
    count = "+" if several else None
    parser.add_argument(
        name, type=positive(name, kind), default=default, metavar=unit, help=help, nargs=count
    )


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


if __name__ == "__main__":
    run_command(main)
