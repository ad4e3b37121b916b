"""`python -m fastcgi` is `fastcgi`."""
import sys

from .cli import main

sys.exit(main())
