"""One process of a run on several machines: python launch/worker.py --config=... --workdir=... (flags of vgen.main).

Joins the other processes, then does what `python -m vgen.main` does.  On TPU pods, Slurm and Open MPI the number of
processes and the place of this one are found by JAX; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
VGEN_NUM_PROCESSES and VGEN_PROCESS_ID.
"""

import os
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not part of the installed package

if __name__ == "__main__":
    from vgen.main import main

    names = {"num_processes": "VGEN_NUM_PROCESSES", "process_id": "VGEN_PROCESS_ID"}
    given = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
    if 0 < len(given) < len(names) or given and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        sys.exit(f"worker.py: set JAX_COORDINATOR_ADDRESS, {' and '.join(names.values())} together, or none of them")
    jax.distributed.initialize(**given)
    sys.exit(main())
