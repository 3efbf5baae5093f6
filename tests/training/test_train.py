"""train.py as users run it: output files, resuming, wrong flags, Ctrl-C."""
import contextlib
import copy
import csv
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import sys
import tarfile
import termios
import time

import pytest
import timm
import torch
from PIL import Image, ImageOps
from support.devices import device_of
from support.networks import rng, tiny_supernet
from support.processes import Job, run_file
from support.small_runs import FAST, ROOT, TINY, load, run_script, same, train
from timm.loss import PolyCrossEntropy

import timm_shiftnas as tsn
from timm_shiftnas.data import StepBatches, create_dataset
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.save import add_device
from timm_shiftnas.training.data import create_loaders, open_data, without_useless_shift
from timm_shiftnas.training.setup import create_network, scaled_lr
from timm_shiftnas_cli import main as cli

# the flags of a run of one network
ONE = ['--dataset', 'sklearn/digits', '-j', '0', '-b', '128', '--lr', '2e-3', '--warmup-epochs', '0']


def run(tmp_path, *flags):
    return train.main([*FAST, '--output', str(tmp_path), '--experiment', 'run', *flags])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of three epochs with everything random, and workers."""
    path = tmp_path_factory.mktemp('finished')
    flags = ['--epochs', '3', '--val-interval', '2', '-j', '2', '--mixup', '0.8', '--cutmix', '1.0',
             '--drop-path', '0.2', '--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9',
             '--reprob', '0.25', '--aa', 'rand-m5-n1']
    assert run(path, *flags) == 0
    return path / 'run', flags


@pytest.mark.slow
def test_output_files(finished):
    output, _ = finished
    names = {path.name for path in output.iterdir()}
    assert {'summary.csv', 'budgets.csv', 'shift.csv', 'accuracy.png', 'shift.png', 'model', 'last.pth.tar',
            'args.yaml', 'report.html'} <= names
    assert not [name for name in names if 'tmp' in name]
    for name in ('accuracy.png', 'shift.png'):
        assert min(Image.open(output / name).size) > 300
    summary = list(csv.DictReader((output / 'summary.csv').open()))
    assert [row['epoch'] for row in summary] == ['0', '1', '2']
    assert summary[0]['eval_top1'] == '' and float(summary[2]['eval_top1']) > 0
    rows = list(csv.DictReader((output / 'budgets.csv').open()))
    assert [row['name'] for row in rows] == ['smallest', 'group 1', 'group 2', 'group 3', 'largest']
    assert all(float(row['macs']) <= float(row['budget']) for row in rows[1:-1])
    report = (output / 'report.html').read_text(encoding='utf-8')
    shown = json.loads(report.split('<script type="application/json" id="data">')[1].split('</script>')[0])['subnets']
    assert [(subnet['name'], str(subnet['score']), str(subnet['counts'][0])) for subnet in shown] == [
        (row['name'], row['top1'], row['macs']) for row in rows]
    top1 = [float(row['top1']) for row in rows[1:-1]]
    assert float(summary[2]['eval_top1']) == pytest.approx(sum(top1) / 3, abs=.01)
    assert all(float(row['train_seconds']) > 0 for row in summary)
    shifts = list(csv.DictReader((output / 'shift.csv').open()))
    history = load(output / 'last.pth.tar')['task_state']['history']
    assert [int(row['update']) for row in shifts] == [update for update, _ in history] and len(shifts) > 3
    for row, (_, p) in zip(shifts, history, strict=True):
        assert [float(row[f'group {k}']) for k in (1, 2, 3)] == pytest.approx(p, rel=1e-5)


@pytest.mark.slow
def test_args_yaml_holds_the_given_learning_rate(tmp_path):
    """Not the scaled one, which depends on the number of processes."""
    given = [*FAST, '--shift', 'none', '--experiment', 'run', '--output', str(tmp_path)]
    del given[given.index('--lr'):given.index('--lr') + 2]
    args = train.parse_args(given)
    before = dict(vars(args))
    trainer = train.Trainer(args)
    assert vars(args) == before and trainer.args.num_classes == 10
    assert trainer.args.lr == trainer.run.optimizer.param_groups[0]['lr'] == 5e-4 * 70 / 512
    again = train.parse_args(['-c', str(tmp_path / 'run' / 'args.yaml')])
    assert again.lr is None and scaled_lr(again, processes=2) == 2 * trainer.args.lr


@pytest.mark.slow
def test_losses_schedules_and_the_pretrained_configuration(tmp_path):
    """timm's flags reach timm."""
    flags = [*FAST, '--shift', 'none', '--epochs', '4', '--output', str(tmp_path)]

    def trainer(*more):
        return train.Trainer(train.parse_args([*flags, *more]))

    made = trainer('--loss', 'poly', '--poly-epsilon', '1.5', '--sched', 'wsd', '--decay-epochs', '2', '--lr-decay-fn',
                   'linear', '--pretrained-cfg-overlay', 'crop_pct=0.5')
    assert type(made.task.criterion) is PolyCrossEntropy and made.task.criterion.epsilon == 1.5
    assert made.run.data_config['crop_pct'] == .5
    rates = []
    for epoch in range(4):
        made.run.schedule.step(epoch)
        rates.append(made.run.schedule.lr)
    assert rates == pytest.approx([2e-3, 2e-3, 2e-3, 1e-3])  # constant for two epochs, then linear to 0
    made = trainer('--loss', 'asl', '--asl-gamma-pos', '.5', '--asl-gamma-neg', '3', '--sched', 'none')
    assert (made.task.criterion.gamma_pos, made.task.criterion.gamma_neg) == (.5, 3.)
    made.run.schedule.step(3)
    assert made.run.schedule.scheduler is None and made.run.schedule.lr == made.run.schedule.mean_lr == 2e-3
    for bce in (['--loss', 'bce'], ['--bce-loss']):
        made = trainer(*bce, '--loss-pos-weight', '2', '--bce-sum', '--sched', 'rsqrt', '--decay-epochs', '1',
                       '--lr-stable-timescale', '3')
        assert float(made.task.criterion.pos_weight) == 2 and made.task.criterion.sum_classes
        made.run.schedule.step(1)
        assert made.run.schedule.lr == pytest.approx(2e-3 * (1 + 1 / 3) ** -.5)


