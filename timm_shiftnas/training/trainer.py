"""Train a supernet with ShiftNAS, with the flags of timm's training script.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs
    torchrun --nproc-per-node=8 train.py --data-dir /data/imagenet ...

Every `--val-interval` epochs and at the end it evaluates the smallest and the largest subnet and one subnet per budget
group, and writes to `<output>/<experiment>`: `summary.csv`, `budgets.csv`, `shift.csv`, `accuracy.png`, `shift.png`,
checkpoints, and `model/`, which `timm_shiftnas.from_pretrained` and `timm.create_model('local-dir:...')` load.

Exit codes: 0, done; 2, an error, told in one line; 130, interrupted; 143, terminated after a checkpoint was written
(torchrun's own is 1 whenever its processes' are not 0).
"""
from __future__ import annotations

import argparse
import copy
import logging
import math
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torchvision
import yaml
from huggingface_hub.utils import tqdm
from timm.data import resolve_input_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    dispatch_clip_grad,
    get_outdir,
    random_seed,
    setup_default_logging,
    update_summary,
)
from timm.utils.distributed import init_distributed_device_so
from timm.utils.summary import trim_summary
from torch import Tensor, nn

from ..evaluation.accuracy import evaluate_budgets
from ..evaluation.plots import plot_accuracy, plot_shift
from ..evaluation.search import search_archs
from ..evaluation.tables import format_table, write_budgets_csv, write_shift_csv
from ..hub.push import push_directory
from ..hub.save import save_pretrained
from ..method.config import ShiftNASConfig, settings_of
from ..method.distillation import Teacher
from ..method.generator import ArchitectureGenerator
from ..method.groups import BudgetGroups
from ..method.task import ShiftNASTask, load_task_ema_checkpoint, resume_task_checkpoint
from ..models.calibration import BatchNormCalibration, has_batch_norm
from ..space import is_supernet
from ..space.complexity import macs
from ..utils.distributed import Ranks
from ..utils.files import atomic_write
from ..utils.streams import seed_process, stream
from ..utils.text import one_line
from ..utils.units import format_count, parse_count
from .checkpoints import Checkpoints, check_checkpoint, newest_checkpoint
from .data import ShiftBatches, create_calibration_loader, create_loaders, open_data
from .flags import dest_of, parse_args, training_facts
from .tracking import Tracker

_logger = logging.getLogger('train')


# -- model and task ----------------------------------------------------------------------------------------------------


def create_supernet(args: argparse.Namespace, device: torch.device) -> nn.Module:
    supernets = timm.list_models('*supernet')
    if args.model.partition('.')[0] not in supernets and ':' not in args.model:
        raise ValueError(f'--model {args.model} is not a supernet; choose one of {", ".join(supernets)}')
    if args.gp == '':
        raise ValueError("--gp '' leaves logits of every place in an image; leave it out, or give avg")
    size = args.input_size[1:] if args.input_size else args.img_size
    given = dict(
        num_classes=args.num_classes, in_chans=args.input_size[0] if args.input_size else args.in_chans, img_size=size,
        global_pool=args.gp, drop_rate=args.drop, drop_path_rate=args.drop_path)
    overlay = dict(file=args.pretrained_path, num_classes=args.num_classes) if args.pretrained_path else {}
    overlay.update(args.pretrained_cfg_overlay)
    try:
        net = timm.create_model(
            args.model, pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay or None, checkpoint_path=args.initial_checkpoint or None,
            **dict(given, **args.model_kwargs))
    except (ValueError, OSError):
        raise
    except Exception as error:  # of arguments that it does not take, or of files that hold no weights of it
        raise ValueError(
            f'cannot create --model {args.model} ({one_line(error, 300)}); look at --model-kwargs, '
            '--pretrained-cfg-overlay, --pretrained-path and --initial-checkpoint') from error
    if not is_supernet(net):
        raise ValueError(f'--model {args.model} is not a supernet; choose one of {", ".join(supernets)}')
    with torch.no_grad():
        if args.head_init_scale is not None:
            net.get_classifier().weight.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            net.get_classifier().bias.fill_(args.head_init_bias)
    net.set_grad_checkpointing(args.grad_checkpointing)
    net.to(device=device)
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


