"""Several processes train and evaluate like one, and all end when one of them dies."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.networks import tiny_supernet
from support.processes import ranks
from support.small_runs import FAST, ROOT, load, run_script
from support.small_runs import train as script

import timm_shiftnas as tsn
from timm_shiftnas.data import StepBatches, create_dataset
from timm_shiftnas.method import ArchitectureGenerator, BudgetGroups
from timm_shiftnas.method.config import ShiftNASConfig
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.utils import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.process]

IMAGES, UPDATES = 16, 5
VARIANTS = {
    # depths differ between the micro-batches of an update, so that its last one leaves blocks without gradients
    'accumulated': dict(shift='hypergradient', accum_steps=2, generator_interval=2),
    'checkpointed': dict(shift='grad_norm', generator_interval=2, checkpointing=True),
    'variation': dict(shift='variation', generator_interval=0),
    'sandwich': dict(shift='hypergradient', archs_per_step=4, sandwich=True, inplace_distillation=True),
    'uniform': dict(sampler='uniform', shift='none', archs_per_step=2),
    'best-up': dict(sampler='attentivenas_best_up', archs_per_step=2),
    'focusformer': dict(sampler='focusformer', generator_interval=2),
    'each its own': dict(shift='none', generator_interval=0, arch_per_rank=True),
}


def batch(number, count=IMAGES):
    noise = torch.Generator().manual_seed(number)
    return torch.randn(count, 3, 16, 16, generator=noise), torch.randint(10, (count,), generator=noise)


def train(variant, group, distributed):
    """Train a few updates with SGD; return their gradients, the archs, the generator and the history of P."""
    config = dict(variant)
    torch.manual_seed(0)
    net = timm.create_model('test_shiftformer_supernet', num_classes=10, img_size=16)
    net.set_grad_checkpointing(config.pop('checkpointing', False))
    generator = ArchitectureGenerator(net.space).fit(steps=20, progress=False)
    config = ShiftNASConfig(
        shift_interval=2, generator_images=IMAGES, total_updates=10, seed=3, **config)
    task = ShiftNASTask(
        net, config=config, generator=generator, groups=BudgetGroups.of_space(net.space, count=5), verbose=False,
        shift_batches=lambda n: (batch(100 + n), batch(200 + n)))
    optimizer = torch.optim.SGD(net.parameters(), lr=.05)
    if distributed:
        task.prepare_distributed()
    gradients, archs, number = [], [], 0
    for _ in range(UPDATES):
        for micro in range(config.accum_steps):
            images, targets = (group.shard(part) for part in batch(number))
            number += 1
            with task.no_sync() if micro + 1 < config.accum_steps else torch.enable_grad():
                result = task(images, targets)
                (result['loss'] / config.accum_steps).backward()
            archs.append([arch.to_dict() for arch in result['archs']])
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return dict(gradients=gradients, archs=archs, generator=generator.state_dict(), history=task.history)


def main(folder):
    """Run in each of the processes."""
    dist.init_process_group('gloo')
    group = Ranks.current()
    results = {name: train(variant, group, distributed=True) for name, variant in VARIANTS.items()}
    mean, total = torch.tensor([1., 3.]) * group.rank, torch.ones(2, 2, dtype=torch.float64)
    group.mean_([mean])
    group.sum_([total[0], total[1:]])
    results['exchanged'] = [mean, total]
    torch.save(results, Path(folder) / f'{group.rank}.pt')
    dist.destroy_process_group()


def torchrun(*flags, processes=2, **kwargs):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', *flags]
    return subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'), **kwargs)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp('two')
    for process in ranks(2, main, path, folder=path):
        code, text = process.wait(300)
        assert code == 0, text
    return [torch.load(path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


def close(a, b, tolerance=1e-6):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=f'{name} differs')


@pytest.mark.parametrize('name', [name for name in VARIANTS if name != 'each its own'])
def test_two_processes_with_half_the_batch_train_like_one_with_all_of_it(two, name):
    one = train(VARIANTS[name], Ranks(), distributed=False)
    for rank, result in enumerate(result[name] for result in two):
        assert result['archs'] == one['archs'], rank
        for a, b in zip(result['gradients'], one['gradients'], strict=True):
            used = {key for key in b if float(b[key].abs().max()) > 0}
            assert used <= set(a) and all(float(a[key].abs().max()) == 0 for key in set(a) - used)
            close({key: a[key] for key in sorted(used)}, {key: b[key] for key in sorted(used)})
        # Adam's first steps have the length of the learning rate, 1e-3, however small a policy gradient is
        close(result['generator'], one['generator'], 2e-3 if name == 'focusformer' else 1e-6)
        close(result['generator'], two[0][name]['generator'], 0)
        assert [update for update, _ in result['history']] == [update for update, _ in one['history']]
        for (_, p), (_, q) in zip(result['history'], one['history'], strict=True):
            assert p == pytest.approx(q, abs=2e-5)  # finite differences and counts of zeros amplify rounding errors
    depths = {len(arch['num_heads']) for archs in one['archs'] for arch in archs}
    assert len(depths) > 1  # blocks were skipped
    # generator and P are equal in both processes, bit for bit
    assert all(torch.equal(two[0][name]['generator'][key], two[1][name]['generator'][key])
               for key in two[0][name]['generator'])
    assert two[0][name]['history'] == two[1][name]['history']


def test_means_and_sums_over_processes(two):
    for result in two:
        mean, total = result['exchanged']
        assert mean.tolist() == [.5, 1.5] and total.tolist() == [[2., 2.], [2., 2.]]


def test_archs_per_process(two):
    """Gradients are the mean over processes, each with its own arch and its own images."""
    archs = [result['each its own']['archs'] for result in two]
    assert archs[0] != archs[1]
    drawn = train(dict(VARIANTS['each its own'], archs_per_step=2), Ranks(), distributed=False)['archs']
    assert [[a[0], b[0]] for a, b in zip(*archs, strict=True)] == drawn
    torch.manual_seed(0)
    net = timm.create_model('test_shiftformer_supernet', num_classes=10, img_size=16)
    images, targets = batch(0)
    for rank in (0, 1):
        arch = net.space.from_dict(archs[rank][0][0])
        (F.cross_entropy(net(images[rank::2], arch), targets[rank::2]) / 2).backward()
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for result in two:
        close({name: result['each its own']['gradients'][0][name] for name in expected}, expected)


# -- train.py ----------------------------------------------------------------------------------------------------------

FLAGS = [*FAST, '--opt', 'sgd', '--lr', '.05', '--device', 'cpu', '--aa', 'rand-m5-n1', '--experiment', 'run',
         '--recovery-interval', '4']


def table(path):
    """The budget table: a dict of numbers per row."""
    with (path / 'run' / 'budgets.csv').open() as file:
        return {row['name']: {name: float(row[name] or 0) for name in ('budget', 'macs', 'params', 'top1', 'top5')}
                for row in csv.DictReader(file)}


def test_two_processes_train_like_one_and_resume(tmp_path):
    """With augmentation; a process is killed, all end, and the run resumes with one or two processes."""
    process = torchrun(ROOT / 'train.py', *FLAGS, '-b', '35', '--epochs', '40', '--output', tmp_path, cwd=tmp_path)
    run = tmp_path / 'run'
    while process.poll() is None and not list(run.glob('recovery-1-*')):
        time.sleep(.02)
    workers = [pid for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
               if b'train.py' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0 and not any(Path(f'/proc/{pid}').exists() for pid in workers), err
    assert 'train.py: error (process 0): another process has ended' in err or 'Signal 15' in err, err

    resumed = [*FLAGS, '--epochs', '2', '--output', str(tmp_path), '--resume']
    middle = str(sorted(run.glob('recovery-1-*'))[-1])
    assert script.main([*resumed, middle, '-b', '70']) == 2  # from the middle of an epoch of two processes
    end = str(run / 'checkpoint-0.pth.tar')
    reports = [job.wait() for job in ranks(2, run_script, [*resumed, end, '-b', '35'], folder=tmp_path)]
    assert [code for code, _ in reports] == [0, 0], reports
    assert ['largest' in text for _, text in reports] == [True, False]  # only the first process prints
    assert ['2 processes, 70 images per batch' in text for _, text in reports] == [True, False]
    two, rows = load(run / 'last.pth.tar'), table(tmp_path)

    whole = [*FLAGS, '--epochs', '2', '-b', '70', '--output', str(tmp_path / 'one')]
    assert script.main(whole) == 0
    one = load(tmp_path / 'one' / 'run' / 'last.pth.tar')
    close(two['state_dict'], one['state_dict'])
    close(two['task_state']['generator'], one['task_state']['generator'])
    assert two['task_state']['history'][-1][1] == pytest.approx(one['task_state']['history'][-1][1], abs=2e-5)
    assert len(one['task_state']['history']) > 3
    for name, row in table(tmp_path / 'one').items():
        assert rows[name] == pytest.approx(row, abs=.6)  # two of 360 images


def test_two_processes_evaluate_like_one(tmp_path):
    """They share an odd number of images, and subnets; with BatchNorm statistics and a search."""
    digits = create_dataset('sklearn/digits', None, 'validation')
    for number in range(341):
        image, target = digits[number]
        folder = tmp_path / 'data' / ('train' if number < 300 else 'validation') / str(target % 3)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f'{number}.png')
    flags = [*FLAGS, '--dataset', '', '--data-dir', str(tmp_path / 'data'), '--model', 'test_shiftmobilenet_supernet',
             '--shift', 'none', '--sampler', 'uniform', '--epochs', '1', '--search-samples', '3', '-b', '64',
             '--held-out', '.1', '-vb', '16', '--bn-images', '60', '--output', str(tmp_path)]
    assert script.main(flags) == 0
    alone, stats = table(tmp_path), (tmp_path / 'run' / 'model' / 'bn_stats.safetensors').read_bytes()
    (tmp_path / 'run' / 'budgets.csv').unlink()
    resume = [*flags, '--resume', str(tmp_path / 'run' / 'last.pth.tar')]
    for process in ranks(2, run_script, resume, folder=tmp_path):
        code, text = process.wait()
        assert code == 0, text
    assert table(tmp_path) == alone
    assert (tmp_path / 'run' / 'model' / 'bn_stats.safetensors').read_bytes() == stats


def test_one_network_is_evaluated_with_the_mean_statistics_of_all_processes(tmp_path):
    """The saved CNN subnet has the accuracy of the table, to whose images both processes have contributed."""
    net = tiny_supernet('test_shiftmobilenet_supernet')
    tsn.save_pretrained(tmp_path / 'subnet', tsn.extract(net, net.space.smallest))
    argv = ['--dataset', 'sklearn/digits', '-j', '0', '-b', '64', '--epochs', '1', '--warmup-epochs', '0', '--lr',
            '2e-2', '--model', str(tmp_path / 'subnet'), '--output', str(tmp_path), '--experiment', 'run']
    for process in ranks(2, run_script, argv, folder=tmp_path):
        code, err = process.wait()
        assert code == 0, err
    with (tmp_path / 'run' / 'budgets.csv').open() as file:
        row, = csv.DictReader(file)
    trained = tsn.from_pretrained(tmp_path / 'run' / 'model')
    config = timm.data.resolve_data_config(model=trained)
    dataset = create_dataset('sklearn/digits', None, 'validation')
    images, targets = StepBatches(dataset, len(dataset), 0, **config).batch(0)
    with torch.no_grad():
        top1 = float((trained(images).argmax(1) == targets).float().mean()) * 100
    assert float(row['top1']) == pytest.approx(top1, abs=.01)
