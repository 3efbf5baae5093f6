"""Device files in model directories: saved, loaded, chosen, replaced and published."""
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.devices import device_of
from support.networks import tiny_supernet

from timm_shiftnas.hub.load import SavedModel, from_pretrained, load_supernet
from timm_shiftnas.hub.push import published_files
from timm_shiftnas.hub.save import add_device, save_pretrained
from timm_shiftnas.method import ArchitectureGenerator
from timm_shiftnas.method.proposals import BudgetWarning
from timm_shiftnas.models import extract, static_counts
from timm_shiftnas.space import MEMORY, SIZES


@pytest.fixture(scope='module')
def net():
    return tiny_supernet()


@pytest.fixture(scope='module')
def device(net):
    return device_of(net.space)


@pytest.fixture
def saved(net, tmp_path):
    save_pretrained(tmp_path / 'model', net, ArchitectureGenerator(net.space).fit(20, progress=False))
    return tmp_path / 'model'


@pytest.mark.slow
def test_a_subnet_within_several_budgets(net, saved, device):
    path = add_device(saved, device)
    assert path.name == 'device_toy.json' and SavedModel(saved).devices() == {'toy': device}
    latency = device.resource(net.space)
    limit = sum(latency.range(net.space)) / 2
    subnet = from_pretrained(saved, latency=f'{limit * 1e3}ms', size='300kB', precision='fp32', memory='110kB')
    assert latency.count(net.space, subnet.arch) <= limit
    assert MEMORY.count(net.space, subnet.arch) <= 110_000
    assert sum(weight.nbytes for weight in subnet.parameters()) == SIZES['fp32'].count(net.space, subnet.arch) <= 3e5
    with pytest.raises(ValueError, match='budgets or an arch'):
        from_pretrained(saved, latency='1s', arch=net.space.smallest)
    with pytest.warns(BudgetWarning):
        assert from_pretrained(saved, latency='1s', device_file=path).arch == net.space.largest


@pytest.mark.slow
def test_budgets_of_int8_weights_are_published_with_their_precision(net, tmp_path):
    """What card and report say to type gives the subnet of the table."""
    size = SIZES['int8']
    low, high = size.range(net.space)
    generator, budget = ArchitectureGenerator(net.space, resource=size).fit(20, progress=False), (low + high) / 2
    arch = generator.propose(budget)
    save_pretrained(tmp_path, net, generator, groups=[low, budget, high], results=[
        dict(name=name, budget=limit, macs=net.macs(arch), params=net.params(arch), top1=50., top5=90.,
             arch=arch.to_dict()) for name, limit in (('group 1', budget), ('odd', 1.))])
    saved = SavedModel(tmp_path)
    files = published_files(saved, 'org/int8', None, None)
    code = re.search(r"from_pretrained\('org/int8', (.*)\)  #", files['README.md'].decode())[1]
    assert code.endswith("precision='int8'")
    assert from_pretrained(tmp_path, size=size.format(budget), precision='int8').arch == arch
    report = files['report.html'].decode()
    assert f"size={budget:g}, precision=&#x27;int8&#x27;" in report or f"size={budget:g}, precision='int8'" in report


def test_a_saved_subnet_takes_no_device_file(net, device, tmp_path):
    save_pretrained(tmp_path, extract(net, net.space.smallest))
    with pytest.raises(ValueError, match='holds a subnet'):
        add_device(tmp_path, device)


@pytest.mark.slow
def test_one_of_several_device_files_is_chosen_by_name(net, saved, device):
    add_device(saved, device)
    add_device(saved, device_of(net.space, name='slow', prices={'constant': 1., 'qkv/macs': 1e-9}))
    with pytest.raises(ValueError, match='toy, slow'):
        from_pretrained(saved, latency='8ms')
    with pytest.raises(ValueError, match='latency=8ms is too small'):
        from_pretrained(saved, latency='8ms', device_file='slow')
    with pytest.warns(BudgetWarning):
        assert from_pretrained(saved, latency='8s', device_file='slow').arch == net.space.largest


