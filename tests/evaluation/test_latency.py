"""Measuring and predicting latency. Tests compare quotients, closed forms and orders, never times."""
import csv
import itertools

import pytest
import torch
from support.networks import rng, tiny_supernet

import timm_shiftnas as tsn
from timm_shiftnas.evaluation.backends import OPSET, check_backend, open_onnx, prepared
from timm_shiftnas.evaluation.foreign_devices import TABLE, export_subnets, read_latencies
from timm_shiftnas.evaluation.latency import (
    MAX_SPREAD,
    Setup,
    archs_to_measure,
    compare,
    create_device,
    measure,
    measure_archs,
)
from timm_shiftnas.evaluation.predictor import errors_of, fit_predictor
from timm_shiftnas.models.export import export_onnx
from timm_shiftnas.models.quantize import quantize_onnx
from timm_shiftnas.space import MACS
from timm_shiftnas.space.latency import choice_features, operator_features


@pytest.fixture(scope='module')
def net():
    return tiny_supernet('test_shiftmobilenet_supernet')


@pytest.fixture(scope='module')
def vit():
    return tiny_supernet()


# -- timing ------------------------------------------------------------------------------------------------------------


class Machine:
    """A machine whose time passes as its networks say, times its present slowness."""

    def __init__(self, slowness):
        self.now, self.slowness = 0., itertools.cycle(slowness)

    def network(self, seconds):
        def run():
            self.now += seconds * next(self.slowness)

        return run

    def clock(self):
        return self.now


def test_drift_of_the_machine_cancels():
    machine = Machine([1.] * 40 + [3.] * 20)
    timing = compare(machine.network(.004), machine.network(.002), clock=machine.clock)
    assert timing.ratio == pytest.approx(2) and timing.spread < .01


def test_a_busy_machine_is_refused_and_said(caplog):
    noise = torch.rand(997, generator=rng()).mul(3).exp().tolist()
    machine = Machine(noise)
    with pytest.raises(ValueError, match='net 1.*busy'):
        measure(machine.network(.004), machine.network(.002), 'net 1', clock=machine.clock)
    assert 'measuring again' in caplog.text
    timing = measure(machine.network(.004), machine.network(.002), 'net 1', 10., machine.clock)
    assert timing.spread > MAX_SPREAD


def test_measuring_goes_on_until_the_median_is_known():
    noise = torch.rand(997, generator=rng()).mul(.2).add(1).tolist()
    machine = Machine(noise)
    timing = compare(machine.network(.003), machine.network(.002), clock=machine.clock)
    calls = machine.now / .0055
    assert calls > 35 and timing.spread <= .02 and timing.ratio == pytest.approx(1.5, rel=.03)


# -- archs and predictor -----------------------------------------------------------------------------------------------


def test_measured_archs_cover_the_range_of_macs(net):
    archs = archs_to_measure(net.space, 60)
    low, high = MACS.range(net.space)
    shares = (MACS.count(net.space, archs).double() - low) / (high - low)
    assert len({*archs}) == 60 and {net.space.smallest, net.space.largest} <= {*archs}
    assert (torch.histc(shares, 4, 0, 1) >= 5).all()
    assert archs == archs_to_measure(net.space, 60) != archs_to_measure(net.space, 60, seed=1)


@pytest.mark.parametrize('kind', ['operators', 'choices'])
def test_the_predictor_finds_prices_that_latencies_are_made_of(net, kind):
    space, archs = net.space, archs_to_measure(net.space, 60)
    features = dict(operators=operator_features, choices=choice_features)[kind](space, space.one_hot(archs))
    prices = dict(zip(features, torch.rand(len(features), generator=rng()).tolist()))
    seconds = 1e-3 + sum(1e-4 * prices[name] * values / values.max() for name, values in features.items())
    device = create_device(space, archs, seconds.tolist(), 'toy', Setup())
    others = archs_to_measure(space, 20, seed=5)[2:]
    expected = dict(operators=operator_features, choices=choice_features)[kind](space, space.one_hot(others))
    expected = 1e-3 + sum(1e-4 * prices[name] * values / features[name].max() for name, values in expected.items())
    predicted = device.predict(space, space.one_hot(others))
    assert errors_of(predicted, expected)['median'] < .005 and device.error['median'] < .005
    assert device.error['spearman'] > .99 and all(price > 0 for price in device.prices.values())


