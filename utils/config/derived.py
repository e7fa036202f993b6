"""How pixels and networks are trained, as the options say."""

from __future__ import annotations

from utils.config.options import CondenseOptions, Options
from utils.config.presets import EVALUATION_AUGMENTATION
from utils.method import augment, training


def pixel_lr(lr_img: float, *, ipc: int, side: int, base_side: int) -> float:
    """The pixel learning rate that is used: gradients of a mean fall with ipc, those per pixel with the area."""
    return lr_img * (ipc / 10) * (side / base_side) ** 2


def pixel_rate(o: CondenseOptions, *, side: int, base_side: int) -> float:
    """What one pixel step is multiplied by."""
    return pixel_lr(o.lr_img, ipc=o.ipc, side=side, base_side=base_side) if o.pixel_step == "sweep" else o.lr_img


def update_augmentation(options: CondenseOptions) -> str:
    """Of the network update: the matching augmentation, without cutout where CutMix takes its place."""
    return augment.without(options.aug_type, "cutout") if options.mixup_net == "cut" else options.aug_type


def update_summary(o: CondenseOptions) -> str:
    """For people: what a network trains on between two matching steps."""
    if o.inner_loop == 1 or (o.train_on == "real" and not o.n_data):
        return "none"
    images = f"{o.n_data} real images" if o.train_on == "real" else "all synthetic images"
    return f"{images}, {o.net_epoch} x, {update_augmentation(o)}"


def update_recipe(options: CondenseOptions) -> training.Recipe:
    """How the network is trained between two matching steps."""
    return training.Recipe(
        batch_size=options.batch_real,
        augment=augment.Augment(update_augmentation(options)),
        mixup=options.mixup_net,
        lr=options.lr,
        momentum=options.momentum if options.mom_net is None else options.mom_net,
        weight_decay=options.weight_decay if options.wd_net is None else options.wd_net,
        epochs=options.net_epoch,
    )


def evaluation_augmentation(options: Options, *, flip: bool) -> str:
    """Of evaluation trainings: as given, or the published one for the data set and CutMix."""
    if options.eval_aug_type is not None:
        return options.eval_aug_type
    dropped = [name for name, drop in (("cutout", options.mixup == "cut"), ("flip", not flip)) if drop]
    return augment.without(EVALUATION_AUGMENTATION, *dropped)


def evaluation_recipe(options: Options, *, flip: bool) -> training.Recipe:
    """The evaluation protocol."""
    return training.Recipe(
        batch_size=options.batch_size,
        augment=augment.Augment(evaluation_augmentation(options, flip=flip)),
        mixup=options.mixup,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        epochs=options.epochs,
    )
