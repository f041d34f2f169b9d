"""A codebook by k-means on a million rows that stay on disk, read in slices.

    python examples/kmeans_million_rows.py [--out FOLDER] [--rows N] [--codewords K] [--small]

Writes a .npy file a slice at a time (1,000,000 x 64 float32, 256 MB; 32 clusters of unequal size), fits the codebook to
the memory-mapped file and prints time, inertia, the clusters found and the memory taken. A generator, an HDF5 dataset or
a memory bank goes in the same way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import dre_fast

DIM, CLUSTERS = 64, 32


def write_rows(path: Path, rows: int) -> np.ndarray:
    """Rows around CLUSTERS centres, without ever holding more than a slice. Returns the centres."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    share = np.linspace(1, 4, CLUSTERS)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, DIM))
    for start in range(0, rows, 65536):
        part = file[start : start + 65536]
        kinds = generator.choice(CLUSTERS, len(part), p=share / share.sum())
        part[:] = centres[kinds] + 0.3 * generator.standard_normal((len(part), DIM), dtype=np.float32)
    file.flush()
    return centres


def own_memory() -> float:
    """MB of the process that are not pages of a file; NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), float("nan"))


def main() -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the file (default: the system's temporary folder)"
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--codewords", type=int, default=CLUSTERS)
    parser.add_argument("--small", action="store_true", help="50,000 rows")
    args = parser.parse_args()
    rows = 50_000 if args.small else args.rows
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        path = Path(folder) / "rows.npy"
        centres = write_rows(path, rows)
        print(f"{rows:,} x {DIM} rows written, {path.stat().st_size / 1e6:.0f} MB")

        before, started = own_memory(), time.perf_counter()
        history: list[float] = []
        stored = np.load(path, mmap_mode="r")  # nothing is read yet
        codebook, inertia = dre_fast.fit_codebook(
            stored, args.codewords, iterations=20, seed=0, history=history
        )
        seconds = time.perf_counter() - started
        print(
            f"{args.codewords} codewords in {seconds:.1f} s, {len(history)} passes; inertia {inertia / rows:.3f} a row"
        )
        print(f"memory of its own: {own_memory() - before:.0f} MB more than before")

        # codes of some rows, one encoding: the codebook is an ordinary tensor
        some = torch.from_numpy(stored[:4096].copy())
        _, codes, distances = dre_fast.residual_encode(
            some, codebook, return_codes=True, return_distances=True
        )
        print(
            f"of 4,096 rows: {len(codes.unique())} codewords in use, {float(distances.mean()):.3f} mean squared distance"
        )
        nearest = torch.cdist(torch.from_numpy(centres), codebook).min(1).values
        hit = int((nearest < 0.5).sum())
        print(
            f"{hit} of the {CLUSTERS} centres have a codeword within 0.5 (their spread is {0.3 * DIM**0.5:.1f})"
        )
    return hit / CLUSTERS


if __name__ == "__main__":
    main()
