"""Saving and loading with real files and processes; every fault of a directory ends in one clear error."""
import copy
import hashlib
import json
import math
import os
import re
import shutil
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from support.processes import Job, call, run_code
from timm.data import resolve_data_config
from timm.utils import ModelEmaV3

from timm_shiftnas import Arch, Subnet, extract, shiftformer_space
from timm_shiftnas.hub.load import SavedModel, from_pretrained, load_supernet
from timm_shiftnas.hub.push import published_files, push_directory
from timm_shiftnas.hub.save import save_pretrained
from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.method.config import ShiftNASConfig
from timm_shiftnas.method.groups import BudgetGroups
from timm_shiftnas.method.proposals import BudgetWarning
from timm_shiftnas.method.task import ShiftNASTask
from timm_shiftnas.models import static_counts
from timm_shiftnas.training.checkpoints import load_checkpoint

CONFIG, WEIGHTS, GENERATOR = 'config.json', 'model.safetensors', 'generator.safetensors'
ARCH = dict(depth=4, embed_dim=32, num_heads=[1, 1, 2, 1], mlp_ratio=[1.0, 1.0, 2.0, 1.0])


def row(name, budget, macs):
    return dict(name=name, budget=budget, macs=macs, params=5000, top1=91.5, top5=99.25, arch=ARCH)


def make_net(seed=0, **kwargs):
    """A supernet in which no weight is zero."""
    torch.manual_seed(seed)
    net = timm.create_model('test_shiftformer_supernet', **{'num_classes': 10, **kwargs}).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * .05)
    return net


@pytest.fixture(scope='module')
def net():
    return make_net()


@pytest.fixture(scope='module')
def generator(net):
    return ArchitectureGenerator(net.space).fit(steps=20, progress=False)


@pytest.fixture(scope='module')
def edges(net):
    low, high = net.macs(net.space.smallest), net.macs(net.space.largest)
    return [low + (high - low) * k / 4 for k in range(5)]


@pytest.fixture(scope='module')
def saved(tmp_path_factory, net, generator, edges):
    """A supernet with everything; not to be changed."""
    folder = tmp_path_factory.mktemp('saved') / 'supernet'
    save_pretrained(
        folder, net, generator, groups=edges, probabilities=torch.tensor([.1, .2, .3, .4]),
        results=[row('smallest', None, 1000), row('group 1', 2e6, 1_990_000)],
        data_config=dict(mean=(.1, .2, .3), std=(.4, .5, .6), crop_pct=.95),
        model_config=dict(label_names=[f'class {i}' for i in range(10)]))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(saved, tmp_path / 'model')


@pytest.fixture(scope='module')
def saved_subnet(tmp_path_factory, net, mixed):
    folder = tmp_path_factory.mktemp('saved') / 'subnet'
    save_pretrained(folder, extract(net, mixed))
    return folder


@pytest.fixture(scope='module')
def mixed(net):
    """An arch whose layers differ."""
    return net.space.arch(
        depth=5, embed_dim=48, num_heads=(1, 2, 3, 2, 1), mlp_ratio=(1.0, 2.0, 3.0, 1.0, 2.0))


