"""From options to objects: data set, network, and the parts of a run. Nothing below sees an options object."""

from __future__ import annotations

import dataclasses
import logging
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from data import Dataset
from models import NetSpec, Network, forward_flop
from utils.config import checks, derived, resolve
from utils.config.options import FREE, RESUMABLE, CondenseOptions, Options
from utils.config.presets import TRAJECTORY
from utils.files.imagefiles import FULL
from utils.method.augment import Augment
from utils.method.evaluation import OnEpoch, Score, evaluate_networks
from utils.method.formation import training_images
from utils.method.frequencies import Frequencies
from utils.method.images import ImageSet, RealImages, SyntheticImages
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.pool import Pool, lowest
from utils.method.selection import BASELINE, STRATEGIES, Clusters, Context, cluster, coreset, initial_pixels
from utils.method.state import State
from utils.method.training import Together, Trainer, fresh_network
from utils.method.trajectory import TrajectoryStep
from utils.numerics.compilation import computing
from utils.numerics.compute import Captured
from utils.runs.board import check_board
from utils.runs.card import Card
from utils.runs.checkpoint import Said, resumed_from
from utils.runs.experts import Experts
from utils.runs.folder import RunFolder
from utils.runs.recorder import Recorder
from utils.system import distributed
from utils.system.device import be_deterministic, check_precision, pick_device, set_precision
from utils.system.distributed import SINGLE, Group, Shard
from utils.system.draws import Draws
from utils.system.errors import UsageError, UserError, first_line
from utils.system.process import Stopper

log = logging.getLogger("dream")

SHARED_FLOP = 1e9  # ranks share mini-batches of more work: digits take 5e8, CIFAR-10 3e9 or more; see tests/README.md


# --- What every script begins with ------------------------------------------------------------------------------------


def dataset(o: Options, *, card: Card | None = None, precision: str = "fp32") -> Dataset:
    """Data set on its device, for which determinism is set up.

    card: of a set distilled from it, by which the images of a folder are read and normalised. precision: that of the
    computations to come. Raises UsageError or UserError, naming the flag or file.
    """
    known = {} if card is None else card["normalization"]
    device = pick_device(o.device, distributed.local_rank())
    if o.deterministic:
        be_deterministic(device)
    check_precision(device, precision)
    set_precision(device, "fp32")  # outside of the blocks under `Compute.rounding`
    return Dataset(
        o.dataset,
        device=device,
        data_dir=o.data_dir,
        image_folder=o.image_folder,
        npz=o.npz,
        split=o.split,
        size=o.size,
        mean=known.get("mean"),
        std=known.get("std"),
        threads=o.data_threads,
        whiten=o.whiten,
        skip_broken=o.skip_broken,
        grey_range=None if card is None else tuple(card.get("grey_range", FULL)),
    )


class Problem(NamedTuple):
    """Data set that a run distils, and the network that it distils with."""

    data: Dataset
    spec: NetSpec


def problem(o: CondenseOptions) -> Problem:
    """Data set and network of a run, after a check of every rule between flags, data and network.

    Raises UsageError or UserError, naming the flag or file.
    """
    data = dataset(o, precision=o.precision)
    spec = resolve.network(o, o.net_type, data)
    checks.check_method(o, spec)
    checks.check_deterministic(o, data.device)
    checks.check_factor(o.factor, data.side)
    decoded = derived.formation(o).decoded_count(o.ipc)
    checks.check_batches(spec, min(decoded, o.batch_syn_max), o.batch_real, o.batch_size, o.n_data or 2)
    if o.tensorboard:
        check_board()
    return Problem(data, spec)


def run_folder(o: CondenseOptions, group: Group = SINGLE, data: Dataset | None = None) -> RunFolder:
    """Folder of a run; nothing is read or written yet. data: the images that it has to be of; None: any."""
    restart = o.restart and not distributed.restart_count()  # a process that torchrun restarts goes on instead
    saved = resolve.as_saved(o)
    return RunFolder(
        resolve.run_folder(o), saved, free=FREE, resumable=RESUMABLE, defaults=resolve.default_options(),
        restart=restart, group=group, data=data,
    )  # fmt: skip


