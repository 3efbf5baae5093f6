"""Flags, their documentation, and config files."""
import re
from pathlib import Path

import pytest
import yaml

from timm_shiftnas.method.config import ShiftNASConfig, settings_of
from timm_shiftnas.training.flags import build_parser, dest_of, parse_args, settings_table, training_facts
from timm_shiftnas.training.setup import scaled_lr

ROOT = Path(__file__).parents[2]
OURS = {  # flags that timm's script does not have, without the group of ShiftNAS
    '--traceback', '--help', '-h', '--config', '-c', '--glyph-images', '--glyph-difficulty', '--glyph-pixels',
    '--workers', '--batch-size', '--validation-batch-size', '--skip-broken-images', '--skip-nonfinite',
    '--kd-model-path', '--dr', '--push-to-hub', '--hub-private', '--hub-revision', '--log-tensorboard', '--kd-model'}
WRONG = {  # flags, and a part of their error
    '--reprob 1.5': "--reprob: '1.5' must be a number from 0 to 1",
    '--clip-grad 0': "--clip-grad: '0' must be a number above 0",
    '--lr nan': "--lr: 'nan' must be a number of 0 or more",
    '--lr inf': "--lr: 'inf' must be",
    '--epochs 1.5': "--epochs: '1.5' must be a whole number of 1 or more",
    '--workers -1': "--workers: '-1' must be a whole number of 0 or more",
    '--crop-pct 0': "'0' must be a number above 0",
    '--smoothing 1': "'1' must be a number from 0 to below 1",
    '--cutmix-minmax 0.8 0.2': '--cutmix-minmax 0.8 0.2: give the smaller one first',
    '--loss asl --mixup 0.2': 'leave out --mixup',
    '--data-dir d --epochs 1 2': "unexpected value '2': the data is 'd' already",
    '--task classification': 'unrecognized arguments: --task',  # and not the beginning of another flag
    '--opt adamx': "no optimizer 'adamx'; choose one such as adamax, adam",
    '--sched foo': "invalid choice: 'foo' (choose from",
    '--aa rand-x9': "'rand-x9' is not an auto-augment policy",
    '--torchcompile foo': "no backend 'foo'; choose one of ",
    '--device foo': "no device 'foo'; give cpu, cuda",
    '--input-img-mode XX': "images of mode 'XX' are not read",
    '--clip-mode agc': '--clip-mode agc needs --clip-grad X',
    '--sched plateau --sched-on-updates': 'leave out --sched-on-updates',
    '--model resnet18': "'resnet18' is not a supernet; choose one of ",
    '--start-epoch 3 --epochs 3': '--start-epoch 3 must be less than --epochs',
    '--class-map /nosuch': "--class-map: there is no file '/nosuch'",
}


def test_the_docs_hold_the_table_of_settings():
    """Generated: `python -c 'from timm_shiftnas.training.flags import settings_table; print(settings_table())'`."""
    assert settings_table() in (ROOT / 'docs' / 'training.md').read_text()


def test_the_docs_name_every_flag_of_timm():
    parser = build_parser()
    own = next(group for group in parser._action_groups if group.title == 'ShiftNAS')
    there = {name for action in parser._actions if action not in own._group_actions for name in action.option_strings}
    supported, refused = (ROOT / 'docs' / 'training.md').read_text().split('\n## Flags of ShiftNAS')[0].split(
        'Not supported:')
    rows = '\n'.join(line for line in supported.splitlines() if line.startswith('|'))
    named = set(re.findall(r'`(--?[a-zA-Z-]+\*?)', rows))
    for name in named:
        found = [flag for flag in there if flag == name or name.endswith('*') and flag.startswith(name[:-1])]
        assert found, f'{name} is in the docs, but train.py does not have it'
    unnamed = {flag for flag in there - OURS if flag not in named
               and not any(name.endswith('*') and flag.startswith(name[:-1]) for name in named)}
    assert not unnamed
    left = set(re.findall(r'`(--?[a-z-]+)', '\n'.join(line for line in refused.splitlines() if line.startswith('| `'))))
    instead = {'--drop-path', '--amp', '--loss', '--opt'}  # some of their values are not supported
    assert '--sync-bn' in left and not (left & there) - instead


