"""Networks on the meta device: created without initialization, which real ones keep."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_shiftnas.models._meta import SkipRandomInit, create_on_meta


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'test_shiftformer_supernet'])
def test_only_meta_tensors_are_not_initialized(name):
    states = []
    for context in (torch.enable_grad(), SkipRandomInit()):
        torch.manual_seed(0)
        with context:
            states.append(timm.create_model(name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    state = create_on_meta(name, device='cpu').state_dict()  # whatever device is named
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in states[0].items()}
    assert all(value.is_meta for value in state.values())


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet'])
def test_nothing_random_is_computed_on_the_meta_device(name):
    """What torch would take up to a millisecond a tensor for."""
    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__.partition('.')[0])
            return func(*args, **(kwargs or {}))

    with Recorder():
        timm.create_model(name, device='meta')
        plain = {*seen}
        seen.clear()
        create_on_meta(name)
    slow = {'normal_', 'clamp_', 'erfinv_'}
    assert plain & slow and not seen & slow and 'zero_' in seen
