"""The parts of the trainer, each testable by itself. tests/test_structure.py lists which part may import which."""

import os
import sys

if sys.platform == "win32":
    # The programs use fork, signals and locks that Windows does not have; without this, imports would end in tracebacks.
    print(f"{os.path.basename(sys.argv[0])}: error: Windows itself is not supported. Use WSL 2 (wsl --install) and "
          "start the program there.",
          file=sys.stderr)
    sys.exit(2)
