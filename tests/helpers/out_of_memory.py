"""Running out of memory on request, in this process or on one rank of several."""

import os
import sys

import torch

import train
from resnext.errors import run_main
from resnext.models.resnext import ResNeXt
from resnext.preflight import measure

CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError(CPU),
    MemoryError(),
]


def fail(*_: object, **__: object) -> None:
    raise ERRORS[0]


def check_on_ranks(where: str, *arguments: str) -> None:
    """Run a check on each rank, in which rank 1 has no memory: "alone" or "collective"."""
    if os.environ["RANK"] == "1":
        if where == "alone":
            ResNeXt.forward = fail
        else:
            measure.train_step = fail
    sys.argv = ["train.py", *arguments]
    run_main(train.main)
