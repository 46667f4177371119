"""What data-parallel training gains from several GPUs: efficiency computed, communication measured.

    python scripts/scaling.py                               the table of docs/scaling.md
    python scripts/scaling.py --config resnext101_32x4d.yaml --images-per-second 908 --images 128 --nvlink 300
    torchrun --nproc-per-node=2 scripts/scaling.py --measure --images 4

Without --measure it is arithmetic on stated constants and says what to expect of a cluster before renting it.
With it, the processes time all-reduces over gloo, and steps on CPUs with and without the all-reduce.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.config import find_config, read_config
from resnext.distributed import all_gather_objects, process_group, rank, world_size
from resnext.engine.logger import environment
from resnext.engine.train_state import distribute
from resnext.errors import TORCHRUN, UserError, command_parser, run_main
from resnext.models.resnext import ResNeXt, build_model

Times = list[float]  # seconds
Timings = dict[Any, Times]  # kind or bytes → seconds
EXAMPLE, EXAMPLE_SPEED = "resnext50_32x4d", 1001.0  # images/s of an RTX 3090 (timm)
GPUS, GPUS_PER_NODE = (1, 2, 4, 8, 16, 32, 64), 8
GLOBAL_BATCH, CLASSES = 256, 1000  # of the recipe
BACKWARD_SHARE = 2 / 3  # of a step: gradients of inputs and of weights, against one forward pass
FLOOR_IMAGES = 16  # a step of fewer images takes no less time
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes: DistributedDataParallel's defaults
# NCCL's own estimates (src/graph/tuning.cc, ring, protocol "Simple"), seconds: of each call, and of each hop.
CALL_LATENCY, NVLINK_LATENCY, NETWORK_LATENCY = 8.4e-6, 3.4e-6, 14e-6

OPTIONS: dict[str, tuple[type, Any, str, str]] = {  # type, default, unit, help
    "--images": (int, 32, "N", "on each GPU or process; default: 32"),
    "--images-per-second": (float, None, "X", f"of one GPU in training; default: 1001 for {EXAMPLE}"),
    "--nvlink": (float, 450.0, "GB/s", "of a GPU inside a node, one direction; default: 450"),
    "--network": (float, [400.0, 100.0, 25.0], "Gbit/s", "between nodes, one direction; default: 400 100 25"),
    "--pixels": (int, 64, "N", "side of measured images; default: 64"),
    "--megabytes": (float, [0.001, 1.0, 5.0, 25.0, 100.0], "MB", "all-reduced; default: 0.001 1 5 25 100"),
    "--repeats": (int, 25, "N", "measurements of each kind; default: 25"),
}


def main() -> None:
    arguments = parse_arguments()
    (measure if arguments.measure else predict)(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default=EXAMPLE, metavar="NAME", help=f"the network; default: {EXAMPLE}")
    parser.add_argument("--measure", action="store_true", help="under torchrun: time steps and all-reduces")
    for option, (kind, default, unit, text) in OPTIONS.items():
        read, nargs = functools.partial(positive, option, kind), "+" if isinstance(default, list) else None
        parser.add_argument(option, type=read, default=default, metavar=unit, nargs=nargs, help=text)
    arguments = parser.parse_args()
    if arguments.measure and any(variable not in os.environ for variable in TORCHRUN):
        raise UserError("--measure: start it with torchrun --nproc-per-node=N scripts/scaling.py --measure")
    if not (arguments.measure or arguments.images_per_second):
        if arguments.config.removesuffix(".yaml") != EXAMPLE:
            raise UserError(f"--images-per-second: is known for {EXAMPLE} alone; give that of one GPU")
        arguments.images_per_second = EXAMPLE_SPEED
    return arguments


def positive(option: str, kind: type, text: str) -> float:
    """An option's number, which must be above 0."""
    with contextlib.suppress(ValueError):
        if 0 < kind(text) < math.inf:
            return kind(text)
    raise UserError(f"{option}: must be a {'whole ' * (kind is int)}number above 0, not {text!r}")


