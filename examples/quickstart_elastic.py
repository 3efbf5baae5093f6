"""Make a trained network of timm elastic, and compare its subnets with networks that were pruned and trained alone.

    pip install -e '.[quickstart]'
    python examples/quickstart_elastic.py         # two minutes on two cores; further flags go to train.py
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from timm_shiftnas.evaluation import plot_accuracy, read_budgets_csv

ROOT = Path(__file__).parents[1]
parser = argparse.ArgumentParser()
parser.add_argument('--output', type=Path, default=Path('output'))
args, flags = parser.parse_known_args()
base, folder = args.output / 'quickstart_elastic_base', args.output / 'quickstart_elastic'


def command(script, config, *more):
    return [sys.executable, ROOT / script, '-c', ROOT / 'configs' / config, '--output', args.output, *more, *flags]


# 1. A plain ViT of timm learns letters.
subprocess.run(command('train.py', 'quickstart_elastic_base.yaml'), check=True)
# 2. It becomes elastic, and all its subnets are adapted together;
weights = '--pretrained-path', base / 'model' / 'model.safetensors'
run = subprocess.Popen(command('train.py', 'quickstart_elastic.yaml', *weights))
# 3. meanwhile, the same archs are pruned out of it, and each is trained alone with as many steps.
subnets = 'benchmarks/train_subnet.py', 'quickstart_elastic.yaml'
alone = subprocess.Popen(command(*subnets, *weights, '--results-file', base / 'alone.json'))
if run.wait() or alone.wait():
    sys.exit(1)
adapted, before = (read_budgets_csv(folder / f'{name}.csv') for name in ('budgets', 'before'))
pruned = [dict(row, name=f'group {row["group"]}') for row in json.loads((base / 'alone.json').read_text())]
plot_accuracy(folder / 'accuracy.png', adapted, {'before (largest: the base)': before, 'pruned, each alone': pruned})
print(f'the base: {before[-1]["top1"]:.1f}', 'MACs      before  adapted  alone', sep='\n')
for was, row, other in zip(before[1:-1], adapted[1:-1], pruned, strict=True):
    print(f'{row["macs"]:9,} {was["top1"]:6.1f} {row["top1"]:8.1f} {other["top1"]:6.1f}')
