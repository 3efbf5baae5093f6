"""The benchmarks: their statistics against closed forms, their processes, and one comparison from the command line."""
import argparse
import json
import math
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.devices import device_of
from support.networks import tiny_supernet
from support.paths import ROOT
from support.processes import call, run_file
from support.tables import read_csv

import timm_shiftnas as tsn
from timm_shiftnas.data import StepBatches, create_dataset
from timm_shiftnas.method import ArchitectureGenerator

BENCHMARKS = ROOT / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
import ablations  # noqa: E402
import compare_elastic  # noqa: E402
import latency  # noqa: E402
import price  # noqa: E402
import ranking  # noqa: E402
import runs  # noqa: E402


def test_interval_of_paired_differences():
    mean, half = runs.interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-5)  # t table, 2 degrees of freedom
    assert math.isnan(runs.interval([1.0])[1])


def test_differences_are_paired_by_seed():
    scores = {'a': {0: [10., 20.], 1: [50., 60.]}, 'b': {1: [51., 62.], 0: [11., 21.], 2: [0., 0.]}}
    lines = [line.split(' | ') for line in runs.paired_table(scores, 'a').splitlines()]
    assert lines[2][:2] == ['| a', '2'] and lines[3][1] == '3'
    # the differences are 1 and 1 at the smallest budget, 1 and 2 at the largest, 1 and 1.5 in the means; an interval of
    # one degree of freedom is 12.706 standard errors
    assert lines[3][3] == '+1.00 ± 0.00' and lines[3][5] == '+1.50 ± 6.35' and lines[3][7] == '+1.25 ± 3.18 |'


def test_boosted_group_weights_have_the_same_sum():
    flags = ablations.boosted(3, 2)
    values = [float(value) for value in flags[flags.index('--group-weights') + 1:]]
    assert len(values) == 8 and values[2] == 2 and sum(values) == pytest.approx(8)
    assert ablations.boosted(1, 8)[-7:] == ['0.0'] * 7


def test_rank_correlations():
    def rows(method, *seeds):
        return [dict(method=method, seed=seed, macs=number, top1=top1)
                for seed, tops in enumerate(seeds) for number, top1 in enumerate(tops)]

    # the mean of the networks alone is 1, 2, 3, 4
    text = ranking.correlations(
        [*rows('alone', (1, 2, 4, 5), (1, 2, 2, 3)), *rows('a', (0, 1, 2, 3), (0, 2, 1, 3)), *rows('b', (4, 3, 2, 1))])
    a, b, macs, noise = (line.strip('| ').split(' | ') for line in text.splitlines()[2:])
    # of one seed one of six pairs is swapped, so that tau is 4 / 6; the interval is 12.706 standard errors of 1 / 6
    assert a == ['a', '2', '0.83 ± 2.12', '0.90 ± 1.27', '1.00']
    assert b == ['b', '1', '-1.00', '-1.00', '0.00']
    assert macs[:4] == ['MACs', '1', '1.00', '1.00']
    # five pairs agree, one is a tie of one seed: 5 / sqrt(6 * 5)
    assert noise[:3] == ['one training alone, with another seed', '1', '0.91']


