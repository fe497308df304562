"""The trainer's organs: each file one noun, testable alone. Nothing here knows models/ or configs.py."""

import os
import sys

if sys.platform == "win32":
    # Programs fork, and use signals and locks that Windows does not have: imports would end in tracebacks.
    print(f"{os.path.basename(sys.argv[0])}: error: Windows itself is not supported. Use WSL 2 (wsl --install) and "
          "start it there.",
          file=sys.stderr)
    sys.exit(2)
