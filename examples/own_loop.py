"""Train a supernet in your own training loop.

    python examples/own_loop.py                   # 200 updates on random images, seconds on a CPU
    python examples/own_loop.py --updates 20
"""
import argparse

import timm
import torch

import timm_shiftnas as tsn

parser = argparse.ArgumentParser()
parser.add_argument('--updates', type=int, default=200)
args = parser.parse_args()

net = timm.create_model('test_shiftformer_supernet', num_classes=10)
# The task draws the arch of every step, and trains the generator and the distribution over budgets beside the supernet.
task = tsn.create_task(
    net, total_updates=args.updates, generator_fit_steps=200, num_groups=4, shift='hypergradient', shift_interval=10,
    shift_images=8)
optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-3)
loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(4)]  # put your own loader here

for update in range(args.updates):
    images, targets = loader[update % len(loader)]
    result = task(images, targets)
    result['loss'].backward()
    optimizer.step()
    optimizer.zero_grad()
    if update % 10 == 0:
        print(f'update {update}: loss {result["loss"]:.3f}, MACs {net.macs(result["archs"][0]):,}')

print('probability of each budget group:', [round(p, 3) for p in task.shift.probabilities.tolist()])
arch = task.generator.propose('4M')
print(f'a network of {net.macs(arch):,} MACs:', tsn.extract(net.eval(), arch).arch)
