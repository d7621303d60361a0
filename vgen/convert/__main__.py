"""The command line: python -m vgen.convert inspect|import|export|verify SOURCE [...].

SOURCE is a file, a folder, or hf:owner/name[/part][@revision].  Every mistake of the caller ends as one sentence on
stderr and exit code 2; `verify` exits 1 where the numbers differ.
"""

import argparse
import sys
from pathlib import Path

from vgen.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 where `verify` finds a difference, 2 after a mistake."""
    try:
        options = _parser().parse_args(argv)
        return globals()[f"_{options.command}"](options)
    except UserError as error:
        print(f"vgen.convert: {error}", file=sys.stderr, flush=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vgen.convert", description="Published checkpoints, in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|import|export|verify")

    def command(name: str, text: str, out: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("source", metavar="SOURCE", help="a file, a folder, or hf:owner/name[/part][@revision]")
        if out:
            sub.add_argument("out", metavar="OUT", type=Path, help=out)
        sub.add_argument("--part", help="one part of a diffusers pipeline (default: all of them)")
        sub.add_argument("--family", help="vgen.convert.module:NAME, where the checkpoint does not tell")
        return sub

    command("inspect", "Print names, shapes, dtypes, bytes and totals.")
    into = command("import", "Write vgen's own form, which vgen.load and configs read.", "a new folder")
    back = command("export", "Write a layout that PyTorch's libraries read.", "a new folder, .safetensors or .npz")
    back.add_argument("--layout", help="vgen.convert.module:NAME of another layout of the network (default: the same)")
    for sub in (into, back):
        sub.add_argument("--dtype", help="of floating-point parameters (default: as stored)")
    check = command("verify", "Compare with the PyTorch reference on random inputs.")
    check.add_argument("--layout", help="vgen.convert.module:NAME of another layout, whose reference is asked")
    check.add_argument("--tolerance", type=float, default=1e-4, help="relative (default: %(default)s)")
    check.add_argument("--seed", type=int, default=0, help="of the inputs")
    return parser


def _sources(options) -> dict[str, "Source"]:  # noqa: F821
    """{part, or "" of a single network: open checkpoint} of what the options name."""
    from vgen.convert.sources import open_source

    found = open_source(options.source)
    if not isinstance(found, dict):
        if options.part:
            raise UserError(f"{options.source}: --part={options.part}, but this is one network")
        return {"": found}
    if options.part and options.part not in found:
        raise UserError(f"{options.source}: has no part {options.part!r}; there are {', '.join(found)}")
    if options.family and not options.part:
        raise UserError(f"{options.source}: --family needs --part; there are {', '.join(found)}")
    return {options.part: found[options.part]} if options.part else found


def _dtype(name: str | None):
    import numpy as np

    known = ("float32", "bfloat16", "float16", "float64")
    if name is not None and name not in known:
        raise UserError(f"--dtype={name}: expected one of {', '.join(known)}")
    import ml_dtypes  # noqa: F401  teaches numpy bfloat16

    return None if name is None else np.dtype(name)


def _inspect(options) -> int:
    from vgen.convert import families, show

    for part, source in _sources(options).items():
        print(f"{part + ': ' if part else ''}{source.path}")
        print("\n".join(show.tree(source.tensors)))
        print(show.total(source.tensors))
        try:
            print(f"family: {options.family or families.find(source)}")
        except UserError as error:
            print(f"family: not known ({error})")
    return 0


def _import(options) -> int:
    from vgen.convert import export, load

    nets = {part: load.network(source, options.family) for part, source in _sources(options).items()}
    for part, net in nets.items():
        params = load.read(net, dtype=_dtype(options.dtype))
        export.save(options.out / part, net.model, params, net.name, config=net.source.config)
        print(f"{net.name}: written to {options.out / part}")
    return 0


def _export(options) -> int:
    from vgen.convert import export, load

    nets = {part: load.network(source, options.family) for part, source in _sources(options).items()}
    for part, net in nets.items():
        layout = options.layout or net.name
        params = load.read(net, dtype=_dtype(options.dtype))
        config = net.source.config if layout == net.name else {}
        export.export(options.out / part, net.model, params, layout, config=config)
        print(f"{layout}: written to {options.out / part}")
    return 0


def _verify(options) -> int:
    from vgen.convert import verify

    worst = 0.0
    for part, source in _sources(options).items():
        for name, (absolute, relative) in verify.errors(source, options.family, options.seed, options.layout).items():
            print(f"{part + '.' if part else ''}{name:<32} absolute {absolute:.2e}  relative {relative:.2e}")
            worst = max(worst, relative)
    good = worst <= options.tolerance
    print(f"{'agrees' if good else 'DIFFERS'}: largest relative error {worst:.2e}, tolerance {options.tolerance:.0e}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
