"""Accuracy and BatchNorm statistics of several subnets, in one pass over the images."""
import pytest
import timm
import torch

import timm_shiftnas as tsn
from timm_shiftnas.evaluation.accuracy import evaluate, evaluate_archs
from timm_shiftnas.models import BatchNormCalibration, calibrate_bn, extract
from timm_shiftnas.models.calibration import bn_statistics, parts

CPU = torch.device('cpu')


class Batches(list):
    """Batches that count how often they are read, and never with gradients."""
    reads = 0

    def __iter__(self):
        self.reads += 1
        for batch in super().__iter__():
            assert not torch.is_grad_enabled()
            yield batch


def batches(seed, label=lambda images: torch.zeros(8, dtype=torch.long)):
    noise = torch.Generator().manual_seed(seed)
    images = [torch.randn(8, 3, 32, 32, generator=noise) for _ in range(3)]
    return Batches((each, label(each)) for each in images)


def archs_of(space, count):
    noise = torch.Generator().manual_seed(0)
    found = dict.fromkeys([space.smallest, space.largest])
    while len(found) < count:
        found[space.sample(noise)] = None
    return list(found)


@pytest.mark.slow
@torch.no_grad()
def test_subnets_of_a_cnn_share_a_pass_over_images(seeded):
    """16 at a time, with the accuracy and the statistics that each has alone."""
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=5).eval()
    archs = archs_of(net.space, 18)
    calibrated = calibrate_bn(extract(net, archs[1]), batches(2), 16)
    images, training = batches(1, lambda each: calibrated(each).argmax(1)), batches(2)
    calibration = BatchNormCalibration(training, 16)
    with torch.enable_grad():
        together = list(evaluate_archs(net, archs, images, CPU, calibration))
    assert (images.reads, training.reads) == (2, 2) and not any(module.training for module in net.modules())
    assert len({*together}) > 3  # they are not all equal, so that exchanged ones are noticed
    assert together == [evaluate(calibration(net, arch), images, CPU) for arch in archs]
    for arch in archs[::5]:
        expected = bn_statistics(calibrate_bn(extract(net, arch), training, 16))
        assert expected and calibration.statistics[arch].keys() == expected.keys()
        assert all(torch.equal(calibration.statistics[arch][name], value) for name, value in expected.items())


@pytest.mark.parametrize('mode', [True, False])
def test_views_of_a_vit_are_evaluated_once_each_and_leave_its_mode(mode, seeded):
    net = timm.create_model('test_shiftformer_supernet', num_classes=5, img_size=32).train(mode)
    archs = archs_of(net.space, 3)
    images = batches(3, lambda each: net(each, archs[1]).argmax(1) if not mode else torch.arange(8) % 5)
    forwards = []
    net.patch_embed.register_forward_hook(lambda *_: forwards.append(net.training))
    together = list(evaluate_archs(net, archs, images, CPU))
    assert images.reads == 1 and forwards == [False] * 9 and net.training is mode
    assert together == [evaluate(tsn.Subnet(net, arch), images, CPU) for arch in archs] and net.training is mode


def test_large_subnets_are_evaluated_in_smaller_parts():
    with torch.device('meta'):
        net = torch.nn.Sequential(torch.nn.Linear(2 ** 13, 2 ** 13, bias=False), torch.nn.BatchNorm1d(0))  # 256 MiB
    assert [list(part) for part in parts(net, range(6))] == [[0, 1, 2, 3], [4, 5]]
    assert [len(part) for part in parts(net[0], range(40))] == [16, 16, 8]  # views take no memory