@pytest.mark.slow
@pytest.mark.process
def test_tasks_are_compared_from_finished_trainings(tmp_path):
    """Nothing is trained: every training has its file. The score is the budget's number, plus 10 for the learned P.

    What an earlier series has written of the uniform sampling stays in the table.
    """
    rows = [dict(name=f'{share:.2f}', budget=1e6 * (number + 1), macs=1000, params=10, score=float(number), arch={})
            for number, share in enumerate((0, 1 / 3, 2 / 3, 1))]
    for method, more in (('even', 0), ('learned', 10)):
        for seed in range(2):
            path = tmp_path / 'segmentation' / '8images-2epochs' / f'from-scratch-{method}' / f'seed{seed}.json'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(rows=[dict(row, score=row['score'] + more) for row in rows], seconds=1)))
    results = tmp_path / 'results' / 'tasks_segmentation_2.csv'
    results.parent.mkdir()
    results.write_text('method,seed,budget,macs,params,score,arch\n' + ''.join(
        f'"from scratch, uniform",1,{number + 1}000000,1000,10,{number + 4},{{}}\n' for number in range(4)))
    code, out, err = call(
        run_file, BENCHMARKS / 'compare_tasks.py', '--task', 'segmentation', '--methods', 'even', 'learned', '--starts',
        'from scratch', '--no-alone', '--seeds', '2', '--epochs', '2', '--images', '8', '--output', tmp_path,
        '--results', tmp_path / 'results', folder=tmp_path)
    assert code == 0, err
    learned, uniform = (line.split(' | ') for line in out.splitlines()[-2:])
    assert learned[:4] == ['| from scratch, learned', '2', '10.00 ± 0.00', '+10.00 ± 0.00']
    assert learned[6] == '11.50 ± 0.00' and uniform[:3] == ['| from scratch, uniform', '1', '4.00']
    assert len(read_csv(results)) == 20 and results.with_suffix('.png').exists()


@pytest.mark.slow
def test_archs_chosen_by_macs_are_the_largest_proposals_that_fit():
    net = tiny_supernet()
    resource, generator = device_of(net.space).resource(net.space), ArchitectureGenerator(net.space)
    low, high = resource.range(net.space)
    budgets = [low, (low + high) / 2, high]
    chosen = latency.chosen_by_macs(generator, resource, net.space, budgets)
    macs = [net.macs(arch) for arch in chosen]
    assert chosen[0] == net.space.smallest and macs == sorted(macs)
    assert all(resource.count(net.space, arch) <= budget for arch, budget in zip(chosen, budgets))
    assert chosen[-1] == generator.propose(generator.budget_max)


def test_an_ablation_goes_on_with_further_seeds(tmp_path, monkeypatch, capsys):
    """Seeds of an earlier series come from its CSV, those of other lengths do not count."""
    row = dict(task='letters', experiment='shift', epochs=32, group=1, budget=2., macs=2)
    runs.write_csv(tmp_path / 'ablation_shift_letters.csv', [
        dict(row, variant='even', seed=0, top1=50), dict(row, variant='hypergradient', seed=0, top1=53),
        dict(row, variant='even', seed=1, top1=10, epochs=8)])
    flags = ablations.EXPERIMENTS['shift']['even']
    run = runs.Run(ablations.folder_name(flags), 'letters', tuple(flags), 1, 32)
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    command = ['train.py', *run.command(), '--output', str(folder.parent), '--experiment', folder.name]
    (folder / 'done.json').write_text(json.dumps(dict(command=command)))
    runs.write_csv(folder / 'budgets.csv', [
        dict(name=f'group {k}', budget=k, macs=k, top1=60) for k in range(1, 9)])
    monkeypatch.setattr('sys.argv', ['ablations.py', 'shift', '--task', 'letters', '--seeds', '2', '--first-seed', '1',
                                     '--variants', 'even', '--output', str(tmp_path), '--results', str(tmp_path)])
    ablations.main()
    even, shift = capsys.readouterr().out.splitlines()[4:6]
    assert even.startswith('| even | 2 | 55.00') and '| +3.00 ± nan |' in shift
    kept = runs.read_csv(tmp_path / 'ablation_shift_letters.csv')
    assert [int(row['seed']) for row in kept] == [0] + 8 * [1] + [0]


def test_a_price_is_the_least_time_of_a_method_and_a_length():
    rows = [price.row_of('uniform', 8, seed, seconds, [50. + seed, 70., 90.]) for seed, seconds in ((0, 30.), (1, 20.))]
    rows.append(price.row_of(price.ALONE, 16, 0, 80., [60., 80., 100.]))
    short, long = price.summary(price.priced(rows, unit=10.))
    assert (short['method'], short['epochs'], short['price'], short['seeds']) == ('uniform', 8, 2., 2)
    assert (short['smallest'], short['largest'], short['top1']) == pytest.approx((50.5, 90., 70 + 1 / 6))
    assert short['deviation'] == pytest.approx(1 / 3 / math.sqrt(2))
    assert (long['method'], long['price'], long['top1'], long['deviation']) == (price.ALONE, 8., 80., 0.)


