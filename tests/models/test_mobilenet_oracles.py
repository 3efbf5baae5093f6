"""AttentiveNAS, BigNAS and OFA: figures and tensors that the reference implementations computed.

`data/*_table.json` and `bignas_space.json` hold MACs and parameters, `data/*_mini*` small supernets with random weights
under the published names, with logits of every arch in evaluation, on batch statistics, and recalibrated.
"""
import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.flops import counted_macs
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3

import timm_shiftnas as tsn
from timm_shiftnas.models._published import convert_mobilenet
from timm_shiftnas.space import arch_masks

DATA = Path(__file__).parents[1] / 'support' / 'data'
MINIS = ('attentivenas_mini', 'attentivenas_nov3_mini', 'ofa_mini', 'ofa_fracexp_mini')


def read(name: str) -> dict:
    return json.loads((DATA / f'{name}.json').read_text())


def space_of(config: dict) -> tsn.SearchSpace:
    """A space from a config of the AttentiveNAS code."""
    stages = [config[f'mb{i}'] for i in range(1, 8)]
    return tsn.shiftmobilenet_space(
        resolution=config['resolutions'],
        width=[config['first_conv']['c'], *(stage['c'] for stage in stages), config['last_conv']['c']],
        depth=[stage['d'] for stage in stages], kernel_size=[stage['k'] for stage in stages],
        expand_ratio=[stage['t'] for stage in stages], stride=[stage['s'] for stage in stages],
        se=[stage['se'] for stage in stages], act='swish', head='efficient' if config['use_v3_head'] else 'plain')


def ofa_arch(space: tsn.SearchSpace, row: dict, resolution: int) -> tsn.Arch:
    return space.arch(resolution=resolution, depth=row['d'], kernel_size=row['ks'], expand_ratio=row['e'])


class Mini:
    """One of the small supernets, loaded the way users load published weights."""

    def __init__(self, name: str, folder: Path) -> None:
        meta = read(name)
        self.io = load_file(DATA / f'{name}_io.safetensors')
        self.meta = meta
        if 'supernet_config' in meta:
            space, classes = space_of(meta['supernet_config']), meta['n_classes']
            self.archs = {key: space.arch(**row['arch']) for key, row in meta['archs'].items()}
        else:
            ctor = meta['ctor']
            space, classes = tsn.ofa_space(
                ctor['width_mult'], (48, 56, 60, 68), ctor['depth_list'], ctor['ks_list'],
                ctor['expand_ratio_list']), ctor['n_classes']
            self.archs = {
                key: ofa_arch(space, row['arch'], row['arch']['resolution']) for key, row in meta['archs'].items()}
        # as published: 'state_dict', and the prefix of DataParallel
        weights = {f'module.{key}': value for key, value in load_file(DATA / f'{name}.safetensors').items()}
        torch.save(dict(state_dict=weights), folder / 'published.pth')
        self.file = folder / 'published.pth'
        self.net = timm.create_model(
            'shiftmobilenet_supernet', space=space, pretrained=True,
            pretrained_cfg_overlay=dict(file=str(self.file), num_classes=classes), num_classes=classes)
        self.space = self.net.space

    def images(self, arch: tsn.Arch) -> torch.Tensor:
        return self.io[f'x{arch.resolution}']


@pytest.fixture(scope='module', params=MINIS)
def mini(request, tmp_path_factory):
    return Mini(request.param, tmp_path_factory.mktemp(request.param))


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=atol)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_attentivenas_table():
    table = read('attentivenas_table')
    net = timm.create_model('attentivenas_supernet', device='meta')
    assert net.space.unbind() == space_of(table['space'])
    assert net.space.size == table['product']
    assert len(table['architectures']) >= 20
    archs = [net.space.arch(**row['arch']) for row in table['architectures'].values()]
    for arch, row in zip(archs, table['architectures'].values()):
        assert (net.macs(arch), net.params(arch)) == (row['macs'], row['params'])
    # batched, and as a polynomial in one-hots
    macs = [row['macs'] for row in table['architectures'].values()]
    assert tsn.macs(net.space, archs).tolist() == macs
    assert tsn.macs(net.space, net.space.one_hot(archs)).tolist() == macs
    assert tsn.params(net.space, archs).tolist() == [row['params'] for row in table['architectures'].values()]


