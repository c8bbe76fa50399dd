"""`python -m launch X` is `headway X`."""

import sys

from launch.cli import main

sys.exit(main())
