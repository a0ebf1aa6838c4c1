"""`python -m distserve` is `distserve`."""

import sys

from distserve.cli import main

sys.exit(main())
