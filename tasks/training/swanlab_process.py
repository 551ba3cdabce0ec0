"""SwanLab's own process: reads reports line by line and keeps them as an offline run in its working folder.

Reads   stdin     {"name", "step"}, then {"step", "values": {name: number}} a line, to the end
Writes  run-*/    as SwanLab keeps a run that is not sent anywhere
"""

import json
import os
import sys


def main() -> None:
    run = json.loads(sys.stdin.readline())
    os.environ.pop("SWANLAB_API_KEY", None)  # nothing is sent, so nothing is to be asked for
    import swanlab

    name = run["name"] + (f" from step {run['step']}" if run["step"] else "")
    swanlab.init(project="seqmill", name=name, mode="offline", log_dir=os.getcwd(), config={"first_step": run["step"]})
    for line in sys.stdin:
        report = json.loads(line)
        swanlab.log(report["values"], step=report["step"])
    swanlab.finish()


if __name__ == "__main__":
    main()
