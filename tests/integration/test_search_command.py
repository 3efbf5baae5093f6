"""`timm-shiftnas search` on digits: what it prints, writes and stores, and what an interruption leaves."""
import csv
import hashlib
import json
import os
import warnings

import pytest
import timm
import torch
from support.networks import tiny_supernet

import timm_shiftnas as tsn
from timm_shiftnas.cli.search import search_images
from timm_shiftnas.data import StepBatches, create_dataset, split_held_out
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.save import save_searched
from timm_shiftnas.layers.conv import resize
from timm_shiftnas.models import static_counts
from timm_shiftnas.models.calibration import bn_statistics
from timm_shiftnas_cli import build_parser, main

DIGITS = ['--dataset', 'sklearn/digits', '--bn-images', 64, '--held-out', .05]


def run(capsys, *argv):
    """Run a command; return exit code, stdout and stderr."""
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def save(folder, name='test_shiftformer_supernet', generator=True, **kwargs):
    net = tiny_supernet(name)
    own = tsn.ArchitectureGenerator(net.space).fit(20, progress=False) if generator else None
    tsn.save_pretrained(folder, net, own, **kwargs)
    return net


def content(folder):
    """The files of a model directory, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def front(folder):
    with open(folder / 'front.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_search_stores_the_front_which_from_pretrained_serves(tmp_path, capsys):
    held_out = dict(training=dict(held_out=dict(share=.04, seed=3)))
    net, model = save(tmp_path / 'model', **held_out), tmp_path / 'model'
    weights = {name: data for name, data in content(model).items() if name != 'config.json'}
    flags = '--dataset', 'sklearn/digits', '--evaluations', 8, '--population', 4, '--flops', '4M'
    code, out, err = run(capsys, 'search', model, *flags)
    assert code == 0 and "57 images, held out of 'train' (4.0%, seed 3)" in out and 'was trained on' not in err
    rows = front(model / 'search')
    assert len((model / 'search' / 'evaluations.jsonl').read_text().splitlines()) == 1 + 8
    assert (model / 'search' / 'front.png').read_bytes()[1:4] == b'PNG'
    after = content(model)
    assert {name: data for name, data in after.items() if name != 'config.json'} == weights
    ours = json.loads(after['config.json'])['timm_shiftnas']
    assert ours['searched'] == [json.loads(row['arch']) for row in rows] and ours['searched_limits'] == dict(flops=4e6)
    for name, entry in ours['files'].items():
        assert entry == dict(size=len(after[name]), sha256=hashlib.sha256(after[name]).hexdigest())
    for row in rows:
        sub = tsn.from_pretrained(model, flops=row['macs'])
        assert sub.arch.to_dict() == json.loads(row['arch']) and static_counts(sub)[0] == int(row['macs'])
    # the last one within a budget, and the generator's beyond the limit of the search
    assert tsn.from_pretrained(model, flops='4M').arch.to_dict() == json.loads(rows[-1]['arch'])
    generator = tsn.load_supernet(model)[1]
    assert tsn.from_pretrained(model, flops='6M').arch == generator.propose('6M')
    assert tsn.from_pretrained(model, params='100k').arch == generator.propose_for_params('100k')
    assert f'searched {len(rows)} archs of ' in run(capsys, 'info', model)[1]
    # the same again: nothing is measured, everything is as before
    code, again, _ = run(capsys, 'search', model, *flags)
    assert code == 0 and again == out and content(model) == after
    assert all(net.macs(net.space.from_dict(json.loads(row['arch']))) <= 4e6 for row in rows)


def test_a_searched_front_serves_budgets_within_all_of_its_limits(tmp_path):
    net = save(tmp_path)
    generator, smallest = tsn.load_supernet(tmp_path)[1], net.space.smallest
    proposed = generator.propose('4M')
    assert proposed != smallest
    for limits, budgets, arch in (
            ({}, dict(flops='4M'), smallest), (dict(flops=4e6), dict(flops='4M'), smallest),
            (dict(flops=4e6), dict(flops='4M', size='100MB'), smallest), (dict(flops=3e6), dict(flops='4M'), proposed),
            (dict(flops=4e6, params=1e5), dict(flops='4M'), proposed),  # archs of more parameters were not looked at
            (dict(flops=4e6, params=1e5), dict(flops='4M', params='100k'), smallest)):
        save_searched(SavedModel(tmp_path), [smallest], {}, limits)
        assert tsn.from_pretrained(tmp_path, **budgets).arch == arch, limits


@pytest.mark.parametrize('held_out, share, warned', [
    (dict(share=57 / 1437, seed=3), None, False), (dict(share=57 / 1437, seed=3), .04, False),
    (dict(share=57 / 1437, seed=3, images=1437), .05, True), (dict(share=57 / 1437, seed=3, images=1436), None, True)])
def test_images_that_were_trained_on_are_told(tmp_path, held_out, share, warned, capsys):
    """Those of another share, or held out of other images."""
    save(tmp_path / 'model', generator=False, training=dict(held_out=held_out))
    flags = ['search', str(tmp_path / 'model'), '--dataset', 'sklearn/digits']
    args = build_parser().parse_args(flags if share is None else [*flags, '--held-out', str(share)])
    search_images(SavedModel(tmp_path / 'model'), 10, args)
    assert ('was trained on' in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_search_of_a_cnn_saves_the_statistics_of_the_front(tmp_path, capsys):
    """What is loaded has, on the images of the search, the accuracy that the table says."""
    model = tmp_path / 'model'
    save(model, 'test_shiftmobilenet_supernet', generator=False)
    flags = *DIGITS, '--evaluations', 4, '--strategy', 'random', '--output', tmp_path / 'out'
    code, _, err = run(capsys, 'search', model, *flags)
    assert code == 0 and 'was trained on' in err
    held_out = split_held_out(create_dataset('sklearn/digits', None, 'train'), .05)[1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # for a subnet without statistics
        for row in front(tmp_path / 'out'):
            sub = tsn.from_pretrained(model, flops=row['macs'])
            config = timm.data.resolve_data_config({}, model=tsn.load_supernet(model)[0])
            images, targets = StepBatches(held_out, len(held_out), 0, **config).batch(0)
            with torch.no_grad():
                right = sub(resize(images, sub.arch.resolution)).argmax(1) == targets
            assert sub.arch.to_dict() == json.loads(row['arch'])
            assert 100 * float(right.float().mean()) == pytest.approx(float(row['top1']))
    with pytest.raises(ValueError, match='flops=1000'):
        tsn.from_pretrained(model, flops=1000)


@pytest.mark.slow
def test_an_interrupted_write_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    """A second search of a CNN replaces two files; the disk fails at either of them."""
    net = save(tmp_path / 'model', 'test_shiftmobilenet_supernet')
    found = [net.space.smallest, net.space.largest]
    stats = {arch: {name: torch.ones_like(value) for name, value in bn_statistics(tsn.extract(net, arch)).items()}
             for arch in found}
    saved = SavedModel(tmp_path / 'model')
    save_searched(saved, found[:1], {found[0]: stats[found[0]]})
    before, replace = content(tmp_path / 'model'), os.replace
    for name in ('config.json', 'bn_stats.safetensors'):
        failed = []

        def fail_once(source, target, name=name, failed=failed):
            if os.path.basename(target) == name and not failed:
                failed.append(name)
                raise OSError(5, 'Input/output error', name)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', fail_once)
            with pytest.raises(OSError, match=name):
                save_searched(saved, found, stats)
        assert failed and content(tmp_path / 'model') == before
    save_searched(saved, found[1:], {found[1]: stats[found[1]]})
    record = SavedModel(tmp_path / 'model').record  # the statistics of archs of the earlier search alone are gone
    assert record.searched == record.bn_archs == [net.space.largest.to_dict()]
    tsn.save_pretrained(tmp_path / 'model', tiny_supernet('test_shiftmobilenet_supernet', seed=1))
    with pytest.raises(ValueError, match='other weights'):
        save_searched(saved, found, stats)


@pytest.mark.slow
def test_wrong_requests_end_in_one_line(tmp_path, capsys):
    net = save(tmp_path / 'model', generator=False)
    before = content(tmp_path / 'model')
    tsn.save_pretrained(tmp_path / 'subnet', tsn.extract(net, net.space.smallest))
    for argv, words in (
            ([tmp_path / 'model'], '--data-dir'), ([tmp_path / 'subnet', *DIGITS], 'subnet'),
            ([tmp_path / 'model', *DIGITS, '--flops', '1k'], 'flops=1k'),
            ([tmp_path / 'model', *DIGITS, '--strategy', 'generator'], 'generator'),
            ([tmp_path / 'model', *DIGITS, '--held-out', '0.9'], '0.9')):
        code, _, err = run(capsys, 'search', *argv)
        assert code == 2 and words in err.splitlines()[-1]
    assert content(tmp_path / 'model') == before and not (tmp_path / 'model' / 'search').exists()