# --- A run ------------------------------------------------------------------------------------------------------------


class Parts:
    """Objects of a run, built from its options. They hold the classes that this rank owns."""

    evaluation_precision = "fp32"  # whatever --precision is, so that accuracies of any two runs can be compared

    def __init__(
        self,
        o: CondenseOptions,
        problem: Problem,
        group: Group = SINGLE,
        experts: Experts | None = None,
        folder: RunFolder | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Share the classes among ranks, and check flags against the data.

        experts: those whose trajectories are matched, None for other methods. folder: the run's, see `resumed_from`.
        shard: used in place of one that balances the classes by their cost.
        Raises UsageError or UserError where flags and data do not fit.
        """
        self.o, self.problem, self.group, self.experts = o, problem, group, experts
        self.data, self.spec = problem
        self.device, self.counts = self.data.device, derived.kept_counts(o, self.data.counts)
        self.matches_images = o.match != TRAJECTORY
        self.pool: Pool | None = None
        if experts is not None and self.matches_images:
            self.pool = Pool(experts, self.spec, o.expert_epochs, o.networks, self.device, group)
        self.clusters: dict[int, Clusters] = {}  # of --select members, by the pool's network
        self.shard: Shard = shard or group.shard(derived.class_work(o, self.counts))
        if len(self.shard.classes) < self.data.classes:
            self.data.shard(self.shard.classes, group.all_reduce_sum)
        if not len(self.data.test):
            raise UserError(f"{o.dataset}: has no test images")
        if group.broadcast(lambda: self.data.skipped) != self.data.skipped:
            raise UserError(f"--skip_broken: files of {o.image_folder} can be read by some ranks and not by others")
        self.warnings = checks.check_sizes(o, self.counts, self.data.class_names, matches_images=self.matches_images)
        if o.seconds and (self.expert_seconds or 0) >= o.seconds:
            taken = f"the experts alone have taken {self.expert_seconds:.0f} s"
            self.warnings.append(f"--seconds {o.seconds:g}: {taken}, so nothing is distilled")
        if caveat := derived.caveat(o):
            self.warnings.append(caveat)
        self.real = self._kept() if o.keep < 1 else self.data.train
        self.formation = derived.formation(o)
        self.shape = (o.ipc, self.data.channels, self.data.side, self.data.side)  # of a class's stored pixels
        stored = (self.data.classes, *self.shape)
        said: Said = {"normalized": o.normalized, "whitened": o.whitened, "classes": o.classes}
        self.earlier = None if folder is None else resumed_from(o.resume_from, folder, stored, self.data, said)
        self.flop = derived.run_flop(o, self.spec, self.counts)
        self.compute = computing(self.device, o.compile, o.precision, self.flop)
        self.captured_kmeans = Captured(cluster, self.device) if o.kmeans == "batched" else None
        self.n_data = o.n_data if o.train_on == "real" else None  # None: all synthetic images
        self.shares_update = self._shares_update()

    def draws(self, purpose: str, *position: int) -> Draws:
        """Random numbers for one purpose at one position of the run."""
        return Draws(self.device, self.o.seed, purpose, *position)

    @cached_property
    def expert_seconds(self) -> float | None:
        """Seconds that training the experts has taken, whichever runs did it; None without experts."""
        experts = self.experts
        return None if experts is None else self.group.broadcast(lambda: experts.seconds)

    # --- Networks -----------------------------------------------------------------------------------------------------

    def network(self, it: int) -> Network:
        """Network of outer iteration `it`: a fresh one, or one of the pool. Raises UserError for a damaged pool."""
        draws = self.draws("network", it)
        return fresh_network(self.spec, draws) if self.pool is None else self.pool.network(self._member(it), draws)

    def set_up(self, it: int) -> tuple[float, Tensor | None]:
        """What `State.set_up` takes for outer iteration `it`."""
        rate = derived.pixel_rate(self.o, side=self.data.side, base_side=self.data.base_side, it=it)
        if not self.o.calibrate:
            return rate, None
        return rate, self._pool().ends(self._member(it))[1]

    def _member(self, it: int) -> int:
        """Number of the pool's network that outer iteration `it` uses."""
        return self.draws("pool", it).host.randrange(len(self._pool()))

    def _pool(self) -> Pool:
        assert self.pool is not None
        return self.pool

    def _kept(self) -> ImageSet:
        """The real images of this rank's classes with the lowest loss under the pool, --keep of every class.

        Raises UserError for a damaged pool.
        """
        trained = self.experts
        assert trained is not None
        mean = self.group.broadcast(lambda: torch.stack([trained.losses(k) for k in range(trained.count)]).mean(0))
        real, of_classes = self.data.train, mean.to(self.device).split(self.data.counts)
        kept = [real.starts[c] + lowest(of_classes[c], self.counts[c]) for c in real.held]
        return real.subset(torch.cat(kept))

    # --- Selection ----------------------------------------------------------------------------------------------------

    def context(
        self,
        net: Network,
        draws: Draws,
        *,
        real: ImageSet | None = None,
        per_cluster: int = 1,
        clusters: Clusters | None = None,
    ) -> Context:
        """Context of a selection among the real images of this rank's classes, under a network.

        real: in place of those that the run uses. clusters: those that were found before.
        """
        o, real = self.o, self.real if real is None else real
        cheapest, captured = self.compute.cheapest(), self.captured_kmeans
        return Context(
            net, real, draws, cheapest, o.cluster_raw, o.kmeans, per_cluster, captured=captured, clusters=clusters
        )

    def selecting(self, net: Network, it: int, step: int) -> Context:
        """Context of the selection before an inner step, under the network of this outer iteration.

        With --select members and a pool, clusters are those of the pool's network as it was trained, found once.
        """
        draws, clusters = self.draws("select", it, step), None
        if self.o.select == "members" and self.pool is not None:
            k = self._member(it)
            if k not in self.clusters:
                net, self.clusters[k] = self.pool.trained_network(k), Clusters(self.draws("clusters", k))
            clusters = self.clusters[k]
        return self.context(net, draws, per_cluster=self.o.per_cluster, clusters=clusters)

    def recorder(self, folder: RunFolder, stopper: Stopper) -> Recorder:
        """Clock, progress bar and metrics of the run."""
        o = self.o
        return Recorder(
            folder, stopper, self.group, niter=o.niter, inner_loop=o.inner_loop, interval=o.interval,
            spent=self.expert_seconds, budget=o.seconds, first_evaluation=o.eval_seconds,
        )  # fmt: skip

    def describe(self) -> str:
        """Description for people: the work of the run, and how ranks share it."""
        compiled = ", compiled" if self.compute.compile else ""
        work = f"{self.flop / 1e12:.3g} TFLOP to go in {self.o.precision}{compiled}"
        if self.group.alone:
            return work
        counts = " or ".join(map(str, sorted({len(classes) for classes in self.group.shares})))
        update = "shared by all ranks" if self.shares_update else "repeated by every rank"
        return f"{work}; {self.group.count} ranks own {counts} classes each, network updates are {update}"

    # --- The state ----------------------------------------------------------------------------------------------------

    def state(self, saved: dict[str, Any] | None) -> State:
        """State from a checkpoint's content if there is one, else from --resume_from, else the initial state.

        Raises UserError when the checkpoint does not fit.
        """
        if saved is not None:
            state = self._state(empty=True)
            try:
                state.load_state_dict(saved)
            except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason, path = first_line(error), resolve.run_folder(self.o)
                raise UserError(f"{path}: the checkpoint does not fit this run ({reason}); --restart") from error
            state.set_up(*self.set_up(state.it))
            steps = (state.it, state.step, self.o.inner_loop)
            log.info("going on after outer iteration %d, inner step %d of %d", *steps)
        elif (e := self.earlier) is not None:
            state = self._state(empty=True)
            ours = state.matching_step.learned
            learned = {k: x for k, x in e.learned.items() if k in ours and x.shape == ours[k].shape}
            state.begin_from(e.pixels, e.velocity, learned, it=e.it, seconds=e.seconds)
            log.info("beginning with the pixels of %s, after its outer iteration %d", e.source, e.it)
        else:
            state = self._state(empty=False)
        return state

    def _state(self, *, empty: bool) -> State:
        """State at the beginning of a run; empty: with zeros in place of initial pixels, to be filled."""
        o, classes, device = self.o, self.shard.classes, self.device
        pixels = torch.zeros(len(classes), *self.shape, device=device)
        net = fresh_network(self.spec, self.draws("network", 0))  # every outer iteration has its weights replaced
        trainer = self.trainer(net, pixels)
        if not empty:
            pixels.copy_(self._initial_pixels(trainer))
        rate = derived.pixel_rate(o, side=self.data.side, base_side=self.data.base_side)
        joint, count = self.real.normalize if o.pixel_step == "joint" else None, self.data.classes
        optimizer = PixelSGD(
            pixels, lr=rate, momentum=o.mom_img, joint=joint, held=classes, classes=count, average=o.average
        )
        return State(
            optimizer=optimizer,
            trainer=trainer,
            matching_step=self.matching_step(net, optimizer),
            picks=torch.zeros(len(classes), o.batch_real, dtype=torch.int64, device=device),
            losses=torch.zeros(len(classes), device=device),
            shard=self.shard,
            real_images=RealImages(self.real, self.counts),
        )

    def _initial_pixels(self, trainer: Trainer) -> Tensor:
        """Initial pixels, (classes, ipc, C, H, W), selected under a fresh network after --pretrain epochs.

        It takes the place of the trainer's network, which every outer iteration begins anew.
        """
        o, draws = self.o, self.draws("init")
        trainer.restart(fresh_network(self.spec, draws))
        for epoch in range(o.pretrain if o.init in STRATEGIES else 0):
            trainer.all_images([self.draws("pretrain init", epoch)])
        context = self.context(trainer.nets[0], draws)
        return initial_pixels(context, o.init, ipc=o.ipc, factor=o.factor, mode=o.pack)

    def matching_step(self, net: Network, optimizer: PixelSGD) -> MatchingStep | TrajectoryStep:
        """Object that moves the pixels: by matching real images under the network, or experts' trajectories."""
        o = self.o
        how = Comparison(objective=o.match, metric=o.metric, bias=o.bias, fc=o.fc)
        matcher = Matcher(how, self.formation, o.batch_syn_max, Augment(o.aug_type), self.compute)
        if self.matches_images:
            frequencies, judge = None, None
            if "cf" in how.parts:
                size, begin = net.classifier.in_features, self.draws("frequencies")
                frequencies = Frequencies(o.frequency_count, size, how=o.frequencies, draws=begin, group=self.group)
            if o.calibrate:
                judge = fresh_network(self.spec, self.draws("judge"))
            return MatchingStep(matcher, net, optimizer, self.real, frequencies=frequencies, judge=judge)
        assert self.experts is not None
        return TrajectoryStep(
            matcher, net, optimizer, self.real, self.experts, steps=o.student_steps, epochs=o.match_epochs,
            max_start=o.max_start, step_size=o.step_size, lr_step=o.lr_step, group=self.group,
        )  # fmt: skip

    # --- The network's training between two matching steps ------------------------------------------------------------

    def trainer(self, net: Network, pixels: Tensor, *, shared: bool | None = None) -> Trainer:
        """Trainer of the network on real images, or on the synthetic images as they are at each update.

        shared: whether ranks share its mini-batches; None: as the options say.
        """
        o, group, classes = self.o, self.group, self.data.classes
        recipe = derived.update_recipe(o)
        is_own = torch.isin(torch.arange(classes), torch.tensor(self.shard.classes)).to(self.device)
        shared = self.shares_update if shared is None else shared
        together = Together(is_own, group.all_reduce_sum) if shared else None
        if o.train_on == "real":
            # CutMix pastes a box of another image, which may be on another rank.
            needs_others = together is None or recipe.mixup == "cut"
            images = RealImages(self.real, self.counts, group.all_reduce_disjoint if needs_others else None)
            return Trainer([net], [self.real], recipe, self.compute, images, together)

        def decoded() -> Tensor:
            """Training images of all classes, (classes, S, C, H, W), from this rank's pixels as they are now."""
            return self.shard.all_gather(self.formation.decode(pixels))

        synthetic = SyntheticImages(decoded, classes, self.formation.decoded_count(o.ipc))
        return Trainer([net], [self.synthetic(pixels)], recipe, self.compute, synthetic, together)

    def _shares_update(self) -> bool:
        """Whether ranks share network updates; otherwise every rank does all of them, and only images are sent.

        Raises UsageError for batch norm where updates would have to be shared.
        """
        o, group = self.o, self.group
        batch_norm = models.has_batch_norm(self.spec)
        if batch_norm and o.share_update == "on":
            raise UsageError(
                f"--share_update on: {self.spec.name} has batch norm, which looks at whole batches; use --norm_type "
                "instance, or --share_update off"
            )
        if self.experts is not None and batch_norm and not group.alone:
            raise UsageError(f"--method mtt: {self.spec.name} has batch norm; use --norm_type instance, or no torchrun")
        if group.alone or batch_norm or not derived.has_update(o):
            return False
        if o.share_update == "auto":  # where a mini-batch is worth the communication
            return 3 * o.batch_real * forward_flop(self.spec) >= SHARED_FLOP
        return o.share_update == "on"

    @property
    def conditions(self) -> dict[str, Any]:
        """What the record of a session says besides the machine and versions: above all what rounding depends on."""
        return {
            **({} if self.data.skipped is None else {"skipped_files": self.data.skipped}),
            "precision": self.o.precision,
            "deterministic": self.o.deterministic,
            "ranks": self.group.count,
            "network_update": f"shared by {self.group.count} ranks" if self.shares_update else "whole",
        }

    # --- Sets and their evaluation ------------------------------------------------------------------------------------

    def synthetic(self, pixels: Tensor) -> ImageSet:
        """Training images that the pixels (classes, ipc, C, H, W) of this rank's or all classes decode to."""
        labels = torch.arange(len(pixels), device=self.device).repeat_interleave(self.o.ipc)
        return training_images(
            pixels.flatten(0, 1), labels, self.formation, classes=self.data.classes, normalize=self.real.normalize
        )

    def random_real(self, r: int) -> ImageSet:
        """Baseline for training number r: as many random real images per class as the set stores."""
        draws = self.draws(BASELINE, r)
        context = self.context(fresh_network(self.spec, draws), draws, real=self.data.train)
        return coreset(context, "random", ipc=self.o.ipc, all_gather=self.shard.all_gather)

    def evaluate(self, sets: list[ImageSet], title: str, stopper: Stopper, on_epoch: OnEpoch | None = None) -> Score:
        """Train --repeat networks, shared by the ranks, each on its set, and test them. Raises Stopped on request."""
        o, group = self.o, self.group
        trainings = group.assigned([1.0] * o.repeat)
        with stopper.stopping_together(group):
            score = evaluate_networks(
                self.spec,
                sets.__getitem__,
                self.data.test,
                derived.evaluation_recipe(o, flip=self.data.flip),
                trainings=trainings,
                seed=o.seed,
                compute=dataclasses.replace(self.compute, precision=self.evaluation_precision),
                title=title,
                stopper=stopper,
                on_epoch=on_epoch,
            )
        return score.all_reduce(trainings, group, repeat=o.repeat)
