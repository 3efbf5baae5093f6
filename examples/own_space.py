"""Define a search space, build its supernet, and take a network for each of three budgets out of it.

    python examples/own_space.py                  # seconds on a CPU; no images are needed
    python examples/own_space.py --fit-steps 50   # faster, but budgets are met less closely
"""
import argparse

import timm
import torch

import timm_shiftnas as tsn

parser = argparse.ArgumentParser()
parser.add_argument('--fit-steps', type=int, default=500, help='steps that fit the generator to budgets')
args = parser.parse_args()

# A space is data: the values that each choice may take, smallest first.
space = tsn.shiftformer_space(
    embed_dim=(64, 96, 128),  # token width
    depth=(3, 4, 5),  # number of layers
    num_heads=(1, 2),  # in each layer
    mlp_ratio=(2.0, 3.0, 4.0),  # in each layer
)
net = timm.create_model(
    'shiftformer_supernet', space=space, img_size=64, patch_size=16, max_relative_position=3, num_classes=10).eval()
low, high = tsn.macs(net.space, net.space.smallest), tsn.macs(net.space, net.space.largest)
print(f'{net.space.size:,} networks with {low:,} to {high:,} MACs')

# The generator maps a budget to an arch. It learns that from MACs alone, without images.
generator = tsn.ArchitectureGenerator(net.space).fit(steps=args.fit_steps)
for budget in (low, (low + high) // 2, high):
    arch = generator.propose(budget)
    sub = tsn.extract(net, arch)  # a static network with its own copy of the weights
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(sub(image), net(image, arch), atol=1e-5)
    print(f'budget {budget:,}: {net.macs(arch):,} MACs, {net.params(arch):,} parameters, {arch}')
