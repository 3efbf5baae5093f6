"""Accuracy and BatchNorm statistics of several subnets, in one pass over the images."""
import pytest
import timm
import torch

import timm_shiftnas as tsn
from timm_shiftnas.evaluation.accuracy import evaluate, evaluate_archs
from timm_shiftnas.models import BatchNormCalibration, calibrate_bn, extract
from timm_shiftnas.models.calibration import bn_statistics

CPU = torch.device('cpu')


class Batches(list):
    """Batches that count how often they are read."""
    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def batches(seed):
    noise = torch.Generator().manual_seed(seed)
    return Batches((torch.randn(8, 3, 32, 32, generator=noise), torch.randint(5, (8,), generator=noise))
                   for _ in range(3))


@pytest.fixture(scope='module')
def archs():
    space = timm.create_model('test_shiftmobilenet_supernet', num_classes=5).space
    noise = torch.Generator().manual_seed(0)
    return [space.smallest, space.largest, space.sample(noise)]


def test_subnets_of_a_cnn_share_one_pass(archs, seeded):
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=5).eval()
    images, training = batches(1), batches(2)
    calibration = BatchNormCalibration(training, 16)
    together = evaluate_archs(net, archs, images, CPU, calibration)
    assert (images.reads, training.reads) == (1, 1) and not any(module.training for module in net.modules())
    alone = [calibrate_bn(extract(net, arch), training, 16) for arch in archs]
    assert together == [evaluate(calibration(net, arch), images, CPU) for arch in archs]
    for arch, subnet in zip(archs, alone):
        expected = bn_statistics(subnet)
        assert expected and calibration.statistics[arch].keys() == expected.keys()
        assert all(torch.equal(calibration.statistics[arch][name], value) for name, value in expected.items())


def test_views_of_a_vit_share_one_pass_and_are_evaluated_each_once(seeded):
    net = timm.create_model('test_shiftformer_supernet', num_classes=5, img_size=32)
    noise = torch.Generator().manual_seed(0)
    archs = list(dict.fromkeys([net.space.smallest, net.space.largest, net.space.sample(noise)]))
    images = batches(3)
    forwards = []
    net.patch_embed.register_forward_hook(lambda *_: forwards.append(net.training))
    together = evaluate_archs(net, archs, images, CPU)
    assert images.reads == 1 and forwards == [False] * 9 and net.training
    assert together == [evaluate(tsn.Subnet(net, arch), images, CPU) for arch in archs]
