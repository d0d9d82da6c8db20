"""Crystals from a trained model: reconstructed, sampled from its latent space, or on the way between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from math import inf, pi
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dist_train.crystal.decode import Decoded, Fields
from dist_train.crystal.decode_box import decode_frame
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.metrics import crowded, possible
from dist_train.crystal.parallel import in_order, parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import symmetrized
from dist_train.crystal.voxelize import Shape
from dist_train.errors import CrystalError, ModelError
from dist_train.models.flow import LatentFlow
from dist_train.models.reconstruct import GRIDS, Codec, filled
from dist_train.models.vae import Latent, latent_shape

T = TypeVar("T")
R = TypeVar("R")

CODED, FLOWED, SAMPLED = 32, 256, 1024
"""Crystals that a thread encodes or decodes at a time, that a flow is given, and that are decoded or sampled before the next
ones are begun: among so many there are others of most shapes of grids."""
PARTS = 8
"""That few crystals are divided into, for as many workers at most."""
FRAMES = 4
"""Crystals that a process makes of what the networks say at a time: few, so that no process idles over the last ones."""
ATTEMPTS, COMPOSITIONS, ANEW = 6, 3, 1_000_003
"""Of a sample to be made of the atoms that were drawn for it; how often atoms are drawn; and how far apart the seeds of all
these are. Of a seed, torch takes the last 32 bits."""
CORRECTIONS, PATIENCE, CORRECTED = 16, 3, 256
"""How often a crystal is corrected at most, where nobody says otherwise; how often in vain, where it is near; how many at a
time."""
OTHER, TOLD, ALONE = range(3)
"""Whether a sample is made of the atoms drawn for it, none of them in another's place (see `metrics.crowded`): not; when the
decoder is told of them; when of the latent alone."""
EXACT, FAR = 0.05, 1.0
"""Errors of latents, in standard deviations of the posterior, below which nothing is left to correct, and beyond which a
crystal may be another one."""
HARDLY_FARTHER = 1.03
"""How many times as far from the latent drawn a symmetric crystal may be as the one decoded: see data/models/README.md."""
FAR_STEP, REMEMBERED = 0.25, 3
"""The share of what a crystal lacks that its latent is corrected by far away, where larger steps lose some of the crystals;
and the last turns that a step near by is made of."""
SAME = 1e-6
"""Of two changes of what is lacking: the second says nothing new where so little of its square is another direction's."""


def encode(
    codec: Codec, crystals: Sequence[Crystal], progress: Callable[[int], None] = lambda n: None, workers: int = 1
) -> Tensor:
    """[N, latent] posterior means of crystals that the model's grid holds (see `representable`), over `workers` threads.

    progress(n): n more are encoded.
    """
    return posterior(codec, crystals, progress, workers).mean


def posterior(
    codec: Codec,
    crystals: Sequence[Crystal],
    progress: Callable[[int], None] = lambda n: None,
    workers: int = 1,
    shapes: Sequence[Shape] | None = None,
) -> Latent:
    """The same with the variances; shapes: of the crystals' grids, where they aren't those of their cells."""
    of_each = shapes if shapes is not None else [grid_shape(crystal.lattice_A, codec.model.grid) for crystal in crystals]
    # Those of one shape together: networks take as long for few crystals of a shape as for many.
    order = sorted(range(len(crystals)), key=lambda place: of_each[place])
    batches = _parts(order)

    def encoded(places: list[int]) -> Latent:
        return codec.posterior([crystals[place] for place in places], [of_each[place] for place in places])

    found = torch.empty(2, len(crystals), codec.model.model.latent_size, device=codec.device)
    for places, part in zip(batches, _by_networks(codec, encoded, batches, workers), strict=True):
        found[:, places] = torch.stack(part)
        progress(len(places))
    return Latent(*found)


