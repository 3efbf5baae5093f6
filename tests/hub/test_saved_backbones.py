"""Networks around an elastic backbone, saved and loaded with the code that builds them."""
import json
import re

import pytest
import timm
import torch
from support.memory import weight_bytes
from support.networks import rng
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas.cli.info import describe, info_text
from timm_shiftnas.hub.card import model_card
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.report import model_report
from timm_shiftnas.layers import FeatureSum
from timm_shiftnas.models import BatchNormCalibration, static_counts
from timm_shiftnas.space import SIZES
from timm_shiftnas.utils.units import format_count


class Head(nn.Module):
    def __init__(self, backbone, classes=3):
        super().__init__()
        self.body, self.sum = backbone, FeatureSum(backbone.feature_info.channels(), 6)
        self.out = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.out(self.sum(self.body(x)))


def vit():
    space = tsn.shiftformer_space((16, 32), (2, 3), (1, 2), (1, 2))
    return tsn.ElasticBackbone(timm.create_model('test_shiftformer_supernet', space=space), 2, norm=True)


def cnn():
    return tsn.ElasticBackbone(tsn.elastic('test_efficientnet', img_size=48), [1, 2], img_size=64)


def saved(folder, make, seed=0):
    torch.manual_seed(seed)
    model = tsn.ElasticModel(Head(make())).eval()
    generator = tsn.ArchitectureGenerator(model.space).fit(steps=5, progress=False)
    arch, x = model.space.sample(rng()), torch.randn(2, 3, 64 if make is cnn else 32, 64 if make is cnn else 32)
    rows = [dict(name='small', budget=None, macs=model.macs(arch), params=9, score=51.5, arch=arch.to_dict())]
    statistics = BatchNormCalibration([torch.randn(8, 3, 64, 64)], 8)
    if make is cnn:
        statistics(model, arch)
    tsn.save_pretrained(
        folder, model, generator, results=rows, bn_stats=statistics.statistics or None,
        training=dict(task='image-segmentation', metric='mean IoU'))
    return model, arch, x, statistics


@pytest.mark.slow
@pytest.mark.parametrize('make', [vit, cnn])
def test_saved_networks_are_loaded_by_budget(make, tmp_path):
    model, arch, x, statistics = saved(tmp_path / 'model', make)
    loaded, generator = tsn.load_supernet(tmp_path / 'model', network=Head)
    torch.testing.assert_close(loaded(x, arch), model(x, arch), rtol=0, atol=0)
    assert generator.space == loaded.space and loaded.space.to_dict() == model.space.to_dict()
    budget = (model.macs(model.space.smallest) + model.macs(model.space.largest)) / 2
    sub = tsn.from_pretrained(tmp_path / 'model', flops=budget, network=Head, loader=[x])
    assert .9 * budget < static_counts(sub)[0] <= budget
    assert static_counts(sub) == (model.macs(sub.arch), sum(weight.numel() for weight in sub.parameters()))
    half = sum(SIZES['fp32'].range(model.space)) / 2
    small = tsn.from_pretrained(tmp_path / 'model', size=half, network=Head, loader=[x])
    assert SIZES['fp32'].count(model.space, model.space.smallest) < weight_bytes(small)['fp32'] <= half
    calibrated = tsn.from_pretrained(tmp_path / 'model', arch=arch, network=Head)
    expected = statistics(model, arch)(x) if make is cnn else model(x, arch)
    torch.testing.assert_close(calibrated(x), expected)
    data = json.loads(re.search('id="data">(.*?)</script>', model_report(SavedModel(tmp_path / 'model')))[1])
    shown, = data['subnets']
    assert data['scores'] == ['mean IoU'] and shown['scores'] == ['51.50']
    assert shown['counts'] == [*static_counts(calibrated), *weight_bytes(calibrated).values()]
    assert len(shown['lines']) == 1
    assert shown['lines'][0].endswith(', network=build)')
    # a subnet
    tsn.save_pretrained(tmp_path / 'sub', sub)
    assert f'{format_count(static_counts(sub)[0])} MACs' in model_report(SavedModel(tmp_path / 'sub'))
    again = tsn.from_pretrained(tmp_path / 'sub', flops=budget, network=Head)
    torch.testing.assert_close(again(x), sub(x), rtol=0, atol=0)
    assert type(again) is Head and static_counts(again) == static_counts(sub)
    assert tsn.macs(SavedModel(tmp_path / 'sub').space, sub.arch) == model.macs(sub.arch)
    for budget in (dict(flops=1000), dict(size=1000), dict(memory='1GB')):
        with pytest.raises(ValueError, match='|'.join(budget)):
            tsn.from_pretrained(tmp_path / 'sub', **budget, network=Head)
    for budget in (dict(memory='1GB'), dict(latency='1ms')):
        with pytest.raises(ValueError, match=f'{next(iter(budget))} of a backbone'):
            tsn.from_pretrained(tmp_path / 'model', **budget, network=Head)
    about = info_text(describe(SavedModel(tmp_path / 'model')))
    assert 'network  Head, around' in about and 'classes' not in about