@pytest.mark.slow
def test_the_model_directory_holds_the_evaluated_weights(finished):
    """The subnet for a group's budget has the accuracy of the table, and its weights are the averaged ones."""
    output, _ = finished
    rows = list(csv.DictReader((output / 'budgets.csv').open()))
    row = rows[2]
    net = tsn.from_pretrained(output / 'model', flops=float(row['budget']))
    config = timm.data.resolve_data_config(model=net)
    dataset = create_dataset('sklearn/digits', None, 'validation')
    images, targets = StepBatches(dataset, len(dataset), 0, **config).batch(0)
    with torch.no_grad():
        top1 = float((net(images).argmax(1) == targets).float().mean()) * 100
    assert top1 == pytest.approx(float(row['top1']), abs=.01)
    net = timm.create_model(f'local-dir:{output / "model"}', pretrained=True)
    ema = load(output / 'last.pth.tar')['state_dict_ema']
    assert all(torch.equal(value, ema[name]) for name, value in net.state_dict().items())


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_a_progress_bar_on_a_terminal(tmp_path):
    """Speed and time left go to stderr, the table to stdout."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))
    argv = [*FAST, '--shift', 'none', '--epochs', '1', '--output', str(tmp_path)]
    process = Job(run_script, argv, out=tmp_path / 'out.txt', err=os.ttyname(terminal))
    seen = os.read(ours, 4096)  # the process has opened the terminal
    os.close(terminal)
    with contextlib.suppress(OSError):  # how Linux ends the stream
        while chunk := os.read(ours, 4096):
            seen += chunk
    process.process.join()
    table = (tmp_path / 'out.txt').read_text()
    assert process.process.exitcode == 0 and table.splitlines()[0].split()[:3] == ['name', 'budget', 'MACs']
    assert re.search(r'epoch 1/1: +\d+%.*\d+/\d+ \[\d+:\d+<\d+:\d+, .*batch', seen.decode(errors='replace')), seen


@pytest.mark.slow
def test_uniform_baseline_searches(tmp_path, capsys):
    flags = ['--sampler', 'uniform', '--epochs', '1', '--search-samples', '3', '--held-out', '0.1', '-b', '128']
    assert run(tmp_path, *flags) == 0
    rows = list(csv.DictReader((tmp_path / 'run' / 'budgets.csv').open()))
    assert len(rows) == 5
    edges = [float(rows[0]['macs']), *(float(row['budget']) for row in rows[1:-1])]
    for row, low, high in zip(rows[1:-1], edges[:-1], edges[1:], strict=True):
        assert low < float(row['macs']) <= high
        served = tsn.from_pretrained(tmp_path / 'run' / 'model', flops=float(row['budget']))
        assert served.arch.to_dict() == json.loads(row['arch'])  # users get the arch that the search has found
    assert load(tmp_path / 'run' / 'last.pth.tar')['task_state']['history'] == [[0, [1 / 3] * 3]]


@pytest.mark.slow
def test_image_folder_accumulation_and_one_channel(tmp_path):
    digits = __import__('sklearn.datasets', fromlist=['load_digits']).load_digits()
    for i in range(120):
        for split in ('train', 'validation'):
            folder = tmp_path / 'data' / split / str(digits.target[i] % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15).astype('uint8')).save(folder / f'{i}.png')
    flags = ['--dataset', '', '--data-dir', str(tmp_path / 'data'), '-b', '8', '--grad-accum-steps', '3',
             '--in-chans', '1', '--mean', '0.5', '--std', '0.5', '--epochs', '1', '--no-prefetcher',
             '--shift', 'none', '--clip-grad', '1', '--mixup', '0.1', '--amp',
             '--amp-dtype', 'bfloat16', '--grad-checkpointing']
    assert run(tmp_path, *flags) == 0
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    assert checkpoint['task_state']['micro_step'] == 9  # 7 batches of 8: three updates of 3, 3 and 1
    net = timm.create_model(f'local-dir:{tmp_path / "run" / "model"}', pretrained=True)
    assert net.num_classes == 2 and net.in_chans == 1


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Digits in two WebDataset shards for each split."""
    digits = __import__('sklearn.datasets', fromlist=['load_digits']).load_digits()
    folder = tmp_path_factory.mktemp('shards')
    for split, numbers in (('train', range(96)), ('validation', range(96, 126))):
        for shard in (0, 1):
            with tarfile.open(folder / f'{split}-{shard:04d}.tar', 'w') as tar:
                for number in numbers[shard::2]:
                    png = io.BytesIO()
                    Image.fromarray((digits.images[number] * 15).astype('uint8')).save(png, 'png')
                    for suffix, data in (('png', png.getvalue()), ('cls', str(digits.target[number]).encode())):
                        member = tarfile.TarInfo(f'{number:06d}.{suffix}')
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.exhaustive
@pytest.mark.slow
def test_streamed_dataset(shards, tmp_path):
    """A CNN, which reads the training images again for its statistics; resumed in the middle of an epoch."""
    flags = [*TINY, '--dataset', 'wds/digits', '--data-dir', str(shards), '--train-split', 'train-{0000..0001}.tar',
             '--val-split', 'validation-{0000..0001}.tar', '--train-num-samples', '96', '--val-num-samples', '30',
             '--num-classes', '10', '--model', 'test_shiftmobilenet_supernet', '-b', '16', '--shift', 'none', '-j', '1',
             '--epochs', '2', '--val-interval', '9', '--recovery-interval', '2', '--bn-images', '32',
             '--num-groups', '1', '--checkpoint-hist', '9', '--output', str(tmp_path), '--experiment']
    assert train.main([*flags, 'run']) == 0
    whole = tmp_path / 'run'
    assert load(whole / 'last.pth.tar')['task_state']['update'] == 12
    state = load(whole / 'checkpoint-0.pth.tar')
    trainer = train.Trainer(train.parse_args([*flags, 'first']))
    trainer.fit_generator()
    trainer.train_epoch(0)
    same(trainer.run.net.state_dict(), state['state_dict'])  # the same first epoch
    trainer = train.Trainer(train.parse_args([*flags, 'middle', '--resume', str(whole / 'checkpoint-0.pth.tar')]))
    left = iter([False, True, False])  # SIGTERM in the step of the second update: one more update follows
    trainer.run.optimizer.register_step_post_hook(lambda *_: trainer.interrupts.terminate() if next(left) else None)
    with pytest.raises(train.Terminated):
        trainer.train_epoch(1)
    assert train.main([*flags, 'middle', '--resume', 'auto']) == 0
    same(load(whole / 'last.pth.tar')['state_dict'], load(tmp_path / 'middle' / 'last.pth.tar')['state_dict'])


