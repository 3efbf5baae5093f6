"""Kills, full disks, corrupt files and losses that are not finite, some of them with real processes."""
import csv
import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.processes import Job, call, run_code
from support.small_runs import FAST, ROOT, TINY, load, run_script, same, train

from timm_shiftnas.data.glyphs import Glyphs
from timm_shiftnas.training.checkpoints import Checkpoints, Position, Saver, check_checkpoint, newest_checkpoint
from timm_shiftnas.training.folder import RunFolder
from timm_shiftnas.training.results import Results, append_epoch
from timm_shiftnas.training.tracking import Tracker
from timm_shiftnas.utils.files import atomic_write, name_disk_errors

pytestmark = pytest.mark.slow

# everything that is random or has a state
RICH = [*FAST, '--epochs', '2', '--val-interval', '9', '-j', '1', '--mixup', '0.8', '--cutmix', '1.0',
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


@pytest.mark.process
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


@pytest.mark.exhaustive
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
    state = load(trainer.checkpoints.newest())
    assert 0 < state['task_state']['loop']['seconds'] < 1000
    state['task_state']['loop']['seconds'] += 1000
    torch.save(state, trainer.checkpoints.newest())
    assert train.main([*flags, '--experiment', 'run', '--resume', 'auto']) == 0
    same(*(load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('whole', 'run')))
    with (tmp_path / 'run' / 'summary.csv').open() as file:  # the time of an epoch has the part before the kill
        assert [1000 < float(row['train_seconds']) < 2000 for row in csv.DictReader(file)] == [True]


def test_old_checkpoints_have_no_seconds():
    assert Position.of_loop(dict(epoch=2, batch=3, loss=1., count=8, processes=1)) == (2, 3, 1., 8, 0.)


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
    assert trainer.position == (1, 0, 0., 0, 0.) and trainer.task.update == 5
    same(load(whole / 'checkpoint-0.pth.tar')['state_dict'], trainer.run.net.state_dict())


def test_resume_auto_needs_an_experiment(capsys):
    with pytest.raises(SystemExit):
        train.main([*FAST, '--resume', 'auto'])
    assert '--experiment NAME' in capsys.readouterr().err


def test_resume_in_the_middle_of_an_epoch_needs_the_same_batch_size(whole, tmp_path, capsys):
    state = load(whole / 'last.pth.tar')
    state['task_state']['loop'].update(epoch=1, batch=4)
    torch.save(state, tmp_path / 'middle.pth.tar')
    assert train.main([*RICH, '--resume', str(tmp_path / 'middle.pth.tar'), '--output', str(tmp_path), '-b', '64']) == 2
    assert 'batch_size=70, and not 64' in capsys.readouterr().err


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_ctrl_c_names_the_recovery_file(tmp_path, capsys, caplog):
    caplog.set_level('INFO')

    class Sender(logging.Handler):
        def emit(self, record):
            if '  batch 5/' in record.getMessage():
                os.kill(os.getpid(), signal.SIGINT)

    sender = Sender()
    logging.getLogger('train').addHandler(sender)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore SIGINT
    try:
        assert train.main([*FAST, '--shift', 'none', '--epochs', '1', '--recovery-interval', '4', '--experiment', 'a b',
                           '--output', str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
        logging.getLogger('train').removeHandler(sender)
    newest = tmp_path / 'a b' / 'recovery-0-4.pth.tar'
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"train.py: interrupted; continue with --resume '{newest}'"


@pytest.mark.process
@pytest.mark.parametrize(
    'program', [[ROOT / 'train.py'], ['-c', 'from timm_shiftnas_cli import main; main()', 'train']])
def test_ctrl_c_while_torch_is_imported(program, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *program, '--output', tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    maps = Path(f'/proc/{process.pid}/maps')
    while process.poll() is None and 'libtorch' not in maps.read_text():
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out in ('train.py: interrupted\n', 'timm-shiftnas: interrupted\n')


INTERRUPTED = {
    'in a finalizer': 'Finalizer(); time.sleep(60)',
    'below an error of a library': 'try: interrupt()\n    finally: raise RuntimeError("enforce fail")',
    'twice': 'try: interrupt()\n    finally: interrupt()',
    'in a worker first': 'if os.fork() == 0: interrupt(); os._exit(7)\n    assert os.wait()[1] >> 8 == 7; interrupt()',
}


@pytest.mark.process
@pytest.mark.parametrize('moment', INTERRUPTED)
def test_ctrl_c_ends_a_program_in_one_line(moment, tmp_path):
    code = f'''
import os, signal, time
from timm_shiftnas_cli.interrupts import CtrlC

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(.01)

class Finalizer:
    def __del__(self):
        interrupt()

signal.signal(signal.SIGINT, signal.default_int_handler)
with CtrlC('program').raised():
    {INTERRUPTED[moment]}
'''
    assert call(run_code, code, folder=tmp_path) == (130, '', 'program: interrupted\n')


def test_ctrl_c_in_torchs_writer_is_no_error_of_the_disk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / 'a'):
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError('enforce fail')
    assert not list(tmp_path.iterdir())


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', str(disk)]
    if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('a disk can only be mounted by root')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


def fill(disk, but):
    """Fill a disk, but for some bytes."""
    (disk / 'fill').write_bytes(bytes(shutil.disk_usage(disk).free - but))


@contextmanager
def file_limit(size):
    """Limit the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def open_files(folder):
    links = [path.readlink() for path in Path('/proc/self/fd').iterdir() if path.is_symlink()]
    return [str(link) for link in links if str(link).startswith(str(folder)) and '.lock' not in str(link)]


def create_checkpoints(folder, values=4, **options):
    """Checkpoints of a network with so many values."""
    net = torch.nn.Linear(values, 1)
    saver = Saver(
        net, torch.optim.SGD(net.parameters(), lr=1), checkpoint_dir=str(folder), recovery_dir=str(folder), **options)
    return Checkpoints(saver, RunFolder(folder))


@pytest.mark.exhaustive
def test_files_that_grow_too_large_do_not_stop_training(whole, tmp_path, caplog, capsys):
    """Files are limited to 500 kB: checkpoints do not fit, and no partial file stays."""
    size = 500_000
    assert (whole / 'last.pth.tar').stat().st_size > 2 * size
    with file_limit(size):
        assert train.main([
            *FAST, '--epochs', '2', '--recovery-interval', '3', '--experiment', 'run', '--val-interval', '1',
            '--output', str(tmp_path)]) == 2
    assert caplog.text.count('cannot write a checkpoint') > 2 and 'Training continues' in caplog.text
    assert 'cannot write the results' in caplog.text  # of the first epoch; for the last one it is an error
    assert 'File too large' in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / 'run').iterdir() if 'tar' in path.name or 'tmp' in path.name] == []
    assert not (tmp_path / 'run' / 'model' / 'config.json').exists()


@pytest.mark.process
def test_a_run_on_a_full_disk_still_saves_its_model(small_disk, caplog, capsys):
    """A checkpoint of 7.9 MB does not fit on 6 MB, the model directory does."""
    assert train.main([*FAST, '--model-ema', '--save-images', '--shift', 'none', '--epochs', '1', '--experiment', 'run',
                       '--output', str(small_disk)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('train.py: error: training is finished') and 'the disk is full' in line
    assert 'cannot write a checkpoint (the disk is full (No space left on device)' in caplog.text
    assert (small_disk / 'run' / 'model' / 'config.json').exists() and open_files(small_disk) == []
    assert shutil.disk_usage(small_disk).free > 2 ** 21


@pytest.mark.process
def test_a_full_disk_is_called_full_by_every_writer(small_disk, caplog):
    fill(small_disk, but=2 ** 15)
    checkpoints = create_checkpoints(small_disk, values=100_000)
    checkpoints.save(0, None)
    assert checkpoints.failure.startswith('the disk is full (No space left on device)') and not open_files(small_disk)
    results = Results(SimpleNamespace(args=None, task=None, loaders=None, output=small_disk), None, checkpoints.folder)
    results.save_images(torch.rand(8, 3, 256, 256), 0, 0)
    tracker = Tracker(small_disk, {}, tensorboard=True)
    try:
        for update in range(200):
            tracker.log(update, {f'figure {i}': 1. for i in range(20)})
    finally:
        tracker.close()
    with pytest.raises(OSError, match='the disk is full') as error:
        with atomic_write(small_disk / 'table.csv') as temporary:
            temporary.write_bytes(bytes(2 ** 20))
    assert error.value.errno == errno.ENOSPC
    assert [text.split(' (')[1] for text in caplog.messages] == ['the disk is full'] * 3, caplog.text
    assert not list(small_disk.glob('*.csv')) and not list(small_disk.glob('.*.tmp'))


def test_a_used_up_quota_and_a_read_only_disk_have_names(tmp_path):
    for number, text in ((errno.EDQUOT, 'the disk is full: the quota'), (errno.EROFS, 'read-only')):
        with pytest.raises(OSError, match=text):
            with name_disk_errors(tmp_path):
                try:
                    raise OSError(number, 'a message of the system')
                except OSError:
                    raise RuntimeError('enforce fail')  # noqa: B904 as torch's writer does


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='open files are listed in /proc')
def test_a_failed_checkpoint_leaves_no_file_open(tmp_path):
    checkpoints = create_checkpoints(tmp_path, values=100_000)
    with file_limit(50_000):
        checkpoints.save(0, None)
        checkpoints.save_recovery(0, 1)
    assert 'File too large' in checkpoints.failure and not open_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'.lock', 'args.yaml'}


def test_checkpoints_are_written_again_once_the_disk_has_room(tmp_path, caplog):
    checkpoints = create_checkpoints(tmp_path)
    checkpoints.save_recovery(0, 5)
    with file_limit(100):
        checkpoints.save_recovery(0, 7)
    assert checkpoints.failure and 'recovery-0-5.pth.tar is kept' in caplog.text
    assert [path.name for path in tmp_path.glob('*.tar')] == ['recovery-0-5.pth.tar']
    checkpoints.save_recovery(0, 9)
    assert not checkpoints.failure and newest_checkpoint(tmp_path).exists()
    assert checkpoints.newest() == newest_checkpoint(tmp_path)
    assert Checkpoints(checkpoints.saver, checkpoints.folder, since=time.time() + 60).newest() is None  # another run's
    again = Checkpoints(checkpoints.saver, checkpoints.folder)
    again.save_recovery(1, 2)
    again.save_recovery(1, 4)
    assert {path.name for path in tmp_path.glob('*.tar')} == {'recovery-1-2.pth.tar', 'recovery-1-4.pth.tar'}


@pytest.mark.process
def test_a_disk_that_becomes_read_only_does_not_stop_training(small_disk, caplog):
    checkpoints = create_checkpoints(small_disk)
    checkpoints.save_recovery(0, 1)
    subprocess.run(['mount', '--bind', str(small_disk), str(small_disk)], check=True)
    subprocess.run(['mount', '-o', 'remount,bind,ro', str(small_disk)], check=True)
    checkpoints.save_recovery(0, 2)
    assert 'the file system is read-only' in checkpoints.failure and 'recovery-0-1.pth.tar is kept' in caplog.text
    subprocess.run(['umount', str(small_disk)], check=True)
    checkpoints.save_recovery(0, 3)
    assert not checkpoints.failure and (small_disk / 'recovery-0-3.pth.tar').exists()


def test_a_removed_folder_is_created_again(tmp_path, caplog):
    """It is removed after some checkpoints; the next ones, the tables and the metrics are written all the same."""
    flags = [*FAST, '--shift', 'none', '--log-tensorboard', '--save-images', '--experiment', 'run',
             '--output', str(tmp_path), '--recovery-interval', '4', '--epochs', '1']
    trainer = train.Trainer(train.parse_args(flags))
    trainer.tracker.log(0, {'figure': 1.})
    trainer.save_recovery()
    folder = tmp_path / 'run'
    shutil.rmtree(folder)
    with trainer.interrupts:
        trainer.end_epoch(0, trainer.train_epoch(0), trainer.evaluate(0))
        trainer.finish()
    trainer.tracker.close()
    assert caplog.text.count('another program has removed the folder') == 1
    assert {'last.pth.tar', 'args.yaml', 'summary.csv', 'model', 'budgets.csv', '.lock'} <= set(os.listdir(folder))
    assert list(folder.glob('events*')) and trainer.folder.lock.held
    assert newest_checkpoint(folder) == folder / 'last.pth.tar'


def test_links_in_the_folder_of_a_run_are_not_followed(tmp_path):
    """Links under the names of a checkpoint, of timm's temporary file, of a table and of a picture."""
    outside, folder = tmp_path / 'outside', tmp_path / 'run'
    outside.write_text('precious')
    folder.mkdir()
    names = ('tmp.pth.tar', 'last.pth.tar', 'checkpoint-0.pth.tar', 'recovery_tmp.pth.tar', 'recovery-0-1.pth.tar',
             'args.yaml', 'summary.csv', 'train-batch-0-0.jpg')
    for name in names:
        (folder / name).symlink_to(outside)
    checkpoints = create_checkpoints(folder)
    checkpoints.saver.can_hardlink = False
    checkpoints.save(0, None)
    checkpoints.save_recovery(0, 1)
    results = Results(SimpleNamespace(args=None, task=None, loaders=None, output=folder), None, checkpoints.folder)
    results.write_summary(0, dict(loss=1.), {}, lr=.1)
    results.save_images(torch.rand(1, 3, 8, 8), 0, 0)
    assert outside.read_text() == 'precious'
    assert not [path.name for path in folder.iterdir() if path.is_symlink()]
    (folder / 'a').mkdir()
    (folder / 'a' / '.lock').symlink_to(outside)
    with pytest.raises(OSError):
        RunFolder(folder / 'a')
    assert outside.read_text() == 'precious'


def test_a_temporary_file_is_new_and_has_a_random_name(tmp_path):
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / 'a.csv') as temporary:
            names.add(temporary.name)
            assert temporary.is_file() and not temporary.is_symlink()
            with pytest.raises(FileExistsError):
                open(temporary, 'x')
            temporary.write_text('a')
    assert len(names) == 2 and (tmp_path / 'a.csv').read_text() == 'a'
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / 'a.csv').stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_summary_drops_the_rows_of_epochs_that_are_trained_again(tmp_path):
    path = tmp_path / 'summary.csv'
    for epoch in (0, 1, 2, 1):
        append_epoch(path, {'epoch': epoch, 'train_loss': epoch / 2})
    assert path.read_text() == 'epoch,train_loss\n0,0.0\n1,0.5\n'
    path.write_bytes(b'\xff\x00 no table\n1,2\n')
    append_epoch(path, {'epoch': 3, 'train_loss': 1.})
    assert path.read_text() == 'epoch,train_loss\n3,1.0\n'


@pytest.mark.process
def test_a_glyph_cache_on_a_full_disk_is_left_out(small_disk, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(small_disk))
    fill(small_disk, but=2 ** 13)
    assert len(Glyphs('train', images=156, pixels=16)) == 156
    assert not list(small_disk.rglob('*glyphs*'))


def test_a_full_disk_does_not_stop_tracking(tmp_path, caplog):
    tracker = Tracker(tmp_path, {}, tensorboard=True)
    tracker.log(0, {'figure': 1.})
    with file_limit(sum(path.stat().st_size for path in tmp_path.iterdir()) + 300):
        for update in range(100):
            tracker.log(update, {f'figure {i}': 1. for i in range(10)})
        tracker.close()
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
            loss = trainer.run.net(torch.randn(2, 3, 16, 16)).sum() * 1e38
            trainer.update.scaled(loss * 1e38).backward()
            trainer.update.step(torch.ones(1), epoch=0, update=1)
            updates += 1
    assert updates == 30 and error.value.__cause__ is None  # from 2 ** 16 to less than 2 ** -14
    same(before, trainer.run.net.state_dict())


# -- images and workers ------------------------------------------------------------------------------------------------


def test_broken_images_are_skipped(folder, tmp_path, caplog):
    flags = [*TINY, '--dataset', '', '--data-dir', str(folder), '-b', '8', '--shift', 'none', '--output', str(tmp_path),
             '--epochs', '1', '--skip-broken-images']
    broken = folder / 'train' / 'a' / '3.png'
    broken.write_bytes(b'no image')
    (folder / 'validation' / 'b' / '11.png').write_bytes(b'')
    assert train.main([*flags, '--no-aug']) == 0
    assert [text for text in caplog.messages if str(broken) in text and 'the next image takes its place' in text]
    for path in (folder / 'train').glob('*/*.png'):
        path.write_bytes(b'')
    assert train.main(flags) == 2  # every image is broken


@pytest.mark.process
def test_a_second_run_in_a_folder_is_refused_and_a_dead_worker_ends_the_first(tmp_path, capsys):
    process = start(tmp_path, *FAST, '--shift', 'none', '-j', '1', '--epochs', '500', '--experiment', 'run')
    wait_for(process, 'last*', tmp_path / 'run')
    # a second run in the same folder is refused; the lock of a killed one is free (test of SIGKILL)
    assert train.main([*FAST, '--shift', 'none', '--experiment', 'run', '--output', str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f'process {process.pid}' in line and str(tmp_path / 'run') in line and '--experiment' in line
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    workers = []
    while not workers and process.alive:
        workers = [int(pid) for pid in children.read_text().split()
                   if b'resource_tracker' not in Path(f'/proc/{pid}/cmdline').read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    code, err = process.wait()
    assert code == 2 and 'Traceback' not in err, err
    assert err.splitlines()[-1].startswith('train.py: error: DataLoader worker') and '--workers' in err.splitlines()[-1]
