"""A third family of supernets, registered in under 60 lines, trains, extracts and saves like the two of the package."""
import inspect
import sys
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from support.flops import counted_macs
from support.memory import allocated_bytes
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

import timm_shiftnas as tsn
from timm_shiftnas.layers import ElasticLinear, masked
from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.method.loop import create_task
from timm_shiftnas.models import TimmSupernet, static_counts
from timm_shiftnas.space import (
    MEMORY,
    PARAMS,
    SIZES,
    Choice,
    Family,
    OperatorTable,
    SearchSpace,
    Size,
    arch_masks,
    nested,
    register_family,
    space_from_dict,
    space_of_family,
)
from timm_shiftnas.training.flags import parse_args
from timm_shiftnas.training.setup import create_data_config
from timm_shiftnas.training.trainer import main

# -- family: residual MLPs on flattened images, with elastic depth and, per layer, elastic width -----------------------

STREAM = 16  # channels of the residual stream


def mlp_space(depth, width):
    choices = [Choice('width', tuple(width), layer, gate=0, min_depth=layer + 1) for layer in range(depth[-1])]
    return SearchSpace(
        'toy_mlp', (('depth', tuple(depth)), ('width', tuple(width))), (Choice('depth', tuple(depth)), *choices))


def layers(space, one_hots):
    """Of every layer, whether it exists and how wide it is."""
    exists = [Size.of(space, lambda depth, i=i: int(depth > i), 0) for i in range(len(one_hots) - 1)]
    return [(size.value(one_hots), Size.of(space, int, i + 1).value(one_hots)) for i, size in enumerate(exists)]


def mlp_operators(space, one_hots):
    pixels, channels, classes = (space.geometry[name] for name in ('pixels', 'in_chans', 'num_classes'))
    table, image = OperatorTable(one_hots), channels * pixels
    for kind, exists, size, rows, live in (
            ('stem', 1, image, STREAM, image + 3 * STREAM), ('head', 1, classes, classes, 0),
            *(('mlp', on, 2 * n, STREAM + n, image + STREAM + 2 * n) for on, n in layers(space, one_hots))):
        table.add(kind, exists, macs=STREAM * size, matrix=STREAM * size, rows=rows, vectors=rows, live=live)
    return table


class MlpMasks(NamedTuple):
    depth: Tensor
    width: Tensor

    def to(self, like: Tensor) -> 'MlpMasks':
        return MlpMasks(self.depth.to(like), self.width.to(like))


def mlp_masks(space, one_hots):
    depth, *widths = one_hots
    return MlpMasks(
        depth @ nested(space.values('depth'), depth), torch.stack(widths) @ nested(space.values('width'), depth))


class ToyMlp(nn.Module):
    def __init__(self, arch, pixels=64, in_chans=3, num_classes=4, drop_rate=0., device=None, dtype=None):
        super().__init__()
        self.static_space = mlp_space([arch['depth']], sorted(set(arch['width'])))
        self.arch, self.num_classes, self.num_features = self.static_space.arch(**arch), num_classes, STREAM
        self.model_args = dict(pixels=pixels, in_chans=in_chans, num_classes=num_classes)
        self.stem, self.head = nn.Linear(in_chans * pixels, STREAM), nn.Linear(STREAM, num_classes)
        self.blocks = nn.ModuleList(
            nn.ModuleList([ElasticLinear(STREAM, n), ElasticLinear(n, STREAM)]) for n in self.arch.width)
        self.to(device=device, dtype=dtype)

    def forward(self, x, widths=None, depth=None):
        x = self.stem(x.flatten(1))
        for i, (fc1, fc2) in enumerate(self.blocks[:None if widths is None else len(widths)]):
            width = None if widths is None else widths[i]
            x = x + masked(fc2(masked(fc1(x, out=width).relu(), width)), None if depth is None else depth[i])
        return self.head(x)


class ToyMlpSupernet(TimmSupernet, ToyMlp):
    def __init__(self, space, **kwargs):
        space = space_of_family(space, 'toy_mlp').unbind()
        super().__init__(space.largest.to_dict(), **kwargs)
        self.unbound_space = space

    def forward(self, x, arch=None):
        masks = arch.to(x) if isinstance(arch, MlpMasks) else None
        return super().forward(x, masks.width, masks.depth) if masks else super().forward(x, arch and arch.width)


@register_model
def toy_mlp_supernet(pretrained=False, **kwargs):
    return build_model_with_cfg(ToyMlpSupernet, 'toy_mlp_supernet', pretrained, **kwargs)


@register_model
def toy_mlp_subnet(pretrained=False, **kwargs):
    return build_model_with_cfg(ToyMlp, 'toy_mlp_subnet', pretrained, **kwargs)


register_family(Family(
    name='toy_mlp', space=mlp_space, operators=mlp_operators, masks=mlp_masks, supernet='toy_mlp_supernet',
    subnet='toy_mlp_subnet', geometry=lambda net: dict(net.model_args, num_classes=net.num_classes)))

# -- tests -------------------------------------------------------------------------------------------------------------

SPACE = mlp_space(depth=(1, 2, 3), width=(4, 8, 16, 32))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return timm.create_model('toy_mlp_supernet', space=SPACE, num_classes=4)


