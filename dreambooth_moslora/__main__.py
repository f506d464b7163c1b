"""`python -m dreambooth_moslora COMMAND …`."""

import sys

from dreambooth_moslora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
