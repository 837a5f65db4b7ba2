"""Region loss against the full matrix: `python eval/bench/loss.py --out runs/bench/loss.json`."""

import argparse
import functools

from cloc_mllm.bench.memory import extra_peak_mib
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.bench.region_loss import check_equal, prepare_step
from cloc_mllm.losses.contrastive import TILE_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--tile_rows", type=int, nargs="+", default=[TILE_ROWS])
    parser.add_argument("--peers", nargs="+", default=["full_matrix", "full_matrix_once"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", default="runs/bench/loss.json")
    args = parser.parse_args()
    machine = {**machine_state(), "dtype": "float32", "width": 512}
    print("noisy machine:" if machine["noisy"] else "machine:", machine)
    results = {}
    for regions in args.regions:
        theirs = {peer: prepare_step(peer, regions, 0) for peer in args.peers}
        peaks = {
            peer: extra_peak_mib(functools.partial(prepare_step, peer, regions, 0))
            for peer in args.peers
        }
        for tile_rows in args.tile_rows:
            check_equal(regions, tile_rows)
            prepare = functools.partial(prepare_step, "ours", regions, tile_rows)
            peak = extra_peak_mib(prepare)
            for peer in args.peers:
                title = f"{regions} regions, tiles of {tile_rows}, against {peer}"
                ratio = interleaved_ratio(prepare(), theirs[peer], pairs=args.pairs)
                results[title] = ratio
                results[f"{title}: MiB"] = {"ours": peak, "theirs": peaks[peer]}
                print(report(title, ratio))
                print(
                    f"  peak memory {peak / peaks[peer]:.3f} ({peak:.0f} / {peaks[peer]:.0f} MiB)"
                )
                save_samples(args.out, machine, results)


if __name__ == "__main__":
    main()