def test_device_files_of_other_models_are_refused(saved, device):
    other = device_of(tiny_supernet(num_classes=3).space)
    with pytest.raises(ValueError, match='another search space'):
        add_device(saved, other)
    with pytest.raises(ValueError, match='64 letters'):
        add_device(saved, device_of(tiny_supernet().space, name='../x'))
    assert SavedModel(saved).devices() == {}


@pytest.mark.slow
def test_device_files_are_checked_and_travel_to_the_hub(net, saved, device):
    add_device(saved, device)
    files = published_files(SavedModel(saved), 'me/x', None, None)
    assert files['device_toy.json'] == device.to_json().encode()
    (saved / 'device_toy.json').write_text(device.to_json().replace('toy', 'boy'))
    with pytest.raises(ValueError, match='device_toy.json'):
        from_pretrained(saved, latency='8ms')
    save_pretrained(saved, net)  # another model
    assert not (saved / 'device_toy.json').exists()


@pytest.mark.slow
def test_the_card_shows_latency_on_every_device_beside_macs(net, device, tmp_path):
    archs = dict(smallest=net.space.smallest, largest=net.space.largest)
    rows = [dict(name=name, budget=None, macs=net.macs(arch), params=net.params(arch), top1=60., top5=90.,
                 arch=arch.to_dict()) for name, arch in archs.items()]
    generator = ArchitectureGenerator(net.space).fit(20, progress=False)
    slow = device_of(net.space, name='slow', prices={'constant': 1., 'qkv/macs': 1e-9})
    save_pretrained(tmp_path / 'model', net, generator, results=rows, devices=[device, slow])
    files = published_files(SavedModel(tmp_path / 'model'), 'me/x', None, None)
    card = files['README.md'].decode()
    assert '| MACs | params | latency on toy | latency on slow | top-1 |' in card and '](report.html)' in card
    for row in rows:  # the prices of `device_of`
        line = next(line for line in card.splitlines() if line.startswith(f'| {row["name"]} |'))
        assert f'| {(1 + row["macs"] / 1e9) / .98:.4g}ms | 1' in line
    assert card.count('95th percentile of its error, 2.0%') == 2
    assert 'against MACs and latency on toy and latency on slow' in card
    low, high = device.resource(net.space).range(net.space)
    typed = re.findall(r"from_pretrained\('me/x', latency='(\S+)', device_file='(\w+)'\)", card)
    assert [name for _, name in typed] == ['toy', 'slow'] and low < device.resource(net.space).parse(typed[0][0]) < high
    with Image.open(io.BytesIO(files['accuracy.png'])) as image:
        pixels = np.asarray(image.convert('RGB')).astype(int)
    ys, xs = np.nonzero((pixels == (0xd9, 0x82, 0x2b)).all(-1))  # the marks of the ends
    found = {(y // 440, x // 450) for y, x in zip(ys, xs)}
    assert pixels.shape == (880, 900, 3) and found == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.slow
def test_a_generator_of_latencies_is_saved_with_its_device_file(net, device, tmp_path):
    latency = device.resource(net.space)
    generator = ArchitectureGenerator(net.space, resource=latency).fit(20, progress=False)
    low, high = latency.range(net.space)
    save_pretrained(tmp_path, net, generator, groups=[low, high], probabilities=[1.])
    loaded = load_supernet(tmp_path)[1]
    assert loaded.resource == latency and SavedModel(tmp_path).resource == latency
    budget = (low + high) / 2
    assert loaded.propose(budget) == generator.propose(budget) == from_pretrained(tmp_path, latency=budget).arch
    macs = net.macs(net.space.smallest) * 2
    assert static_counts(from_pretrained(tmp_path, flops=macs))[0] <= macs
    with pytest.raises(ValueError, match='--name'):
        add_device(tmp_path, device_of(net.space, machine='other'))
    assert torch.equal(generator.bias, loaded.bias)
