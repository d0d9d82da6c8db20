"""The periodic table as far as the networks need it: symbols, periods, groups and f-block places.

Source: IUPAC periodic table (18 groups); lanthanum to ytterbium and actinium to nobelium form the f block and are
given group 3 and a place from 1 to 14.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TABLE = """
H He
Li Be B C N O F Ne
Na Mg Al Si P S Cl Ar
K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe
Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr
"""

_PERIODS = [row.split() for row in _TABLE.strip().splitlines()]

SYMBOLS: tuple[str, ...] = ("X", *(symbol for row in _PERIODS for symbol in row))
"""Symbol by atomic number; index 0 stands for 'no atom'."""

MAX_Z = len(SYMBOLS) - 1
NUMBERS: dict[str, int] = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}

_BY_ELECTRONEGATIVITY = """
Fr Cs K Rb Ba Ra Na Sr Li Ca La Tb Yb Ac Ce Pr Pm Nd Sm Eu Gd Y Dy Ho Er Tm Lu Pu Hf Th Am Cm Bk Cf Es Fm Md No Lr Mg Zr
Sc Np U Ta Pa Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co Si Cu Tc Re Ni Ag Sn Hg Po Ge Bi B Sb Te Mo As P H Ru Pd Os Ir At
Rn Rh Pt Pb W Au C Se S Xe I Br Kr N Cl O F He Ne Ar
"""

ELECTRONEGATIVITY_ORDER: dict[int, int] = {NUMBERS[s]: place for place, s in enumerate(_BY_ELECTRONEGATIVITY.split())}
"""Atomic number -> place of the element by rising electronegativity (Pauling's scale; of those without one, last)."""

N_PERIODS, N_GROUPS, N_F_PLACES = 7, 18, 14


def _places() -> NDArray[np.int64]:
    """[MAX_Z + 1, 3]: period (1-7), group (1-18) and place in the f block (1-14, 0 outside it) by atomic number."""
    places = np.zeros((MAX_Z + 1, 3), dtype=np.int64)
    z = 0
    for period, row in enumerate(_PERIODS, start=1):
        for column in range(len(row)):
            z += 1
            has_f_block = period >= 6
            f_place = column - 1 if has_f_block and 2 <= column <= 15 else 0
            if column < 2 and not (period == 1 and column == 1):
                group = column + 1
            elif f_place:
                group = 3
            elif has_f_block:
                group = column + 1 - N_F_PLACES
            else:
                group = column + 1 + N_GROUPS - (18 if period in (4, 5) else 2 if period == 1 else 8)
            places[z] = period, group, f_place
    return places


PLACES = _places()
N_BITS = 12


def _words() -> NDArray[np.int64]:
    """[MAX_Z + 1, N_BITS] bits of a different word for each element: any two differ in at least four bits.

    The lexicode of length 12 and distance 4 (Conway and Sloane 1986), 128 words: each is the first, counted in binary, that
    is far enough from all before it. Index 0, no atom, has the word of zeros.
    """
    words: list[int] = []
    for word in range(2**N_BITS):
        if all((word ^ other).bit_count() >= 4 for other in words):
            words.append(word)
    return np.array(words[: MAX_Z + 1])[:, None] >> np.arange(N_BITS) & 1


def element_code(kind: str) -> NDArray[np.float32]:
    """[MAX_Z + 1, K] code of each element in the channels of one kind.

    'occupancy': 1 for every atom. 'z_density': the atomic number. 'period', 'group', 'f_block': one channel each place.
    'code': 12 bits in which any two elements differ four times, while they may share period or group.
    Raises KeyError for another kind.
    """
    z = np.arange(MAX_Z + 1)
    if kind == "occupancy":
        return np.asarray(z[:, None] > 0, dtype=np.float32)
    if kind == "z_density":
        return z[:, None].astype(np.float32)
    if kind == "code":
        return _words().astype(np.float32)
    column, size = {"period": (0, N_PERIODS), "group": (1, N_GROUPS), "f_block": (2, N_F_PLACES)}[kind]
    return np.asarray(PLACES[:, column, None] == np.arange(1, size + 1), dtype=np.float32)
