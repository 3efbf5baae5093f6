"""A supernet whose accuracy at every arch is known, and the images to measure it on."""
import itertools

import torch
from torch import nn

from timm_shiftnas import shiftformer_space
from timm_shiftnas.space import Supernet, macs

GEOMETRY = dict(
    img_size=(32, 32), patch_size=(8, 8), in_chans=3, num_classes=2, class_token=True, no_embed_class=False,
    pos_embed=True, relative_position=False, max_relative_position=3, qkv_bias=True, proj_bias=True, final_norm=True,
    global_pool='avg')
IMAGES = 200


def toy_space(depth=(1, 2), num_heads=(1, 2, 3)):
    return shiftformer_space(
        embed_dim=(32, 48, 64), depth=depth, num_heads=num_heads, mlp_ratio=(1., 2., 3.)).bind(**GEOMETRY)


class Toy(Supernet, nn.Module):
    """Classifies image number i correctly exactly if i is below `quality(arch)`: top-1 is its share of the images."""

    def __init__(self, space=None):
        super().__init__()
        self.toy_space = space or toy_space()
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def space(self):
        return self.toy_space

    def quality(self, arch):
        """Wide MLPs pay in every layer, heads pay in the first one alone, and a wide stream pays nothing."""
        return 40 + round(20 * sum(arch.mlp_ratio)) + 10 * arch.num_heads[0] - arch.embed_dim // 16

    def forward(self, x, arch=None):
        right = (x[:, 0, 0, 0] < self.quality(arch or self.space.largest)).float() * self.scale
        return torch.stack([right, 1 - right, -right - 1, -right - 1, -right - 1], 1)


def numbered_images():
    """Batches of the images, which are their numbers; all have class 0."""
    numbers = torch.arange(IMAGES).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in numbers.split(64)]


def all_archs(space):
    """Every arch of a space, once."""
    indices = itertools.product(*(range(len(choice.values)) for choice in space.choices))
    return list(dict.fromkeys(map(space.decode, indices)))


def true_front(net, within=lambda arch: True, cost=macs):
    """Pairs (cost, top-1) that no other arch is at least as good as, by comparing all pairs."""
    archs = filter(within, all_archs(net.space))
    points = {(cost(net.space, arch), 100 * net.quality(arch) / IMAGES) for arch in archs}
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))
