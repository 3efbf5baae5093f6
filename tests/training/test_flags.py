"""Flags, their documentation, and config files."""
import re
from pathlib import Path

import pytest
import yaml

from timm_shiftnas.method.config import ShiftNASConfig, settings_of
from timm_shiftnas.training.flags import build_parser, dest_of, parse_args, settings_table, training_facts
from timm_shiftnas.training.setup import scaled_lr
from timm_shiftnas.training.timm_flags import TIMM_ONLY, OnlyDefault

ROOT = Path(__file__).parents[2]
OURS = {  # flags that timm's script does not have, without the group of ShiftNAS
    '--traceback', '--help', '-h', '--config', '-c', '--glyph-images', '--glyph-difficulty', '--glyph-pixels',
    '--workers', '--batch-size', '--validation-batch-size', '--skip-broken-images', '--skip-nonfinite', '--freeze',
    '--kd-model-path', '--dr', '--push-to-hub', '--hub-private', '--hub-revision', '--log-tensorboard', '--kd-model',
    '--elastic', '--elastic-sort'}
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
    '--model resnet18': "'resnet18' is not a network of timm_shiftnas; choose one of attentivenas_supernet",
    '--model local-dir:/nosuch': "'local-dir:/nosuch' is not",
    '--opt-kwargs lr': "--opt-kwargs: 'lr' must be NAME=VALUE",
    '--opt-kwargs =3': "--opt-kwargs: '=3' must be NAME=VALUE",
    '--model-kwargs a=1 a=2': "--model-kwargs: 'a' is given twice",
    '--dist-bn broadcast': "--dist-bn: this flag of timm is not supported (docs/training.md says why); leave it out, "
                           "or give timm's default, 'reduce'",
    '--sync-bn': '--sync-bn: this flag of timm is not supported',
    '--bn-momentum 0.1': '--bn-momentum: this flag of timm is not supported (docs/training.md says why); leave it out',
    '--output ~nosuchuser/x': "'~nosuchuser/x': there is no home directory '~nosuchuser'",
    '--start-epoch 3 --epochs 3': '--start-epoch 3 must be less than --epochs',
    '--class-map /nosuch': "--class-map: there is no file '/nosuch'",
}


def test_the_docs_hold_the_table_of_settings():
    """Generated: `python -c 'from timm_shiftnas.training.flags import settings_table; print(settings_table())'`."""
    assert settings_table() in (ROOT / 'docs' / 'training.md').read_text()


def test_the_docs_name_every_flag_of_timm():
    parser = build_parser()
    own = next(group for group in parser._action_groups if group.title == 'ShiftNAS')
    there = {name for action in parser._actions if action not in own._group_actions for name in action.option_strings
             if not isinstance(action, OnlyDefault)}
    supported, refused = (ROOT / 'docs' / 'training.md').read_text().split('\n## Flags of ShiftNAS')[0].split(
        '\nNot supported')
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
    for name in {name.replace('_', '-') for name in TIMM_ONLY} - {'local-rank'}:
        assert f'--{name}' in left or name.startswith(('naflex-', 'train-size-')), name


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
    for text, words in (('eval_crop: 3\nbn: x\n', "there is no flag 'eval_crop', 'bn'"),
                        ('dist_bn: broadcast\n', "give timm's default, 'reduce'"),
                        ('tta: 3\n', '--tta: this flag of timm is not supported'),
                        ('split_bn: true\n', '--split-bn: this flag of timm is not supported'),
                        ('epochs: [1, 2]\n', 'epochs must be one value, in quotes if YAML reads'),
                        ('\udcff', '--config: cannot read')):
        path.write_text(text, errors='surrogateescape')
        with pytest.raises(SystemExit):
            parse_args(['-c', str(path)])
        assert words in capsys.readouterr().err


