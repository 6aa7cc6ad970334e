"""Runs that end in the middle of their work."""

import os
import signal
import sys
import threading
import time

from tqdm.auto import tqdm

OPERATIONS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"


def killed(work, folder, at=None, after=None):
    """Run `work` in a child that is killed with -9, and say whether it was.

    Before its file operation number `at` in the folder, or `after` seconds. The child is a fork:
    where `work` uses torch's models, hide the GPUs from the parent, for CUDA cannot be used after
    a fork."""
    child = os.fork()
    if not child:
        # The usual lock of progress bars is shared with the parent: who is killed while holding it
        # takes it with him.
        tqdm.set_lock(threading.RLock())
        seen = [0]

        def hook(event, args):
            if event in OPERATIONS and str(folder) in str(args[0]):
                seen[0] += 1
                if seen[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFSIGNALED(status)