def create_task(args: argparse.Namespace, net: nn.Module, shift_batches: ShiftBatches | None,
                updates_per_epoch: int, config: dict[str, Any], device: torch.device) -> ShiftNASTask:
    space = net.space
    width = None if args.group_width is None else parse_count(args.group_width, '--group-width')
    groups = BudgetGroups.of_space(space, width=width, count=args.num_groups)
    warmup = args.epochs / 10 if args.shift_warmup_epochs is None else args.shift_warmup_epochs
    given = {each.name: getattr(args, dest_of(each)) for each in settings_of(ShiftNASConfig) if each.flag}
    task_config = ShiftNASConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
        warmup_updates=round(warmup * updates_per_epoch), total_updates=args.epochs * updates_per_epoch,
        accum_steps=args.grad_accum_steps, seed=args.seed)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    loss = args.loss or ('bce' if args.bce_loss else 'ce')
    criterion = dict(
        loss_type=loss, smoothing=args.smoothing, soft_targets=mixing, asl_gamma_pos=args.asl_gamma_pos,
        asl_gamma_neg=args.asl_gamma_neg, poly_epsilon=args.poly_epsilon)
    if loss == 'bce':
        criterion.update(
            bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.loss_pos_weight)
    generator = ArchitectureGenerator(space, seed=args.seed)
    low, high = groups.edges[0], groups.edges[-1]
    _logger.info(
        f'{args.model}: {space.size:,} subnets, {format_count(low)} to {format_count(high)} MACs, {len(groups)} groups')
    teacher = None if args.kd_model is None else Teacher(
        args.kd_model, net, mean=config['mean'], std=config['std'], path=args.kd_model_path, device=device)
    return ShiftNASTask(
        net, criterion_kwargs=criterion, config=task_config, generator=generator, groups=groups,
        shift_batches=shift_batches, teacher=teacher, device=device)


def create_optimizer(args: argparse.Namespace, net: nn.Module) -> torch.optim.Optimizer:
    try:
        optimizer = create_optimizer_v2(net, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:  # as each one checks them
        raise ValueError(
            f'--opt {args.opt} does not take its settings ({one_line(error)}); look at --opt-kwargs, '
            '--opt-betas and --opt-eps') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'--opt {args.opt} needs second derivatives, which are not taken here; give one such as adamw')
    return optimizer


