"""`python -m trainer X` is `headway X`."""

import sys

from trainer.cli import main

sys.exit(main())