def load_network(config: str, device: str) -> ResNeXt:
    """The configured network, in training mode; on `meta` its weights need no memory."""
    with torch.device(device):
        return build_model(read_config(find_config(config)).model, CLASSES)


def gradient_bytes(model: ResNeXt) -> list[int]:
    """Bytes of the fp32 gradients in the order of a backward pass; the model is on `meta`."""
    sizes: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: sizes.append(4 * p.numel()))
    model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    return sizes


def bucket_bytes(sizes: Iterable[int]) -> list[int]:
    """Bytes of DistributedDataParallel's buckets, in order: the gradient that fills a bucket closes it."""
    buckets, filled, limit = [], 0, FIRST_BUCKET
    for size in sizes:
        filled += size
        if filled >= limit:
            buckets.append(filled)
            filled, limit = 0, BUCKET
    return [*buckets, filled] if filled else buckets


def ring_bytes(gpus: int, size: float) -> float:
    """Bytes that each GPU sends, and receives, when `size` bytes are all-reduced in a ring."""
    return 2 * (gpus - 1) / gpus * size


def ring_latency(gpus: int) -> float:
    """Seconds that 2(N-1) hops take, of which 2(nodes-1) cross the network."""
    crossing = 2 * (math.ceil(gpus / GPUS_PER_NODE) - 1)
    return CALL_LATENCY + (2 * (gpus - 1) - crossing) * NVLINK_LATENCY + crossing * NETWORK_LATENCY


def all_reduce_seconds(gpus: int, size: float, link: float) -> float:
    """Seconds of an all-reduce of `size` bytes in one ring, whose slowest link has `link` bytes/s."""
    return ring_latency(gpus) + ring_bytes(gpus, size) / link if gpus > 1 else 0.0


def exposed_seconds(buckets: Sequence[float], backward: float) -> float:
    """Seconds that a step waits for its buckets, all but the last of which are sent in the backward pass."""
    return max(buckets[-1], sum(buckets) - backward)


def efficiency(buckets: list[int], gpus: int, image: float, images: float, link: float, floor: int) -> float:
    """Speed of N GPUs over N times that of one, for steps of `images` on each, at `image` s an image."""
    compute = image * max(images, floor)  # a step takes the time of `floor` images at least
    exchange = [all_reduce_seconds(gpus, size, link) for size in buckets]
    return image * images / (compute + exposed_seconds(exchange, BACKWARD_SHARE * compute))


def predict(arguments: argparse.Namespace) -> None:
    """Print efficiencies of weak and strong scaling, a row for each network between the nodes; Markdown."""
    images, nvlink, image = arguments.images, arguments.nvlink, 1 / arguments.images_per_second
    buckets = bucket_bytes(gradient_bytes(load_network(arguments.config, "meta")))
    rows = []
    for kind, batch, floor in (
        (f"weak: {images} on each GPU", None, 1),
        (f"strong: {GLOBAL_BATCH} in all", GLOBAL_BATCH, 1),
        (f"strong, floor of {FLOOR_IMAGES}", GLOBAL_BATCH, FLOOR_IMAGES),
    ):
        for gbit in arguments.network:
            rows.append([kind, f"{gbit:g}"])
            for gpus in GPUS:
                link = 1e9 * (nvlink if gpus <= GPUS_PER_NODE else min(nvlink, gbit / 8))
                each = batch / gpus if batch else images
                rows[-1].append(100 * efficiency(buckets, gpus, image, each, link, floor))
    print(
        f"**Computed, not measured.** {arguments.config}: {sum(buckets) / 1e6:.1f} MB of gradients in "
        f"{len(buckets)} buckets, the last of {buckets[-1] / 1e6:.1f} MB; "
        f"{1e3 * images * image:.1f} ms for {images} images.\n"
    )
    print(markdown(["efficiency in %, images", "Gbit/s; GPUs:", *map(str, GPUS)], rows))