# What `args.yaml` of timm's script holds if no flag is given (timm 1.0.31).
TIMMS_DEFAULTS = """
aa: null
amp: false
amp_dtype: float16
aug_repeats: 0
aug_splits: 0
batch_size: 128
bce_loss: false
bce_pos_weight: null
bce_sum: false
bce_target_thresh: null
bn_eps: null
bn_momentum: null
channels_last: false
checkpoint_hist: 10
class_map: ''
clip_grad: null
clip_mode: norm
color_jitter: 0.4
color_jitter_prob: null
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: null
data_dir: null
dataset: ''
dataset_download: false
dataset_trust_remote_code: false
decay_epochs: 90
decay_milestones:
- 90
- 180
- 270
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
distill_loss_weight: null
drop: 0.0
drop_block: null
drop_connect: null
drop_path: null
epoch_repeats: 0.0
epochs: 300
eval_metric: top1
experiment: ''
fast_norm: false
fuser: ''
gaussian_blur_prob: null
gp: null
grad_accum_steps: 1
grad_checkpointing: false
grayscale_prob: null
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_img_mode: null
input_key: null
input_size: null
interpolation: ''
jsd_loss: false
kd_distill_type: logit
kd_loss_type: kl
kd_model_name: null
kd_student_feature_dim: null
kd_teacher_feature_dim: null
kd_temperature: 4.0
kd_token_distill_type: soft
layer_decay: null
layer_decay_min_scale: 0
layer_decay_no_opt_scale: null
local_rank: 0
log_interval: 50
log_wandb: false
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
lr_cycle_decay: 0.5
lr_cycle_limit: 1
lr_cycle_mul: 1.0
lr_k_decay: 1.0
lr_noise: null
lr_noise_pct: 0.67
lr_noise_std: 1.0
mean: null
min_lr: 0
mixup: 0.0
mixup_mode: batch
mixup_off_epoch: 0
mixup_prob: 1.0
mixup_switch_prob: 0.5
model: resnet50
model_dtype: null
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_ema_warmup: false
model_kwargs: {}
momentum: 0.9
naflex_loader: false
naflex_loss_scale: linear
naflex_max_seq_len: 576
naflex_patch_size_probs: null
naflex_patch_sizes: null
naflex_patchify_channels_first: false
naflex_train_seq_lens:
- 128
- 256
- 576
- 784
- 1024
no_aug: false
no_ddp_bb: false
no_prefetcher: false
no_resume_opt: false
num_classes: null
opt: sgd
opt_betas: null
opt_eps: null
opt_kwargs: {}
output: ''
patience_epochs: 10
pin_mem: false
pretrained: false
pretrained_path: null
ratio:
- 0.75
- 1.3333333333333333
recount: 1
recovery_interval: 0
remode: pixel
reprob: 0.0
resplit: false
resume: ''
save_images: false
scale:
- 0.08
- 1.0
sched: cosine
sched_on_updates: false
seed: 42
smoothing: 0.1
split_bn: false
start_epoch: null
std: null
sync_bn: false
synchronize_step: false
target_key: null
task_loss_weight: null
torchcompile: null
torchcompile_mode: null
torchscript: false
train_batch_sizes: null
train_batches_per_epoch: null
train_crop_mode: null
train_img_sizes: null
train_interpolation: random
train_num_samples: null
train_size_probs: null
train_size_random_mix: 0.1
train_size_schedule: constant
train_size_schedule_spread: 0.65
train_split: train
tta: 0
use_multi_epochs_loader: false
val_interval: 1
val_num_samples: null
val_split: validation
validation_batch_size: null
variable_batch_loss_scale: none
vflip: 0.0
wandb_project: null
wandb_resume_id: ''
wandb_tags: []
warmup_epochs: 5
warmup_lr: 1.0e-05
warmup_prefix: false
weight_decay: 2.0e-05
worker_seeding: all
workers: 4
"""


def test_all_defaults_of_timms_script_are_accepted_and_kept(tmp_path):
    """The model is named on the command line, which wins over the file's even if that does not exist here."""
    path = tmp_path / 'args.yaml'
    path.write_text(TIMMS_DEFAULTS)
    given = yaml.safe_load(TIMMS_DEFAULTS)
    args = vars(parse_args(['-c', str(path), '--model', 'test_shiftformer_supernet', '--device', 'cpu', 'DIR']))
    assert (args['model'], args['data_dir'], args['output']) == ('test_shiftformer_supernet', 'DIR', './output')
    renamed = dict(bce_pos_weight='loss_pos_weight', kd_model_name='kd_model')
    replaced = {'model', 'device', 'data', 'data_dir', 'output'}
    for name, value in given.items():
        if value is not None and name not in replaced and name not in TIMM_ONLY:
            assert args[renamed.get(name, name)] == value, name
    assert {name: given[name] for name in TIMM_ONLY if name in given} == {
        name: only for name, only in TIMM_ONLY.items() if name in given}


