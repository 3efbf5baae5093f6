"""Random numbers, random weights and small networks."""
import timm
import torch


def rng(seed=0):
    """A random generator of its own."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def perturb(net, std=.1):
    """Move all parameters off their initial values, in place, so that none is zero or one."""
    for parameter in net.parameters():
        parameter.add_(std * torch.randn_like(parameter))
    return net


def images(net, batch=2, seed=1):
    """Random images [batch, C, H, W] of a vision transformer's size, in the dtype of its weights."""
    size = (batch, net.in_chans, *net.patch_embed.img_size)
    return torch.randn(size, generator=rng(seed)).to(next(net.parameters()).dtype)


def tiny_supernet(name='test_shiftformer_supernet', seed=0, num_classes=10, **kwargs):
    """A supernet of seconds, in evaluation mode."""
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()
