"""What happens to trainings: kills, full disks, broken files, losses that are not finite; with real processes."""
import csv
import logging
import os
import random
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from support.processes import Job
from support.small_runs import FAST, load, run_script, same, train
from timm.utils import CheckpointSaver

from timm_shiftnas.training.checkpoints import Checkpoints, check_checkpoint, newest_checkpoint
from timm_shiftnas.training.tracking import Tracker

# everything that is random or remembers something
RICH = [*FAST, '--epochs', '3', '--val-interval', '9', '-j', '2', '--mixup', '0.8', '--cutmix', '1.0',
        '--drop-path', '0.2', '--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9', '--reprob', '0.25',
        '--aa', 'rand-m5-n1', '--grad-accum-steps', '2', '--recovery-interval', '1', '--experiment', 'run',
        '--sched-on-updates']


def start(tmp_path, *flags):
    number = len(list(tmp_path.glob('*.txt')))
    return Job(run_script, [*flags, '--output', str(tmp_path)], out='/dev/null', err=tmp_path / f'{number}.txt')


def wait_for(process, pattern, folder):
    """Until a file appears; the process must live."""
    while process.alive:
        if found := sorted(folder.glob(pattern)):
            return found[0]
        time.sleep(.01)
    raise AssertionError(process.wait())


