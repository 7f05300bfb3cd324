"""Starts Python programs in processes of their own that need not import the library.

A fresh interpreter spends some eight seconds on importing torch, transformers and lightning. This
program imports them once and forks, so that its children begin where a program has done its
imports: nothing was parsed, seeded or trained, and there is one thread.

It is told what to do by lines of JSON, and answers each with a line:

    {"arguments": [...], "cwd": ..., "out": FILE, "err": FILE, "env": {...}}
        starts `python ARGUMENTS` (-m MODULE ..., -c CODE ... or FILE ...); its process id
    {"ended": process id}
        null while it runs; then its exit status, or minus the signal that ended it
"""

import json
import os
import runpy
import signal
import sys
import traceback


def run(arguments: list[str], cwd: str, out: str, err: str, env: dict[str, str]) -> int:
    """What `python ARGUMENTS` does, in a fork."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # what a shell starts in the background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = int(env.get("LOCAL_RANK", "0"))  # set by the import
    flag, *rest = arguments
    sys.path[0] = cwd
    try:
        if flag == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif flag == "-c":
            sys.argv = [flag, *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(flag, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def ended(pid: int) -> int | None:
    """The exit status of a child, None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def serve() -> None:
    """Until the standard input ends."""
    import openai  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import sso_lightning.augment
    import sso_lightning.cli
    import sso_lightning.endpoint  # noqa: F401

    torch.set_num_threads(1)
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        if "ended" in request:
            answer = ended(request["ended"])
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
            answer = os.fork()
            if not answer:
                status = 70
                try:
                    status = run(**request)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
        replies.write(f"{json.dumps(answer)}\n")
        replies.flush()


if __name__ == "__main__":
    serve()
