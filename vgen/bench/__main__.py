"""The command line: python -m vgen.bench peers|bf16|compile|curves|claims|plan|scaling|train|input [...].

Every mistake of the caller ends as one sentence on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Iterator

from vgen.config import UserError
from vgen.platform import start_over


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after a mistake of the caller."""
    parser = argparse.ArgumentParser("vgen.bench", description="Suites that measure and print tables.")
    suites = parser.add_subparsers(
        dest="suite", required=True, metavar="peers|bf16|compile|curves|claims|plan|scaling|train|input"
    )
    peers = suites.add_parser("peers", help="speed beside the PyTorch references, same weights, float32")
    peers.add_argument("--only", default="", help="regular expression of the cases' names")
    peers.add_argument("--runs", type=int, default=5, help="of each side; the fastest counts (default: %(default)s)")
    bf16 = suites.add_parser("bf16", help="errors of the computation in bfloat16 against float32")
    bf16.add_argument("--only", default="", help="regular expression of the networks' names")
    size = suites.add_parser("compile", help="size of the published networks' programs, and seconds to compile them")
    size.add_argument("--only", default="", help="regular expression of the networks' names")
    curves = suites.add_parser("curves", help="loss by compute of U-Net, DiT and PixArt, each trained from nothing")
    curves.add_argument("--workdir", required=True, help="where they are trained; what is there goes on")
    curves.add_argument("--scale", default="mini", choices=["mini", "tiny"], help="(default: %(default)s)")
    curves.add_argument("--budget", type=float, default=1.0, help="factor on each one's FLOPs (default: %(default)s)")
    claims = suites.add_parser("claims", help="what methods save, as ratios, beside what their papers say")
    claims.add_argument("--only", default="", help="regular expression of the claims")
    claims.add_argument("--runs", type=int, default=3, help="of each side; the fastest counts (default: %(default)s)")
    scales = ["mini", "tiny", "paper"]
    claims.add_argument("--scale", default="mini", choices=scales, help="of the times (default: %(default)s)")
    claims.add_argument("--out", default="", help="a file for all numbers, as JSON")
    plans = suites.add_parser("plan", help="what every config takes of its slice, compiled ahead of time (extra tpu)")
    plans.add_argument("--only", default="", help="regular expression of 'CONFIG/STAGE' and 'CONFIG/STAGE, sampled'")
    plans.add_argument("--scale", default="paper", help="of the configs (default: %(default)s)")
    plans.add_argument("--topology", default="", help="a slice in the place of the configs' own")
    plans.add_argument("--configs", default="configs", help="folder of the configs (default: %(default)s)")
    plans.add_argument("--out", default="", help="a file for all numbers, as JSON")
    more = suites.add_parser("scaling", help="what a step takes on 1, 2, 4 and 8 devices; --config=... as of vgen.main")
    more.add_argument("--stage", default="", help="(default: the last one)")
    step = suites.add_parser(
        "train", help="speed of a config's training here, beside the roofline; --config=... as of vgen.main"
    )
    step.add_argument("--stage", default="", help="only this one")
    step.add_argument("--steps", type=int, default=20, help="that are timed (default: %(default)s)")
    read = suites.add_parser("input", help="how fast each kind of source is read, beside a loop of one thread")
    read.add_argument("--only", default="", help="regular expression of the kinds")
    read.add_argument("--count", type=int, default=512, help="examples of each (default: %(default)s)")
    read.add_argument("--size", type=int, default=256, help="pixels (default: %(default)s)")
    read.add_argument("--workers", type=int, default=2, help="threads, and processes (default: %(default)s)")
    read.add_argument("--runs", type=int, default=3, help="of each; the fastest counts (default: %(default)s)")
    options, rest = parser.parse_known_args(argv)
    if rest and options.suite not in ("train", "scaling"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        for line in _lines(options):
            print(line, flush=True)
    except UserError as error:
        print(f"vgen.bench: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _lines(options) -> Iterator[str]:
    if options.suite == "peers":
        from vgen.bench import peers

        return peers.table(options.only, options.runs)
    if options.suite == "compile":
        from vgen.bench import compile as compiling

        return compiling.table(options.only)
    if options.suite == "curves":
        from vgen.bench import curves

        return curves.table(options.workdir, options.scale, options.budget)
    if options.suite == "claims":
        from vgen.bench import claims

        return claims.table(options.only, options.runs, options.scale, options.out)
    if options.suite == "train":
        from vgen.bench import train

        return train.lines(options.rest, options.steps, options.stage)
    if options.suite == "input":
        from vgen.bench import reading

        return reading.table(options.only, options.count, options.size, options.workers, options.runs)
    if options.suite == "scaling":
        from vgen.bench import plan
        from vgen.main import emulate_devices, parse

        given = parse(["vgen.bench scaling", *options.rest, "--workdir=nowhere"]).config
        emulate_devices(8)
        return plan.scaling(given, options.stage or given.order[-1])
    if options.suite == "plan":
        from vgen.bench import plan

        return plan.table(options.configs, options.only, options.scale, options.out, options.topology)
    from vgen.bench import bf16

    return bf16.table(options.only)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