def summary(folder):
    """Rows of summary.csv, but for the times."""
    with (folder / 'summary.csv').open() as file:
        return [{name: value for name, value in row.items() if name != 'train_seconds'} for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    path = tmp_path_factory.mktemp('whole')
    assert train.main([*RICH, '--output', str(path)]) == 0
    return path / 'run'


def test_killed_and_terminated_runs_end_as_if_nothing_had_happened(whole, tmp_path, caplog):
    """SIGKILL at a random moment, SIGTERM later, the same command each time: the same weights, P and generator."""
    flags, moment = [*RICH, '--resume', 'auto'], random.Random(3)
    process = start(tmp_path, *flags)
    wait_for(process, 'recovery-0-*', tmp_path / 'run')
    time.sleep(moment.random() * 1.5)
    process.kill()
    code, err = process.wait()
    assert code == -signal.SIGKILL and 'starting anew' in err

    process = start(tmp_path, *flags)
    wait_for(process, 'recovery-1-*', tmp_path / 'run')
    process.terminate()
    code, err = process.wait()
    assert code == 143, err
    assert err.splitlines()[-1].startswith('train.py: terminated; continue with --resume auto --experiment run')
    assert re.search(r'going on from .*recovery-0-', err), err

    caplog.set_level('INFO')
    assert train.main([*flags, '--output', str(tmp_path)]) == 0
    assert re.search(r'going on from .*recovery-1-', caplog.text)
    a, b = load(whole / 'last.pth.tar'), load(tmp_path / 'run' / 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'epoch'):
        same(a[key], b[key], key)
    assert len(a['task_state']['history']) > 2
    for name in ('budgets.csv', 'shift.csv'):
        assert (whole / name).read_text() == (tmp_path / 'run' / name).read_text()
    assert summary(whole) == summary(tmp_path / 'run')  # the mean loss of the broken epochs, too
    assert not list((tmp_path / 'run').glob('*recovery*')) and not list((tmp_path / 'run').glob('*tmp*'))


@pytest.mark.parametrize('delay', [0, .5])
def test_sigterm_while_the_generator_is_fitted(tmp_path, capsys, caplog, delay):
    caplog.set_level('INFO')

    class Sender(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith('fitting the generator'):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()

    sender = Sender()
    logging.getLogger('train').addHandler(sender)
    try:
        assert train.main([*FAST, '--generator-fit-steps', '2000', '--epochs', '1', '--output', str(tmp_path)]) == 143
    finally:
        logging.getLogger('train').removeHandler(sender)
    assert 'train.py: terminated; continue with --resume auto' in capsys.readouterr().err


def test_going_on_from_the_last_batch(tmp_path):
    """No batch after it is there to set the random states in passing."""
    flags = [*FAST, '--epochs', '1', '--val-interval', '9', '--drop-path', '.3', '--reprob', '.5',
             '--output', str(tmp_path)]
    assert train.main([*flags, '--experiment', 'whole']) == 0
    trainer = train.Trainer(train.parse_args([*flags, '--experiment', 'run']))
    trainer.task.generator.fit(steps=20, seed=42, progress=False)
    left = iter([*[False] * 7, True, False])  # after the step of an update: the next one is the last
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.on_terminate() if next(left) else None)
    with pytest.raises(train.Terminated):
        trainer.train_epoch(0)
    assert trainer.task.loop_state['batch'] == trainer.batches - 1 == 9
    assert train.main([*flags, '--experiment', 'run', '--resume', 'auto']) == 0
    same(*(load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('whole', 'run')))


def test_a_corrupt_checkpoint_is_passed_over(whole, tmp_path, caplog):
    run = tmp_path / 'run'
    run.mkdir()
    for name in ('checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar'):
        (run / name).write_bytes((whole / name).read_bytes())
    assert newest_checkpoint(run) == run / 'last.pth.tar'
    os.utime(run / 'last.pth.tar', (1, 1))  # of a longer run, before
    assert newest_checkpoint(run) == run / 'checkpoint-1.pth.tar'
    data = bytearray((whole / 'last.pth.tar').read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would not notice
    (run / 'last.pth.tar').write_bytes(data)
    (run / 'checkpoint-1.pth.tar').write_bytes((whole / 'checkpoint-1.pth.tar').read_bytes()[:100_000])
    (run / 'recovery-2-1.pth.tar').write_bytes(b'')
    assert newest_checkpoint(run) == run / 'checkpoint-0.pth.tar'
    assert 'last.pth.tar is corrupt; falling back' in caplog.text
    assert 'cannot read the checkpoint' in caplog.text and 'checkpoint-1.pth.tar' in caplog.text
    with pytest.raises(ValueError, match='last.pth.tar.* is corrupt.*--resume auto'):
        check_checkpoint(run / 'last.pth.tar', None)
    trainer = train.Trainer(train.parse_args([*RICH, '--resume', 'auto', '--output', str(tmp_path)]))
    assert trainer.start == (1, 0) and trainer.task.update == 5
    same(load(whole / 'checkpoint-0.pth.tar')['state_dict'], trainer.net.state_dict())


def test_resume_auto_needs_a_place(capsys):
    with pytest.raises(SystemExit):
        train.main([*FAST, '--resume', 'auto'])
    assert '--experiment NAME' in capsys.readouterr().err


def test_the_middle_of_an_epoch_belongs_to_its_batches(whole, tmp_path, capsys):
    state = load(whole / 'last.pth.tar')
    state['task_state']['loop'].update(epoch=2, batch=4)
    torch.save(state, tmp_path / 'middle.pth.tar')
    assert train.main([*RICH, '--resume', str(tmp_path / 'middle.pth.tar'), '--output', str(tmp_path), '-b', '64']) == 2
    assert 'batch_size=128, and not 64' in capsys.readouterr().err


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole, tmp_path, caplog, capsys):
    """Files may not grow beyond 500 kB: checkpoints do not fit, and nothing half-written stays."""
    size = 500_000
    assert (whole / 'last.pth.tar').stat().st_size > 2 * size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert train.main([
            *FAST, '--epochs', '2', '--recovery-interval', '3', '--experiment', 'run', '--val-interval', '1',
            '--output', str(tmp_path)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count('cannot write a checkpoint') > 2 and 'The training goes on' in caplog.text
    assert 'cannot write the results' in caplog.text  # of the first epoch; those of the last are an error
    assert 'File too large' in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / 'run').iterdir() if 'tar' in path.name or 'tmp' in path.name] == []
    assert not (tmp_path / 'run' / 'model' / 'config.json').exists()


def test_room_on_the_disk_again(tmp_path, caplog):
    """The device that is always full stands in the way of one write."""
    net = torch.nn.Linear(2, 2)
    saver = CheckpointSaver(
        net, torch.optim.SGD(net.parameters(), lr=1), checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    checkpoints = Checkpoints(saver)
    checkpoints.save_recovery(0, 5)
    (tmp_path / 'recovery_tmp.pth.tar').symlink_to('/dev/full')
    checkpoints.save_recovery(0, 7)
    assert checkpoints.failure is not None and 'recovery-0-5.pth.tar is kept' in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ['recovery-0-5.pth.tar']
    checkpoints.save_recovery(0, 9)
    assert checkpoints.failure is None and newest_checkpoint(tmp_path).exists()
    assert checkpoints.newest() == newest_checkpoint(tmp_path)
    assert Checkpoints(saver, since=time.time() + 60).newest() is None  # all is another run's
    again = Checkpoints(saver)
    again.save_recovery(1, 2)
    again.save_recovery(1, 4)
    assert {path.name for path in tmp_path.iterdir()} == {'recovery-1-2.pth.tar', 'recovery-1-4.pth.tar'}


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # TensorBoard writes in one
def test_a_full_disk_costs_figures_and_not_the_run(tmp_path, caplog):
    tracker = Tracker(tmp_path, {}, tensorboard=True)
    size, limits = sum(path.stat().st_size for path in tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, limits[1]))
    try:
        for update in range(100):
            tracker.log(update, {f'figure {i}': 1. for i in range(10)})
        tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count('cannot log to a tracker') == 1 and 'the training goes on' in caplog.text


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, caplog):
    flags = [*FAST, '--opt', 'sgd', '--lr', '1e30', '--epochs', '2', '--experiment', 'run', '--recovery-interval', '1',
             '--output', str(tmp_path)]
    assert train.main(flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'is not finite' in line and '--skip-nonfinite' in line and '--clip-grad' in line
    kept = newest_checkpoint(tmp_path / 'run')
    assert str(kept) in line
    assert all(bool(value.isfinite().all()) for value in load(kept)['state_dict'].values())
    caplog.clear()
    assert train.main([*flags, '--skip-nonfinite', '3', '--experiment', 'tolerant']) == 2
    assert [text for text in caplog.messages if 'is left out' in text][-1].endswith('(3 in a row)')


@pytest.mark.parametrize('model', ['test_shiftformer_supernet', 'test_shiftmobilenet_supernet'])
def test_an_update_that_is_left_out_leaves_no_trace(tmp_path, model):
    args = train.parse_args([
        *FAST, '--model', model, '--model-ema', '--skip-nonfinite', '2', '--output', str(tmp_path), '-b', '8',
        '--shift', 'none', '--img-size', '32', '--bn-images', '8'])
    trainer = train.Trainer(args)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)

    def update(poison):
        loss = trainer.task(images * poison, targets)['loss']
        loss.backward()
        trainer.step(0, 1, loss.detach()[None], train.AverageMeter())

    update(1.)
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    averaged = {name: value.clone() for name, value in trainer.task.trainable_module_ema.module.state_dict().items()}
    for _ in range(2):
        update(float('nan'))
    assert trainer.nonfinite == 2 and trainer.task.update == 3
    same(before, trainer.net.state_dict())
    same(averaged, trainer.task.trainable_module_ema.module.state_dict())
    update(1.)
    assert trainer.nonfinite == 0 and not torch.equal(before['patch_embed.proj.weight'] if 'former' in model else
                                                      before['conv_stem.weight'], next(trainer.net.parameters()))
    for p in trainer.net.parameters():  # a finite loss, but not its gradient
        p.grad = torch.full_like(p, torch.inf)
    trainer.step(0, 1, torch.ones(1), train.AverageMeter())
    assert trainer.nonfinite == 1
    update(float('nan'))
    trainer.task(images, targets)['loss'].backward()
    with pytest.raises(ValueError, match='the loss nan in update 1 of epoch 1 is not finite'):
        trainer.step(0, 1, torch.tensor([float('nan'), 1.]), train.AverageMeter())


