"""Open the page: `python app.py`, then http://127.0.0.1:7860. `python app.py --help` lists the options."""

import sys

from dreambooth_moslora.ui.serve import main

if __name__ == "__main__":
    sys.exit(main())
