"""The task trains any network around an elastic backbone, with any loss."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.networks import rng
from torch import nn

import timm_shiftnas as tsn
from timm_shiftnas.layers import PrefixConv2d
from timm_shiftnas.method.distillation import divergence
from timm_shiftnas.method.generator import generator_loss
from timm_shiftnas.method.signals import frozen, hypergradient
from timm_shiftnas.space import arch_masks


class Colours(nn.Module):
    """Two properties of an image, as a dict with their confidence."""

    def __init__(self, backbone, norm):
        super().__init__()
        self.backbone, self.norm = backbone, norm
        self.read, self.head = PrefixConv2d(backbone.feature_info.channels()[-1], 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        output = self.head(self.norm(self.read(self.backbone(x)[-1])).relu().mean((2, 3)))
        return dict(colour=output[:, :2], confidence=output[:, 2])


def loss(output, targets):
    return F.smooth_l1_loss(output['colour'], targets) + output['confidence'].square().mean()


def batch(count=16, seed=0):
    """Noise around colours, and their red and green."""
    colours = torch.rand(count, 3, generator=rng(seed)) * 2 - 1
    return colours[:, :, None, None] + .1 * torch.randn(count, 3, 32, 32, generator=rng(seed + 100)), colours[:, :2]


def create(norm=nn.Identity, **settings):
    torch.manual_seed(0)
    net = timm.create_model('test_shiftformer_supernet', space=tsn.shiftformer_space((16, 32), (1, 2), (1, 2), (1, 2)))
    model = tsn.ElasticModel(Colours(tsn.ElasticBackbone(net, 1, norm=True), norm()))
    return model, tsn.create_task(
        model, loss, held_out_loss=loss, num_groups=2, generator_fit_steps=20, total_updates=30, **settings)


def test_measurements_leave_a_batch_norm_of_the_head_as_it_is():
    norms = []
    for settings in (dict(generator_interval=0), dict(generator_interval=1, shift='hypergradient', shift_interval=1)):
        model, task = create(lambda: nn.BatchNorm2d(8), shift_images=4, archs_per_step=3, sandwich=True, **settings)
        for update in range(2):
            task(*batch(seed=update))['loss'].backward()
            task.end_update()
        norms.append(model.network.norm)
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked > 0


@pytest.mark.slow
def test_it_learns_a_loss_of_its_own_at_every_arch():
    model, task = create(
        shift='hypergradient', shift_interval=5, shift_images=8, generator_interval=4, warmup_updates=2)
    archs, held_out = [model.space.smallest, model.space.sample(rng()), model.space.largest], batch(64, seed=999)
    before = [loss(model(held_out[0], arch), held_out[1]).item() for arch in archs]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for update in range(20):
        result = task(*batch(seed=update))
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.update == 20 and len(task.history) == 4 and set(result['output']) == {'colour', 'confidence'}
    for arch, start in zip(archs, before, strict=True):
        assert loss(model(held_out[0], arch), held_out[1]) < .8 * start


def test_the_shift_measures_the_loss_of_the_user():
    model, task = create(shift='hypergradient', shift_interval=5, shift_images=8)
    train, held_out = batch(8, seed=1), batch(8, seed=2)
    task.sampler.shift_batches = lambda number: (train, held_out)
    scores = task.sampler.shift_scores(task._step(*train))
    archs = task.generator.propose_many(task.groups.budgets)
    parts = [tuple(each[k::2] for each in held_out) for k in range(2)]
    with frozen(model):
        expected = hypergradient(model, lambda arch, each: loss(model(each[0], arch), each[1]), archs, train, parts)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)
    assert (scores != 0).all()


def test_the_generator_learns_through_the_head():
    """Its step is that of the gradient of the loss of the whole masked network."""
    model, task = create(shift='none', generator_interval=4, generator_lr=1e-3)
    x, y = batch()
    task(x, y)  # fits the generator, and takes its first step
    task._update = 4
    before, losses = copy.deepcopy(task.generator), []

    def watched(output, targets):
        losses.append(loss(output, targets))
        return losses[-1]

    task.criterion = watched
    task.sampler.update_generator(task._step(x, y))
    masked, = losses
    assert masked.requires_grad
    assert any(not torch.equal(*pair) for pair in zip(before.parameters(), task.generator.parameters(), strict=True))
    one_hots = [one_hot.requires_grad_() for one_hot in model.space.one_hot(model.space.smallest)]
    task_loss = loss(model(x, arch_masks(model.space, one_hots)), y)
    total = generator_loss(task_loss, torch.zeros(()), 1.)
    gradient = torch.autograd.grad(total, one_hots[0])[0]
    with torch.no_grad():  # a finite difference in the share of the larger width
        moved = [one_hot.clone() for one_hot in one_hots]
        moved[0][1] += 1e-4
        difference = loss(model(x, arch_masks(model.space, moved)), y) - task_loss
    torch.testing.assert_close(gradient[1].float(), difference / 1e-4, rtol=.05, atol=1e-3)
    assert gradient[1] != 0


def test_distillation_of_other_outputs_than_logits_is_refused():
    model, task = create(shift='none', sandwich=True, archs_per_step=3, inplace_distillation=True)
    with pytest.raises(ValueError, match='inplace_distillation'):
        task(*batch())
    with pytest.raises(ValueError, match=r'\[2, 3, 4, 4\]'):
        divergence(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