def test_what_measured_latencies_say():
    def row(used, used_by_macs, difference):
        rows = {f'{name}{end}': value for end in latency.CHOICES
                for name, value in dict(predicted=1e-3, macs=100, spread=.01, measured=used * 1e-3).items()}
        return dict(
            rows, budget=1e-3, used=used, used_served=used - .02, used_by_macs=used_by_macs, top1=80 + difference,
            top1_served=79., top1_by_macs=80., macs_by_macs=100 if difference == 0 else 90)

    rows = [row(1.009, .99, 1), row(1.03, .97, 2), row(.98, .98, 0)]
    chosen, served, by_macs, same, better, drift = latency.summary(rows, .004)
    assert f'of 3 budgets 1 missed by 3.0% at most, mean use {3.019 / 3:.3f}; ' in chosen
    assert f': 1 missed by {1.03 / 1.004 - 1:.1%} at most, mean use {3.019 / 3 / 1.004:.3f}.' in chosen
    assert '3 budgets 0 missed, ' in served and 'at most' not in served and '0.980' in by_macs and '1 of 3' in same
    # of 1, 2 and 0: the mean is 1, and the interval 4.303 / sqrt(3), of the t table with 2 degrees of freedom
    assert '+1.00 ± 2.48' in better and '1.0%' in drift and '+0.4%' in drift
    cells = latency.markdown(rows, 0.).splitlines()[3].split(' | ')
    assert cells == ['| 1.000', '1.030', '0.010', '1.030', '1.010', '0.970', '82.00', '79.00', '80.00 |']


def test_an_adaptation_is_compared_with_networks_trained_alone(tmp_path):
    """From the files of finished trainings; seed 1 of one method is not finished."""
    args = argparse.Namespace(network='vit', epochs=12, lr=.01, seeds=2, output=tmp_path, results=tmp_path / 'results')

    def finish(folder, **files):
        folder.mkdir(parents=True)
        for name, tops in files.items():
            groups = [dict(name=f'group {k + 1}', top1=top) for k, top in enumerate(tops)]
            runs.write_csv(folder / f'{name}.csv', [dict(name='smallest', top1=0), *groups])
        (folder / 'done.json').write_text('{}')

    for seed in range(2):
        finish(compare_elastic.adaptation(args, 'even', seed).folder, budgets=[50 + seed] * 8, before=[9] * 8)
        folder = compare_elastic.pruned_alone(args, seed, 12)[1]
        finish(folder)
        (folder / 'subnets.json').write_text(json.dumps([dict(group=k, top1=52. + 3 * seed) for k in (1, 3, 8)]))
    finish(compare_elastic.adaptation(args, 'hypergradient', 0).folder, budgets=range(60, 68), before=[8] * 8)
    compare_elastic.write_tables(args)
    lines = (tmp_path / 'results' / 'elastic_vit_12_0.01.md').read_text().splitlines()
    assert any(line.startswith('| hypergradient | 1 | 60.00 | +10.00 ± nan | 67.00 | +17.00') for line in lines)
    assert '| hypergradient | 1 | 8.0 |' in ''.join(lines)
    # alone 52 and 55, even 50 and 51: differences of -2 and -4, whose interval is 12.706 standard errors of 1
    assert '| group 1 | 53.5 | -3.00 ± 12.71 | +8.00 ± nan |' in lines
    assert '| group 8 | 53.5 | -3.00 ± 12.71 | +15.00 ± nan |' in lines