@pytest.mark.slow
def test_a_streamed_dataset_is_evaluated(shards, tmp_path, capsys):
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=10)
    tsn.save_pretrained(tmp_path, net)
    arch = json.dumps(net.space.smallest.to_dict())
    assert cli(['evaluate', str(tmp_path), '--arch', arch, '--dataset', 'wds/digits', '--data-dir', str(shards),
                '--split', 'validation-{0000..0001}.tar', '--num-samples', '30', '--train-split',
                'train-{0000..0001}.tar', '--bn-images', '64']) == 0
    out, err = capsys.readouterr()
    assert out.startswith('30 images: top-1 ') and err == ''


@pytest.mark.parametrize('flags, signal', [
    ([], 'hypergradient'), (['--shift', 'none'], 'none'), (['--sampler', 'uniform'], 'none'),
    (['--group-weights', '1', '2'], 'none'), (['--elastic', 'test_vit'], 'hypergradient')])
def test_the_shift_is_on_unless_p_is_fixed(flags, signal):
    args = train.parse_args([*ONE, *flags])
    data = open_data(args)
    assert args.shift == signal and (data.held_out is None) == (signal == 'none' and '--sampler' not in flags)


def test_the_shift_is_off_where_p_would_hardly_move(caplog):
    caplog.set_level('INFO')
    for epochs, groups, interval in (('20', 8, None), ('20', 8, '67'), ('200', 72, None)):  # 10 updates in an epoch
        args = train.parse_args([*ONE, '--epochs', epochs, *(['--shift-interval', interval] if interval else [])])
        split = open_data(args)
        assert len(split.train) == 1365 and args.shift == 'hypergradient'
        data = without_useless_shift(args, split, groups)
        assert args.shift == 'none' and data.held_out is None and f'in {int(epochs) * 10:,} updates' in caplog.text
        assert data.train.indices.tolist() == data.calibration.indices.tolist() == list(range(1437))
    for flags, groups in ((['--epochs', '20', '--shift-interval', '66'], 8), (['--epochs', '216'], 72)):
        args = train.parse_args([*ONE, *flags])
        split = open_data(args)
        assert without_useless_shift(args, split, groups) is split and args.shift == 'hypergradient'
    args = train.parse_args([*ONE, '--epochs', '20', '--held-out', '0.1'])  # asked for
    assert len(without_useless_shift(args, open_data(args), 8).held_out) == 144 and args.shift == 'none'
    args = train.parse_args([*ONE, '--shift-batch-size', '73'])
    assert open_data(args).held_out is None and args.shift == 'none' and '72 images would be held out' in caplog.text


