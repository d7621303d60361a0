"""One process of a run on several machines: python launch/worker.py --config=... --workdir=... (flags of vgen.main).

Joins the other processes, then does what `python -m vgen.main` does.  On TPU pods, Slurm and Open MPI the number of
processes and the place of this one are found by JAX; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
VGEN_NUM_PROCESSES and VGEN_PROCESS_ID.

All processes end together, and one of them says why: exit code 0, 2 after a mistake of the caller, 1 after a fault of
the program, 4 when a process is gone (killed, or not heard of for VGEN_HEARTBEAT_SECONDS, 40 by default).  After 4 the
same command on all machines, or on more or fewer of them, goes on from the last checkpoint.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
from jax._src import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not part of the installed package

GONE = 4
PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds that a process waits for the others at the end
ADVICE = "start all again with the same command, it goes on from the last checkpoint"
REMOTE = "gloo|nccl|connection|socket|coordination|heartbeat|barrier|deadline|unavailable"


class Ends:
    """The processes of a run, seen by one of them: whichever ends early says so, and the others end with it.

    This goes through the key-value store of JAX's coordination service.  seconds: how long a process may be silent.
    """

    def __init__(self, seconds: float):
        self.me, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        self.store, self.seconds, self.over = distributed.global_state.client, seconds, False
        self._telling = threading.Lock()
        self._hook = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._hook)
        for work in (self._beat, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def fail(self, code: int, text: str) -> None:
        """End all processes with this code; `text` is printed unless another was first.  Does not return."""
        with contextlib.suppress(Exception), self._telling:  # the first counts; without process 0 there is none
            self.store.key_value_set("vgen/over", json.dumps([code, self.me]))
            print(text, file=sys.stderr, flush=True)
        threading.Event().wait()  # for `_listen`, or `_aborted`

    def finish(self) -> None:
        """Wait until all have come this far."""
        self.store.wait_at_barrier("vgen/end", PATIENCE)
        self.over = True

    def _listen(self) -> None:
        """Leave once a process has failed; process 0, which holds the store, as the last."""
        try:
            code, _ = json.loads(self.store.blocking_key_value_get("vgen/over", PATIENCE))
            self.store.key_value_set(f"vgen/left/{self.me}", "")
            end = time.monotonic() + self.seconds / 4
            while not self.me and time.monotonic() < end and len(self._read("left")) < self.count:
                time.sleep(0.05)
        except Exception:  # noqa: BLE001  the end of the run, or of process 0, see `_aborted`
            return
        with self._telling:
            sys.stdout.flush()
            os._exit(code)

    def _read(self, name: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in self.store.key_value_dir_get(f"vgen/{name}")}

    def _beat(self) -> None:
        """Tell process 0 that this one lives; process 0 sees whether all do."""
        heard = {process: ("", time.monotonic()) for process in range(1, self.count)}
        with contextlib.suppress(Exception):  # without process 0: see `_aborted`
            while True:
                beat = time.monotonic()
                self.store.key_value_set(f"vgen/beats/{self.me}", str(beat), allow_overwrite=True)
                beats = {} if self.me else self._read("beats")
                for process, (last, when) in heard.items():
                    if beats.get(process, last) != last:
                        heard[process] = beats[process], beat
                    elif not self.me and not self.over and beat - when > self.seconds:
                        self.fail(GONE, f"vgen: process {process} of {self.count} is gone; {ADVICE}")
                time.sleep(self.seconds / 10)

    def _aborted(self, _) -> None:
        """JAX ends a process by SIGABRT when it cannot reach process 0: say so, and what to do."""
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            if self.me == 1:
                print(f"vgen: process 0 of {self.count} is gone; {ADVICE}", file=sys.stderr, flush=True)
            os._exit(GONE)


def main() -> int:
    """Run the command line together with the other processes; the exit code."""
    from vgen.config import UserError
    from vgen.main import run

    seconds = float(os.environ.get("VGEN_HEARTBEAT_SECONDS", "40"))
    ends = Ends(seconds)
    if ends.me:
        sys.stdout = open(os.devnull, "w")  # process 0 says it
    try:
        code = run(sys.argv)
        ends.finish()
        return code
    except UserError as error:
        where = f"process {ends.me} of {ends.count}: " if ends.me else ""
        ends.fail(2, f"vgen: {where}{error}")
    except Exception as error:  # noqa: BLE001
        told = traceback.format_exc()
        if re.search(REMOTE, str(error), re.IGNORECASE):
            time.sleep(1.5 * seconds)  # another one may be gone: whoever finds out ends this process
        ends.fail(1, told)


if __name__ == "__main__":
    names = {"num_processes": "VGEN_NUM_PROCESSES", "process_id": "VGEN_PROCESS_ID"}
    given = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
    if 0 < len(given) < len(names) or given and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        sys.exit(f"worker.py: set JAX_COORDINATOR_ADDRESS, {' and '.join(names.values())} together, or none of them")
    jax.distributed.initialize(**given)
    code = main()
    jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that waits for the others inside of JAX would bring down Python's own way out
