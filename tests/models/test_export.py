"""ONNX files by both exporters of torch, with any number of images, compared in onnxruntime; the command for them."""
import collections

import onnx
import onnxruntime
import pytest
import timm
import torch
from support.networks import perturb, rng
from timm.layers import set_fused_attn

import timm_shiftnas as tsn
from timm_shiftnas.models.export import export_onnx
from timm_shiftnas_cli import main

EFFICIENT = tsn.shiftmobilenet_space(  # sides of 28, 14, 7 and 4: one projection pads
    resolution=(16, 28), width=((8, 16), (8, 16), (16, 24), (24, 32), (32,)), depth=((1,), (1,), (1,)),
    kernel_size=(3, 5), expand_ratio=((1,), (2,), (2,)), stride=(2, 2, 2), head='efficient')
BIGNAS = tsn.shiftmobilenet_space(
    resolution=(16, 32), width=((8, 16), (8,), (16, 24), (32,)), depth=((1,), (1, 2)), kernel_size=(3, 5),
    expand_ratio=((1,), (2, 3)), stride=(1, 2))
SHORT = tsn.shiftformer_space(embed_dim=(32, 48), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(1., 2.))
VITS = dict(
    relative=dict(img_size=(24, 32)), no_class_token=dict(class_token=False),
    no_relative=dict(relative_position=False, attn_drop_rate=.1, proj_drop_rate=.1, drop_rate=.1))
CNNS = dict(
    bignas=('shiftmobilenet_supernet', dict(space=BIGNAS, drop_rate=.1)),
    attentivenas=('attentivenas_supernet', dict(space=EFFICIENT)),
    ofa=('ofa_mobilenetv3_supernet', dict(space=tsn.ofa_space(.25, resolution=(32,), depth=(2,)))))
MODELS = CNNS | {name: ('test_shiftformer_supernet', dict(kwargs, space=SHORT)) for name, kwargs in VITS.items()}


def subnet(name):
    torch.manual_seed(0)
    model, kwargs = MODELS[name]
    net = timm.create_model(model, num_classes=5, **kwargs).eval()
    return tsn.extract(net, net.space.largest)


@torch.no_grad()
def check(net, path, name='images'):
    """Compare a file with its network for other numbers of images; return the counts of its operators."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    assert [each.name for each in session.get_inputs()] == [name]
    for batch in (1, 5):
        x = torch.randn(batch, *net.pretrained_cfg['input_size'])
        logits, = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net(x), rtol=1e-4, atol=1e-5)
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(params=[True, False], ids=['fused', 'unfused'])
def fused(request):
    set_fused_attn(request.param)
    yield
    set_fused_attn(True)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', VITS)
def test_the_older_exporter_writes_vits(name, fused, tmp_path):
    net = subnet(name)
    torch.onnx.export(
        net, (torch.randn(2, *net.pretrained_cfg['input_size']),), tmp_path / 'x.onnx', dynamo=False,
        input_names=['images'], dynamic_axes=dict(images={0: 'batch'}))
    assert not check(net, tmp_path / 'x.onnx')['Dropout']


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CNNS)
def test_the_older_exporter_writes_cnns(name, tmp_path):
    net = subnet(name)
    torch.onnx.export(
        net, (torch.randn(1, *net.pretrained_cfg['input_size']),), tmp_path / 'x.onnx', dynamo=False,
        input_names=['images'], dynamic_axes=dict(images={0: 'batch'}))
    assert not check(net, tmp_path / 'x.onnx')['Dropout']


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'relative', *(pytest.param(name, marks=pytest.mark.exhaustive)
                         for name in sorted(MODELS.keys() - {'no_class_token', 'relative'}))])
def test_export_onnx_of_all_families(name, tmp_path):
    net = subnet(name)
    written = export_onnx(net, tmp_path / 'x.onnx')
    assert written['difference'] < 1e-5 and written['input_size'] == list(net.pretrained_cfg['input_size'])
    assert not check(net, tmp_path / 'x.onnx')['Dropout'] and [path.name for path in tmp_path.iterdir()] == ['x.onnx']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('base, opset', [
    ('test_efficientnet', 17), ('mobilenetv3_small_050', 17),
    pytest.param('test_efficientnet', None, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_subnets_of_elastic_cnns_are_written(base, opset, tmp_path):
    """Of a drawn arch, whose channels, kernels, depth and resolution are not those of the base."""
    torch.manual_seed(0)
    net = perturb(tsn.elastic(timm.create_model(base, num_classes=5), img_size=64).eval(), .03)
    sub = tsn.extract(net, net.space.sample(rng()))
    export_onnx(sub, tmp_path / 'x.onnx', opset=opset)
    check(sub, tmp_path / 'x.onnx')


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_shiftnas.models.export.MAX_DIFFERENCE', 0.)
    with pytest.raises(ValueError, match='other logits'):
        export_onnx(subnet('bignas'), tmp_path / 'x.onnx', opset=17)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'model'
    tsn.save_pretrained(folder, subnet('bignas').half())
    return folder


@pytest.mark.slow
def test_the_command(saved, tmp_path, capsys):
    path = tmp_path / 'x.onnx'
    command = ['export', str(saved), '--output', str(path), '--opset', '17']
    assert main([*command, '--input-name', 'x']) == 0
    line, errors = capsys.readouterr()
    assert line.startswith(f'{path}: ') and line.count('\n') == 1 and not errors
    assert 'x batch x 3 x 32 x 32, opset 17, onnxruntime agrees to ' in line
    check(tsn.from_pretrained(saved, dtype=torch.float32), path, 'x')
    assert main(command) == 2 and '--overwrite' in capsys.readouterr().err
    assert main([*command, '--overwrite', '--fixed-batch', '3']) == 0
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [each.dim_value for each in shape.dim] == [3, 3, 32, 32]


@pytest.mark.parametrize('flags, message', [
    (['--opset', '3'], 'opset=3'), (['--opset', '99'], 'opset=99'),
    (['--output', '.'], '--output'), (['--params', '1'], 'budget')])
def test_errors_are_one_line(saved, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['export', str(saved), '--output', 'x.onnx', *flags]) == 2
    assert message in (error := capsys.readouterr().err) and error.count('\n') == 1
    assert not list(tmp_path.iterdir())
