"""Grids back to crystals: species voting, non-maximum suppression with the periodic metric, refinement on the density.

1. Every voxel votes for its most probable element with the probability that an atom is there at all. A voxel's score is
   the share of its element's votes in the ball of the species radius around it.
2. Voxels are taken as atoms from the highest score down; a taken atom suppresses the voxels near it.
3. Positions start at the centre of the votes and are refined on the density, each start and each frequency of the density
   weighed by its error (see `refine`). Density left over at a labelled voxel is another atom, and all are refined anew.
4. Where an estimate of the atoms is given, a voxel counts by its share of the density's integral and its height, too, for a
   network that hesitates between two places votes for both and spreads one atom's density over them. The estimate is weighed
   against this in how many atoms there are, and against the votes in which element each is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal import kernels, labels
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.lattice import MIN_VOLUME_A3, image_offsets, periodic_distances, plane_spacings
from dist_train.crystal.refine import refine
from dist_train.crystal.structure import Crystal, wrap
from dist_train.crystal.voxelize import code_table, voxelize

FloatArray = NDArray[np.float64]
Channel = Literal["occupancy", "z_density"]


class Estimate(NamedTuple):
    """Of the atoms in a cell, as a network makes it; no whole numbers.

    atoms: all; composition_Z: of each atomic number, -inf of elements that it doesn't know; standard deviations of these.
    """

    atoms: float
    composition_Z: NDArray[np.floating]
    atoms_error: float = 0.15
    composition_error: float = 0.3


Fields = tuple[str, NDArray[np.float32], NDArray[np.integer], NDArray[np.float32], FloatArray, Estimate | None]
"""What `decode` takes: id, density, species, probability of an atom, lattice; and estimate."""

MIN_SCORE, LEAST_SCORE = 0.35, 0.1
"""Share of the ball's votes below which a voxel is no atom, and below which not even a count of atoms makes it one."""
EVIDENCE = (7.0, 7.0, 7.0, -12.0)
"""Log-odds that a voxel found is an atom: for its score, its mass and its height, each about 1 for an atom, and for nothing.
From a logistic regression on what a model of the Materials Project decoded of validation crystals."""
LEAST_EVIDENCE, TAKEN_AWAY = -6.0, 8
"""Log-odds of what is clearly no atom: all such go at once; of others, one in so many of those beyond the estimate."""
MASS_WIDTH, MASS_ROUNDS = 1.15, 6
"""Sigma of the Gaussians that share out the density, over the spec's; rounds in which they do."""
LEAST_SHARE = 0.02
"""Share of the votes that an element has that nobody voted for, where they are weighed against an estimated composition."""
HUBER = 1.0
"""Standard deviations from which an error of a composition counts as one of a long tail: networks overlook an element."""
MIN_DENSITY, CLEAR_SCORE = 0.2, 0.6
"""Density, in heights of an atom, below which a voxel is no atom, unless its score is clear."""
LIKE_RADII, UNLIKE_RADII = 1.6, 1.2
"""Votes of the same element / of different elements nearer than this many species radii are taken for one atom's."""
CENTROID_RADII, CENTROID_MOVES = 1.15, 3
"""Ball of a centroid, in species radii (a little wider, so that its edge doesn't cut the sphere of labels); how often it is
moved to the centre of its votes."""
SPHERE_STEP, SPHERE_STEPS = 0.1, 4
"""Shifts of a sphere of labels that are tried from its centroid, along each axis: how far apart in voxels, how many."""
NETWORK_ERROR_A = 0.005
"""Part of a position's error that its votes don't show: networks shift whole spheres."""
MISSING_HEIGHT, MISSING_AWAY, MISSING_ERROR_A, MAX_COMPLETIONS = 0.4, 0.6, 0.2, 3
"""Density left over, in heights of an atom, where one is missing; how far from all found, in least distances of like atoms;
the error of its voxel; how often to look."""
FIT_ERROR_A = 0.001
"""Atoms may come out nearer than the least distance by this."""
MAX_ATOMS_PER_A3 = 0.5
"""Number density above which a field is no crystal; diamond, the densest at normal pressure, has 0.18."""
MAX_STEP_SIGMAS = 4.0
"""Distance of voxels, in widths of an atom, at which one can lie between them unseen."""
MIN_SPACING_A = 0.5
"""Distance of opposite faces below which a decoded cell is too flat to be one."""


@dataclass(frozen=True)
class Decoded:
    """crystal: None where nothing could be decoded, and then `reason` says why; confidence_N: [N] votes' share, 0-1.

    latent_error: how far its own latent lies from the one that it was decoded from, root mean square in standard deviations
    of the posterior; below 1 it is nearly always the crystal meant, beyond that nobody knows. None where nobody looked.
    """

    crystal: Crystal | None
    confidence_N: FloatArray
    reason: str = ""
    latent_error: float | None = None


