"""MACs as torch counts them: an independent path to `net.macs`."""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted_macs(model, images):
    """MACs of the convolutions and matrix products that run for a batch of one image.

    Attention runs as plain matrix products: the counter of torch 2.14 does not see the fused kernel of the CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() // 2
