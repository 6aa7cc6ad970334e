"""Say clearly when there is no build of torch for this Python or machine. It must parse in any
Python."""

import platform
import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit(
        "This is Python %d.%d (%s), and the course needs 3.10 to 3.14. If you have another one, "
        "name it: "
        "make lab PYTHON=python3.12" % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
    sys.exit(
        "This Python (%s) is for Macs with Intel chips, for which torch has no builds any more."
        % sys.executable
    )
