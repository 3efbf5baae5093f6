"""Kills, full disks, corrupt files and losses that are not finite, some of them with real processes."""
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

# everything that is random or has a state
RICH = [*FAST, '--epochs', '3', '--val-interval', '9', '-j', '2', '--mixup', '0.8', '--cutmix', '1.0',
        '--drop-path', '0.2', '--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9', '--reprob', '0.25',
        '--aa', 'rand-m5-n1', '--grad-accum-steps', '2', '--recovery-interval', '1', '--experiment', 'run',
        '--sched-on-updates']


def start(tmp_path, *flags):
    number = len(list(tmp_path.glob('*.txt')))
    return Job(run_script, [*flags, '--output', str(tmp_path)], out='/dev/null', err=tmp_path / f'{number}.txt')


def wait_for(process, pattern, folder):
    """Wait until a file appears; fail if the process ends before."""
    while process.alive:
        if found := sorted(folder.glob(pattern)):
            return found[0]
        time.sleep(.01)
    raise AssertionError(process.wait())


def summary(folder):
    """Rows of summary.csv without the times."""
    with (folder / 'summary.csv').open() as file:
        return [{name: value for name, value in row.items() if name != 'train_seconds'} for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An undisturbed run."""
    path = tmp_path_factory.mktemp('whole')
    assert train.main([*RICH, '--output', str(path)]) == 0
    return path / 'run'


def test_a_run_that_is_killed_and_terminated_ends_like_an_undisturbed_one(whole, tmp_path, caplog):
    """SIGKILL at a random moment, SIGTERM later, then the same command again: the same weights, P and generator."""
    flags, moment = [*RICH, '--resume', 'auto'], random.Random(3)
    process = start(tmp_path, *flags)
    wait_for(process, 'recovery-0-*', tmp_path / 'run')
    time.sleep(moment.random() * 1.5)
    process.kill()
    code, err = process.wait()
    assert code == -signal.SIGKILL and 'starting a new run' in err

    process = start(tmp_path, *flags)
    wait_for(process, 'recovery-1-*', tmp_path / 'run')
    process.terminate()
    code, err = process.wait()
    assert code == 143, err
    assert err.splitlines()[-1].startswith('train.py: terminated; continue with --resume auto --experiment run')
    assert re.search(r'resuming from .*recovery-0-', err), err

    caplog.set_level('INFO')
    assert train.main([*flags, '--output', str(tmp_path)]) == 0
    assert re.search(r'resuming from .*recovery-1-', caplog.text)
    a, b = load(whole / 'last.pth.tar'), load(tmp_path / 'run' / 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'epoch'):
        same(a[key], b[key], key)
    assert len(a['task_state']['history']) > 2
    for name in ('budgets.csv', 'shift.csv'):
        assert (whole / name).read_text() == (tmp_path / 'run' / name).read_text()
    assert summary(whole) == summary(tmp_path / 'run')  # with the mean loss of the interrupted epochs
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


def test_resume_before_the_last_batch(tmp_path):
    """No batch is left that could set the random state by the way."""
    flags = [*FAST, '--epochs', '1', '--val-interval', '9', '--drop-path', '.3', '--reprob', '.5',
             '--output', str(tmp_path)]
    assert train.main([*flags, '--experiment', 'whole']) == 0
    trainer = train.Trainer(train.parse_args([*flags, '--experiment', 'run']))
    trainer.task.generator.fit(steps=20, seed=42, progress=False)
    left = iter([*[False] * 7, True, False])  # SIGTERM in the step of an update: one more update follows
    trainer.run.optimizer.register_step_post_hook(lambda *_: trainer.interrupts.terminate() if next(left) else None)
    with pytest.raises(train.Terminated):
        trainer.train_epoch(0)
    assert trainer.task.loop_state['batch'] == trainer.batches - 1 == 9
    assert train.main([*flags, '--experiment', 'run', '--resume', 'auto']) == 0
    same(*(load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('whole', 'run')))


def test_corrupt_checkpoints_are_skipped(whole, tmp_path, caplog):
    run = tmp_path / 'run'
    run.mkdir()
    for name in ('checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar'):
        (run / name).write_bytes((whole / name).read_bytes())
    assert newest_checkpoint(run) == run / 'last.pth.tar'
    os.utime(run / 'last.pth.tar', (1, 1))  # a longer, older run
    assert newest_checkpoint(run) == run / 'checkpoint-1.pth.tar'
    data = bytearray((whole / 'last.pth.tar').read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would not notice
    (run / 'last.pth.tar').write_bytes(data)
    (run / 'checkpoint-1.pth.tar').write_bytes((whole / 'checkpoint-1.pth.tar').read_bytes()[:100_000])
    (run / 'recovery-2-1.pth.tar').write_bytes(b'')
    assert newest_checkpoint(run) == run / 'checkpoint-0.pth.tar'
    assert 'last.pth.tar is corrupt; falling back' in caplog.text
    assert 'cannot read the checkpoint' in caplog.text and 'checkpoint-1.pth.tar' in caplog.text
    with pytest.raises(ValueError, match='last.pth.tar.* is corrupt'):
        check_checkpoint(run / 'last.pth.tar', None)
    trainer = train.Trainer(train.parse_args([*RICH, '--resume', 'auto', '--output', str(tmp_path)]))
    assert trainer.position == (1, 0, 0., 0) and trainer.task.update == 5
    same(load(whole / 'checkpoint-0.pth.tar')['state_dict'], trainer.run.net.state_dict())


def test_resume_auto_needs_an_experiment(capsys):
    with pytest.raises(SystemExit):
        train.main([*FAST, '--resume', 'auto'])
    assert '--experiment NAME' in capsys.readouterr().err


def test_resume_in_the_middle_of_an_epoch_needs_the_same_batch_size(whole, tmp_path, capsys):
    state = load(whole / 'last.pth.tar')
    state['task_state']['loop'].update(epoch=2, batch=4)
    torch.save(state, tmp_path / 'middle.pth.tar')
    assert train.main([*RICH, '--resume', str(tmp_path / 'middle.pth.tar'), '--output', str(tmp_path), '-b', '64']) == 2
    assert 'batch_size=128, and not 64' in capsys.readouterr().err


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_does_not_stop_training(whole, tmp_path, caplog, capsys):
    """Files are limited to 500 kB: checkpoints do not fit, and no partial file stays."""
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
    assert caplog.text.count('cannot write a checkpoint') > 2 and 'Training continues' in caplog.text
    assert 'cannot write the results' in caplog.text  # of the first epoch; for the last one it is an error
    assert 'File too large' in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / 'run').iterdir() if 'tar' in path.name or 'tmp' in path.name] == []
    assert not (tmp_path / 'run' / 'model' / 'config.json').exists()


def test_checkpoints_are_written_again_once_the_disk_has_room(tmp_path, caplog):
    """One write goes to the device that is always full."""
    net = torch.nn.Linear(200, 200)  # more than a buffer, whose flush some releases of torch do not check
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
    assert Checkpoints(saver, since=time.time() + 60).newest() is None  # all files are another run's
    again = Checkpoints(saver)
    again.save_recovery(1, 2)
    again.save_recovery(1, 4)
    assert {path.name for path in tmp_path.iterdir()} == {'recovery-1-2.pth.tar', 'recovery-1-4.pth.tar'}


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # TensorBoard writes in a thread
def test_a_full_disk_does_not_stop_tracking(tmp_path, caplog):
    tracker = Tracker(tmp_path, {}, tensorboard=True)
    size, limits = sum(path.stat().st_size for path in tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, limits[1]))
    try:
        for update in range(100):
            tracker.log(update, {f'figure {i}': 1. for i in range(10)})
        tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count('cannot write metrics') == 1 and 'training continues' in caplog.text


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
    assert [text for text in caplog.messages if text.startswith('skipped update')][-1].endswith('(3 in a row)')


@pytest.mark.parametrize('model', ['test_shiftformer_supernet', 'test_shiftmobilenet_supernet'])
def test_a_skipped_update_changes_nothing(tmp_path, model):
    args = train.parse_args([
        *FAST, '--model', model, '--model-ema', '--skip-nonfinite', '2', '--output', str(tmp_path), '-b', '8',
        '--shift', 'none', '--img-size', '32', '--bn-images', '8'])
    trainer = train.Trainer(args)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)

    def update(poison):
        loss = trainer.task(images * poison, targets)['loss']
        loss.backward()
        return trainer.update.step(loss.detach()[None], epoch=0, update=1)

    assert len(update(1.)) == 1
    before = {name: value.clone() for name, value in trainer.run.net.state_dict().items()}
    averaged = {name: value.clone() for name, value in trainer.task.trainable_module_ema.module.state_dict().items()}
    for _ in range(2):
        assert update(float('nan')) == []
    assert trainer.update.skipped == 2 and trainer.task.update == 3
    same(before, trainer.run.net.state_dict())
    same(averaged, trainer.task.trainable_module_ema.module.state_dict())
    update(1.)
    first = 'patch_embed.proj.weight' if 'former' in model else 'conv_stem.weight'
    assert trainer.update.skipped == 0 and not torch.equal(before[first], next(trainer.run.net.parameters()))
    for p in trainer.run.net.parameters():  # a finite loss, but not its gradient
        p.grad = torch.full_like(p, torch.inf)
    trainer.update.step(torch.ones(1), epoch=0, update=1)
    assert trainer.update.skipped == 1
    update(float('nan'))
    trainer.task(images, targets)['loss'].backward()
    with pytest.raises(ValueError, match='the loss nan in update 1 of epoch 1 is not finite'):
        trainer.update.step(torch.tensor([float('nan'), 1.]), epoch=0, update=1)


def test_float16_fails_once_every_scale_has_overflowed(tmp_path):
    """Updates that overflow halve the scale of the loss, down to a limit."""
    trainer = train.Trainer(train.parse_args([
        *FAST, '--amp', '--amp-dtype', 'float16', '--shift', 'none', '--output', str(tmp_path)]))
    before = {name: value.clone() for name, value in trainer.run.net.state_dict().items()}
    with pytest.raises(ValueError, match='no scale of the loss.*bfloat16') as error:
        updates = 0
        while updates < 100:
            loss = trainer.run.net(torch.randn(2, 3, 32, 32)).sum() * 1e38
            trainer.update.scaled(loss * 1e38).backward()
            trainer.update.step(torch.ones(1), epoch=0, update=1)
            updates += 1
    assert updates == 30 and error.value.__cause__ is None  # from 2 ** 16 to less than 2 ** -14
    same(before, trainer.run.net.state_dict())


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
    assert train.main(flags) == 2  # every image is broken


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
