"""What PyTorch's operators move through memory, and how many kernels they start on a GPU."""

import math
from collections import Counter

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Memory is set aside, or seen otherwise, but not touched.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# The first argument is not read.
OVERWRITTEN = {
    "copy_",
    "fill_",
    "zero_",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
}
NORMS = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}
NORM_GRADIENTS = {"native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward"}
# Of lists of tensors: tensors in one launch by the number of lists, elements of a block, blocks of a launch.
LISTED, CHUNK, BLOCKS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 65536, 320


class Traffic(TorchDispatchMode):
    """Counts, by operator, of calls, kernels and bytes read and written; views are left out.

    An operator reads each tensor that it is given, and writes what it returns or changes; `extra_bytes` has
    those that read some twice. Kernels: 1, or what `kernels` knows.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.kernels, self.bytes = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, returns = function._overloadpacket.__name__, function._schema.returns
        view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if function.namespace == "prim" or name in FREE or view:
            return out
        given, read, written = {}, [], []
        for number, argument in enumerate(function._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            tensors = given[argument.name] = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
            if not argument.is_out and not (name in OVERWRITTEN and number == 0):
                read += tensors
            # A fused optimiser changes gradients only where it unscales them.
            if argument.alias_info and argument.alias_info.is_write and argument.name != "grads":
                written += tensors
        there = {id(t) for t in written}
        written += [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and id(t) not in there]
        if not read and not written:  # a question about types, a mark for the profiler
            return out
        self.calls[name] += 1
        self.kernels[name] += kernels(name, args, given)
        self.bytes[name] += sum(map(size, {id(t): t for t in read}.values())) + sum(map(size, written))
        self.bytes[name] += extra_bytes(name, args)
        return out


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those that an expanded one repeats lie in memory once."""
    lengths = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n]
    return math.prod(lengths) * tensor.element_size()


def extra_bytes(name: str, args: tuple) -> int:
    """Bytes beyond each argument read once."""
    if name in NORMS or name == "norm_forward":  # statistics first, then the values
        return size(args[0])
    if name in NORM_GRADIENTS:  # the same of both the gradient and the input
        return size(args[0]) + size(args[1])
    if name == "norm_backward":  # (dy, dy2, x, y, …, shortcut, relu): see resnext/kernels.py
        _, dy2, x, *_, shortcut, _ = args
        return size(x) * (2 if shortcut or dy2 is None else 3)  # a sum of two gradients is written, too
    if name == "convolution_backward":  # the output's gradient, for the input's and for the weight's
        return size(args[0]) if args[-1][0] and args[-1][1] else 0
    if name == "max_pool2d_with_indices_backward":
        return -size(args[1])  # the indices say enough
    return 0


def kernels(name: str, args: tuple, given: dict[str, list[Tensor]]) -> int:
    """Kernels of an operator on a GPU: BatchNorm's in channels_last, of convolutions without any helpers."""
    if name in NORMS or name in ("norm_forward", "norm_backward"):
        return 3
    if name in NORM_GRADIENTS:
        return 2
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "max_pool2d_with_indices_backward":
        return 2  # zeros first
    if name.startswith(("_foreach", "_fused")):
        lists = [tensors for tensors in given.values() if len(tensors) > 1]
        if lists:
            blocks = sum(-(-t.numel() // CHUNK) for t in lists[0])
            return max(-(-len(lists[0]) // LISTED[len(lists)]), -(-blocks // BLOCKS))
    return 1