def decode(
    codec: Codec,
    latent_NL: Tensor,
    ids: Sequence[str],
    workers: int = 1,
    atoms_NE: Tensor | None = None,
    corrections: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[Decoded]:
    """The crystals of latents, in order: networks in `workers` threads, `decode_frame` over as many processes.

    One worker means no other process. The crystals are the same, bit for bit, for any number. atoms_NE: how many of each of
    the model's elements they have, where that is known.
    corrections: how often, at most, a crystal is encoded again and its latent, plus a share of what that one lacks, decoded
    anew: it is the encoder that says what a latent means, and the decoder knows it not quite. The nearest of these crystals
    is given, with its `latent_error`. progress(n): n more are done, though one before them may not be.
    """
    if corrections:
        yield from _corrected(codec, latent_NL.float().cpu(), ids, workers, atoms_NE, corrections, progress)
        return
    for start in range(0, len(ids), SAMPLED):
        part = slice(start, start + SAMPLED)
        yield from _decoded(
            codec, latent_NL[part], ids[part], workers, None if atoms_NE is None else atoms_NE[part], progress
        )


def _corrected(
    codec: Codec, latent_NL: Tensor, ids: Sequence[str], workers: int, atoms_NE: Tensor | None, corrections: int,
    progress: Callable[[int], None],
) -> Iterator[Decoded]:  # fmt: skip
    """As one crystal is done the next takes its place: networks take as long for few crystals of a shape as for many."""
    all_ = [_Correction(latent_L, latent_L) for latent_L in latent_NL]
    rows: list[int] = []
    entered = given = 0
    shapes = codec.some_shapes(latent_NL)
    while given < len(all_):
        first, entered = entered, min(entered + CORRECTED - len(rows), len(all_))
        rows += range(first, entered)
        told_ML = torch.stack([all_[row].told_L for row in rows])
        known = None if atoms_NE is None else atoms_NE[rows]
        decoded = dict(zip(rows, _decoded(codec, told_ML, [ids[row] for row in rows], workers, known), strict=True))
        for row, item in decoded.items():
            all_[row].best = all_[row].best or item
        crystals = {row: item.crystal for row, item in decoded.items() if item.crystal is not None}
        rows = list(crystals)
        # On the grid that the latent is of: that of a cell decoded not quite right may have another shape.
        again = posterior(codec, list(crystals.values()), workers=workers, shapes=[shapes[row] for row in rows])
        for row, *of_again in zip(rows, again.mean.cpu(), again.log_variance.cpu(), strict=True):
            all_[row].correct(decoded[row], *of_again)
        rows = [row for row in rows if all_[row].goes_on(corrections)]
        progress(len(decoded) - len(rows))
        for done in all_[given : min([*rows, entered])]:
            assert done.best is not None
            yield done.best
            given += 1


@dataclass
class _Correction:
    """A crystal being corrected. told_L: what the decoder is told in place of latent_L; precision_L: one over the variances
    of the posterior of the crystal decoded first; in_vain: turns since the best one; near: what the decoder was told, and
    what its crystal lacked, in the last turns near by.
    """

    latent_L: Tensor
    told_L: Tensor
    best: Decoded | None = None
    precision_L: Tensor | None = None
    turns: int = 0
    in_vain: int = 0
    near: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def correct(self, decoded: Decoded, mean_L: Tensor, log_variance_L: Tensor) -> None:
        """decoded was encoded to a posterior of this mean and variance."""
        if self.precision_L is None:
            self.precision_L = torch.exp(-log_variance_L)
        lack_L = self.latent_L - mean_L
        error = latent_error(lack_L, self.precision_L)
        self.in_vain += 1
        if self.best is None or self.best.latent_error is None or error < self.best.latent_error:
            self.best, self.in_vain = replace(decoded, latent_error=error), 0
        self.near = [] if error > FAR else [*self.near, (self.told_L, lack_L)][-REMEMBERED:]
        self.told_L = _extrapolated(self.near, self.precision_L) if self.near else self.told_L + FAR_STEP * lack_L
        self.turns += 1

    def goes_on(self, corrections: int) -> bool:
        """Whether another turn may bring it nearer."""
        assert self.best is not None and self.best.latent_error is not None
        error = self.best.latent_error
        return self.turns <= corrections and error > EXACT and (error > FAR or self.in_vain < PATIENCE)


def _extrapolated(turns: Sequence[tuple[Tensor, Tensor]], precision_L: Tensor) -> Tensor:
    """What to tell the decoder next, by what it was told, and what was lacking then, in the last turns.

    Anderson's mixing (J. ACM 12, 547, 1965): the change of what is lacking with what is told is taken for linear.
    """
    (*before, (told_L, lack_L)) = turns
    if not before:
        return told_L + lack_L
    of_told_ML = torch.stack([told_L - earlier_L for earlier_L, _ in before])
    of_lack_ML = torch.stack([lack_L - earlier_L for _, earlier_L in before])
    # Sums of products, not matrix products, which are rounded by the number of threads.
    weighed_ML = (of_lack_ML * precision_L).double()
    gram_MM = (weighed_ML[:, None] * of_lack_ML).sum(-1).numpy()
    shares_M = np.linalg.lstsq(gram_MM, (weighed_ML * lack_L).sum(-1).numpy(), rcond=SAME)[0]
    steps_ML = of_told_ML + of_lack_ML
    return told_L + lack_L - (steps_ML * torch.from_numpy(shares_M).float()[:, None]).sum(0)


def _decoded(
    codec: Codec, latent_NL: Tensor, ids: Sequence[str], workers: int, atoms_NE: Tensor | None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Decoded]:  # fmt: skip
    """`decode` without corrections."""
    shapes = codec.some_shapes(latent_NL)
    order = sorted(range(len(ids)), key=shapes.__getitem__)  # see `posterior`

    def decodable(places: list[int]) -> list[Fields | str]:
        return codec.decodable(
            latent_NL[places], [ids[place] for place in places], None if atoms_NE is None else atoms_NE[places]
        )

    fields = _by_networks(codec, decodable, _parts(order), workers)
    frame = partial(decode_frame, spec=codec.model.grid, channel=codec.channel)
    found: dict[int, Decoded] = {}
    for place, item in zip(order, parallel_map(frame, chain.from_iterable(fields), workers, FRAMES), strict=True):
        found[place] = item
        progress(1)
    return [found[place] for place in range(len(ids))]


def _parts(places: list[int]) -> list[list[int]]:
    """Of at most CODED; of few, some for every worker. By their number alone: where layers have odd sizes, torch rounds by
    the place in a batch, too."""
    size = min(CODED, max(GRIDS, -(-len(places) // PARTS)))
    return [places[start : start + size] for start in range(0, len(places), size)]


def _by_networks(codec: Codec, work: Callable[[T], R], batches: Iterable[T], workers: int) -> Iterator[R]:
    """work(batch) for every batch, in order; on CPUs, over threads.

    Each of them is torch's only one: sums over more are rounded otherwise, and a crystal would hang on the cores there are.
    """
    threads = max(workers, 1) if codec.device.type == "cpu" else 1
    usual = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from in_order(pool, work, batches, threads)
    finally:
        torch.set_num_threads(usual)


class Draws(NamedTuple):
    """latent_NL from the prior; atoms_NE: of each element, that they were drawn for, where the prior says."""

    latent_NL: Tensor
    atoms_NE: Tensor | None


def draw(
    codec: Codec, n: int, seed: int, workers: int = 1, attempt: int = 0, others: int = 0,
    places: Sequence[int] | None = None,
) -> Draws:  # fmt: skip
    """What was fitted to the training crystals' latents, the bundle's flow or else a Gaussian. Same seed, same draws.

    attempt, others: numbers of other latents, and of other atoms, of the same seed; places: of these draws alone, of n.
    """
    model, chosen = codec.model, torch.tensor(range(n) if places is None else places, dtype=torch.int64)
    generator = torch.Generator().manual_seed((seed + attempt * ANEW) % 2**63)
    normal = torch.randn(n, model.model.latent_size, generator=generator)[chosen]
    noise = torch.split(filled(normal).to(codec.device), FLOWED)
    atoms: list[Tensor] = []
    if model.flow and (known := model.flow.compositions):
        of_atoms = torch.Generator().manual_seed((seed + 1 + others * ANEW) % 2**63)
        uniform = filled(torch.rand(n, known.most_elements + 1, 2, generator=of_atoms)[chosen]).to(codec.device)
        atoms = list(_by_networks(codec, known.draw, torch.split(uniform, FLOWED), workers))
    found = list(_by_networks(codec, partial(_carried, codec), zip(noise, atoms or repeat(None)), workers))
    latents = torch.cat(found)[: len(chosen)].cpu()
    return Draws(latents, torch.cat(atoms)[: len(chosen)].cpu() if atoms else None)


def _carried(codec: Codec, part: tuple[Tensor, Tensor | None]) -> Tensor:
    """Latents of noise, and of the atoms that crystals are to be made of."""
    (noise_BL, atoms_BE), model = part, codec.model
    if model.flow is None:
        return model.prior_mean.float() + noise_BL @ model.prior_cholesky.float().T
    centre_L, scale, n = model.flow_centre(model.flow.n_centred), model.latent_scale, model.model.latent
    if isinstance(model.flow, LatentFlow):
        return centre_L + scale * model.flow.carry(noise_BL, atoms_BE)

    def coarse(vector_BV: Tensor) -> list[Shape]:
        """A vector of no cell has a grid, too, which nobody will look at."""
        assert model.model.latent_voxels is not None
        shapes = codec.some_shapes(centre_L[:n] + scale * vector_BV)
        return [latent_shape(shape, model.model.latent_voxels) for shape in shapes]

    assert atoms_BE is not None
    return centre_L + scale * model.flow.carry(noise_BL, atoms_BE, coarse)


class Sample(NamedTuple):
    """A crystal, and latent_L that it is encoded to; of a prior that draws no atoms, that it was decoded from."""

    latent_L: Tensor
    decoded: Decoded


def samples(
    codec: Codec, ids: Sequence[str], seed: int, workers: int = 1,
    progress: Callable[..., None] = lambda n, **figures: None, best_of: int = 1,
) -> list[Sample]:  # fmt: skip
    """A sample for each id; same seed, same samples, however many.

    A prior that draws atoms first is taken at its word: the decoder is told of them, and of the crystal that it makes and
    its neighbours in higher symmetry (see `_symmetric`) the most symmetric one that the latent allows is encoded. That
    crystal, with that latent, is the sample where the decoder, told of nothing else, makes a crystal of the same atoms of
    the latent, and both have room for them (see `metrics.crowded`). If not, another one is drawn for these atoms,
    `ATTEMPTS` times at most: then a crystal stays that the decoder made of them when it was told. Where it never made one,
    other atoms are drawn. progress(n, waiting=m): n more are done, and m of those at work aren't.
    best_of: latents drawn for each sample. Of several that would do, the one stays that is nearest to what its crystal is
    encoded to, in standard deviations of that posterior: the farther away, the more seldom a crystal is a likely one.
    Raises ModelError for more than one where the prior draws no atoms.
    """
    if best_of > 1 and not (codec.model.flow and codec.model.flow.compositions):
        raise ModelError(f"best of {best_of}: this model's samples are drawn without their atoms; use fit-prior, or give 1")
    found: list[Sample] = []
    for start in range(0, len(ids), SAMPLED):
        places = range(start, min(start + SAMPLED, len(ids)))
        found += _samples(codec, ids, seed, workers, places, best_of, progress)
        progress(len(places), waiting=0)
    return found


class _Try(NamedTuple):
    """made: OTHER, TOLD or ALONE; nearness: minus the error of the latent that was drawn."""

    made: int
    nearness: float
    sample: Sample


def _samples(
    codec: Codec, ids: Sequence[str], seed: int, workers: int, places: Sequence[int], best_of: int,
    progress: Callable[..., None],
) -> list[Sample]:  # fmt: skip
    """Those at some places of all."""
    found = dict[int, _Try]()
    attempts = max(ATTEMPTS, best_of)
    for others in range(COMPOSITIONS):
        waiting = [place for place in places if place not in found or found[place].made == OTHER]
        for attempt in range(attempts):
            if not waiting:
                break
            progress(0, waiting=len(waiting))
            drawn = draw(codec, len(ids), seed, workers, others * attempts + attempt, others, waiting)
            for place, new in zip(waiting, _tried(codec, drawn, [ids[place] for place in waiting], workers), strict=True):
                found[place] = max(found.get(place, new), new, key=itemgetter(0, 1))
            waiting = [place for place in waiting if found[place].made < ALONE or attempt + 1 < best_of]
    return [found[place].sample for place in places]


def _tried(codec: Codec, drawn: Draws, ids: Sequence[str], workers: int) -> list[_Try]:
    """What comes of each draw."""
    latent_NL, atoms_NE = drawn
    if atoms_NE is None:
        decoded = decode(codec, latent_NL, ids, workers)
        return [_Try(ALONE, 0.0, Sample(*item)) for item in zip(latent_NL, decoded, strict=True)]
    rows = returned(codec, latent_NL, atoms_NE, workers, ids)
    made = [place for place, row in enumerate(rows) if _as_meant(codec, row.decoded, atoms_NE[place])]
    for place, row in zip(made, _symmetric(codec, [rows[place] for place in made], workers), strict=True):
        rows[place] = row
    found = [_Try(OTHER, -row.error, Sample(row.again_L, row.decoded)) for row in rows]
    if made:
        again_ML = torch.stack([rows[place].again_L for place in made])
        decoded = decode(codec, again_ML, [ids[place] for place in made], workers)
        for place, alone in zip(made, decoded, strict=True):
            found[place] = found[place]._replace(made=ALONE if _as_meant(codec, alone, atoms_NE[place]) else TOLD)
    return found


def _symmetric(codec: Codec, rows: Sequence[Returned], workers: int) -> list[Returned]:
    """Rows with a crystal, each with the most symmetric one that its latent allows: `HARDLY_FARTHER` from it than decoded.

    Latents that are drawn aren't exact, which moves atoms by some 0.1 A and hides symmetries that nearly all crystals have.
    """
    spec, found = codec.model.grid, list(rows)
    crystals = [row.decoded.crystal for row in rows if row.decoded.crystal is not None]
    near: list[tuple[int, Crystal, Shape]] = []
    for place, others in enumerate(parallel_map(symmetrized, crystals, workers, FRAMES)):
        near += [(place, other, grid_shape(crystals[place].lattice_A, spec)) for _, other in others]
    # In the cell, at the origin and on the grid of the crystal decoded: others have other latents.
    there = posterior(codec, [crystal for _, crystal, _ in near], workers=workers, shapes=[shape for *_, shape in near])
    chosen: dict[int, Crystal] = {}
    for (place, crystal, _), mean_L, log_variance_L in zip(near, *(part.cpu() for part in there), strict=True):
        away = latent_error(rows[place].latent_L - mean_L, torch.exp(-log_variance_L))
        if away <= HARDLY_FARTHER * rows[place].error and not crowded(crystal):
            with suppress(CrystalError):
                chosen[place] = representable(crystal, spec)
    again = encode(codec, list(chosen.values()), workers=workers).cpu()
    for (place, crystal), again_L in zip(chosen.items(), again, strict=True):
        decoded = replace(rows[place].decoded, crystal=crystal)
        found[place] = rows[place]._replace(decoded=decoded, again_L=again_L)
    return found


def _as_meant(codec: Codec, decoded: Decoded, atoms_E: Tensor) -> bool:
    """Whether there is a crystal, made of these atoms, with room for them."""
    if decoded.crystal is None or not possible(decoded.crystal):
        return False
    composition = decoded.crystal.composition
    return [composition.get(z, 0) for z in codec.model.elements] == atoms_E.tolist() and not crowded(decoded.crystal)


def sample_latents(codec: Codec, n: int, seed: int, workers: int = 1) -> Tensor:
    """[n, latent] of `samples`."""
    found = samples(codec, [f"{place}" for place in range(n)], seed, workers)
    return torch.stack([sample.latent_L for sample in found]) if found else torch.empty(0, codec.model.model.latent_size)


class Returned(NamedTuple):
    """latent_L and the crystal that it decodes to, as the grid takes it; again_L: that crystal encoded; error: of latent_L,
    see `latent_error`.
    """

    latent_L: Tensor
    decoded: Decoded
    again_L: Tensor
    error: float = inf


def returned(
    codec: Codec, latent_NL: Tensor, atoms_NE: Tensor | None = None, workers: int = 1, ids: Sequence[str] | None = None
) -> list[Returned]:
    """What latents decode to, encoded again; the latent itself where there is no crystal that the grid holds.

    atoms_NE: see `decode`; ids: of the crystals, without them their places.
    """
    rows, held = [], {}
    decoded = decode(codec, latent_NL, ids or [f"{place}" for place in range(len(latent_NL))], workers, atoms_NE)
    for place, (latent_L, item) in enumerate(zip(latent_NL, decoded, strict=True)):
        if item.crystal is not None:
            try:
                held[place] = representable(item.crystal, codec.model.grid)
                item = replace(item, crystal=held[place])
            except CrystalError as error:
                item = Decoded(None, item.confidence_N, str(error))
        rows.append(Returned(latent_L, item, latent_L))
    again = posterior(codec, list(held.values()), workers=workers)
    for place, mean_L, log_variance_L in zip(held, again.mean.to(latent_NL), again.log_variance.to(latent_NL), strict=True):
        away = latent_error(latent_NL[place] - mean_L, torch.exp(-log_variance_L))
        rows[place] = rows[place]._replace(again_L=mean_L, error=away)
    return rows


def latent_error(lack_L: Tensor, precision_L: Tensor) -> float:
    """How far a latent is from what its crystal is encoded to, in standard deviations of the posterior, root mean square.

    precision_L: one over the variances of the posterior.
    """
    return float((lack_L.square() * precision_L).mean().sqrt())


def interpolate_latents(start_L: Tensor, stop_L: Tensor, steps: int, around_L: Tensor | None = None) -> Tensor:
    """[steps, latent] from one latent to another, both ends included.

    On the straight line; around a latent, such as the prior's mean, on the arc that turns at an even pace from one end's
    direction to the other's (Shoemake, SIGGRAPH 1985). A straight line comes nearer to the mean than crystals lie.
    """
    weights = torch.linspace(0, 1, steps)[:, None]
    if around_L is None:
        return start_L + weights * (stop_L - start_L)
    start, stop = start_L - around_L, stop_L - around_L
    lengths = start.norm() * stop.norm()
    angle = torch.arccos((start @ stop / lengths.clamp_min(1e-30)).clamp(-1, 1))
    if not 1e-3 < angle < pi - 1e-3:  # one direction, or opposite ones with no arc of their own between them
        return interpolate_latents(start_L, stop_L, steps)
    arc: Tensor = (torch.sin((1 - weights) * angle) * start + torch.sin(weights * angle) * stop) / torch.sin(angle)
    return around_L + arc


def altered_latents(codec: Codec, latent_L: Tensor, n: int, radius: float, seed: int) -> Tensor:
    """[n, latent] around one latent, in random directions; same seed, same directions.

    radius: how far away all of them are, in standard deviations of the training crystals' latents (Mahalanobis distance).
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(n, codec.model.model.latent_size, generator=generator)
    steps: Tensor = radius * noise / noise.norm(dim=1, keepdim=True)
    return latent_L.cpu() + steps @ codec.model.prior_cholesky.cpu().float().T


def reconstruct(
    codec: Codec, crystals: Sequence[Crystal], workers: int = 1, corrections: int = CORRECTIONS
) -> list[Decoded]:
    """Each crystal through encoder and decoder; one that the grid can't hold gives an empty result with the reason.

    corrections: see `decode`.
    """
    results: list[Decoded | None] = []
    held: list[Crystal] = []
    for crystal in crystals:
        try:
            held.append(representable(crystal, codec.model.grid))
            results.append(None)
        except CrystalError as error:
            results.append(Decoded(None, np.zeros(0), str(error)))
    latents, ids = encode(codec, held, workers=workers), [crystal.id for crystal in held]
    decoded = decode(codec, latents, ids, workers, corrections=corrections)
    return [result or next(decoded) for result in results]
