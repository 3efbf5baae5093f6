"""Flags against what the docs say of them."""
import re
from pathlib import Path

from timm_shiftnas.flags import build_parser, parse_args, training_facts

ROOT = Path(__file__).parents[1]
OURS = {  # flags that timm's script does not have, outside the group of ShiftNAS' own
    '--traceback', '--help', '-h', '--config', '-c', '--glyph-images', '--glyph-difficulty', '--glyph-pixels',
    '--workers', '--batch-size', '--validation-batch-size', '--skip-broken-images', '--skip-nonfinite', '--kd-model-path', '--dr',
    '--push-to-hub', '--hub-private', '--hub-revision', '--log-tensorboard', '--kd-model'}


def test_the_table_names_every_flag_of_timm_that_is_here():
    parser = build_parser()
    own = next(group for group in parser._action_groups if group.title == 'ShiftNAS')
    there = {name for action in parser._actions if action not in own._group_actions for name in action.option_strings}
    supported, refused = (ROOT / 'docs' / 'training.md').read_text().split('\n## Several')[0].split('Not supported:')
    rows = '\n'.join(line for line in supported.splitlines() if line.startswith('|'))
    named = set(re.findall(r'`(--?[a-zA-Z-]+\*?)', rows))
    for name in named:
        found = [flag for flag in there if flag == name or name.endswith('*') and flag.startswith(name[:-1])]
        assert found, f'{name} is in the table, and not in train.py'
    unnamed = {flag for flag in there - OURS if flag not in named
               and not any(name.endswith('*') and flag.startswith(name[:-1]) for name in named)}
    assert not unnamed
    left = set(re.findall(r'`(--?[a-z-]+)', '\n'.join(line for line in refused.splitlines() if line.startswith('| `'))))
    assert '--sync-bn' in left and not {name for name in left & there if name not in ('--drop-path', '--amp')}


def test_a_config_of_every_flag_gives_its_values_back(tmp_path):
    import yaml
    args = parse_args([
        '--data-dir', 'd', '--torchcompile', '--group-weights', '1', '2', '--opt-kwargs', 'a=1', '--wandb-tags', 'x',
        '--resume', 'auto', '--experiment', 'e', '--sandwich', '--arch-per-rank', '--kd-model', 'resnet18'])
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    again = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert {**vars(again), 'config': None} == vars(args)
    (tmp_path / 'short.yaml').write_text('torchcompile: true\n')
    assert parse_args(['-c', str(tmp_path / 'short.yaml')]).torchcompile == 'inductor'


def test_the_command_on_a_card_says_how_many_processes():
    args = parse_args([
        '--data-dir', '/secret', '--experiment', 'e', '--resume', 'auto', '--lr', '1', '--arch-per-rank'])
    command = training_facts(args, processes=4)['command']
    assert command == 'torchrun --nproc-per-node=4 train.py --arch-per-rank --lr 1'
