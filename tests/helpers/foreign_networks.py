"""Small networks as other programs define and save them, and their comparison with load_weights."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracle import relative_error
from safetensors.torch import save_file
from torch import nn
from torch.nn import BatchNorm2d

from resnext import load_weights


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS = {"zip": torch.save, "legacy": save_legacy, "safetensors": save_file}
zip_and_legacy = pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])


def randomize_norms(model, seed=0):
    """Make every scale and statistic different, so that no exchange stays unnoticed."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.uniform_(0.5, 1.5)
    return model.eval()


def without_fc(model, name="fc"):
    """Return the network with an Identity for its last layer, so that it returns pooled features."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return randomize_norms(model)


def small_torchvision(classes=10, basic=False):
    if basic:
        return torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=classes
        )
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=classes, groups=4, width_per_group=6)


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class BearpawBlock(nn.Module):
    """models/cifar/resnext.py of bearpaw/pytorch-classification, and prlz77/ResNeXt.pytorch."""

    def __init__(self, inputs, outputs, stride, cardinality, width):
        super().__init__()
        self.conv_reduce, self.bn_reduce = conv(inputs, width), BatchNorm2d(width)
        self.conv_conv, self.bn = conv(width, width, 3, stride, cardinality), BatchNorm2d(width)
        self.conv_expand, self.bn_expand = conv(width, outputs), BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.add_module("shortcut_conv", conv(inputs, outputs, 1, stride))
            self.shortcut.add_module("shortcut_bn", BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        return F.relu(self.shortcut(x) + self.bn_expand(self.conv_expand(out)))


class Bearpaw(nn.Module):
    def __init__(self, blocks=2, cardinality=3, base_width=16, classes=10):
        super().__init__()
        self.conv_1_3x3, self.bn_1 = conv(3, 64, 3), BatchNorm2d(64)
        inputs = 64
        for stage in (1, 2, 3):
            outputs, blocks_ = 128 * 2**stage, nn.Sequential()
            for i in range(blocks):
                stride, width = 2 if i == 0 and stage > 1 else 1, cardinality * base_width * outputs // 256
                block = BearpawBlock(inputs, outputs, stride, cardinality, width)
                blocks_.add_module(f"stage_{stage}_bottleneck_{i}", block)
                inputs = outputs
            setattr(self, f"stage_{stage}", blocks_)
        self.classifier = nn.Linear(1024, classes)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(F.avg_pool2d(x, 8, 1).view(-1, 1024))


class PyclsBranch(nn.Module):
    """pycls/models/anynet.py: BottleneckTransform."""

    def __init__(self, inputs, outputs, stride, width, groups):
        super().__init__()
        self.a, self.a_bn = conv(inputs, width), BatchNorm2d(width)
        self.b, self.b_bn = conv(width, width, 3, stride, groups), BatchNorm2d(width)
        self.c, self.c_bn = conv(width, outputs), BatchNorm2d(outputs)

    def forward(self, x):
        x = F.relu(self.a_bn(self.a(x)))
        return self.c_bn(self.c(F.relu(self.b_bn(self.b(x)))))


class PyclsBasicBranch(nn.Module):
    """pycls/models/resnet.py: BasicTransform."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.a, self.a_bn = conv(inputs, outputs, 3, stride), BatchNorm2d(outputs)
        self.b, self.b_bn = conv(outputs, outputs, 3), BatchNorm2d(outputs)

    def forward(self, x):
        return self.b_bn(self.b(F.relu(self.a_bn(self.a(x)))))


class PyclsBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, width, groups):
        super().__init__()
        if inputs != outputs or stride != 1:
            self.proj, self.bn = conv(inputs, outputs, 1, stride), BatchNorm2d(outputs)
        basic = width == outputs
        self.f = (
            PyclsBasicBranch(inputs, outputs, stride)
            if basic
            else PyclsBranch(inputs, outputs, stride, width, groups)
        )

    def forward(self, x):
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x
        return F.relu(shortcut + self.f(x))


class Pycls(nn.Module):
    """Expects blue, green, red."""

    def __init__(self, depths=(1, 2, 1, 1), groups=4, classes=10):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=conv(3, 64, 7, 2), bn=BatchNorm2d(64)))
        inputs = 64
        for stage, blocks in enumerate(depths, 1):
            outputs, part = 128 * 2**stage, nn.Sequential()
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 and stage > 1 else 1
                part.add_module(f"b{i}", PyclsBlock(inputs, outputs, stride, outputs // 4, groups))
                inputs = outputs
            setattr(self, f"s{stage}", part)
        self.head = nn.Module()
        self.head.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = self.s4(self.s3(self.s2(self.s1(x))))
        return self.head.fc(x.mean((2, 3)))


class PyclsCifar(nn.Module):
    """ResNet-8 of basic blocks, with 3x3 stem and three stages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=conv(3, 16, 3), bn=BatchNorm2d(16)))
        inputs = 16
        for stage in (1, 2, 3):
            outputs = 8 * 2**stage
            block = PyclsBlock(inputs, outputs, 2 if stage > 1 else 1, outputs, 1)
            setattr(self, f"s{stage}", nn.Sequential(OrderedDict(b1=block)))
            inputs = outputs
        self.head = nn.Module()
        self.head.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        return self.head.fc(self.s3(self.s2(self.s1(F.relu(self.stem(x))))).mean((2, 3)))


class Mmpretrain(nn.Module):
    """ImageClassifier: backbone, neck without weights, head; blocks have torchvision's names."""

    def __init__(self, basic=False):
        super().__init__()
        self.backbone = small_torchvision(basic=basic)
        self.head = nn.Module()
        self.head.fc, self.backbone.fc = self.backbone.fc, nn.Identity()

    def forward(self, x):
        return self.head.fc(self.backbone(x))


@torch.no_grad()
def check(path, theirs, size=64):
    """Compare the outputs of the loaded network with theirs, and return what is known about the weights."""
    found, info = load_weights(path)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert (
        relative_error(found(x), theirs(x.flip(1) if isinstance(theirs, Pycls | PyclsCifar) else x)) <= 1e-5
    )
    return info


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