def images(net, count=2):
    return torch.randn(count, net.in_chans, *net.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def logits(net, *args):
    with torch.no_grad():
        return net(images(net), *args)


def archs(space, count=3):
    noise = torch.Generator().manual_seed(2)
    return [space.smallest, space.largest, *(space.sample(noise) for _ in range(count))]


def edit(folder, change):
    """Change `config.json`: `change(config, ours)`."""
    config = json.loads((folder / CONFIG).read_text())
    change(config, config['timm_shiftnas'])
    (folder / CONFIG).write_text(json.dumps(config))


def accept(folder, name):
    """Let `config.json` list a file as it is now."""
    data = (folder / name).read_bytes()
    entry = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    edit(folder, lambda config, ours: ours['files'].update({name: entry}))


# -- a supernet --------------------------------------------------------------------------------------------------------


def test_the_tilde_is_the_home_directory(net, generator, edges, tmp_path, monkeypatch):
    """Python does not expand it; the folder of the test stays empty."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    save_pretrained('~/model', net, generator, groups=edges, probabilities=[.25] * 4)
    save_pretrained(Path('~') / 'subnet', from_pretrained('~/model', arch=net.space.smallest))
    assert load_supernet(Path('~/model'))[0].space == net.space
    assert from_pretrained('~/subnet').arch == net.space.smallest
    assert SavedModel('~/model', cache_dir='~/cache')._hub.cache_dir == str(tmp_path / 'home' / 'cache')
    with pytest.raises(ValueError, match=str(tmp_path / 'home' / 'nothing')):
        push_directory('~/nothing', 'owner/name')
    with pytest.raises(ValueError, match="no home directory '~nosuchuser'"):
        save_pretrained('~nosuchuser/model', net)
    assert not list((tmp_path / 'here').iterdir()) and {path.name for path in (tmp_path / 'home').iterdir()} == {
        'model', 'subnet'}


def test_supernet_directory(saved, edges):
    assert sorted(os.listdir(saved)) == [CONFIG, GENERATOR, WEIGHTS]
    config = json.loads((saved / CONFIG).read_text())
    ours = config['timm_shiftnas']
    assert config['architecture'] == 'test_shiftformer_supernet' and 'timm_shiftnas' not in config['pretrained_cfg']
    assert config['model_args']['space'] == {
        'family': 'shiftformer', 'embed_dim': [32, 48, 64], 'depth': [4, 5, 6], 'num_heads': [1, 2, 3],
        'mlp_ratio': [1.0, 2.0, 3.0]}
    assert ours['format'] == 1 and ours['kind'] == 'supernet' and ours['generator'] == {'hidden_size': 64}
    assert ours['groups'] == edges and ours['probabilities'] == pytest.approx([.1, .2, .3, .4])
    assert ours['results'] == [row('smallest', None, 1000), row('group 1', 2e6, 1_990_000)]
    assert set(ours['files']) == {WEIGHTS, GENERATOR}
    for name, entry in ours['files'].items():
        data = (saved / name).read_bytes()
        assert entry == {'size': len(data), 'sha256': hashlib.sha256(data).hexdigest()}


def test_timm_loads_the_supernet(saved, net):
    loaded = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    assert type(loaded) is type(net) and loaded.space == net.space
    for arch in archs(net.space):
        assert torch.equal(logits(loaded, arch), logits(net, arch))


def test_supernet_and_generator_come_back(saved, net, generator):
    loaded, again = load_supernet(saved)
    assert not loaded.training and not again.training and loaded.space == net.space == again.space
    assert all(weight.requires_grad for weight in loaded.parameters())
    for arch in archs(net.space):
        assert torch.equal(logits(loaded, arch), logits(net, arch))
    low, high = net.macs(net.space.smallest), net.macs(net.space.largest)
    for step in range(6):
        budget = low + (high - low) * step / 5
        assert again.propose(budget) == generator.propose(budget)
    save_pretrained(saved.parent / 'again', loaded, again)
    assert (saved.parent / 'again' / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_supernet_without_generator(tmp_path, net):
    save_pretrained(tmp_path, net)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert load_supernet(tmp_path)[1] is None
    assert from_pretrained(tmp_path, arch=net.space.smallest).arch == net.space.smallest
    with pytest.raises(ValueError, match='arch='):
        from_pretrained(tmp_path, flops='2M')


def test_preprocessing_and_labels_come_back(saved, mixed):
    loaded = timm.create_model(f'local-dir:{saved}')
    subnet = from_pretrained(saved, arch=mixed)
    for net in (loaded, subnet):
        data = resolve_data_config(model=net)
        assert (data['mean'], data['std'], data['crop_pct']) == ([.1, .2, .3], [.4, .5, .6], .95)
        assert data['input_size'] == (3, 32, 32)
        assert net.pretrained_cfg['label_names'][3] == 'class 3' and net.pretrained_cfg.get('tag') is None


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [
    dict(img_size=(48, 32), in_chans=1, num_classes=3, global_pool='token', norm_eps=1e-3),
    dict(relative_position=False, qkv_bias=False, fc_norm=True, class_token=False, no_embed_class=True, drop_rate=.5),
    dict(space=shiftformer_space(embed_dim=(32, 64), depth=(2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 2.0)),
         patch_size=16, max_relative_position=1, act_layer='relu', proj_bias=False),
    dict(num_classes=0),
])
def test_every_option_comes_back(tmp_path, kwargs):
    net = make_net(**kwargs)
    arch = archs(net.space)[-1]
    save_pretrained(tmp_path / 'net', net)
    save_pretrained(tmp_path / 'sub', extract(net, arch))
    assert 'drop_rate' not in (tmp_path / 'net' / CONFIG).read_text()
    for loaded in (timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True).eval(),
                   load_supernet(tmp_path / 'net')[0]):
        assert loaded.space == net.space
        assert torch.equal(logits(loaded, arch), logits(net, arch))
    for loaded in (timm.create_model(f'local-dir:{tmp_path}/sub', pretrained=True).eval(),
                   from_pretrained(tmp_path / 'sub'), from_pretrained(tmp_path / 'net', arch=arch)):
        torch.testing.assert_close(logits(loaded), logits(net, arch), rtol=0, atol=1e-5)


def test_changes_after_creation_are_saved(tmp_path):
    net = make_net()
    net.reset_classifier(3, 'token')
    net.set_input_size(48)
    save_pretrained(tmp_path, net)
    for loaded in (timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), load_supernet(tmp_path)[0]):
        assert loaded.space == net.space and loaded.num_classes == 3
        assert torch.equal(logits(loaded, net.space.smallest), logits(net, net.space.smallest))


def test_joint_bias_slicing_survives(tmp_path, mixed):
    net = make_net()
    by_role = logits(net, mixed)
    net.set_qkv_bias_slicing('joint')
    expected = logits(net, mixed)
    assert (expected - by_role).abs().max() > 1e-3
    save_pretrained(tmp_path / 'net', net)
    loaded = load_supernet(tmp_path / 'net')[0]
    by_timm = timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True).eval()
    save_pretrained(tmp_path / 'again', by_timm)
    save_pretrained(tmp_path / 'sub', extract(loaded, mixed))
    for found in (logits(loaded, mixed), logits(by_timm, mixed), logits(load_supernet(tmp_path / 'again')[0], mixed),
                  logits(from_pretrained(tmp_path / 'net', arch=mixed)), logits(from_pretrained(tmp_path / 'sub'))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# -- a subnet for a budget ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0., .4, 1.])
def test_subnet_for_flops(saved, net, generator, share):
    low, high = net.macs(net.space.smallest), net.macs(net.space.largest)
    budget = low + share * (high - low)
    subnet = from_pretrained(saved, flops=budget)
    assert not subnet.training and not hasattr(subnet, 'space')
    assert subnet.arch == generator.propose(budget) and net.macs(subnet.arch) <= budget
    torch.testing.assert_close(logits(subnet), logits(net, subnet.arch), rtol=0, atol=1e-5)


def test_budgets_are_read_in_units(saved, net):
    subnet = from_pretrained(saved, flops='1.5M')
    assert net.macs(subnet.arch) <= 1.5e6 and subnet.arch == from_pretrained(saved, flops=1_500_000).arch


@pytest.mark.slow
def test_subnet_for_params(saved, net, generator):
    subnet = from_pretrained(saved, params='100k')
    assert sum(weight.numel() for weight in subnet.parameters()) <= 100_000
    assert subnet.arch == generator.propose_for_params('100k')
    torch.testing.assert_close(logits(subnet), logits(net, subnet.arch), rtol=0, atol=1e-5)


def test_subnet_for_an_arch(saved, net, mixed):
    for arch in (mixed, mixed.to_dict(), json.loads(json.dumps(mixed.to_dict()))):
        subnet = from_pretrained(saved, arch=arch)
        assert subnet.arch == mixed
        torch.testing.assert_close(logits(subnet), logits(net, mixed), rtol=0, atol=1e-5)


def test_an_arch_needs_no_generator_file(folder, mixed):
    (folder / GENERATOR).unlink()
    assert from_pretrained(folder, arch=mixed).arch == mixed


def test_subnet_keeps_no_weights_of_the_supernet(saved, mixed):
    for weight in from_pretrained(saved, arch=mixed).parameters():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def test_dtype_and_device(saved, mixed):
    subnet = from_pretrained(saved, arch=mixed, dtype=torch.bfloat16)
    assert {weight.dtype for weight in subnet.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in from_pretrained(saved, arch=mixed, device='meta').parameters()} == {'meta'}
    net, generator = load_supernet(saved, dtype=torch.float64, device='meta')
    assert {(weight.dtype, weight.device.type) for weight in net.parameters()} == {(torch.float64, 'meta')}
    assert {weight.device.type for weight in generator.parameters()} == {'cpu'}


def test_weights_keep_their_type(tmp_path, mixed):
    save_pretrained(tmp_path, make_net().half())
    subnet = from_pretrained(tmp_path, arch=mixed, num_classes=3)
    assert {weight.dtype for weight in subnet.parameters()} == {torch.float16}


def test_other_number_of_classes(saved, net, generator):
    budget = net.macs(net.space.smallest) + 100_000
    subnet = from_pretrained(saved, flops=budget, num_classes=500)
    assert logits(subnet).shape == (2, 500) and static_counts(subnet)[0] <= budget
    assert net.macs(subnet.arch) + 490 * subnet.arch.embed_dim == static_counts(subnet)[0]
    plain = extract(net, subnet.arch)
    assert torch.equal(plain.forward_features(images(net)), subnet.forward_features(images(net)))
    assert from_pretrained(saved, arch=subnet.arch, num_classes=0).num_classes == 0
    same = from_pretrained(saved, arch=subnet.arch, num_classes=10)
    assert torch.equal(logits(same), logits(plain))
    for wrong in (-1, 2.5, 'ten', 10 ** 12):
        with pytest.raises(ValueError, match='num_classes='):
            from_pretrained(saved, arch=subnet.arch, num_classes=wrong)


@pytest.mark.parametrize('kwargs, named', [
    (dict(), "flops='1.4G'"),
    (dict(flops='2M', params='1M', arch={}), 'flops and params and arch'),
    (dict(flops='1.5M', params=1000, memory='1MB'), 'params=1000'),
    (dict(size='8M'), '5MB'),
    (dict(latency='8M'), '8ms'),
    (dict(latency='8ms'), 'device_file'),
    (dict(size='1MB', precision='int4'), 'int4'),
    (dict(flops='2M', precision='int8'), "precision='int8' says how size is counted"),
    (dict(flops='2M', device_file='x.json'), "device_file='x.json' says how latency is counted"),
    (dict(flops=0), 'flops=0'),
    (dict(flops='abc'), "flops='abc'"),
    (dict(params='-1'), "params='-1'"),
    (dict(flops='1P'), "flops='1P'"),
    (dict(flops=1000), 'MACs'),
    (dict(params=10), 'parameters'),
    (dict(arch=dict(depth=7, embed_dim=48, num_heads=1, mlp_ratio=1.0)), 'depth=7'),
    (dict(arch=dict(depth=4)), 'embed_dim'),
    (dict(arch='smallest'), "'smallest'"),
    (dict(arch=Arch(depth=4)), 'embed_dim'),
])
def test_impossible_requests(saved, kwargs, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        from_pretrained(saved, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('budget', [
    np.int64(2_000_000), np.float32(2e6), Decimal('2e6'), Fraction(2_000_000), torch.tensor(2_000_000),
    torch.tensor(2e6), np.array(2e6),
], ids=lambda budget: type(budget).__name__)
def test_numbers_of_any_library_are_budgets(saved, budget):
    assert from_pretrained(saved, flops=budget).arch == from_pretrained(saved, flops=2_000_000).arch


@pytest.mark.parametrize('budget', [
    10 ** 400, -10 ** 400, Decimal('1e400'), np.float64('nan'), True, np.bool_(True), torch.tensor(True), 1 + 2j,
    torch.tensor([2e6]), torch.empty((), device='meta'), b'2', [2e6],
], ids=lambda budget: type(budget).__name__)
def test_other_values_are_no_budgets(saved, budget):
    with pytest.raises(ValueError, match='flops='):
        from_pretrained(saved, flops=budget)


def test_budgets_are_named_as_they_were_typed(saved, saved_subnet):
    with pytest.warns(BudgetWarning, match='9.9M'):
        from_pretrained(saved, flops='9.9M')
    for where, budget in ((saved, '4.9k'), (saved_subnet, '100.5k')):
        with pytest.raises(ValueError, match=budget):
            from_pretrained(where, flops=budget)


def test_a_mistyped_argument_is_not_ignored(saved):
    with pytest.raises(TypeError, match='flop'):
        from_pretrained(saved, flop='1M')
    with pytest.raises(TypeError, match='revison'):
        load_supernet(saved, revison='main')


# -- a saved subnet ----------------------------------------------------------------------------------------------------


def test_subnet_directory(saved_subnet, net, mixed):
    assert sorted(os.listdir(saved_subnet)) == [CONFIG, WEIGHTS]
    config = json.loads((saved_subnet / CONFIG).read_text())
    assert config['architecture'] == 'shiftformer_subnet' and config['timm_shiftnas']['kind'] == 'subnet'
    assert config['model_args']['arch'] == mixed.to_dict() and 'space' not in config['model_args']
    subnet = from_pretrained(saved_subnet)
    assert subnet.arch == mixed and not subnet.training
    assert torch.equal(logits(subnet), logits(extract(net, mixed)))
    assert static_counts(subnet) == (net.macs(mixed), net.params(mixed))
    with pytest.raises(ValueError, match='from_pretrained'):
        load_supernet(saved_subnet)


@pytest.mark.process
@pytest.mark.slow
def test_timm_loads_the_subnet_in_a_fresh_process(saved_subnet, net, mixed, tmp_path):
    code = (
        'import sys, timm, torch, timm_shiftnas\n'
        'from safetensors.torch import load_file, save_file\n'
        "net = timm.create_model(f'local-dir:{sys.argv[1]}', pretrained=True).eval()\n"
        "save_file({'y': net(load_file(sys.argv[2])['x']).detach()}, sys.argv[3])\n")
    safetensors.torch.save_file({'x': images(net)}, tmp_path / 'x')
    done, _, err = call(run_code, code, saved_subnet, tmp_path / 'x', tmp_path / 'y', folder=tmp_path)
    assert done == 0, err
    found = safetensors.torch.load_file(tmp_path / 'y')['y']
    torch.testing.assert_close(found, logits(net, mixed), rtol=0, atol=1e-5)


def test_a_subnet_of_create_model(tmp_path, net, mixed):
    torch.manual_seed(0)
    subnet = timm.create_model('shiftformer_subnet', arch=mixed, img_size=32, patch_size=8, num_classes=10).eval()
    save_pretrained(tmp_path, subnet)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(subnet))


@pytest.mark.slow
def test_a_saved_subnet_has_to_satisfy_the_request(saved_subnet, net, mixed):
    macs, params = net.macs(mixed), net.params(mixed)
    for kwargs in (dict(flops=macs), dict(params=params), dict(arch=mixed), dict(arch=mixed.to_dict())):
        assert from_pretrained(saved_subnet, **kwargs).arch == mixed
    for kwargs, named in (
            (dict(flops=macs - 1), f'flops={macs - 1}'), (dict(params=params - 1), f'params={params - 1}'),
            (dict(arch=net.space.smallest), str(mixed)), (dict(arch='x'), str(mixed)),
            (dict(flops=macs, num_classes=11), 'flops')):
        with pytest.raises(ValueError, match=re.escape(named)):
            from_pretrained(saved_subnet, **kwargs)
    assert logits(from_pretrained(saved_subnet, num_classes=4)).shape == (2, 4)


# -- arguments of save_pretrained --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wrapped_networks_are_unwrapped(tmp_path, net, mixed):
    for wrapped in (Subnet(net, mixed), ModelEmaV3(net), torch.compile(net, backend='eager')):
        save_pretrained(tmp_path, wrapped)
        assert torch.equal(logits(load_supernet(tmp_path)[0]), logits(net))


def test_tied_and_non_contiguous_weights(tmp_path, net):
    other = copy.deepcopy(net)
    other.blocks[1].mlp.fc1.weight = other.blocks[0].mlp.fc1.weight
    other.blocks[2].mlp.fc1.weight.data = other.blocks[2].mlp.fc1.weight.data.t().contiguous().t()
    assert not other.blocks[2].mlp.fc1.weight.is_contiguous()
    save_pretrained(tmp_path, other)
    assert torch.equal(logits(load_supernet(tmp_path)[0]), logits(other))


def test_saving_changes_nothing(tmp_path, net, generator):
    net.train()
    args, weights, noise = copy.deepcopy(net.model_args), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    save_pretrained(tmp_path, net, generator)
    assert net.training and net.model_args == args and torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(weight, weights[name]) for name, weight in net.state_dict().items())
    net.eval()


def test_invalid_arguments_save_nothing(tmp_path, net, generator, mixed, edges):
    other = make_net(space=shiftformer_space(embed_dim=(32, 64), depth=(2, 3), num_heads=(1, 2), mlp_ratio=(1.0, 2.0)))
    changed = copy.deepcopy(net)
    changed.norm = torch.nn.Identity()
    foreign, broken = other.space.largest, copy.deepcopy(net)
    broken.head.bias.data[3] = math.nan
    for args, kwargs, named in (
            ((timm.create_model('test_vit'),), {}, 'VisionTransformer'),
            ((type(net)(net.space, img_size=32, patch_size=8),), {}, 'pretrained_cfg'),
            ((other, generator), {}, 'space'),
            ((extract(net, mixed), generator), {}, 'generator'),
            ((copy.deepcopy(net).to('meta'),), {}, 'meta'),
            ((changed,), {}, 'norm.weight'),
            ((net,), dict(groups=edges, probabilities=[.5, .5]), 'timm_shiftnas.probabilities'),
            ((net,), dict(probabilities=[1.]), 'timm_shiftnas.probabilities'),
            ((net,), dict(groups=edges[::-1]), 'timm_shiftnas.groups'),
            ((net,), dict(groups=[]), 'timm_shiftnas.groups'),
            ((net,), dict(groups=edges, probabilities=[.1, .2, .3, math.nan]), 'timm_shiftnas.probabilities'),
            ((net,), dict(results=[dict(name='x')]), 'timm_shiftnas.results'),
            ((net,), dict(results=[dict(row('x', None, 1), arch=foreign.to_dict())]), 'timm_shiftnas.results'),
            ((net,), dict(searched=[foreign]), 'timm_shiftnas.searched'),
            ((net,), dict(bn_stats={foreign: {}}), 'depth=3'),
            ((net,), dict(bn_stats={net.space.smallest: {}}), 'BatchNorm'),
            ((extract(net, mixed),), dict(results=[dict(row('x', None, 1), arch=foreign.to_dict())]), 'results'),
            ((broken,), {}, 'head.bias'),
            ((copy.deepcopy(net).to(torch.float8_e4m3fn),), {}, 'float8_e4m3fn'),
            ((net,), dict(training=dict(command='x' * 10_000_000)), 'at most 10,000,000'),
            ((net,), dict(data_config=dict(input_size=(3, 64, 64))), '64')):
        with pytest.raises(ValueError, match=re.escape(named)):
            save_pretrained(tmp_path / 'new', *args, **kwargs)
        assert not (tmp_path / 'new').exists()


# -- damaged and hostile directories -----------------------------------------------------------------------------------


def refused(folder, *named, arch=None):
    """Loading a subnet or the supernet fails with one line that names some values."""
    for load in (lambda: from_pretrained(folder, **(dict(flops='2M') if arch is None else dict(arch=arch))),
                 lambda: load_supernet(folder)):
        with pytest.raises(ValueError) as error:
            load()
        message = str(error.value)
        assert '\n' not in message and not [value for value in named if value not in message], message


@pytest.mark.parametrize('name', [WEIGHTS, GENERATOR])
def test_flipped_bit(folder, name):
    good = (folder / name).read_bytes()
    for position in (0, len(good) // 2, -1):
        data = bytearray(good)
        data[position] ^= 1
        (folder / name).write_bytes(data)
        refused(folder, name, 'sha256')


@pytest.mark.slow
@pytest.mark.parametrize('name', [WEIGHTS, GENERATOR])
def test_truncated_or_missing_file(folder, name):
    good = (folder / name).read_bytes()
    for data in (good[:-1], good[:100], b''):
        (folder / name).write_bytes(data)
        refused(folder, name, f'{len(data)} bytes', str(len(good)))
    (folder / name).unlink()
    refused(folder, name, 'missing')


def test_wrong_hash_in_the_config(folder):
    def flip(config, ours):
        first, *rest = ours['files'][WEIGHTS]['sha256']
        ours['files'][WEIGHTS]['sha256'] = ''.join(['1' if first == '0' else '0', *rest])

    edit(folder, flip)
    refused(folder, WEIGHTS, 'sha256')


def test_a_pickle_is_never_read(folder, net, mixed):
    torch.save(net.state_dict(), folder / 'pytorch_model.bin')
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, 'missing', arch=mixed)


@pytest.mark.parametrize('name', [WEIGHTS, GENERATOR])
@pytest.mark.parametrize('data', [b'', b'\xff' * 64, b'\x80\x04N.' * 20])
def test_a_file_of_another_format(folder, name, data):
    (folder / name).write_bytes(data)
    accept(folder, name)
    refused(folder, name, 'not a safetensors file')


@pytest.mark.slow
@pytest.mark.parametrize('name', [WEIGHTS, GENERATOR])
@pytest.mark.parametrize('change', ['other shape', 'missing', 'unknown', 'integers'])
def test_tensors_of_another_network(folder, name, change):
    tensors = safetensors.torch.load_file(folder / name)
    first = changed = list(tensors)[0]
    if change == 'other shape':
        tensors[first] = torch.cat([tensors[first], tensors[first]])
    elif change == 'missing':
        del tensors[first]
    elif change == 'unknown':
        tensors['x'], changed = torch.zeros(1), 'x'
    else:
        tensors[first] = tensors[first].int()
    safetensors.torch.save_file(tensors, folder / name)
    accept(folder, name)
    refused(folder, name, f'{changed} is')


@pytest.mark.parametrize('content', ['', '{', '[' * 100_000, '{"a": \udcff}', '{"a": ' + '9' * 5000 + '}'])
def test_config_that_is_not_json(folder, content):
    (folder / CONFIG).write_bytes(content.encode(errors='surrogateescape'))
    refused(folder, CONFIG, 'not JSON')


def test_no_config(folder, tmp_path):
    (folder / CONFIG).unlink()
    refused(folder, CONFIG)
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', CONFIG)


def test_a_directory_of_timm(tmp_path):
    timm.models.save_for_hf(timm.create_model('test_vit'), tmp_path, safe_serialization=True)
    refused(tmp_path, CONFIG, "'timm_shiftnas'", 'timm.create_model')
    (tmp_path / CONFIG).write_text('[]')
    refused(tmp_path, CONFIG, "'timm_shiftnas'")


def test_neither_a_directory_nor_a_repository(tmp_path, saved):
    for name in ('nowhere', '/nowhere/at/all', './model', '', tmp_path / 'none', 'a/b/c', saved / CONFIG):
        refused(name, repr(str(name)), "'owner/name'")


def test_newer_format(folder):
    edit(folder, lambda config, ours: ours.update(format=2, kind='of the future'))
    refused(folder, 'format 2', 'pip install -U timm_shiftnas')


HASH = '0' * 64


@pytest.mark.parametrize('entry, values', [
    ('format', [None, '1', True, 0]),
    ('kind', [None, 'teacher', ['supernet']]),
    ('files', [None, {}, [], 'x']),
    ('generator', [None, {}, {'hidden_size': 0}, {'hidden_size': '64'}, {'hidden_size': 10 ** 12}]),
    ('groups', ['x', [1], [2, 1], [1, 1], [1, math.nan], [1, 10 ** 400]]),
    ('probabilities', [[.5, .5], [.5, .6, 0, 0], [1.5, -.5, 0, 0], [True, 0, 0, 0]]),
    ('results', [{}, [1], [{'name': 'x'}], [row(1, None, 1)], [row('x', '1', 1)], [row('x', 1, math.inf)]]),
    ('training', [[], {'command': 1}, {'versions': 'x'}]),
    ('searched', ['x', {}]),
    ('bn_archs', [[], 'x']),  # there is no file of statistics
    ('device', ['toy', '/tmp/device.json']),  # nor a device file
    ('colour', ['red']),
])
def test_unusable_entry(folder, entry, values):
    for value in values:
        edit(folder, lambda config, ours, value=value: ours.update({entry: value}))
        refused(folder, CONFIG, f'timm_shiftnas.{entry}')


def test_null_is_as_good_as_no_entry(folder):
    names = 'results', 'training', 'searched', 'searched_limits', 'bn_archs', 'upright'
    edit(folder, lambda config, ours: ours.update(dict.fromkeys(names)))
    assert from_pretrained(folder, flops='2M') and SavedModel(folder).record.searched == []


def test_unusable_arch(folder):
    edit(folder, lambda config, ours: ours.update(searched=[1]))
    with pytest.raises(ValueError, match='timm_shiftnas.searched'):
        from_pretrained(folder, flops='2M')


def test_unusable_file_entry(folder):
    for entry in (None, {}, {'size': -1, 'sha256': HASH}, {'size': '5', 'sha256': HASH}, {'size': 5},
                  {'size': 5, 'sha256': 'x' * 64}, {'size': True, 'sha256': HASH}):
        edit(folder, lambda config, ours, entry=entry: ours['files'].update({WEIGHTS: entry}))
        refused(folder, 'timm_shiftnas.files')


@pytest.mark.parametrize('name', ['../model.safetensors', '/etc/passwd', '', 'pytorch_model.bin'])
def test_files_with_other_names(folder, name):
    edit(folder, lambda config, ours: ours['files'].update({name: ours['files'][WEIGHTS]}))
    refused(folder, 'timm_shiftnas.files')


@pytest.mark.parametrize('change, named', [
    (dict(space=dict(embed_dim=[32, 10 ** 12])), 'embed_dim=1000000000000'),
    (dict(space=dict(depth=[10 ** 12])), 'depth=1000000000000'),
    (dict(space=dict(depth=[1001])), 'depth=1001'),
    (dict(space=dict(num_heads=[10 ** 400])), 'num_heads'),
    (dict(space=dict(mlp_ratio=[1.0, math.inf])), 'mlp_ratio=inf'),
    (dict(space=dict(mlp_ratio=[math.nan])), 'mlp_ratio=nan'),
    (dict(space=dict(embed_dim=list(range(1, 5000)))), '4,999 values of embed_dim'),
    (dict(img_size=10 ** 9), 'img_size'),
    (dict(num_classes=10 ** 12), 'num_classes'),
    (dict(max_relative_position=10 ** 12), 'max_relative_position'),
    # within the bounds, and still terabytes: refused because the file holds other shapes
    (dict(space=dict(embed_dim=[32, 10 ** 6])), WEIGHTS),
    (dict(space=dict(num_heads=[1, 10 ** 6])), WEIGHTS),
    (dict(max_relative_position=10 ** 6), WEIGHTS),
])
def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, change, named):
    def apply(config, ours):
        config['model_args']['space'].update(change.pop('space', {}))
        config['model_args'].update(change)

    edit(folder, apply)
    before = peak_memory()
    refused(folder, named)
    assert peak_memory() - before < 500e6


def peak_memory():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize('change, named', [
    (dict(architecture=None), 'architecture None'),
    (dict(architecture='hf-hub:some/model'), 'hf-hub:some/model'),
    (dict(architecture='resnet18'), CONFIG),
    (dict(architecture='shiftformer_subnet'), CONFIG),
    (dict(model_args=None), 'model_args'),
    (dict(model_args=dict(img_size=64)), WEIGHTS),
    (dict(model_args=dict(space=5)), CONFIG),
    (dict(model_args=dict(space=dict(family='x'))), "family='x'"),
    (dict(model_args=dict(patch_size=0)), CONFIG),
    (dict(model_args=dict(unheard_of=1)), "'unheard_of'"),
    (dict(model_args=dict(checkpoint_path='x.pth')), 'model_args.checkpoint_path'),
    (dict(model_args=dict(pretrained=True)), 'model_args.pretrained'),
    (dict(pretrained_cfg=None), 'pretrained_cfg'),
    (dict(pretrained_cfg=dict(unheard_of=1)), "'unheard_of'"),
    (dict(pretrained_cfg=dict(input_size=[3, 10 ** 12, 10 ** 12])), 'input_size=1000000000000'),
])
def test_config_without_a_network(folder, change, named):
    edit(folder, lambda config, ours: config.update(change))
    refused(folder, named)


@pytest.mark.parametrize('architecture, args', [
    ('convnext_atto', dict(depths=[1_000_000, 1, 1, 1])), ('resnet18', {}), ('test_vit', {}),
])
def test_networks_of_others_are_not_built(folder, architecture, args):
    """timm would build a million blocks."""
    edit(folder, lambda config, ours: config.update(architecture=architecture, model_args=args))
    started = time.process_time()
    refused(folder, CONFIG, architecture)
    assert time.process_time() - started < 1


@pytest.mark.slow
def test_a_network_is_bounded_whatever_the_names_of_its_arguments(folder):
    """Layers of 700 blocks pass all checks of numbers; so would a third family with `layers=700`."""
    edit(folder, lambda config, ours: config['model_args']['space'].update(depth=[700]))
    started = time.process_time()
    refused(folder, CONFIG, '10,000 modules')
    assert time.process_time() - started < 15


@pytest.mark.slow
@pytest.mark.parametrize('space, named', [
    (dict(depth=[999, 1000, 998]), '2,997'),
    (dict(embed_dim=list(range(64, 264))), '200 values of embed_dim'),
    (dict(depth=[250], num_heads=list(range(1, 101))), '502 choices of up to 100 values'),
])
def test_a_space_is_bounded(folder, space, named):
    def change(config, ours):
        config['model_args']['space'].update(space)
        config['model_args']['relative_position'] = False  # 500 tables take seconds to build

    edit(folder, change)
    refused(folder, CONFIG, named)


def test_a_checkpoint_builds_only_networks_of_this_package(tmp_path, net, generator):
    task = ShiftNASTask(
        net, config=ShiftNASConfig(total_updates=1), generator=generator, groups=BudgetGroups.of_space(net.space))
    state = dict(task.get_checkpoint_state(), args=None)
    path = tmp_path / 'last.pth.tar'
    torch.save(state, path)
    loaded, again, _ = load_checkpoint(path)
    assert loaded.space == net.space and torch.equal(loaded.head.weight, net.head.weight)
    for architecture, args, named in (
            ('hf-hub:some/model', {}, 'hf-hub:some/model'), (f'local-dir:{tmp_path}', {}, 'local-dir'),
            ('resnet18', {}, 'resnet18'), ('unheard_of', {}, 'unheard_of'),
            ('convnext_atto', dict(depths=[10 ** 6, 1, 1, 1]), 'convnext_atto'),
            ('test_shiftformer_supernet', dict(checkpoint_path=str(path)), 'checkpoint_path'),
            ('test_shiftformer_supernet', dict(pretrained=True), 'pretrained'),
            ('test_shiftformer_supernet', dict(img_size=10 ** 9), 'img_size=1000000000'),
            ('test_shiftformer_supernet', dict(num_classes=3), 'head.weight')):
        state['task_state']['network'] = dict(architecture=architecture, model_args=args)
        torch.save(state, path)
        with pytest.raises(ValueError, match='last.pth.tar') as error:
            load_checkpoint(path)
        assert named in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('change, named', [
    (lambda x: x.fill_(math.nan), 'NaN'), (lambda x: x.view(-1)[0].fill_(math.inf), 'infinite'),
    (lambda x: x.half(), 'float16'), (lambda x: x.to(torch.float8_e4m3fn), 'float8_e4m3fn'),
    (lambda x: x.to(torch.complex64), 'complex'),
])
@pytest.mark.parametrize('name', [WEIGHTS, GENERATOR])
def test_weights_that_do_not_compute(folder, name, change, named):
    tensors = safetensors.torch.load_file(folder / name)
    first = list(tensors)[0]
    changed = change(tensors[first])
    tensors[first] = changed if changed.shape == tensors[first].shape else tensors[first]
    safetensors.torch.save_file(tensors, folder / name)
    accept(folder, name)
    refused(folder, name, named, first)


def test_a_large_config_is_not_read(folder):
    with open(folder / CONFIG, 'ab') as file:
        file.write(b' ' * 90_000_000)
    before = peak_memory()
    refused(folder, CONFIG, '90,0')
    assert peak_memory() - before < 50e6
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to('/dev/zero')  # without an end
    refused(folder, CONFIG, '10,000,001 bytes')


def test_kind_of_another_network(folder, saved_subnet):
    edit(folder, lambda config, ours: ours.update(kind='subnet'))
    with pytest.raises(ValueError, match='subnet.*test_shiftformer_supernet'):
        from_pretrained(folder)
    other = shutil.copytree(saved_subnet, folder.parent / 'subnet')
    edit(other, lambda config, ours: ours.update(kind='supernet'))
    with pytest.raises(ValueError, match='supernet.*shiftformer_subnet'):
        load_supernet(other)


def test_a_subnet_has_no_files_of_a_supernet(folder, saved_subnet):
    other = shutil.copytree(saved_subnet, folder.parent / 'subnet')
    shutil.copy(folder / GENERATOR, other / GENERATOR)
    accept(other, GENERATOR)
    edit(other, lambda config, ours: ours.update(generator=dict(hidden_size=64)))
    with pytest.raises(ValueError, match=f'{GENERATOR}.*shiftformer_subnet'):
        from_pretrained(other)


def test_what_cannot_be_loaded_is_not_published(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors['head.bias'][3] = math.nan
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    accept(folder, WEIGHTS)
    with pytest.raises(ValueError, match='head.bias'):
        published_files(SavedModel(folder), 'org/nan', None, None)


# -- saving over a directory, and interruptions ------------------------------------------------------------------------


def test_saving_over_a_directory(folder, net, mixed):
    (folder / 'notes.txt').write_text('mine')
    save_pretrained(folder, extract(net, mixed))
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, 'notes.txt']
    assert from_pretrained(folder).arch == mixed


@pytest.mark.slow
def test_files_of_two_models_never_load(tmp_path, folder, generator):
    """Two directories of the same shapes: exchanging any one file makes loading fail."""
    other = tmp_path / 'other'
    net = make_net(seed=1)
    save_pretrained(other, net, ArchitectureGenerator(net.space, seed=1).fit(steps=1, progress=False))
    for name in (CONFIG, WEIGHTS, GENERATOR):
        mix = shutil.copytree(folder, tmp_path / f'mix {name}')
        shutil.copy(other / name, mix / name)
        refused(mix, 'sha256')


def test_a_save_that_fails_midway_leaves_nothing_loadable(folder, net, generator):
    """A directory in the place of the generator blocks it, after the weights were replaced."""
    (folder / GENERATOR).unlink()
    (folder / GENERATOR).mkdir()
    (folder / GENERATOR / 'x').touch()
    with pytest.raises(OSError):
        save_pretrained(folder, make_net(seed=1), generator)
    assert sorted(os.listdir(folder)) == [GENERATOR, WEIGHTS]
    refused(folder, CONFIG)
    with pytest.raises(FileNotFoundError):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    shutil.rmtree(folder / GENERATOR)
    save_pretrained(folder, net, generator)
    assert torch.equal(logits(load_supernet(folder)[0]), logits(net))


@pytest.mark.process
def test_a_killed_save_leaves_the_old_model_whole(folder, net, generator):
    """A process that saves other weights is killed while it writes them; `fsync` holds it there."""
    code = (
        'import os, sys, time, torch\n'
        'from timm_shiftnas import load_supernet, save_pretrained\n'
        'net, generator = load_supernet(sys.argv[1])\n'
        'torch.nn.init.zeros_(net.head.weight)\n'
        'os.fsync = lambda file: time.sleep(100)\n'
        'save_pretrained(sys.argv[1], net, generator)\n')
    child = Job(run_code, code, folder, out='/dev/null')
    try:
        while not list(folder.glob('.*.tmp')):
            assert child.alive
            time.sleep(.01)
        assert from_pretrained(folder, flops='2M').arch is not None
    finally:
        child.kill()
        child.process.join()
    assert torch.equal(logits(load_supernet(folder)[0]), logits(net))
    assert torch.equal(logits(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()), logits(net))
    save_pretrained(folder, make_net(seed=1), generator)
    assert sorted(os.listdir(folder)) == [CONFIG, GENERATOR, WEIGHTS]  # nothing of the killed process is left


def test_a_link_in_the_place_of_a_file_is_not_written_through(folder, tmp_path, net, generator):
    """Neither under the name of a file nor under that of a temporary one."""
    mine = tmp_path / 'mine'
    mine.write_text('years')
    for name in (CONFIG, WEIGHTS, GENERATOR):
        (folder / name).unlink()
        for link in (folder / name, folder / f'.{name}.{os.getpid()}.tmp'):
            link.symlink_to(mine)
    save_pretrained(folder, net, generator)
    assert mine.read_text() == 'years'
    assert sorted(os.listdir(folder)) == [CONFIG, GENERATOR, WEIGHTS] and not (folder / WEIGHTS).is_symlink()


def test_config_is_removed_first_and_written_last(folder, net, generator, monkeypatch):
    """At every rename, no `config.json` is there."""
    replaced = []

    def replace(source, target, real=os.replace):
        replaced.append((os.path.basename(target), (folder / CONFIG).exists()))
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    save_pretrained(folder, net, generator)
    assert len(replaced) == 3 and replaced[-1][0] == CONFIG and not any(exists for _, exists in replaced)


def test_saved_model_reads_only_what_it_checked(folder):
    saved = SavedModel(folder)
    assert saved.read(WEIGHTS) == (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b'x')
    with pytest.raises(ValueError, match='1 bytes'):
        saved.read(WEIGHTS)