@pytest.mark.slow
def test_a_run_without_a_shift_resumes_without_one(tmp_path):
    """Whatever the default is: versions before had another."""
    flags = [*TINY, '--dataset', 'sklearn/digits', '--shift', 'none', '--val-interval', '9', '--output', str(tmp_path),
             '--experiment', 'run']
    assert train.main([*flags, '--epochs', '1']) == 0
    flags = [flag for flag in flags if flag not in ('--shift', 'none', 'hypergradient')]
    assert train.main([*flags, '--epochs', '40', '--resume', 'auto', '--start-epoch', '39']) == 0
    assert load(tmp_path / 'run' / 'last.pth.tar')['args'].shift == 'none'


def test_the_shift_is_off_where_no_images_can_be_held_out(shards, caplog):
    caplog.set_level('INFO')
    args = train.parse_args(['--dataset', 'wds/digits', '--data-dir', str(shards), '--train-split',
                             'train-{0000..0001}.tar', '--val-split', 'validation-{0000..0001}.tar', '-b', '16',
                             '--train-num-samples', '96', '--val-num-samples', '30'])
    assert open_data(args).held_out is None and args.shift == 'none'
    assert 'no images of a stream can be held out' in caplog.text


@pytest.mark.slow
def test_held_out_images_of_a_stream_are_refused(capsys, shards):
    line = one_line_error(
        capsys, '--dataset', 'wds/digits', '--data-dir', str(shards), '--train-split', 'train-{0000..0001}.tar',
        '--val-split', 'validation-{0000..0001}.tar', '--train-num-samples', '96', '--val-num-samples', '30',
        '--num-classes', '10')
    assert 'streams its images' in line


