"""Stands in for src/sft.py in jobs that are not about training; ends as its argument says.

Prints where it runs, after all processes have added up their numbers over gloo.
"""

import atexit
import json
import os
import signal
import socket
import time


def main(arguments: list[str]) -> None:
    import torch
    import torch.distributed as dist

    from finetuning.errors import Stopped, UserError
    from finetuning.training.signals import Stop

    Stop().listen()
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_RANK",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "INSIDE",
    )
    found = {
        "rank": dist.get_rank(),
        "sum": total.item(),
        "host": socket.gethostname(),
        "arguments": arguments,
    }
    print("\n" + json.dumps(found | {name: os.environ.get(name) for name in names}), flush=True)
    dist.barrier()
    match arguments[0]:
        case "wrong" if dist.get_rank() == 1:
            raise UserError("something is wrong in process 1")
        case "killed" if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "wrong" | "killed":
            time.sleep(600)  # until the launcher ends it
        case "slow":
            atexit.register(time.sleep, 6)  # as where libraries take long to end
        case "stuck":
            raise Stopped(signal.SIGUSR1, "stopped by SIGUSR1 after step 3 of 9")
        case "stopped":
            raise Stopped(signal.SIGUSR1, "stopped as if by a signal")


if __name__ == "__main__":
    from finetuning.script import run

    run(main, __doc__)