def decode(
    id: str,
    density_DHW: NDArray[np.float32],
    species_DHW: NDArray[np.integer],
    atom_probability_DHW: NDArray[np.float32],
    lattice_A: FloatArray,
    spec: GridSpec,
    channel: Channel = "occupancy",
    estimate: Estimate | None = None,
) -> Decoded:
    """The crystal in a periodic `cell` grid.

    density_DHW: a density channel, which tells where exactly atoms are; species_DHW: the most probable element of each
    voxel, were there an atom (0: none); atom_probability_DHW: probability of any atom, 0-1 (`votes` makes these two of
    logits); lattice_A: [3, 3] rows in angstrom; channel: which one the density is; estimate: of the atoms.
    Fields that hold no crystal (nothing found, not finite, absurdly many atoms) give an empty result with the reason.
    """
    nothing = np.zeros(0)
    if not (np.isfinite(density_DHW).all() and np.isfinite(atom_probability_DHW).all()):
        return Decoded(None, nothing, "the fields are not finite")
    if species_DHW.min() < 0 or species_DHW.max() > MAX_Z:
        return Decoded(None, nothing, f"the species are no atomic numbers from 0 to {MAX_Z}")
    if fault := _lattice_fault(lattice_A, species_DHW.shape, spec.sigma_A):
        return Decoded(None, nothing, fault)
    grid = _Grid(
        np.ascontiguousarray(species_DHW, np.uint8), np.ascontiguousarray(atom_probability_DHW, np.float32), lattice_A, spec
    )
    density = np.ascontiguousarray(density_DHW, np.float32)
    heights = code_table(spec.model_copy(update={"channels": (channel,)}))[:, 0]
    most = min(spec.max_atoms, int(MAX_ATOMS_PER_A3 * abs(np.linalg.det(lattice_A))))
    voxels, scores = grid.find(density, heights, most + 1, estimate)
    if not len(voxels):
        told = f"no voxel with any density scores {MIN_SCORE} or more" if estimate is None else "none is likely to be one"
        return Decoded(None, nothing, f"no atom found: {told}")
    if len(voxels) > most:
        return Decoded(None, nothing, f"over {most} atoms found, more than the cell or the spec can hold")
    likely = most if estimate is None else min(most, round(float(grid.masses(voxels, density, heights).sum())))
    cart, numbers, scores = grid.fit(voxels, scores, density, heights, likely)
    frac = wrap(cart @ np.linalg.inv(lattice_A))
    if estimate is not None:
        numbers = _likeliest_elements(numbers, grid.shares(frac), estimate)
    apart = grid.apart(frac, scores)
    return Decoded(Crystal(id, lattice_A, frac[apart], numbers[apart]), scores[apart])


def votes(logits_KDHW: NDArray[np.float32], elements: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(species, atom_probability) for `decode` of a network's logits: first 'no atom', then one for each element."""
    shifted = np.exp(logits_KDHW - logits_KDHW.max(axis=0))
    species = np.array(elements, np.uint8)[logits_KDHW[1:].argmax(axis=0)]
    return species, np.asarray(1.0 - shifted[0] / shifted.sum(axis=0), np.float32)


def decode_ideal(crystal: Crystal, spec: GridSpec) -> Decoded:
    """A crystal through its own true `cell` grid and back: the ceiling of every network in front of `decode`."""
    grid = voxelize(crystal, spec.model_copy(update={"channels": ("occupancy",)}))
    labelled = (grid.species_DHW > 0).astype(np.float32)
    return decode(crystal.id, grid.density_CDHW[0], grid.species_DHW, labelled, crystal.lattice_A, spec)


def _lattice_fault(lattice_A: FloatArray, shape: tuple[int, ...], sigma_A: float) -> str:
    """Why a lattice is none, or none that a grid of this shape can show; else ''."""
    if not np.isfinite(lattice_A).all():
        return "the lattice is not finite"
    if abs(np.linalg.det(lattice_A)) < MIN_VOLUME_A3 or plane_spacings(lattice_A).min() < MIN_SPACING_A:
        return f"the cell is flat: opposite faces less than {MIN_SPACING_A} A apart"
    spacing, most = float((np.linalg.norm(lattice_A, axis=1) / shape).max()), MAX_STEP_SIGMAS * sigma_A
    if spacing > most:
        return f"the cell is too large for its grid: voxels {spacing:.3g} A apart, atoms are seen at {most:g} A or less"
    return ""


def _likeliest_elements(numbers_N: NDArray[np.int64], shares_NZ: FloatArray, estimate: Estimate) -> NDArray[np.int64]:
    """Atomic numbers by the votes around each atom and an estimate of the composition, from those of the votes alone.

    One atom after another becomes another element, whichever change is best, while that makes all of it likelier.
    """
    votes_NZ = np.log(np.maximum(shares_NZ, LEAST_SHARE))
    votes_NZ[:, 0] = -np.inf
    numbers, atoms, known_Z = numbers_N.copy(), np.arange(len(numbers_N)), np.isfinite(estimate.composition_Z)
    while True:
        over_Z = np.where(known_Z, np.bincount(numbers, minlength=MAX_Z + 1) - estimate.composition_Z, 0.0)
        cost_Z, more_Z, less_Z = (_huber((over_Z + n) / estimate.composition_error) for n in (0.0, 1.0, -1.0))
        more_Z, less_Z = np.where(known_Z, more_Z - cost_Z, np.inf), np.where(known_Z, less_Z - cost_Z, -np.inf)
        gain_NZ = votes_NZ - votes_NZ[atoms, numbers][:, None] - more_Z - less_Z[numbers][:, None]
        gain_NZ[atoms, numbers] = 0.0
        atom, number = np.unravel_index(gain_NZ.argmax(), gain_NZ.shape)
        if gain_NZ[atom, number] <= 1e-9:
            return numbers
        numbers[atom] = number


def _huber(errors: FloatArray) -> FloatArray:
    """Half the squares of errors in their standard deviations; from HUBER on it grows in proportion only."""
    size = np.abs(errors)
    return np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))


