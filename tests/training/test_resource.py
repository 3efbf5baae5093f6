"""Training with budgets of another resource than MACs."""
import io
from contextlib import redirect_stdout

import pytest
from PIL import Image
from support.devices import device_of
from support.networks import tiny_supernet
from support.small_runs import FAST, run_script

import timm_shiftnas as tsn
from timm_shiftnas.evaluation import read_budgets_csv
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.method.loop import create_task
from timm_shiftnas.space import MEMORY
from timm_shiftnas.training.checkpoints import load_checkpoint


@pytest.fixture(scope='module')
def device():
    return device_of(tiny_supernet(img_size=16).space)


@pytest.fixture(scope='module')
def finished(device, tmp_path_factory):
    """The folder of a run for latencies, with pictures, and what it prints."""
    path = tmp_path_factory.mktemp('latency')
    device.write(path / 'toy.json')
    flags = [*FAST, '--resource', 'latency', '--resource-file', str(path / 'toy.json'), '--epochs', '1',
             '--output', str(path), '--experiment', 'run']
    with redirect_stdout(io.StringIO()) as out:
        assert run_script(flags) == 0
    return path / 'run', out.getvalue()


@pytest.mark.slow
def test_a_run_for_latencies(device, finished, tmp_path, capsys):
    folder, printed = finished
    saved = SavedModel(folder / 'model')
    latency = device.resource(saved.skeleton().space)
    assert saved.devices() == {'toy': device} and saved.record.groups[-1] == latency.range(saved.skeleton().space)[1]
    rows = read_budgets_csv(folder / 'budgets.csv')
    assert all(row['latency'] <= row['budget'] for row in rows if row['budget'])
    assert 'latency' in printed
    assert (folder / 'shift.png').exists()
    with Image.open(folder / 'accuracy.png') as image:
        assert image.size == (900, 440)  # a panel of latency, and one of MACs
    budget = rows[1]['budget']
    assert latency.count(saved.skeleton().space, tsn.from_pretrained(folder / 'model', latency=budget).arch) <= budget
    assert load_checkpoint(folder / 'last.pth.tar')[1].resource == latency
    resumed = [each if each != '1' else '2' for each in FAST]
    assert run_script([*resumed, '--epochs', '2', '--resume', str(folder / 'last.pth.tar'), '--output',
                       str(tmp_path)]) != 0
    assert '--resource' in capsys.readouterr().err


def test_a_checkpoint_of_another_resource_is_refused():
    net = tiny_supernet(img_size=16)
    memory = create_task(net, resource='memory', num_groups=3, generator_fit_steps=2)
    assert memory.groups.resource == memory.generator.resource == MEMORY
    macs = create_task(net, num_groups=3)
    with pytest.raises(ValueError, match='memory.*macs.*--resource'):
        macs.load_task_state(memory.get_task_state())
    state = macs.get_task_state()
    del state['resource']  # as in checkpoints of older versions
    macs.load_task_state(state)
    with pytest.raises(ValueError, match='resource_file|--resource-file'):
        create_task(net, resource='latency')
    with pytest.raises(ValueError, match="resource='watts'"):
        create_task(net, resource='watts')


def test_widths_of_groups_are_in_the_unit_of_the_resource():
    net = tiny_supernet(img_size=16)
    low, high = MEMORY.range(net.space)
    task = create_task(net, resource='memory', group_width=f'{(high - low) / 4e3}kB')
    assert len(task.groups) == 4
    with pytest.raises(ValueError, match='group_width.*MB'):
        create_task(net, resource='memory', group_width='1ms')
