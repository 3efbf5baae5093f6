"""Weights of a base from anywhere are those that timm itself loads into the base, whatever its arguments."""
import re

import pytest
import timm
import torch

import timm_shiftnas as tsn


def own_weights(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).state_dict()


def overlay_of(weights, classes, path=None):
    if path is None:
        return dict(state_dict=weights, num_classes=classes)
    torch.save(weights, path)
    return dict(file=str(path), source='', num_classes=classes)


def assert_equal(net, expected):
    state, expected = net.state_dict(), expected.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize('name, source, target', [
    ('test_vit', {}, dict(in_chans=1, num_classes=4)), ('test_efficientnet', {}, dict(in_chans=1)),
    ('test_vit', {}, dict(img_size=(80, 320))),  # as many patches as 160 x 160 pixels have
    ('deit3_small_patch16_224', dict(depth=1), dict(depth=1, img_size=96)),
    ('vit_base_patch16_siglip_224', dict(depth=1, num_classes=5), dict(
        depth=1, num_classes=5, global_pool='avg', fc_norm=False)),
    ('flexivit_small', dict(depth=1), dict(depth=1, img_size=96, patch_size=32))])
def test_weights_are_read_as_timm_reads_those_of_the_base(name, source, target, tmp_path):
    weights = own_weights(name, **source)
    if name.startswith('deit3'):  # as published
        weights = {re.sub(r'ls(\d)\.gamma', r'gamma_\1', key): weight for key, weight in weights.items()}
    classes = source.get('num_classes', 1000)
    for path in (tmp_path / 'weights.pth', None):
        overlay, nets = overlay_of(weights, classes, path), []
        for create in (timm.create_model, tsn.elastic):
            torch.manual_seed(1)
            nets.append(create(name, pretrained=True, pretrained_cfg_overlay=dict(overlay), **target))
        assert_equal(*nets[::-1])
        if 'in_chans' in target or 'img_size' in target:
            size = timm.layers.to_2tuple(target.get('img_size', 160))
            assert nets[1].pretrained_cfg['input_size'] == (target.get('in_chans', 3), *size)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet'])
@pytest.mark.parametrize('kind', ['supernet', 'subnet'])
def test_a_saved_network_is_loaded_with_other_channels(name, kind, tmp_path):
    net = tsn.elastic(name, num_classes=4)
    tsn.save_pretrained(tmp_path, net if kind == 'supernet' else tsn.extract(net, net.space.largest))
    gray = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1)
    overlay = overlay_of(net.state_dict(), 4)
    assert_equal(gray, timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4))
    assert gray.pretrained_cfg['input_size'][0] == 1 and gray.in_chans == 1
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.pretrained_cfg['input_size'] == net.pretrained_cfg['input_size']