def test_bignas_space():
    table = read('bignas_space')
    net = timm.create_model('shiftmobilenet_supernet', device='meta')
    assert net.space.unbind() == space_of(table['space'])
    at_224 = 0
    for row in table['measured'].values():
        arch = net.space.arch(**row['arch'])
        assert (net.macs(arch), net.params(arch)) == (row['true_macs'], row['params_live'])
        at_224 += arch.resolution == 224
    assert at_224 == 2 and len(table['measured']) == 4


@pytest.mark.slow
def test_ofa_table():
    table, rows = read('ofa_mbv3_table'), 0
    nets = {
        'w1.0': timm.create_model('ofa_mobilenetv3_supernet', device='meta'),
        'w1.2': timm.create_model('ofa_mobilenetv3_w12_supernet', device='meta')}
    for row in table['rows'].values():
        net = nets[row['supernet']]
        for resolution, macs in row['macs'].items():
            arch = ofa_arch(net.space, row, int(resolution))
            assert (net.macs(arch), net.params(arch)) == (macs, row['params'])
            rows += 1
    assert len(table['rows']) == 16 + 34 and rows == 101
    for net in nets.values():
        assert net.space.size == table['n_arch_per_resolution'] * len(net.space.values('resolution'))


@pytest.mark.slow
def test_ofa_subnets_are_stock_networks_of_the_published_blocks():
    table = read('ofa_mbv3_table')
    net = timm.create_model('ofa_mobilenetv3_supernet', device='meta')
    for row in list(table['rows'].values())[::5]:
        if row['supernet'] != 'w1.0':
            continue
        sub = net.build_subnet(ofa_arch(net.space, row, 224), device='meta')
        assert type(sub) is MobileNetV3
        acts = {'ReLU': 'relu', 'Hardswish': 'h_swish', 'HardSwish': 'h_swish'}
        blocks = []
        for block in (block for stage in sub.blocks[:-1] for block in stage):
            last = getattr(block, 'conv_pwl', None) or block.conv_pw
            blocks.append([
                block.conv_pw.in_channels if hasattr(block, 'conv_pwl') else block.conv_dw.in_channels,
                block.conv_dw.in_channels, last.out_channels, block.conv_dw.kernel_size[0], block.conv_dw.stride[0],
                block.se.conv_reduce.out_channels if hasattr(block.se, 'conv_reduce') else 0,
                acts[type(block.bn1.act).__name__], block.has_skip])
        assert blocks == row['blocks']


# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_macs_and_params(mini):
    for key, arch in mini.archs.items():
        row = mini.meta['archs'][key]
        assert (mini.net.macs(arch), mini.net.params(arch)) == (row['macs'], row['params_live'])
        sub = tsn.extract(mini.net, arch).eval()
        assert counted_macs(sub, mini.images(arch)[:1]) == row['macs']
        assert sum(weight.numel() for weight in sub.parameters()) == row['params_live']


@pytest.mark.slow
@torch.no_grad()
def test_logits_in_evaluation(mini):
    net, exact = mini.net.eval(), timm.create_model(
        'shiftmobilenet_supernet', space=mini.space.unbind(), num_classes=mini.net.num_classes).double().eval()
    exact.load_state_dict(mini.net.state_dict())
    stock = MobileNetV3 if 'nov3' not in mini.meta.get('variant', '') else EfficientNet
    for key, arch in mini.archs.items():
        x, io = mini.images(arch), mini.io
        close(net(x, arch), io[f'logits.{key}'], 5e-5)
        close(exact(x.double(), arch), io[f'logits64.{key}'], 1e-9)
        close(exact(x.double(), arch_masks(mini.space, mini.space.one_hot(arch))), io[f'logits64.{key}'], 1e-9)
        sub, sub64 = tsn.extract(net, arch), tsn.extract(exact, arch)
        assert type(sub) is stock
        close(sub(x), io[f'logits.{key}'], 5e-5)
        close(sub64(x.double()), io[f'logits64.{key}'], 1e-9)
        static = timm.create_model(
            'shiftmobilenet_subnet', arch=arch.to_dict(), structure=sub.model_args['structure'],
            num_classes=net.num_classes)
        static.load_state_dict(sub.state_dict(), strict=True)
        close(static.eval()(x), io[f'logits.{key}'], 5e-5)
        if f'logits_resized.{key}' in io:
            other = io['x40'] if 'x40' in io else io['x52']
            close(net(other, arch), io[f'logits_resized.{key}'], 5e-5)


