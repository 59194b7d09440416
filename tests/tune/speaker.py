"""Run in the place of ``python -m fastlora.tune.worker``: speaks its protocol at once, and does what a job says."""

import json
import os
import signal
import sys
import time


def main() -> None:
    print(json.dumps({"begins": "the worker"}), flush=True)
    for line in sys.stdin:
        for step in json.loads(line)["steps"]:
            word, _, rest = step.partition(" ")
            if word == "say":
                print(rest, flush=True)
            elif word == "note":
                print(rest, file=sys.stderr, flush=True)
            elif word == "sleep":
                time.sleep(float(rest))
            elif word == "exit":
                os._exit(int(rest))
            elif word == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    main()