def test_backbones_without_a_network_need_no_code(tmp_path):
    backbone = vit().eval()
    tsn.save_pretrained(tmp_path, backbone)
    arch, x = backbone.space.smallest, torch.randn(1, 3, 32, 32)
    sub = tsn.from_pretrained(tmp_path, arch=arch)
    torch.testing.assert_close(sub(x), backbone(x, arch))
    with pytest.raises(ValueError, match='network='):
        tsn.from_pretrained(tmp_path, arch=arch, network=Head)


def test_faults_are_named(tmp_path):
    saved(tmp_path, vit)
    with pytest.raises(ValueError, match='network=lambda backbone: Head'):
        tsn.load_supernet(tmp_path)
    with pytest.raises(ValueError, match='out.weight'):
        tsn.load_supernet(tmp_path, network=lambda backbone: Head(backbone, classes=5))
    with pytest.raises(ValueError, match='Linear'):
        tsn.load_supernet(tmp_path, network=lambda backbone: nn.Linear(2, 2))
    with pytest.raises(ValueError, match='num_classes'):
        tsn.load_supernet(tmp_path, network=Head, num_classes=4)
    config = json.loads((tmp_path / 'config.json').read_text())
    for name, value in [('out_indices', 'all'), ('out_indices', [99]), ('out_indices', []), ('head_macs', [1]),
                        ('head_params', [-1, 2, 3]), ('head_sizes', [1])]:
        wrong = json.loads(json.dumps(config))
        wrong['timm_shiftnas']['backbone'][name] = value
        (tmp_path / 'config.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r'timm_shiftnas\.backbone'):
            tsn.load_supernet(tmp_path, network=Head)


def test_the_size_in_a_directory_of_an_earlier_version_is_known_with_its_network(tmp_path):
    model, *_ = saved(tmp_path, vit)
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['timm_shiftnas']['backbone']['head_sizes']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    most = SIZES['fp32'].count(model.space, model.space.largest)
    assert weight_bytes(tsn.from_pretrained(tmp_path, size=most, network=Head))['fp32'] == most
    space = SavedModel(tmp_path).space
    with pytest.raises(ValueError, match='save it again'):
        SIZES['fp32'].count(space, space.largest)


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path):
    model, arch, _, _ = saved(tmp_path, vit)
    card = model_card(SavedModel(tmp_path), 'me/letters')
    assert card.data.pipeline_tag == 'image-segmentation' and card.data.eval_results[0].metric_value == 51.5
    text = str(card)
    assert 'mean IoU' in text and '| 51.50 |' in text and 'top-1' not in text
    assert "network=build)" in text and "Head(backbone, ...)" in text and f'{model.space.size:,}' in text
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.safetensors'}