def test_float16_without_a_scale_that_serves(tmp_path):
    """Updates that overflow halve the scale of the loss, as they should; but not forever."""
    trainer = train.Trainer(train.parse_args([
        *FAST, '--amp', '--amp-dtype', 'float16', '--shift', 'none', '--output', str(tmp_path)]))
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    with pytest.raises(ValueError, match='no scale of the loss.*bfloat16') as error:
        for updates in range(100):
            loss = trainer.net(torch.randn(2, 3, 32, 32)).sum() * 1e38
            trainer.scaled(loss * 1e38).backward()
            trainer.step(0, 1, torch.ones(1), train.AverageMeter())
    assert updates == 30 and error.value.__cause__ is None  # from 2 ** 16 to less than 2 ** -14
    same(before, trainer.net.state_dict())


# -- images and workers ------------------------------------------------------------------------------------------------


def test_broken_images_are_skipped(folder, tmp_path, caplog):
    flags = [*FAST, '--dataset', '', '--data-dir', str(folder), '-b', '8', '--shift', 'none', '--output', str(tmp_path),
             '--epochs', '1', '--skip-broken-images']
    broken = folder / 'train' / 'a' / '3.png'
    broken.write_bytes(b'no image')
    (folder / 'validation' / 'b' / '11.png').write_bytes(b'')
    assert train.main([*flags, '--no-aug']) == 0
    assert [text for text in caplog.messages if str(broken) in text and 'the next image takes its place' in text]
    for path in (folder / 'train').glob('*/*.png'):
        path.write_bytes(b'')
    assert train.main(flags) == 2  # no accident


def test_a_dead_worker_ends_the_run(tmp_path):
    process = start(tmp_path, *FAST, '--shift', 'none', '-j', '1', '--epochs', '500', '--experiment', 'run')
    wait_for(process, 'last*', tmp_path / 'run')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    workers = []
    while not workers and process.alive:
        workers = [int(pid) for pid in children.read_text().split()
                   if b'resource_tracker' not in Path(f'/proc/{pid}/cmdline').read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    code, err = process.wait()
    assert code == 2 and 'Traceback' not in err, err
    assert err.splitlines()[-1].startswith('train.py: error: DataLoader worker') and '--workers' in err.splitlines()[-1]