def test_commands_run_once_and_failures_stop_the_benchmark(tmp_path):
    code = "import pathlib, sys; open('{}', 'a').write('x'); print('words'); sys.exit({})"
    jobs = [(f'job {i}', tmp_path / str(i), [sys.executable, '-c', code.format(tmp_path / f'{i}.txt', 0)])
            for i in range(3)]
    for _ in range(2):
        runs.execute(jobs, 2)
    assert [(tmp_path / f'{i}.txt').read_text() for i in range(3)] == ['x'] * 3
    assert (tmp_path / '1' / 'log.txt').read_text() == 'words\n'
    with pytest.raises(SystemExit, match=f"{tmp_path / '1'} "):
        runs.execute([('job', tmp_path / '1', [sys.executable, '-c', ''])], 1)
    with pytest.raises(SystemExit, match='bad: exit code 3\nwords'):
        runs.execute([('bad', tmp_path / 'bad', [sys.executable, '-c', code.format(tmp_path / 'bad.txt', 3)])], 1)
    assert not (tmp_path / 'bad' / 'done.json').exists()
    with pytest.raises(SystemExit, match=f"{tmp_path / 'bad'} "):  # unfinished ones too
        runs.execute([('bad', tmp_path / 'bad', [sys.executable, '-c', ''])], 1)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize('script, flags, message', [
    ('compare_samplers', ['--samplers', 'generator'], '--match images'),
    ('compare_samplers', ['--samplers', 'uniform', 'variation'], '--reference generator'),
    ('ablations', ['lambda', '--seeds', '0'], "--seeds: '0'"),
    ('ranking', ['--archs', '-3'], "--archs: '-3'"),
    ('compare_search', ['--evaluations', '0'], "--evaluations: '0'"),
    ('speed', ['generator', '--device', 'cuda'], 'not on cuda'),
    ('train_subnet', ['--supernet', 'x', '--results-file', 'y', '--mixup', '0.8'], 'without --mixup'),
])
def test_wrong_flags_are_errors_before_training(script, flags, message, tmp_path):
    flags = flags if script == 'speed' else [*flags, '--output', tmp_path / 'runs']
    code, _, err = call(run_file, BENCHMARKS / f'{script}.py', *flags, folder=tmp_path)
    assert code == 2 and message in err and not (tmp_path / 'runs').exists()


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_comparison_from_the_command_line(tmp_path):
    flags = ['--task', 'digits', '--epochs', '1', '--seeds', '1', '--samplers', 'uniform', 'grad_norm', '--match',
             'images', '--output', tmp_path / 'runs', '--results', tmp_path / 'results', '--reference', 'uniform',
             '--train-flags=--generator-fit-steps 20 --search-samples 2 --img-size 16 --held-out 0.1']
    code, out, err = call(run_file, BENCHMARKS / 'compare_samplers.py', *flags, folder=tmp_path)
    assert code == 0, err
    assert '2 runs, 0 of them done' in err and '| grad_norm | 1 |' in out
    names = {path.name for path in (tmp_path / 'results').iterdir()}
    assert names == {'samplers_digits.csv', 'samplers_digits.md', 'samplers_digits.png', 'shift_digits.png'}
    rows = read_csv(tmp_path / 'results' / 'samplers_digits.csv')
    assert {row['method'] for row in rows} == {'uniform', 'uniform, searched', 'grad_norm'} and len(rows) == 24
    folder = tmp_path / 'runs' / 'digits' / 'uniform-1epochs' / 'seed0'
    budgets = [row for row in read_csv(folder / 'budgets.csv') if row['name'].startswith('group')]
    searched = [row for row in rows if row['method'] == 'uniform, searched']
    assert [float(row['top1']) for row in searched] == pytest.approx([float(row['top1']) for row in budgets], abs=1e-3)
    proposed = json.loads((folder / 'generator_archs_8.json').read_text())
    plain = [row for row in rows if row['method'] == 'uniform']
    assert [int(row['macs']) for row in plain] == [row['macs'] for row in proposed]


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_subnets_trained_separately(tmp_path):
    """Inherited accuracy is that of the supernet at the arch, and training increases it."""
    net = tiny_supernet(img_size=16)
    tsn.save_pretrained(tmp_path / 'model', net, tsn.ArchitectureGenerator(net.space).fit(5, progress=False))
    archs = [net.space.sample(torch.Generator().manual_seed(1))]
    (tmp_path / 'archs.json').write_text(json.dumps([arch.to_dict() for arch in archs]))
    flags = ['--supernet', tmp_path / 'model', '--archs', tmp_path / 'archs.json', '--results-file',
             tmp_path / 'out' / 'subnets.json', '--dataset', 'sklearn/digits', '--model', 'test_shiftformer_supernet',
             '--img-size', '16', '--workers', '0', '--epochs', '3', '--batch-size', '64', '--opt', 'muon',
             '--lr', '1e-2', '--warmup-epochs', '0', '--no-aug']
    code, _, err = call(run_file, BENCHMARKS / 'train_subnet.py', *flags, folder=tmp_path)
    assert code == 0, err
    results = json.loads((tmp_path / 'out' / 'subnets.json').read_text())
    images, targets = StepBatches(
        create_dataset('sklearn/digits', None, 'validation'), 360, 0,
        **timm.data.resolve_data_config(dict(img_size=16), model=net)).batch(0)
    for arch, result in zip(archs, results, strict=True):
        with torch.no_grad():
            top1 = 100 * float((net(images, arch).argmax(1) == targets).float().mean())
        assert result['inherited'] == pytest.approx(top1, abs=1e-3) and result['macs'] == net.macs(arch)
        assert net.space.from_dict(result['arch']) == arch and result['top1'] > top1 + 10


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.slow
def test_an_arch_of_a_trained_network_from_new_weights(tmp_path):
    """Nothing of the base, which is not a number anywhere, is left in a subnet that is trained from scratch.

    The subnet has the 10 classes of the data, not the 12 of the base.
    """
    base = timm.create_model('test_efficientnet', num_classes=12)
    save_file({name: torch.full_like(weight, math.nan) if weight.is_floating_point() else weight
               for name, weight in base.state_dict().items()}, tmp_path / 'base.safetensors')
    net = tsn.elastic('test_efficientnet', num_classes=10, img_size=32)
    space = net.space
    (tmp_path / 'archs.json').write_text(json.dumps([space.smallest.to_dict()]))
    flags = ['--elastic', 'test_efficientnet', '--pretrained-path', tmp_path / 'base.safetensors', '--elastic-sort',
             'none', '--from-scratch', '--archs', tmp_path / 'archs.json', '--results-file', tmp_path / 'subnets.json',
             '--dataset', 'sklearn/digits', '--img-size', '32', '--workers', '0', '--epochs', '2', '--batch-size', '32',
             '--opt', 'muon', '--lr', '1e-2', '--warmup-epochs', '0', '--no-aug', '--generator-fit-steps', '1']
    code, _, err = call(run_file, BENCHMARKS / 'train_subnet.py', *flags, folder=tmp_path)
    assert code == 0, err
    result, = json.loads((tmp_path / 'subnets.json').read_text())
    assert space.from_dict(result['arch']) == space.smallest and result['macs'] == net.macs(space.smallest)
    assert result['inherited'] < 15 < 30 < result['top1']


@pytest.mark.process
@pytest.mark.slow
def test_speed_prints_a_ratio_for_each_arch(tmp_path):
    flags = ['supernet', '--model', 'test_shiftformer_supernet', '--rounds', '1', '--batch-size', '4']
    _, out, err = call(run_file, BENCHMARKS / 'speed.py', *flags, folder=tmp_path)
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ['smallest', 'sampled', 'largest'], err
    for line in lines:
        words = line.split()
        value = {name: float(words[words.index(name) + 1]) for name in ('supernet', 'extracted', 'ratio')}
        assert value['ratio'] == pytest.approx(value['supernet'] / value['extracted'], rel=0.02)  # one round