def test_errors_are_those_of_archs_that_were_not_fitted(net):
    """Latencies of pure noise are not predictable, however many prices there are."""
    archs = archs_to_measure(net.space, 40)
    seconds = torch.rand(40, generator=rng()).add(.5).tolist()
    _, error = fit_predictor(net.space, archs, seconds)
    assert error['median'] > .1 and abs(error['spearman']) < .5


def test_latencies_that_say_nothing_are_refused(net):
    archs = archs_to_measure(net.space, 20)
    seconds = [10. ** (k % 4 - 3) for k in range(len(archs))]  # whatever the arch
    with pytest.raises(ValueError, match='measure again, while nothing else runs'):
        create_device(net.space, archs, seconds, 'toy', Setup())


def test_too_few_archs_are_refused(net):
    with pytest.raises(ValueError, match='3 archs'):
        create_device(net.space, archs_to_measure(net.space, 3), [1., 2., 3.], 'toy', Setup())


# -- real measurement --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['eager', 'onnxruntime'])
def test_a_network_runs_in_a_backend(vit, backend):
    subnet, x = tsn.extract(vit, vit.space.smallest), torch.randn(2, 3, 32, 32, generator=rng())
    threads = torch.get_num_threads()
    with prepared(subnet, x, backend, 1) as run:
        found = run()
    assert torch.get_num_threads() == threads
    if found is not None:
        torch.testing.assert_close(torch.from_numpy(found), subnet(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(vit, tmp_path):
    partial, archs = tmp_path / 'x.partial', [vit.space.smallest, vit.space.largest]
    first = measure_archs(vit, archs[:1], Setup(), partial, max_spread=100, progress=False)
    both = measure_archs(vit, archs, Setup(), partial, max_spread=100, progress=False)
    assert both[0] == first[0] != both[1]
    assert len(partial.read_text().splitlines()) == 1 + 2
    for setup, named in ((Setup(batch_size=2), 'batch_size'), (Setup(backend='onnxruntime'), 'backend')):
        with pytest.raises(ValueError, match=named):
            measure_archs(vit, archs, setup, partial, progress=False)


@pytest.mark.parametrize('backend, device, named', [('tpu', 'cpu', "'tpu'"), ('onnxruntime', 'cuda', '--device cpu')])
def test_backends_that_cannot_run(backend, device, named):
    with pytest.raises(ValueError, match=named):
        check_backend(backend, device)


# -- other devices -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_latencies_of_another_device_are_filled_in(vit, tmp_path):
    archs = archs_to_measure(vit.space, 2)
    table = export_subnets(vit, archs, tmp_path / 'out', batch_size=2, progress=False)
    with table.open(newline='') as file:
        rows = list(csv.DictReader(file))
    x = torch.randn(2, 3, 32, 32, generator=rng()).numpy()
    logits = [torch.from_numpy(open_onnx(tmp_path / 'out' / row['file'])(x)) for row in rows]
    for arch, found in zip(archs, logits):
        torch.testing.assert_close(found, vit(torch.from_numpy(x), arch).detach(), rtol=1e-3, atol=1e-4)
    rows[1]['milliseconds'] = '2.5'
    with table.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert read_latencies(table, vit.space, batch_size=2) == ([archs[1]], [.0025])
    with pytest.raises(ValueError, match='batch size than 1'):
        read_latencies(table, vit.space)
    with pytest.raises(ValueError, match='search space'):
        read_latencies(table, vit.space.bind(**dict(vit.space.geometry, num_classes=3)), batch_size=2)
    with pytest.raises(ValueError, match=TABLE):
        export_subnets(vit, archs, tmp_path / 'out')
    table.write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='--export'):
        read_latencies(table, vit.space)


# -- int8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vit', 'net'])
def test_int8_files_are_smaller_and_compute_about_the_same(name, tmp_path, request):
    """Logits of int8 lie far closer to those of their own network than to those of other images."""
    net = request.getfixturevalue(name)
    subnet = tsn.extract(net, net.space.largest)
    x = torch.randn(16, 3, 32, 32, generator=rng())
    plain, int8 = tmp_path / 'fp32.onnx', tmp_path / 'int8.onnx'
    export_onnx(subnet, plain, opset=OPSET, check=False)
    quantize_onnx(plain, int8, None if name == 'vit' else iter([x[:8], x[8:]]))
    expected = subnet(x).detach()
    found = torch.from_numpy(open_onnx(int8)(x.numpy()))
    assert int8.stat().st_size < .6 * plain.stat().st_size
    assert (found - expected).norm() < .3 * (expected - expected.roll(1, 0)).norm()
