"""What a run of condense.py is made of, as its options say: network and trainer, the pixels and their step, the sets.

All of it is about the classes that this process owns (utils/system/distributed.py), which are all of them unless there are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from data import Dataset
from models import NetSpec, Network
from utils.config import derived as recipes
from utils.config.options import CondenseOptions
from utils.method.augment import Augment
from utils.method.formation import decode, decoded_count
from utils.method.images import ImageSet
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.selection import Context
from utils.method.sources import RealImages, Source, SyntheticImages
from utils.method.state import PER_CLASS, State, Step
from utils.method.synthetic import BASELINE, coreset, initial_pixels, training_images
from utils.method.training import Together, Trainer, fresh_network, update_network
from utils.method.trajectory import TrajectoryStep
from utils.numerics.compute import Captured, Compute
from utils.runs.experts import Experts
from utils.system.device import wait_for
from utils.system.distributed import Shard
from utils.system.draws import Draws
from utils.system.errors import UsageError

WHOLE = "whole"  # network updates, of every rank


class Parts:
    """Makes them; what it makes knows nothing of options."""

    def __init__(
        self,
        o: CondenseOptions,
        dataset: Dataset,
        spec: NetSpec,
        compute: Compute,
        shard: Shard,
        experts: Experts | None = None,
        last_session: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """experts: whose trajectories are matched, instead of the effect of real images. last_session: of the run, as
        options.json has it."""
        self.o, self.dataset, self.spec, self.shard, self.experts = o, dataset, spec, shard, experts
        self.group, self.device, self.real = shard.group, dataset.device, dataset.train
        self.shape = (o.ipc, dataset.channels, dataset.side, dataset.side)  # of a class's stored pixels
        self.compute, self.selecting = compute, compute.cheapest()
        self.n_data = o.n_data if o.train_on == "real" else None  # None: all there are
        self.matcher = Matcher(
            how=Comparison(objective=o.match, metric=o.metric, bias=o.bias, fc=o.fc),
            factor=o.factor,
            decode_type=o.decode_type,
            batch_syn_max=o.batch_syn_max,
            augment=Augment(o.aug_type),
            compute=compute,
        )
        self.update = recipes.update_recipe(o)
        self.everyone = RealImages(self.real, dataset.counts, self.group.all_reduce_disjoint)
        self.took = ""  # seconds of a network update, where they were measured
        self.shares_update = self.choose_update(last_session)

    def draws(self, purpose: str, *position: int) -> Draws:
        return Draws(self.device, self.o.seed, purpose, *position)

    def network(self, it: int) -> Network:
        """The fresh one of an outer iteration."""
        return fresh_network(self.spec, self.draws("network", it))

    def context(self, net: Network, draws: Draws, *, per_cluster: int = 1) -> Context:
        """What representatives are selected from."""
        o = self.o
        return Context(net, self.real, draws, self.selecting, o.cluster_raw, o.kmeans, per_cluster)

    # --- The state ----------------------------------------------------------------------------------------------------

    def state(self, *, empty: bool) -> State:
        """With initial pixels, or empty for those of a checkpoint."""
        o, classes = self.o, self.shard.classes
        pixels = torch.zeros(len(classes), *self.shape, device=self.device) if empty else self.initial_pixels()
        net = self.network(0)
        sgd = PixelSGD(
            pixels,
            lr=recipes.pixel_rate(o, side=self.dataset.side, base_side=self.dataset.base_side),
            momentum=o.mom_img,
            joint=self.real.normalize if o.pixel_step == "joint" else None,
            held=classes,
            classes=self.dataset.classes,
        )
        return State(
            pixels=sgd,
            trainer=self.trainer(net, pixels, together=self.shares_update),
            match=self.step(net, sgd),
            picks=torch.zeros(len(classes), o.batch_real, dtype=torch.int64, device=self.device),
            losses=torch.zeros(len(classes), device=self.device),
        )

    def initial_pixels(self) -> Tensor:
        net = fresh_network(self.spec, draws := self.draws("init"))
        return initial_pixels(self.context(net, draws), self.o.init, ipc=self.o.ipc, factor=self.o.factor)

    def step(self, net: Network, sgd: PixelSGD) -> Step:
        """How pixels learn: from the effect of real images on the network, or from experts' trajectories."""
        o = self.o
        if self.experts is None:
            return MatchingStep(self.matcher, net, sgd, self.real)
        return TrajectoryStep(
            self.matcher,
            net,
            sgd,
            self.real,
            self.experts,
            steps=o.student_steps,
            epochs=o.match_epochs,
            max_start=o.max_start,
            step_size=o.step_size,
            lr_step=o.lr_step,
            group=self.group,
        )

    def saved(self, state: State) -> dict[str, Any]:
        """A checkpoint's content, for all classes: the same whoever owns them."""
        content = state.save() | {"picks": self.everyone.everywhere(state.picks)}
        return content | {name: self.shard.all_gather(content[name]) for name in PER_CLASS}

    def restore(self, state: State, saved: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises KeyError, IndexError, RuntimeError and the like when it does not fit."""
        ours = saved | {name: self.shard.local(saved[name]) for name in PER_CLASS}
        state.restore(ours | {"picks": self.everyone.here(ours["picks"].to(self.device))})

    # --- The network's training between two matching steps ------------------------------------------------------------

    def trainer(self, net: Network, pixels: Tensor, *, together: bool) -> Trainer:
        """Of the network, on real images, or on the synthetic ones as they are whenever it trains.

        together: each rank on the images of its classes, instead of all on the same.
        """
        o, classes = self.o, self.dataset.classes
        ours = torch.isin(torch.arange(classes), torch.tensor(self.shard.classes)).to(self.device)
        shared = Together(ours, self.group.all_reduce_sum) if together else None
        # CutMix pastes into an image what belongs to another one, which may be another rank's.
        merge = self.group.all_reduce_disjoint if not together or self.update.mixup == "cut" else None
        if o.train_on == "real":
            images: Source = RealImages(self.real, self.dataset.counts, merge)
            return Trainer([net], [self.real], self.update, self.compute, images, shared)

        def current() -> Tensor:
            return self.shard.all_gather(decode(pixels, factor=o.factor, decode_type=o.decode_type))

        images = SyntheticImages(current, classes, decoded_count(o.ipc, factor=o.factor, decode_type=o.decode_type))
        return Trainer([net], [self.synthetic(pixels)], self.update, self.compute, images, shared)

    def choose_update(self, last_session: Mapping[str, Any]) -> bool:
        """Whether ranks share out the network's training. Otherwise each repeats all of it, and only images are sent.

        As a flag says, or as the last session of as many ranks did, so that a run that goes on does not depend on
        chance; otherwise it is measured. Raises UsageError where it cannot be.
        """
        o, group = self.o, self.group
        whole_batch = any(isinstance(module, nn.BatchNorm2d) for module in self.network(0).modules())
        if whole_batch and o.share_update == "on":
            raise UsageError(
                f"--share_update on: {self.spec.name} has batch norm, which looks at whole batches; use --norm_type "
                "instance, or --share_update off"
            )
        if self.experts is not None and whole_batch and not group.alone:
            raise UsageError(f"--method mtt: {self.spec.name} has batch norm; use --norm_type instance, or no torchrun")
        if group.alone or whole_batch or recipes.update_summary(o) == "none":
            return False
        if o.share_update != "auto":
            return o.share_update == "on"
        if last_session.get("ranks") == group.count:
            return last_session.get("network_update") != WHOLE
        pixels = torch.zeros(len(self.shard.classes), *self.shape, device=self.device)

        def way(together: bool) -> Any:
            trainer = self.trainer(self.network(0), pixels, together=together)
            return lambda: update_network(trainer, n_data=self.n_data, draws=self.draws("measured"))

        warm = 1 if self.device.type == "cpu" else Captured.WARM + 1
        alike, shared = group.seconds(way(False), way(True), wait=lambda: wait_for(self.device), warm=warm)
        self.took = f" ({1e3 * alike:.3g} ms on every rank, {1e3 * shared:.3g} ms shared out)"
        return shared < alike

    @property
    def update_kind(self) -> str:
        """On which the rounding of network updates depends."""
        return f"shared by {self.group.count} ranks" if self.shares_update else WHOLE

    @property
    def shared_by(self) -> str:
        """For people: who does what."""
        if self.group.alone:
            return ""
        counts = sorted({len(classes) for classes in self.group.shares})
        update = "shared out" if self.shares_update else "repeated by every rank"
        each = " or ".join(map(str, counts))
        return f"; {self.group.count} ranks own {each} classes each, network updates are {update}{self.took}"

    # --- Sets ---------------------------------------------------------------------------------------------------------

    def pixels(self, state: State) -> Tensor:
        """Of all classes, (classes, ipc, C, H, W)."""
        return self.shard.all_gather(state.pixels.pixels)

    def synthetic(self, pixels: Tensor) -> ImageSet:
        """The training images that pixels (classes, ipc, C, H, W) decode to now."""
        labels = torch.arange(len(pixels), device=self.device).repeat_interleave(self.o.ipc)
        return training_images(
            pixels.flatten(0, 1),
            labels,
            factor=self.o.factor,
            decode_type=self.o.decode_type,
            classes=self.real.classes,
            normalize=self.real.normalize,
        )

    def random_real(self, r: int) -> ImageSet:
        """As many randomly drawn real images per class as the set stores, other ones for every training."""
        draws = self.draws(BASELINE, r)
        context = self.context(fresh_network(self.spec, draws), draws)
        return coreset(context, "random", ipc=self.o.ipc, whole=self.shard.all_gather)