def test_args_yaml_reproduces_the_flags(tmp_path):
    args = parse_args([
        '--data-dir', 'd', '--torchcompile', '--group-weights', '1', '2', '--opt-kwargs', 'a=1', '--wandb-tags', 'x',
        '--resume', 'auto', '--experiment', 'e', '--sandwich', '--archs-per-step', '4',
        '--arch-per-rank', '--kd-model', 'resnet18'])
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    again = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert {**vars(again), 'config': None} == vars(args)
    (tmp_path / 'short.yaml').write_text('torchcompile: true\n')
    assert parse_args(['-c', str(tmp_path / 'short.yaml')]).torchcompile == 'inductor'


def test_a_config_of_timms_script(tmp_path, capsys):
    """Flags that do not exist here may be there if they are off."""
    path = tmp_path / 'args.yaml'
    path.write_text("aug_splits: 0\nbn_eps: null\nsplit_bn: false\ninterpolation: ''\nlr_base_scale: ''\nresume: ''\n")
    args = parse_args(['-c', str(path)])
    assert (args.interpolation, args.lr_base_scale) == ('', '')
    path.write_text(
        'bce_pos_weight: 2.0\nkd_model_name: resnet18\ntorchcompile: false\nwarmup_epochs: 5.0\ndata_dir: d\n')
    args = parse_args(['-c', str(path), 'DIR'])
    assert (args.loss_pos_weight, args.kd_model, args.torchcompile, args.warmup_epochs) == (2, 'resnet18', None, 5)
    assert args.data_dir == 'DIR'  # the command line wins
    for text, words in (('dist_bn: reduce\ntta: 3\n', "there is no flag 'dist_bn', 'tta'"),
                        ('epochs: [1, 2]\n', 'epochs must be one value, not [1, 2]'),
                        ('\udcff', 'cannot read the config')):
        path.write_text(text, errors='surrogateescape')
        with pytest.raises(SystemExit):
            parse_args(['-c', str(path)])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize('opt, scale, ratio', [
    ('adamw', '', 2), ('lookahead_lamb', '', 2), ('sgd', '', 4), ('adamw', 'linear', 4), ('sgd', 'sqrt', 2)])
def test_the_learning_rate_scales_with_the_batch(opt, scale, ratio):
    args = parse_args([
        '--opt', opt, '--lr-base-scale', scale, '--lr-base', '0.5', '--lr-base-size', '64', '-b', '32',
        '--grad-accum-steps', '4'])
    assert scaled_lr(args, processes=2) == .5 * ratio


def test_the_command_on_a_model_card_names_the_processes():
    args = parse_args([
        '--data-dir', '/secret', '--experiment', 'e', '--resume', 'auto', '--lr', '1', '--arch-per-rank'])
    command = training_facts(args, processes=4)['command']
    assert command == 'torchrun --nproc-per-node=4 train.py --arch-per-rank --lr 1'


@pytest.mark.parametrize('flags', WRONG)
def test_values_out_of_range(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(flags.split())
    assert end.value.code == 2 and WRONG[flags] in capsys.readouterr().err


def test_values_in_range():
    args = parse_args([
        '--opt', 'lookahead_AdamW', '--aa', 'rand-m9-mstd0.5-inc1', '--lr', '0', '--smoothing', '0', '--crop-pct', '1',
        '--epochs', '1e2', '--scale', '0', '1',
        '--seed', str(2 ** 32 - 1), '--input-img-mode', 'RGBA', '--decay-milestones', '3', '5'])
    assert args.opt == 'lookahead_AdamW' and args.decay_milestones == [3, 5] and args.lr == 0
    assert args.epochs == 100 and isinstance(args.epochs, int)


@pytest.mark.parametrize('argv, named', [
    ('--sandwich', '--archs-per-step 1'),
    ('--inplace-distillation', 'give --sandwich and --archs-per-step 4'),
    ('--kd-temperature 0', "'0' must be a number above 0"),
    ('--group-weights 1 2 --shift variation', '--group-weights 1.0 2.0'),
    ('--shift-interval 0', "--shift-interval: '0' must be a whole number of 1 or more"),
    ('--group-width wide', "--group-width: 'wide'"),
])
def test_errors_of_the_settings_name_flags(argv, named, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert named in capsys.readouterr().err


def test_the_defaults_of_the_settings_are_those_of_the_flags():
    args = parse_args([])
    for setting in settings_of(ShiftNASConfig):
        if setting.flag:
            value = getattr(args, dest_of(setting))
            assert (tuple(value) if isinstance(value, list) else value) == setting.default
