"""A MobileNet from training to deployment: train.py, the model directory with BatchNorm statistics, the CLI."""
import csv
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from support.processes import call, run_code
from timm.data import resolve_data_config
from timm.models.mobilenetv3 import MobileNetV3

import timm_shiftnas as tsn
from timm_shiftnas.evaluation.accuracy import evaluate, evaluate_budgets
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.method import BudgetGroups
from timm_shiftnas.models import BatchNormCalibration, ResizedInput, bn_statistics, static_counts
from timm_shiftnas.training import trainer as train
from timm_shiftnas.training.data import create_loaders, open_data
from timm_shiftnas.training.setup import create_network, scaled_lr
from timm_shiftnas_cli import main as cli

ROOT = Path(__file__).parents[2]

FLAGS = ['--dataset', 'sklearn/digits', '--held-out', '0.5', '--model', 'test_shiftmobilenet_supernet', '-j', '0',
         '-b', '128', '--opt', 'muon', '--lr', '5e-3', '--warmup-epochs', '0', '--num-groups', '3',
         '--generator-fit-steps', '40', '--log-interval', '5', '--generator-images', '8', '--bn-images', '64']


RICH = [*FLAGS, '--epochs', '2', '--val-interval', '2', '--shift', 'hypergradient', '--shift-interval', '4',
        '--shift-batch-size', '12', '--drop', '0.1', '--drop-path', '0.1', '--model-ema', '--model-ema-decay', '0.9',
        '--experiment', 'run']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two epochs with a learned shift, drop rates and an averaged network."""
    path = tmp_path_factory.mktemp('finished')
    assert train.main([*RICH, '--output', str(path)]) == 0
    return path / 'run'


@pytest.fixture(scope='module')
def validation():
    args = train.parse_args(FLAGS)
    args.num_classes = 10
    net = timm.create_model('test_shiftmobilenet_supernet', device='meta')
    return create_loaders(
        args, open_data(args), resolve_data_config(vars(args), model=net), torch.device('cpu')).validation


def table(folder):
    with open(folder / 'budgets.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_budget_of_a_group_gives_the_evaluated_network(finished, validation):
    rows = table(finished)
    assert [row['name'] for row in rows] == ['smallest', 'group 1', 'group 2', 'group 3', 'largest']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for row in rows:
            if row['budget']:
                net = tsn.from_pretrained(finished / 'model', flops=row['budget'])
            else:
                net = tsn.from_pretrained(finished / 'model', arch=json.loads(row['arch']))
            top1, top5 = evaluate(ResizedInput(net), validation, torch.device('cpu'))
            assert (top1, top5) == pytest.approx((float(row['top1']), float(row['top5'])), abs=1e-3)
            assert static_counts(net) == (int(row['macs']), int(row['params']))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_uniform_sampling_learns(tmp_path):
    """With uniform sampling and a search, whose candidates are calibrated, too."""
    assert train.main([
        *FLAGS, '--epochs', '2', '--val-interval', '2', '-b', '32', '--lr', '3e-2', '--no-aug', '--held-out', '0.05',
        '--sampler', 'uniform', '--search-samples', '3', '--output', str(tmp_path), '--experiment', 'run']) == 0
    rows = table(tmp_path / 'run')
    # chance is 10; seven seeds reached 77 to 91, and 58 to 75
    assert float(rows[-1]['top1']) > 50 and float(rows[0]['top1']) > 35
    assert SavedModel(tmp_path / 'run' / 'model').record.searched


@pytest.mark.slow
def test_timm_loads_the_largest_subnet_of_a_model_directory(finished, validation):
    net = timm.create_model(f'local-dir:{finished / "model"}', pretrained=True).eval()
    top1, _ = evaluate(net, validation, torch.device('cpu'))  # net(x): the largest, at the loader's size
    assert top1 == pytest.approx(float(table(finished)[-1]['top1']), abs=1e-3)


@pytest.mark.slow
def test_a_budget_without_statistics(finished, validation, capsys, tmp_path):
    space = tsn.load_supernet(finished / 'model')[0].space
    low, high = tsn.macs(space, space.smallest), tsn.macs(space, space.largest)
    budget = (low + high) / 2 + .08 * (high - low)
    with pytest.warns(UserWarning, match='no BatchNorm statistics of this subnet.*give loader=.*a budget that has'):
        plain = tsn.from_pretrained(finished / 'model', flops=budget)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        calibrated = tsn.from_pretrained(finished / 'model', flops=budget, loader=validation)
    assert plain.arch == calibrated.arch and not calibrated.training
    assert not torch.equal(plain.bn1.running_mean, calibrated.bn1.running_mean)
    expected = tsn.calibrate_bn(plain, validation)
    for name, buffer in bn_statistics(expected).items():
        torch.testing.assert_close(calibrated.state_dict()[name], buffer)
    # the command line warns in one line
    assert cli(['extract', str(finished / 'model'), '--flops', str(budget), '--output', str(tmp_path / 'out')]) == 0
    err = capsys.readouterr().err
    assert err.startswith('timm-shiftnas: warning: ') and err.count('\n') == 1 and '--data-dir' in err


@pytest.mark.slow
def test_the_command_line_calibrates(finished, tmp_path, capsys):
    from PIL import Image
    for i in range(12):
        folder = tmp_path / 'images' / 'train' / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('L', (32, 32), 20 * i).save(folder / f'{i}.png')
    space = tsn.load_supernet(finished / 'model')[0].space
    budget = tsn.macs(space, space.largest) * .6
    out = tmp_path / 'out'
    assert cli(['extract', str(finished / 'model'), '--flops', str(budget), '--output', str(out), '--data-dir',
                str(tmp_path / 'images'), '--bn-images', '12']) == 0
    assert capsys.readouterr().err == ''
    net = tsn.from_pretrained(out)
    assert net.bn1.num_batches_tracked == 1
    timm_net = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    x = torch.randn(2, 3, net.arch.resolution, net.arch.resolution)
    assert torch.equal(timm_net(x), net(x))
    assert cli(['extract', str(finished / 'model'), '--flops', str(budget), '--output', str(tmp_path / 'other'),
                '--data-dir', str(tmp_path / 'nowhere')]) == 2
    assert 'nowhere' in capsys.readouterr().err and not (tmp_path / 'other').exists()
    for directory, which in ((out, []), (finished / 'model', ['--flops', str(budget)])):
        data = ['--data-dir', str(tmp_path / 'images'), '--split', 'train']
        assert cli(['evaluate', str(directory), *which, *data]) == 0
        assert re.fullmatch(
            r'12 images of 2 of the 10 classes: top-1 \d+\.\d\d%, top-5 \d+\.\d\d%\n', capsys.readouterr().out)
    assert cli(['evaluate', str(finished / 'model'), '--data-dir', str(tmp_path / 'images')]) == 2
    assert 'choose a subnet with --flops' in capsys.readouterr().err
    assert cli(['info', str(out)]) == 0 and 'resolution' in capsys.readouterr().out
    assert cli(['info', str(finished / 'model')]) == 0 and 'kernel_size' in capsys.readouterr().out


@pytest.mark.slow
def test_the_quickstarts_own_digits_are_evaluated(finished, tmp_path, capsys):
    row = table(finished)[2]
    which = ['evaluate', str(finished / 'model'), '--flops', row['budget'], '--dataset', 'sklearn/digits']
    outputs = []
    for flags in ([], ['--device', 'cpu', '--batch-size', '50', '--workers', '1']):
        assert cli([*which, *flags]) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0] == outputs[1]
    assert outputs[0] == (f'360 images: top-1 {float(row["top1"]):.2f}%, top-5 {float(row["top5"]):.2f}%\n', '')
    assert cli([*which, '--amp', '--amp-dtype', 'bfloat16']) == 0
    assert float(re.search(r'top-1 ([\d.]+)', capsys.readouterr().out)[1]) == pytest.approx(float(row['top1']), abs=5)
    # the digits give the statistics of another budget, too
    out, budget = str(tmp_path / 'out'), str(.6 * float(table(finished)[-1]['macs']))
    extract = ['extract', str(finished / 'model'), '--flops', budget, '--dataset', 'sklearn/digits', '--output', out]
    assert cli(extract) == 0 and capsys.readouterr().err == ''
    assert cli(['evaluate', out, '--dataset', 'sklearn/digits']) == 0
    assert capsys.readouterr().out.startswith('360 images: ')


@pytest.mark.slow
def test_broken_statistics_are_refused(finished, tmp_path):
    folder = shutil.copytree(finished / 'model', tmp_path / 'model')
    data = (folder / 'bn_stats.safetensors').read_bytes()
    (folder / 'bn_stats.safetensors').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match='bn_stats.safetensors is not the file that was saved: its sha256 differs'):
        tsn.from_pretrained(folder, arch=SavedModel(folder).record.bn_archs[0])
    (folder / 'bn_stats.safetensors').unlink()
    with pytest.raises(ValueError, match='bn_stats.safetensors is missing'):
        tsn.from_pretrained(folder, arch=SavedModel(folder).record.bn_archs[0])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_resume(finished, tmp_path):
    """An interrupted run and its continuation give the weights of an uninterrupted one, bit for bit."""
    checkpoint = finished / 'checkpoint-0.pth.tar'
    assert train.main([*RICH, '--output', str(tmp_path), '--resume', str(checkpoint)]) == 0
    for file in ('model.safetensors', 'bn_stats.safetensors', 'generator.safetensors'):
        states = [safetensors.torch.load_file(folder / 'model' / file) for folder in (finished, tmp_path / 'run')]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), file


def test_the_imagenet_config_is_bignas_recipe():
    args = train.parse_args(['-c', str(ROOT / 'configs' / 'shiftmobilenet_imagenet.yaml'), '--data-dir', '/data'])
    assert (args.epochs, args.opt, args.momentum, args.weight_decay) == (360, 'rmsproptf', .9, 1e-5)
    assert args.batch_size * args.grad_accum_steps == args.lr_base_size == 4096
    assert scaled_lr(args) == .256 and (args.sched, args.decay_rate, args.decay_epochs) == ('step', .97, 2.4)
    assert (args.drop, args.drop_path, args.smoothing) == (.2, .2, .1)
    assert args.sandwich and args.archs_per_step == 4 and args.shift == 'none'
    args.num_classes = 10
    with torch.device('meta'):
        net = create_network(args, torch.device('meta'))
    assert net.pretrained_cfg['input_size'] == (3, 320, 320) and net.drop_rate == .2
    assert net.blocks[-1][1].drop_path.drop_prob == pytest.approx(.2 * 25 / 26)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ofa_subnet_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    space = tsn.ofa_space(.2, (32, 48), (1, 2), (3, 5), (2, 3))
    net = timm.create_model('ofa_mobilenetv3_supernet', space=space, num_classes=4).eval()
    arch = space.sample(torch.Generator().manual_seed(0))
    tsn.save_pretrained(tmp_path / 'sub', tsn.extract(net, arch))
    sub = tsn.from_pretrained(tmp_path / 'sub')
    x = torch.randn(2, 3, arch.resolution, arch.resolution)
    assert type(sub) is MobileNetV3 and sub.arch == arch
    torch.testing.assert_close(sub(x), net(x, arch), rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match='more than the budget'):
        tsn.from_pretrained(tmp_path / 'sub', flops=net.macs(arch) - 1)
    assert tsn.from_pretrained(tmp_path / 'sub', flops=net.macs(arch), arch=None).arch == arch
    # and in plain timm, without the package: the state_dict fits timm's own class with these block strings
    with pytest.raises(ValueError, match='statistics in its own weights'):
        tsn.save_pretrained(tmp_path / 'again', sub, bn_stats={arch: bn_statistics(sub)})
    tsn.save_pretrained(tmp_path / 'super', net, bn_stats={arch: bn_statistics(sub)})
    with pytest.raises(ValueError, match='saved without a generator'):
        tsn.from_pretrained(tmp_path / 'super', flops='1M')
    tsn.from_pretrained(tmp_path / 'super', arch=arch)
    tsn.save_pretrained(tmp_path / 'super', net)  # over it: no statistics are left
    assert not (tmp_path / 'super' / 'bn_stats.safetensors').exists()
    with pytest.warns(UserWarning, match='no BatchNorm statistics'):
        tsn.from_pretrained(tmp_path / 'super', arch=arch)


@pytest.mark.slow
def test_evaluation_without_calibration_is_refused(validation):
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=10)
    groups = BudgetGroups.of_space(net.space, count=2)
    archs = [net.space.smallest, net.space.largest]
    with pytest.raises(ValueError, match='BatchNormCalibration'):
        evaluate_budgets(net, groups, archs, validation, torch.device('cpu'))
    calibration = BatchNormCalibration(validation, 64)
    rows = evaluate_budgets(net, groups, archs, validation, torch.device('cpu'), calibration=calibration)
    assert len(rows) == 4 and set(calibration.statistics) == set(archs)


@pytest.mark.process
@pytest.mark.slow
def test_an_ofa_subnet_loads_in_timm_without_this_package(tmp_path):
    """With the code in docs/mobilenets.md, in a process that never imports timm_shiftnas."""
    torch.manual_seed(0)
    space = tsn.ofa_space(.2, (32, 48), (1, 2), (3, 5), (1.5, 2.5))
    net = timm.create_model('ofa_mobilenetv3_supernet', space=space, num_classes=4).eval()
    arch = space.sample(torch.Generator().manual_seed(3))
    sub = tsn.extract(net, arch)
    tsn.save_pretrained(tmp_path / 'sub', sub)
    x = torch.randn(2, 3, arch.resolution, arch.resolution)
    safetensors.torch.save_file(dict(x=x), tmp_path / 'x.safetensors')
    blocks = (ROOT / 'docs' / 'mobilenets.md').read_text().split('```python\n')[1:]
    code, = (block.split('```')[0] for block in blocks if 'MobileNetV3(' in block)
    code = code.replace('DIR', str(tmp_path / 'sub')) + f'''
import subprocess
import sys
from safetensors.torch import save_file
assert not any(name.startswith('timm_shiftnas') for name in sys.modules)
y = net.eval()(load_file({str(tmp_path / 'x.safetensors')!r})['x'])
save_file(dict(y=y.detach()), {str(tmp_path / 'y.safetensors')!r})
'''
    done, _, err = call(run_code, code, folder=tmp_path)
    assert done == 0, err
    assert torch.equal(safetensors.torch.load_file(tmp_path / 'y.safetensors')['y'], sub(x))


@pytest.mark.slow
def test_a_new_classifier_counts_in_budgets_and_is_saved(finished, tmp_path):
    budget = float(table(finished)[2]['budget'])
    sub = tsn.from_pretrained(finished / 'model', flops=budget)
    tsn.save_pretrained(tmp_path / 'sub', sub)
    with pytest.raises(ValueError, match='more than the budget'):
        tsn.from_pretrained(tmp_path / 'sub', flops=budget, num_classes=100_000)
    sub.reset_classifier(4)
    tsn.save_pretrained(tmp_path / 'four', sub)
    again = tsn.from_pretrained(tmp_path / 'four')
    assert again.num_classes == 4 and torch.equal(again.classifier.weight, sub.classifier.weight)
    tsn.from_pretrained(tmp_path / 'four', flops=static_counts(again)[0])


@pytest.mark.slow
@pytest.mark.parametrize('archs,message', [
    (None, 'unusable entry timm_shiftnas.bn_archs'), ([1], 'config.json has an unusable entry timm_shiftnas.bn_archs'),
    ([{'self': 2}], 'config.json has an unusable entry timm_shiftnas.bn_archs'),
])
def test_unusable_archs_of_statistics(finished, tmp_path, archs, message):
    folder = shutil.copytree(finished / 'model', tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text())
    config['timm_shiftnas']['bn_archs'] = archs
    if archs is None:
        del config['timm_shiftnas']['bn_archs']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tsn.from_pretrained(folder, flops=3e6)


@pytest.mark.slow
def test_absurd_depths_are_refused_before_a_network_is_built(finished, tmp_path):
    folder = shutil.copytree(finished / 'model', tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text())
    config['model_args']['space'].update(
        width=[[8]] * 22, depth=[[900]] * 20, stride=[1] * 20, se=[True] * 20, act=['relu'] * 22,
        kernel_size=[[3]] * 20, expand_ratio=[[2]] * 20)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='18,000'):
        tsn.from_pretrained(folder, flops=3e6)


def test_statistics_of_other_networks_are_not_saved(tmp_path):
    net = timm.create_model('test_shiftmobilenet_supernet')
    arch = net.space.smallest
    for stats, message in (({'a': {}}, "'a'"), ({arch: {'foo': torch.zeros(1)}}, 'running_mean')):
        with pytest.raises(ValueError, match=message):
            tsn.save_pretrained(tmp_path / 'out', net, bn_stats=stats)
    assert not (tmp_path / 'out').exists()


def test_a_view_with_batch_norm_is_not_evaluated(validation):
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=10)
    with pytest.raises(ValueError, match='calibrate_bn'):
        evaluate(tsn.Subnet(net, net.space.smallest), validation, torch.device('cpu'))
