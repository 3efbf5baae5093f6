"""CNN supernets whose BatchNorms other tools have replaced, and inputs with other channels."""
import copy

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import freeze, unfreeze
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas.hub.load import load_supernet
from timm_shiftnas.models import ShiftMobileNetSupernet
from timm_shiftnas.models.calibration import ResizedInput

EFFICIENT = tsn.shiftmobilenet_space(
    resolution=(16, 20), width=((8, 16), (8, 16), (16, 24), (24, 32)), depth=((1, 2), (1, 2)), kernel_size=(3, 5),
    expand_ratio=((1,), (4, 6)), stride=(1, 2), head='efficient')
MODELS = dict(
    bignas=('test_shiftmobilenet_supernet', {}), attentivenas=('attentivenas_supernet', dict(space=EFFICIENT)),
    ofa=('ofa_mobilenetv3_supernet', dict(space=tsn.ofa_space(.25, resolution=(32, 36)))))


def in_place(tool, *args):
    def replace(net):
        tool(net, *args)
        return net
    return replace


TOOLS = {
    'freeze': in_place(freeze), 'freeze the stem': in_place(freeze, ['conv_stem', 'bn1', 'blocks.0']),
    'freeze and unfreeze': lambda net: in_place(unfreeze)(in_place(freeze)(net)),
    'freeze_batch_norm_2d': freeze_batch_norm_2d, "timm's convert_sync_batchnorm": convert_sync_batchnorm,
    "torch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm, 'split': convert_splitbn_model}


def create(model):
    torch.manual_seed(0)
    name, kwargs = MODELS[model]
    net = timm.create_model(name, num_classes=5, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, .1)
            module.running_var.uniform_(.5, 1.5)
    return net


# every tool on one model, and every model with one tool
CASES = [pytest.param(model, tool, marks=[] if model == 'bignas' or tool == 'split' else pytest.mark.exhaustive)
         for model in MODELS for tool in TOOLS]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('model, tool', CASES)
def test_replaced_norms_compute_the_same(model, tool):
    net = create(model).eval()
    replaced = TOOLS[tool](copy.deepcopy(net)).eval()
    arch = net.space.sample(torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, 32, 32)
    assert net.space.smallest != arch != net.space.largest
    for each in (net.space.smallest, arch, net.space.largest, None):
        torch.testing.assert_close(replaced(x, each), net(x, each), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ResizedInput(tsn.extract(replaced, arch))(x), net(x, arch), rtol=1e-3, atol=1e-5)
    assert tsn.extract(replaced, arch).state_dict().keys() == tsn.extract(net, arch).state_dict().keys()


@pytest.mark.parametrize('tool', TOOLS)
def test_training_at_an_arch_does_not_write_statistics(tool):
    net = TOOLS[tool](create('bignas')).train()
    before = copy.deepcopy(net.state_dict())
    output = net(torch.randn(4, 3, 32, 32), net.space.smallest)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    if tool == 'freeze':
        assert not output.requires_grad
    else:
        output.square().sum().backward()
        assert net.classifier.weight.grad.abs().sum() > 0


def test_synchronised_norms_train_as_batch_norms():
    net, x = create('bignas').train(), torch.randn(4, 3, 32, 32)
    synchronised = convert_sync_batchnorm(copy.deepcopy(net))
    arch = net.space.smallest
    for each in (net, synchronised):
        each(x, arch).square().sum().backward()
    torch.testing.assert_close(synchronised.bn1.weight.grad, net.bn1.weight.grad)
    net(x), synchronised(x)
    torch.testing.assert_close(synchronised.bn1.running_mean, net.bn1.running_mean)


def test_frozen_norms_use_running_statistics_in_training():
    net, x = create('bignas'), torch.randn(4, 3, 32, 32)
    freeze(net, ['conv_stem', 'bn1', 'blocks'])
    freeze(net, ['conv_head', 'bn2'])
    arch = net.space.smallest
    assert torch.equal(net.train()(x, arch), net.eval()(x, arch))


@pytest.mark.slow
@pytest.mark.parametrize('tool', TOOLS)
def test_a_supernet_with_replaced_norms_can_be_saved(tool, tmp_path):
    net, x = create('bignas').eval(), torch.randn(2, 3, 32, 32)
    tsn.save_pretrained(tmp_path, TOOLS[tool](copy.deepcopy(net)))
    loaded, _ = load_supernet(tmp_path)
    assert isinstance(loaded, ShiftMobileNetSupernet) and torch.equal(loaded(x), net(x))


@pytest.mark.parametrize('norm', [lambda count: nn.GroupNorm(1, count), nn.InstanceNorm2d, lambda count: nn.Identity()])
def test_other_norms_raise(norm):
    net = create('bignas')
    net.blocks[1][0].bn1 = norm(net.blocks[1][0].bn1.num_features)
    with pytest.raises(ValueError, match='Norm|Identity'):
        net(torch.randn(2, 3, 32, 32), net.space.smallest)


@pytest.mark.parametrize('channels', [1, 2, 4])
@pytest.mark.parametrize('model', [*MODELS, 'shiftformer'])
def test_images_of_other_channels_raise(model, channels):
    net = timm.create_model('test_shiftformer_supernet') if model == 'shiftformer' else create(model)
    for arch in (None, net.space.smallest, net.space.largest):
        with pytest.raises(ValueError, match='in_chans'):
            net(torch.zeros(2, channels, 32, 32), arch)
    with pytest.raises(RuntimeError, match='channels'):
        tsn.extract(net, net.space.smallest)(torch.zeros(2, channels, 32, 32))


def test_a_batch_without_a_batch_dimension_raises():
    with pytest.raises(ValueError, match='batch, 3, height, width'):
        create('bignas')(torch.zeros(3, 32, 32))
