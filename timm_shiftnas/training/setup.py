"""Creation of a run from its flags: processes, model, task, optimizer, precision."""
from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import distribute_bn, random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..hub.load import SavedModel
from ..method.config import ShiftNASConfig, settings_of
from ..method.distillation import Teacher
from ..method.generator import ArchitectureGenerator
from ..method.groups import BudgetGroups
from ..method.network import NetworkTask
from ..method.task import ShiftNASTask, load_task_ema_checkpoint
from ..models import bound_space, static_counts
from ..models._checkpoint import OtherClasses
from ..models.calibration import has_batch_norm
from ..models.subnet import describe_images
from ..space import family_of, is_supernet
from ..utils.distributed import Ranks
from ..utils.paths import expand_home
from ..utils.run_files import MODEL
from ..utils.text import one_line
from ..utils.units import format_count
from .checkpoints import Position, find_checkpoint, read_checkpoint, report_head, resume
from .data import Data, Loaders, create_loaders, image_mode, open_data, uses_mixup, without_useless_shift
from .elastic import elastic_network
from .flags import dest_of, reset_supernet_flags
from .schedule import Schedule
from .timm_flags import BACKBONE, NO_TEACHER, names_subnet, saved_at

__all__ = ['Run', 'create_network', 'create_run', 'scaled_lr']

_logger = logging.getLogger('train')


class LossScaler(torch.amp.GradScaler):
    """torch's loss scaler, with the name that it has in timm's checkpoints."""
    state_dict_key = 'amp_scaler'


@dataclass
class Run:
    """All parts of a run.

    Args:
        args: The flags, completed by derived values: number of classes, learning rate, checkpoint to resume from.
        output: Folder of the run.
        supernet: Whether a supernet is trained, or one network.
        starts_trained: Whether the largest subnet knows these classes before training.
        held_norms: BatchNorms whose running statistics stay as they are.
        start: Where training starts, after the checkpoint was loaded.
    """
    args: argparse.Namespace
    output: Path
    device: torch.device
    ranks: Ranks
    net: nn.Module
    supernet: bool
    starts_trained: bool
    held_norms: list[nn.Module]
    data_config: dict[str, Any]
    loaders: Loaders
    task: ShiftNASTask | NetworkTask
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], Any]
    scaler: LossScaler | None
    schedule: Schedule
    start: Position

    def train_mode(self) -> None:
        """Put the network in training mode, without the statistics of frozen modules."""
        self.task.get_trainable_module().train()
        for norm in self.held_norms:
            norm.eval()

    def share_statistics(self) -> None:
        """Give all processes the mean of their running BatchNorm statistics, with which one network is evaluated."""
        if not self.supernet and self.ranks.size > 1:
            for module in (self.net, self.task.get_trainable_module(ema=True)):
                if module is not None:
                    distribute_bn(module, self.ranks.size, reduce=True)