@pytest.mark.slow
def test_tracking(tmp_path):
    """TensorBoard's own reader finds the values of the CSV."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert run(tmp_path, '--epochs', '2', '--val-interval', '1', '--log-tensorboard', '--save-images', '--eval-metric',
               'top1_largest') == 0
    events = EventAccumulator(str(tmp_path / 'run'))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    for column, name in (('train_loss', 'train/epoch_loss'), ('eval_top1', 'eval/top1'), ('lr', 'lr')):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert [seen[10], seen[20]] == pytest.approx([float(row[column]) for row in rows], rel=1e-5)
    last = load(tmp_path / 'run' / 'last.pth.tar')['task_state']['history'][-1][1]
    assert [events.Scalars(f'P/group {k}')[-1].value for k in (1, 2, 3)] == pytest.approx(last, rel=1e-5)
    assert len(events.Scalars('train/loss')) == 4 and len(list((tmp_path / 'run').glob('train-batch-*.jpg'))) == 4
    saved = load(tmp_path / 'run' / 'last.pth.tar')
    assert saved['metric'] == float(rows[1]['eval_top1_largest'])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_weights_and_biases_keeps_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    assert run(tmp_path, '--epochs', '1', '--log-wandb', '--wandb-project', 'tests') == 0
    assert list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))


@pytest.mark.slow
def test_a_teacher_and_a_device_module(tmp_path, capsys):
    """A supernet teaches another one; --device-modules are imported."""
    teacher = timm.create_model('test_shiftformer_supernet', num_classes=10)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    flags = ['--img-size', '32', '-b', '140', '--epochs', '1', '--kd-model', 'test_shiftformer_supernet',
             '--distill-loss-weight', '1']
    assert run(tmp_path, *flags, '--kd-model-path', str(tmp_path / 'teacher.pth'), '--device-modules', 'colorsys',
               '--archs-per-step', '3', '--sandwich', '--inplace-distillation', '--head-init-scale', '.1') == 0
    assert 'colorsys' in sys.modules
    assert 'cannot create the teacher' in one_line_error(capsys, *flags)  # it has no published weights


# -- one network, frozen modules, other classes ------------------------------------------------------------------------


def make_saved(folder, name='test_shiftformer_supernet', classes=10, seed=0):
    """A saved supernet, and its smallest subnet in the folder beside it."""
    net = tiny_supernet(name, seed=seed, num_classes=classes)
    tsn.save_pretrained(folder / 'supernet', net)
    tsn.save_pretrained(folder / 'subnet', tsn.extract(net, net.space.smallest))
    return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp('saved'))


@pytest.fixture(scope='module')
def saved_cnn(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp('saved_cnn'), 'test_shiftmobilenet_supernet')


@pytest.fixture(scope='module')
def seven(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp('seven'), classes=7)


def trainer_of(tmp_path, *flags):
    return train.Trainer(train.parse_args([*ONE, '--output', str(tmp_path), *map(str, flags)]))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_end_a_run(saved, tmp_path, caplog):
    results = trainer_of(tmp_path, '--model', f'local-dir:{saved / "subnet"}', '--experiment', 'run').results
    (tmp_path / 'run' / 'report.html').mkdir()
    results.evaluate(last=True)
    assert caplog.text.count('cannot write the report') == 1
    assert SavedModel(tmp_path / 'run' / 'model').record.results and (tmp_path / 'run' / 'budgets.csv').exists()


@pytest.mark.slow
def test_a_saved_subnet_is_fine_tuned_and_resumes_like_an_undisturbed_run(saved, tmp_path, caplog):
    """Flags of supernets are ignored, and named."""
    flags = [*ONE, '--model', f'local-dir:{saved / "subnet"}', '--epochs', '2', '--val-interval', '2',
             '--drop-path', '.3', '--reprob', '.5', '--model-ema', '--model-ema-decay', '.9', '--num-groups', '3',
             '--shift', 'hypergradient', '--output', str(tmp_path), '--experiment']
    before = tsn.from_pretrained(saved / 'subnet')
    trainer = train.Trainer(train.parse_args([*flags, 'run']))
    same(before.state_dict(), trainer.run.net.state_dict())  # it starts from the saved weights
    assert 'ignored --shift, --num-groups' in caplog.text and trainer.run.loaders.held_out is None
    left = iter([*[False] * 3, True, False])  # SIGTERM in the step of an update: one more update follows
    trainer.run.optimizer.register_step_post_hook(lambda *_: trainer.interrupts.terminate() if next(left) else None)
    with pytest.raises(train.Terminated):
        trainer.train_epoch(0)
    for name in ('run', 'whole'):
        assert train.main([*flags, name, '--resume', 'auto']) == 0
    whole, run = (load(tmp_path / name / 'last.pth.tar') for name in ('whole', 'run'))
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'epoch'):
        same(whole[key], run[key], key)
    summary = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    row, = csv.DictReader((tmp_path / 'run' / 'budgets.csv').open())
    assert summary[0]['eval_top1'] == '' and summary[1]['eval_top1'] == row['top1']
    assert f'{float(row["top1"]):.2f}%' in (tmp_path / 'run' / 'report.html').read_text(encoding='utf-8')
    tuned = tsn.from_pretrained(tmp_path / 'run' / 'model')
    assert tuned.arch == before.arch and json.loads(row['arch']) == tuned.arch.to_dict()
    same(tuned.state_dict(), run['state_dict_ema'])
    assert float(row['top1']) == pytest.approx(accuracy(tuned), abs=.01)
    assert tsn.hub.load.SavedModel(tmp_path / 'run' / 'model').record.training['command'].startswith(
        'python train.py -')  # without the place on this machine


def accuracy(net):
    """Top-1 on the validation digits, without our evaluation."""
    config = timm.data.resolve_data_config(model=net)
    dataset = create_dataset('sklearn/digits', None, 'validation')
    images, targets = StepBatches(dataset, len(dataset), 0, **config).batch(0)
    with torch.no_grad():
        return float((net.eval()(images).argmax(1) == targets).float().mean()) * 100


@pytest.mark.slow
def test_a_cnn_subnet_is_evaluated_with_its_running_statistics(saved_cnn, tmp_path):
    assert train.main([*ONE, '--model', f'local-dir:{saved_cnn / "subnet"}', '--epochs', '1', '--experiment', 'run',
                       '--output', str(tmp_path)]) == 0
    net = tsn.from_pretrained(tmp_path / 'run' / 'model')
    row, = csv.DictReader((tmp_path / 'run' / 'budgets.csv').open())
    assert float(row['top1']) == pytest.approx(accuracy(net), abs=.01)
    assert not torch.equal(net.bn1.running_mean, tsn.from_pretrained(saved_cnn / 'subnet').bn1.running_mean)


@pytest.mark.slow
def test_a_subnet_from_scratch(tmp_path):
    arch = tiny_supernet().space.smallest.to_dict()
    trainer = trainer_of(
        tmp_path, '--model', 'shiftformer_subnet', '--epochs', 1, '--img-size', 32, '--model-kwargs', f'arch={arch}',
        'patch_size=8', 'max_relative_position=3')
    assert trainer.run.net.arch.to_dict() == arch and trainer.run.net.num_classes == 10
    before = copy.deepcopy(trainer.run.net.state_dict())
    trainer.fit()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.run.net.state_dict().items())
    assert tsn.from_pretrained(trainer.run.output / 'model').arch.to_dict() == arch


@pytest.mark.slow
def test_a_teacher_of_one_network(saved, tmp_path):
    """loss = 0 * task + 1 * divergence from itself is 0 without dropout."""
    subnet = f'local-dir:{saved / "subnet"}'
    trainer = trainer_of(
        tmp_path, '--model', subnet, '--kd-model', subnet, '--task-loss-weight', 0,
        '--distill-loss-weight', 1, '--epochs', 1)
    images = torch.randn(4, 3, 32, 32, generator=rng())
    assert float(trainer.task(images, torch.zeros(4, dtype=torch.long))['loss'].detach()) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_linear_probe_trains_the_classifier_alone(saved, tmp_path):
    """A supernet with all of its archs; the optimizer holds nothing else."""
    trainer = trainer_of(tmp_path, '--model', saved / 'supernet', '--freeze', 'backbone', '--epochs', 1,
                         '--num-groups', 3, '--generator-fit-steps', 5, '--generator-interval', 5)
    before = copy.deepcopy(trainer.run.net.state_dict())
    trained = {id(weight) for group in trainer.run.optimizer.param_groups for weight in group['params']}
    assert trained == {id(trainer.run.net.head.weight), id(trainer.run.net.head.bias)}
    trainer.train_epoch(0)
    changed = {name for name, value in trainer.run.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'head.weight', 'head.bias'}


@pytest.mark.slow
def test_frozen_modules_of_a_cnn_keep_weights_and_statistics(saved_cnn, tmp_path):
    trainer = trainer_of(tmp_path, '--model', f'local-dir:{saved_cnn / "subnet"}', '--freeze', 'conv_stem', 'bn1',
                         'blocks.0', '--epochs', 1)
    before = copy.deepcopy(trainer.run.net.state_dict())
    trainer.train_epoch(0)
    changed = {name for name, value in trainer.run.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith(('conv_stem.', 'bn1.', 'blocks.0.'))}


@pytest.mark.slow
def test_frozen_modules_are_part_of_what_resumes(saved, tmp_path, capsys):
    flags = [*ONE, '--model', f'local-dir:{saved / "subnet"}', '--output', str(tmp_path), '--experiment', 'run',
             '--val-interval', '9', '--epochs']
    assert train.main([*flags, '1', '--freeze', 'backbone']) == 0
    capsys.readouterr()
    assert train.main([*flags, '2', '--resume', 'auto']) == 2
    assert "--freeze ['backbone'] and not []" in capsys.readouterr().err


@pytest.mark.parametrize('source', ['initial-checkpoint', 'pretrained-path', 'model', 'training'])
def test_a_head_of_other_classes_is_left_out_and_said(seven, tmp_path, caplog, source):
    """The data has ten classes and the weights seven."""
    weights = seven / 'supernet' / 'model.safetensors'
    flags = ['--model', 'test_shiftformer_supernet', f'--{source}', weights]
    if source == 'training':  # a checkpoint of a training, of a CNN
        weights = make_saved(tmp_path, 'test_shiftmobilenet_supernet', 7) / 'last.pth.tar'
        torch.save(dict(state_dict=timm.create_model(
            f'local-dir:{tmp_path / "supernet"}', pretrained=True).state_dict()), weights)
        flags = ['--model', 'test_shiftmobilenet_supernet', '--initial-checkpoint', weights]
    elif source == 'model':
        weights, flags = seven / 'supernet', ['--model', f'local-dir:{seven / "supernet"}']
    args = train.parse_args([*ONE, *map(str, flags)])
    args.num_classes = 10
    net = create_network(args, torch.device('cpu'))
    assert f'{weights} has 7 classes and the data 10: its head is left out' in caplog.text
    folder = (tmp_path if source == 'training' else seven) / 'supernet'
    trained = timm.create_model(f'local-dir:{folder}', pretrained=True)
    own, head = net.state_dict(), net.pretrained_cfg['classifier']
    assert len(own[f'{head}.bias']) == 10 and own.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in trained.state_dict().items()
               if not name.startswith(f'{head}.'))


def test_a_head_of_the_same_classes_is_kept_in_silence(saved, caplog):
    for flags in (['--model', f'local-dir:{saved / "supernet"}'], ['--model', 'test_shiftformer_supernet',
                  '--pretrained-path', f'{saved}/supernet/model.safetensors']):
        args = train.parse_args([*ONE, *flags])
        args.num_classes = 10
        own = create_network(args, torch.device('cpu')).state_dict()
        trained = timm.create_model(f'local-dir:{saved / "supernet"}', pretrained=True).state_dict()
        same({name: own[name] for name in trained}, trained)
    assert 'left out' not in caplog.text


def test_a_saved_model_of_one_channel_gets_images_of_one_channel(tmp_path):
    net = tiny_supernet(in_chans=1)
    tsn.save_pretrained(tmp_path / 'subnet', tsn.extract(net, net.space.smallest))
    trainer = trainer_of(tmp_path, '--model', tmp_path / 'subnet', '--mean', .5, '--std', .5)
    assert next(iter(trainer.read_batches(0)))[0].shape[1] == trainer.run.net.in_chans == 1


@pytest.mark.slow
def test_networks_that_are_not_ours_or_do_not_fit(saved, seven, capsys, tmp_path, finished):
    subnet = f'local-dir:{saved / "subnet"}'
    (tmp_path / 'empty').mkdir()
    for flags, words in (
            (['--model', tmp_path / 'empty'], 'config.json is missing'),
            (['--model', subnet, '--freeze', 'neck'], '--freeze neck: the model has no such module; give backbone, or'),
            (['--model', subnet, '--freeze', 'backbone', 'head'], 'leaves nothing to train'),
            (['--model', subnet, '--resume', finished[0] / 'last.pth.tar'], 'its embed_dim is'),
            (['--model', subnet, '--initial-checkpoint', seven / 'supernet' / 'model.safetensors'],
             'does not hold weights of this network')):
        assert words in one_line_error(capsys, *map(str, flags), '--output', str(tmp_path / 'empty'))
    assert not list((tmp_path / 'empty').iterdir())


# -- wrong flags -------------------------------------------------------------------------------------------------------


def one_line_error(capsys, *flags):
    """The error of a run that ends with exit code 2, from the parser or later."""
    try:
        code = train.main([*FAST, *flags])
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if 'error' in line or 'Traceback' in line]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def test_missing_folder(capsys, tmp_path):
    assert 'nowhere' in one_line_error(capsys, '--dataset', '', '--data-dir', str(tmp_path / 'nowhere'))


def test_one_class(capsys, folder):
    shutil.rmtree(folder / 'train' / 'b')
    assert 'class' in one_line_error(capsys, '--dataset', '', '--data-dir', str(folder))


def test_different_classes(capsys, folder):
    (folder / 'validation' / 'b').rename(folder / 'validation' / 'c')
    assert "'b' is in one" in one_line_error(capsys, '--dataset', '', '--data-dir', str(folder))


@pytest.mark.parametrize('workers', ['0', '1'])
def test_broken_image(capsys, folder, workers, tmp_path):
    for i in range(12):
        (folder / 'train' / 'a' / f'{i}.png').write_bytes(b'no image')
    line = one_line_error(capsys, '--dataset', '', '--data-dir', str(folder), '-b', '8', '-j', workers,
                          '--shift', 'none', '--output', str(tmp_path))
    assert '.png' in line and 'repair or remove' in line


@pytest.mark.parametrize('flags, words', [
    pytest.param(['--model', 'resnet18'], 'shiftformer_tiny_supernet', marks=pytest.mark.slow),
    (['--model', 'nonsense'], 'shiftformer_tiny_supernet'),
    (['--num-classes', '3'], '10 classes'),
    (['--num-groups', '1001'], '1 to 1000'),
    (['--group-width', 'abc'], "--group-width: 'abc'"),
    (['--held-out', '0.9'], '0.5'),
    (['--batch-size', '100000'], 'lower it'),
    (['--resume', '/nowhere/last.pth.tar'], '/nowhere/last.pth.tar'),
    (['--mixup', '0.5', '-b', '63'], 'even'),
    (['--dataset', 'sklearn/nope'], 'sklearn/digits'),
    (['--model-kwargs', 'reg_tokens=2'], 'reg_tokens'),
    (['--model-kwargs', 'nonsense=2'], 'nonsense'),
    (['--in-chans', '5'], 'RGB have 3'),
    (['--input-img-mode', 'P'], 'give one of L, LA, RGB'),
    (['--opt-betas', '0.9'], '--opt adamw'),
    (['--opt', 'adahessian'], 'second derivatives'),
    (['--opt-kwargs', 'nonsense=1'], 'nonsense'),
    (['--start-epoch', '3', '--epochs', '3'], '--start-epoch 3'),
    (['--gp', ''], 'leave it out, or give avg'),
    (['--sched', 'wsd', '--epochs', '3', '--decay-epochs', '4'], 'Look at --epochs, --warmup-epochs'),
    (['--initial-checkpoint', __file__], '--initial-checkpoint'),
    (['--kd-model', 'resnet18', '--kd-model-path', __file__], "'resnet18' with the weights"),
    (['--sandwich'], '--archs-per-step 1'),
    (['--device-modules', 'nonsense'], '--device-modules nonsense'),
    (['--dataset', 'wds/nowhere'], 'wds/nowhere'),
    (['--output', '/proc/nowhere'], '--output /proc/nowhere'),
    (['--held-out', '0'], '(0, 0.5]'),
])
def test_wrong_flags(capsys, flags, words, tmp_path):
    assert words in one_line_error(capsys, '--output', str(tmp_path), *flags)
    assert not list(tmp_path.iterdir())  # no file is left


def test_a_mobilenet_needs_square_images(capsys, tmp_path):
    flags = [*ONE, '--model', 'test_shiftmobilenet_supernet', '--input-size', '3', '32', '64']
    assert train.main([*flags, '--output', str(tmp_path)]) == 2 and '--input-size 3 64 64' in capsys.readouterr().err


@pytest.mark.slow
def test_measurements_of_an_earlier_epoch_are_kept(tmp_path):
    """The model directory may be measured while the run goes on, which writes it again at every evaluation."""
    assert run(tmp_path, '--epochs', '1') == 0
    model = tmp_path / 'run' / 'model'
    device = device_of(SavedModel(model).space)
    add_device(model, device)
    assert run(tmp_path, '--epochs', '2', '--resume', 'auto') == 0
    assert SavedModel(model).devices() == {'toy': device}


@pytest.mark.slow
def test_resume_of_another_space(capsys, finished, tmp_path):
    output, _ = finished
    line = one_line_error(
        capsys, '--resume', str(output / 'last.pth.tar'), '--img-size', '64', '--output', str(tmp_path))
    assert 'img_size' in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize('content, words', [
    ('modell: x\n', 'modell'), ('- a\n', 'name: value'), ('a: [\n', 'config'), ('epochs: 2.5\n', '2.5'),
    ("amp: 'no'\n", 'true or false'), ('tau: 3\n', 'tau'), ('clip-mode: foo\n', 'foo'), ('search_samples: 0\n', '1'),
    ('initial-checkpoint: nowhere.pth\n', 'nowhere.pth'),
])
def test_wrong_config_file(capsys, tmp_path, content, words):
    (tmp_path / 'c.yaml').write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main(['-c', str(tmp_path / 'c.yaml')])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_config_file_gives_defaults(tmp_path):
    (tmp_path / 'c.yaml').write_text(
        'batch-size: 32\nlr: 1e-3\nmodel: test_shiftformer_supernet\nscale: [0.5, 1]\namp: true\nhflip: null\n'
        'model_kwargs: {relative_position: false}\n')
    args = train.parse_args(['-c', str(tmp_path / 'c.yaml'), '--batch-size', '64', 'DIR'])
    assert (args.batch_size, args.lr, args.model) == (64, 1e-3, 'test_shiftformer_supernet')
    assert args.scale == [.5, 1.] and args.amp and args.hflip == .5 and args.data_dir == 'DIR'
    assert args.model_kwargs == dict(relative_position=False)


@pytest.mark.slow
def test_resume_with_another_split(capsys, finished, tmp_path):
    output, flags = finished
    resume = ['--resume', str(output / 'last.pth.tar'), '--seed', '7', '--output', str(tmp_path)]
    line = one_line_error(capsys, *flags, *resume)
    assert '--seed 42 and not 7' in line and 'args.yaml' in line


@pytest.mark.exhaustive
@pytest.mark.slow
def test_resume_with_another_optimizer(capsys, finished, tmp_path):
    output, flags = finished
    resume = [*flags, '--resume', str(output / 'last.pth.tar'), '--opt', 'sgd', '--output', str(tmp_path)]
    assert '--opt adamw and not sgd' in one_line_error(capsys, *resume)
    assert '--weight-decay 0.05 and not 0.0' in one_line_error(capsys, *resume[:-4], '--weight-decay', '0')
    assert train.main([*FAST, *resume, '--experiment', 'run', '--epochs', '4', '--no-resume-opt']) == 0
    assert load(tmp_path / 'run' / 'last.pth.tar')['epoch'] == 3


@pytest.mark.exhaustive
@pytest.mark.slow
def test_mixup_switched_off_without_prefetcher(tmp_path):
    flags = ['--shift', 'none', '--epochs', '2', '--no-prefetcher', '--mixup', '0.8', '--mixup-off-epoch', '1']
    assert run(tmp_path, *flags) == 0


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_resume(tmp_path):
    flags = [*FAST, '--shift', 'none', '--epochs']
    argv = [*flags, '500', '--output', str(tmp_path), '--experiment', 'run']
    process = Job(run_file, ROOT / 'train.py', *argv, out=tmp_path / 'out.txt', err=tmp_path / 'err.txt')
    last = tmp_path / 'run' / 'last.pth.tar'
    while process.alive and not last.exists():
        time.sleep(.01)
    os.kill(process.pid, signal.SIGINT)
    code, err = process.wait()
    assert code == 130 and 'Traceback' not in err, err
    assert err.strip().splitlines()[-1] == f'train.py: interrupted; continue with --resume {last}'
    epoch = load(last)['epoch']
    flags += [str(epoch + 2), '--resume', str(last)]
    assert train.main(flags) == 0  # stays in the same folder
    assert load(last)['epoch'] == epoch + 1
    (tmp_path / 'run' / 'budgets.csv').unlink()
    assert train.main(flags) == 0  # no epoch is left: evaluates only
    assert (tmp_path / 'run' / 'budgets.csv').exists() and load(last)['epoch'] == epoch + 1


@pytest.mark.parametrize('size, paper', [('tiny', '76.0'), ('small', '82.2'), ('base', '82.8')])
def test_imagenet_configs_are_autoformers_recipe(size, paper):
    path = ROOT / 'configs' / f'shiftformer_{size}_imagenet.yaml'
    args = train.parse_args(['-c', str(path), '--data-dir', '/data/imagenet'])
    assert args.batch_size * args.grad_accum_steps == 1024 and scaled_lr(args) == pytest.approx(5e-4 * 1024 / 512)
    wanted = dict(
        model=f'shiftformer_{size}_supernet', epochs=500, opt='adamw', weight_decay=.05, warmup_epochs=20, drop_path=.1,
        aa='rand-m9-mstd0.5-mmax9-inc1', mixup=.8, cutmix=1., smoothing=.1, reprob=.25, aug_repeats=3,
        shift_warmup_epochs=50, group_width='0.1G')
    assert {name: getattr(args, name) for name in wanted} == wanted
    header = path.read_text().split('model:')[0]
    assert f'{paper}% top-1' in header and f'-c configs/{path.name}' in header
    space = timm.create_model(args.model, device='meta').space
    middle = (tsn.macs(space, space.smallest) + tsn.macs(space, space.largest)) / 2  # an even P over groups
    assert f'3 x {middle / 1e9:.2f} GMACs' in header
    assert f'= {500 * 1.281167 * 3 * middle / 1e9 / 1e3:.1f} EMACs' in header


def warnings_of(caplog, *flags):
    """What is logged while the loaders are created."""
    args = train.parse_args([*FAST, *flags])
    args.num_classes = 10
    net = create_network(args, torch.device('cpu'))
    caplog.clear()
    create_loaders(
        args, open_data(args), timm.data.resolve_data_config(vars(args), model=net), torch.device('cpu'))
    return caplog.text


def test_policies_that_pillow_refuses(caplog):
    try:
        refused = not ImageOps.posterize(Image.new('L', (1, 1)), 0)
    except ValueError:
        refused = True
    for policy, risky in (('rand-m9-mstd0.5-mmax9-inc1', False), ('rand-m3-inc1', True)):
        assert ('-mmax9' in warnings_of(caplog, '--aa', policy)) == (risky and refused)


def test_repeated_augmentation_needs_several_processes(caplog):
    assert '--aug-repeats needs several processes; it is ignored' in warnings_of(caplog, '--aug-repeats', '3')
