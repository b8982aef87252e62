"""`python -m prunekit`."""

import sys

try:
    from prunekit.cli import main
except KeyboardInterrupt:
    sys.exit(130)
main()
