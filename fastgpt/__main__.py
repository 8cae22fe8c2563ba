"""`python -m fastgpt`, which the `deepspeed` and `torchrun` launchers start."""

import sys

from fastgpt.cli import main

sys.exit(main())