def measure(arguments: argparse.Namespace) -> None:
    """In each process of torchrun: time steps and all-reduces; the first prints tables in Markdown."""
    torch.set_num_threads(1)  # so that a process alone has no more of the machine than one of several
    with process_group(timeout=300):
        model = load_network(arguments.config, "cpu").to(memory_format=torch.channels_last)
        images = torch.randn(arguments.images, 3, arguments.pixels, arguments.pixels)
        images = images.contiguous(memory_format=torch.channels_last)
        steps, buckets = time_steps(model, images, arguments.repeats)
        sizes = [max(4, round(megabytes * 1e6)) for megabytes in arguments.megabytes]
        reduced = time_all_reduce([*sizes, *buckets], arguments.repeats)
        if rank() == 0:
            report(arguments, steps, buckets, reduced)


def report(arguments: argparse.Namespace, steps: Timings, buckets: list[int], reduced: Timings) -> None:
    """Print medians; "computed" is the exposed time that the all-reduces of the buckets let one expect."""
    sent = {size: ring_bytes(world_size(), size) / np.median(times) for size, times in reduced.items()}
    rows = [[f"{size / 1e6:g}", spread(reduced[size]), f"{speed / 1e9:.3g}"] for size, speed in sent.items()]
    synced, alone, forward = (np.median(steps[kind]) for kind in ("synced", "alone", "forward"))
    computed = exposed_seconds([np.median(reduced[size]) for size in buckets], alone - forward)
    step = [spread(steps["alone"]), spread(steps["synced"]), 1e3 * (synced - alone), 1e3 * computed]
    step += [100 * (1 - forward / alone), 100 * alone / synced]
    print(
        f"{world_size()} processes, {environment(torch.device('cpu'))['device']}, torch {torch.__version__}; "
        f"medians of {arguments.repeats}, in brackets the quartiles.\n\n**all_reduce over gloo**\n\n"
        f"{markdown(['MB', 'ms', 'GB/s sent by each'], rows)}\n\n**A step of {arguments.config}, "
        f"{arguments.images} images of {arguments.pixels} pixels in each process, ms**\n"
    )
    head = ["without all-reduce", "with", "exposed", "computed", "backward, %", "efficiency, %"]
    print(markdown(head, [step]))


def time_all_reduce(sizes: Sequence[int], repeats: int) -> Timings:
    """Bytes → seconds of an all_reduce, the sizes in turn, after one to warm up."""
    buffers = {size: torch.zeros(size // 4) for size in sizes}
    seconds: Timings = {size: [] for size in sizes}
    for _ in range(1 + repeats):
        for size, times in seconds.items():
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(buffers[size])
            times.append(time.perf_counter() - begun)
    return {size: slowest(times[1:]) for size, times in seconds.items()}


def time_steps(model: ResNeXt, images: torch.Tensor, repeats: int) -> tuple[Timings, list[int]]:
    """Seconds of forward and backward passes, and bytes of the buckets.

    "synced": with the gradients' all-reduce; "alone": without, in turn; "forward": the first part of "alone".
    """
    model = distribute(model, torch.device("cpu"), dist.group.WORLD)
    seconds: Timings = {"synced": [], "alone": [], "forward": []}
    for _ in range(2 + repeats):  # the buckets are rebuilt in the second
        for kind, context in (("synced", contextlib.nullcontext), ("alone", model.no_sync)):
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
    return {kind: slowest(times[2:]) for kind, times in seconds.items()}, list(map(int, sizes.split(",")))


def slowest(seconds: Times) -> Times:
    """Of each timing, the longest among the processes: the others wait for it."""
    return [max(values) for values in zip(*all_gather_objects(seconds), strict=True)]


def markdown(head: list[str], rows: list[list]) -> str:
    """A table; numbers get one decimal."""
    lines = [[cell if isinstance(cell, str) else f"{cell:.1f}" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def spread(seconds: Times) -> str:
    """Median and quartiles in ms."""
    low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    run_main(main)