class _Grid:
    """The votes of the voxels of a cell, and atoms found among them."""

    def __init__(
        self, species: NDArray[np.uint8], probability: NDArray[np.float32], lattice_A: FloatArray, spec: GridSpec
    ) -> None:
        self.species, self.probability, self.lattice, self.spec = species, probability, lattice_A, spec
        self.shape = np.array(species.shape)
        geometry = kernels.geometry(lattice_A, self.shape)
        self.basis, self.spacings = geometry.basis, geometry.spacings
        self.like, self.unlike = LIKE_RADII * spec.radius_A, UNLIKE_RADII * spec.radius_A
        self.images = image_offsets(lattice_A, self.like).astype(np.float64)
        reach = np.floor(spec.radius_A / self.spacings).astype(int)
        offsets = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), -1).reshape(-1, 3)
        self.ball = offsets[np.linalg.norm(offsets @ self.basis, axis=1) <= spec.radius_A]

    def find(
        self, density: NDArray[np.float32], heights: NDArray[np.float32], most: int, estimate: Estimate | None
    ) -> tuple[NDArray[np.int64], FloatArray]:
        """Voxels [N, 3] at the peaks of the votes, at most `most`, and their scores [N], from the highest down.

        Of those that an estimate doesn't bear out, the least likely go first, and leave their density to the others.
        """
        least = MIN_SCORE if estimate is None else LEAST_SCORE
        voxels, votes = labels.candidates(self.species, self.probability, self.ball, least, True)
        scores = votes / len(self.ball)
        numbers = self.species[tuple(voxels.T)].astype(np.int64)
        # Where labels are wrong at random, some balls hold many of one element by chance, but no density.
        dense = (density[tuple(voxels.T)] > MIN_DENSITY * heights[numbers]) | (scores > CLEAR_SCORE)
        voxels, scores, numbers = voxels[dense], scores[dense], numbers[dense]
        order = np.argsort(-scores, kind="stable")
        voxels, scores, numbers = voxels[order], scores[order], numbers[order]
        kept = labels.suppress(voxels / self.shape, numbers, self.lattice, self.images, self.like, self.unlike, most)
        voxels, scores = voxels[kept], scores[kept]
        if estimate is None:
            return voxels, scores
        while True:
            evidence = self._evidence(voxels, scores, density, heights)
            # Without an atom its log-odds are lost, and the squared error of the count changes.
            change = (len(voxels) - estimate.atoms - 0.5) / estimate.atoms_error**2 - evidence
            clear = int(np.count_nonzero(evidence < LEAST_EVIDENCE))
            if not clear and not (change > 0.0).any():
                return voxels, scores
            # One by one, for two that share one atom are each unlikely; more of them only where far too many are left.
            away = clear or max(1, int(len(voxels) - estimate.atoms) // TAKEN_AWAY)
            kept = np.sort(np.argsort(evidence, kind="stable")[away:])
            voxels, scores = voxels[kept], scores[kept]

    def masses(self, voxels: NDArray[np.int64], density: NDArray[np.float32], heights: NDArray[np.float32]) -> FloatArray:
        """[N] integral of the density around voxels, shared out among them, in atoms."""
        atom = (np.sqrt(2.0 * np.pi) * self.spec.sigma_A) ** 3 / abs(np.linalg.det(self.basis))
        shared = labels.masses(
            voxels, density, self.basis, self.spacings, MASS_WIDTH * self.spec.sigma_A, MASS_ROUNDS
        )  # fmt: skip
        return np.asarray(shared / atom / heights[self.species[tuple(voxels.T)]])

    def _evidence(
        self, voxels: NDArray[np.int64], scores: FloatArray, density: NDArray[np.float32], heights: NDArray[np.float32]
    ) -> FloatArray:
        """[N] log-odds that there are atoms at voxels."""
        height = density[tuple(voxels.T)] / heights[self.species[tuple(voxels.T)]]
        of_score, of_mass, of_height, of_nothing = EVIDENCE
        masses = self.masses(voxels, density, heights)
        return np.asarray(of_score * scores + of_mass * masses + of_height * height + of_nothing)

    def fit(
        self, voxels: NDArray[np.int64], scores: FloatArray, density: NDArray[np.float32], heights: NDArray[np.float32],
        most: int,
    ) -> tuple[FloatArray, NDArray[np.int64], FloatArray]:  # fmt: skip
        """Positions [N, 3] in angstrom, atomic numbers and scores of the atoms, also where only the density shows one."""
        numbers = self.species[tuple(voxels.T)].astype(np.int64)
        cart, errors = self._place(voxels)
        for _ in range(MAX_COMPLETIONS):
            fit = refine(cart, errors, density, self.lattice, self.spec.sigma_A, heights[numbers])
            missing = self._missing(fit.residual_DHW, heights, fit.cart_N3)
            if not len(missing) or len(numbers) + len(missing) > most:
                return fit.cart_N3, numbers, scores
            place = tuple(missing.T)
            cart = np.concatenate([fit.cart_N3, missing @ self.basis])
            errors = np.concatenate([errors, np.full(len(missing), MISSING_ERROR_A)])
            numbers = np.concatenate([numbers, self.species[place].astype(np.int64)])
            scores = np.concatenate([scores, self.probability[place]])
        return refine(cart, errors, density, self.lattice, self.spec.sigma_A, heights[numbers]).cart_N3, numbers, scores

    def shares(self, frac: FloatArray) -> FloatArray:
        """[N, MAX_Z + 1] share of the votes of each element in the ball around each atom."""
        places = (np.rint(frac * self.shape).astype(np.int64)[:, None] + self.ball) % self.shape
        found = np.zeros((len(frac), MAX_Z + 1))
        place = tuple(np.moveaxis(places, 2, 0))
        np.add.at(found, (np.arange(len(frac))[:, None], self.species[place]), self.probability[place])
        return found / len(self.ball)

    def apart(self, frac: FloatArray, scores: FloatArray) -> NDArray[np.int64]:
        """Indices of the atoms but those nearer than the spec's least distance to one of a higher score.

        A network's fields can hold such; in a crystal that the spec takes there are none.
        """
        order, least = np.argsort(-scores, kind="stable"), self.spec.min_distance_A - FIT_ERROR_A
        images, alike = image_offsets(self.lattice, least).astype(np.float64), np.zeros(len(frac), np.int64)
        return np.sort(order[labels.suppress(frac[order], alike, self.lattice, images, least, least, len(frac) + 1)])

    def _missing(self, residual: NDArray[np.float32], heights: NDArray[np.float32], cart: FloatArray) -> NDArray[np.int64]:
        """[M, 3] voxels labelled as atoms, with density that no atom explains: one of two like atoms very close."""
        left = residual - MISSING_HEIGHT * heights.take(self.species, mode="clip")
        voxels = np.argwhere((left > 0) & (self.species > 0) & (self.probability > 0.5))
        voxels = voxels[np.argsort(-left[tuple(voxels.T)], kind="stable")]
        if len(voxels):
            away = periodic_distances(self.lattice, voxels / self.shape, cart @ np.linalg.inv(self.lattice)).min(axis=1)
            voxels = voxels[away > MISSING_AWAY * self.spec.min_like_distance_A]
        alike = np.zeros(len(voxels), np.int64)
        kept = labels.suppress(voxels / self.shape, alike, self.lattice, self.images, self.like, self.like, len(voxels) + 1)
        return np.asarray(voxels[kept])

    def _place(self, voxels: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Positions [N, 3] in angstrom of the spheres of labels around voxels; standard errors [N] along each axis."""
        radius, votes = self.spec.radius_A, (self.species, self.probability, self.basis, self.spacings)
        centres = labels.centroids(voxels, *votes, CENTROID_RADII * radius, CENTROID_MOVES)
        right = labels.inner_votes(centres, voxels, *votes, 0.8 * radius)
        clarity = float(np.log(2.0 * right / (1.0 - right)))  # a wrong label is as often another element's as none
        step = SPHERE_STEP * self.spacings.max()
        shifts, variances = labels.sphere_shifts(centres, voxels, *votes, radius, clarity, step, SPHERE_STEPS)
        return centres @ self.basis + shifts, np.sqrt(variances + NETWORK_ERROR_A**2)
