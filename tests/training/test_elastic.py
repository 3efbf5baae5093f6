"""The road from a trained network of timm: `train.py --elastic`, `timm-shiftnas elastic`, other scripts."""
import csv
import shutil

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from support import stock_script
from support.processes import call, ranks
from support.small_runs import load, run_script, same
from timm.data import create_loader
from timm.models import save_for_hf

import timm_shiftnas as tsn
import timm_shiftnas_cli
from timm_shiftnas.data.datasets import create_dataset
from timm_shiftnas.method import BudgetGroups, ShiftNASConfig
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.models import static_counts
from timm_shiftnas.models.importance import taylor_scores
from timm_shiftnas.training import trainer as train
from timm_shiftnas.training.elastic import open_base

SIZE = dict(img_size=16, patch_size=4)
BASE = ['--elastic', 'test_vit', '--model-kwargs', 'patch_size=4', '--img-size', '16']
DATA = ['--dataset', 'sklearn/digits', '-j', '0', '-b', '64', '--held-out', '.5']
FAST = [*DATA, '--lr', '1e-3', '--warmup-epochs', '0', '--num-groups', '3', '--generator-fit-steps', '20',
        '--shift-interval', '4', '--shift-batch-size', '16', '--log-interval', '50']


def create_base(classes=10):
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=classes, **SIZE)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Files with the weights of a base, by its number of classes."""
    folder = tmp_path_factory.mktemp('bases')
    for classes in (10, 7):
        save_file(create_base(classes).state_dict(), folder / f'{classes}.safetensors')
    return {classes: str(folder / f'{classes}.safetensors') for classes in (10, 7)}


@pytest.fixture(scope='module')
def adapted(weights, tmp_path_factory):
    """The flags and the folder of a run of two epochs, from a base that knows the classes, which is the teacher."""
    folder = tmp_path_factory.mktemp('adapted')
    flags = [*BASE, *FAST, '--pretrained-path', weights[10], '--kd-model', 'base', '--epochs', '2', '--output',
             str(folder)]
    assert train.main([*flags, '--experiment', 'run', '--checkpoint-hist', '2', '--val-interval', '2']) == 0
    return flags, folder / 'run'


def rows(path):
    with open(path) as file:
        return {row['name']: row for row in csv.DictReader(file)}


def assert_same_function(a, b):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_before_training_the_largest_subnet_is_the_base(adapted):
    images = create_dataset('sklearn/digits', None, split='validation', is_training=False)
    cfg = timm.get_pretrained_cfg('test_vit')
    loader = create_loader(
        images, (3, 16, 16), 128, use_prefetcher=False, mean=cfg.mean, std=cfg.std, crop_pct=cfg.crop_pct,
        interpolation=cfg.interpolation)
    base = create_base().eval()
    with torch.no_grad():
        hits = torch.cat([base(x).argmax(1) == y for x, y in loader])
    before = rows(adapted[1] / 'before.csv')
    assert float(before['largest']['top1']) == pytest.approx(100 * hits.double().mean().item(), abs=1e-4)
    assert list(before) == ['smallest', 'group 1', 'group 2', 'group 3', 'largest']


@pytest.mark.slow
def test_settings_of_the_road(adapted):
    """The shift is on, and the head is that of the base; flags that are given win."""
    _, folder = adapted
    saved = yaml.safe_load((folder / 'args.yaml').read_text())
    args = [train.parse_args([*BASE, *DATA, *more]) for more in ([], ['--group-width', '1M'], ['--num-groups', '4'])]
    assert [each.num_groups for each in args] == [8, None, 4]
    assert (saved['shift'], saved['generator_interval'], saved['shift_interval']) == (None, 0, 4)
    state = load(folder / 'last.pth.tar')['task_state']
    history = state['history']
    assert state['shift']['signal'] == 'hypergradient'
    assert history[2][1] != history[0][1]  # there is no warm-up; the first shift only measures the noise


@pytest.mark.slow
def test_what_is_saved_needs_no_weights_of_the_base(adapted):
    _, folder = adapted
    saved = load(folder / 'last.pth.tar')
    net = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True)
    same(dict(net.state_dict()), saved['state_dict'])
    assert net.space.to_dict()['layer_order'] == saved['task_state']['network']['model_args']['space']['layer_order']
    subnet = tsn.from_pretrained(folder / 'model', flops=rows(folder / 'budgets.csv')['group 1']['budget'])
    assert_same_function(subnet, tsn.extract(net, subnet.arch))


@pytest.mark.slow
def test_a_resumed_run_is_the_undisturbed_one(adapted):
    flags, folder = adapted
    other = folder.parent / 'other'
    other.mkdir()
    shutil.copy(folder / 'checkpoint-0.pth.tar', other / 'last.pth.tar')
    assert train.main([*flags, '--experiment', 'other', '--val-interval', '2', '--resume', 'auto']) == 0
    whole, resumed = load(folder / 'last.pth.tar'), load(other / 'last.pth.tar')
    for name in ('state_dict', 'optimizer', 'task_state'):
        same(whole[name], resumed[name], name)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_resumed_cnn_does_not_need_the_weights_of_the_base(tmp_path):
    """Without a teacher: a run from weights that are gone, or cannot be downloaded again, goes on as if undisturbed."""
    file = tmp_path / 'base.safetensors'
    save_file(timm.create_model('test_efficientnet', num_classes=7).state_dict(), file)
    flags = ['--elastic', 'test_efficientnet', '--img-size', '32', *FAST, '--output', str(tmp_path), '--experiment',
             'run', '--val-interval', '2', '--epochs', '2', '-b', '180']
    assert train.main([*flags, '--pretrained-path', str(file)]) == 0
    whole = load(tmp_path / 'run' / 'last.pth.tar')
    shutil.move(tmp_path / 'run' / 'checkpoint-0.pth.tar', tmp_path / 'half.pth.tar')
    file.unlink()
    assert train.main([*flags, '--resume', str(tmp_path / 'half.pth.tar')]) == 0
    again = load(tmp_path / 'run' / 'last.pth.tar')
    for name in ('state_dict', 'optimizer'):
        same(whole[name], again[name], name)
    same(whole['task_state']['history'], again['task_state']['history'])
    arch = rows(tmp_path / 'run' / 'budgets.csv')['group 1']
    subnet = tsn.from_pretrained(tmp_path / 'run' / 'model', flops=arch['budget'])
    assert static_counts(subnet) == (int(arch['macs']), int(arch['params']))


@pytest.mark.slow
def test_a_head_of_other_classes_is_replaced(weights, tmp_path, caplog):
    flags = [*BASE, *FAST, '--pretrained-path', weights[7], '--epochs', '1', '--lr', '1e-30', '--weight-decay', '0']
    assert train.main([*flags, '--output', str(tmp_path), '--experiment', 'run']) == 0
    assert 'the base has 7 classes and the data 10' in caplog.text
    net, _ = tsn.load_supernet(tmp_path / 'run' / 'model')
    assert net.num_classes == 10 and not (tmp_path / 'run' / 'before.csv').exists()
    x, base = torch.randn(2, 3, 16, 16), create_base(7).eval()
    pooled = net.eval().forward_head(net.forward_features(x), pre_logits=True)
    expected = base.forward_head(base.forward_features(x), pre_logits=True)
    # the same features in another order
    torch.testing.assert_close(pooled.sort(-1).values, expected.sort(-1).values, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pooled, expected, atol=1e-3)


def test_a_network_that_timm_has_saved(tmp_path):
    """Its folder says which network it is; what is made of it can be created without the folder."""
    base = create_base(7)
    save_for_hf(base, tmp_path / 'base', model_args=SIZE, safe_serialization=True)
    device = torch.device('cpu')
    net = open_base(f'local-dir:{tmp_path / "base"}', dict(img_size=16, drop_path_rate=None), num_classes=10,
                    device=device).net
    assert_same_function(net, base)
    assert (net.model_args['base'], net.model_args['patch_size']) == ('test_vit', 4)

    cnn = timm.create_model('test_efficientnet', num_classes=7)
    save_for_hf(cnn, tmp_path / 'cnn', safe_serialization=True)
    save_file(cnn.state_dict(), tmp_path / 'cnn.safetensors')
    for file in (None, str(tmp_path / 'cnn.safetensors')):
        net = open_base(f'local-dir:{tmp_path / "cnn"}', dict(img_size=32), file=file, device=device).net
        assert net.space.largest.resolution == 32 and net.num_classes == 7
        assert_same_function(net, cnn)


def test_a_network_that_was_changed_is_refused():
    """It could not be created again from what is saved."""
    net = create_base()
    net.head = torch.nn.Linear(64, 3)
    with pytest.raises(ValueError, match=r'head.weight has the shape \[3, 64\], and \[10, 64\] as created'):
        tsn.elastic(net)
    net.reset_classifier(3)
    assert tsn.elastic(net).num_classes == 3
    net.blocks = net.blocks[:3]
    with pytest.raises(ValueError, match='blocks.3.* has the shape None'):
        tsn.elastic(net)
    with pytest.raises(ValueError, match='num_classes: only the name of a base takes these'):
        tsn.elastic(create_base(), num_classes=3)
    with pytest.raises(ValueError, match='not a network of timm itself'):
        tsn.elastic('elastic_supernet')


@pytest.mark.parametrize('name, args, size', [
    ('elastic_vit_subnet', dict(base='test_vit', **SIZE), 16),
    ('elastic_cnn_subnet', dict(base='test_efficientnet', img_size=32), 32)])
def test_a_network_that_was_trained_as_a_subnet_first(name, args, size, tmp_path):
    """What docs/elastic.md recommends. It is its own base, as an object and as a folder."""
    base = timm.create_model(name, num_classes=7, **args).eval()
    tsn.save_pretrained(tmp_path / 'base', base)
    for net in (tsn.elastic(base), tsn.elastic(f'local-dir:{tmp_path / "base"}', pretrained=True)):
        assert net.model_args['base'] == args['base'] and not hasattr(net, 'arch')
        tsn.save_pretrained(tmp_path / 'supernet', net)
        again = timm.create_model(f'local-dir:{tmp_path / "supernet"}', pretrained=True).eval()
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            for other in (again, tsn.extract(net, net.space.largest).eval()):
                torch.testing.assert_close(other(x), base(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f'smaller subnet of {args["base"]}'):
        tsn.elastic(tsn.extract(net, net.space.smallest))


@pytest.mark.parametrize('name, pool', [('test_vit', 'avg'), ('test_efficientnet', 'max')])
def test_another_pooling_is_that_of_the_subnets(name, pool):
    base = timm.create_model(name)
    base.reset_classifier(5, pool)
    net, x = tsn.elastic(base).eval(), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(tsn.extract(net, net.space.largest).eval()(x), base.eval()(x), atol=1e-5, rtol=1e-5)


def test_another_size_of_patches_is_that_of_the_subnets():
    net = tsn.elastic('test_vit', **SIZE)
    net.set_input_size(32, patch_size=8)
    assert tsn.extract(net, net.space.smallest).patch_embed.patch_size == (8, 8)


def test_the_size_of_the_images_is_part_of_what_is_saved(tmp_path):
    net = tsn.elastic('test_vit', in_chans=1, **SIZE)
    tsn.save_pretrained(tmp_path, net, tsn.ArchitectureGenerator(net.space))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert net.pretrained_cfg['input_size'] == again.pretrained_cfg['input_size'] == (1, 16, 16)
    subnet = timm.create_model('elastic_vit_subnet', base='test_vit', in_chans=1, **SIZE)
    assert subnet.pretrained_cfg['input_size'] == (1, 16, 16)


def test_a_cnn_that_is_trained_first_has_the_size_of_the_images(tmp_path):
    """What is trained with `--model elastic_cnn_subnet --img-size 32` counts its MACs at that size."""
    net = timm.create_model('elastic_cnn_subnet', base='test_efficientnet', img_size=32, num_classes=3)
    supernet = tsn.elastic('test_efficientnet', img_size=32, num_classes=3)
    assert (net.arch, static_counts(net)[0]) == (supernet.space.largest, supernet.macs(supernet.space.largest))
    tsn.save_pretrained(tmp_path / 'net', net)
    again = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
    assert again.arch == net.arch and again.pretrained_cfg['input_size'] == (3, 32, 32)


def test_without_labels_units_are_sorted_by_what_the_network_predicts():
    net, x = tsn.elastic(create_base()), torch.randn(8, 3, 16, 16)
    with torch.inference_mode():
        labelled, unlabelled = (taylor_scores(net, [batch]) for batch in ((x, net.eval()(x).argmax(1)), x.clone()))
    for mask, other in zip(labelled, unlabelled, strict=True):
        assert torch.equal(mask, other) and mask.max() > 0
    with pytest.raises(ValueError, match='from 1 to 5000, and the network has 10 classes; give a loader of images'):
        tsn.sort_by_importance(net, [(x[:2], torch.tensor([5000, 1]))])


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.process
def test_two_processes_agree_about_the_order_of_the_layers(weights, tmp_path):
    flags = [*BASE, *FAST, '-b', '64', '--pretrained-path', weights[10], '--epochs', '1', '--output', str(tmp_path),
             '--experiment', 'run']
    reports = [job.wait() for job in ranks(2, run_script, flags, folder=tmp_path)]
    assert [code for code, _ in reports] == [0, 0], reports
    net, _ = tsn.load_supernet(tmp_path / 'run' / 'model')
    assert sorted(net.space.to_dict()['layer_order']) == list(range(6))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_curriculum_reaches_smaller_budgets_over_its_epochs():
    """Budgets follow P, restricted to what is reachable; the first archs are the largest."""
    net = tsn.elastic(create_base())
    groups = BudgetGroups.of_space(net.space, count=4)
    probabilities = torch.tensor([.1, .2, .3, .4])
    low, high = groups.edges[2] + .5 * (groups.edges[3] - groups.edges[2]), groups.edges[-1]
    budgets = groups.draw(probabilities, 20_000, torch.Generator().manual_seed(0), lowest=low)
    assert budgets.min() >= low and budgets.max() <= high
    assert (budgets > groups.edges[3]).double().mean() == pytest.approx(4 / 7, abs=.02)
    assert (budgets[budgets < groups.edges[3]].mean() - low) / (groups.edges[3] - low) == pytest.approx(.5, abs=.02)

    task = ShiftNASTask(
        net, config=ShiftNASConfig(curriculum_updates=20), groups=groups, verbose=False,
        generator=tsn.ArchitectureGenerator(net.space).fit(steps=300, progress=False))
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    macs = []
    for _ in range(40):
        macs.append(net.macs(task(x, y)['archs'][0]))
    drawn = [max(macs[start:start + 10]) for start in (0, 20)], [min(macs[start:start + 10]) for start in (0, 20)]
    assert drawn[1][0] > .8 * net.macs(net.space.largest) > drawn[1][1]


@pytest.mark.process
def test_an_unmodified_script_trains_it(tmp_path):
    flags = ['--device-modules', 'timm_shiftnas.patch', '--model', 'elastic_supernet', '--model-kwargs',
             'base=test_vit', 'patch_size=8', '--output', str(tmp_path)]
    environment = dict(SHIFTNAS_NUM_GROUPS='4', SHIFTNAS_GENERATOR_FIT_STEPS='10')
    code, out, err = call(stock_script.main, flags, folder=tmp_path, environment=environment)
    assert code == 0 and 'StockTask rank' in out + err, err


@pytest.mark.slow
def test_the_command_saves_an_untrained_one(weights, tmp_path, capsys):
    argv = ['elastic', 'test_vit', '--img-size', '16', '--model-kwargs', 'patch_size=4', '--pretrained-path',
            weights[10], '--output', str(tmp_path / 'net'), '--dataset', 'sklearn/digits', '--bn-images', '128',
            '--generator-fit-steps', '20']
    assert timm_shiftnas_cli.main(argv) == 0
    assert 'subnets of' in capsys.readouterr().out
    net, _ = tsn.load_supernet(tmp_path / 'net')
    assert net.space.to_dict()['layer_order'] != list(range(6))
    assert_same_function(net, create_base())


def test_the_command_leaves_units_in_their_order_without_images(weights, tmp_path, capsys):
    argv = ['elastic', 'test_vit', '--img-size', '16', '--model-kwargs', 'patch_size=4', '--pretrained-path',
            weights[10], '--output', str(tmp_path / 'net'), '--generator-fit-steps', '2']
    assert timm_shiftnas_cli.main(argv) == 0
    assert 'keep their order' in capsys.readouterr().err
    net, base = tsn.load_supernet(tmp_path / 'net')[0].state_dict(), create_base().state_dict()
    assert all(torch.equal(net[name], base[name]) for name in base)


@pytest.mark.parametrize('argv, words', [
    (['train', '--elastic', 'vit_smal_patch16_224', *DATA], ['vit_smal_patch16_224', 'did you mean']),
    (['train', '--elastic', 'resnet18', '--img-size', '64', *DATA], ['resnet18', 'not elastic']),
    (['train', *BASE, *DATA, '--pretrained-cfg-overlay', 'crop_pct=.9'], ['--pretrained-cfg-overlay', '--crop-pct']),
    (['train', '--elastic', 'test_vit', *DATA], ['test_vit', '--pretrained-path']),
    (['train', *BASE, *DATA, '--pretrained-path', 'FILE7', '--kd-model', 'base'], ['7 classes', '--kd-model base']),
    (['train', *BASE, *DATA, '--pretrained-path', __file__], ['holds no weights']),
    (['train', '--elastic', 'test_vit2', *BASE[2:], *DATA, '--epochs', '1', '--pretrained-path', 'FILE10'],
     ['test_vit2', 'Missing key']),
    (['train', '--elastic', 'test_vit', '--model', 'shiftformer_supernet', *DATA], ['leave one of them out']),
    (['train', '--kd-model', 'base', *DATA], ['--kd-model base', '--elastic NAME']),
    (['train', *BASE, '--sampler', 'uniform', '--elastic-warmup', '2', *DATA], ['--elastic-warmup 2']),
    (['train', *BASE, *DATA, '--pretrained-path', 'FILE10', '--model-kwargs', 'patch_size=4', 'num_classes=4'],
     ['num_classes=4', '--num-classes']),
    (['elastic', 'resnet18', '--output', 'OUT'], ['resnet18', 'not elastic']),
    (['elastic', 'test_vit', '--output', 'OUT'], ['test_vit', '--pretrained-path']),
    (['elastic', 'test_vit', '--output', 'OUT', '--model-kwargs', 'patch_size'], ['NAME=VALUE']),
])
def test_mistakes_get_one_line_and_leave_nothing(argv, words, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    known = dict(FILE7=weights[7], FILE10=weights[10], OUT=str(tmp_path / 'out'))
    argv = [known.get(word, word) for word in argv]
    if argv[0] == 'train':
        argv += ['--output', str(tmp_path / 'out')]
    try:
        code = timm_shiftnas_cli.main(argv)
    except SystemExit as end:  # of the parser
        code = end.code
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'error' in line and all(word in line for word in words), line
    assert not (tmp_path / 'out').exists()