def archs() -> list[tsn.Arch]:
    generator = torch.Generator().manual_seed(0)
    return [SPACE.smallest, SPACE.largest, *(SPACE.sample(generator) for _ in range(5))]


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise around one image per class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (count,), generator=generator)
    classes = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    return classes[targets] + torch.randn(count, 3, 8, 8, generator=generator), targets


def test_the_family_is_under_60_lines():
    source = inspect.getsource(sys.modules[__name__])
    family = source[source.index('# -- family'):source.index('# -- tests')]
    lines = [line for line in family.splitlines()[1:] if line.strip() and not line.strip().startswith('#')]
    assert len(lines) < 60


def test_masks_equal_slices(net):
    net, x = net.double(), images(3, seed=1)[0].double()
    for arch in archs():
        masks = arch_masks(net.space, net.space.one_hot(arch))
        torch.testing.assert_close(net(x, masks), net(x, arch))


def test_counts_are_exact(net):
    for arch in archs():
        subnet = tsn.extract(net, arch)
        assert net.macs(arch) == counted_macs(subnet, torch.zeros(1, 3, 8, 8)) == static_counts(subnet)[0]
        assert MEMORY.count(net.space, arch) == allocated_bytes(subnet, torch.zeros(1, 3, 8, 8)).peak
        assert SIZES['fp32'].count(net.space, arch) == 4 * net.params(arch)
        assert net.params(arch) == sum(weight.numel() for weight in subnet.parameters()) == static_counts(subnet)[1]


def test_extracted_subnets_equal_the_supernet(net):
    x, _ = images(3, seed=1)
    for arch in archs():
        subnet = tsn.extract(net, arch)
        torch.testing.assert_close(subnet(x), net(x, arch))
        assert type(subnet) is ToyMlp and subnet.arch == arch


def train(net, updates: int = 60):
    task = create_task(
        net, shift='hypergradient', shift_interval=5, shift_images=24, generator_interval=5, num_groups=3,
        generator_fit_steps=150, warmup_updates=10, total_updates=updates)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for update in range(updates):
        loss = task(*images(64, seed=update))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task


@pytest.mark.slow
def test_it_trains_with_shiftnas(net):
    x, targets = images(500, seed=1000)

    def losses() -> list[float]:
        with torch.no_grad():
            return [F.cross_entropy(net(x, arch), targets).item() for arch in archs()]

    before = losses()
    task = train(net)
    assert all(after < 0.6 * start for after, start in zip(losses(), before, strict=True))
    assert task.update == 60 and len(task.history) > 5  # the probability shift ran


@pytest.mark.slow
def test_save_and_load_for_a_budget(net, tmp_path):
    task, x = train(net, updates=5), images(3, seed=1)[0]
    tsn.save_pretrained(tmp_path / 'supernet', net, task.generator)
    budget = (net.macs(SPACE.smallest) + net.macs(SPACE.largest)) / 2
    subnet = tsn.from_pretrained(tmp_path / 'supernet', flops=budget)
    assert 0.9 * budget < net.macs(subnet.arch) <= budget
    torch.testing.assert_close(subnet(x), net(x, subnet.arch))
    tsn.save_pretrained(tmp_path / 'subnet', subnet)
    torch.testing.assert_close(tsn.from_pretrained(tmp_path / 'subnet', flops=budget)(x), subnet(x))


@pytest.mark.slow
def test_budgets_of_other_resources(net):
    generator = ArchitectureGenerator(net.space).fit(steps=30, progress=False)
    limits = {SIZES['int8']: 6500, MEMORY: 1000, PARAMS: '5k'}
    arch = generator.propose_within(limits)
    assert all(resource.count(net.space, arch) <= resource.parse(limit) for resource, limit in limits.items())


def test_unknown_families_are_named():
    data: dict[str, Any] = SPACE.to_dict()
    assert space_from_dict(data) == SPACE
    with pytest.raises(ValueError, match='resnet.*toy_mlp'):
        space_from_dict(dict(data, family='resnet'))


@pytest.mark.slow
def test_train_py_trains_it(tmp_path):
    space = repr(SPACE.to_dict())
    assert main([
        '--model', 'toy_mlp_supernet', '--model-kwargs', f'space={space}', 'pixels=64', '--pretrained-cfg-overlay',
        'input_size=(3, 8, 8)', 'classifier=head', '--dataset', 'sklearn/digits', '-j', '0', '-b', '64',
        '--epochs', '1', '--warmup-epochs', '0', '--lr', '1e-2', '--num-groups', '3', '--generator-fit-steps', '20',
        '--output', str(tmp_path), '--experiment', 'run']) == 0
    assert type(tsn.from_pretrained(tmp_path / 'run' / 'model', flops='6k')) is ToyMlp


def test_its_images_may_have_any_size_though_it_has_batch_norm(net):
    """The CNNs of the package are square: their archs have a resolution."""
    net.norm = nn.BatchNorm1d(STREAM)
    assert create_data_config(parse_args(['--input-size', '3', '8', '16']), net)['input_size'] == (3, 8, 16)
