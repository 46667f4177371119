"""Command-line options that the commands on trained weights share: names, help texts, and limits."""

import argparse

from .errors import UserError, command_parser

LIMITS = {
    "batch_size": (1, 1 << 20),
    "workers": (0, 256),
    "image_size": (8, 4096),
    "resize": (8, 8192),
    "max_pixels": (1, 1 << 40),
    "top": (1, 10_000_000),
}
CLASS_NAMES_HELP = "names of the network's outputs, one per line in their order, unless a run names them"


def add_inference_options(
    parser: argparse.ArgumentParser, batch_size: int | None, batch_help: str, workers_help: str
) -> None:
    """Add the options that say how a network runs and how its images are read."""
    add = parser.add_argument
    add("--batch-size", type=int, default=batch_size, metavar="N", help=batch_help)
    add("--workers", type=int, metavar="N", help=workers_help)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16", "fp16"], help="default: the run's")
    add("--max-pixels", type=int, metavar="N", help="refuse images with more pixels (data.max_pixels)")


def image_parser(document: str | None) -> argparse.ArgumentParser:
    """Return a parser for commands that take weights and images, described by a module's docstring."""
    parser = command_parser(document)
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a run directory (its best checkpoint), a file or folder of weights, torchvision:NAME, "
        "timm:NAME, or hf:OWNER/REPO",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="file, folder, quoted pattern, or - for names from standard input, one per line",
    )
    workers_help = "DataLoader workers (data.workers; default: one per CPU core, a quarter without a GPU)"
    add_inference_options(parser, 32, "images per batch (default: 32)", workers_help)
    return parser


def check_limits(arguments: argparse.Namespace) -> None:
    """Raise UserError if an integer option is outside its limits."""
    for name, (low, high) in LIMITS.items():
        value = getattr(arguments, name, None)
        if value is not None and not low <= value <= high:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: must be from {low} to {high} (got {value})")
