"""`python -m trce_cli`, and what `accelerate launch -m trce_cli` starts."""

import sys

from trce_cli.cli.app import main

sys.exit(main())
