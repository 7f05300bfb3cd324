"""Runs command lines in one process of several: torchrun ... distributed_worker.py JOBS.json."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist


def main(path):
    # processes that wait for each other are a failure to be read, not a test that never ends
    faulthandler.dump_traceback_later(float(os.environ.get("PATIENCE", "300")), exit=True)
    from sso_lightning.__main__ import main as command

    for job in json.loads(Path(path).read_text()):
        if "python" in job:
            exec(job["python"], {})
            continue
        status = command(job["argv"])
        assert status == job.get("status", 0), (status, job["argv"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
