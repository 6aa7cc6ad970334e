"""torchrun out of a process that has everything imported: two processes and the one that starts
them begin at once, in place of three imports of torch. What starts them is torchrun's own code."""

import multiprocessing
import os
import runpy
import sys
import tempfile

NEEDED = ["pytest", "torch.distributed.run", "torch.distributed.fsdp", "torch._dynamo"]
NEEDED += ["qwen_nb.parallel", "qwen_nb.run", "qwen_nb.mixture", "warm"]
CAN = hasattr(os, "fork") and sys.platform != "darwin"  # there a copy of a process may not be used


def script(path, *args):
    "What each of the processes does."
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def torchrun(printed, env, args):
    "torchrun with these arguments; its processes are copies of this one and run the script."
    from torch.distributed import run

    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(env)
    as_usual = run.config_from_args

    def copies(parsed):
        config, *_ = as_usual(parsed)
        config.start_method = "fork"
        return config, script, [parsed.training_script, *parsed.training_script_args]

    run.config_from_args = copies
    run.main(args)


class Started:
    "A torchrun that is under way, with what one uses of a Popen."

    def __init__(self, args, env):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(NEEDED)
        file, self.printed = tempfile.mkstemp()
        os.close(file)
        target = dict(target=torchrun, args=(self.printed, env, args))
        self.process = context.Process(**target)
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def communicate(self, timeout):
        "What it printed, when it has ended."
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"torchrun did not end within {timeout} s")
        with open(self.printed, encoding="utf-8", errors="replace") as file:
            text = file.read()
        os.unlink(self.printed)
        return text, None
