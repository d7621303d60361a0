"""Fill in jobset.yaml: python launch/gke/render.py --name=... --image=... --accelerator=... --topology=... -- FLAGS.

Every value is written as JSON, so that no flag, whatever its quotes and dollars, is read as YAML or by a shell.
"""

import argparse
import json
import math
import re
import string
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("jobset.yaml")
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # short, because Kubernetes appends to it and allows 63 characters
OTHER_NAME = r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?"
SHARED = "/mnt/shared"


def render(options: argparse.Namespace) -> str:
    """The JobSet as YAML; ValueError, in one sentence, for what cannot be."""
    for given in ("name", "namespace", "claim", "secret"):
        value, form = getattr(options, given), NAME if given == "name" else OTHER_NAME
        if value is not None and not re.fullmatch(form, value):
            # What was meant to be the name of a secret may be its value: it is not repeated.
            got = "" if given == "secret" else f", got {value!r}"
            raise ValueError(f"--{given} takes a name of lower-case letters, digits and dashes{got}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        raise ValueError(f"--topology looks like 2x4 or 4x4x4, got {options.topology!r}")
    for given, least in (("chips", 1), ("restarts", 0), ("grace", 1)):
        if getattr(options, given) < least:
            raise ValueError(f"--{given} must be at least {least}, got {getattr(options, given)}")
    chips = math.prod(map(int, options.topology.split("x")))
    if chips % options.chips:
        raise ValueError(f"--chips={options.chips} does not divide the {chips} chips of --topology={options.topology}")
    if not options.flags:
        raise ValueError("no flags for vgen.main: ... -- --config=configs/muse.py:paper --workdir=DIR")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    values = {
        "name": options.name,
        "namespace": options.namespace,
        "image": options.image,
        "hosts": chips // options.chips,
        "chips": options.chips,
        "restarts": options.restarts,
        "grace": options.grace,
        "selector": selector | ({"cloud.google.com/gke-spot": "true"} if options.spot else {}),
        # $(NAME) in a container's arguments is Kubernetes's own substitution; $$ is a dollar.
        "flags": [flag.replace("$", "$$") for flag in options.flags],
        "environment": [{"secretRef": {"name": options.secret}}] if options.secret else [],
        "mounts": [{"name": "shared", "mountPath": SHARED}] if options.claim else [],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}}] if options.claim else [],
    }
    written = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(written)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one sentence."""

    def error(self, message):
        raise ValueError(message)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, allow_abbrev=False)
    for name in ("name", "image", "accelerator", "topology"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--chips", type=int, default=4)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--grace", type=int, default=600)
    parser.add_argument("--secret")
    parser.add_argument("--claim")
    parser.add_argument("--spot", action="store_true")
    at = argv.index("--") if "--" in argv else len(argv)
    try:
        options = parser.parse_args(argv[:at])
        options.flags = argv[at + 1 :]
        print(render(options), end="")
    except ValueError as error:
        print(f"launch/gke.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
