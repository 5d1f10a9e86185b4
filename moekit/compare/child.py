"""One run in a process of its own: `python -m moekit.compare.child OUT`, its configuration as a line of JSON on stdin.

Standard input stays open for as long as whoever started it lives; when it ends, however that came, the run saves and
stops, so that no run goes on behind the back of the process that continues it.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from moekit.config import RunConfig
from moekit.errors import MoekitError
from moekit.start import origin
from moekit.train import train


def main(out: Path) -> int:
    """Returns the exit status: 0 done, 2 a user's mistake, said in one line, 130 interrupted and saved."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    config = RunConfig.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        receipt = train(config, out, resume=(out / "config.yaml").is_file(), origin=origin)
    except MoekitError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if receipt["status"] == "done" else 130


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