@pytest.mark.slow
@torch.no_grad()
def test_logits_on_batch_statistics(mini):
    exact = timm.create_model(
        'shiftmobilenet_supernet', space=mini.space.unbind(), num_classes=mini.net.num_classes).double()
    exact.load_state_dict(mini.net.state_dict())
    before = {name: value.clone() for name, value in exact.state_dict().items()}
    for key, arch in mini.archs.items():
        x = mini.images(arch)
        close(mini.net.train()(x, arch), mini.io[f'train_logits.{key}'], 5e-4)
        close(exact.train()(x.double(), arch), mini.io[f'train_logits64.{key}'], 1e-9)
        masks = arch_masks(mini.space, mini.space.one_hot(arch))
        close(exact.train()(x.double(), masks), mini.io[f'train_logits64.{key}'], 1e-9)
    for name, value in exact.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
@pytest.mark.parametrize('dtype,atol', [(torch.float32, 5e-4), (torch.float64, 1e-9)])
def test_logits_recalibrated(mini, dtype, atol):
    suffix = '64' if dtype is torch.float64 else ''
    net = copy.deepcopy(mini.net).to(dtype).eval()  # before the extraction, which multiplies kernels with matrices
    for key, arch in mini.archs.items():
        sub = tsn.extract(net, arch)
        batches = [(mini.io[f'calib{arch.resolution}.{i}'], None) for i in range(2)]
        assert tsn.calibrate_bn(sub, batches, 9, progress=False) is sub
        assert not sub.training and not any(module.training for module in sub.modules())
        with torch.no_grad():
            close(sub(mini.images(arch).to(dtype)), mini.io[f'calib_logits{suffix}.{key}'], atol)


def test_gradients(mini):
    checked = 0
    mini.net.train()
    for key, arch in mini.archs.items():
        norms = mini.meta['archs'][key]['grad_l2_of_supernet_params']
        if not norms:
            continue
        mini.net.zero_grad()
        loss = torch.nn.functional.cross_entropy(mini.net(mini.images(arch), arch), mini.io['labels'])
        loss.backward()
        expected = convert_mobilenet(norms, mini.net)
        found = {name: p.grad.norm().item() for name, p in mini.net.named_parameters() if p.grad is not None}
        for name, norm in expected.items():
            # where BatchNorm cancels a gradient, what is left is rounding
            assert found[name] == pytest.approx(norm, rel=2e-3, abs=2e-6), name
            checked += 1
        assert {name for name, norm in found.items() if norm > 1e-5} <= set(expected)
    assert checked > 150


# -- the converter -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_older_names_of_ofa(tmp_path):
    mini = Mini('ofa_mini', tmp_path)
    older = {}
    for name, weight in load_file(DATA / 'ofa_mini.safetensors').items():
        first, _, rest = name.partition('.conv.')
        older[f'{first}.mobile_inverted_conv.{rest}' if first.startswith('blocks.') else name] = weight
    assert len(older) == len(load_file(DATA / 'ofa_mini.safetensors')) and 'mobile_inverted' in str(list(older))
    save_file(older, tmp_path / 'older.safetensors')
    net = timm.create_model(
        'shiftmobilenet_supernet', space=mini.space.unbind(), pretrained=True, num_classes=10,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'older.safetensors'), num_classes=10))
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, mini.net.state_dict()[name])


@pytest.mark.slow
def test_a_checkpoint_of_another_space(tmp_path):
    mini = Mini('ofa_mini', tmp_path)
    for name in ('shiftmobilenet_supernet', 'ofa_mobilenetv3_supernet'):
        with pytest.raises(ValueError, match='another network.*space='):
            timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=dict(
                file=str(mini.file), num_classes=10))