@pytest.mark.parametrize('flags, expected', [
    # a MobileNet with RMSprop
    ('DIR --model shiftmobilenet_supernet -b 128 --sched step --epochs 450 --decay-epochs 2.4 --decay-rate .97 '
     '--opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 --drop 0.2 --drop-path 0.2 --model-ema '
     '--model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel --reprob 0.2 --amp --lr .064 --lr-noise 0.42 0.9 '
     '--dist-bn reduce --worker-seeding all', dict(opt='rmsproptf', decay_epochs=2.4, lr_noise=[.42, .9])),
    # LAMB and binary cross-entropy
    ('--data-dir DIR --model ofa_mobilenetv3_supernet --amp --channels-last --opt lamb --lr 5e-3 --weight-decay .02 '
     '--epochs 300 --sched cosine --warmup-epochs 5 --warmup-lr 1e-4 --min-lr 1e-6 --bce-loss --bce-target-thresh 0.2 '
     '--smoothing 0 --aa rand-m7-mstd0.5-inc1 --mixup 0.1 --cutmix 1.0 --crop-pct 0.95 --aug-splits 0 --tta 0 '
     '--checkpoint-hist 5 --pin-mem --log-wandb --local_rank 0', dict(opt='lamb', bce_loss=True, min_lr=1e-6)),
    # a vision transformer with AdamW
    ('--data-dir DIR --model shiftformer_small_supernet --opt adamw --lr 1e-3 --weight-decay .05 --epochs 300 '
     '--warmup-epochs 20 --cooldown-epochs 10 --clip-grad 1 --layer-decay .75 --opt-betas 0.9 0.999 --mixup .8 '
     '--cutmix 1 --aug-repeats 3 --reprob .25 --drop-path .1 --train-interpolation bicubic --no-ddp-bb --img-size 224 '
     '--opt-kwargs foreach=true --naflex-train-seq-lens 128 256 576 784 1024 --amp-impl native',
     dict(opt_betas=[.9, .999], layer_decay=.75, opt_kwargs=dict(foreach=True))),
])
def test_recipes_of_timms_script(flags, expected):
    args = vars(parse_args(flags.split()))
    assert {name: args[name] for name in expected} == expected and args['data_dir'] == 'DIR'


@pytest.mark.parametrize('content, words', [
    ('epochs: 2\nlr: 1\nepochs: 3\n', "'epochs' appears twice; remove one of the lines"),
    ('batch-size: 2\nbatch_size: 2\n', 'batch-size and batch_size are the same flag'),
    ('model_kwargs:\n  depth: 1\n  depth: 2\n', "'depth' appears twice"),
    ('model_kwargs: 3\n', 'model_kwargs must be NAME: VALUE pairs, not 3'),
    ('opt_kwargs: lr\n', "opt_kwargs must be NAME: VALUE pairs, not 'lr'"),
    ('opt_kwargs: [lr]\n', "opt_kwargs must be NAME: VALUE pairs, not ['lr']"),
    ('experiment: {a: 1}\n', "experiment must be one value, in quotes if YAML reads it as another type, not {'a': 1}"),
    ('experiment: no\n', 'experiment must be one value, in quotes if YAML reads it as another type, not False'),
    ('amp: 1\n', 'amp must be true or false, not 1'),
    ('3: 4\n', 'there is no flag 3'),
    ('[a]\n', 'must hold "name: value" lines'),
    ('? [a]\n: 1\n', '--config: cannot read'),
])
def test_a_config_file_whose_lines_have_no_clear_meaning(tmp_path, capsys, content, words):
    (tmp_path / 'c.yaml').write_text(content)
    with pytest.raises(SystemExit) as end:
        parse_args(['-c', str(tmp_path / 'c.yaml')])
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count('\n') == 1


def test_merged_keys_and_texts_that_look_like_numbers(tmp_path):
    (tmp_path / 'c.yaml').write_text(
        "model_kwargs: &a {depth: 1, name: '1'}\nopt_kwargs: {<<: *a, depth: 2, fused: false}\n")
    args = parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert args.model_kwargs == dict(depth=1, name='1')
    assert args.opt_kwargs == dict(depth=2, name='1', fused=False)


def test_an_argument_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(['--lr', 'x\ny'], 'train.py')
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "train.py: error: argument --lr: 'x\\ny' must be a number of 0 or more (see train.py --help)\n")


def test_the_tilde_is_the_home_directory_in_flags_and_files(tmp_path, monkeypatch):
    """Shells do not expand it in --output=~/x, and nobody does in YAML."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'map.txt').write_text('a\n')
    (tmp_path / 'c.yaml').write_text(
        'output: ~/runs\ndata_dir: ~/images\nclass_map: ~/map.txt\ninitial_checkpoint: ~/map.txt\nexperiment: ~/e\n')
    args = parse_args(['-c', '~/c.yaml'])
    names = dict(output='runs', data_dir='images', class_map='map.txt', initial_checkpoint='map.txt', experiment='e')
    assert {name: getattr(args, name) for name in names} == {
        name: f'{tmp_path}/{value}' for name, value in names.items()}
    args = parse_args(['--output=~/x', '--kd-model=local-dir:~/m', '--kd-model-path=~/map.txt',
                       '--pretrained-path=~/map.txt', '--resume=~/last.pth.tar', '--model=local-dir:~', '~/positional'])
    assert args.output == f'{tmp_path}/x' and args.data_dir == f'{tmp_path}/positional'
    assert args.kd_model == f'local-dir:{tmp_path}/m'
    assert args.kd_model_path == args.pretrained_path == f'{tmp_path}/map.txt'
    assert args.resume == f'{tmp_path}/last.pth.tar' and args.model == f'local-dir:{tmp_path}'
    assert parse_args(['--output', '']).output == './output'


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
            if setting.name != 'shift':  # decided when the data is open
                assert (tuple(value) if isinstance(value, list) else value) == setting.default
