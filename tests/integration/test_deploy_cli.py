"""`timm-shiftnas measure`, and the budgets and int8 files of the other commands, from the command line."""
import json
import re

import pytest
import torch
from support.devices import device_of
from support.networks import tiny_supernet

from timm_shiftnas.evaluation.backends import OnnxNetwork
from timm_shiftnas.evaluation.latency import archs_to_measure
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.save import add_device, save_pretrained
from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.models import extract
from timm_shiftnas.space.latency import fingerprint
from timm_shiftnas_cli import main


def run(capsys, *argv):
    code = main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope='module')
def net():
    return tiny_supernet('test_shiftmobilenet_supernet')


@pytest.fixture
def saved(net, tmp_path):
    save_pretrained(tmp_path / 'model', net, ArchitectureGenerator(net.space).fit(20, progress=False))
    return tmp_path / 'model'


@pytest.mark.slow
def test_measure_writes_a_device_file_into_the_directory(capsys, saved):
    flags = ('measure', saved, '--threads', '1', '--archs', '20', '--max-spread', '100', '--name', 'here')
    for _ in range(5):  # other tests run beside this one, and a predictor of 20 archs may find nothing but them
        code, out, err = run(capsys, *flags)
        if code == 0:
            break
        assert 'while nothing else runs' in err and not list(saved.glob('device_*'))
    device = SavedModel(saved).devices()['here']
    assert code == 0 and 'held-out error: median' in out and device.archs == 20 and device.versions['torch']
    assert [each.name for each in saved.iterdir() if each.name.endswith('partial')] == []
    code, _, err = run(capsys, *flags)
    assert code == 2 and '--overwrite' in err


@pytest.mark.slow
def test_measurements_of_another_device_are_imported(capsys, net, saved, tmp_path):
    archs = archs_to_measure(net.space, 20)
    lines = ['file,milliseconds,macs,batch_size,space,arch']
    lines += [f'x.onnx,{1 + net.macs(arch) / 1e6},0,1,{fingerprint(net.space)},"{quoted(arch)}"' for arch in archs]
    (tmp_path / 'latencies.csv').write_text('\n'.join(lines))
    code, out, err = run(
        capsys, 'measure', saved, '--import', tmp_path / 'latencies.csv', '--backend', 'tflite', '--threads', '4',
        '--name', 'pixel')
    device = SavedModel(saved).devices()['pixel']
    assert (code, err, device.backend, device.threads) == (0, '', 'tflite', 4)
    assert device.error['median'] < .01
    low, high = (f'{1 + count / 1e6:.2f}' for count in (net.macs(net.space.smallest), net.macs(net.space.largest)))
    line = next(line for line in run(capsys, 'info', saved)[1].splitlines() if line.startswith('device'))
    assert line.startswith('device   pixel (tflite, cpu, 4 threads, batch size 1): ')
    assert [f'{float(each):.2f}' for each in re.findall(r'([0-9.]+)ms', line)] == [low, high]
    code, _, err = run(capsys, 'measure', saved, '--import', tmp_path / 'latencies.csv', '--batch-size', '4')
    assert code == 2 and 'batch size than 4' in err


def quoted(arch):
    return json.dumps(arch.to_dict()).replace('"', '""')


@pytest.mark.slow
def test_several_budgets_on_the_command_line(capsys, net, saved, tmp_path):
    device = device_of(net.space)
    add_device(saved, device)
    latency = device.resource(net.space)
    limit = f'{sum(latency.range(net.space)) * 500}ms'
    budgets = ('--latency', limit, '--size', '60kB', '--precision', 'int8')
    code, out, err = run(capsys, 'extract', saved, *budgets, '--output', tmp_path / 'x')
    arch = net.space.from_dict(json.loads(out.splitlines()[1]))
    assert code == 0 and latency.count(net.space, arch) <= latency.parse(limit)
    code, _, err = run(capsys, 'extract', saved, '--flops', '10G', '--output', tmp_path / 'y')
    assert code == 0 and 'warning: flops=10G' in err and 'MACs' in err
    for flags, named in (
            (('--latency', '8M'), '8ms'), (('--memory', '1kB', '--flops', '1M'), 'tightest'),
            (('--latency', '1s', '--device-file', tmp_path / 'none.json'), 'none.json')):
        code, _, err = run(capsys, 'extract', saved, *flags, '--output', tmp_path / 'z')
        assert code == 2 and named in err and len(err.splitlines()) == 1


def test_the_device_of_the_generator_is_refused_before_it_is_measured(capsys, tmp_path):
    net = tiny_supernet()
    latency = device_of(net.space).resource(net.space)
    save_pretrained(tmp_path / 'model', net, ArchitectureGenerator(net.space, resource=latency).fit(2, progress=False))
    code, _, err = run(capsys, 'measure', tmp_path / 'model', '--name', 'toy', '--overwrite')
    assert code == 2 and 'another --name' in err and len(err.splitlines()) == 1
    assert not list((tmp_path / 'model').glob('*.partial'))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_int8_files_with_accuracy_before_and_after(capsys, saved, tmp_path):
    images = ('--dataset', 'sklearn/digits', '--bn-images', '64', '--batch-size', '64', '--opset', '17')
    code, out, _ = run(
        capsys, 'export', saved, '--params', '60k', '--int8', '--output', tmp_path / 'x.onnx', *images)
    lines = out.splitlines()
    assert code == 0 and 'static' in lines[0] and [line.split()[0] for line in lines[2:]] == ['fp32', 'int8']
    assert all(line.count('%') == 2 for line in lines[2:]) and (tmp_path / 'x.onnx').stat().st_size > 1000
    code, _, err = run(capsys, 'export', saved, '--params', '60k', '--int8', '--output', tmp_path / 'y.onnx')
    assert code == 2 and '--data-dir' in err and not (tmp_path / 'y.onnx').exists()


@pytest.mark.slow
def test_a_subnet_is_extracted_with_its_onnx_file(capsys, net, saved, tmp_path):
    arch, out = net.space.smallest, tmp_path / 'x'
    command = ('extract', saved, '--arch', json.dumps(arch.to_dict()), '--output', out)
    for flags, named in ((('--int8',), '--onnx'), (('--onnx', '--int8'), '--data-dir')):
        code, _, err = run(capsys, *command, *flags)
        assert code == 2 and named in err and not out.exists()
    code, text, _ = run(capsys, *command, '--onnx')
    assert code == 0 and text.splitlines()[-1].startswith(f'{out / "model.onnx"}: ')
    subnet = extract(net, arch).eval()
    images = torch.randn(3, *subnet.pretrained_cfg['input_size'])
    assert torch.allclose(OnnxNetwork(out / 'model.onnx', subnet)(images), subnet(images), atol=1e-4)
    code, _, _ = run(capsys, *command, '--overwrite')
    assert code == 0 and not (out / 'model.onnx').exists()  # it was of the subnet that was replaced
