"""Say clearly when this Python is too old or too new for the pinned packages. It must parse in any Python."""
import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit("This is Python %d.%d (%s), and the course needs 3.10 to 3.14. If you have another one, name it: "
             "make lab PYTHON=python3.12" % (sys.version_info[0], sys.version_info[1], sys.executable))