def create_run(flags: argparse.Namespace) -> Run:
    """Create everything that a run needs, and load the checkpoint that it resumes from. Writes no file.

    Raises:
        ValueError: If the flags do not fit together, or to the data or the checkpoint.
    """
    args = argparse.Namespace(**vars(flags))  # a copy, completed below
    device, ranks = init_process(args)
    output = Path(ranks.gather(output_dir(args))[0])  # the name holds a time: that of the first process
    args.resume = find_checkpoint(args, output, ranks)
    saved = open_saved_model(args)
    supernet = not names_subnet(args.model) if saved is None else saved.kind == 'supernet'
    if not supernet:
        reset_supernet_flags(args)
    elif args.shift is None and args.resume:  # runs of earlier versions had another default
        args.shift = read_checkpoint(args.resume)['task_state'].get('shift', {}).get('signal')
    data = open_data(args)
    args.num_classes = choose_num_classes(args, data)
    if args.elastic is None:
        net, teacher, knows_classes = create_network(args, device), args.kd_model, False
    else:
        net, teacher, knows_classes = create_elastic(args, data, device, ranks)
    groups = BudgetGroups.of_settings(net.space, args, '--group-width') if supernet else None
    if groups is not None:
        data = without_useless_shift(args, data, len(groups))
    describe_images(net, data.class_names, image_mode(args), not args.ignore_exif_orientation)
    held_norms = freeze(args, net)
    args.num_classes, args.lr = net.num_classes, scaled_lr(args, ranks.size)
    config = create_data_config(args, net)
    loaders = create_loaders(args, data, config, device, ranks, calibrated=supernet and has_batch_norm(net))
    updates = -(-len(loaders.train) // args.grad_accum_steps)
    task = create_task(args, net, groups, loaders, updates, config, device, teacher)
    optimizer = create_optimizer(args, net)
    autocast = partial(
        torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else nullcontext
    scaler = LossScaler(device.type) if args.amp and args.amp_dtype == 'float16' else None
    start = resume(args, task, optimizer, scaler, ranks) if args.resume else Position(0)
    if args.start_epoch is not None:
        start = Position(args.start_epoch)
    prepare_task(args, task, device, ranks)
    schedule = Schedule(args, optimizer, updates)
    schedule.step(start.epoch, start.batch // args.grad_accum_steps if args.sched_on_updates else 0)
    return Run(
        args, output, device, ranks, net, supernet, knows_classes and not args.resume, held_norms, config, loaders,
        task, optimizer, autocast, scaler, schedule, start)


def init_process(args: argparse.Namespace) -> tuple[torch.device, Ranks]:
    """Join the other processes, if there are any, and seed this one."""
    for name in args.device_modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f'--device-modules {name}: {error}') from error
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: torch finds no CUDA device; give --device cpu')
    device = torch.device(init_distributed_device_so(args.device, args.dist_backend)['device'])
    ranks = Ranks.current(device)
    if not ranks.primary:  # the first process logs for all
        logging.getLogger().setLevel(logging.WARNING)
        warnings.simplefilter('ignore')
    random_seed(args.seed)
    return device, ranks


def output_dir(args: argparse.Namespace) -> str:
    """Folder of the run: a resumed run stays in the folder of its checkpoint."""
    if args.resume not in ('', 'auto') and not args.experiment:
        return str(Path(args.resume).resolve().parent)
    model = Path(args.elastic or saved_at(args.model) or args.model).resolve()
    model = model.parent if model.name == MODEL else model  # which train.py has written in the folder of a run
    name = args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{model.name}'
    return str(Path(args.output, name))


# -- model and task ----------------------------------------------------------------------------------------------------


def choose_num_classes(args: argparse.Namespace, data: Data) -> int | None:
    """--num-classes, or the number of classes in the data.

    Raises:
        ValueError: If the data has more classes than the flag.
    """
    if data.num_classes and args.num_classes and args.num_classes < data.num_classes:
        raise ValueError(
            f'--num-classes {args.num_classes} is less than the {data.num_classes} classes found; leave it out')
    return args.num_classes or data.num_classes


def open_saved_model(args: argparse.Namespace) -> SavedModel | None:
    """The saved model of --model, if it is one; its image channels are the default of --in-chans.

    Raises:
        ValueError: If this package has not saved it.
    """
    place = saved_at(args.model)
    if place is None:
        return None
    local = args.model.startswith('local-dir:')
    repo, _, revision = (place, '', '') if local else place.partition('@')
    saved = SavedModel(repo, revision=revision or None)
    channels = saved.config['pretrained_cfg'].get('input_size', (3,))[0]
    if args.in_chans is None and args.input_size is None and channels != 3:
        args.in_chans = channels
    return saved


def create_network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network of --model on a device, with the weights that training starts from.

    Weights of another number of classes are loaded without their head.

    Raises:
        ValueError: If it cannot be created from the flags.
    """
    overlay = dict(args.pretrained_cfg_overlay)
    if overlay.get('file'):
        overlay['file'] = expand_home(overlay['file'])
    if args.pretrained_path:
        classes = dict(num_classes=args.num_classes) if args.num_classes else {}
        overlay = dict(file=args.pretrained_path, source='', **classes) | overlay
    pretrained = args.pretrained or bool(args.pretrained_path) or saved_at(args.model) is not None
    create = partial(
        timm.create_model, args.model, pretrained=pretrained, **dict(model_args(args), **args.model_kwargs))
    try:
        try:
            net = create(pretrained_cfg_overlay=overlay or None)
        except OtherClasses as error:
            net = create(pretrained_cfg_overlay=dict(overlay, num_classes=error.classes))
    except Exception as error:  # unknown arguments, or files that hold other weights
        raise ValueError(
            f'cannot create --model {args.model} ({one_line(error, 300)}); look at --model-kwargs, '
            '--pretrained-cfg-overlay and --pretrained-path') from error
    if pretrained:
        report_head(args.pretrained_path or args.model, net.pretrained_cfg['num_classes'], net.num_classes)
    if args.initial_checkpoint:
        load_weights(net, args.initial_checkpoint)
    return prepare_network(args, net, device)


def create_elastic(
        args: argparse.Namespace, data: Data, device: torch.device, ranks: Ranks) -> tuple[nn.Module, Any, bool]:
    """The network of --elastic, its teacher, and whether its head is trained for the classes of the data."""
    net, base, knows_classes = elastic_network(args, model_args(args), data, device, ranks)
    return prepare_network(args, net, device), base or args.kd_model, knows_classes


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are arguments of every network."""
    return dict(
        num_classes=args.num_classes, in_chans=args.input_size[0] if args.input_size else args.in_chans,
        img_size=args.input_size[1:] if args.input_size else args.img_size,
        global_pool=args.gp, drop_rate=args.drop, drop_path_rate=args.drop_path)


def prepare_network(args: argparse.Namespace, net: nn.Module, device: torch.device) -> nn.Module:
    """A network with the first values of its head, on a device, in the memory format to train in."""
    with torch.no_grad():
        if args.head_init_scale is not None:
            net.get_classifier().weight.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            net.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        net.set_grad_checkpointing()
    net.to(device=device)
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


def load_weights(net: nn.Module, file: str) -> None:
    """Load the weights of a checkpoint, without its head if that has another number of classes.

    Raises:
        ValueError: If the file does not hold weights of this network.
    """
    own, head = net.state_dict(), f'{net.pretrained_cfg["classifier"]}.'
    try:
        weights = load_state_dict(file)
        if report_head(file, len(weights.get(f'{head}bias', own[f'{head}bias'])), net.num_classes):
            weights.update({name: tensor for name, tensor in own.items() if name.startswith(head)})
        net.load_state_dict(weights)
    except Exception as error:  # a file may hold anything
        raise ValueError(
            f'--initial-checkpoint {file} does not hold weights of this network ({one_line(error, 200)})') from error


def freeze(args: argparse.Namespace, net: nn.Module) -> list[nn.Module]:
    """Take the modules of --freeze out of the training.

    Returns:
        Their BatchNorms, whose running statistics stay as they are. A supernet has no use for running statistics.

    Raises:
        ValueError: If there is no such module, or nothing is left to train.
    """
    def is_in(name: str, module: str) -> bool:
        if module == BACKBONE:
            return not name.startswith(f'{net.pretrained_cfg["classifier"]}.')
        return name == module or name.startswith(f'{module}.')

    names = [name for name, _ in net.named_parameters()]
    for module in args.freeze:
        if not any(is_in(name, module) for name in names):
            known = dict.fromkeys(name.partition('.')[0] for name in names)
            raise ValueError(
                f'--freeze {module}: the model has no such module; give {BACKBONE}, or some of {", ".join(known)} and '
                'what is in them')
    for name, parameter in net.named_parameters():
        if any(is_in(name, module) for module in args.freeze):
            parameter.requires_grad = False
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    if not trained:
        raise ValueError(f'--freeze {" ".join(args.freeze)} leaves nothing to train; leave some of it out')
    if args.freeze:
        _logger.info(f'{format_count(trained)} parameters are trained, all outside {", ".join(args.freeze)}')
    return [] if is_supernet(net) else [
        norm for name, norm in net.named_modules()
        if isinstance(norm, _BatchNorm) and any(is_in(f'{name}.', module) for module in args.freeze)]


def create_data_config(args: argparse.Namespace, net: nn.Module) -> dict[str, Any]:
    """timm's data config: size, mean, std, interpolation and crop of the images."""
    config = resolve_input_data_config(net, vars(args))
    resolution = family_of(net.space).resolution(net.space.largest) if is_supernet(net) else None
    if resolution is not None:
        channels, height, width = config['input_size']
        if height != width:
            raise ValueError(
                f'--input-size {channels} {height} {width} has to be square for {args.model}; give '
                f'--input-size {channels}{2 * f" {max(height, width)}"}, or a shiftformer model, which takes any shape')
        if min(config['input_size'][1:]) < resolution:
            _logger.warning(
                f'images of {config["input_size"][1:]} are enlarged to the {resolution} pixels of the largest '
                f'subnet; give --img-size {resolution}')
    return config


def create_task(
        args: argparse.Namespace,
        net: nn.Module,
        groups: BudgetGroups | None,
        loaders: Loaders,
        updates_per_epoch: int,
        data_config: dict[str, Any],
        device: torch.device,
        teacher_model: str | nn.Module | None,
) -> ShiftNASTask | NetworkTask:
    """The task that trains a supernet with ShiftNAS, or one network; it may learn from a teacher."""
    teacher = None if teacher_model in (None, NO_TEACHER) else Teacher(
        teacher_model, net, mean=data_config['mean'], std=data_config['std'], path=args.kd_model_path, device=device)
    common: dict[str, Any] = dict(
        criterion_kwargs=criterion_kwargs(args), config=task_config(args, updates_per_epoch), teacher=teacher,
        device=device)
    if groups is None:
        macs, params = map(format_count, static_counts(net))
        _logger.info(f'{args.model}: one network, {macs} MACs, {params} params')
        return NetworkTask(net, space=bound_space(net), **common)
    resource, low, high = groups.resource, groups.edges[0], groups.edges[-1]
    _logger.info(
        f'{args.model}: {net.space.size:,} subnets, {resource.format(low)} to {resource.describe(high)}, '
        f'{len(groups)} groups')
    generator = ArchitectureGenerator(net.space, seed=args.seed, resource=resource)
    return ShiftNASTask(net, generator=generator, groups=groups, shift_batches=loaders.shift, **common)


def task_config(args: argparse.Namespace, updates_per_epoch: int) -> ShiftNASConfig:
    """The settings of ShiftNAS, with epochs converted to updates."""
    given = {each.name: getattr(args, dest_of(each)) for each in settings_of(ShiftNASConfig) if each.flag}
    warmup = args.epochs / 10 if args.shift_warmup_epochs is None else args.shift_warmup_epochs
    return ShiftNASConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
        warmup_updates=round(warmup * updates_per_epoch),
        curriculum_updates=round(args.elastic_warmup * updates_per_epoch),
        total_updates=args.epochs * updates_per_epoch, accum_steps=args.grad_accum_steps, seed=args.seed)


def criterion_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """timm's arguments of the loss."""
    loss = args.loss or ('bce' if args.bce_loss else 'ce')
    kwargs = dict(
        loss_type=loss, smoothing=args.smoothing, soft_targets=uses_mixup(args), asl_gamma_pos=args.asl_gamma_pos,
        asl_gamma_neg=args.asl_gamma_neg, poly_epsilon=args.poly_epsilon)
    if loss == 'bce':
        kwargs.update(
            bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.loss_pos_weight)
    return kwargs


def prepare_task(
        args: argparse.Namespace, task: ShiftNASTask | NetworkTask, device: torch.device, ranks: Ranks) -> None:
    """Set up averaged weights, compilation and DDP for a task whose weights are loaded already."""
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if ranks.size > 1:
        _logger.info(f'{ranks.size} processes, {ranks.size * args.batch_size} images per batch')
        task.prepare_distributed(device_ids=[device], broadcast_buffers=not args.no_ddp_bb)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def create_optimizer(args: argparse.Namespace, net: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of --opt.

    Raises:
        ValueError: If the optimizer refuses its settings.
    """
    try:
        optimizer = create_optimizer_v2(net, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:  # every optimizer has its own
        raise ValueError(
            f'--opt {args.opt} does not take its settings ({one_line(error)}); look at --opt-kwargs, '
            '--opt-betas and --opt-eps') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'--opt {args.opt} needs second derivatives, which are not computed; give --opt adamw')
    return optimizer


def scaled_lr(args: argparse.Namespace, processes: int = 1) -> float:
    """--lr, or --lr-base scaled to the global batch size with timm's rule."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.grad_accum_steps * processes / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    return args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)