def scaled_lr(args: argparse.Namespace, processes: int = 1) -> float:
    """--lr, or --lr-base scaled to the global batch size as timm does."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.grad_accum_steps * processes / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    return args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


LEAST_SCALE = 2. ** -14  # of float16 losses: it begins at 2 ** 16 and is halved by every update that overflows


class LossScaler(torch.amp.GradScaler):
    """torch's, under the name that timm's checkpoints give it."""
    state_dict_key = 'amp_scaler'


# -- training ----------------------------------------------------------------------------------------------------------


class Terminated(Exception):
    """SIGTERM has come, and the run can go on from a checkpoint."""


class Trainer:
    """One run: everything it owns, `fit` over epochs, `train_epoch` over batches, `step` for an update."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.given_lr = args, args.lr
        for name in args.device_modules:
            try:
                import_module(name)
            except ImportError as error:
                raise ImportError(f'--device-modules {name}: {error}') from error
        if args.device.startswith('cuda') and not torch.cuda.is_available():
            raise ValueError(f'--device {args.device}: torch sees no such device here; give --device cpu')
        self.device = torch.device(init_distributed_device_so(args.device, args.dist_backend)['device'])
        self.ranks = ranks = Ranks.current(self.device)
        if not ranks.primary:  # what all have to say, one says
            logging.getLogger().setLevel(logging.WARNING)
            warnings.simplefilter('ignore')
        random_seed(args.seed)

        data = open_data(args)
        args.num_classes = args.num_classes or data.num_classes
        if data.num_classes and args.num_classes is not None and args.num_classes < data.num_classes:
            raise ValueError(
                f'--num-classes {args.num_classes} is less than the {data.num_classes} classes found; leave it out')
        self.net = create_supernet(args, self.device)
        args.num_classes = self.net.num_classes
        config = self.data_config = resolve_input_data_config(self.net, vars(args))
        if calibrated := has_batch_norm(self.net):
            resolution = self.net.space.largest.resolution
            if min(config['input_size'][1:]) < resolution:
                _logger.warning(
                    f'images of {config["input_size"][1:]} are enlarged to the {resolution} pixels of the largest '
                    f'subnet; give --img-size {resolution}')
        self.loaders = create_loaders(args, data, config, self.device, ranks)
        self.calibration_loader = create_calibration_loader(args, data, config, self.device) if calibrated else None
        self.batches = len(self.loaders.train)
        self.updates_per_epoch = -(-self.batches // args.grad_accum_steps)
        args.lr = scaled_lr(args, ranks.size)
        learned = args.sampler == 'shiftnas' and args.shift != 'none'
        self.shift_batches = ShiftBatches(args, data, config) if learned else None

        self.task = create_task(args, self.net, self.shift_batches, self.updates_per_epoch, config, self.device)
        self.optimizer = create_optimizer(args, self.net)
        self.autocast = partial(
            torch.autocast, self.device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else nullcontext
        self.scaler = LossScaler(self.device.type) if args.amp and args.amp_dtype == 'float16' else None
        self.output = Path(ranks.gather(self.output_dir())[0])  # by the clock of the first process
        if args.resume == 'auto':
            newest = newest_checkpoint(self.output) if ranks.primary else None
            newest = ranks.gather(newest)[0]
            _logger.info(f'going on from {newest}' if newest else f'no checkpoint in {self.output}: starting anew')
            args.resume = str(newest or '')
        self.start = self.resume() if args.resume else (0, 0)
        if args.start_epoch is not None:
            if args.start_epoch >= args.epochs:
                raise ValueError(f'--start-epoch {args.start_epoch} must be less than --epochs, which is {args.epochs}')
            self.start = (args.start_epoch, 0)
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
            if args.resume:
                load_task_ema_checkpoint(self.task, args.resume)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if ranks.size > 1:
            _logger.info(f'{ranks.size} processes, {ranks.size * args.batch_size} images per batch')
            self.task.prepare_distributed(device_ids=[self.device], broadcast_buffers=not args.no_ddp_bb)
        try:
            self.scheduler, self.epochs = create_scheduler_v2(
                self.optimizer, **scheduler_kwargs(args), updates_per_epoch=self.updates_per_epoch)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f'--sched {args.sched}: {error} Look at --epochs, --warmup-epochs, --decay-epochs and '
                '--lr-stable-timescale') from None
        self.step_scheduler(self.start[0], self.start[1] // args.grad_accum_steps if args.sched_on_updates else 0)

        self.nonfinite = 0  # updates in a row that were left out
        self.signalled = False  # SIGTERM has come to this process
        self.stopping = False  # it has come to one of them, and all know
        self.may_stop_here = False
        self.checkpoints = self.tracker = None
        if ranks.primary:
            self.open_output()

    def output_dir(self) -> str:
        name = self.args.experiment or '-'.join([time.strftime('%Y%m%d-%H%M%S'), self.args.model.replace('/', '_')])
        if self.args.resume not in ('', 'auto') and not self.args.experiment:
            return str(Path(self.args.resume).resolve().parent)  # a resumed run goes on where it was
        return str(Path(self.args.output, name))

    def open_output(self) -> None:
        args = self.args
        try:
            get_outdir(str(self.output))
        except OSError as error:
            raise OSError(
                f'--output {args.output}: cannot make the folder {self.output} ({error.strerror}); give a place where '
                'files can be written') from None
        saver = CheckpointSaver(
            self.net, self.optimizer, args=args, amp_scaler=self.scaler, task=self.task,
            checkpoint_dir=str(self.output), recovery_dir=str(self.output), max_history=args.checkpoint_hist)
        if args.resume and Path(args.resume).resolve().parent == self.output.resolve():
            saver.load_state_dict_from_checkpoint(args.resume)
        self.checkpoints = Checkpoints(saver, since=None if args.resume else time.time())
        self.tracker = Tracker(
            self.output, vars(args), tensorboard=args.log_tensorboard, wandb=args.log_wandb,
            project=args.wandb_project, tags=args.wandb_tags, resume_id=args.wandb_resume_id)
        trim_summary(str(self.output / 'summary.csv'), self.start[0])
        with atomic_write(self.output / 'args.yaml') as path:
            path.write_text(yaml.safe_dump(dict(vars(args), lr=self.given_lr), sort_keys=False))

    def resume(self) -> tuple[int, int]:
        """Load a checkpoint; the epoch and the batch to go on with."""
        saved = check_checkpoint(self.args.resume, self.net.space)
        # another split, or other images, would put some into the held-out part that the weights have been trained on;
        # another optimizer has another state
        names = ['seed', 'held_out', 'group_weights', 'glyph_images', 'glyph_difficulty', 'glyph_pixels']
        for name in names if self.args.no_resume_opt else [*names, 'opt', 'layer_decay', 'weight_decay']:
            before, now = saved.get(name), getattr(self.args, name)
            # with and without decay, parameters are in other groups
            same = bool(before) == bool(now) if name == 'weight_decay' else before == now
            if name in saved and not same:
                raise ValueError(
                    f'the checkpoint was trained with --{name.replace("_", "-")} {before} and not {now}; resume with '
                    f'the flags of the run: -c {Path(self.args.resume).with_name("args.yaml")}')
        optimizer = None if self.args.no_resume_opt else self.optimizer
        epoch = resume_task_checkpoint(
            self.task, self.args.resume, optimizer=optimizer, loss_scaler=None if optimizer is None else self.scaler)
        if not (loop := self.task.loop_state):
            return epoch or 0, 0  # of another loop, which saves the ends of epochs
        mine = self.loop_state(0, 0)
        for name in ('batch_size', 'processes', 'grad_accum_steps'):
            if loop['batch'] and loop[name] != mine[name]:
                raise ValueError(
                    f'the checkpoint is from the middle of an epoch, with {name}={loop[name]}, and not {mine[name]}: '
                    'go on from there with the same, or from a checkpoint of the end of an epoch')
        return loop['epoch'], loop['batch']

    def step_scheduler(self, epoch: int, update: int, metric: float | None = None) -> None:
        """Bring the learning rate to an epoch (update 0) or, with --sched-on-updates, to an update of it."""
        if self.scheduler is None:
            return
        if self.args.sched_on_updates:
            self.scheduler.step_update(epoch * self.updates_per_epoch + update)
        elif update == 0:
            self.scheduler.step(epoch, metric)

    def fit(self) -> None:
        args = self.args
        signal.signal(signal.SIGTERM, self.on_terminate)
        if not args.resume:
            _logger.info(f'fitting the generator to the budgets ({args.generator_fit_steps} steps, no images)')
            with self.stopping_at_once():
                self.task.generator.fit(
                    steps=args.generator_fit_steps, seed=args.seed, progress=self.ranks.primary)
        first, batch = self.start
        if first >= self.epochs:
            _logger.info(f'{first} of {self.epochs} epochs are done already: evaluating only')
            self.evaluate(first - 1)
        for epoch in range(first, self.epochs):
            if self.loaders.mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                self.loaders.mixup.mixup_enabled = False
            metrics = self.train_epoch(epoch, batch if epoch == first else 0)
            results = None
            if epoch + 1 == self.epochs or (epoch + 1) % args.val_interval == 0:
                # an evaluation is long enough to be killed in, and another process may be killed alone
                if saved := args.recovery_interval or self.ranks.size > 1:
                    self.save_recovery(epoch, self.batches, metrics)
                try:
                    results = self.evaluate(epoch)
                except Terminated:
                    if not saved:
                        self.save_recovery(epoch, self.batches, metrics)
                    raise
            self.end_epoch(epoch, metrics, results)
        if self.shift_batches is not None:
            self.shift_batches.close()
        if self.ranks.primary:
            self.finish()

    def finish(self) -> None:
        args = self.args
        if self.checkpoints.failure is not None:
            raise OSError(
                f'the training is done, but its last checkpoint could not be written ({self.checkpoints.failure}); '
                f'make room in {self.output} and train its end again with --resume auto')
        self.checkpoints.finish()
        if args.push_to_hub:
            try:
                address = push_directory(
                    self.output, args.push_to_hub, private=args.hub_private or None, revision=args.hub_revision)
            except Exception:
                flags = ' --private' * args.hub_private
                flags += f' --revision {shlex.quote(args.hub_revision)}' if args.hub_revision else ''
                _logger.error(
                    f'the training is done, but not published; do so by timm-shiftnas push '
                    f'{shlex.quote(str(self.output))} {args.push_to_hub}{flags}')
                raise
            _logger.info(f'published: {address}')
        _logger.info(f'done; the model directory is {self.output / "model"}')

    # -- an epoch ------------------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int, start: int = 0) -> dict[str, float]:
        """One epoch from a batch on: a function of (seed, epoch), of that batch and of the state before it."""
        args, task, accum = self.args, self.task, self.args.grad_accum_steps
        losses, started = AverageMeter(), time.perf_counter()
        if start:
            losses.sum, losses.count = task.loop_state['loss'], task.loop_state['count']
            losses.avg = losses.sum / max(losses.count, 1)
        task.get_trainable_module().train()
        self.optimizer.zero_grad()
        pending: list[Tensor] = []
        for batch, (input, target) in enumerate(self.progress(epoch, start, losses), start):
            seed_process(args.seed, f'step/{epoch}/{self.ranks.rank}', batch)
            input, target = self.to_device(input, target)
            ends_update = (batch + 1) % accum == 0 or batch + 1 == self.batches
            micro_batches = accum if batch < self.batches - self.batches % accum else self.batches % accum
            with nullcontext() if ends_update else task.no_sync():
                with self.autocast():
                    loss = task(input, target)['loss']
                self.scaled(loss / micro_batches).backward()
            pending.append(loss.detach())
            if ends_update:
                update = batch // accum + 1
                self.step(epoch, update, torch.stack(pending), losses)
                pending.clear()
                if args.save_images and update % args.log_interval == 0 and self.ranks.primary:
                    torchvision.utils.save_image(
                        input, self.output / f'train-batch-{epoch}-{batch}.jpg', padding=0, normalize=True)
                due = args.recovery_interval and update % args.recovery_interval == 0 and batch + 1 < self.batches
                if due or self.stopping:
                    self.save_recovery(epoch, batch + 1, dict(loss_sum=losses.sum, count=losses.count))
                if self.stopping:
                    raise Terminated
        return dict(
            loss=losses.avg, loss_sum=losses.sum, count=losses.count, seconds=time.perf_counter() - started)

    def to_device(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.args.no_prefetcher:
            input, target = input.to(self.device), target.to(self.device)
            if self.loaders.mixup is not None:  # switched off, it still makes the soft targets that the loss expects
                input, target = self.loaders.mixup(input, target)
        if self.args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input, target

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self, epoch: int, update: int, micro_losses: Tensor, losses: AverageMeter) -> None:
        """The optimizer's step, if nothing that led to it is infinite or NaN in any process."""
        args = self.args
        finite = micro_losses.isfinite().all()
        if self.scaler is None:  # a loss scaler finds the largest scale by just that
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            finite &= torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        told = torch.cat([torch.stack([~finite, torch.full_like(finite, self.signalled)]), micro_losses]).float()
        self.ranks.sum_([told])  # all go on, or all stop after the same update
        nonfinite, stopping, *values = told.tolist()  # all that the device is waited for, without a loss scaler
        self.stopping = bool(stopping)
        self.task.end_update()
        if nonfinite:
            self.leave_out(epoch, update, values)
        else:
            self.nonfinite = 0
            for value in values:
                losses.update(value / self.ranks.size, args.batch_size)
            self.step_optimizer()
            self.task.update_ema(step=epoch * self.updates_per_epoch + update)
        self.optimizer.zero_grad()
        self.step_scheduler(epoch, update)

    def step_optimizer(self) -> None:
        """Clip and step.

        Raises:
            ValueError: If a loss scaler has found no scale at which gradients are finite.
        """
        args, scaler = self.args, self.scaler
        if args.clip_grad is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            parameters = self.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        if scaler is None:
            self.optimizer.step()
            return
        scaler.step(self.optimizer)
        scaler.update()
        if scaler.get_scale() < LEAST_SCALE:
            raise ValueError(
                'no scale of the loss gives finite gradients in float16; train with --amp-dtype bfloat16 or lower --lr')

    def leave_out(self, epoch: int, update: int, values: list[float]) -> None:
        """Go on without an update, or stop where too many are lost: weights are those before it either way.

        Raises:
            ValueError: If there have been more in a row than --skip-nonfinite allows.
        """
        self.nonfinite += 1
        wrong = [value for value in values if not math.isfinite(value)]
        what = f'the loss {wrong[0]}' if wrong else 'a gradient'
        where = f'update {update} of epoch {epoch + 1}'
        if self.nonfinite > self.args.skip_nonfinite:
            newest = self.checkpoints.newest() if self.ranks.primary else None
            kept = f'; {newest} is from before' if newest else ''
            raise ValueError(
                f'{what} in {where} is not finite{kept}; lower --lr, clip with --clip-grad 1, or tolerate some in a '
                'row with --skip-nonfinite 10')
        _logger.warning(f'{where} is left out: {what} is not finite ({self.nonfinite} in a row)')

    def end_epoch(self, epoch: int, metrics: dict[str, float], results: dict[str, float] | None) -> None:
        """What is written after an epoch and its evaluation."""
        args = self.args
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        metric = results and results[args.eval_metric]
        self.step_scheduler(epoch + 1, 0, metric)
        self.task.loop_state = self.loop_state(epoch + 1, 0)
        if not self.ranks.primary:
            return
        columns = {name: (results or {}).get(name, '') for name in ('top1', 'top1_smallest', 'top1_largest')}
        measured = {name: metrics[name] for name in ('loss', 'seconds')}
        self.tracker.log((epoch + 1) * self.updates_per_epoch, dict(
            {'epoch': epoch + 1, 'lr': lr, 'train/epoch_loss': measured['loss']},
            **{f'eval/{name}': value for name, value in (results or {}).items()},
            **{f'P/group {k + 1}': float(p) for k, p in enumerate(self.task.shift.probabilities)}))
        try:
            update_summary(epoch, measured, columns, str(self.output / 'summary.csv'), lr=lr)
        except OSError as error:
            _logger.error(f'cannot write {self.output / "summary.csv"} ({error.strerror}); the training goes on')
        self.checkpoints.save(epoch, metric)

    def loop_state(self, epoch: int, batch: int, loss: float = 0., count: int = 0) -> dict[str, Any]:
        """Where to go on. Everything random after it is a function of the seed, the epoch and the batch."""
        return dict(
            epoch=epoch, batch=batch, loss=loss, count=count, batch_size=self.args.batch_size,
            processes=self.ranks.size, grad_accum_steps=self.args.grad_accum_steps)

    def save_recovery(self, epoch: int, batch: int, metrics: dict[str, float]) -> None:
        self.task.loop_state = self.loop_state(epoch, batch, metrics['loss_sum'], metrics['count'])
        if self.ranks.primary:
            self.checkpoints.save_recovery(epoch, batch)

    def on_terminate(self, *_: Any) -> None:
        """SIGTERM: stop after the update that is under way, or at once where the weights do not change."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one is meant
        self.signalled = True
        if self.may_stop_here:
            raise Terminated

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Where nothing is written and no weight changes."""
        self.may_stop_here = True
        if self.signalled:
            raise Terminated
        yield
        self.may_stop_here = False

    def progress(self, epoch: int, start: int, losses: AverageMeter) -> Iterator:
        """The batches of an epoch, with rate and time left: a bar on a terminal, else a line now and then."""
        title, started, total = f'epoch {epoch + 1}/{self.epochs}', time.monotonic(), self.batches
        batches, first = self.loaders.train.epoch(epoch, start), losses.count
        if sys.stderr.isatty() and self.ranks.primary:
            with tqdm(batches, desc=title, unit='batch', leave=False, dynamic_ncols=True, initial=start,
                      total=total) as bar:
                for batch in bar:
                    yield batch
                    bar.set_postfix(loss=f'{losses.avg:.3f}', lr=f'{self.optimizer.param_groups[0]["lr"]:.2e}')
            return
        every = self.args.log_interval * self.args.grad_accum_steps
        for i, batch in enumerate(batches, start):
            yield batch
            if self.ranks.primary and ((i + 1) % every == 0 or i + 1 == total):
                elapsed, lr = time.monotonic() - started, self.optimizer.param_groups[0]['lr']
                rate = (losses.count - first) * self.ranks.size / elapsed
                _logger.info(
                    f'{title}  batch {i + 1}/{total}  loss {losses.avg:.3f}  lr {lr:.2e}  {rate:.0f} images/s  '
                    f'{(total - i - 1) * elapsed / (i + 1 - start):.0f} s left in the epoch')
                self.tracker.log(
                    epoch * self.updates_per_epoch + (i + 1) // self.args.grad_accum_steps,
                    {'train/loss': losses.avg, 'lr': lr, 'train/images_per_second': rate})

    # -- evaluation and what is written --------------------------------------------------------------------------------

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Table, CSV, pictures and model directory of this epoch; accuracies for the summary."""
        args, task = self.args, self.task
        net = self.evaluated_net()
        options = dict(
            device=self.device, autocast=self.autocast(), channels_last=args.channels_last, ranks=self.ranks)
        if self.calibration_loader is not None:
            options['calibration'] = BatchNormCalibration(self.calibration_loader, args.bn_images)
        searched = None
        with self.stopping_at_once():
            if args.sampler == 'uniform':
                searched = archs = search_archs(
                    net.space, task.generator, task.groups, args.search_samples, net, self.loaders.held_out,
                    seed=args.seed, **options)
            else:
                archs = task.generator.propose_many(task.groups.budgets)
            rows = evaluate_budgets(net, task.groups, archs, self.loaders.validation, **options)
        if self.ranks.primary:
            print(format_table(rows), flush=True)
            try:
                self.write_results(net, rows, searched, options.get('calibration'))
            except OSError as error:
                if epoch + 1 >= self.epochs:
                    raise
                _logger.error(f'cannot write the results ({error}); the training goes on')
        groups = [row['top1'] for row in rows[1:-1]]
        return dict(top1=sum(groups) / len(groups), top1_smallest=rows[0]['top1'], top1_largest=rows[-1]['top1'])

    def evaluated_net(self) -> nn.Module:
        """The averaged weights if there are any, on the device."""
        ema = self.task.get_trainable_module(ema=True)
        if ema is None:
            return self.net
        same_place = next(ema.module.parameters()).device == next(self.net.parameters()).device
        return ema.module if same_place else copy.deepcopy(ema.module).to(self.device)

    def write_results(self, net: nn.Module, rows: list[dict], searched: list | None,
                      calibration: BatchNormCalibration | None) -> None:
        args, task = self.args, self.task
        write_budgets_csv(self.output / 'budgets.csv', rows)
        plot_accuracy(self.output / 'accuracy.png', rows)
        write_shift_csv(self.output / 'shift.csv', task.history)
        noise = stream(args.seed, 'histogram', 0)
        uniform = macs(net.space, [net.space.sample(noise) for _ in range(2000)]).tolist()
        plot_shift(self.output / 'shift.png', task.history, task.groups.edges, uniform)
        save_pretrained(
            self.output / 'model', net, task.generator, groups=task.groups.edges,
            probabilities=task.shift.probabilities.tolist(), results=rows, searched=searched,
            training=training_facts(args, self.ranks.size), data_config=self.data_config,
            bn_stats=self.served_statistics(net, rows, calibration))

    @staticmethod
    def served_statistics(net: nn.Module, rows: list[dict], calibration: BatchNormCalibration | None):
        """BatchNorm statistics of the subnets in the table (not of all that a search tried)."""
        archs = dict.fromkeys(net.space.from_dict(row['arch']) for row in rows)
        return None if calibration is None else {arch: calibration.statistics[arch] for arch in archs}


def is_connection_lost(error: Exception) -> bool:
    """Whether a process that this one waited for is gone: gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and 'gloo/' in str(error)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit codes are in the docstring of this file."""
    args = parse_args(argv)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # it lists all files after every epoch
    trainer, before, code = None, signal.getsignal(signal.SIGTERM), 2
    try:
        trainer = Trainer(args)
        trainer.fit()
        if trainer.ranks.size > 1:
            dist.destroy_process_group()
        code = 0
    except Terminated:
        name = f'{shlex.quote(trainer.output.name)} --output {shlex.quote(str(trainer.output.parent))}'
        print(f'train.py: terminated; continue with --resume auto --experiment {name}', file=sys.stderr)
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        last = trainer and trainer.output / 'last.pth.tar'
        hint = f'; continue with --resume {last}' if last and last.exists() else ''
        print(f'train.py: interrupted{hint}', file=sys.stderr)
        code = 130
    except Exception as error:
        if args.traceback:
            raise
        expected = isinstance(error, (ValueError, OSError, ImportError)) and str(error)
        hint = '' if expected else f'{type(error).__name__} (--traceback shows where): '
        rank = f' (process {trainer.ranks.rank})' if trainer and trainer.ranks.size > 1 else ''
        if rank and is_connection_lost(error):
            hint = 'another process has ended, whose own line says why: '
        print(f'train.py: error{rank}: {hint}{one_line(error)}', file=sys.stderr)
    finally:
        if trainer is not None and trainer.tracker is not None:
            trainer.tracker.close(code)
        signal.signal(signal.SIGTERM, before)
    return code


def run(argv: list[str] | None = None) -> int:
    """`main` with timm's logging to the terminal: what `train.py` and `timm-shiftnas train` do."""
    setup_default_logging()
    return main(argv)
