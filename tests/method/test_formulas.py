"""Each formula of ShiftNAS against a closed form."""
import doctest

import pytest
import torch
from torch import nn

from timm_shiftnas.method import (
    generator,
    generator_loss,
    grad_norm,
    group_probabilities,
    held_out_losses,
    hypergradient,
    proportional_theta,
    resource_loss,
    shift_step,
    variation,
)
from timm_shiftnas.space import arch_masks, shiftformer_space

SPACE = shiftformer_space(embed_dim=(32, 48, 64), depth=(1, 2), num_heads=(1, 2, 3), mlp_ratio=(1., 2.))
ARCH = SPACE.arch(embed_dim=48, depth=1, num_heads=2, mlp_ratio=1.)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- matrix mapping ----------------------------------------------------------------------------------------------------


def test_matrix_mapping_makes_nested_masks():
    masks = arch_masks(SPACE, SPACE.one_hot(ARCH))
    assert masks.embed_dim.tolist() == [1.] * 48 + [0.] * 16
    assert masks.num_heads[0].tolist() == [1., 1., 0.] and masks.depth.tolist() == [1., 0.]


def test_matrix_mapping_gives_choices_a_gradient():
    one_hots = [one_hot.requires_grad_() for one_hot in SPACE.one_hot(ARCH)]
    channels = arch_masks(SPACE, one_hots).embed_dim.sum()
    assert torch.autograd.grad(channels, one_hots[0])[0].tolist() == [32., 48., 64.]


# -- generator loss ----------------------------------------------------------------------------------------------------


def test_resource_loss_is_the_squared_error_relative_to_the_range():
    loss = resource_loss(vector(12., 17.), vector(14., 14.), 10, 20)
    assert loss.item() == pytest.approx((.2 ** 2 + .3 ** 2) / 2)
    assert resource_loss(vector(5.), vector(5.), 5, 5) == 0  # a space of one arch


def test_generator_loss_adds_lambda_times_the_resource_loss():
    assert generator_loss(torch.tensor(2.), torch.tensor(.5), weight=10.) == 7


# -- probability shift -------------------------------------------------------------------------------------------------


def test_p_is_the_softmax_of_theta_above_a_floor():
    torch.testing.assert_close(group_probabilities(vector(1., 3.).log(), floor=.2), vector(.3, .7))


def test_shift_moves_theta_towards_groups_with_higher_scores():
    theta = shift_step(vector(0., 1.), vector(.5, .5), scores=vector(1., 3.), noise=2., lr=.1)
    torch.testing.assert_close(theta, vector(-.05, .95))  # the advantages are -0.5 and 0.5


def test_shift_bounds_advantages_at_three_times_the_noise():
    theta = shift_step(vector(0., 0.), vector(.5, .5), scores=vector(0., 100.), noise=1., lr=.1)
    torch.testing.assert_close(theta, vector(-.3, .3))


def test_sizes_give_proportional_probabilities():
    theta = proportional_theta(vector(1., 2., 5.))
    torch.testing.assert_close(theta.softmax(0), vector(.125, .25, .625))
    assert abs(theta.sum().item()) < 1e-12


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def net():
    """Four weights of 1; the loss of arch a on a target t has the gradient a * (1 - t) for each of them."""
    net = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(net.weight)
    net.loss = lambda arch, target: arch * (net.weight - target).square().sum() / 2
    return net


def test_hypergradient_is_the_inner_product_of_held_out_and_training_gradients(net):
    scores = hypergradient(net, net.loss, archs=[1., 3.], train=5., held_out=2.)
    # The held-out gradients are -1 and -3, with mean -2; the training gradients are -4 and -12; there are 4 weights.
    torch.testing.assert_close(scores, vector(4 * 2 * 4., 4 * 2 * 12.))


def test_grad_norm_is_the_root_mean_square_of_the_held_out_gradient(net):
    torch.testing.assert_close(grad_norm(net, net.loss, archs=[1., 3.], held_out=2.), vector(1., 3.))


def test_variation_is_the_relative_change_of_the_held_out_loss(net):
    assert held_out_losses(net.loss, archs=[1., 3.], held_out=2.).tolist() == [2., 6.]
    assert variation(vector(2., 4.), before=vector(1., 5.)).tolist() == [.5, .25]


# -- examples ----------------------------------------------------------------------------------------------------------


def test_the_example_of_propose():
    results = doctest.testmod(generator)
    assert results.attempted and not results.failed
